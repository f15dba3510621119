"""Presets: a real model's shape and random weights, which need no download and no licence.

A preset is written once as a checkpoint folder like any other, with a byte-level tokenizer, and
from there on takes the very path that a downloaded model takes. The folder is the same on every
machine and stack, byte for byte.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from common.cli import Console

_FOLDER = Path(__file__).resolve().parents[2] / "artifacts" / "checkpoints"
# raised when what is written changes, so that no old folder is taken for a new one
_RECIPE = 4
# ids 0 to 255 are the bytes
_SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def _shape(hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, factor=32.0, **other):
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        # At the usual 0.02 a random tied model repeats its last token whatever the context, so that
        # a broken attention passes every test. With std * sqrt(hidden) at 2.4 it reacts to every
        # token.
        "initializer_range": 2.4 / hidden**0.5,
        "bos_token_id": 256,
        "eos_token_id": 259,
    } | other


CONFIGS = {
    "random:tiny": _shape(256, 704, 4, 8, 2, 32, 512, dtype="float32"),
    "random:1b": _shape(2048, 8192, 16, 32, 8, 64, 128256),
    "random:3b": _shape(3072, 8192, 28, 24, 8, 128, 128256),
    "random:8b": _shape(4096, 14336, 32, 32, 8, 128, 128256, 8.0, tie_word_embeddings=False),
}


def preset_folder(preset: str) -> Path:
    """Return where a preset lies: its name changes with everything that shapes the files."""
    text = json.dumps([_RECIPE, CONFIGS[preset]], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    # one set of big checkpoints can serve both folders
    parent = Path(os.environ.get("LLAMA_PRESETS", _FOLDER))
    return parent / f"{preset.replace(':', '-')}-{digest}"


def materialize(config: dict[str, Any], folder: Path, console: Console, seed: int = 0) -> Path:
    """Write the checkpoint `folder` for this configuration unless it is there; return it.

    Made beside its final place and renamed, so that a folder of this name is always whole.
    """
    if folder.is_dir():
        return folder
    # imported here: every start of a preset comes by, and writes nothing
    import tempfile

    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent)
    with FileLock(folder.with_name(f".{folder.name}.lock")), draft as temporary:
        if not folder.is_dir():  # else another process was faster
            made = Path(temporary, "checkpoint")
            console.say(f"writing random weights to {folder}")
            _write_model(config, seed, made)
            _write_tokenizer(made)
            made.rename(folder)
    return folder


def _write_model(config: dict[str, Any], seed: int, folder: Path) -> None:
    """Write configuration and random weights: the same ones on every machine.

    Each weight is drawn on the CPU from the seed and its own name, so neither a GPU nor the number
    of threads changes it.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    # transformers 5 writes into the rope settings that it is given
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**json.loads(json.dumps(config))))
    dtype = getattr(torch, config["dtype"])

    def draw(name: str) -> torch.Tensor:
        shape = model.get_parameter(name).shape
        if "norm" in name:
            return torch.ones(shape, dtype=dtype)
        own_seed = hashlib.sha256(f"{seed} {name}".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(own_seed, "big"))
        weight = torch.randn(shape, generator=generator)
        return weight.mul_(config["initializer_range"]).to(dtype)

    names = [name for name, _ in model.named_parameters()]  # a tied weight comes once
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor() as pool:  # random numbers are drawn outside the GIL
        weights = dict(zip(names, pool.map(draw, names), strict=True))
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # by hand: every version of transformers spells it in another way
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **config}
    (folder / "config.json").write_text(json.dumps(settings, indent=2))


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
        "bos_token": _SPECIAL[0],
        "eos_token": _SPECIAL[-1],
        "chat_template": _CHAT_TEMPLATE,
        "model_max_length": 131072,
        # else transformers 4 adds token_type_ids, which `generate` refuses
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
