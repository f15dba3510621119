"""Llama checkpoints that need no download and no licence: real shapes, seeded random weights.

A preset is written once as an ordinary checkpoint folder (config, safetensors, tokenizer) and from
there on takes the very path that a downloaded model takes. Its text is noise; its timing is real.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.console import Console

if TYPE_CHECKING:
    import torch

PREFIX = "random:"
SHARD_BYTES = 5 * 10**9  # as the Hub cuts its checkpoints
# raised when the way weights are drawn changes, so that no old folder is taken for a new one
RECIPE = 1

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _shape(hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, factor=32.0, **other):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA3_ROPE | {"factor": factor},
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    } | other


CONFIGS = {
    "random:tiny": _shape(256, 704, 4, 8, 2, 32, 512, torch_dtype="float32"),
    "random:1b": _shape(2048, 8192, 16, 32, 8, 64, 128256),
    "random:3b": _shape(3072, 8192, 28, 24, 8, 128, 128256),
    "random:8b": _shape(4096, 14336, 32, 32, 8, 128, 128256, 8.0, tie_word_embeddings=False),
}

_BOS, _EOS = "<|begin_of_text|>", "<|eot_id|>"
_SPECIAL = (_BOS, "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", _EOS)
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def is_preset(model_id: str) -> bool:
    return model_id.startswith(PREFIX)


def weight_std(config: dict) -> float:
    """Return the standard deviation of a preset's linear weights.

    At the usual 0.02 a random tied model repeats its last token whatever the context, so that a
    broken attention passes every test. With std * sqrt(hidden) near 2.4 it reacts to every token.
    """
    return 2.4 / math.sqrt(config["hidden_size"])


def weight_shapes(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every weight, in the checkpoint's own names."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (query, hidden)
        yield prefix + "self_attn.k_proj.weight", (key, hidden)
        yield prefix + "self_attn.v_proj.weight", (key, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, query)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (intermediate, hidden)
        yield prefix + "mlp.up_proj.weight", (intermediate, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, intermediate)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def parameter_count(config: dict) -> int:
    return sum(math.prod(shape) for _, shape in weight_shapes(config))


def materialize(config: dict, folder: Path, console: Console, seed: int = 0) -> Path:
    """Write the checkpoint `folder` for `config` unless it is there; return it.

    Made beside its final place and renamed, so that a folder of this name is always whole.
    """
    from filelock import FileLock

    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return folder
        billions = parameter_count(config) / 1e9
        console.say(f"writing random weights ({billions:.3f} B parameters) to {folder}")
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _write_config(config, temporary)
            _write_tokenizer(temporary)
            _write_weights(config, temporary, seed)
            os.chmod(temporary, 0o755)
            os.rename(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return folder


def folder_name(preset: str) -> str:
    """Return a name that changes with everything that shapes the preset's weights."""
    text = json.dumps([RECIPE, CONFIGS[preset]], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{preset.replace(':', '-')}-{digest}"


def _write_config(config: dict, folder: Path) -> None:
    ids = {"bos_token_id": 256, "eos_token_id": 256 + _SPECIAL.index(_EOS)}
    (folder / "config.json").write_text(json.dumps(config | ids, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(ids | {"do_sample": False}))


def _write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer: one token a byte, then the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _BOS,
        "eos_token": _EOS,
        "chat_template": _CHAT_TEMPLATE,
        "model_max_length": 131072,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _write_weights(config: dict, folder: Path, seed: int) -> None:
    """Draw and save shard after shard, so that a big preset never lies whole in memory."""
    from safetensors.torch import save_file

    shards = list(_shards(config))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        one = len(shards) == 1
        file_name = "model.safetensors" if one else f"model-{number:05}-of-{len(shards):05}"
        file_name = file_name.removesuffix(".safetensors") + ".safetensors"
        tensors = {name: _draw(config, name, shape, seed) for name, shape in names}
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(config: dict) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    item_bytes = 4 if config["torch_dtype"] == "float32" else 2
    shard, shard_bytes = [], 0
    for name, shape in weight_shapes(config):
        shard.append((name, shape))
        shard_bytes += math.prod(shape) * item_bytes
        if shard_bytes >= SHARD_BYTES:
            yield shard
            shard, shard_bytes = [], 0
    if shard:
        yield shard


def _draw(config: dict, name: str, shape: tuple[int, ...], seed: int) -> "torch.Tensor":
    """Return one weight on the CPU; its values depend on the seed and its own name alone."""
    import torch

    dtype = getattr(torch, config["torch_dtype"])
    if "norm" in name:
        return torch.ones(shape, dtype=dtype)
    # billions of normal numbers take minutes on a CPU and a second on a GPU
    device = "cuda" if torch.cuda.is_available() and math.prod(shape) > 10**6 else "cpu"
    own_seed = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
    generator = torch.Generator(device).manual_seed(own_seed)
    weight = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    return weight.mul_(weight_std(config)).to(dtype).cpu()
