"""A whole chunk of the SwiGLU memory in Triton: one program per sequence and head reads and makes the step.

The net and the step of a head stay on the chip while the tokens pass; only tokens, nets and momenta move.
Everything is float32; products of bfloat16 inputs may use TF32. The backward pass is that of the torch form,
which runs chunks again. Untested on a GPU until a record agrees with the reference.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..recompute import Tensors
from .chunked import Layout
from .types import Rule
from .update import NORM_EPS

# Dimensions: M some sequences, H heads, C tokens of a chunk, d width of keys, e width of values, f hidden
# width; D, E and F are the powers of two above them, at least 16

TOKENS = 32  # at a time
NORMS = {"none": 0, "internal": 1, "post": 2}


@triton.jit
def _rows(pointer, token, is_token, head, heads, width, num: tl.constexpr):  # type: ignore[no-untyped-def]
    """(tokens, num) columns of a head from (L, heads, width); zero outside."""
    column = tl.arange(0, num)
    offset = (token[:, None] * heads + head) * width + column[None, :]
    mask = is_token[:, None] & (column < width)[None, :]
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _matrix(pointer, rows, columns, num_rows: tl.constexpr, num_columns: tl.constexpr):  # type: ignore[no-untyped-def]
    """(num_rows, num_columns) of (rows, columns); zero outside."""
    row, column = tl.arange(0, num_rows), tl.arange(0, num_columns)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(pointer + row[:, None] * columns + column[None, :], mask=mask, other=0.0)


@triton.jit
def _keep(pointer, matrix, rows, columns, num_rows: tl.constexpr, num_columns: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column = tl.arange(0, num_rows), tl.arange(0, num_columns)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(pointer + row[:, None] * columns + column[None, :], matrix, mask=mask)


@triton.jit
def _normal(matrix, lengths, rows, eps, num_rows: tl.constexpr):  # type: ignore[no-untyped-def]
    """The matrix with rows of the given lengths."""
    row = tl.arange(0, num_rows)
    wanted = tl.load(lengths + row, mask=row < rows, other=0.0)
    return matrix * (wanted / (tl.sqrt(tl.sum(matrix * matrix, axis=1)) + eps))[:, None]


@triton.jit
def _step(  # type: ignore[no-untyped-def]
    matrix, base, step, lengths, keep, momentum, new, new_momentum, rows, columns, eps,
    num_rows: tl.constexpr, num_columns: tl.constexpr, norm: tl.constexpr, has_momentum: tl.constexpr,
):  # fmt: skip
    """Keeps a matrix and its momentum after the step."""
    if has_momentum:
        step += keep * _matrix(momentum, rows, columns, num_rows, num_columns)
        _keep(new_momentum, step, rows, columns, num_rows, num_columns)
    moved = base + step
    if norm == 2:
        moved = _normal(moved, lengths, rows, eps, num_rows)
    _keep(new, moved, rows, columns, num_rows, num_columns)


@triton.jit
def _chunk_kernel(  # type: ignore[no-untyped-def]
    q, k, v, rates, keeps, gate_up, down, m_gate_up, m_down, n_gate_up, n_down,
    output, new_gate_up, new_down, new_m_gate_up, new_m_down, heads, num_tokens, d, e, f, eps,
    D: tl.constexpr, E: tl.constexpr, F: tl.constexpr, block: tl.constexpr, norm: tl.constexpr,
    residual: tl.constexpr, has_momentum: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    sequence, head = row // heads, row % heads
    at_gate, at_up, at_down = row * 2 * f * d, (row * 2 + 1) * f * d, row * e * f
    of_gate, of_up, of_down = n_gate_up + head * 2 * f, n_gate_up + (head * 2 + 1) * f, n_down + head * e
    gate = _matrix(gate_up + at_gate, f, d, F, D)
    up = _matrix(gate_up + at_up, f, d, F, D)
    low = _matrix(down + at_down, e, f, E, F)
    key_gate, key_up, key_low = gate, up, low
    if norm == 1:
        key_gate = _normal(gate, of_gate, f, eps, F)
        key_up = _normal(up, of_up, f, eps, F)
        key_low = _normal(low, of_down, e, eps, E)
    step_gate = tl.zeros((F, D), dtype=tl.float32)
    step_up = tl.zeros((F, D), dtype=tl.float32)
    step_low = tl.zeros((E, F), dtype=tl.float32)
    for first in range(0, num_tokens, block):
        place = first + tl.arange(0, block)
        is_token = place < num_tokens
        token = sequence * num_tokens + place
        query = _rows(q, token, is_token, head, heads, d, D)
        gated = tl.dot(query, tl.trans(gate), input_precision=precision)
        raised = tl.dot(query, tl.trans(up), input_precision=precision)
        hidden = gated * tl.sigmoid(gated) * raised
        out = tl.dot(hidden, tl.trans(low), input_precision=precision)
        if residual:
            out += query
        column = tl.arange(0, E)
        mask = is_token[:, None] & (column < e)[None, :]
        tl.store(output + (token[:, None] * heads + head) * e + column[None, :], out, mask=mask)

        key = _rows(k, token, is_token, head, heads, d, D)
        value = _rows(v, token, is_token, head, heads, e, E)
        rate = rates + (token * heads + head) * 3
        gated = tl.dot(key, tl.trans(key_gate), input_precision=precision)
        raised = tl.dot(key, tl.trans(key_up), input_precision=precision)
        opened = tl.sigmoid(gated)
        activated = gated * opened
        back = tl.dot(value, key_low, input_precision=precision)
        left = back * raised * opened * (1.0 + gated - activated)
        left *= tl.load(rate, mask=is_token, other=0.0)[:, None]
        step_gate += tl.dot(tl.trans(left), key, input_precision=precision)
        left = back * activated * tl.load(rate + 1, mask=is_token, other=0.0)[:, None]
        step_up += tl.dot(tl.trans(left), key, input_precision=precision)
        left = value * tl.load(rate + 2, mask=is_token, other=0.0)[:, None]
        step_low += tl.dot(tl.trans(left), activated * raised, input_precision=precision)
    keep = 0.0
    if has_momentum:
        keep = tl.load(keeps + row)
    _step(
        gate, key_gate, step_gate, of_gate, keep, m_gate_up + at_gate, new_gate_up + at_gate,
        new_m_gate_up + at_gate, f, d, eps, F, D, norm, has_momentum,
    )  # fmt: skip
    _step(
        up, key_up, step_up, of_up, keep, m_gate_up + at_up, new_gate_up + at_up,
        new_m_gate_up + at_up, f, d, eps, F, D, norm, has_momentum,
    )  # fmt: skip
    _step(
        low, key_low, step_low, of_down, keep, m_down + at_down, new_down + at_down,
        new_m_down + at_down, e, f, eps, E, F, norm, has_momentum,
    )  # fmt: skip


def whole_chunk_triton(
    rule: Rule, layout: Layout, carried: Tensors, tensors: Tensors, constants: Tensors
) -> tuple[Tensor, Tensors]:
    """`whole_chunk` of the torch form, without a gradient."""
    pieces = layout.pieces(tensors)
    q, k, v = (x.contiguous() for x in pieces[:3])
    rates = pieces.rates.float().contiguous()
    (gate_up, down), momentum = (x.contiguous() for x in carried[:2]), carried[2:]
    count, num_tokens, heads, d = q.shape
    f, e = gate_up.shape[3], v.shape[3]
    # without momentum the kernel reads none of these
    keeps, old = rates, [gate_up, down]
    if pieces.momentum is not None:
        keeps, old = pieces.momentum.float().mean(1).contiguous(), [x.contiguous() for x in momentum]
    output = torch.empty_like(v)
    new, moved = (tuple(torch.empty_like(x) for x in (gate_up, down)) for _ in range(2))
    constant: dict[str, Any] = {
        "D": _power(d),
        "E": _power(e),
        "F": _power(f),
        "block": TOKENS,
        "norm": NORMS[rule.fast_norm],
        "residual": rule.residual,
        "has_momentum": layout.has_momentum,
        "precision": "ieee" if q.dtype == torch.float32 else "tf32",
    }
    lengths = (x.contiguous() for x in constants)
    sizes = (heads, num_tokens, d, e, f, NORM_EPS)
    _chunk_kernel[(count * heads,)](
        q, k, v, rates, keeps, gate_up, down, *old, *lengths, output, *new, *moved, *sizes,
        **constant, num_warps=8,
    )  # fmt: skip
    return output, (*new, *moved) if layout.has_momentum else new


def _power(width: int) -> int:
    return max(16, triton.next_power_of_2(width))
