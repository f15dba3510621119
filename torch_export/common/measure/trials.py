"""Isolated trials: a run script in a fresh process with empty compiler caches of its own.

Cold means: new process, empty compiler caches. The page cache is warm after the first trial.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.compiler.caches import cache_places, folder_for_compilers
from common.errors import INTERRUPTED
from common.measure.measures import START_VARIABLE


@dataclass(frozen=True)
class Outcome:
    """How one trial ended; `document` is its run result when it wrote one."""

    wall_seconds: float
    peak_host_bytes: int
    document: dict | None
    error: str | None

    @property
    def ok(self) -> bool:
        return self.error is None


def run_trial(script_and_flags: Sequence[str]) -> Outcome:
    """Run a script in a fresh process, with all its temporary files in one folder of its own."""
    with folder_for_compilers("llama-trial-") as folder:
        result, log = Path(folder, "result.json"), Path(folder, "stderr.txt")
        start = time.monotonic()
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, *script_and_flags, "--quiet", f"--json={result}"],
                env=os.environ | cache_places(folder) | {START_VARIABLE: repr(start)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,  # so that its compiler workers can be ended with it
            )
        peak_bytes = _wait(process)
        wall_seconds = time.monotonic() - start
        document = json.loads(result.read_bytes()) if result.exists() else None
        error = None
        if process.returncode or document is None:
            error = _describe_end(process.returncode, peak_bytes, log.read_text("utf-8", "replace"))
        return Outcome(wall_seconds, peak_bytes, document, error)


def _wait(process: subprocess.Popen) -> int:
    """Wait until it ends, on an interrupt by force; return its peak resident bytes."""
    try:
        # wait4, not Popen.wait: it also tells the memory of this one child
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * 1024


def _describe_end(status: int, peak_bytes: int, stderr: str) -> str:
    last_line = next(filter(str.strip, reversed(stderr.splitlines())), "no message")
    if status == 0:
        return "ended with status 0 but wrote no result"
    if status > 0:
        how = "interrupted" if status == INTERRUPTED else f"exit status {status}"
        return f"{how}: {last_line.removeprefix('error: ')}"
    name = signal.Signals(-status).name
    advice = " (often the kernel, out of memory)" if name == "SIGKILL" else ""
    return (
        f"killed by {name}{advice}: it had used {peak_bytes / 1e9:.1f} GB of host memory; "
        f"last line on stderr: {last_line}"
    )
