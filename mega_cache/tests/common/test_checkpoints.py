"""A checkpoint is what transformers says it is, or it is refused by name before any work."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from helpers import FOLDER
from safetensors.torch import load_file, save_file

from common.cli import Console
from common.errors import EnvironmentProblemError, UsageError
from common.model import resolve
from common.model.checkpoint import Checkpoint, resolve_checkpoint
from common.model.eager import eager_logits, load_model
from common.model.resolve import ask_transformers, read_config
from common.model.target import Target
from common.model.tokenizer import load_codec

QUIET = Console(quiet=True)
OLD_TRANSFORMERS = transformers.__version__ < "5"
ROPE = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
PROGRAM = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
from common.model.checkpoint import resolve_checkpoint
from common.cli import Console
from common.errors import run_script
def main(argv):
    found = resolve_checkpoint(argv[0], Console(False))
    print(found.config_digest, "torch" in sys.modules or "transformers" in sys.modules)
run_script(main)
"""


@pytest.fixture(scope="module")
def tiny(shared_folders):
    return resolve_checkpoint("random:tiny", QUIET)


@pytest.fixture
def described(tiny, tmp_path):
    """Return a function from changes of config.json to the checkpoint, weights left out."""

    def make(**changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny.folder / name, folder)
        config = json.loads((tiny.folder / "config.json").read_text()) | changes
        kept = {name: value for name, value in config.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))
        return resolve_checkpoint(str(folder), QUIET)

    return make


@pytest.fixture
def copy(tiny, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny.folder, folder)
    return folder


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


# --- the same model, whoever spelled it ------------------------------------------------------


@pytest.mark.parametrize(
    "spelled",
    [
        {"rope_theta": 500000},
        {"transformers_version": "9.9", "eos_token_id": [1, 2], "dtype": "float16"},
        {"architectures": ["Other"], "max_position_embeddings": 4096, "use_cache": False},
        {"rope_scaling": {"type": "llama3", **{k: v for k, v in ROPE.items() if k != "rope_type"}}},
        {"rope_scaling": ROPE | {"factor": 32, "original_max_position_embeddings": 8192.0}},
        {"rope_scaling": ..., "rope_theta": ..., "rope_parameters": ROPE | {"rope_theta": 5e5}},
        {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
        {"head_dim": ...},
    ],
)
def test_another_spelling_is_the_same_architecture_and_rope(spelled, described, tiny):
    found = described(**spelled)
    assert found.config_digest == tiny.config_digest
    assert found.resolved["rope"] == tiny.resolved["rope"]


@pytest.mark.parametrize("spelled", [{"rope_type": "default"}, {"type": "default"}, ...])
def test_no_rope_scaling_has_several_names(spelled, described):
    plain = described(rope_scaling=None)
    assert described(rope_scaling=spelled).config_digest == plain.config_digest
    assert plain.resolved["rope"]["type"] == "default"


LINEAR = {"type": "linear", "factor": 2.0}
MISTRAL = {"model_type": "mistral", "rope_scaling": None}
QWEN = {"model_type": "qwen2", "rope_scaling": None, "sliding_window": 64}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"rope_scaling": LINEAR}, {"rope_scaling": LINEAR | {"type": "dynamic"}}),
        ({"rope_scaling": LINEAR}, {"rope_scaling": LINEAR | {"factor": 4.0}}),
        ({"rope_scaling": LINEAR}, {"rope_scaling": None}),
        ({}, {"rope_theta": 10000.0}),
        ({}, {"rms_norm_eps": 1e-6}),
        ({}, {"tie_word_embeddings": False}),
        ({}, {"attention_bias": True}),
        ({}, {"mlp_bias": True}),
        ({}, {"hidden_act": "gelu"}),
        ({}, {"vocab_size": 600}),
        ({"rope_scaling": None}, {"model_type": "mistral", "rope_scaling": None}),
        (MISTRAL | {"sliding_window": 64}, MISTRAL | {"sliding_window": 4096}),
        (MISTRAL | {"sliding_window": 64}, MISTRAL | {"sliding_window": None}),
        (QWEN, QWEN | {"use_sliding_window": True, "max_window_layers": 0}),
        (QWEN | {"use_sliding_window": True, "max_window_layers": 0},
         QWEN | {"use_sliding_window": True, "max_window_layers": 2}),
        (QWEN, QWEN | {"model_type": "qwen3"}),
    ],
)  # fmt: skip
def test_another_model_has_another_digest(one, other, described):
    first, second = described(**one), described(**other)
    assert first.config_digest != second.config_digest
    assert first.layer_digest != second.layer_digest


def test_any_depth_of_a_shape_has_the_same_layers(described, tiny):
    deeper = described(num_hidden_layers=6)
    assert deeper.config_digest != tiny.config_digest
    assert deeper.layer_digest == tiny.layer_digest
    assert deeper.layers == 6


@pytest.mark.parametrize(
    "rope",
    [
        None, ROPE, LINEAR, LINEAR | {"type": "dynamic"},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    ],
)  # fmt: skip
def test_frequencies_are_those_that_transformers_computes(rope, described):
    found = described(rope_scaling=rope)
    config = transformers.AutoConfig.from_pretrained(found.folder)
    rotary = transformers.AutoModelForCausalLM.from_config(config).model.rotary_emb
    kept = json.loads(json.dumps(found.resolved["rope"]))
    assert torch.equal(torch.tensor(kept["inv_freq"], dtype=torch.float32), rotary.inv_freq)
    assert kept["attention_scaling"] == rotary.attention_scaling
    assert kept["depends_on_length"] == (found.resolved["rope"]["type"] == "dynamic")


def test_rope_settings_of_transformers_5_are_never_theta_10000(described, tiny):
    five = described(rope_scaling=..., rope_theta=..., rope_parameters=ROPE | {"rope_theta": 5e5})
    config = read_config(five.folder)
    rotary = transformers.AutoModelForCausalLM.from_config(config).model.rotary_emb
    assert rotary.inv_freq.double().tolist() == tiny.resolved["rope"]["inv_freq"]


@pytest.mark.skipif(not OLD_TRANSFORMERS, reason="transformers 5 reads them")
def test_rope_settings_that_this_transformers_cannot_express_are_refused(described):
    each = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    with pytest.raises(UsageError, match=r"config\.json.*needs transformers 5"):
        described(rope_scaling=..., rope_theta=..., rope_parameters=each)


def test_stop_ids_are_those_of_generate(copy, tiny):
    assert tiny.eos_token_ids == (259,)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert resolve_checkpoint(str(copy), QUIET).eos_token_ids == (7, 8)
    edit(copy / "generation_config.json", eos_token_id=9)
    assert resolve_checkpoint(str(copy), QUIET).eos_token_ids == (9,)


@pytest.mark.parametrize("own_head", [None, "equal", "other"])
def test_tied_is_what_transformers_ties(own_head, copy):
    if own_head:

        def add_head(tensors):
            head = tensors["model.embed_tokens.weight"].clone()
            head[-1, -1] += own_head == "other"
            return tensors | {"lm_head.weight": head}

        edit_weights(copy, add_head)
    found = resolve_checkpoint(str(copy), QUIET)
    model = transformers.AutoModelForCausalLM.from_pretrained(copy)
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    assert found.tied == torch.equal(head, embedding) == found.record["architecture"]["tied"]
    assert ("lm_head.weight" in found.parameters) == (not found.tied)


@pytest.mark.parametrize(
    ("model_type", "biases", "norms"),
    [
        ("llama", [], False),
        ("mistral", [], False),
        ("qwen2", ["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"], False),
        ("qwen3", [], True),
    ],
)
def test_what_weights_a_family_has_is_told(model_type, biases, norms, described):
    found = described(model_type=model_type, rope_scaling=None)
    assert found.architecture["model_type"] == model_type
    assert found.architecture["biases"] == biases
    assert found.architecture["qk_norm"] is norms
    assert ("model.layers.3.self_attn.q_norm.weight" in found.parameters) == norms
    assert found.parameters["model.layers.0.self_attn.k_proj.weight"] == (64, 256)


@pytest.mark.parametrize("model_type", ["gemma2", "phi3", "olmo2", "granite", "gpt2", "gpt_neox"])
def test_any_family_of_transformers_can_be_told(model_type, described):
    shape = {"n_embd": 256, "n_layer": 4, "n_head": 8} if model_type == "gpt2" else {}
    found = described(model_type=model_type, rope_scaling=None, pad_token_id=0, **shape)
    assert (found.layers, found.architecture["hidden_size"]) == (4, 256)
    json.dumps(found.resolved)


# --- what cannot be right --------------------------------------------------------------------


def drop(folder, name):
    edit_weights(folder, lambda tensors: {k: v for k, v in tensors.items() if k != name})


def cut(path, share=0.9):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def pickle_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def shard(folder):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


UP = "model.layers.2.mlp.up_proj.weight"
REFUSED = {
    "missing": (lambda f: drop(f, UP), ("1 missing", UP)),
    "missing embedding": (lambda f: drop(f, "model.embed_tokens.weight"), ("embed_tokens",)),
    "left over": (
        lambda f: edit_weights(f, lambda t: t | {"model.extra": torch.ones(2)}),
        ("1 left over", "model.extra"),
    ),
    "foreign prefix": (
        lambda f: edit_weights(f, lambda t: {f"base.{k}": v for k, v in t.items()}),
        ("38 missing", "38 left over", "base.model.embed_tokens.weight"),
    ),
    "another shape": (
        lambda f: edit(f / "config.json", intermediate_size=700),
        ("of another shape", "[704, 256]", "[700, 256]"),
    ),
    "quantised": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        ("config.json", "quantization_config (gptq)"),
    ),
    "float8": (
        lambda f: edit_weights(f, lambda t: t | {UP: t[UP].to(torch.float8_e4m3fn)}),
        (UP, "F8_E4M3", "bfloat16"),
    ),
    "pickled": (pickle_weights, ("pytorch_model.bin", "safetensors", "save_pretrained")),
    "slow tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ("no tokenizer.json",)),
    "damaged config": (lambda f: cut(f / "config.json"), ("config.json is damaged",)),
    "config of no object": (
        lambda f: (f / "config.json").write_text("[]"), ("config.json is damaged",),
    ),
    "damaged tokenizer": (lambda f: cut(f / "tokenizer.json"), ("tokenizer.json is damaged",)),
    "tokenizer of no kind": (
        lambda f: (f / "tokenizer.json").write_text("{}"), ("tokenizer.json is damaged",),
    ),
    "damaged settings": (
        lambda f: cut(f / "tokenizer_config.json"), ("tokenizer_config.json is damaged",),
    ),
    "damaged generation": (
        lambda f: (f / "generation_config.json").write_text("{"),
        ("generation_config.json is damaged",),
    ),
    "cut weights": (
        lambda f: cut(f / "model.safetensors"), ("model.safetensors is damaged", "cut off"),
    ),
    "cut header": (lambda f: cut(f / "model.safetensors", 1e-4), ("model.safetensors is damaged",)),
    "shard of no name": (
        lambda f: (shard(f), edit(f / "model.safetensors.index.json", weight_map={"a": 5})),
        ("model.safetensors.index.json is damaged",),
    ),
    "absent shard": (shard, ("model-00001-of-00002.safetensors", "not there")),
    "unknown family": (
        lambda f: edit(f / "config.json", model_type="nobody"), ("config.json", "nobody"),
    ),
    "no family": (
        lambda f: edit(f / "config.json", model_type=None), ("config.json", "transformers"),
    ),
    "no heads": (
        lambda f: edit(f / "config.json", num_attention_heads=0), ("config.json", "zero"),
    ),
    "unknown rope": (
        lambda f: edit(f / "config.json", rope_scaling={"rope_type": "spiral", "factor": 2.0}),
        ("config.json", "spiral"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_wrong_checkpoint_is_refused_by_name(kind, copy):
    spoil, words = REFUSED[kind]
    spoil(copy)
    with pytest.raises(UsageError) as caught:
        resolve_checkpoint(str(copy), QUIET)
    line = str(caught.value)
    assert all(word in line for word in words), line
    assert "\n" not in line


def test_the_refusal_comes_first_although_the_answer_is_kept(copy):
    resolve_checkpoint(str(copy), QUIET)
    drop(copy, UP)
    with pytest.raises(UsageError, match=UP):
        resolve_checkpoint(str(copy), QUIET)


def test_what_is_no_folder_of_a_checkpoint_is_named(tiny, tmp_path):
    with pytest.raises(UsageError, match=r"config\.json is a file"):
        resolve_checkpoint(str(tiny.folder / "config.json"), QUIET)
    with pytest.raises(UsageError, match=r"it has no config\.json"):
        resolve_checkpoint(str(tmp_path), QUIET)


def test_rope_frequencies_of_early_checkpoints_are_not_left_over(copy):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(copy, lambda tensors: tensors | {name: torch.ones(16)})
    assert name not in resolve_checkpoint(str(copy), QUIET).parameters


def test_a_folder_without_weights_is_refused_where_they_are_needed(described):
    with pytest.raises(UsageError, match=r"no model\.safetensors"):
        described().require_weights()


def test_an_id_beyond_the_vocabulary_is_refused_by_name(tiny):
    codec = load_codec(Checkpoint(tiny.folder, "any", None, tiny.resolved | {
        "architecture": tiny.resolved["architecture"] | {"vocab_size": 258},
    }))  # fmt: skip
    assert codec.encode("plain")
    with pytest.raises(UsageError, match=r"token 259, '<\|eot_id\|>'.* 258"):
        codec.encode("hello<|eot_id|>")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_overflow_of_the_model_itself_is_told_as_that(dtype, copy):
    edit_weights(copy, lambda t: t | {"model.norm.weight": t["model.norm.weight"] * 1e4})
    model = load_model(Target(resolve_checkpoint(str(copy), QUIET), "cpu", dtype))
    if dtype == "float32":
        assert eager_logits(model, [1, 2, 3], 2).shape == (2, 512)
        return
    with pytest.raises(UsageError, match=r"own model has logits in float16 .* --dtype bfloat16"):
        eager_logits(model, [1, 2, 3], 2)


# --- asked once ------------------------------------------------------------------------------


def start(folder, cache, program=PROGRAM):
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout.split(), done.stderr


def test_transformers_is_asked_once_and_again_for_what_is_damaged(copy, tmp_path):
    cache = tmp_path / "cache"
    status, (digest, imported), told = start(copy, cache)
    assert (status, imported) == (0, "True")
    assert "asking transformers" in told
    assert start(copy, cache) == (0, [digest, "False"], "")
    (kept,) = (cache / "llama_artifacts/checkpoints").iterdir()
    text = kept.read_text()
    kept.write_text(text.replace("500000.0", "400000.0"))
    assert start(copy, cache)[1] == [digest, "True"]
    assert kept.read_text() == text


def test_without_transformers_an_answer_is_needed(copy, tmp_path):
    cache, hidden = tmp_path / "cache", "import sys\nsys.modules['transformers'] = None\n"
    status, _, told = start(copy, cache, hidden + PROGRAM)
    assert status == EnvironmentProblemError.status
    assert "Traceback" not in told
    assert "must be asked once" in told.splitlines()[-1]
    start(copy, cache)
    assert start(copy, cache, hidden + PROGRAM)[0] == 0


def test_what_an_artifact_knows_is_taken_for_its_own_files_only(copy, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    known = resolve_checkpoint(str(copy), QUIET).resolved
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    asked = []
    monkeypatch.setattr(
        resolve, "ask_transformers", lambda folder: asked.append(1) or ask_transformers(folder)
    )
    through_json = json.loads(json.dumps(known))
    assert resolve_checkpoint(str(copy), QUIET, through_json).resolved == known
    assert not asked
    resolve_checkpoint(str(copy), QUIET, known | {"resolver": -1})
    assert len(asked) == 1
    edit(copy / "config.json", rms_norm_eps=1e-4)
    changed = resolve_checkpoint(str(copy), QUIET, known)
    assert len(asked) == 2
    assert changed.architecture["norm_eps"] == 1e-4


def test_a_cache_that_cannot_be_written_is_no_failure(copy, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert resolve_checkpoint(str(copy), QUIET).layers == 4
