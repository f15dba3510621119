"""The two exported graphs over one static KV cache: `prefill` (a prompt) and `decode` (one token).

Both run the Hugging Face checkpoint's own submodules under their own names, so that the graphs'
constants carry the names of the checkpoint's tensors. What is written here is what the cache
changes: where K and V are stored, what a query may see, and which row of logits is wanted.

State lives in tensors that both graphs mutate, so a step needs nothing from the host:

    token     (1, 1) int64     the newest token, not in the cache yet
    position  (1,) int64       how many tokens the cache holds = the slot that `token` goes to
    bias      (1, slots)       0 where a slot may be seen, -inf elsewhere; kept, not rebuilt
    rope      (2, slots, head_dim)  cosines and signed sines: `kv_cache.rope_table`; only read
    k_cache, v_cache  (layers, 1, kv_heads, slots, head_dim)

Why padding and stale slots leave no trace: prefill is causal and padded on the right, so no true
token sees a pad, and it sets `bias` anew; decode overwrites slot `position` before it looks, and
sees slots <= `position` only.
"""

import torch
import torch.nn.functional as F
from torch import nn

from aotinductor.bounds import Bounds
from aotinductor.kv_cache import CacheShape
from common.errors import UsageError

# Frequencies of these depend on the length of the running sequence, which a graph cannot hold.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class _CachedLlama(nn.Module):
    """What the two graphs share."""

    def __init__(self, causal_lm: nn.Module):
        super().__init__()
        rope_type = getattr(causal_lm.model.rotary_emb, "rope_type", "default")
        if rope_type in LENGTH_DEPENDENT_ROPE:
            raise UsageError(
                f"rope type {rope_type!r} changes its frequencies with the length and cannot be "
                "exported with a KV cache: build without --kv-cache"
            )
        self.model = causal_lm.model
        self.lm_head = causal_lm.lm_head

    def layer(self, layer, hidden, rotation, attend):
        """One decoder layer. `attend(q, k, v)` stores k and v and returns what the queries see."""
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        q = rotate(split_heads(attention.q_proj(normed), attention.head_dim), rotation)
        k = rotate(split_heads(attention.k_proj(normed), attention.head_dim), rotation)
        v = split_heads(attention.v_proj(normed), attention.head_dim)
        seen = attend(q, k, v)  # (1, heads, seq, head_dim)
        hidden = hidden + attention.o_proj(seen.transpose(1, 2).flatten(2))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def pick(self, hidden: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """Put the greedy choice into `token`; return logits (1, vocab) for hidden (1, 1, width)."""
        logits = self.lm_head(self.model.norm(hidden))[:, 0]
        token.copy_(logits.argmax(dim=-1, keepdim=True))
        return logits


class PrefillGraph(_CachedLlama):
    """forward(input_ids, token, position, bias, rope, k_cache, v_cache) -> logits (1, vocab).

    input_ids (1, padded), padded on the right with any id; position holds the true length. Writes
    token, bias and the caches. The logits are those of the last true token.
    """

    def forward(self, input_ids, token, position, bias, rope, k_cache, v_cache):
        padded = input_ids.shape[1]
        hidden = self.model.embed_tokens(input_ids)  # (1, padded, width)
        rotation = rope[:, :padded]
        places = torch.arange(padded, device=input_ids.device)
        seen = torch.arange(bias.shape[1], device=bias.device) < position  # (slots,)
        bias.copy_(torch.where(seen, 0.0, float("-inf"))[None])

        for index, layer in enumerate(self.model.layers):

            def attend(q, k, v, index=index, scale=layer.self_attn.scaling):
                store(k_cache, index, places, k)
                store(v_cache, index, places, v)
                # The prompt starts an empty cache: what it sees is its own k and v, not the slots.
                return causal_attention(q, k, v, scale)

            hidden = self.layer(layer, hidden, rotation, attend)
        return self.pick(hidden.index_select(1, position - 1), token)


class DecodeGraph(_CachedLlama):
    """forward(token, position, bias, rope, k_cache, v_cache) -> logits (1, vocab); advances all."""

    def __init__(self, causal_lm: nn.Module, splits: int = 1):
        super().__init__(causal_lm)
        self.splits = splits

    def forward(self, token, position, bias, rope, k_cache, v_cache):
        hidden = self.model.embed_tokens(token)  # (1, 1, width)
        rotation = rope[:, position]  # (2, 1, head_dim)
        bias.index_fill_(1, position, 0)

        for index, layer in enumerate(self.model.layers):

            def attend(q, k, v, index=index, scale=layer.self_attn.scaling):
                keys = store(k_cache, index, position, k)
                values = store(v_cache, index, position, v)
                if self.splits > 1:
                    return split_attention(q, keys, values, bias, scale, self.splits)
                return grouped_attention(q, keys, values, bias, scale)

            hidden = self.layer(layer, hidden, rotation, attend)
        logits = self.pick(hidden, token)
        position.add_(1)
        return logits


def split_heads(projected: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(1, seq, heads * head_dim) -> (1, heads, seq, head_dim)."""
    return projected.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Apply rotary embeddings (2, seq, head_dim) to x (1, heads, seq, head_dim).

    Hugging Face's x * cos + cat(-x2, x1) * sin, with the minus in the table: the same roundings,
    and a flip where a concatenation would be a kernel of its own.
    """
    cos, signed_sin = rotation
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return x * cos + swapped * signed_sin


def store(cache: torch.Tensor, layer: int, places: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Write new (1, kv_heads, seq, head_dim) to slots `places` (seq,) of a layer; return the layer.

    Written as one indexed write into the whole cache: through a view of the layer, Inductor copies
    the layer's slots, or the whole cache, before it writes (seen on torch 2.9.1 and 2.13).
    """
    kv_heads, slots, head_dim = cache.shape[2:]
    heads = torch.arange(layer * kv_heads, (layer + 1) * kv_heads, device=cache.device)
    rows = heads[:, None] * slots + places  # (kv_heads, seq), rows of the cache seen as one table
    cache.view(-1, head_dim).index_put_((rows,), new[0])
    return cache[layer]


def causal_attention(q, k, v, scale):
    """Attention of a prompt to itself; the flash kernels of CUDA and CPU share KV heads themselves.

    (float32 on CUDA has no flash kernel and repeats them. An expanded view of K and V does not
    help: Inductor materialises it for SDPA.)
    """
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)


def grouped_attention(q, keys, values, bias, scale):
    """One query against all slots. A group's query heads are SDPA's rows: one read of K and V."""
    kv_heads = keys.shape[1]
    rows = q[:, :, 0].unflatten(1, (kv_heads, -1))  # (1, kv_heads, group, head_dim)
    out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=bias, scale=scale)
    return out.flatten(1, 2)[:, :, None]


def split_attention(q, keys, values, bias, scale, splits):
    """As `grouped_attention`, with the slots cut into `splits` parts that a GPU works on at once.

    One query gives a GPU kv_heads blocks of work, 8 for 132 processors. With splits it is
    kv_heads * splits; each part is normalised by its own maximum, and joined by it in float32.
    """
    kv_heads, slots, head_dim = keys.shape[1:]
    parts = (kv_heads, splits, slots // splits, head_dim)
    k, v = keys[0].view(parts), values[0].view(parts)
    rows = q[0, :, 0].unflatten(0, (kv_heads, 1, -1))  # (kv_heads, 1, group, head_dim)
    scores = (rows @ k.transpose(-1, -2)).float() * scale  # (kv_heads, splits, group, part)
    scores = scores + bias.view(splits, 1, -1)
    # Finite, so that a part that is hidden altogether gets weight 0 and not NaN.
    peak = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = (scores - peak).exp()
    share = (peak - peak.amax(1, keepdim=True)).exp()  # (kv_heads, splits, group, 1)
    out = (weights.to(v.dtype) @ v).float()  # (kv_heads, splits, group, head_dim)
    total = (weights.sum(-1, keepdim=True) * share).sum(1)
    return ((out * share).sum(1) / total).to(q.dtype).flatten(0, 1)[None, :, None]


def export_prefill(
    causal_lm,
    cache: CacheShape,
    bounds: Bounds,
    example_seq_len: int,
) -> torch.export.ExportedProgram:
    """Export prefill for every padded prompt length within the bounds."""
    state = example_state(causal_lm, cache)
    length, length_dim = bounds.example_and_dim(example_seq_len)
    state[1].fill_(length)
    ids = torch.zeros((1, length), dtype=torch.int64, device=causal_lm.device)
    shapes = (length_dim, None, None, None, None, None, None)
    with torch.no_grad():
        return torch.export.export(PrefillGraph(causal_lm), (ids, *state), dynamic_shapes=shapes)


def export_decode(causal_lm, cache: CacheShape, splits: int = 1) -> torch.export.ExportedProgram:
    """Export decode, all shapes static. `splits` must divide cache.slots; see `split_attention`."""
    if cache.slots % splits:
        raise ValueError(f"{splits} splits do not divide the {cache.slots} slots of the cache")
    with torch.no_grad():
        return torch.export.export(
            DecodeGraph(causal_lm, splits), tuple(example_state(causal_lm, cache))
        )


def default_splits(device: str, cache: CacheShape) -> int:
    """Return how many parts decode's attention is cut into: of 128 slots each on CUDA, none on CPU.

    128 slots x 8 KV heads of 2048 slots are 128 blocks of work, about one for each processor of an
    H100 or H200. Chosen by arithmetic, not measured.
    """
    return max(1, cache.slots // 128) if device == "cuda" and cache.slots % 128 == 0 else 1


def example_state(causal_lm, cache: CacheShape) -> list[torch.Tensor]:
    """Return [token, position, bias, rope, k_cache, v_cache]: zeros, as the model's tensors."""
    device, dtype = causal_lm.device, causal_lm.dtype
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    position = torch.zeros(1, dtype=torch.int64, device=device)
    rope = torch.zeros((2, cache.slots, cache.head_dim), dtype=dtype, device=device)
    bias = torch.zeros((1, cache.slots), dtype=dtype, device=device)
    return [
        token,
        position,
        bias,
        rope,
        *(torch.zeros(cache.size, dtype=dtype, device=device) for _ in "kv"),
    ]


def rope_recipe(causal_lm) -> dict[str, object]:
    """Return what `kv_cache.rope_table` needs, for the metadata: JSON keeps float32 exactly."""
    rotary = causal_lm.model.rotary_emb
    frequencies = rotary.inv_freq.detach().double().tolist()  # (head_dim / 2,)
    return {"inv_freq": frequencies, "attention_scaling": float(rotary.attention_scaling)}
