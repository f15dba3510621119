"""Isolated trials: a run script in a fresh process with empty compiler caches of its own.

Cold means: new process, empty compiler caches. The page cache is warm after the first trial.
"""

import getpass
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import INTERRUPTED, EnvironmentProblemError
from common.measure.measures import START_VARIABLE

TIMEOUT_SECONDS = 3600.0


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


@contextmanager
def private_compiler_caches() -> Iterator[None]:
    """Give this process empty compiler caches that nobody else can write to, removed at its end.

    Inductor's default is a guessable folder under /tmp, accepted even if another user made it, and
    its precompiled headers go to one in TMPDIR whatever the caches are called. What the user names
    in the environment is kept.
    """
    # mode 0700; a compiler that an interrupt has orphaned may write once more while it is removed
    with tempfile.TemporaryDirectory(
        prefix="llama-compile-", ignore_cleanup_errors=True, dir=_place_for_compilers()
    ) as folder:
        places = _places(folder)
        before = {name: os.environ.get(name) for name in places}
        unfit = {name for name, place in before.items() if place is None or _cut_in_two(place)}
        os.environ.update({name: places[name] for name in unfit})
        tempfile.tempdir = None  # it remembers the first TMPDIR it saw
        try:
            yield
        finally:
            for name in unfit:
                os.environ.pop(name, None)
                if (place := before[name]) is not None:
                    os.environ[name] = place
            tempfile.tempdir = None


def run_trial(script_and_flags: Sequence[str]) -> Outcome:
    """Run a script in a fresh process, with all its temporary files in one folder of its own."""
    with tempfile.TemporaryDirectory(prefix="llama-trial-", dir=_place_for_compilers()) as folder:
        result, log = Path(folder, "result.json"), Path(folder, "stderr.txt")
        start = time.monotonic()
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, *script_and_flags, "--quiet", f"--json={result}"],
                env=os.environ | _places(folder) | {START_VARIABLE: repr(start)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,  # so that its compiler workers can be ended with it
            )
        peak_bytes = _wait(process)
        wall_seconds = time.monotonic() - start
        document = json.loads(result.read_bytes()) if result.exists() else None
        error = None
        if wall_seconds > TIMEOUT_SECONDS:
            error = f"did not end within {TIMEOUT_SECONDS:.0f} s and was killed"
        elif process.returncode or document is None:
            error = _describe_end(process.returncode, peak_bytes, log.read_text("utf-8", "replace"))
        return Outcome(wall_seconds, peak_bytes, document, error)


def _place_for_compilers() -> str:
    """Return the folder for temporary files, or another one if that has a space in its name."""
    usual = tempfile.gettempdir()
    for place in (usual, "/tmp", "/var/tmp"):
        if not _cut_in_two(place) and os.access(place, os.W_OK):
            return place
    raise EnvironmentProblemError(
        f"TMPDIR {usual!r} has a space in it, where compilers' command lines would be cut: set it "
        "to a folder without"
    )


def _cut_in_two(place: str) -> bool:
    return any(character.isspace() for character in place)


def _places(folder: str) -> dict[str, str]:
    """Return the variables that keep a process's temporary files and caches in `folder`."""
    places = {
        "TMPDIR": folder,
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(folder, "inductor"),
        "TRITON_CACHE_DIR": os.path.join(folder, "triton"),
    }
    try:
        getpass.getuser()
    except (KeyError, OSError):  # Python to 3.12, from 3.13 on
        # Inductor asks for a user name even where the user id has none
        places["USER"] = f"uid-{os.getuid()}"
    return places


def _wait(process: subprocess.Popen) -> int:
    """Wait until it ends, on a timeout or an interrupt by force; return its peak resident bytes."""

    def kill_group() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(TIMEOUT_SECONDS, kill_group)
    timer.start()
    try:
        # wait4, not Popen.wait: it also tells the memory of this one child
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        kill_group()
        raise
    finally:
        timer.cancel()
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
