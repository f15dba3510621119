"""What the fault tests share: spoilt artifacts, and a script's main() called again and again.

    server = ScriptServer(script, work)   one process, so that torch is imported once
    answer = server.run("--model-id=random:tiny", ...)

Run as a program this file is that process. A crash or a hang of it is a failure of the test that
asked, which says how it ended.
"""

import dataclasses
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER))

from helpers import user_environment  # noqa: E402

from common.artifact.disk import ArtifactPair  # noqa: E402
from common.artifact.manifest import dump_manifest, parse_manifest  # noqa: E402

TIME_LIMIT_SECONDS = 120.0  # of one call: the bound that no fault may reach


@dataclass(frozen=True)
class Subject:
    """What is tested: a folder's scripts, and the artifact that it was given for random:tiny."""

    build: str  # names of scripts
    run: str
    path_flag: str  # of the artifact
    pair: ArtifactPair
    flags: tuple[str, ...]  # a run that must load the artifact
    build_flags: tuple[str, ...]
    checked: tuple[str, ...]  # fields of the metadata that must be this run's
    verify_flags: tuple[str, ...] = ()  # what a build needs besides to be published

    def run_flags(self, pair: ArtifactPair) -> list[str]:
        return [*self.flags, f"{self.path_flag}={pair.path}"]


@dataclass(frozen=True)
class Answer:
    """How one call of main() ended. `written` are the paths that it wrote, made or removed."""

    status: int
    text: str  # stdout and stderr
    seconds: float
    written: list[str]

    def error(self) -> str:
        """Return the one line that a failure ends with; the text holds no traceback."""
        assert "Traceback" not in self.text
        errors = [line for line in self.text.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, self.text
        return errors[0]


# --- spoilt artifacts ------------------------------------------------------------------------


def copy_pair(pair: ArtifactPair, folder: Path) -> ArtifactPair:
    folder.mkdir(mode=0o755, exist_ok=True)
    copies = (shutil.copy(path, folder) for path in (pair.path, pair.metadata_path))
    return ArtifactPair(*map(Path, copies))


def edit_metadata(pair: ArtifactPair, **changes: Any) -> None:
    """Change fields by name, those inside by `outer__inner`; the metadata stays a valid one.

    A change is a value, or a function of the old value; `...` takes the inner field away.
    """
    manifest = parse_manifest(pair.metadata_path.read_bytes())
    for name, change in changes.items():
        outer, _, inner = name.partition("__")
        old = getattr(manifest, outer)
        if inner:
            value = change(old[inner]) if callable(change) else change
            change = {key: old[key] for key in old if key != inner}
            change |= {} if value is ... else {inner: value}
        manifest = manifest._replace(**{outer: change})
    pair.metadata_path.write_text(dump_manifest(manifest))


def put(pair: ArtifactPair, content: bytes) -> None:
    """Replace the artifact by at most a block of bytes, and make the metadata name these."""
    pair.path.write_bytes(content)
    edit_metadata(pair, file={"bytes": len(content), "sha256": sha256(content).hexdigest()})


def mutations(content: bytes, chance: random.Random) -> Iterator[bytes]:
    """Yield `content` damaged in another way each time, for ever; never `content` itself."""
    while True:
        start = chance.randrange(len(content))
        length = min(chance.choice((1, 8, 500, 10**5)), len(content) - start)
        noise = chance.randbytes(length)
        damaged = chance.choice(
            (
                content[:start],
                content[:start] + bytes([content[start] ^ 1 << chance.randrange(8)])
                + content[start + 1 :],
                content[:start] + noise + content[start + length :],
                content[:start] + noise + content[start:],
                content[:start] + content[start + length :],
                content[:start] + bytes(length) + content[start + length :],
                content + noise,
                noise,
            )
        )  # fmt: skip
        if damaged != content:
            yield damaged


# --- main() again and again ------------------------------------------------------------------


class ScriptServer:
    """A process that calls a script's main() with the flags it is sent."""

    def __init__(self, script: Path, work: Path, **environment: str):
        self.work = work
        (work / "tmp").mkdir(parents=True)
        places = {"TMPDIR": str(work / "tmp"), "HOME": str(work), "PYTHONDONTWRITEBYTECODE": "1"}
        self._script, self._environment = script, user_environment() | places | environment
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.work,
            env=self._environment,
        )

    def run(self, *flags: str) -> Answer:
        """Call main(flags); a process that dies or hangs is an AssertionError."""
        if self._process.poll() is not None:  # it died of an earlier test's fault
            self._start()
        timer = threading.Timer(TIME_LIMIT_SECONDS, self._process.kill)
        timer.start()
        began = time.monotonic()
        try:
            self._process.stdin.write(json.dumps(flags) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            status, seconds = self._process.wait(), time.monotonic() - began
            raise AssertionError(f"ended with {status} after {seconds:.1f} s at {flags}")
        return Answer(**json.loads(line))

    def outside(self, answer: Answer, *allowed: Path) -> list[str]:
        """Return what was written outside the work folder and the folders that are allowed."""
        folders = [str(self.work), "/dev", *map(str, allowed)]
        return [
            path
            for path in answer.written
            if not any(path == folder or path.startswith(f"{folder}/") for folder in folders)
        ]

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(30)


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir")
_written: list[str] = []


def _note_writes(event: str, arguments: tuple) -> None:
    paths: tuple = ()
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
        paths = arguments[:1]
    elif event in _CHANGES:
        paths = arguments[:2]
    _written.extend(os.path.abspath(os.fsdecode(p)) for p in paths if isinstance(p, str | bytes))


def _call(module: Any, flags: list[str]) -> Answer:
    from common.errors import run_script

    sys.argv = [module.__file__, *flags]
    _written.clear()
    with tempfile.TemporaryFile() as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        began, status = time.monotonic(), 0
        try:
            run_script(module.main, flags)
        except SystemExit as end:
            status = end.code
        seconds = time.monotonic() - began
        sys.stdout.flush()
        sys.stderr.flush()
        log.seek(0)
        return Answer(status, log.read().decode(errors="replace"), seconds, sorted(set(_written)))


def _serve(script: str) -> None:
    module = importlib.import_module(Path(script).stem)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    sys.addaudithook(_note_writes)
    for line in sys.stdin:
        answers.write(json.dumps(dataclasses.asdict(_call(module, json.loads(line)))) + "\n")


if __name__ == "__main__":
    _serve(sys.argv[1])
