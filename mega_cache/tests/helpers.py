"""Running the real scripts as a user does, and reading what they wrote."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent


# torch sets the first one in this process when it is asked for the folder (2.13: when imported)
CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@dataclass(frozen=True)
class Finished:
    """A process that has ended, with the result file it wrote, if any."""

    status: int
    stdout: str
    stderr: str
    result: dict | None


def user_environment() -> dict[str, str]:
    """Return the environment of this process, without the caches that it made for itself."""
    return {name: value for name, value in os.environ.items() if name not in CACHE_VARIABLES}


def run_command(command: list[str], result: Path | None = None, **environment: str) -> Finished:
    """Run a command to its end; `environment` is added to a user's."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env=user_environment() | environment,
        timeout=900,
    )
    written = json.loads(result.read_text()) if result and result.exists() else None
    return Finished(done.returncode, done.stdout, done.stderr, written)


def run_script(name: str, *flags: str, folder: Path = FOLDER, result: Path | None = None, **env):
    """Run one of the folder's Python scripts with this interpreter."""
    json_flag = [f"--json={result}"] if result else []
    command = [sys.executable, str(folder / name), "--model-id=random:tiny", *json_flag, *flags]
    return run_command(command, result, **env)


def run_wrapper(name: str, *flags: str, folder: Path = FOLDER, **env) -> Finished:
    """Run one of the folder's shell wrappers with this interpreter as its PYTHON."""
    return run_command([str(folder / name), *flags], PYTHON=sys.executable, **env)


def succeeded(finished: Finished) -> Finished:
    assert finished.status == 0, finished.stderr[-3000:]
    return finished
