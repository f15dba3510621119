"""Attention and mask for a KV cache of fixed length, through transformers' public interfaces.

    register()                                            before the model is made
    from_pretrained(..., attn_implementation=NAME)
    with from_first_slot(): model.generate(...)           where the prompt is known to be unpadded

Given a mask, transformers' own SDPA path copies K and V once for each query head, and transformers
4.57 builds that mask with vmap for every token. Here decode reads each KV head once, and its mask
is the padding mask itself, which ends where the tokens end. A layer with a sliding window keeps all
slots like any other: its mask knows the window.
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
    """Promise that prompts in here are unpadded: prefill needs no mask, nor to ask the device."""
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
        attend = attend_in_sums if key.is_cuda else scaled_dot_product_attention
        out = attend(rows, key, value, attn_mask=seen, scale=scaling).reshape(query.shape)
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


def attend_in_sums(rows: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, scale: float):
    """Return what SDPA returns for these rows, (batch, kv_heads, group, head_dim).

    SDPA's kernels give a block of rows to one processor: 8 KV heads are 8 of an H200's 132, each
    reading all its slots in turn. Written as sums, Inductor makes three kernels of it, and spreads
    the first over heads times slots, the last over heads times head_dim; in float32, where a matrix
    product of bfloat16 would round the scores.
    """
    scores = (rows.float().unsqueeze(3) * key.unsqueeze(2)).sum(-1)  # (.., group, slots)
    weights = (scores * scale).masked_fill(~attn_mask, float("-inf")).softmax(-1)
    return (weights.unsqueeze(-1) * value.unsqueeze(2)).sum(3).to(rows.dtype)


def mask(
    kv_length: int,
    # (batch, tokens so far), the query's included; transformers 5 leaves out a prompt's of all ones
    attention_mask: Tensor | None = None,
    cache_position: Tensor | None = None,  # transformers 4.57
    q_length: int | None = None,  # transformers 5, with the next two
    q_offset: int | Tensor = 0,
    device: torch.device | None = None,
    local_size: int | None = None,  # of a sliding window: the query's own slot and those before
    **_: object,
) -> Tensor | None:
    """Return which slots a query sees, (batch, 1, query, slots) bool; None: causal from slot 0."""
    if cache_position is None:
        cache_position = torch.arange(q_length, device=device) + q_offset
    length, tokens = len(cache_position), kv_length
    if length > 1 and _unpadded.get() and length <= (local_size or length):
        return None
    if attention_mask is not None:
        tokens = attention_mask.shape[1]
    if length == 1 and attention_mask is not None:
        outside = max(tokens - local_size, 0) if local_size else 0
        return pad(attention_mask[:, outside:], (outside, kv_length - tokens))[:, None, None]
    slots = torch.arange(tokens, device=cache_position.device)
    seen = slots <= cache_position[:, None]
    if local_size:
        seen &= slots > cache_position[:, None] - local_size
    return seen[None, None] if attention_mask is None else seen & attention_mask[:, None, None]
