"""Attention and mask for a KV cache of fixed length, through transformers' public interfaces.

    register()                                            before the model is made
    from_pretrained(..., attn_implementation=NAME)
    with from_first_slot(): model.generate(...)           where the prompt is known to be unpadded

Given a mask, transformers' own SDPA path copies K and V once for each query head, and transformers
4.57 builds that mask with vmap for every token. Here decode reads each KV head once, and its mask
is the padding mask itself, which ends where the tokens end.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "fixed_length_cache"

_unpadded = ContextVar("unpadded", default=False)


def register() -> None:
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


@contextmanager
def from_first_slot() -> Iterator[None]:
    """Promise that prompts in here start in slot 0 of their cache, without padding.

    A host's knowledge: without it, prefill would have to ask the device or take a mask.
    """
    token = _unpadded.set(True)
    try:
        yield
    finally:
        _unpadded.reset(token)


def attention(
    module: torch.nn.Module,
    query: Tensor,  # (batch, heads, length, head_dim)
    key: Tensor,  # (batch, kv_heads, slots, head_dim), value too
    value: Tensor,
    attention_mask: Tensor | None,  # what `mask` returned
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Return (batch, length, heads, head_dim), and no weights."""
    batch, heads, length, width = query.shape
    seen, kv_heads = attention_mask, key.shape[1]
    if length == 1:
        rows = query.reshape(batch, kv_heads, -1, width)  # (batch, kv_heads, group, head_dim)
        if key.is_cuda:
            out = attend_in_sums(rows, key, value, seen, scaling)
        else:
            out = scaled_dot_product_attention(rows, key, value, attn_mask=seen, scale=scaling)
        out = out.reshape(batch, heads, 1, width)
    elif seen is None:
        key, value = key[:, :, :length], value[:, :, :length]  # the rest of the cache is empty
        out = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
    else:
        # given a mask, CUDA's only kernel for grouped heads is the one that writes all scores out
        slots, group = seen.shape[-1], heads // kv_heads
        key, value = (x[:, :, :slots].repeat_interleave(group, dim=1) for x in (key, value))
        out = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def attend_in_sums(rows: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float):
    """Return what SDPA returns for these rows, (batch, kv_heads, group, head_dim).

    SDPA's kernels give a block of rows to one processor: 8 KV heads are 8 of an H200's 132, each
    reading all its slots in turn. Written as sums, Inductor makes three kernels of it, and spreads
    the first over heads times slots, the last over heads times head_dim; in float32, where a matrix
    product of bfloat16 would round the scores.
    """
    scores = (rows.float().unsqueeze(3) * key.unsqueeze(2)).sum(-1)  # (.., group, slots)
    weights = (scores * scaling).masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights.unsqueeze(-1) * value.unsqueeze(2)).sum(3).to(rows.dtype)


def mask(
    batch_size: int,
    kv_length: int,
    attention_mask: Tensor | None = None,  # (batch, tokens so far), the query's included
    cache_position: Tensor | None = None,  # transformers 4.57
    q_length: int | None = None,  # transformers 5, with the next two
    q_offset: int | Tensor = 0,
    device: torch.device | None = None,
    **_: object,
) -> Tensor | None:
    """Return which slots a query sees, (batch, 1, query, slots) bool; None: causal from slot 0."""
    if cache_position is None:
        cache_position = torch.arange(q_length, device=device) + q_offset
    q_length = len(cache_position)
    if q_length > 1 and _unpadded.get():
        return None
    if attention_mask is None:
        slots = torch.arange(kv_length, device=cache_position.device)
        seen = slots <= cache_position[:, None]  # (query, slots)
        return seen.expand(batch_size, 1, q_length, kv_length)
    if q_length == 1:
        missing = kv_length - attention_mask.shape[1]
        return pad(attention_mask, (0, missing))[:, None, None]
    slots = torch.arange(attention_mask.shape[1], device=cache_position.device)
    return (slots <= cache_position[:, None]) & attention_mask[:, None, None]
