"""The nets whose weights learn while they read: what they answer, and their descent step in closed form.

    linear   f(x) = W x
    mlp      f(x) = W_out gelu(W_in x)                        gelu in its tanh form
    swiglu   f(x) = W_down (silu(W_gate x) * (W_up x))

each with x added where the net has a residual. With r = v for the loss -<f(k), v> and r = v - f(k) for
|f(k) - v|^2 / 2, minus the gradient by the last matrix is r hidden^T, and back(r) = W_last^T r goes on to the
matrices before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Dimensions: ... batch and heads, C tokens, D width of keys, E width of values, F hidden width

_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715

# Turns f(k) without residual, given as a function that is called at most once, into r.
Target = Callable[[Callable[[], Tensor]], Tensor]


class Matrix(NamedTuple):
    """A matrix (..., rows, columns) with, if scale is given, factors (..., rows) on its rows."""

    entries: Tensor
    scale: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        """(..., C, columns) -> (..., C, rows)."""
        y = x @ self.entries.mT
        return y if self.scale is None else y * self.scale[..., None, :]

    def apply_transposed(self, y: Tensor) -> Tensor:
        """(..., C, rows) -> (..., C, columns)."""
        return (y if self.scale is None else y * self.scale[..., None, :]) @ self.entries


class Net(NamedTuple):
    """One kind of net.

    Attributes:
        matrices: names of its matrices, in the order of weights and rates.
        shapes: (D, E, F) -> rows and columns of each matrix.
        read: (x, matrices) -> f(x) without residual.
        descend: (k, rates, matrices, target) -> the step of each matrix, rates included.
    """

    matrices: tuple[str, ...]
    shapes: Callable[[int, int, int], tuple[tuple[int, int], ...]]
    read: Callable[[Tensor, list[Matrix]], Tensor]
    descend: Callable[[Tensor, list[Tensor], list[Matrix], Target], list[Tensor]]


def _read_linear(x: Tensor, matrices: list[Matrix]) -> Tensor:
    return matrices[0].apply(x)


def _descend_linear(k: Tensor, rates: list[Tensor], matrices: list[Matrix], target: Target) -> list[Tensor]:
    wanted = target(lambda: matrices[0].apply(k))
    return [(rates[0] * wanted).mT @ k]


def _read_mlp(x: Tensor, matrices: list[Matrix]) -> Tensor:
    inner, outer = matrices
    return outer.apply(F.gelu(inner.apply(x), approximate="tanh"))


def _descend_mlp(k: Tensor, rates: list[Tensor], matrices: list[Matrix], target: Target) -> list[Tensor]:
    inner, outer = matrices
    z = inner.apply(k)
    squared = z * z
    bend = torch.tanh(_GELU_SCALE * z * (1 + _GELU_CUBIC * squared))
    hidden = 0.5 * z * (1 + bend)
    slope = 0.5 * (1 + bend) + 0.5 * z * (1 - bend * bend) * _GELU_SCALE * (1 + 3 * _GELU_CUBIC * squared)
    wanted = target(lambda: outer.apply(hidden))
    back = outer.apply_transposed(wanted)
    return [(back * slope).mT @ (rates[0] * k), (rates[1] * wanted).mT @ hidden]


def _read_swiglu(x: Tensor, matrices: list[Matrix]) -> Tensor:
    gate, up, down = matrices
    return down.apply(F.silu(gate.apply(x)) * up.apply(x))


def _descend_swiglu(k: Tensor, rates: list[Tensor], matrices: list[Matrix], target: Target) -> list[Tensor]:
    gate, up, down = matrices
    gated, raised = gate.apply(k), up.apply(k)  # (..., C, F)
    opened = torch.sigmoid(gated)
    activated = gated * opened
    hidden = activated * raised
    wanted = target(lambda: down.apply(hidden))
    back = down.apply_transposed(wanted)
    slope = opened * (1 + gated - activated)
    return [
        (back * raised * slope).mT @ (rates[0] * k),
        (back * activated).mT @ (rates[1] * k),
        (rates[2] * wanted).mT @ hidden,
    ]


NETS = {
    "linear": Net(("matrix",), lambda d, e, f: ((e, d),), _read_linear, _descend_linear),
    "mlp": Net(("in", "out"), lambda d, e, f: ((f, d), (e, f)), _read_mlp, _descend_mlp),
    "swiglu": Net(
        ("gate", "up", "down"), lambda d, e, f: ((f, d), (f, d), (e, f)), _read_swiglu, _descend_swiglu
    ),
}


def read_net(net: str, x: Tensor, matrices: list[Matrix], *, residual: bool) -> Tensor:
    """f(x) for x (..., C, D): (..., C, E)."""
    out = NETS[net].read(x, matrices)
    return out + x if residual else out


def descend(
    net: str, k: Tensor, v: Tensor, rates: Tensor, matrices: list[Matrix], *, residual: bool, loss: str
) -> list[Tensor]:
    """Minus the gradient of the loss by each matrix, every token times its rate, summed over tokens.

    Args:
        k: (..., C, D).
        v: (..., C, E).
        rates: (..., C, R), one column per matrix.
        matrices: where the gradient is taken.

    Returns:
        One (..., rows, columns) per matrix.
    """

    def target(answer: Callable[[], Tensor]) -> Tensor:
        if loss == "dot":
            return v
        return v - answer() - k if residual else v - answer()

    columns = list(rates.split(1, dim=-1))  # (..., C, 1)
    return NETS[net].descend(k, columns, matrices, target)
