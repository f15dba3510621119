"""What a package of layer programs is as a file: entries that can be used where they lie."""

import zipfile

import pytest
import torch
from safetensors.torch import load

from aotinductor.build.layer_package import ALIGNMENT, check_constants, write_package
from common.errors import ScriptError


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


def test_every_entry_is_stored_as_it_is_and_begins_aligned(written):
    package, files, _ = written
    content = package.read_bytes()
    with zipfile.ZipFile(package) as archive:
        assert archive.testzip() is None
        assert len(archive.infolist()) == 3
        for entry in archive.infolist():
            assert entry.compress_type == zipfile.ZIP_STORED
            at = entry.header_offset
            begin = (
                at
                + 30
                + sum(int.from_bytes(content[at + i : at + i + 2], "little") for i in (26, 28))
            )
            assert begin % ALIGNMENT == 0
            assert content[begin : begin + entry.file_size] == archive.read(entry)
        for name, expected in files.items():
            assert archive.read(f"kv/{name}") == expected


def test_weights_are_a_safetensors_file_whose_tensors_are_aligned(written):
    package, _, weights = written
    with zipfile.ZipFile(package) as archive:
        content = archive.read("kv/weights/model.safetensors")
    found = load(content)
    assert found.keys() == weights.keys()
    for name, expected in weights.items():
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)
    begin = 8 + int.from_bytes(content[:8], "little")
    assert begin % ALIGNMENT == 0
    for name in ("model.norm.weight", "one"):  # "odd" comes behind them
        raw = weights[name].flatten().view(torch.uint8).numpy().tobytes()
        assert (content.index(raw) - begin) % ALIGNMENT == 0


class Holder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("held", torch.ones(3))

    def forward(self, x):
        return x + self.held


def test_a_program_that_holds_a_tensor_is_refused_by_its_name(tmp_path):
    exported = torch.export.export(Holder(), (torch.ones(3),))
    with pytest.raises(ScriptError, match="head holds constants of its own: held"):
        check_constants("head", exported, [])
    source = tmp_path / "a.wrapper.cpp"  # one that the compiler makes itself
    source.write_text('    constants_info_[0].name = "packed_0";\n')
    plain = torch.export.export(torch.nn.Identity(), (torch.ones(3),))
    with pytest.raises(ScriptError, match="packed_0"):
        check_constants("head", plain, [str(source)])
    source.write_text("nothing of the kind")
    check_constants("head", plain, [str(source)])
