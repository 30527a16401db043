"""mLSTM: a matrix state per head with an exponential input gate and a stabiliser."""

import torch
from torch import Tensor

from ..autograd import without_autocast
from ..backend import choose_backend
from ..checks import check_dtypes, check_rank
from ..layout import sequence_lengths
from .chunked import mlstm_torch
from .reference import mlstm_reference
from .single import mlstm_single
from .types import MLSTMState

__all__ = ["MLSTMState", "mlstm"]

# Dimensions: B batch, T tokens, N sequences, H heads, K key width, V value width


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: MLSTMState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, MLSTMState | None]:
    """mLSTM of xLSTM (Beck et al., arXiv 2405.04517), stabilised.

        m_t = max(logsigmoid(f_t) + m_{t-1}, i_t)
        C_t = exp(logsigmoid(f_t) + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t v_t^T,   n_t likewise
        h_t = (scale q_t) C_t / (max(|(scale q_t) . n_t|, exp(-m_t)) + eps)

    The stabiliser m_t depends on tokens up to t alone, also inside a chunk. Sums are float32 (float64 for
    float64 input).

    Args:
        q, k: (B, T, H, K); T = 0 is allowed.
        v: (B, T, H, V).
        input_gate: (B, T, H), i_t before the exponential.
        forget_gate: (B, T, H), f_t before the sigmoid.
        scale: factor on q, default K ** -0.5.
        eps: added to the denominator.
        initial_state: state of the tokens read before, one row per sequence; None for none, which is the
            same as zeros.
        return_state: also return the state after the last token.
        cu_seqlens: (N+1,) int64 CPU boundaries of a packed row (B = 1); nothing passes a boundary. Sequences
            without tokens are allowed and return their state unchanged.
        chunk_size: tokens handled by one block of matmuls; changes speed, not the result.
        backend: "auto", "reference" or "torch".

    Returns:
        The output (B, T, H, V) in the dtype of q, and the state or None.

    Raises:
        ValueError: sizes or dtypes that do not agree, or a state of another number of sequences.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(name, x, "(B, T, H, K)")
    check_dtypes(q=q, k=k, v=v)
    if q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(
            "q, k and v must agree in batch, tokens and heads, and q and k in width, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}."
        )
    for name, gate in (("input_gate", input_gate), ("forget_gate", forget_gate)):
        if gate.shape != q.shape[:3]:
            raise ValueError(
                f"{name} must have shape {tuple(q.shape[:3])}, one per token and head, got "
                f"{tuple(gate.shape)}."
            )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}.")
    lengths = sequence_lengths(cu_seqlens, q.shape[0], q.shape[1])
    if initial_state is not None:
        _check_state(initial_state, q, v, len(lengths))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    chosen = choose_backend("mlstm", backend, ("torch",))
    tensors = (q, k, v, input_gate, forget_gate)
    # sums stay in the accumulation dtype: autocast must not round the matmuls that make them
    with without_autocast(q.device):
        if chosen == "reference":
            output, state = mlstm_reference(
                *tensors, lengths, scale=scale, eps=eps, initial_state=initial_state
            )
        elif cu_seqlens is None and q.shape[1] == 1:
            output, state = mlstm_single(*tensors, scale=scale, eps=eps, initial_state=initial_state)
        else:
            output, state = mlstm_torch(
                *tensors,
                lengths,
                is_packed=cu_seqlens is not None,
                scale=scale,
                eps=eps,
                initial_state=initial_state,
                chunk_size=chunk_size,
            )
    return output, state if return_state else None


def _check_state(state: MLSTMState, q: Tensor, v: Tensor, num_sequences: int) -> None:
    shape = (num_sequences, q.shape[2], q.shape[3])
    expected = {"memory": (*shape, v.shape[3]), "normalizer": shape, "stabilizer": shape[:2]}
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    for name, sizes in expected.items():
        part = getattr(state, name)
        if tuple(part.shape) != sizes:
            raise ValueError(
                f"initial_state.{name} must have shape {sizes} for {num_sequences} sequences, got "
                f"{tuple(part.shape)}. Select the rows of the state that continue in this call."
            )
        if part.dtype != acc:
            raise ValueError(
                f"the state of a call with {q.dtype} inputs must be {acc}, got {name} {part.dtype}. "
                "Convert it, or start with initial_state=None."
            )
