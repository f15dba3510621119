"""The two exported graphs over one static KV cache: `prefill` (a prompt) and `decode` (one token).

Both run on the Hugging Face model's own submodules, so that the graphs' constants carry the names
of the checkpoint's tensors. State lives in tensors that both mutate: a step needs nothing from the
host.

    token     (1, 1) int64  the newest token, not in the cache yet
    position  (1,) int64    how many tokens the cache holds = the slot that `token` goes to
    rope      (2, slots, head_dim)  cosines and signed sines: `rope_table`; only read
    tables    K and V of each layer, (rows, kv_heads * head_dim): `CacheShape.make_tables`

Why padding and stale slots leave no trace: prefill is causal and padded on the right, so no true
token sees a pad; decode overwrites slot `position` before it looks, and sees slots <= `position`
only.
"""

from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import ExportedProgram

from aotinductor.kv_generation import BLOCK_ROWS, CacheShape
from aotinductor.lengths import Bounds
from common.errors import UsageError

# Frequencies of these depend on the length of the running sequence, which a graph cannot hold.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
# Blocks of work that the search for the largest logit is cut into: a GPU has 132 processors.
ARGMAX_PARTS = 256
# A step on a CPU that reads less than this is one thread's work: a few ms of a core, with a dozen
# places in each layer where several threads would wait for each other. random:tiny, 12 MB, beside
# other work: 1 to 73 ms a token with two threads, 0.7 to 2.4 with one.
ONE_THREAD_BYTES = 64 * 2**20


class _CachedLlama(nn.Module):
    """What the two graphs share."""

    def __init__(self, causal_lm):
        super().__init__()
        rope_type = causal_lm.model.rotary_emb.rope_type
        if rope_type in LENGTH_DEPENDENT_ROPE:
            raise UsageError(
                f"rope type {rope_type!r} changes its frequencies with the length and cannot be "
                "exported with a KV cache: build without --kv-cache"
            )
        self.model, self.lm_head = causal_lm.model, causal_lm.lm_head


class PrefillGraph(_CachedLlama):
    """forward(input_ids, token, position, rope, *tables) -> logits (1, vocab).

    input_ids (1, padded), padded on the right with any id; position holds the true length. Writes
    the first `padded` rows of the tables, and the greedy choice to `token`. The logits are those of
    the last true token.
    """

    def forward(self, input_ids, token, position, rope, *tables):
        hidden = self.model.embed_tokens(input_ids)  # (1, padded, width)
        rotation = rope[:, : input_ids.shape[1]]
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        for layer, keys, values in zip(self.model.layers, tables[::2], tables[1::2], strict=True):
            attention = layer.self_attn
            normed = layer.input_layernorm(hidden)
            q = rotate(split_heads(attention.q_proj(normed), attention.head_dim), rotation)
            k = rotate(split_heads(attention.k_proj(normed), attention.head_dim), rotation)
            v = attention.v_proj(normed)  # (1, padded, kv_heads * head_dim)
            keys.index_copy_(0, places, k.transpose(1, 2).flatten(2)[0])
            values.index_copy_(0, places, v[0])
            # The prompt starts an empty cache: what it sees is its own k and v, not the slots.
            seen = causal_attention(q, k, split_heads(v, attention.head_dim), attention.scaling)
            hidden = hidden + attention.o_proj(seen.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        last = hidden.index_select(1, position - 1)  # (1, 1, width)
        logits = self.lm_head(self.model.norm(last))[:, 0]
        token.copy_(first_argmax(logits))
        return logits


class DecodeGraph(_CachedLlama):
    """forward(token, position, rope, *tables) -> logits (1, vocab); advances token and position.

    Every product has one row and is written as a sum (`products`): Inductor makes each of them one
    kernel that reads the weights once, and takes the norm before and the residual after it along.
    A library's product could not, and would be chosen by tuning.
    """

    def __init__(self, causal_lm):
        super().__init__(causal_lm)
        self.attend = plain_attention
        if causal_lm.device.type == "cuda":
            # needs Triton, which torch for CPUs lacks
            from aotinductor.build import decode_kernel

            if decode_kernel.supports(causal_lm.model.layers[0].self_attn.head_dim):
                self.attend = decode_kernel.kernel_attention

    def forward(self, token, position, rope, *tables):
        hidden = self.model.embed_tokens(token)[0, 0]  # (width,)
        for layer, keys, values in zip(self.model.layers, tables[::2], tables[1::2], strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            projections = [attention.q_proj, attention.k_proj, attention.v_proj]
            q, k, v = products(hidden, projections, layer.input_layernorm)
            seen = self.attend(q, k, v, keys, values, position, rope, attention.scaling)
            (added,) = products(materialized(seen), [attention.o_proj])
            hidden = materialized(hidden + added)
            wide = [mlp.gate_proj, mlp.up_proj]
            gate, up = products(hidden, wide, layer.post_attention_layernorm)
            (added,) = products(materialized(mlp.act_fn(gate) * up), [mlp.down_proj])
            hidden = materialized(hidden + added)
        (logits,) = products(hidden, [self.lm_head], self.model.norm)
        logits = materialized(logits)[None]
        token.copy_(first_argmax(logits))
        position.add_(1)
        return logits


def products(x: torch.Tensor, linears, norm: nn.Module | None = None) -> list[torch.Tensor]:
    """Return each linear of x (width,), after its RMS norm if given: (rows,) of x's dtype."""
    # summed in float32 and rounded once
    row = x.float()
    scaled = row if norm is None else row * norm.weight.float()
    outputs = []
    for linear in linears:
        weight = linear.weight  # (rows, width)
        out = (weight.float() * scaled).sum(-1)
        if norm is not None:
            # Squared once for each row of the weight: the same shape of sum as the product, so that
            # one kernel does both. The row is small; a launch of its own costs more.
            mean_square = row.expand(weight.shape).square().mean(-1)
            out = out * torch.rsqrt(mean_square + norm.variance_epsilon)
        if linear.bias is not None:
            out = out + linear.bias.float()
        outputs.append(out.to(x.dtype))
    return outputs


def materialized(x: torch.Tensor) -> torch.Tensor:
    """Return a fresh tensor x as one that Inductor writes to memory.

    It would rather compute it again in each row of the product that reads it. (`as_strided` needs
    storage to stride over; it looks through views, so x must not be a part of another tensor.)
    """
    return torch.as_strided(x, x.shape, x.stride())


def first_argmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the index (1, 1) of the largest of logits (1, vocab), the first one of equals."""
    # in two steps: one for each part of the logits, and one for the parts
    padded = F.pad(logits, (0, -logits.shape[1] % ARGMAX_PARTS), value=float("-inf"))
    best, where = padded.view(ARGMAX_PARTS, -1).max(-1)
    part = best.argmax(0, keepdim=True)
    return (where[part] + part * (padded.shape[1] // ARGMAX_PARTS))[None]


def split_heads(projected: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(1, seq, heads * head_dim) -> (1, heads, seq, head_dim)."""
    return projected.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Apply rotary embeddings (2, seq, head_dim) to x (..., seq, head_dim).

    Hugging Face's x * cos + cat(-x2, x1) * sin, with the minus in the table: the same roundings,
    and a flip where a concatenation would be a kernel of its own.
    """
    cos, signed_sin = rotation
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return x * cos + swapped * signed_sin


def causal_attention(q, k, v, scale):
    """Attention of a prompt to itself: (1, heads, seq, head_dim), KV heads shared by the kernel.

    On CUDA always flash, where there is a flash kernel. Left the choice, torch 2.11 and later
    prefer cuDNN on Hopper, which makes a plan for every new length (23 to 37 ms) and is known for
    wrong results (pytorch #193893, #169849). The choice is made while the graph is lowered, so a
    context manager here would have no effect: the operator is called by its name.
    """
    if (
        q.device.type == "cuda"
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    ):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, is_causal=True, scale=scale)[0]
    # (Without flash, KV heads are repeated. An expanded view of K and V does not help: Inductor
    # materialises it for SDPA.)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)


def plain_attention(q, k, v, keys, values, position, rope, scale):
    """Rotate and store one token's k and v; return what its q sees: (heads * head_dim,).

    q (heads * head_dim,), k and v (kv_heads * head_dim,). Reads every row of keys and values.
    """
    rows, head_dim = keys.shape[0], rope.shape[2]
    rotation = rope[:, position]  # (2, 1, head_dim)
    q = rotate(q.view(-1, head_dim), rotation)  # (heads, head_dim)
    k = rotate(k.view(-1, head_dim), rotation)  # (kv_heads, head_dim)
    keys.index_copy_(0, position, k.flatten()[None])
    values.index_copy_(0, position, v[None])

    kv_heads = k.shape[0]
    grouped = (rows, kv_heads, head_dim)
    all_keys = keys.view(grouped).transpose(0, 1).float()  # (kv_heads, rows, head_dim)
    all_values = values.view(grouped).transpose(0, 1).float()
    group = materialized(q.view(kv_heads, -1, head_dim)).float()  # (kv_heads, group, head_dim)
    hidden = torch.arange(rows, device=keys.device) > position
    scores = (all_keys[:, None] * group[:, :, None]).sum(-1) * scale  # (kv_heads, group, rows)
    weights = materialized(scores.masked_fill(hidden, float("-inf")).softmax(-1))
    seen = (all_values[:, None] * weights[..., None]).sum(2)  # (kv_heads, group, head_dim)
    return seen.flatten().to(q.dtype)


@torch.no_grad()
def export_graphs(causal_lm, cache: CacheShape, bounds: Bounds) -> list[ExportedProgram]:
    """Export prefill for every padded prompt length within the bounds, and decode.

    That takes any number of blocks of the tables on a CPU, and whole tables on CUDA, where one
    captured graph serves every length, and its kernel ends at the position by itself.
    """
    device, dtype = causal_lm.device, causal_lm.dtype
    length, length_dim = bounds.example_and_dim()
    ids = torch.zeros((1, length), dtype=torch.int64, device=device)
    token = torch.zeros((1, 1), dtype=torch.int64, device=device)
    position = torch.full_like(token[0], length)
    rope = torch.zeros((2, cache.slots, cache.head_dim), dtype=dtype, device=device)
    tables = cache.make_tables(dtype, device)
    example = (ids, token, position, rope, *tables)
    shapes = (length_dim, None, None, None, (None,) * len(tables))
    prefill = torch.export.export(PrefillGraph(causal_lm), example, dynamic_shapes=shapes)
    blocks, shape = cache.rows // BLOCK_ROWS, None
    if device.type == "cpu" and blocks > 1:
        shape = {0: BLOCK_ROWS * torch.export.Dim("blocks", min=1, max=blocks)}
        # an example of one block would be taken for a constant
        tables = [table[: 2 * BLOCK_ROWS] for table in tables]
    example = (token, torch.zeros_like(position), rope, *tables)
    shapes = (None, None, None, (shape,) * len(tables))
    decode = torch.export.export(DecodeGraph(causal_lm), example, dynamic_shapes=shapes)
    return [prefill, decode]


def decode_options(causal_lm) -> dict[str, object]:
    """Return the Inductor options that decode needs beside those of all graphs."""
    if causal_lm.device.type == "cuda":
        # q, k and v have different numbers of rows: only a combined kernel launches them as one
        return {"combo_kernels": True}
    # A thread that waits for another one spins, and on a machine with other work waits long.
    if sum(weight.nbytes for weight in causal_lm.parameters()) < ONE_THREAD_BYTES:
        return {"cpp.dynamic_threads": False, "cpp.threads": 1}
    return {}


def describe_state(causal_lm, cache: CacheShape) -> dict[str, dict]:
    """Return what a `Generator` needs beside the graphs, for the metadata."""
    rotary = causal_lm.model.rotary_emb
    # (head_dim / 2,); JSON keeps float32 exactly
    rope = {"inv_freq": rotary.inv_freq.detach().double().tolist()}
    rope["attention_scaling"] = float(rotary.attention_scaling)
    return {"cache": asdict(cache), "rope": rope}
