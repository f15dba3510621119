"""Faults that only a portable cache can have: hostile blobs, and caches that are switched off."""

import dataclasses
import os
import pickle
import random
import time
import zlib
from pathlib import Path

import pytest
from faults import mutations, put
from helpers import CACHE_VARIABLES, run_script
from test_faults import DAMAGED, ENVIRONMENT, UNTRUSTED, pair, refusal, server

from portable_cache import torch_private
from portable_cache.start import bundle

assert bundle  # it mends how torch reads a blob, and knows its kinds of entries

__all__ = ["pair", "refusal", "server"]  # fixtures


class Canary:
    """A pickle of this writes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "sung")


def pack(artifacts) -> bytes:
    from torch.compiler._cache import _serialize_single_cache
    from torch.utils._appending_byte_serializer import AppendingByteSerializer

    serializer = AppendingByteSerializer(serialize_fn=_serialize_single_cache)
    serializer.extend(artifacts.items())
    return serializer.to_bytes()


def unpack(blob: bytes) -> dict:
    found = torch_private.CacheArtifactManager.deserialize(blob)
    return {kind: list(entries) for kind, entries in found.items()}


def with_checksum(blob: bytes) -> bytes:
    """Return the blob with the checksum that torch checks, made right."""
    return zlib.crc32(blob[4:]).to_bytes(4, "big") + blob[4:]


@pytest.fixture
def hostile(pair, tmp_path):
    """Return a function that changes the first entry of a kind, all checksums right."""

    def change(kind, **changes):
        artifacts = unpack(pair.path.read_bytes())
        artifacts[kind][0] = dataclasses.replace(artifacts[kind][0], **changes)
        put(pair, pack(artifacts))

    return change


@pytest.mark.parametrize("kind", ["inductor", "aot_autograd"])
def test_a_pickle_from_an_untrusted_place_is_never_read(kind, hostile, pair, refusal, tmp_path):
    canary = tmp_path / "canary"
    content = pickle.dumps(Canary(canary))
    hostile(kind, content=content)
    for path in (pair.path.parent, pair.path, pair.metadata_path):
        before = path.stat().st_mode
        path.chmod(0o777)
        refusal(UNTRUSTED)
        path.chmod(before)
    assert not canary.exists()
    pickle.loads(content)
    assert canary.exists()  # it would have sung


@pytest.mark.parametrize("kind", ["inductor", "aot_autograd", "kernel_files"])
@pytest.mark.parametrize("key", ["../../canary", "/tmp/canary-of-the-fault-tests", "a/../../c"])
def test_a_key_that_climbs_out_of_the_cache_is_refused(kind, key, hostile, refusal):
    hostile(kind, key=key)
    refusal(DAMAGED)  # and the refusal saw no write outside
    assert not Path("/tmp/canary-of-the-fault-tests").exists()


@pytest.mark.parametrize("tail", [b"\0", b"\0" * 8, b"\0" * 400, bytes(range(256)) * 40])
def test_trailing_bytes_with_a_right_checksum_are_no_hang(tail, pair, refusal):
    put(pair, with_checksum(pair.path.read_bytes() + tail))
    refusal(DAMAGED)


def test_an_endless_list_of_entries_is_no_hang(pair, refusal):
    kind = (8).to_bytes(8, "big") + b"aW5kdWN0"
    put(pair, with_checksum(bytes(4) + (1).to_bytes(8, "big") + kind + b"\xff" * 8))
    refusal(DAMAGED)


def test_two_hundred_blobs_with_right_checksums_are_read_to_an_end(pair):
    good = pair.path.read_bytes()
    began = time.monotonic()
    for _, damaged in zip(range(200), mutations(good, random.Random(4)), strict=False):
        torch_private.CacheArtifactManager.deserialize(with_checksum(damaged))
    assert torch_private.CacheArtifactManager.deserialize(good)
    assert time.monotonic() - began < 60


def test_forty_mutated_blobs_with_right_hashes_are_refused(pair, refusal):
    damaged = mutations(pair.path.read_bytes(), random.Random(5))
    for _ in range(40):
        put(pair, next(damaged))
        refusal(DAMAGED)


OFF = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}


def test_switched_off_caches_are_named_at_the_build_before_anything_is_compiled(subject, pair):
    done = run_script(
        subject.build, *subject.build_flags, f"{subject.path_flag}={pair.path}", **OFF
    )
    assert done.status == ENVIRONMENT, done.stderr
    assert "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1" in done.stderr.splitlines()[-1]
    assert "compiled in" not in done.stderr


@pytest.mark.parametrize(
    "variable", ["TORCHINDUCTOR_FORCE_DISABLE_CACHES=1", "TORCHINDUCTOR_FX_GRAPH_CACHE=0"]
)
def test_switched_off_caches_are_no_silent_recompile(variable, subject):
    name, value = variable.split("=")
    done = run_script(subject.run, *subject.run_flags(subject.pair), **{name: value})
    assert done.status == ENVIRONMENT, done.stderr
    assert variable in done.stderr.splitlines()[-1]


def test_the_caches_of_a_run_are_its_own_and_gone_afterwards(monkeypatch):
    from common.compiler.caches import private_compiler_caches

    for name in CACHE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with private_compiler_caches():
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        assert folder == Path(os.environ["TRITON_CACHE_DIR"]).parent
    assert not folder.exists()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
