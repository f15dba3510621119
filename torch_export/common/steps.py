"""Steps of a measurement: processes bounded in time, finished ones kept and not repeated."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from common.kept_trials import KEPT_VARIABLE
from common.results import without_machine_paths, write_json

GRACE_SECONDS = 20.0  # for a step to end its own trials and remove its temporary files


@dataclass(frozen=True)
class Ended:
    """How a step's process ended; `error` is None when all went well."""

    seconds: float
    error: str | None


def run_bounded(
    command: Sequence[str], timeout_seconds: float, show: bool = True, **environment: str
) -> Ended:
    """Run a command and end it when its time is up; with `show` its stdout is on our stderr."""
    began = time.monotonic()
    process = subprocess.Popen(
        [str(word) for word in command],
        env=os.environ | {"PYTHON": sys.executable} | environment,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if show else subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        status = process.wait(timeout_seconds)
        error = None if status == 0 else f"exit status {status}"
    except subprocess.TimeoutExpired:
        error = f"did not end within {timeout_seconds:.0f} s"
    finally:
        _end(process)
    return Ended(time.monotonic() - began, error)


def _end(process: subprocess.Popen) -> None:
    if process.poll() is not None:
        return
    # the scripts unwind on SIGTERM, and end the trial that they are waiting for
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass(frozen=True)
class StateFolder:
    """Where finished steps lie, one JSON file each, and the finished trials of the current one."""

    path: Path

    def recall(self, step: str, command: Sequence[str]) -> dict | None:
        """Return the record of a finished step if it was made by this very command."""
        file = self._record(step)
        record = json.loads(file.read_bytes()) if file.exists() else None
        # as it was written: with this machine's own places named portably
        portable = [without_machine_paths(word) for word in command]
        return record if record and record["command"] == portable else None

    def read(self, step: str) -> dict | None:
        file = self._record(step)
        return json.loads(file.read_bytes()) if file.exists() else None

    def forget(self, steps: Sequence[str]) -> None:
        for step in steps:
            self._record(step).unlink(missing_ok=True)
            shutil.rmtree(self._trials(step), ignore_errors=True)

    def run(
        self, step: str, command: Sequence[str], timeout_seconds: float, *also: str
    ) -> str | None:
        """Run a step that writes its result with `--json`; keep it, or return what went wrong.

        `also` are flags that do not change what is measured.
        """
        result = self.path / f"{step}_result.json"
        result.unlink(missing_ok=True)
        trials = self._trials(step)
        trials.mkdir(parents=True, exist_ok=True)
        ended = run_bounded(
            [*command, *also, f"--json={result}"], timeout_seconds, **{KEPT_VARIABLE: str(trials)}
        )
        if ended.error is None and not result.exists():
            return "ended well but wrote no result"
        if ended.error is not None:
            return ended.error
        record = {
            "command": list(command),
            "seconds": ended.seconds,
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "result": json.loads(result.read_bytes()),
        }
        write_json(record, self._record(step))
        result.unlink()
        shutil.rmtree(trials, ignore_errors=True)
        return None

    def _record(self, step: str) -> Path:
        return self.path / f"{step}.json"

    def _trials(self, step: str) -> Path:
        return self.path / "trials" / step
