"""Write a preset's checkpoint as GGUF in bfloat16, for llama.cpp.

    python -m pip install gguf
    python .ci/alternatives/to_gguf.py FOLDER MODEL.gguf

Weights are the same, value for value. llama.cpp rotates neighbouring elements where transformers
rotates the halves of a head, so the rows of q and k change places.
"""

import json
import sys
from pathlib import Path

import torch
from gguf import (
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    TokenType,
    get_tensor_name_map,
)
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def main() -> None:
    folder, target = map(Path, sys.argv[1:])
    config = AutoConfig.from_pretrained(folder)
    writer = GGUFWriter(target, "llama")
    add_shape(writer, config)
    add_tokenizer(writer, folder, config.vocab_size)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer.add_tensor("rope_freqs.weight", rope_factors(config).numpy())
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            weight = file.get_tensor(name)
            if ".q_proj." in name or ".k_proj." in name:
                weight = as_neighbours(weight, config.head_dim)
            add_weight(writer, names.get_name(name, (".weight",)), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


def add_shape(writer: GGUFWriter, config) -> None:
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    settings = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    writer.add_rope_freq_base(settings["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Write the byte-level tokenizer. Its one merge, which the format demands, meets no text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    known = tokenizer.get_vocab_size()
    special = set(tokenizer.get_added_tokens_decoder())
    tokens = [tokenizer.id_to_token(token_id) for token_id in range(known)]
    kinds = [TokenType.CONTROL if i in special else TokenType.NORMAL for i in range(known)]
    nul = tokenizer.encode("\0", add_special_tokens=False).tokens[0]
    tokens += [nul + nul] + [f"[unused {token_id}]" for token_id in range(known + 1, vocab_size)]
    kinds += [TokenType.NORMAL] + [TokenType.UNUSED] * (vocab_size - known - 1)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{nul} {nul}"])
    writer.add_bos_token_id(tokenizer.token_to_id(settings["bos_token"]))
    writer.add_eos_token_id(tokenizer.token_to_id(settings["eos_token"]))


def rope_factors(config) -> torch.Tensor:
    """Return by what llama3 scaling divides each frequency, (head_dim / 2,) float32."""
    settings = getattr(config, "rope_parameters", None)
    theta = settings["rope_theta"] if settings else config.rope_theta
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    steps = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    return (1.0 / theta**steps) / scaled


def as_neighbours(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return a projection's rows with each element of a head's halves beside its partner."""
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)


def add_weight(writer: GGUFWriter, name: str, weight: torch.Tensor) -> None:
    if weight.dim() == 1:
        writer.add_tensor(name, weight.float().numpy())
        return
    raw = weight.contiguous().view(torch.uint8).numpy()
    writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType.BF16)


if __name__ == "__main__":
    main()
