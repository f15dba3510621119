"""What a package of layer programs is as a file: weights that can be used where they lie."""

import zipfile

import pytest
import torch
from safetensors.torch import load

from aotinductor.build.layer_package import ALIGNMENT, write_package


@pytest.fixture
def written(tmp_path):
    """A package, and what went into it."""
    files = {"programs/head/a.so": b"code" * 7, "native/b.so": b"c"}
    for name, content in files.items():
        (tmp_path / name.replace("/", "-")).write_bytes(content)
    weights = {
        "odd": torch.arange(5.0).bfloat16(),  # no multiple of the alignment
        "model.norm.weight": torch.arange(64.0),
        "one": torch.ones(16, 2).half(),
    }
    entries = {name: tmp_path / name.replace("/", "-") for name in files}
    write_package(tmp_path / "kv.pt2", entries, weights)
    return tmp_path / "kv.pt2", files, weights


def test_every_entry_is_stored_as_it_is(written):
    package, files, _ = written
    with zipfile.ZipFile(package) as archive:
        assert archive.testzip() is None
        assert len(archive.infolist()) == 3
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        for name, expected in files.items():
            assert archive.read(f"kv/{name}") == expected


def test_weights_are_a_safetensors_file_whose_content_is_aligned(written):
    package, _, weights = written
    with zipfile.ZipFile(package) as archive:
        content = archive.read("kv/weights/model.safetensors")
    found = load(content)
    assert found.keys() == weights.keys()
    for name, expected in weights.items():
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)
    place = package.read_bytes().index(content)
    assert (place + 8 + int.from_bytes(content[:8], "little")) % ALIGNMENT == 0
