"""Requests through Hugging Face `generate`, compiled or eager, over static KV caches.

`generate` compiles the decode step only; prefill runs eagerly. So one decode graph can serve every
prompt as long as the KV cache keeps its length, which is why caches are made here, not by it.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from transformers import Cache, PreTrainedModel

from common.errors import UsageError
from common.measure.requests import Generate, TokenStreamer
from common.model.resolve import read_config
from common.model.target import Target
from portable_cache import attention
from portable_cache.flags import DYNAMIC, CompileFlags

STOCK_ATTENTION = "sdpa"  # of the eager mode, which is what one would run without a compiler


def make_model(
    target: Target, tensors: dict[str, torch.Tensor], attention_name: str
) -> PreTrainedModel:
    """Return the model in eval mode over `tensors`; gradients are off for the whole process."""
    # its advice is about flags we pass on purpose
    transformers.utils.logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    attention.register()
    config = read_config(target.checkpoint.folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, target.dtype), attn_implementation=attention_name
        )
    model.load_state_dict(tensors, strict=False, assign=True)
    if target.checkpoint.tied:
        model.tie_weights()
    # its frequencies are in no checkpoint: computed on the CPU, as from_pretrained does
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config).to(target.device)
    named = (*model.named_parameters(), *model.named_buffers())
    if absent := [name for name, tensor in named if tensor.is_meta]:
        raise UsageError(f"the checkpoint lacks {', '.join(absent[:3])}: is it a whole Llama?")
    return model.eval()


def configure_generation(
    model: PreTrainedModel, flags: CompileFlags | None, max_new_tokens: int, **choices: Any
) -> None:
    """Set every choice of `generate`, none is left to the checkpoint; `flags` None is eager.

    `choices` are those of GenerationConfig: what stops, how tokens are sampled.
    """
    compiling = flags and transformers.CompileConfig(
        fullgraph=flags.fullgraph, dynamic=DYNAMIC[flags.compile_dynamic], mode=flags.compile_mode
    )
    if compiling:
        # private (transformers 4.57, 5.x): without it generate compiles on accelerators only
        compiling._compile_all_devices = True
        if compiling.dynamic:
            # otherwise Dynamo makes a symbol of every float, finds that it needs the number, and
            # traces again: one AOTAutograd miss more per graph, at build and at run alike
            torch._dynamo.config.specialize_float = True
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        compile_config=compiling,
        disable_compile=compiling is None,
        pad_token_id=0,  # padding is masked
        **choices,
    )


def make_cache(model: PreTrainedModel, slots: int) -> Cache:
    """Return a static KV cache, each layer (1, kv_heads, slots, head_dim), already allocated.

    Allocated before anything is compiled: CUDA graphs replay only over addresses that stay.
    """
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = transformers.StaticCache(config=config, max_cache_len=slots)
    cache.early_initialization(1, config.num_key_value_heads, width, model.dtype, model.device)
    return cache


def make_generate(
    model: PreTrainedModel, cache: Cache | None, seed: int, padded: Callable[[list[int]], int] = len
) -> Generate:
    """Return how a request is served; `cache` None is `generate`'s own, growing one.

    `padded` says to how many tokens a prompt is padded on the left.
    """

    def generate(prompt: list[int], on_token: Callable[[int], None]) -> list[int]:
        torch.manual_seed(seed)
        if cache is not None:
            cache.reset()  # its slots and its length are the last request's
        padding = padded(prompt) - len(prompt)
        ids = [0] * padding + prompt
        mask = [0] * padding + [1] * len(prompt)
        with nullcontext() if padding else attention.from_first_slot():
            output = model.generate(
                torch.tensor([ids], device=model.device),  # (1, padded length) int64
                attention_mask=torch.tensor([mask], device=model.device),  # the same shape
                streamer=TokenStreamer(on_token),
                past_key_values=cache,
            )  # (1, padded length + new tokens) int64
        return output[0, len(ids) :].tolist()

    return generate


def forget_compiled_state(model: PreTrainedModel) -> None:
    """Make the next cache length compile as a fresh process would.

    Otherwise the second length makes Dynamo switch to dynamic shapes, and what is saved is a graph
    that no process starting at that length ever looks for.
    """
    torch._dynamo.reset()
    # private (transformers 4.57, 5.x): the compiled call that generate keeps on the model
    for name in ("_compiled_call", "_last_compile_config"):
        model.__dict__.pop(name, None)
