"""Decayed attention in blocks of queries, on the tiles of `kernels/attention`.

Decays add to the scores of a tile what no product gives:

    age    (t - i) g_i, from a small table of ages
    sum    A_t + B_i: what fades inside the block of queries up to t, and from key i up to that block; keys
           inside the block take A_t - A_i, made in float64: both may be large and their difference small

Scores of one tile are alive at a time, in the backward pass too, where they are computed again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from ..attention.tiles import Masks, Tile, add_columns, lay_out_dense, lay_out_ragged, make_tiles, tile_limits
from ..attention.types import KVPrefix
from ..autograd import backward_without_autocast
from .types import DecayPrefix

# Dimensions: B batch, T tokens, N sequences, S key slots, H query heads, G query heads per key head, D key
# width, E value width, R rows of heads (B * Hkv), C queries of a tile, J keys of a tile, P of them before
# its queries

AGE, SUM = "age", "sum"


class _Plan(NamedTuple):
    """Everything of a call that is not a tensor."""

    tiles: tuple[Tile, ...]
    scale: float
    form: str

    def numbers(self) -> list[int]:
        """The tiles as one list."""
        return [number for tile in self.tiles for number in tile]

    @classmethod
    def from_numbers(cls, numbers: Sequence[int], scale: float, form: str) -> "_Plan":
        """The inverse of `numbers`."""
        width = len(Tile._fields)
        tiles = tuple(Tile(*numbers[i : i + width]) for i in range(0, len(numbers), width))
        return cls(tiles, scale, form)


def decayed_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    lengths: tuple[int, ...],
    *,
    form: str,
    prefix: DecayPrefix | None,
    scale: float,
    is_packed: bool,
) -> Tensor:
    """Tiled form of `memzoo.kernels.decayed_attention`; arguments are already checked."""
    batch_size, num_tokens, num_heads, _ = q.shape
    num_kv_heads = k.shape[2]
    seen = [0] * len(lengths) if prefix is None else prefix.num_seen.tolist()
    decays = log_decay.unflatten(2, (num_kv_heads, -1))  # (B, T, Hkv, 1 or G)
    past = faded = None
    if prefix is not None:
        past = KVPrefix(prefix.k, prefix.v, prefix.num_seen)
        slots = prefix.log_decay.unflatten(2, (num_kv_heads, -1))
        faded = KVPrefix(slots, slots, prefix.num_seen)
    if is_packed or len(set(seen)) > 1:
        q, k, v, decays = (x.flatten(0, 1)[None] for x in (q, k, v, decays))
        keys, values, segments = lay_out_ragged(k, v, lengths, seen, 0, past)
        decays = lay_out_ragged(decays, decays, lengths, seen, 0, faded)[0]
    else:
        num_seen = seen[0] if seen else 0
        keys, values, segments = lay_out_dense(k, v, num_seen, 0, past)
        decays = lay_out_dense(decays, decays, num_seen, 0, faded)[0]
    on_cpu = q.device.type == "cpu" or (q.is_meta and not torch.cuda.is_available())
    tiles = make_tiles(segments, num_heads // num_kv_heads, None, None, 0, tile_limits(None, on_cpu))
    q_rows = q.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # (R, G, T, D)
    k_rows = keys.transpose(1, 2).flatten(0, 1)  # (R, S, D)
    v_rows = values.transpose(1, 2).flatten(0, 1)
    g_rows = decays.permute(0, 2, 3, 1).flatten(0, 1)  # (R, 1 or G, S)
    plan = _Plan(tiles, scale, form)
    if is_compiling():
        output = _attend_op(q_rows, k_rows, v_rows, g_rows, plan.numbers(), scale, form)
    else:
        output = _DecayedAttention.apply(q_rows, k_rows, v_rows, g_rows, plan)
    heads = output.unflatten(0, (-1, num_kv_heads)).flatten(1, 2).transpose(1, 2)
    return heads.reshape(batch_size, num_tokens, num_heads, v.shape[3])


class _Ages:
    """(C, J) tokens from each key of a tile to each query, 0 where the key comes later; made once a shape."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.key: tuple[int, ...] = ()
        self.table = like

    def of(self, tile: Tile) -> Tensor:
        key = (tile.q1 - tile.q0, tile.k1 - tile.k0, tile.offset)
        if key != self.key:  # tiles of the same queries follow one another
            query = torch.arange(key[0], device=self.like.device)[:, None] + tile.offset
            age = query - torch.arange(key[1], device=self.like.device)
            self.key, self.table = key, age.clamp(min=0).to(self.like.dtype)
        return self.table


def _attend(q: Tensor, k: Tensor, v: Tensor, g: Tensor, plan: _Plan) -> Tensor:
    """Output (R, G, T, E)."""
    output = q.new_empty(*q.shape[:3], v.shape[-1])
    acc = g.new_empty(())
    masks, ages = Masks(None, acc), _Ages(acc)
    for tile in plan.tiles:
        probs = _scores(q, k, g, tile, plan, masks, ages).softmax(-1)
        read = torch.bmm(probs.flatten(1, 2).to(v.dtype), tile.columns(v))
        output[tile.r0 : tile.r1, :, tile.q0 : tile.q1] = read.view(*probs.shape[:3], -1)
    return output


def _attend_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, d_out: Tensor, *, plan: _Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and g; the probabilities of a tile are computed again."""
    acc = g.dtype
    dq, dg = torch.empty_like(q), torch.zeros_like(g)
    dk, dv = torch.zeros_like(k, dtype=acc), torch.zeros_like(v, dtype=acc)
    masks, ages = Masks(None, g.new_empty(())), _Ages(g.new_empty(()))
    for tile in plan.tiles:
        rows, queries = slice(tile.r0, tile.r1), slice(tile.q0, tile.q1)
        probs = _scores(q, k, g, tile, plan, masks, ages).softmax(-1)
        d_tile = d_out[rows, :, queries].flatten(1, 2)  # (R, G C, E)
        d_probs = torch.bmm(d_tile, tile.columns(v).transpose(1, 2)).to(acc).view_as(probs)
        d_scores = torch._softmax_backward_data(d_probs, probs, -1, acc)
        add_columns(dv, tile, torch.bmm(probs.flatten(1, 2).to(v.dtype).transpose(1, 2), d_tile))
        dg[rows, :, tile.k0 : tile.k1] += (_by_age if plan.form == AGE else _by_sum)(d_scores, tile, ages)
        d_flat = d_scores.flatten(1, 2).to(q.dtype)  # (R, G C, J)
        d_query = torch.bmm(d_flat, tile.columns(k)) * plan.scale
        dq[rows, :, queries] = d_query.view(*probs.shape[:3], -1)
        d_key = torch.bmm(d_flat.transpose(1, 2), q[rows, :, queries].flatten(1, 2))
        add_columns(dk, tile, d_key * plan.scale)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dg


def _scores(q: Tensor, k: Tensor, g: Tensor, tile: Tile, plan: _Plan, masks: Masks, ages: _Ages) -> Tensor:
    """Masked, faded logits of a tile, (R, G, C, J)."""
    queries = q[tile.r0 : tile.r1, :, tile.q0 : tile.q1]
    flat = queries.flatten(1, 2)
    keys = tile.columns(k).transpose(1, 2)
    scores = torch.baddbmm(flat.new_zeros(()), flat, keys, beta=0, alpha=plan.scale)
    scores = scores.to(g.dtype).view(*queries.shape[:3], -1)
    faded = g[tile.r0 : tile.r1, :, tile.k0 : tile.k1]  # (R, 1 or G, J)
    if plan.form == AGE:
        scores.addcmul_(ages.of(tile), faded[:, :, None, :])
    else:
        before, inside = faded[..., : tile.offset], faded[..., tile.offset :]  # (R, G, P), (R, G, C)
        total = inside.double().cumsum(-1)
        since = before.flip(-1).cumsum(-1).flip(-1) - before  # (R, G, P)
        scores[..., : tile.offset] += since[:, :, None, :] + total[..., None].to(g.dtype)
        scores[..., tile.offset :] += (total[..., :, None] - total[..., None, :]).clamp_(max=0).to(g.dtype)
    masks.add_to(scores, tile)
    return scores


def _by_age(d_scores: Tensor, tile: Tile, ages: _Ages) -> Tensor:
    """Gradient (R, 1, J) of g: the sum of (t - i) d s_ti over queries and heads."""
    return (d_scores.sum(1) * ages.of(tile)).sum(1)[:, None]


def _by_sum(d_scores: Tensor, tile: Tile, ages: _Ages) -> Tensor:
    """Gradient (R, G, J) of g: that of token j is the sum of d s_ti over i < j <= t.

    Tokens before the block of queries take whole columns. Inside it the pairs are kept apart: behind a strong
    decay their sums would drown in those of pairs that g_j has no part in.
    """
    before, inside = d_scores[..., : tile.offset], d_scores[..., tile.offset :]
    columns = F.pad(before.sum(2), (1, 0)).cumsum(-1)[..., :-1]  # (R, G, P), without the token itself
    reached = F.pad(inside, (1, 0)).cumsum(-1)[..., :-1] + before.sum(-1, keepdim=True)  # (R, G, C, C)
    return torch.cat([columns, reached.tril().sum(2)], -1)


class _DecayedAttention(torch.autograd.Function):
    """`_attend` with its gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, plan: _Plan) -> Tensor:
        ctx.save_for_backward(q, k, v, g)
        ctx.plan = plan
        return _attend(q, k, v, g, plan)

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g = ctx.saved_tensors
        return *_attend_backward(q, k, v, g, d_out, plan=ctx.plan), None


# Under torch.compile the loop over tiles is one opaque operation, as in kernels/attention.
@torch.library.custom_op(
    "memzoo::decayed_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, SymInt[] tiles, float scale, str form) -> Tensor",
)
def _attend_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, tiles: Sequence[int], scale: float, form: str
) -> Tensor:
    return _attend(q, k, v, g, _Plan.from_numbers(tiles, scale, form))


@torch.library.custom_op(
    "memzoo::decayed_attention_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor d_out, SymInt[] tiles, float scale, str form) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _attend_backward_op(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, d_out: Tensor, tiles: Sequence[int], scale: float, form: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _attend_backward(q, k, v, g, d_out, plan=_Plan.from_numbers(tiles, scale, form))


@_attend_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])


@_attend_backward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(g)


def _save_for_op(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.tiles, ctx.scale, ctx.form = inputs
    ctx.save_for_backward(*tensors)


def _op_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return *_attend_backward_op(*ctx.saved_tensors, d_out, ctx.tiles, ctx.scale, ctx.form), None, None, None


_attend_op.register_autograd(_op_backward, setup_context=_save_for_op)
