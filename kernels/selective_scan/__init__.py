"""Selective scan (S6): a diagonal state per channel whose step size depends on the token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd import without_autocast
from ..backend import choose_backend
from ..checks import check_dtypes, check_rank
from ..layout import sequence_lengths
from .chunked import selective_scan_torch
from .external import can_run_mamba_ssm, selective_scan_mamba_ssm
from .reference import selective_scan_reference
from .single import selective_scan_single

__all__ = ["selective_scan"]

# Dimensions: B batch, T tokens, D channels, N state per channel, G groups of channels, S sequences


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Selective scan of Mamba (arXiv 2312.00752, algorithm 2).

        S_t = exp(delta_t A) * S_{t-1} + (delta_t x_t) B_t^T,   y_t = (S_t C_t + D x_t) silu(z_t)

    with a state (D, N) per sequence. Consecutive channels of a group share B and C. Everything accumulates in
    float32 (float64 for float64 input). Only the first derivative is defined.

    Args:
        x: (B, T, D); T = 0 is allowed.
        delta: (B, T, D) step sizes, at least 0, or what `delta_softplus` makes them of. May be float32 (the
            accumulation dtype) beside bfloat16 x.
        A: (D, N), at most 0.
        B: (B, T, G, N) writes, or (D, N) constant.
        C: (B, T, G, N) reads, with the groups of B, or (D, N) constant.
        D: (D,) factor of the skip, or None for none.
        z: (B, T, D) gate, or None for none.
        delta_bias: (D,) added to delta before the softplus.
        delta_softplus: take softplus(delta + delta_bias) as step sizes.
        initial_state: (S, D, N) state of the tokens read before, one row per sequence, in the accumulation
            dtype; None for zeros.
        return_state: also return the state after the last token.
        cu_seqlens: (S+1,) int64 CPU boundaries of a packed row (B = 1); nothing passes a boundary. Sequences
            without tokens are allowed and return their state unchanged.
        chunk_size: tokens worked on at once; changes speed and memory, not the result. None chooses by the
            size of the state.
        backend: "auto", "reference", "torch" or "mamba_ssm".

    Returns:
        y (B, T, D) in the dtype of x, and the state (S, D, N) or None.

    Raises:
        ValueError: sizes or dtypes that do not agree, A above 0, or negative step sizes.
    """
    check_rank("x", x, "(B, T, D)")
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    lengths = sequence_lengths(cu_seqlens, x.shape[0], x.shape[1])
    _check_sizes(x, delta, A, B, C, D, z, delta_bias)
    if delta_bias is not None and not delta_softplus:
        raise ValueError(
            "delta_bias is added before the softplus: set delta_softplus=True, or add it to delta."
        )
    if not torch.compiler.is_compiling() and x.device.type == "cpu":
        _check_signs(delta, A, delta_softplus)
    if initial_state is not None:
        expected = (len(lengths), *A.shape)
        if tuple(initial_state.shape) != expected or initial_state.dtype != acc:
            raise ValueError(
                f"initial_state must have shape {expected} = (sequences, channels, state) and be {acc}, got "
                f"{tuple(initial_state.shape)} {initial_state.dtype}. Select the rows of the state that "
                "continue in this call, or convert it."
            )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    is_covered = can_run_mamba_ssm(x, A, initial_state is not None, cu_seqlens is not None)
    chosen = choose_backend("selective_scan", backend, ("mamba_ssm", "torch") if is_covered else ("torch",))
    with without_autocast(x.device):
        if chosen == "mamba_ssm":
            return selective_scan_mamba_ssm(
                x, delta, A, B, C, D, z, delta_bias, delta_softplus=delta_softplus, return_state=return_state
            )
        step = delta.to(acc)
        if delta_softplus:
            step = F.softplus(step if delta_bias is None else step + delta_bias.to(acc))
        state = x.new_zeros(len(lengths), *A.shape, dtype=acc) if initial_state is None else initial_state
        rates = A.to(acc)
        if chosen == "reference":
            y, state = selective_scan_reference(x, step, rates, B, C, state, lengths)
        elif cu_seqlens is None and x.shape[1] == 1:
            y, state = selective_scan_single(x, step, rates, B, C, state)
        else:
            y, state = selective_scan_torch(
                x, step, rates, B, C, state, lengths, is_packed=cu_seqlens is not None, chunk_size=chunk_size
            )
        if D is not None:
            y = torch.addcmul(y, x.to(acc), D.to(acc))
        if z is not None:
            y = y * F.silu(z.to(acc))
    return y.to(x.dtype), state if return_state else None


def _check_sizes(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """Raises unless all shapes and dtypes agree."""
    channels = x.shape[2]
    check_rank("A", A, "(D, N)")
    if A.shape[0] != channels:
        raise ValueError(f"A must have one row per channel of x, {channels}, got {tuple(A.shape)}.")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if delta.shape != x.shape or delta.dtype not in (x.dtype, wide):
        raise ValueError(
            f"delta must have the shape {tuple(x.shape)} of x and be {x.dtype} or {wide}, got "
            f"{tuple(delta.shape)} {delta.dtype}."
        )
    per_token = {name: c for name, c in (("B", B), ("C", C)) if c.dim() != 2}
    check_dtypes(x=x, **per_token, **({} if z is None else {"z": z}))
    for name, c in (("B", B), ("C", C)):
        if c.dim() == 2:
            fits = c.shape == A.shape
        else:
            fits = c.dim() == 4 and c.shape[:2] == x.shape[:2] and c.shape[3] == A.shape[1]
            fits = fits and c.shape[2] > 0 and channels % c.shape[2] == 0
        if not fits:
            raise ValueError(
                f"{name} must have shape {(*x.shape[:2], 'G', A.shape[1])} with G groups that divide the "
                f"{channels} channels, or {tuple(A.shape)} where it is constant, got {tuple(c.shape)}."
            )
    if len(per_token) == 2 and B.shape[2] != C.shape[2]:
        raise ValueError(
            f"B and C must have one number of groups, got {B.shape[2]} and {C.shape[2]}. Repeat the smaller."
        )
    if z is not None and z.shape != x.shape:
        raise ValueError(f"z must have the shape {tuple(x.shape)} of x, got {tuple(z.shape)}.")
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None and tuple(vector.shape) != (channels,):
            raise ValueError(f"{name} must have shape ({channels},), got {tuple(vector.shape)}.")


def _check_signs(delta: Tensor, A: Tensor, delta_softplus: bool) -> None:
    """Raises where the state would grow."""
    if A.numel() and A.detach().amax() > 0:
        raise ValueError(
            f"A holds decay rates and must be at most 0, got a maximum of {A.detach().amax().item():.6g}. "
            "Mamba stores their logarithm: A = -exp(A_log)."
        )
    if not delta_softplus and delta.numel() and delta.detach().amin() < 0:
        raise ValueError(
            f"delta holds step sizes and must be at least 0, got a minimum of "
            f"{delta.detach().amin().item():.6g}. Set delta_softplus=True for raw projections."
        )
