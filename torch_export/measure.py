"""Measure a model whole: build, compare, benchmark, sweep, equivalence; write results/*.json.

    ./measure.sh --model-id random:3b --time-limit 520     run it again until it is done
    ./measure.sh --model-id random:tiny --steps build,compare
    ./measure.sh --sizes random:1b,random:3b,random:8b

A finished step is kept under artifacts/measure and not repeated; --fresh starts over. A stopped
benchmark goes on with the first trial that is missing.
"""

from functools import partial
from pathlib import Path

from aotinductor.flags import APPROACH
from common.errors import run_script
from common.measuring import Plan, main


def artifact_flags(stem: Path) -> list[str]:
    return [f"--package-path={stem}.pt2", f"--metadata-path={stem}_meta.json"]


if __name__ == "__main__":
    run_script(partial(main, Plan(APPROACH, artifact_flags), __doc__))
