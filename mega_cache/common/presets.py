"""Llama checkpoints that need no download and no licence: real shapes, seeded random weights.

A preset is written once as an ordinary checkpoint folder (config, safetensors, tokenizer) and from
there on takes the very path that a downloaded model takes. Its text is noise; its timing is real.
"""

import copy
import hashlib
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Console

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PREFIX = "random:"
# raised when the way weights are drawn changes, so that no old folder is taken for a new one
RECIPE = 2

_BOS, _EOS = "<|begin_of_text|>", "<|eot_id|>"
_SPECIAL = (_BOS, "<|start_header_id|>", "<|end_header_id|>", _EOS)
_FIRST_SPECIAL_ID = 256  # after one token for each byte
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
        "bos_token_id": _FIRST_SPECIAL_ID,
        "eos_token_id": _FIRST_SPECIAL_ID + _SPECIAL.index(_EOS),
    } | other


CONFIGS = {
    "random:tiny": _shape(256, 704, 4, 8, 2, 32, 512, dtype="float32"),
    "random:1b": _shape(2048, 8192, 16, 32, 8, 64, 128256),
    "random:3b": _shape(3072, 8192, 28, 24, 8, 128, 128256),
    "random:8b": _shape(4096, 14336, 32, 32, 8, 128, 128256, 8.0, tie_word_embeddings=False),
}


def is_preset(model_id: str) -> bool:
    return model_id.startswith(PREFIX)


def folder_name(preset: str) -> str:
    """Return a name that changes with everything that shapes the checkpoint's files."""
    # imported here: --help does without its 50 ms
    from importlib.metadata import version

    # transformers 5 writes the rope settings under a name that 4 does not read
    writer = version("transformers").partition(".")[0]
    text = json.dumps([RECIPE, writer, CONFIGS[preset]], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{preset.replace(':', '-')}-{digest}"


def materialize(config: dict[str, Any], folder: Path, console: Console, seed: int = 0) -> Path:
    """Write the checkpoint `folder` for this configuration unless it is there; return it.

    Made beside its final place and renamed, so that a folder of this name is always whole.
    """
    from filelock import FileLock

    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return folder
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            model = make_model(config, seed)
            billions = model.num_parameters() / 1e9
            console.say(f"writing random weights ({billions:.3f} B parameters) to {folder}")
            model.save_pretrained(temporary)
            write_tokenizer(temporary)
            os.chmod(temporary, 0o755)
            os.rename(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return folder


def make_model(config: dict[str, Any], seed: int) -> "PreTrainedModel":
    """Return the model on the CPU with its random weights: the same ones on every machine.

    Each weight is drawn on the CPU from the seed and its own name, so neither a GPU nor the number
    of threads changes it.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    own = copy.deepcopy(config)  # transformers 5 writes into the rope settings that it is given
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**own))
    dtype = getattr(torch, config["dtype"])

    def draw(named: "tuple[str, torch.Tensor]") -> "tuple[str, torch.Tensor]":
        name, empty = named
        if "norm" in name:
            return name, torch.ones(empty.shape, dtype=dtype)
        own_seed = hashlib.sha256(f"{seed} {name}".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(own_seed, "big"))
        weight = torch.randn(empty.shape, generator=generator)
        return name, weight.mul_(config["initializer_range"]).to(dtype)

    with ThreadPoolExecutor() as pool:  # random numbers are drawn outside the GIL
        weights = dict(pool.map(draw, model.named_parameters()))
    model.load_state_dict(weights, strict=False, assign=True)  # a tied weight comes once
    model.tie_weights()
    return model


def write_tokenizer(folder: Path) -> None:
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
