"""Faults that only a portable cache can have: hostile blobs, and caches that are switched off."""

import dataclasses
import os
import pickle
from pathlib import Path

import pytest
from faults import put
from helpers import CACHE_VARIABLES, run_script
from test_faults import ENVIRONMENT, UNTRUSTED, pair, refusal, server

from portable_cache import torch_private
from portable_cache.start import bundle

assert bundle  # it knows the kinds of entries of a blob

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
