"""Runs the project's scripts as a user does, keeps what each one did, and reports checks."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SITE = Path(__file__).resolve().parent / "site"
TIMEOUT_SECONDS = 600
COMPILERS = ("gcc", "g++", "cc", "c++", "clang", "clang++", "nvcc", "cc1", "cc1plus")


class UnexpectedEndError(Exception):
    """A script ended otherwise than the rehearsal needs it to: what follows makes no sense."""


@dataclass(frozen=True)
class Ended:
    """One script that has ended."""

    stderr: list[str]
    calls: list[dict]  # what site/sitecustomize.py wrote down
    document: dict  # its --json

    def named(self, what: str) -> list[str]:
        return [call["name"] for call in self.calls if call["what"] == what]

    def compilers_called(self) -> list[str]:
        """Return the subprocesses that compile: compilers, ptxas, Inductor's pool of workers."""
        return [command for command in self.named("subprocess") if compiles(command)]


def compiles(command: str) -> bool:
    program = os.path.basename(command.split(" ", 1)[0])
    asks_version = command.endswith("--version")
    return "compile_worker" in command or (
        not asks_version and (program in COMPILERS or program == "ptxas")
    )


@dataclass
class Rehearsal:
    """Where artifacts go, what the GPU is, and which checks have failed."""

    folder: Path
    real: bool  # a GPU that computes
    failed: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, script: str, *flags: object, status: int = 0, **environment: str) -> Ended:
        """Run a script with --quiet; raise UnexpectedEndError unless it ends with `status`."""
        own = Path(tempfile.mkdtemp(dir=self.folder, prefix=Path(script).stem[:12] + "-"))
        calls, result = own / "calls", own / "result.json"
        command = [sys.executable, REPOSITORY / script, *flags, "--quiet", f"--json={result}"]
        common = {"PYTHONPATH": SITE, "REHEARSAL_CALLS": calls, "TMPDIR": own}
        ended = subprocess.run(
            list(map(str, command)),
            env={**os.environ, "OMP_NUM_THREADS": "1", **common, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
        stderr = ended.stderr.splitlines()
        if ended.returncode != status:
            last = " | ".join(stderr[-3:])
            raise UnexpectedEndError(f"{script} ended with {ended.returncode}: {last}")
        return Ended(
            stderr,
            [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else [],
            json.loads(result.read_bytes()) if result.exists() else {},
        )

    def check(self, subject: str, claim: str, wrong: Iterable[object]) -> None:
        """Print whether `claim` holds of `subject`: it does when there is nothing `wrong`."""
        counted = Counter(map(str, wrong))
        shown = ", ".join(f"{count} x {name}" for name, count in counted.most_common(6))
        more = f" and {len(counted) - 6} more" if len(counted) > 6 else ""
        line = f"{subject}: {claim}"
        with self.lock:
            print(f"FAILED  {line}: {shown}{more}" if counted else f"ok      {line}", flush=True)
            if counted:
                self.failed.append(line)

    def check_that(self, subject: str, claim: str, holds: bool, found: object) -> None:
        self.check(subject, claim, [] if holds else [found])

    def check_build(self, subject: str, built: Ended) -> None:
        """Check that it was quiet, and that what a start must not do is seen where it is done."""
        self.check(subject, "a quiet build says nothing", built.stderr)
        seen = {what: built.named(what) for what in ("compiled", "tuned")}
        seen["compiler called"] = built.compilers_called()
        unseen = [what for what, names in seen.items() if not names]
        self.check(subject, "a build is seen to compile and to tune", unseen)

    def check_toolchain(self, subject: str, build: str) -> None:
        """Without a compiler a build says what is missing before it loads the model."""
        refused = self.run(build, "--model-id=random:tiny", status=5, PATH=str(self.folder))
        text = " | ".join(refused.stderr)
        self.check_that(subject, "a missing compiler is one line", "compiler: " in text, text)

    def check_compare(self, subject: str, run: str, *flags: object) -> None:
        # where nothing is computed, tokens are whatever the memory held
        differ = () if self.real else ("--tokens-may-differ",)
        compared = self.run(run, *flags, "--compare-load-vs-skip", "--compare-runs=1", *differ)
        errors = [trial["error"] for trial in compared.document["trials"] if not trial["ok"]]
        self.check(subject, "load and skip both run", errors)

    def check_logits(self, subject: str, script: str, files: Iterable[str]) -> None:
        """On a GPU that computes: the folder's own comparison with eager, which fails by itself."""
        self.run(script, *files, "--logit-prompt-lengths=16,60")
        self.check(subject, "logits are eager's", [])
