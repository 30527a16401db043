"""Softmax attention in blocks of queries: plain matmul and softmax on the keys a block can see.

Every form of the call becomes a list of tiles (tiles.py). Scores of one tile are alive at a time, in the
backward pass too, where they are computed again: memory is O(T), time is O(T (C + W)).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..autograd import backward_without_autocast
from .tiles import Masks, Tile, add_columns, lay_out_dense, lay_out_ragged, make_tiles, tile_limits
from .types import AttentionOutput, KVPrefix

# Dimensions: B batch, T tokens, N sequences, P prefix slots, S key slots, H query heads, G query heads per
# key head, D key width, E value width, R rows of heads (B * Hkv), C queries of a tile, J keys of a tile


def attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    *,
    is_packed: bool,
    window_size: int | None,
    window_grid: int | None,
    num_sinks: int,
    prefix: KVPrefix | None,
    scale: float,
    return_stats: bool,
) -> AttentionOutput:
    """Block-local attention; arguments are already checked, shapes as in `memzoo.kernels.attention`."""
    batch_size, num_tokens, num_heads, _ = q.shape
    num_kv_heads = k.shape[2]
    seen = [0] * len(lengths) if prefix is None else prefix.num_seen.tolist()
    if is_packed or len(set(seen)) > 1:
        q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
        keys, values, segments = lay_out_ragged(k, v, lengths, seen, num_sinks, prefix)
    else:
        keys, values, segments = lay_out_dense(k, v, seen[0] if seen else 0, num_sinks, prefix)
    # on the meta device the work is only imagined: as that of this machine
    on_cpu = q.device.type == "cpu" or (q.is_meta and not torch.cuda.is_available())
    limits = tile_limits(window_size, on_cpu)
    tiles = make_tiles(segments, num_heads // num_kv_heads, window_size, window_grid, num_sinks, limits)
    if window_grid is not None:
        window_size = None  # a tile lies in one cell of the grid: every key it holds is young enough
    # (B, T, H, D) -> (R, G, T, D) and (B, S, Hkv, D) -> (R, S, D)
    q_rows = q.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)
    k_rows = keys.transpose(1, 2).flatten(0, 1)
    v_rows = values.transpose(1, 2).flatten(0, 1)
    plan = _Plan(tiles, window_size, scale, return_stats)
    if is_compiling():
        output, lse, row_max = _attend_op(
            q_rows, k_rows, v_rows, plan.numbers(), window_size or 0, scale, return_stats
        )
    else:
        output, lse, row_max = _TiledAttention.apply(q_rows, k_rows, v_rows, plan)

    def to_heads(x: Tensor) -> Tensor:
        """(R, G, T, ...) -> (B, T, H, ...)."""
        heads = x.unflatten(0, (-1, num_kv_heads)).flatten(1, 2).transpose(1, 2)
        return heads.reshape(batch_size, num_tokens, num_heads, *x.shape[3:])

    if not return_stats:
        return AttentionOutput(to_heads(output), None, None)
    return AttentionOutput(to_heads(output), to_heads(lse), to_heads(row_max))


class _Plan(NamedTuple):
    """Everything of a call that is not a tensor."""

    tiles: tuple[Tile, ...]
    window_size: int | None
    scale: float
    return_stats: bool

    def numbers(self) -> list[int]:
        """The tiles as one list."""
        return [number for tile in self.tiles for number in tile]

    @classmethod
    def from_numbers(
        cls, numbers: Sequence[int], window_size: int, scale: float, return_stats: bool
    ) -> "_Plan":
        """The inverse of `numbers`; window_size 0 stands for None."""
        width = len(Tile._fields)
        tiles = tuple(Tile(*numbers[i : i + width]) for i in range(0, len(numbers), width))
        return cls(tiles, window_size or None, scale, return_stats)


def _attend(q: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Output (R, G, T, E), lse and row_max (R, G, T); the last two are empty unless asked for."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    output, lse, row_max = _empty_results(q, v, plan.return_stats)
    masks = Masks(plan.window_size, q.new_empty((), dtype=acc))
    for tile in plan.tiles:
        rows, queries = slice(tile.r0, tile.r1), slice(tile.q0, tile.q1)
        scores = _scores(q, k, tile, plan.scale, acc, masks)
        probs = scores.softmax(-1)
        if plan.return_stats:
            top = scores.amax(-1)
            row_max[rows, :, queries] = top
            lse[rows, :, queries] = top - probs.amax(-1).log()
        out = torch.bmm(probs.flatten(1, 2).to(v.dtype), tile.columns(v))
        output[rows, :, queries] = out.view(*probs.shape[:3], -1)
    return output, lse, row_max


def _empty_results(q: Tensor, v: Tensor, return_stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = q.shape[:3] if return_stats else (0,)
    return (
        q.new_empty(*q.shape[:3], v.shape[-1]),
        q.new_empty(shape, dtype=acc),
        q.new_empty(shape, dtype=acc),
    )


def _attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor | None,
    d_lse: Tensor | None,
    d_max: Tensor | None,
    *,
    plan: _Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the probabilities of a tile are computed again."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=acc), torch.zeros_like(v, dtype=acc)
    masks = Masks(plan.window_size, q.new_empty((), dtype=acc))
    for tile in plan.tiles:
        rows, queries = slice(tile.r0, tile.r1), slice(tile.q0, tile.q1)
        scores = _scores(q, k, tile, plan.scale, acc, masks)
        probs = scores.softmax(-1)
        if d_out is None:
            d_scores = torch.zeros_like(probs)
        else:
            d_tile = d_out[rows, :, queries].flatten(1, 2)  # (R, G C, E)
            d_probs = torch.bmm(d_tile, tile.columns(v).transpose(1, 2)).to(acc).view_as(probs)
            d_scores = torch._softmax_backward_data(d_probs, probs, -1, acc)
            add_columns(dv, tile, torch.bmm(probs.flatten(1, 2).to(v.dtype).transpose(1, 2), d_tile))
        if d_lse is not None:
            d_scores = d_scores + probs * d_lse[rows, :, queries, None]
        if d_max is not None:
            is_top = (scores == scores.amax(-1, keepdim=True)).to(acc)
            d_scores = d_scores + is_top * (d_max[rows, :, queries, None] / is_top.sum(-1, keepdim=True))
        d_flat = d_scores.flatten(1, 2).to(q.dtype)  # (R, G C, J)
        d_query = torch.bmm(d_flat, tile.columns(k)) * plan.scale
        dq[rows, :, queries] = d_query.view(*probs.shape[:3], -1)
        d_key = torch.bmm(d_flat.transpose(1, 2), q[rows, :, queries].flatten(1, 2))
        add_columns(dk, tile, d_key * plan.scale)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


class _TiledAttention(torch.autograd.Function):
    """`_attend` with its gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(q, k, v)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        return _attend(q, k, v, plan)

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        d_out, d_lse, d_max = grads
        return *_attend_backward(q, k, v, d_out, d_lse, d_max, plan=ctx.plan), None


# Under torch.compile the loop over tiles is one opaque operation: unrolled it would take minutes to compile.
# In eager mode it stays visible, to the FLOP counter for one.
@torch.library.custom_op(
    "memzoo::tiled_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, SymInt[] tiles, SymInt window_size, float scale, "
    "bool return_stats) -> (Tensor, Tensor, Tensor)",
)
def _attend_op(
    q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[int], window_size: int, scale: float, return_stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _attend(q, k, v, _Plan.from_numbers(tiles, window_size, scale, return_stats))


@torch.library.custom_op(
    "memzoo::tiled_attention_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor d_out, Tensor? d_lse, Tensor? d_max, SymInt[] tiles, "
    "SymInt window_size, float scale) -> (Tensor, Tensor, Tensor)",
)
def _attend_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    d_max: Tensor | None,
    tiles: Sequence[int],
    window_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = _Plan.from_numbers(tiles, window_size, scale, d_lse is not None)
    return _attend_backward(q, k, v, d_out, d_lse, d_max, plan=plan)


@_attend_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[int], window_size: int, scale: float, return_stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_results(q, v, return_stats)


@_attend_backward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_for_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, ctx.tiles, ctx.window_size, ctx.scale, ctx.return_stats = inputs
    ctx.save_for_backward(q, k, v)


def _op_backward(ctx: Any, d_out: Tensor, d_lse: Tensor, d_max: Tensor) -> tuple[Tensor | None, ...]:
    stats = (d_lse, d_max) if ctx.return_stats else (None, None)
    grads = _attend_backward_op(*ctx.saved_tensors, d_out, *stats, ctx.tiles, ctx.window_size, ctx.scale)
    return *grads, None, None, None, None


_attend_op.register_autograd(_op_backward, setup_context=_save_for_op)


def _scores(q: Tensor, k: Tensor, tile: Tile, scale: float, acc: torch.dtype, masks: Masks) -> Tensor:
    """Masked scaled logits of a tile, (R, G, C, J)."""
    queries = q[tile.r0 : tile.r1, :, tile.q0 : tile.q1]
    flat = queries.flatten(1, 2)
    keys = tile.columns(k).transpose(1, 2)
    scores = torch.baddbmm(flat.new_zeros(()), flat, keys, beta=0, alpha=scale)
    scores = scores.to(acc).view(*queries.shape[:3], -1)
    masks.add_to(scores, tile)
    return scores


def decode_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    bias: Tensor | None,
    *,
    scale: float,
    return_stats: bool,
) -> AttentionOutput:
    """One query per sequence against unordered slots; shapes as in `memzoo.kernels.decode_attention`."""
    num_sequences, _, num_heads, _ = q.shape
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    if valid is not None and valid.device.type == "cpu" and valid.all():
        valid = None
    if valid is not None:
        hidden = ~valid[:, :, None, None]
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    q_grouped = q.reshape(num_sequences, k.shape[2], -1, q.shape[-1])  # (N, Hkv, G, D)
    score, read = _decode_products(k)
    scores = score(q_grouped, k).to(acc) * scale  # (N, Hkv, G, S)
    if bias is not None:
        scores = scores + bias.transpose(1, 2).unflatten(1, (k.shape[2], -1))
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None], float("-inf"))
    probs = scores.softmax(-1)
    output = read(probs.to(v.dtype), v).reshape(num_sequences, 1, num_heads, -1)
    if not return_stats:
        return AttentionOutput(output, None, None)
    lse, row_max = scores.logsumexp(-1), scores.amax(-1)
    shape = (num_sequences, 1, num_heads)
    return AttentionOutput(output, lse.reshape(shape), row_max.reshape(shape))


_Product = Callable[[Tensor, Tensor], Tensor]


def _decode_products(k: Tensor) -> tuple[_Product, _Product]:
    """Scores (N, Hkv, G, D) x (N, S, Hkv, D) -> (N, Hkv, G, S), and values back, without a copy of k or v.

    Strided heads of one sequence are a batch that CPU matmuls take as it lies. In half precision they would
    be copied into another order, so there all heads together are one matmul against a block-diagonal query.
    """
    if k.device.type != "cpu":
        return (
            lambda q, k: torch.matmul(q, k.permute(0, 2, 3, 1)),
            lambda p, v: torch.matmul(p, v.transpose(1, 2)),
        )
    if k.dtype in (torch.float32, torch.float64):
        return (
            lambda q, k: torch.stack([torch.bmm(q[n], k[n].permute(1, 2, 0)) for n in range(len(q))]),
            lambda p, v: torch.stack([torch.bmm(p[n], v[n].transpose(0, 1)) for n in range(len(p))]),
        )
    return _score_all_heads, _read_all_heads


def _score_all_heads(q: Tensor, k: Tensor) -> Tensor:
    num_kv_heads = k.shape[2]
    own = torch.eye(num_kv_heads, dtype=q.dtype, device=q.device)
    diagonal = (q[:, :, :, None] * own[:, None, :, None]).flatten(3).flatten(1, 2)  # (N, H, Hkv D)
    return torch.bmm(diagonal, k.flatten(2).transpose(1, 2)).unflatten(1, (num_kv_heads, -1))


def _read_all_heads(probs: Tensor, v: Tensor) -> Tensor:
    every = torch.bmm(probs.flatten(1, 2), v.flatten(2))  # (N, H, Hkv E)
    every = every.unflatten(1, probs.shape[1:3]).unflatten(3, (v.shape[2], -1))  # (N, Hkv, G, Hkv, E)
    return every.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
