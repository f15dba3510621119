"""Which checkpoints a package is made of, and for: by family, rope, window, and every byte."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from aotinductor.models import refuse_unsupported
from aotinductor.recipe import files_identity, weights_fingerprint
from common.cli import Console
from common.errors import UsageError
from common.model.checkpoint import resolve_checkpoint

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def tiny(shared_folders):
    return resolve_checkpoint("random:tiny", QUIET)


@pytest.fixture
def copy(tiny, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny.folder, folder)
    return folder


def described(folder, **changes):
    (folder / "model.safetensors").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text()) | {"rope_scaling": None} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return resolve_checkpoint(str(folder), QUIET)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "use_sliding_window": False, "sliding_window": 64},
    ],
)
@pytest.mark.parametrize("kv_cache", [True, False])
def test_these_are_what_the_graphs_are_made_for(changes, kv_cache, copy):
    refuse_unsupported(described(copy, **changes), kv_cache)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gemma2", "pad_token_id": 0}, "is a gemma2 model"),
        ({"model_type": "phi3", "pad_token_id": 0}, "is a phi3 model"),
        ({"model_type": "olmo2"}, "is a olmo2 model"),
        ({"model_type": "smollm3", "pad_token_id": 0}, "is a smollm3 model"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding window of 64 tokens"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 128,
             "max_window_layers": 2},
            "sliding window of 128 tokens",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kv_cache", [True, False])
def test_other_models_are_refused_by_name(changes, words, kv_cache, copy):
    with pytest.raises(UsageError, match=words):
        refuse_unsupported(described(copy, **changes), kv_cache)


def rewrite(folder, change, **how):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return resolve_checkpoint(str(folder), QUIET)


def test_one_number_deep_inside_makes_other_weights(tiny, copy):
    same = resolve_checkpoint(str(copy), QUIET)
    assert weights_fingerprint(same) == weights_fingerprint(tiny)

    def last_of_all(tensors):
        tensors["model.layers.3.mlp.down_proj.weight"][-1, -1] += 1
        return tensors

    assert weights_fingerprint(rewrite(copy, last_of_all)) != weights_fingerprint(tiny)


def test_weights_are_the_same_however_they_are_cut_into_files(tiny, copy):
    tensors = load_file(copy / "model.safetensors")
    shards = {name: f"model-0000{len(name) % 2}-of-00002.safetensors" for name in tensors}
    for shard in set(shards.values()):
        part = {name: tensor for name, tensor in tensors.items() if shards[name] == shard}
        save_file(part, copy / shard, metadata={"format": "pt"})
    index = {"weight_map": shards}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors").unlink()
    assert weights_fingerprint(resolve_checkpoint(str(copy), QUIET)) == weights_fingerprint(tiny)


def test_what_a_model_does_not_read_is_no_part_of_its_weights(tiny, copy):
    early = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(16) for n in range(4)}
    assert weights_fingerprint(rewrite(copy, lambda t: t | early)) == weights_fingerprint(tiny)


def test_only_the_very_files_are_known_without_reading_them(copy):
    found = resolve_checkpoint(str(copy), QUIET)
    before, path = files_identity(found), copy / "model.safetensors"
    assert files_identity(resolve_checkpoint(str(copy), QUIET)) == before
    content, times = path.read_bytes(), path.stat()
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert files_identity(resolve_checkpoint(str(copy), QUIET)) != before
    path.unlink()
    assert files_identity(resolve_checkpoint(str(copy), QUIET)) is None
    assert weights_fingerprint(resolve_checkpoint(str(copy), QUIET)) is None
