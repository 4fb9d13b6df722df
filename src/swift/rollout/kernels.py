"""Attention of one token a row over pages, in Triton: every row reads the keys that it has, and no more.

Loaded only where pages are. Shapes: R = rows, K = key-value heads, H = query heads, D = width of queries and
keys, E = width of values, P = parts that a row's keys are read in side by side.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ENOUGH = 528  # programs that keep a large GPU busy
MOST_PARTS = 16
STAGES = 2  # pages on their way to a program; more does not fit into smaller GPUs


@triton.jit
def _attend(
    query, keys, values, table, lengths, output, sums, scale, window,
    q_row, q_head, k_page, k_head, k_place, v_page, v_head, v_place, t_row, o_part, o_row, o_head,
    GROUP: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr, PARTS: tl.constexpr,
    WIDTH: tl.constexpr, FULL: tl.constexpr, V_WIDTH: tl.constexpr, V_FULL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    count = tl.load(lengths + row).to(tl.int32) + 1  # the token itself is stored already
    first = tl.maximum(count - window, 0)
    first_page = first // PAGE
    share = tl.cdiv(tl.cdiv(count, PAGE) - first_page, PARTS)
    start = first_page + part * share
    end = tl.minimum(start + share, tl.cdiv(count, PAGE))
    g, c = tl.arange(0, PADDED), tl.arange(0, PAGE)
    d, e = tl.arange(0, FULL), tl.arange(0, V_FULL)
    heads = head * GROUP + g
    q = tl.load(
        query + row * q_row + heads[:, None] * q_head + d[None, :],
        mask=(g < GROUP)[:, None] & (d < WIDTH)[None, :], other=0.0,
    )  # fmt: skip
    top = tl.full([PADDED], float("-inf"), tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    sum_ = tl.zeros([PADDED, V_FULL], tl.float32)
    k_inner = head * k_head + c[:, None] * k_place + d[None, :]
    v_inner = head * v_head + c[:, None] * v_place + e[None, :]
    for at in range(start, end):
        places = at * PAGE + c
        there = (places < count) & (places >= first)
        page = tl.load(table + row * t_row + at).to(tl.int64)
        k = tl.load(keys + page * k_page + k_inner, mask=there[:, None] & (d < WIDTH)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(there[None, :], scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - new[:, None])
        shrink = tl.exp(top - new)
        v = tl.load(values + page * v_page + v_inner, mask=there[:, None] & (e < V_WIDTH)[None, :], other=0.0)
        sum_ = sum_ * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        total = total * shrink + tl.sum(weights, 1)
        top = new
    where = (g < GROUP)[:, None] & (e < V_WIDTH)[None, :]
    place = part * o_part + row * o_row + heads * o_head
    tl.store(output + place[:, None] + e[None, :], sum_ / tl.maximum(total, 1e-30)[:, None], mask=where)
    if PARTS > 1:
        rows = tl.num_programs(0)
        here = (part * rows + row) * (tl.num_programs(1) * GROUP) + heads
        tl.store(sums + here, top + tl.log(total), mask=g < GROUP)


def attend_pages(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """[R, H, E] from query [R, H, D], keys [pages, K, page, D] and values [pages, K, page, E].

    Row r sees its places 0 to `lengths[r]`, or the last `window` of them; its i-th page is `table[r, i]`.
    Softmax in float32: the same as scaled_dot_product_attention up to rounding.
    """
    rows, heads, width = query.shape
    groups, page, value_width = values.shape[1:]
    assert all(x.stride(-1) == 1 for x in (query, keys, values, table))
    parts = min(max(ENOUGH // (rows * groups), 1), MOST_PARTS)
    shape = (parts, rows, heads, value_width)
    output = torch.empty(shape, dtype=query.dtype if parts == 1 else torch.float32, device=query.device)
    sums = torch.empty((parts, rows, heads) if parts > 1 else (1,), dtype=torch.float32, device=query.device)
    _attend[(rows, groups, parts)](
        query, keys, values, table, lengths, output, sums, scale, 2**30 if window is None else window,
        *query.stride()[:2], *keys.stride()[:3], *values.stride()[:3], table.stride(0), *output.stride()[:3],
        GROUP=heads // groups, PADDED=max(16, triton.next_power_of_2(heads // groups)), PAGE=page,
        PARTS=parts, WIDTH=width, FULL=max(16, triton.next_power_of_2(width)),
        V_WIDTH=value_width, V_FULL=max(16, triton.next_power_of_2(value_width)),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_stages=STAGES,
    )  # fmt: skip
    if parts == 1:
        return output[0]
    return (sums.softmax(0)[..., None] * output).sum(0).to(query.dtype)
