"""What a script tells its user: results on stdout, everything else on stderr."""

import sys
from collections.abc import Collection
from typing import Any


class Console:
    """Progress and warnings for people; `quiet` keeps warnings and results only."""

    def __init__(self, quiet: bool):
        self.quiet = quiet

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def result(self, text: str) -> None:
        print(text, flush=True)

    def bar(self, items: Collection[Any], label: str, unit: str):
        """Return `items` behind a tqdm progress bar on stderr; a single item needs none."""
        # imported here: a lean start that shows no bar does not pay for tqdm
        from tqdm import tqdm

        return tqdm(
            items, desc=label, unit=unit, file=sys.stderr, disable=self.quiet or len(items) < 2
        )
