"""Weights come from any file's offsets as they lie there, and a damaged checkpoint is named."""

import ctypes
import json
import threading

import pytest
import torch
from safetensors.torch import save_file

from common import cuda
from common.errors import UsageError
from common.model import weights
from common.model.stored import Stored, list_stored, read_header
from common.model.weights import Tensor, start_upload


@pytest.fixture
def tensors():
    return {
        "a": torch.arange(12, dtype=torch.float32).view(3, 4),
        "b": torch.arange(5, dtype=torch.float16),
        "ids": torch.tensor([7]),
    }


@pytest.fixture
def checkpoint(tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def seen_by_torch(tensor):
    raw = (ctypes.c_char * tensor.nbytes).from_address(tensor.address)
    return torch.frombuffer(raw, dtype=getattr(torch, tensor.dtype)).view(tensor.shape)


def convert(source, dtype, place, wanted, count):
    one, other = Tensor(source, (count,), dtype), Tensor(place, (count,), wanted)
    seen_by_torch(other).copy_(seen_by_torch(one))


def brought(stored, device="cpu", dtype=None):
    return start_upload(stored, device, dtype, convert).wait()


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        one = seen_by_torch(found[name])
        assert one.dtype == tensor.dtype
        assert torch.equal(one, tensor)


def test_a_checkpoint_gives_its_tensors_by_name(checkpoint, tensors):
    assert_equal(brought(list_stored(checkpoint)), tensors)


def test_only_floating_point_tensors_are_converted(checkpoint, tensors):
    found = brought(list_stored(checkpoint), dtype="bfloat16")
    expected = {name: tensors[name].bfloat16() for name in "ab"} | {"ids": tensors["ids"]}
    assert_equal(found, expected)


def test_shards_are_one_checkpoint(tensors, tmp_path):
    files = {"a": "1.safetensors", "b": "2.safetensors", "ids": "2.safetensors"}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in tensors if files[n] == file}, tmp_path / file)
    index = {"weight_map": files}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_equal(brought(list_stored(tmp_path)), tensors)


def test_a_tensor_may_lie_anywhere_in_any_file(tmp_path):
    expected = torch.randn(3, 5)
    path = tmp_path / "any"
    path.write_bytes(b"123" + expected.numpy().tobytes() + b"rest")  # no multiple of its item
    stored = {"one": Stored(path, "float32", (3, 5), 3)}
    found = brought(stored | {"other": stored["one"]})
    assert_equal(found, {"one": expected, "other": expected})


def test_writing_to_a_tensor_never_reaches_the_file(checkpoint):
    before = (checkpoint / "model.safetensors").read_bytes()
    found = brought(list_stored(checkpoint))["a"]
    seen_by_torch(found).fill_(1)
    assert (checkpoint / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("kept", (0, 7, 20, -1))
def test_a_file_that_is_cut_off_is_named(kept, checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UsageError, match=r"model\.safetensors is .*: download it again"):
        read_header(path)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_a_tensor_is_converted_whole_in_pieces(monkeypatch, tmp_path, dtype):
    monkeypatch.setattr(weights, "_STAGING_BYTES", 64)
    source = torch.randn(7, 11)
    path = tmp_path / "any"
    path.write_bytes(b"12" + source.numpy().tobytes())
    counts = []

    def counted(*place):
        counts.append(place[-1])
        convert(*place)

    stored = {"one": Stored(path, "float32", (7, 11), 2)}
    found = start_upload(stored, "cpu", dtype, counted).wait()
    assert max(counts) == 32 and sum(counts) == 77
    assert_equal(found, {"one": source.to(getattr(torch, dtype))})


def test_a_file_that_ends_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(b"1234")
    with open(path, "rb") as file, pytest.raises(OSError, match="ended at byte 4"):
        weights._read_into(file.fileno(), memoryview(bytearray(8)), 0)


def test_waiting_raises_what_a_reader_met():
    upload = weights.Upload({})
    upload.threads = [threading.Thread(target=upload.failures.append, args=(OSError("gone"),))]
    upload.threads[0].start()
    with pytest.raises(OSError, match="gone"):
        upload.wait()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", (None, "bfloat16"))
def test_what_arrives_on_a_gpu_is_what_the_files_hold(checkpoint, dtype):
    stored = list_stored(checkpoint)
    expected = brought(stored, dtype=dtype)
    for name, tensor in brought(stored, "cuda", dtype).items():
        assert tensor.address % 512 == 0
        back = torch.empty(tensor.nbytes, dtype=torch.uint8)
        where = (ctypes.c_void_p(back.data_ptr()), ctypes.c_void_p(tensor.address))
        cuda.runtime().cudaMemcpy(*where, ctypes.c_size_t(tensor.nbytes), 2)
        assert torch.equal(back, seen_by_torch(expected[name]).view(-1).view(torch.uint8))
