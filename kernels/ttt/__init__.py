"""Test-time training: a small net per head whose weights learn while the sequence is read."""

import torch
from torch import Tensor

from ..autograd import without_autocast
from ..backend import choose_backend
from ..checks import check_dtypes, check_rank
from ..layout import sequence_lengths
from .chunked import ttt_torch
from .nets import Norm
from .reference import ttt_reference
from .single import ttt_single
from .types import TTTState

__all__ = ["TTTState", "ttt"]

# Dimensions: B batch, T tokens, N sequences, H heads, C tokens of a mini-batch, F head width, G hidden width


def ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    reader_rate: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    state: TTTState,
    *,
    eps: float = 1e-6,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, TTTState | None]:
    """Test-time training with a linear or a two-layer inner net (Sun et al., arXiv 2407.04620).

        f(x; W) = x + LN(g(x; W)),   g(x) = x W1 + b1   or   gelu(x W1 + b1) W2 + b2   (tanh form)
        P_i = sum over the mini-batch up to token i of rate_j * gradient of 1/2 |f(k_j; W) - v_j|^2 by W
        o_i = f(q_i; W - reader_rate_i P_i),   W <- W - reader_rate_last P_last after C tokens

    W are the fast weights at the start of the mini-batch. Mini-batches lie on the token grid of each
    sequence, so a call may begin and end anywhere inside one. Sums are float32 (float64 for float64 input).

    Args:
        q, k, v: (B, T, H, F); T = 0 is allowed.
        rate: (B, T, H), the writer's share of the inner rate.
        reader_rate: (C,), the reader's share by its place in the mini-batch.
        norm_weight, norm_bias: (H, F) of the inner norm.
        state: fast weights and what is pending, one row per sequence; for an empty memory the learned
            weights, zeros and position 0. The net is the linear one where it holds two tensors of weights.
        eps: added to the variance in the norm.
        return_state: also return the state after the last token.
        cu_seqlens: (N+1,) int64 CPU boundaries of a packed row (B = 1); nothing passes a boundary. Sequences
            without tokens are allowed and return their state unchanged.
        backend: "auto", "reference" or "torch".

    Returns:
        The output (B, T, H, F) in the dtype of q, and the state or None.

    Raises:
        ValueError: sizes or dtypes that do not agree, or a state of another net or number of sequences.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(name, x, "(B, T, H, F)")
    check_dtypes(q=q, k=k, v=v)
    if not q.shape == k.shape == v.shape:
        raise ValueError(
            f"q, k and v must have one shape, got q {tuple(q.shape)}, k {tuple(k.shape)} and v "
            f"{tuple(v.shape)}."
        )
    if rate.shape != q.shape[:3]:
        raise ValueError(
            f"rate must have shape {tuple(q.shape[:3])}, one per token and head, got {tuple(rate.shape)}."
        )
    if reader_rate.dim() != 1 or not len(reader_rate):
        raise ValueError(
            "reader_rate must have shape (C,) with a rate for each place in a mini-batch, got "
            f"{tuple(reader_rate.shape)}."
        )
    for name, x in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if x.shape != q.shape[2:]:
            raise ValueError(f"{name} must have shape {tuple(q.shape[2:])}, got {tuple(x.shape)}.")
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps}.")
    lengths = sequence_lengths(cu_seqlens, q.shape[0], q.shape[1])
    _check_state(state, q, len(lengths), len(reader_rate))
    chosen = choose_backend("ttt", backend, ("torch",))
    acc = state.weights[0].dtype
    tensors = (q, k, v, rate, reader_rate)
    # fast weights stay in the accumulation dtype: autocast must not round the matmuls that make them
    with without_autocast(q.device):
        if chosen == "reference":
            output, final = ttt_reference(*tensors, (norm_weight, norm_bias), lengths, eps=eps, state=state)
        else:
            norm = Norm(norm_weight.to(acc)[:, None], norm_bias.to(acc)[:, None], eps)
            if cu_seqlens is None and q.shape[1] == 1:
                output, final = ttt_single(*tensors, norm, state)
            else:
                output, final = ttt_torch(*tensors, norm, lengths, state)
    return output, final if return_state else None


def _check_state(state: TTTState, q: Tensor, num_sequences: int, size: int) -> None:
    num_heads, width = q.shape[2:]
    lead = (num_sequences, num_heads)
    if len(state.weights) not in (2, 4):
        raise ValueError(
            f"state.weights must be W1 and b1, or W1, b1, W2 and b2, got {len(state.weights)} tensors."
        )
    hidden = width if len(state.weights) == 2 else state.weights[0].shape[-1]
    expected = [(*lead, width, hidden), (*lead, 1, hidden), (*lead, hidden, width), (*lead, 1, width)]
    expected = expected[: len(state.weights)]
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    for name, parts in (("weights", state.weights), ("pending", state.pending)):
        shapes = [tuple(x.shape) for x in parts]
        if shapes != expected:
            raise ValueError(
                f"state.{name} must have the shapes {expected} for {num_sequences} sequences, got {shapes}. "
                "Select the rows of the state that continue in this call."
            )
        for x in parts:
            if x.dtype != acc:
                raise ValueError(
                    f"the state of a call with {q.dtype} inputs must be {acc}, got {name} {x.dtype}."
                )
    if len(state.position) != num_sequences or any(not 0 <= place < size for place in state.position):
        raise ValueError(
            f"state.position must hold {num_sequences} integers from 0 to {size - 1}, got {state.position}."
        )
