"""The nets whose weights learn while they read: what they answer, and their descent step in closed form.

    linear   f(x) = W x
    mlp      f(x) = W_out gelu(W_in x)                        gelu in its tanh form
    swiglu   f(x) = W_down (silu(W_gate x) * (W_up x))

each with x added where the net has a residual. With r = v for the loss -<f(k), v> and r = v - f(k) for
|f(k) - v|^2 / 2, minus the gradient by the last matrix is r hidden^T, and back(r) = W_last^T r goes on to the
matrices before it.

Queries and keys go through the net together, and matrices of one input lie in one *block* (..., G, rows,
columns), G of them: gate and up of swiglu, every other matrix alone. The net of queries and that of keys
differ by factors on rows at most, which go on the products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Dimensions: ... batch and heads, C tokens, D width of keys, E width of values, F hidden width, G matrices of
# a block, R rows of all of them

_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715

# From the gradient of the hidden layer of keys (..., C, F) to that of the rows of the first block (..., C, R)
# with the rates, one (..., C, 1) per matrix.
Back = Callable[[Tensor, Sequence[Tensor]], Tensor]


class Net(NamedTuple):
    """One kind of net.

    Attributes:
        matrices: names of its matrices, in the order of weights and rates.
        blocks: how many of them lie in each block.
        shapes: (D, E, F) -> rows and columns of each matrix.
        bend: products with the first block (..., 2, C, R) -> hidden layer (..., 2, C, F), and the way back;
            None for a net of one matrix.
    """

    matrices: tuple[str, ...]
    blocks: tuple[int, ...]
    shapes: Callable[[int, int, int], tuple[tuple[int, int], ...]]
    bend: Callable[[Tensor], tuple[Tensor, Back]] | None


def _bend_mlp(z: Tensor) -> tuple[Tensor, Back]:
    hidden = F.gelu(z, approximate="tanh")

    def back(grad: Tensor, rates: Sequence[Tensor]) -> Tensor:
        own = _keys(z)
        squared = own * own
        bend = torch.tanh(_GELU_SCALE * own * (1 + _GELU_CUBIC * squared))
        steep = _GELU_SCALE * (1 + 3 * _GELU_CUBIC * squared)
        return grad * (0.5 * (1 + bend) + 0.5 * own * (1 - bend * bend) * steep) * rates[0]

    return hidden, back


def _bend_swiglu(z: Tensor) -> tuple[Tensor, Back]:
    gated, raised = z.chunk(2, dim=-1)  # (..., 2, C, F)
    opened = torch.sigmoid(gated)
    activated = gated * opened

    def back(grad: Tensor, rates: Sequence[Tensor]) -> Tensor:
        own_gated, own_raised, own_opened, own_activated = map(_keys, (gated, raised, opened, activated))
        slope = own_opened * (1 + own_gated - own_activated)
        return torch.cat([grad * own_raised * slope * rates[0], grad * own_activated * rates[1]], dim=-1)

    return activated * raised, back


NETS = {
    "linear": Net(("matrix",), (1,), lambda d, e, f: ((e, d),), None),
    "mlp": Net(("in", "out"), (1, 1), lambda d, e, f: ((f, d), (e, f)), _bend_mlp),
    "swiglu": Net(("gate", "up", "down"), (2, 1), lambda d, e, f: ((f, d), (f, d), (e, f)), _bend_swiglu),
}


class Scales(NamedTuple):
    """Factors (..., R) on the rows of a block; None for none."""

    queries: Tensor | None
    keys: Tensor | None


def run_net(
    net: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    blocks: Sequence[Tensor],
    scales: Sequence[Scales],
    *,
    residual: bool,
    loss: str,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """What queries read, and what keys and values write.

    Args:
        q, k: (..., C, D).
        v: (..., C, E).
        rates: (..., C, number of matrices).
        blocks: (..., G, rows, columns) each.
        scales: of each block.

    Returns:
        Answers (..., C, E), and of each block a pair (..., C, R) and (..., C, columns): minus the gradient of
        the loss by the block, every token times its rate, is the transpose of the first times the second.
    """
    hidden = torch.stack([q, k], dim=-3)  # (..., 2, C, D)
    back = None
    bend = NETS[net].bend
    if bend is not None:
        hidden, back = bend(_times(hidden, blocks[0], scales[0]))
    last, (of_queries, of_keys) = blocks[-1].squeeze(-3), scales[-1]
    columns = rates.split(1, dim=-1)
    if loss == "dot":
        out, wanted = _scaled(hidden.select(-3, 0) @ last.mT, of_queries), v
    else:
        out, answer = _times(hidden, blocks[-1], scales[-1]).unbind(-3)
        wanted = v - answer - k if residual else v - answer
    pairs = [(columns[-1] * wanted, _keys(hidden))]
    if back is not None:
        pairs.insert(0, (back(_scaled(wanted, of_keys) @ last, columns), k))
    return out + q if residual else out, pairs


def add_steps(
    pairs: Sequence[tuple[Tensor, Tensor]], blocks: Sequence[Tensor], *, is_zero: bool = False
) -> list[Tensor]:
    """The steps of pairs of `run_net`, summed over tokens and added to blocks (..., G, rows, columns).

    Args:
        is_zero: the blocks are taken for zeros and give their shapes alone.
    """
    found = []
    for (left, right), block in zip(pairs, blocks, strict=True):
        if is_zero:
            step = left.mT @ right
        else:
            before = block.flatten(-3, -2).flatten(0, -3)
            step = torch.baddbmm(before, left.flatten(0, -3).mT, right.flatten(0, -3))
        found.append(step.view(block.shape))
    return found


def _times(x: Tensor, block: Tensor, scales: Scales) -> Tensor:
    """Queries and keys (..., 2, C, columns) by the rows of a block: (..., 2, C, R)."""
    num_tokens = x.shape[-2]
    y = (x.flatten(-3, -2) @ block.flatten(-3, -2).mT).unflatten(-2, (2, num_tokens))
    if scales.keys is None:
        return y
    of_queries = torch.ones_like(scales.keys) if scales.queries is None else scales.queries
    return y * torch.stack([of_queries, scales.keys], dim=-2)[..., None, :]


def _scaled(y: Tensor, factors: Tensor | None) -> Tensor:
    """y (..., C, R) times factors (..., R)."""
    return y if factors is None else y * factors[..., None, :]


def _keys(x: Tensor) -> Tensor:
    """(..., C, F) of the keys in (..., 2, C, F)."""
    return x.select(-3, 1)
