"""Trials that outlast their parent: a measurement that was stopped goes on where it was.

Only when a parent asks for it through the environment (measure.sh does): compare and benchmark on
their own always measure anew.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from common.results import write_json
from common.trials import Outcome, run_trial

KEPT_VARIABLE = "LLAMA_KEPT_TRIALS"  # a folder


def run_or_recall(command: Sequence[str], number: int) -> Outcome:
    """Run trial `number` of a command, or return it from the folder of finished ones."""
    folder = os.environ.get(KEPT_VARIABLE)
    if not folder:
        return run_trial(command)
    key = hashlib.sha256(json.dumps([sys.executable, *command, number]).encode()).hexdigest()
    path = Path(folder, f"{key[:32]}.json")
    if path.exists():
        return Outcome(**json.loads(path.read_bytes()))
    outcome = run_trial(command)
    if outcome.ok:  # a failure may have passed by the next time
        write_json(asdict(outcome), path)
    return outcome
