"""One token's attention over the KV cache as one Triton kernel: rope, store, and split attention.

The tables are given whole, and the kernel's loop ends at the position that it reads on the device:
one compiled kernel, and one CUDA graph, serve every length, and a short sequence reads little.

A token gives a GPU one block of work for each KV head, 8 for the 132 processors of an H200. So the
slots are cut into splits, each normalised by its own maximum; `join` puts them together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

# Slots that a program reads at once. 32 x 4 warps keep all of a head of 128 in registers (no spills
# on sm_90); nothing else was measured.
BLOCK = 32
# tl.dot takes no fewer rows, nor a shorter sum
DOT_MINIMUM = 16
# Programs that a layer is cut into: about one for each processor of an H100 or H200.
PROGRAMS = 128


@triton.jit
def load_turned(
    at, mask, norm_ptr, eps, cos, sin, dtype, NORMED: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Return the two halves of some heads (rows, HALF), normed if NORMED, turned by `cos`, `sin`.

    As `layer_graphs.rms_norm` and `rotate`, in float32, and rounded to `dtype` once.
    """
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    if NORMED:
        half = tl.arange(0, HALF)[None, :]
        mean_square = tl.sum(first * first + second * second, 1) / (2 * HALF)
        shrink = tl.rsqrt(mean_square + eps)[:, None]
        first *= shrink * tl.load(norm_ptr + half).to(tl.float32)
        second *= shrink * tl.load(norm_ptr + HALF + half).to(tl.float32)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit
def attend_kernel(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, position_ptr, rope_ptr, q_norm_ptr, k_norm_ptr,
    parts_ptr, lse_ptr, slots, scale, eps,
    NORMED: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (kv head, split): attention of the head's query group to the split's slots.

    Split 0 also stores the new k and v, and sees them from registers; slots from `position` on are
    never read. ROWS is GROUP or what tl.dot needs; HALF is half a head, turned and read apart.
    """
    head = tl.program_id(0)
    split = tl.program_id(1)
    HEAD: tl.constexpr = 2 * HALF
    WIDTH: tl.constexpr = KV_HEADS * HEAD
    dtype = keys_ptr.dtype.element_ty
    position = tl.load(position_ptr).to(tl.int32)
    half = tl.arange(0, HALF)
    row = tl.arange(0, ROWS)
    # Inductor hands a float over as float32 or, from torch 2.11 on, as float64
    scale, eps = tl.cast(scale, tl.float32), tl.cast(eps, tl.float32)

    # rope holds the cosines, then the signed sines: the second half of those has the plus
    cos = tl.load(rope_ptr + position * HEAD + half)[None, :]
    sin = tl.load(rope_ptr + (slots + position) * HEAD + HALF + half)[None, :]
    in_group = row[:, None] < GROUP
    q_at = q_ptr + (head * GROUP + row[:, None]) * HEAD + half[None, :]
    q_first, q_second = load_turned(q_at, in_group, q_norm_ptr, eps, cos, sin, dtype, NORMED, HALF)

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sum_first = tl.zeros([ROWS, HALF], tl.float32)
    sum_second = tl.zeros([ROWS, HALF], tl.float32)
    if split == 0:
        new = head * HEAD + half[None, :]
        k_first, k_second = load_turned(
            k_ptr + new, new >= 0, k_norm_ptr, eps, cos, sin, dtype, NORMED, HALF
        )
        v_first = tl.load(v_ptr + new)
        v_second = tl.load(v_ptr + new + HALF)
        slot = position * WIDTH + new
        tl.store(keys_ptr + slot, k_first)
        tl.store(keys_ptr + slot + HALF, k_second)
        tl.store(values_ptr + slot, v_first)
        tl.store(values_ptr + slot + HALF, v_second)
        products = q_first.to(tl.float32) * k_first.to(tl.float32)
        products += q_second.to(tl.float32) * k_second.to(tl.float32)
        peak = tl.sum(products, 1) * scale
        total += 1.0
        sum_first += v_first.to(tl.float32)
        sum_second += v_second.to(tl.float32)

    share = tl.cdiv(tl.cdiv(position, tl.num_programs(1)), BLOCK) * BLOCK
    begin = split * share
    end = tl.minimum(begin + share, position)
    for start in range(begin, end, BLOCK):
        block = start + tl.arange(0, BLOCK)
        seen = block < end
        at = block[:, None] * WIDTH + head * HEAD + half[None, :]
        k_first = tl.load(keys_ptr + at, mask=seen[:, None], other=0.0)
        k_second = tl.load(keys_ptr + at + HALF, mask=seen[:, None], other=0.0)
        # ieee: float32 stays float32, where the default is TF32
        scores = tl.dot(q_first, k_first.T, input_precision="ieee")
        scores = tl.dot(q_second, k_second.T, scores, input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))  # (ROWS, BLOCK)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        fade = tl.exp(peak - new_peak)
        weights = tl.exp(scores - new_peak[:, None])
        total = total * fade + tl.sum(weights, 1)
        weights = weights.to(dtype)
        v_first = tl.load(values_ptr + at, mask=seen[:, None], other=0.0)
        v_second = tl.load(values_ptr + at + HALF, mask=seen[:, None], other=0.0)
        sum_first = tl.dot(weights, v_first, sum_first * fade[:, None], input_precision="ieee")
        sum_second = tl.dot(weights, v_second, sum_second * fade[:, None], input_precision="ieee")
        peak = new_peak

    # a split without slots has total 0 and peak -inf: zeros, of weight 0
    parts_row = (split * KV_HEADS + head) * GROUP + row
    parts_at = parts_ptr + parts_row[:, None] * HEAD + half[None, :]
    divisor = tl.where(total > 0, total, 1.0)
    tl.store(parts_at, sum_first / divisor[:, None], mask=in_group)
    tl.store(parts_at + HALF, sum_second / divisor[:, None], mask=in_group)
    tl.store(lse_ptr + parts_row, peak + tl.log(divisor), mask=row < GROUP)


@triton_op("llama::attend", mutates_args={"keys", "values"})
def attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor, rope: Tensor,
    norms: list[Tensor], scale: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the kernel for q (heads * head_dim,), k and v (kv_heads * head_dim,) of one token.

    Writes slot `position` (1,) of the layer's tables, keys and values (rows, kv_heads * head_dim);
    rope is (2, slots, head_dim). `norms`: the weights (head_dim,) of the norms of each head of q
    and of k, where the model has them. Returns, in float32, what each split sees and the logarithm
    of its weight: (splits, heads, head_dim) and (splits, heads). torch.export keeps it as an
    operator, and Inductor sees into it.
    """
    _, slots, head_dim = rope.shape
    heads, kv_heads = q.shape[0] // head_dim, k.shape[0] // head_dim
    group = heads // kv_heads
    splits = max(1, min(PROGRAMS // kv_heads, triton.cdiv(slots, BLOCK)))
    parts = torch.empty(splits, heads, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(splits, heads, dtype=torch.float32, device=q.device)
    rows = max(DOT_MINIMUM, triton.next_power_of_2(group))
    wrap_triton(attend_kernel)[(kv_heads, splits)](
        q, k, v, keys, values, position, rope, *(norms or (q, k)), parts, lse, slots, scale, eps,
        NORMED=bool(norms), KV_HEADS=kv_heads, GROUP=group, ROWS=rows, HALF=head_dim // 2,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return parts, lse


def join(parts: Tensor, lse: Tensor) -> Tensor:
    """Put the splits of `attend` together: (heads, head_dim) float32."""
    # as wide as the parts, so that Inductor makes one kernel of the three reductions
    lse = lse[:, :, None].expand(parts.shape)
    weights = (lse - lse.amax(0)).exp()
    return (parts * weights).sum(0) / weights.sum(0)


def kernel_attention(q, k, v, keys, values, position, rope, norms, scale, eps):
    """As `layer_graphs.plain_attention`, but no slot beyond `position` is read."""
    q, k, v = (one.to(keys.dtype) for one in (q, k, v))
    return join(*attend(q, k, v, keys, values, position, rope, norms, scale, eps)).flatten()


def supports(head_dim: int) -> bool:
    """Whether the kernel can be built for heads of this size: half of one is a tl.arange."""
    half = head_dim // 2
    return head_dim % 2 == 0 and half >= DOT_MINIMUM and half & (half - 1) == 0
