"""The four programs of a KV cache: one decoder layer and one head, each for a prompt and a token.

Every tensor is an input, the weights too, and nothing is returned: results are written into tensors
of the state in place. So one compiled layer serves every layer of a model, of any depth, and a step
is a loop over them. Which tensors a call takes, and in which order, is data: `Program.inputs`.

    row       (width,)  the decode step's residual row; float32 on a CPU
    hidden    (1, padded, width)  the prompt's rows, changed by each layer
    token     (1, 1) int64  the newest token, whose embedding is in `row`
    position  (1,) int64  how many tokens the cache holds = the slot that `token` goes to
    rope      (2, slots, head_dim) float32  cosines and signed sines; only read
    keys      (rows, kv_heads * head_dim)  of the layer that is called; values alike
    logits    (1, vocab) float32  of the newest step
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aotinductor import torch_private
from aotinductor.build.compiler import example_and_dim
from aotinductor.cache import BLOCK_ROWS, CacheShape, state_shapes
from aotinductor.lengths import Bounds

# Blocks of work that the search for the largest logit is cut into: a GPU has 132 processors.
ARGMAX_PARTS = 256
HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
EMBEDDING = "model.embed_tokens.weight"

Tensors = Mapping[str, Tensor]
Run = Callable[[Tensors, "LayerKind"], None]


@dataclass(frozen=True)
class LayerKind:
    """What all decoder layers of a model have in common."""

    head_dim: int
    scaling: float
    eps: float
    activate: Callable[[Tensor], Tensor]
    attend: Callable[..., Tensor]  # in decode, called as `plain_attention`
    on_cuda: bool


def describe_layers(causal_lm) -> LayerKind:
    """Return the one kind of layer that a model of these families has."""
    layer, on_cuda = causal_lm.model.layers[0], causal_lm.device.type == "cuda"
    attention, attend = layer.self_attn, plain_attention
    if on_cuda:
        from aotinductor.build import decode_kernel  # needs Triton, which torch for CPUs lacks

        if decode_kernel.supports(attention.head_dim):
            attend = decode_kernel.kernel_attention
    eps, activate = layer.input_layernorm.variance_epsilon, layer.mlp.act_fn
    return LayerKind(attention.head_dim, attention.scaling, eps, activate, attend, on_cuda)


class Program(nn.Module):
    """forward(*tensors): those that `inputs` names, in its order.

    A name is one of the state's, or a checkpoint's, in which {layer} is a layer's number.
    """

    def __init__(self, run: Run, kind: LayerKind, state: tuple[str, ...], weights: dict[str, str]):
        """`weights`: name in the program -> name in a checkpoint."""
        super().__init__()
        self.run, self.kind = run, kind
        self.names = (*state, *weights)
        self.inputs = (*state, *weights.values())

    def forward(self, *tensors: Tensor) -> None:
        self.run(dict(zip(self.names, tensors, strict=True)), self.kind)


def make_programs(causal_lm) -> dict[str, Program]:
    """Return the programs of a model by name, in the order of a sequence."""
    kind, head_weight = describe_layers(causal_lm), "lm_head.weight"
    if causal_lm.lm_head.weight is causal_lm.model.embed_tokens.weight:
        head_weight = EMBEDDING
    of_head = {"norm.weight": "model.norm.weight", "head.weight": head_weight}
    of_head["embedding"] = EMBEDDING
    own = [name for name, _ in causal_lm.model.layers[0].named_parameters()]
    of_layer = {name: f"model.layers.{{layer}}.{name}" for name in own}
    tables = ("rope", "keys", "values")
    return {
        "prefill_layer": Program(prefill_layer, kind, ("hidden", *tables), of_layer),
        "decode_layer": Program(decode_layer, kind, ("row", "position", *tables), of_layer),
        "head": Program(head, kind, ("row", "logits", "token", "position"), of_head),
    }


def prefill_layer(given: Tensors, kind: LayerKind) -> None:
    """One layer over a prompt: changes `hidden`, writes the first `padded` rows of the tables."""
    hidden, norms = given["hidden"], [given[name] for name in HEAD_NORMS if name in given]
    padded = hidden.shape[1]
    rotation, places = given["rope"][:, :padded], torch.arange(padded, device=hidden.device)
    normed = rms_norm(hidden, given["input_layernorm.weight"], kind.eps)
    q, k, v = (
        split_heads(linear(normed, given, f"self_attn.{name}_proj"), kind.head_dim)
        for name in "qkv"
    )  # (1, heads, padded, head_dim)
    q, k = head_norms(q, k, norms, kind.eps)
    q, k = rotate(q, rotation), rotate(k, rotation)
    given["keys"].index_copy_(0, places, k.transpose(1, 2).flatten(2)[0])
    given["values"].index_copy_(0, places, v.transpose(1, 2).flatten(2)[0])
    # The prompt starts an empty cache: what it sees is its own k and v, not the slots.
    seen = causal_attention(q, k, v, kind.scaling).transpose(1, 2).flatten(2)
    attended = hidden + linear(seen, given, "self_attn.o_proj")
    normed = rms_norm(attended, given["post_attention_layernorm.weight"], kind.eps)
    gate, up = (linear(normed, given, f"mlp.{name}_proj") for name in ("gate", "up"))
    hidden.copy_(attended + linear(kind.activate(gate) * up, given, "mlp.down_proj"))


def decode_layer(given: Tensors, kind: LayerKind) -> None:
    """One layer over one token: changes `row`, writes slot `position` of the tables.

    Every product has one row and is written as a sum (`products`): Inductor makes each of them one
    kernel that reads the weights once. A library's product could not be fused with what is around
    it, would be chosen by tuning, and on a CPU reads at half the speed.
    """
    row, norms = given["row"], [given[name] for name in HEAD_NORMS if name in given]
    projections = [f"self_attn.{name}_proj" for name in "qkv"]
    q, k, v = products(row, given, projections, kind, "input_layernorm")
    tables = (given[name] for name in ("keys", "values", "position", "rope"))
    seen = kind.attend(q, k, v, *tables, norms, kind.scaling, kind.eps)
    (added,) = products(materialized(seen), given, ["self_attn.o_proj"], kind)
    attended = materialized((row + added).to(row.dtype))
    wide = ["mlp.gate_proj", "mlp.up_proj"]
    gate, up = products(attended, given, wide, kind, "post_attention_layernorm")
    gated = materialized((kind.activate(gate) * up).to(row.dtype))
    (added,) = products(gated, given, ["mlp.down_proj"], kind)
    row.copy_(attended + added)


def head(given: Tensors, kind: LayerKind) -> None:
    """From `row` to the logits, the greedy token, and that token's embedding; `position` + 1.

    After a prompt too: then `row` is that of the last true token, and `position` its place.
    """
    (logits,) = products(given["row"], given, ["head"], kind, "norm")
    logits = materialized(logits)[None]
    given["logits"].copy_(logits)
    token = first_argmax(logits)
    given["token"].copy_(token)
    given["row"].copy_(F.embedding(token, given["embedding"])[0, 0])
    # always 1; said of the token, it needs no launch beside the one that writes the token
    given["position"].add_((token[0] >= 0).long())


def products(
    x: Tensor, weights: Tensors, names: Sequence[str], kind: LayerKind, norm: str | None = None
) -> list[Tensor]:
    """Return each linear of x (width,), after its RMS norm if one is named: (rows,) float32."""
    row = x.float()
    if norm is not None:
        row = row * weights[f"{norm}.weight"].float()
        if not kind.on_cuda:
            # Once, and written to memory. Computed again for each row of a weight, as below, it is
            # half of a step's time where the weights are bfloat16.
            row = materialized(row * torch.rsqrt(x.float().square().mean() + kind.eps))
    outputs = []
    for name in names:
        weight = weights[f"{name}.weight"]  # (rows, width)
        out = (weight.float() * row).sum(-1)
        if norm is not None and kind.on_cuda:
            # Squared once for each row of the weight: the same shape of sum as the product, so that
            # one kernel does both. The row is small; a launch of its own costs more.
            mean_square = x.float().expand(weight.shape).square().mean(-1)
            out = out * torch.rsqrt(mean_square + kind.eps)
        if (bias := weights.get(f"{name}.bias")) is not None:
            out = out + bias.float()
        outputs.append(out)
    return outputs


def linear(x: Tensor, weights: Tensors, name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension, with Hugging Face's roundings."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def head_norms(q: Tensor, k: Tensor, norms: list[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """Normalise each head (..., head_dim), where a model has norms for them: q's and k's."""
    return (rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)) if norms else (q, k)


def materialized(x: Tensor) -> Tensor:
    """Return a fresh tensor x as one that Inductor writes to memory.

    It would rather compute it again in each row of the product that reads it. (`as_strided` needs
    storage to stride over; it looks through views, so x must not be a part of another tensor.)
    """
    return torch.as_strided(x, x.shape, x.stride())


def first_argmax(logits: Tensor) -> Tensor:
    """Return the index (1, 1) of the largest of logits (1, vocab), the first one of equals."""
    # in two steps: one for each part of the logits, and one for the parts
    padded = F.pad(logits, (0, -logits.shape[1] % ARGMAX_PARTS), value=float("-inf"))
    best, where = padded.view(ARGMAX_PARTS, -1).max(-1)
    part = best.argmax(0, keepdim=True)
    return (where[part] + part * (padded.shape[1] // ARGMAX_PARTS))[None]


def split_heads(projected: Tensor, head_dim: int) -> Tensor:
    """(1, seq, heads * head_dim) -> (1, heads, seq, head_dim)."""
    return projected.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Apply rotary embeddings (2, seq, head_dim) float32 to x (..., seq, head_dim), in x's dtype.

    Hugging Face's x * cos + cat(-x2, x1) * sin, with the minus in the table, and a flip where a
    concatenation would be a kernel of its own; rounded once.
    """
    cos, signed_sin = rotation
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return (x * cos + swapped * signed_sin).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of a prompt to itself: (1, heads, seq, head_dim), KV heads shared by the kernel.

    On CUDA always flash, where there is a flash kernel. Left the choice, torch 2.11 and later
    prefer cuDNN on Hopper, which makes a plan for every new length (23 to 37 ms) and is known for
    wrong results (pytorch #193893, #169849).
    """
    if (
        q.device.type == "cuda"
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    ):
        return torch_private.flash_attention(q, k, v, scale)
    # (Without flash, KV heads are repeated. An expanded view of K and V does not help: Inductor
    # materialises it for SDPA.)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)


def plain_attention(q, k, v, keys, values, position, rope, norms, scale, eps):
    """Norm, rotate and store one token's k and v; return what its q sees: (heads * head_dim,).

    q (heads * head_dim,), k and v (kv_heads * head_dim,), in float32, as what is returned. Reads
    every row of keys and values. `norms`: weights of the norms of each head of q and k, if any.
    """
    rows, head_dim = keys.shape[0], rope.shape[2]
    rotation = rope[:, position]  # (2, 1, head_dim)
    q, k = head_norms(q.view(-1, head_dim), k.view(-1, head_dim), norms, eps)
    q, k = rotate(q, rotation), rotate(k, rotation)  # (heads, head_dim), (kv_heads, head_dim)
    keys.index_copy_(0, position, k.flatten()[None].to(keys.dtype))
    values.index_copy_(0, position, v[None].to(values.dtype))

    kv_heads = k.shape[0]
    grouped = (rows, kv_heads, head_dim)
    all_keys = keys.view(grouped).transpose(0, 1).float()  # (kv_heads, rows, head_dim)
    all_values = values.view(grouped).transpose(0, 1).float()
    group = materialized(q.view(kv_heads, -1, head_dim))  # (kv_heads, group, head_dim)
    hidden = torch.arange(rows, device=keys.device) > position
    scores = (all_keys[:, None] * group[:, :, None]).sum(-1) * scale  # (kv_heads, group, rows)
    weights = materialized(scores.masked_fill(hidden, float("-inf")).softmax(-1))
    seen = (all_values[:, None] * weights[..., None]).sum(2)  # (kv_heads, group, head_dim)
    return seen.flatten()


def state_dtypes(causal_lm) -> dict[str, torch.dtype]:
    """Return the dtype of each of the state's tensors."""
    own, exact, index = causal_lm.dtype, torch.float32, torch.int64
    return {
        "row": own if causal_lm.device.type == "cuda" else exact,
        "hidden": own,
        "token": index,
        "position": index,
        "rope": exact,
        "keys": own,
        "values": own,
        "logits": exact,
    }


@torch.no_grad()
def export_program(
    program: Program, causal_lm, cache: CacheShape, bounds: Bounds
) -> torch.export.ExportedProgram:
    """Export one program: prefill for every padded prompt length within the bounds.

    Decode takes any number of blocks of the tables on a CPU, and whole tables on CUDA, where one
    captured graph serves every length, and its kernel ends at the position by itself.
    """
    padded, length = example_and_dim(bounds)
    blocks, rows = cache.rows // BLOCK_ROWS, cache.rows
    dynamic = {"hidden": length}
    if program.run is decode_layer and not program.kind.on_cuda and blocks > 1:
        in_use = {0: BLOCK_ROWS * torch.export.Dim("tables", min=1, max=blocks)}
        dynamic |= {"keys": in_use, "values": in_use}
        rows = 2 * BLOCK_ROWS  # an example of one block would be taken for a constant
    config, dtypes, device = causal_lm.config, state_dtypes(causal_lm), causal_lm.device
    shapes = state_shapes(cache, config.hidden_size, config.vocab_size, padded, rows)
    # zeros: a position that is used as an index must be one
    known = {name: torch.zeros(shapes[name], dtype=dtypes[name], device=device) for name in dtypes}
    weights = {name: weight.detach() for name, weight in causal_lm.named_parameters()}
    example = tuple(
        known[name] if name in known else weights[name.format(layer=0)] for name in program.inputs
    )
    shapes_of = (tuple(dynamic.get(name) for name in program.inputs),)
    return torch.export.export(program, example, dynamic_shapes=shapes_of)


def bytes_of_a_step(causal_lm) -> int:
    """Return the bytes of weights that one decode step reads."""
    tables = sum(weight.nbytes for weight in causal_lm.model.embed_tokens.parameters())
    tied = causal_lm.lm_head.weight is causal_lm.model.embed_tokens.weight
    return sum(weight.nbytes for weight in causal_lm.parameters()) - (0 if tied else tables)
