"""Fast weights: a small net per head that learns, by gradient steps, while the sequence is read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Unpack

import torch
from torch import Tensor

from ..autograd import without_autocast
from ..backend import TRITON_INTERPRETED, choose_backend
from ..layout import sequence_lengths
from ..recompute import Step
from .arguments import can_run_triton, check_arguments, check_choice, check_rule, check_state
from .chunked import Tokens, fast_weight_scan_torch, layout_of
from .nets import NETS
from .newton_schulz import LACT_COEFFICIENTS, newton_schulz
from .reference import fast_weight_scan_reference
from .single import fast_weight_scan_single
from .types import FastWeightOptions, FastWeightState, Rule, pack, unpack_fast_weights
from .update import row_lengths

__all__ = [
    "LACT_COEFFICIENTS",
    "FastWeightOptions",
    "FastWeightState",
    "empty_fast_weights",
    "fast_weight_scan",
    "fast_weight_shapes",
    "fast_weight_step",
    "newton_schulz",
    "unpack_fast_weights",
]

# Dimensions: B batch, T tokens, N sequences, H heads, D width of keys, E width of values, F hidden width, R
# matrices of the net, P numbers in all of them


def fast_weight_shapes(
    net: str, head_dim: int, hidden_dim: int | None = None, value_dim: int | None = None
) -> tuple[tuple[int, int], ...]:
    """Rows and columns of each matrix of a net, in the order of its weights and rates.

    Args:
        net: "linear" (matrix), "mlp" (in, out) or "swiglu" (gate, up, down).
        head_dim: D.
        hidden_dim: F, default D; a linear net has none.
        value_dim: E, default D.

    Raises:
        ValueError: unknown net.
    """
    check_choice("net", net)
    return NETS[net].shapes(head_dim, value_dim or head_dim, hidden_dim or head_dim)


def empty_fast_weights(
    weights: Sequence[Tensor], batch_size: int, *, has_momentum: bool, dtype: torch.dtype | None = None
) -> FastWeightState:
    """The state before the first token: the initial net for every sequence, with its gradient.

    Args:
        weights: the matrices of the initial net, each (H, rows, columns).
        batch_size: N.
        has_momentum: whether calls give `momentum`.
        dtype: of the activations, default that of the weights; float64 makes a float64 state, any other a
            float32 one.
    """
    acc = torch.float64 if (dtype or weights[0].dtype) == torch.float64 else torch.float32
    # a clone: an expanded tensor could be written in place through one row only
    net = pack([matrix.to(acc) for matrix in weights]).expand(batch_size, -1, -1).clone()
    return FastWeightState(
        weights=net,
        pending=torch.zeros_like(net),
        num_tokens=torch.zeros(batch_size, dtype=torch.int64),
        momentum=torch.zeros_like(net) if has_momentum else None,
        momentum_sum=net.new_zeros(net.shape[:2]) if has_momentum else None,
    )


def fast_weight_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    momentum: Tensor | None,
    weights: Sequence[Tensor],
    *,
    net: str = "swiglu",
    residual: bool = True,
    loss: str = "dot",
    optimizer: str = "momentum",
    fast_norm: str = "internal",
    chunk_size: int = 2048,
    max_grad_norm: float | None = None,
    ns_steps: int = 5,
    ns_dtype: torch.dtype | None = None,
    detach_norm: bool = False,
    bptt_chunks: int | None = None,
    recompute: bool = True,
    initial_state: FastWeightState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, FastWeightState | None]:
    """Reads a sequence with a net f per head, which learns chunk by chunk to answer keys with their values.

    For the tokens t of a chunk of the sequence's own grid (tokens 0 to C-1, C to 2C-1, ...)

        o_t = f(q_t)
        U   = - sum_t rates_t dL_t/dW                for each matrix W of f, clipped to `max_grad_norm`
        M  <- mean_t(momentum_t) M + U,   step D = M (sgd: U; muon: the orthogonal factor of M)

    and D is applied when the chunk is full, so no token sees writes of its own chunk. Where f is read, where
    the gradient is taken and what is applied depends on `fast_norm`; N(W) brings every row of W to the length
    it has in the initial net:

        internal (AllMem)    W <- N(W) + D    reads W       gradient at N(W)
        post (LaCT)          W <- N(W + D)    reads W       gradient at W
        pre                  W <- W + D       reads N(W)    gradient at N(W); W itself in the first chunk
        none                 W <- W + D       reads W       gradient at W

    Nets: linear W x; mlp W_out gelu(W_in x), gelu in its tanh form; swiglu W_down (silu(W_gate x) * (W_up
    x)); plus x with a residual. All steps are closed forms. Test-time training (arXiv 2407.04620), LaCT
    (2505.23884), AllMem (2602.13680, section 3.2). Sums are float32 (float64 for float64 input).

    Args:
        q, k: (B, T, H, D), normally of length 1; T = 0 is allowed.
        v: (B, T, H, E); E = D with a residual.
        rates: (B, T, H, R), at least 0: of each token for each matrix, in the order of `weights`.
        momentum: (B, T, H) in 0 .. 1, averaged over the chunk; None without momentum.
        weights: the learned initial net, matrices of shapes (H, *shape) as `fast_weight_shapes` lists them:
            linear (matrix,), mlp (in, out), swiglu (gate, up, down). Also with `initial_state`: N needs them.
        net: "swiglu", "mlp" or "linear".
        residual: add x to f(x).
        loss: "dot" for -<f(k), v>, "l2" for |f(k) - v|^2 / 2.
        optimizer: "momentum", "sgd" (momentum=None), or "muon" (with momentum or without).
        fast_norm: "internal", "post", "pre" or "none".
        chunk_size: C, tokens per step. It decides the result, and is the same for all calls of a sequence.
        max_grad_norm: limit on the Frobenius norm of U, per head and matrix; None for none.
        ns_steps: iterations of `newton_schulz` for muon, at most 5.
        ns_dtype: precision of those; default that of the sums.
        detach_norm: no gradient through the row lengths of the initial net.
        bptt_chunks: cut gradients through the state after every so many chunks; None for never.
        recompute: run chunks again in the backward pass instead of keeping what they made.
        initial_state: state of the tokens read before, one row per sequence; None for the initial net.
        return_state: also return the state after the last token.
        cu_seqlens: (N+1,) int64 CPU boundaries of a packed row (B = 1); every sequence has its own net and
            its own grid. Sequences without tokens are allowed and return their state unchanged.
        backend: "auto", "reference", "torch" or "triton" (whole chunks of swiglu nets, forward; on CUDA, or
            in Triton's interpreter).

    Returns:
        The output (B, T, H, E) in the dtype of q, and the state or None.

    Raises:
        ValueError: unknown names, sizes that do not agree with each other or with the net, a momentum that
            the optimiser does not take, or a state of other sizes, another dtype or another optimiser.
    """
    rule = Rule(
        shapes=tuple((matrix.shape[-2], matrix.shape[-1]) for matrix in weights if matrix.dim() > 1),
        net=net,
        residual=residual,
        loss=loss,
        optimizer=optimizer,
        fast_norm=fast_norm,
        chunk_size=chunk_size,
        max_grad_norm=max_grad_norm,
        ns_steps=ns_steps,
        ns_dtype=ns_dtype,
        bptt_chunks=bptt_chunks,
    )
    check_rule(rule)
    check_arguments(q, k, v, rates, momentum, weights, rule)
    lengths = sequence_lengths(cu_seqlens, q.shape[0], q.shape[1])
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    num_seen = [0] * len(lengths)
    if initial_state is not None:
        check_state(initial_state, len(lengths), q.shape[2], rule, acc, momentum is not None)
        num_seen = initial_state.num_tokens.tolist()
    widths = (q.shape[3], v.shape[3], weights[0].shape[-2])
    eligible: tuple[str, ...] = ("torch",)
    if (q.is_cuda or TRITON_INTERPRETED) and can_run_triton(rule, q.dtype, widths):
        # its interpreter only when asked for
        eligible = ("triton", "torch") if q.is_cuda else ("torch", "triton")
    chosen = choose_backend("fast_weight_scan", backend, eligible)
    tokens = Tokens(q, k, v, rates, momentum)
    # sums stay in the accumulation dtype: autocast must not round the matmuls that make them
    with without_autocast(q.device):
        state = initial_state
        if state is None:
            state = empty_fast_weights(weights, len(lengths), has_momentum=momentum is not None, dtype=acc)
        targets = row_lengths([matrix.to(acc) for matrix in weights])
        if detach_norm:
            targets = tuple(target.detach() for target in targets)
        if chosen == "reference":
            output, final = fast_weight_scan_reference(
                tokens, lengths, targets, state, rule, num_seen=num_seen
            )
        elif cu_seqlens is None and q.shape[1] == 1:
            output, final = fast_weight_scan_single(tokens, targets, state, rule, num_seen=num_seen)
        else:
            output, final = fast_weight_scan_torch(
                tokens,
                lengths,
                targets,
                state,
                rule,
                recompute=recompute,
                num_seen=num_seen,
                forward=_triton_chunk(rule, momentum is not None) if chosen == "triton" else None,
            )
    return output, final if return_state else None


def _triton_chunk(rule: Rule, has_momentum: bool) -> Step:
    """A whole chunk in Triton, imported where it is used."""
    from .triton_kernels import whole_chunk_triton

    return partial(whole_chunk_triton, rule, layout_of(rule, has_momentum))


def fast_weight_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    momentum: Tensor | None,
    weights: Sequence[Tensor],
    state: FastWeightState,
    **options: Unpack[FastWeightOptions],
) -> tuple[Tensor, FastWeightState]:
    """One token of every sequence: `fast_weight_scan` without its dimension T, the same numbers.

    Args:
        q, k: (N, H, D).
        v: (N, H, E).
        rates: (N, H, R).
        momentum: (N, H) or None.
        weights: the learned initial net.
        state: from `fast_weight_scan`, from here, or from `empty_fast_weights`; not changed. Its sequences
            may stand at different tokens of their chunks.
        options: net, residual, loss, optimizer, fast_norm, chunk_size and so on, as in the calls before.

    Returns:
        The output (N, H, E) in the dtype of q, and the new state.

    Raises:
        ValueError: as `fast_weight_scan`.
    """
    gates = None if momentum is None else momentum[:, None]
    out, after = fast_weight_scan(
        q[:, None],
        k[:, None],
        v[:, None],
        rates[:, None],
        gates,
        weights,
        initial_state=state,
        return_state=True,
        **options,
    )
    assert after is not None
    return out[:, 0], after
