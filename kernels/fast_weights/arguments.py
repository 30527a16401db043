"""Checks of the arguments of `fast_weight_scan`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_dtypes, check_rank
from .nets import NETS
from .newton_schulz import LACT_COEFFICIENTS
from .types import FastWeightState, Rule

# Dimensions: B batch, T tokens, N sequences, H heads, D width of keys, E width of values, F hidden width, R
# matrices, P numbers in all matrices

TRITON_WIDTHS = (64, 64, 128)  # keys, values, hidden: a wider net does not fit on the chip
CHOICES = {
    "net": tuple(NETS),
    "loss": ("dot", "l2"),
    "optimizer": ("sgd", "momentum", "muon"),
    "fast_norm": ("internal", "post", "pre", "none"),
}


def check_choice(name: str, value: str) -> None:
    """Raise unless `value` is one of the known ones."""
    known = CHOICES[name]
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}. {hint}".rstrip())


def check_rule(rule: Rule) -> None:
    """Raise unless the settings are known and fit together."""
    for name in CHOICES:
        check_choice(name, getattr(rule, name))
    if rule.chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {rule.chunk_size}.")
    if rule.max_grad_norm is not None and not rule.max_grad_norm > 0:
        raise ValueError(
            f"max_grad_norm must be above 0, got {rule.max_grad_norm}. Use None for steps of any length."
        )
    if not 0 <= rule.ns_steps <= len(LACT_COEFFICIENTS):
        raise ValueError(f"ns_steps must be from 0 to {len(LACT_COEFFICIENTS)}, got {rule.ns_steps}.")
    if rule.bptt_chunks is not None and rule.bptt_chunks < 1:
        raise ValueError(
            f"bptt_chunks must be at least 1, got {rule.bptt_chunks}. Use None for gradients through all of "
            "them."
        )


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    momentum: Tensor | None,
    weights: Sequence[Tensor],
    rule: Rule,
) -> None:
    """Raise unless the tensors fit to one another, to the net and to the optimiser."""
    for name, x in (("q", q), ("k", k), ("v", v), ("rates", rates)):
        check_rank(name, x, "(B, T, H, D)")
    check_dtypes(q=q, k=k, v=v)
    if q.shape != k.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            "q and k must have one shape, and v their batch, tokens and heads, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}."
        )
    head_dim, value_dim = q.shape[3], v.shape[3]
    if rule.residual and head_dim != value_dim:
        raise ValueError(
            f"residual=True needs values as wide as keys, got widths {value_dim} and {head_dim}. "
            "Use residual=False."
        )
    names = NETS[rule.net].matrices
    if len(weights) != len(names):
        raise ValueError(
            f"weights must hold {len(names)} matrices for net={rule.net!r} ({', '.join(names)}), got "
            f"{len(weights)}."
        )
    hidden_dim = weights[0].shape[-2] if weights[0].dim() > 1 else 0
    expected = NETS[rule.net].shapes(head_dim, value_dim, hidden_dim)
    for name, matrix, shape in zip(names, weights, expected, strict=True):
        if tuple(matrix.shape) != (q.shape[2], *shape):
            raise ValueError(
                f"the matrix {name!r} in weights must have shape {(q.shape[2], *shape)}: one per head, got "
                f"{tuple(matrix.shape)}."
            )
    if tuple(rates.shape) != (*q.shape[:3], len(names)):
        raise ValueError(
            f"rates must have shape {(*q.shape[:3], len(names))}: one per token, head and matrix, got "
            f"{tuple(rates.shape)}."
        )
    if rule.optimizer == "sgd" and momentum is not None:
        raise ValueError('optimizer="sgd" has no momentum. Give momentum=None, or optimizer="momentum".')
    if rule.optimizer == "momentum" and momentum is None:
        raise ValueError('optimizer="momentum" needs momentum (B, T, H). Give it, or use optimizer="sgd".')
    if momentum is not None and momentum.shape != q.shape[:3]:
        raise ValueError(
            f"momentum must have shape {tuple(q.shape[:3])}, one per token and head, got "
            f"{tuple(momentum.shape)}."
        )


def check_state(
    state: FastWeightState, num_sequences: int, num_heads: int, rule: Rule, acc: torch.dtype, momentum: bool
) -> None:
    """Raise unless the state belongs to such a call."""
    numbers = sum(rows * columns for rows, columns in rule.shapes)
    full, short = (num_sequences, num_heads, numbers), (num_sequences, num_heads)
    shapes = {"weights": full, "pending": full, "momentum": full, "momentum_sum": short}
    for name, shape in shapes.items():
        x = getattr(state, name)
        if name.startswith("momentum") and (x is None) == momentum:
            given, has = ("with", "no ") if momentum else ("without", "")
            raise ValueError(f"a call {given} momentum cannot continue a state that has {has}{name}.")
        if x is not None and (tuple(x.shape) != shape or x.dtype != acc):
            raise ValueError(
                f"initial_state.{name} must have shape {shape} and dtype {acc}, got {tuple(x.shape)} and "
                f"{x.dtype}. Select the rows of the state that continue in this call."
            )
    counts = state.num_tokens
    if tuple(counts.shape) != (num_sequences,) or counts.device.type != "cpu" or counts.is_floating_point():
        raise ValueError(
            f"initial_state.num_tokens must hold {num_sequences} integers on the CPU, got shape "
            f"{tuple(counts.shape)}, dtype {counts.dtype}, device {counts.device}."
        )


def can_run_triton(rule: Rule, dtype: torch.dtype, widths: tuple[int, int, int]) -> bool:
    """Whether the Triton form covers a call: a small SwiGLU net, dot loss, steps without clipping.

    Args:
        dtype: of queries, keys and values.
        widths: of keys, of values, and of the hidden layer.
    """
    return (
        rule.net == "swiglu"
        and rule.loss == "dot"
        and rule.optimizer in ("sgd", "momentum")
        and rule.fast_norm in ("none", "internal", "post")
        and rule.max_grad_norm is None
        and rule.bptt_chunks is None
        and dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(width <= limit for width, limit in zip(widths, TRITON_WIDTHS, strict=True))
    )
