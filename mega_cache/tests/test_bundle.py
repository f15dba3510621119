"""A bundle that is damaged, foreign or hostile is refused before a byte of it is written."""

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
from torch._inductor.runtime.autotune_cache import AutotuneCacheArtifact
from torch.utils._appending_byte_serializer import AppendingByteSerializer


saving.watch()
torch.compile(lambda x: (x * 2).sin())(torch.ones(64))
good = saving.save_bundle().blob


def pack(artifacts):
    serializer = AppendingByteSerializer(serialize_fn=_serialize_single_cache)
    serializer.extend(artifacts.items())
    return serializer.to_bytes()


def entries():
    return {kind: list(found) for kind, found in CacheArtifactManager.deserialize(good).items()}


def altered(kind, position=0, **change):
    artifacts = entries()
    artifacts[kind][position] = dataclasses.replace(artifacts[kind][position], **change)
    return pack(artifacts)


built_for = entries()["kernel_files"][0].content


flipped = bytearray(good)
flipped[len(good) // 2] ^= 1
digest, kernel = "0" * 64, "c" + "a" * 51
HELPER = "triton/0/../../evil/cuda_utils.so"
cases = {
    "empty": b"",
    "cut": good[:-100],
    "bit flipped": bytes(flipped),
    "text": b"hello" * 99,
    "header only": pack({}),
    "no graph": pack({"kernel_files": entries()["kernel_files"]}),
    "for nothing": pack(entries() | {"kernel_files": entries()["kernel_files"][1:]}),
    "key with dots": altered("kernel_files", 1, key="../../evil.main.so"),
    "key with dots later": altered("kernel_files", 1, key=f"{digest}/../evil.main.so"),
    "absolute key": altered("kernel_files", 1, key="/tmp/evil.main.so"),
    "other suffix": altered("kernel_files", 1, key=f"{digest}/ab/{kernel}.py"),
    "graph key with dots": altered("inductor", key="../../../../evil"),
    "autograd key with dots": altered("aot_autograd", key="../evil"),
    "helper with dots": pack(entries() | {"autotune": [AutotuneCacheArtifact(HELPER, b"")]}),
    "plain file with dots": pack(entries() | {"autotune": [AutotuneCacheArtifact("../a", b"")]}),
    "another processor": altered("kernel_files", content=built_for + b" avx1024"),
    "another torch": altered("kernel_files", content=built_for.replace(b"torch ", b"torch 9.")),
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
FOREIGN = ("another processor", "another torch", "for nothing")


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
