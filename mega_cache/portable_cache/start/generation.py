"""Requests through Hugging Face `generate`, compiled or eager, over static KV caches.

`generate` compiles the decode step only; prefill runs eagerly. So one decode graph can serve every
prompt as long as the KV cache keeps its length, which is why caches are made here, not by it.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from typing import Any

import torch
import transformers
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from common.errors import UsageError
from common.model.resolve import read_config
from common.model.target import Target
from common.model.tokenizer import Generate, TokenStreamer
from portable_cache import torch_private
from portable_cache.flags import CompileFlags
from portable_cache.start import attention

# how this transformers calls a KV cache, as an argument and in an output: `cache` from 5.24 on
CACHE = "cache" if "cache" in vars(CausalLMOutputWithPast()) else "past_key_values"
STOCK_ATTENTION = "sdpa"  # of the eager mode, which is what one would run without a compiler


def make_model(
    target: Target, tensors: Mapping[str, torch.Tensor], attention_name: str
) -> PreTrainedModel:
    """Return the checkpoint's model in eval mode over `tensors`, none of them copied.

    Raises UsageError unless its class finds each tensor it has, in its shape, and no other. Turns
    gradients off for the whole process.
    """
    # its advice is about flags we pass on purpose, its bar is over at once
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    attention.register()
    folder, on_gpu = target.checkpoint.folder, target.device == "cuda"
    config = read_config(folder)
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        raise UsageError(f"{folder}: transformers has no causal model of type {config.model_type}")
    # by the rules of transformers, which knows names of other versions, ties and buffers
    model, found = kind.from_pretrained(
        None, config=config, state_dict=dict(tensors), dtype=getattr(torch, target.dtype),
        attn_implementation=attention_name, output_loading_info=True, ignore_mismatched_sizes=True,
        device_map={"": target.device} if on_gpu else None,
    )  # fmt: skip
    if on_gpu:
        torch.cuda.empty_cache()  # transformers asks for room for weights that are there already
    words = {
        "missing_keys": "lacks",
        "unexpected_keys": "has, and the model not,",
        "mismatched_keys": "has in another shape than the model",
    }
    for kind_of_key, verb in words.items():
        # those in another shape come with both shapes
        if names := sorted(key if isinstance(key, str) else key[0] for key in found[kind_of_key]):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UsageError(
                f"the checkpoint in {folder} {verb} {', '.join(names[:3])}{more}: download it "
                f"again, or correct its config.json ({type(model).__name__})"
            )
    with suppress(OSError):  # a checkpoint without one
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()


def configure_generation(
    model: PreTrainedModel, flags: CompileFlags | None, max_new_tokens: int, **choices: Any
) -> None:
    """Set every choice of `generate`, none is left to the checkpoint; `flags` None is eager.

    `choices` are those of GenerationConfig: what stops, how tokens are sampled.
    """
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        compile_config=compile_config(flags) if flags else None,
        disable_compile=flags is None,
        pad_token_id=0,  # padding is masked
        **choices,
    )


def compile_config(flags: CompileFlags) -> transformers.CompileConfig:
    """Return what `generate` passes to torch.compile."""
    compiling = transformers.CompileConfig(
        fullgraph=flags.fullgraph, dynamic=flags.dynamic(), mode=flags.compile_mode
    )
    torch_private.compile_everywhere(compiling)
    if compiling.dynamic:
        # otherwise Dynamo makes a symbol of every float, finds that it needs the number, and
        # traces again: one AOTAutograd miss more per graph, at build and at run alike
        torch_private.dynamo_config.specialize_float = True
    return compiling


def make_cache(model: PreTrainedModel, slots: int) -> Cache:
    """Return a static KV cache; from its first prefill on a layer is (1, heads, slots, head_dim).

    Prefill is never compiled, so that CUDA graphs find addresses that stay. Layers with a sliding
    window keep all slots: transformers' own layer for them counts tokens in Python, and would be
    traced anew at each. Raises UsageError for a model that attends or remembers in another way.
    """
    config = model.config.get_text_config(decoder=True)
    cache = transformers.StaticCache(config=config, max_cache_len=slots)
    other = {type(layer) for layer in cache.layers} - {StaticLayer, StaticSlidingWindowLayer}
    reasons = {
        "no attention heads": not hasattr(config, "num_attention_heads"),
        "soft-capped attention": getattr(config, "attn_logit_softcapping", None),
        "attention in chunks": getattr(config, "attention_chunk_size", None),
        ", ".join(sorted(kind.__name__ for kind in other)): other,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise UsageError(
            f"{type(model).__name__} has {found[0]}, which is not served from a static KV cache "
            "here: run it with --eager"
        )
    cache.layers = [StaticLayer(max_cache_len=slots) for _ in cache.layers]
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
                **{CACHE: cache},
            )  # (1, padded length + new tokens) int64
        return output[0, len(ids) :].tolist()

    return generate
