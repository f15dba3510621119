"""Checkpoints that the presets don't have: the 3B's shape without its bytes, and another family."""

import json
import math
import struct
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "torch_export"))

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from common.cli import Console
from common.model.presets import CONFIGS, materialize


def write_3b(folder: Path, layers: int) -> str:
    """Write the 3B with fewer layers, its weights holes in a sparse file: all zeros.

    Good for what depends on shapes alone: export, code, kernels, loading paths. Return it as
    `--model-id` takes it.
    """
    shape = CONFIGS["random:3b"] | {"num_hidden_layers": layers}
    write_tiny(folder, shape, "llama", "LlamaForCausalLM")  # the tokenizer serves
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**json.loads(json.dumps(shape))))
    header, size = {"__metadata__": {"format": "pt"}}, 0
    for name, weight in model.named_parameters():  # the head is tied to the embedding
        end = size + 2 * math.prod(weight.shape)
        described = {"dtype": "BF16", "shape": list(weight.shape)}
        header[name] = described | {"data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    return str(folder)


def write_tiny_qwen3(folder: Path) -> str:
    """Write random:tiny as a Qwen3, with norms of each head; return it as `--model-id` takes it."""
    shape = CONFIGS["random:tiny"]
    write_tiny(folder, shape, "qwen3", "Qwen3ForCausalLM")
    weights, chance = load_file(folder / "model.safetensors"), np.random.default_rng(0)
    for layer in range(shape["num_hidden_layers"]):
        for one in "qk":
            norm = chance.uniform(0.5, 1.5, shape["head_dim"]).astype(np.float32)
            weights[f"model.layers.{layer}.self_attn.{one}_norm.weight"] = norm
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def write_tiny(folder: Path, config: dict, family: str, architecture: str) -> None:
    """Write the files of random:tiny, and another configuration beside them."""
    materialize(CONFIGS["random:tiny"], folder, Console(quiet=True))
    config = config | {"model_type": family, "architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config))
