"""Result files: what a run, a compare and a benchmark write with `--json`."""

import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common.cli import flag_values
from common.versions import package_version

SCHEMA = 1


def environment() -> dict[str, Any]:
    """Return the machine and the stack; what cannot be told is None.

    Imports nothing new: a process that has no torch yet gets the GPU's fields as None.
    """
    return gpu_environment() | _stack()


@functools.cache  # asks git, and reads metadata of packages: once a process
def _stack() -> dict[str, Any]:
    return {
        "torch": package_version("torch"),
        "triton": package_version("triton"),
        "transformers": package_version("transformers"),
        "python": platform.python_version(),
        # not platform.platform(): the name of a kernel build tells of the machine's owner
        "platform": " ".join((platform.system(), platform.machine(), *platform.libc_ver())),
        "cpu": _cpu_name(),
        "commit": _commit(),
    }


def run_header(approach: str, mode: str, config: dict) -> dict[str, Any]:
    """Return how a run's result begins: what ran, how, and where."""
    return {
        "schema": SCHEMA,
        "kind": "run",
        "approach": approach,
        "mode": mode,
        "command": [sys.executable, *sys.argv],
        "environment": environment(),
        "config": config,
    }


def config_of(*groups: Any) -> dict[str, Any]:
    """Return the flags of all groups by name, as JSON values."""
    return {name: _as_json(value) for name, value in flag_values(*groups)}


def write_json(document: dict, path: Path | None) -> None:
    """Write a result file whole or not at all; None is no file."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = without_machine_paths(json.dumps(document, indent=2, allow_nan=False)) + "\n"
    if not path.exists() or path.is_file():
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            file.write(text)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    else:  # a pipe or /dev/stdout cannot be replaced
        path.write_text(text)


def without_machine_paths(text: str) -> str:
    """Name places as another machine can read them: a result file is made to be handed on."""
    folder = Path(__file__).resolve().parents[1]
    places = {
        f"{folder}/": "./",
        sys.executable: "python",
        tempfile.gettempdir(): "$TMPDIR",
        os.path.expanduser("~") + "/": "~/",
    }
    for place in sorted(places, key=len, reverse=True):  # a folder may lie in another one
        text = text.replace(place, places[place])
    return text


def _as_json(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def gpu_environment() -> dict[str, Any]:
    """Return name, compute capability, driver and CUDA of the GPU, each None without one."""
    torch = sys.modules.get("torch")
    unknown = dict.fromkeys(("gpu", "compute_capability", "driver", "cuda"))
    if torch is None or not torch.cuda.is_available():
        return unknown
    return {
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def _driver() -> str | None:
    # the kernel module says it at once; nvidia-smi takes a good part of a second, inside a start
    try:
        words = Path("/proc/driver/nvidia/version").read_text().splitlines()[0].split()
        return next(word for word in words if word[0].isdigit() and "." in word)
    except (OSError, IndexError, StopIteration):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return _first_line_of(query)


def _commit() -> str | None:
    """Return the commit of the repository that this file is in, marked when it has changes."""
    folder = str(Path(__file__).parent)
    return _first_line_of(["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"])


def _first_line_of(command: list[str]) -> str | None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.splitlines()[0].strip() if answer.stdout.strip() else None


def _cpu_name() -> str | None:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or None
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].partition(':')[2].strip()} x{len(names)}" if names else None
