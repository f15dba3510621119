"""A checkpoint of the 3B's shape whose weights are holes in a sparse file: no disk, all zeros.

Good for what depends on shapes alone: export, code, kernels, loading paths. And a small one of
another family than the presets'.
"""

import json
import math
import struct
import sys
from pathlib import Path

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 3072, 8192, 24, 8, 128, 128256


def write_checkpoint(folder: Path, layers: int) -> str:
    """Write a Llama-3.2-3B with fewer layers; return it as `--model-id` takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(layers)))
    write_tokenizer(folder / "tokenizer.json")
    header, size = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors(layers).items():
        end = size + 2 * math.prod(shape)  # bfloat16
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    return str(folder)


def config(layers: int) -> dict:
    rope_scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0}
    rope_scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rope_scaling": rope_scaling,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "bos_token_id": 128000,
        "eos_token_id": 128009,
    }


def tensors(layers: int) -> dict[str, list[int]]:
    """Return name and shape of every weight; lm_head is tied to the embedding."""
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    of_layer = {
        "input_layernorm": [HIDDEN],
        "self_attn.q_proj": [queries, HIDDEN],
        "self_attn.k_proj": [keys, HIDDEN],
        "self_attn.v_proj": [keys, HIDDEN],
        "self_attn.o_proj": [HIDDEN, queries],
        "post_attention_layernorm": [HIDDEN],
        "mlp.gate_proj": [INTERMEDIATE, HIDDEN],
        "mlp.up_proj": [INTERMEDIATE, HIDDEN],
        "mlp.down_proj": [HIDDEN, INTERMEDIATE],
    }
    shapes = {"model.embed_tokens.weight": [VOCABULARY, HIDDEN], "model.norm.weight": [HIDDEN]}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": of_layer[name] for name in of_layer}
    return shapes


def write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: number for number, letter in enumerate(sorted(letters))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(path))


def write_tiny_qwen3(folder: Path) -> str:
    """Write random:tiny as a Qwen3, with norms of each head; return it as `--model-id` takes it."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "torch_export"))
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from common.cli import Console
    from common.model.presets import CONFIGS, materialize

    shape = CONFIGS["random:tiny"]
    materialize(shape, folder, Console(quiet=True))
    weights, chance = load_file(folder / "model.safetensors"), np.random.default_rng(0)
    for layer in range(shape["num_hidden_layers"]):
        for one in "qk":
            norm = chance.uniform(0.5, 1.5, shape["head_dim"]).astype(np.float32)
            weights[f"model.layers.{layer}.self_attn.{one}_norm.weight"] = norm
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    family = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    (folder / "config.json").write_text(json.dumps(shape | family))
    return str(folder)
