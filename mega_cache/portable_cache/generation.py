"""Requests through Hugging Face `generate`, compiled or eager, over static KV caches.

`generate` compiles the decode step only; prefill runs eagerly. So one decode graph can serve every
prompt as long as the KV cache keeps its length, which is why caches are made here, not by it.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.devices import synchronize
from common.measures import Request
from common.stopwatch import FirstTokenClock
from portable_cache.flags import CompileFlags

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

_DYNAMIC = {"auto": None, "true": True, "false": False}


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model sees it: `padding` positions on the left are masked."""

    token_ids: list[int]
    padding: int
    padding_id: int

    @property
    def padded_length(self) -> int:
        return len(self.token_ids) + self.padding


def configure_generation(
    model: "PreTrainedModel",
    flags: CompileFlags,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...],
    padding_id: int,
    temperature: float = 0.0,
    eager: bool = False,
) -> None:
    """Set every choice of `generate`, so that none is left to the checkpoint's own defaults."""
    import torch
    from transformers import CompileConfig, GenerationConfig

    if flags.compile_dynamic == "true":
        # otherwise Dynamo makes a symbol of every float, finds that it needs the number, and traces
        # again: one AOTAutograd miss more per graph, at build and at run alike
        torch._dynamo.config.specialize_float = True
    compile_config = CompileConfig(
        fullgraph=flags.fullgraph,
        dynamic=_DYNAMIC[flags.compile_dynamic],
        mode=flags.compile_mode,
    )
    # private (transformers 4.57, 5.x): without it generate compiles on accelerators only
    compile_config._compile_all_devices = True
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=padding_id,
        compile_config=None if eager else compile_config,
        disable_compile=eager,
        **sampling,
    )


def make_cache(model: "PreTrainedModel", flags: CompileFlags, slots: int) -> "Cache":
    """Return a static KV cache, each layer (1, kv_heads, slots, head_dim), already allocated.

    Allocated before anything is compiled: CUDA graphs replay only over addresses that stay.
    """
    from transformers import StaticCache

    config = model.config
    cache = StaticCache(
        config=config,
        max_cache_len=slots,
        offloading=flags.cache_implementation == "offloaded_static",
    )
    if flags.cache_implementation == "static":  # an offloaded one moves its layers as it goes
        cache.early_initialization(
            batch_size=1,
            num_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads,
            dtype=model.dtype,
            device=model.device,
        )
    return cache


def slots_for(flags: CompileFlags, padded_length: int, max_new_tokens: int) -> int:
    """Return how many tokens the KV cache of a prompt must hold: a matter of the recipe first."""
    if flags.max_cache_len:
        return flags.max_cache_len
    return padded_length + max(flags.decode_length, max_new_tokens)


def serve(
    model: "PreTrainedModel", prompt: Prompt, cache: "Cache | None", seed: int
) -> tuple[Request, list[int]]:
    """Generate once; return the timing and the new token ids. `cache` None is `generate`'s own."""
    import torch

    torch.manual_seed(seed)
    if cache is not None:
        cache.reset()  # its slots and its length are the last request's
    clock = FirstTokenClock()
    synchronize(model.device)
    began = time.monotonic()
    ids = [prompt.padding_id] * prompt.padding + prompt.token_ids
    mask = [0] * prompt.padding + [1] * len(prompt.token_ids)
    output = model.generate(
        torch.tensor([ids], device=model.device),  # (1, padded_length) int64
        attention_mask=torch.tensor([mask], device=model.device),  # (1, padded_length) int64
        streamer=clock,
        **({} if cache is None else {"past_key_values": cache}),
    )  # (1, padded_length + new_tokens) int64
    new_ids = output[0, len(ids) :].tolist()
    synchronize(model.device)
    ended = time.monotonic()
    ttft = None if clock.first_token_at is None else clock.first_token_at - began
    return Request(ended - began, ttft, len(new_ids)), new_ids


def forget_compiled_state(model: "PreTrainedModel") -> None:
    """Make the next length compile as a fresh process would.

    Otherwise the second length makes Dynamo switch to dynamic shapes, and what is saved is a graph
    that no process starting at that length ever looks for.
    """
    import torch

    torch._dynamo.reset()
    # private (transformers 4.57, 5.x): the compiled call that generate keeps on the model
    for name in ("_compiled_call", "_last_compile_config"):
        model.__dict__.pop(name, None)
