"""A bundle that is damaged or foreign is refused before a byte of it is written."""

import json
import subprocess
import sys

import pytest
from helpers import FOLDER

# A real bundle of one small compiled function, then every way to spoil it. In a process of its
# own, with caches of its own: what is loaded cannot be unloaded.
PROGRAM = """
import dataclasses, json, os, sys
from pathlib import Path

import torch
from common.errors import ScriptError
from portable_cache.build import saving
from portable_cache.start import bundle
from torch.compiler._cache import CacheArtifactManager, _serialize_single_cache
from torch.utils._appending_byte_serializer import AppendingByteSerializer


saving.watch()
torch.compile(lambda x: (x * 2).sin())(torch.ones(64))
good, _ = saving.save_bundle()


def entries():
    return {kind: list(found) for kind, found in CacheArtifactManager.deserialize(good).items()}


def altered(built_for):
    artifacts = entries()
    first = artifacts["kernel_files"][0]
    artifacts["kernel_files"][0] = dataclasses.replace(first, content=built_for)
    serializer = AppendingByteSerializer(serialize_fn=_serialize_single_cache)
    serializer.extend(artifacts.items())
    return serializer.to_bytes()


built_for = entries()["kernel_files"][0].content


flipped = bytearray(good)
flipped[len(good) // 2] ^= 1
cases = {
    "empty": b"",
    "cut": good[:-100],
    "bit flipped": bytes(flipped),
    "text": b"hello" * 99,
    "another processor": altered(built_for + b" avx1024"),
    "another torch": altered(built_for.replace(b"torch ", b"torch 9.")),
}
root = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
before = {path for path in root.parent.rglob("*")}
answers = {}
for name, blob in cases.items():
    try:
        bundle.load_bundle(blob)
        answers[name] = "loaded"
    except ScriptError as error:
        answers[name] = f"{type(error).__name__}: {error}"
written = [str(path) for path in root.parent.rglob("*") if path not in before]
print(json.dumps({"answers": answers, "written": written}))
"""
FOREIGN = ("another processor", "another torch")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    import os

    folder = tmp_path_factory.mktemp("caches")
    environment = os.environ | {
        "PYTHONPATH": str(FOLDER),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TMPDIR": str(folder),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_spoilt_bundle_is_refused(outcome):
    for name, answer in outcome["answers"].items():
        kind = "ArtifactMismatchError" if name in FOREIGN else "ArtifactDamagedError"
        assert answer.startswith(kind), (name, answer)


def test_nothing_is_written_for_a_refused_bundle(outcome):
    assert outcome["written"] == []
