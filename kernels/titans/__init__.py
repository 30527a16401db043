"""The neural memory of Titans: a net per head that learns by gradient steps with momentum and forgetting."""

import torch
from torch import Tensor

from ..autograd import without_autocast
from ..backend import choose_backend
from ..checks import check_dtypes, check_rank
from ..layout import ChunkLayout, sequence_lengths
from .chunked import titans_torch
from .nets import read
from .reference import titans_reference
from .single import titans_single
from .types import Rule, TitansState

__all__ = ["TitansState", "titans", "titans_read"]

# Dimensions: B batch, T tokens, N sequences, H heads, C tokens of a chunk, F head width, G hidden width


def titans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    gates: Tensor,
    state: TitansState,
    *,
    chunk_size: int,
    rebase_size: int | None = None,
    use_momentum: bool = True,
    per_token: bool = False,
    loss_scale: float = 1.0,
    max_grad_norm: float | None = None,
    orthogonalize: bool = False,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, TitansState | None]:
    """The neural memory of Titans (Behrouz et al., arXiv 2501.00663).

        f(x; M) = x + (1 + gamma) LN(gelu(x W1) ... Wp),   loss_t = loss_scale |f(k_t; base) - v_t|^2
        S_j = e_j S_{j-1} - sum over chunk j of rate_t * gradient of loss_t
        M_j = (1 - a_j) M_{j-1} + S_j,   (a_j, e_j) = sigmoid(mean of the gates' logits over chunk j)

    The last token of a chunk reads M_j, all before it M_{j-1}. Gradients are taken at the first net
    throughout, or, with a rebase size, at the net as it was at the last multiple of it. With `per_token`, S
    and M step at every token with its own gates, every token reads what it wrote itself, and gradients are
    taken at the net as the last chunk left it (the form of the paper's text).

    Chunks lie on the token grid of each sequence, so a call may begin and end anywhere inside one. Sums are
    float32 (float64 for float64 input).

    Args:
        q, k, v: (B, T, H, F); T = 0 is allowed.
        rate: (B, T, H), of the gradients.
        gates: (B, T, H, 2), logits of decay a and momentum e.
        state: nets and what is pending, one row per sequence; for an empty memory the learned net twice,
            zeros and position 0.
        chunk_size: C.
        rebase_size: tokens between two changes of the net at which gradients are taken, a multiple of C; None
            for no change.
        use_momentum: without, S_j is what chunk j writes.
        per_token: gates per token instead of per chunk.
        loss_scale: 1 / F for the mean over channels.
        max_grad_norm: draws the norm n of what a chunk writes into a part of a head's net in to
            max_grad_norm * tanh(n / max_grad_norm); None for no bound.
        orthogonalize: M_j adds the matrices of S_j after five Newton-Schulz steps (S itself stays).
        return_state: also return the state after the last token.
        cu_seqlens: (N+1,) int64 CPU boundaries of a packed row (B = 1); nothing passes a boundary. Sequences
            without tokens are allowed and return their state unchanged.
        backend: "auto", "reference" or "torch".

    Returns:
        The output (B, T, H, F) in the dtype of q, and the state or None.

    Raises:
        ValueError: sizes or dtypes that do not agree, options that exclude one another, or a state of another
            net or number of sequences.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(name, x, "(B, T, H, F)")
    check_dtypes(q=q, k=k, v=v)
    if not q.shape == k.shape == v.shape:
        raise ValueError(
            f"q, k and v must have one shape, got q {tuple(q.shape)}, k {tuple(k.shape)} and v "
            f"{tuple(v.shape)}."
        )
    for name, x, shape in (("rate", rate, q.shape[:3]), ("gates", gates, (*q.shape[:3], 2))):
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}.")
    rule = Rule(chunk_size, rebase_size, use_momentum, per_token, loss_scale, max_grad_norm, orthogonalize)
    check_rule(rule)
    lengths = sequence_lengths(cu_seqlens, q.shape[0], q.shape[1])
    _check_state(state, q, len(lengths), rule)
    chosen = choose_backend("titans", backend, ("torch",))
    # fast weights stay in the accumulation dtype: autocast must not round the matmuls that make them
    with without_autocast(q.device):
        if chosen == "reference":
            output, final = titans_reference(q, k, v, rate, gates, lengths, rule, state)
        elif cu_seqlens is None and q.shape[1] == 1:
            output, final = titans_single(q, k, v, rate, gates, rule, state)
        else:
            output, final = titans_torch(q, k, v, rate, gates, lengths, rule, state)
    return output, final if return_state else None


def titans_read(q: Tensor, weights: tuple[Tensor, ...], *, cu_seqlens: Tensor | None = None) -> Tensor:
    """What the net of each sequence answers to its queries; nothing is written.

    Args:
        q: (B, T, H, F); T = 0 is allowed.
        weights: a net of a `TitansState`, one row per sequence.
        cu_seqlens: (N+1,) int64 CPU boundaries of a packed row (B = 1).

    Returns:
        (B, T, H, F) in the dtype of q.

    Raises:
        ValueError: another number of sequences or heads, or another width.
    """
    check_rank("q", q, "(B, T, H, F)")
    lengths = sequence_lengths(cu_seqlens, q.shape[0], q.shape[1])
    lead = (len(lengths), q.shape[2])
    if any(tuple(x.shape[:2]) != lead for x in weights) or weights[0].shape[-1] != q.shape[3]:
        raise ValueError(
            f"weights must begin with {lead} and have the width {q.shape[3]} for q {tuple(q.shape)}, got "
            f"{[tuple(x.shape) for x in weights]}."
        )
    if not sum(lengths):
        return torch.zeros_like(q)
    layout = ChunkLayout.make(lengths, max(lengths))
    if 0 in lengths:
        rows = torch.tensor([n for n, length in enumerate(lengths) if length], device=q.device)
        weights = tuple(x.index_select(0, rows) for x in weights)
    grid = layout.to_chunks(q.flatten(0, 1)).transpose(1, 2).to(weights[0].dtype)  # (N, H, C, F)
    with without_autocast(q.device):
        found = read(weights, grid).transpose(1, 2)
    return layout.from_chunks(found).reshape(q.shape).to(q.dtype)


def check_rule(rule: Rule) -> None:
    """Raises ValueError for settings out of range or that exclude one another."""
    if rule.chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {rule.chunk_size}.")
    if rule.rebase_size is not None and (rule.rebase_size < 1 or rule.rebase_size % rule.chunk_size):
        raise ValueError(
            f"rebase_size must be a multiple of chunk_size {rule.chunk_size}, got {rule.rebase_size}. "
            "Use None to take all gradients at the first net."
        )
    if not 0 < rule.loss_scale < float("inf"):
        raise ValueError(f"loss_scale must be a finite number above 0, got {rule.loss_scale}.")
    if rule.max_grad_norm is not None and not 0 < rule.max_grad_norm < float("inf"):
        raise ValueError(
            f"max_grad_norm must be a finite number above 0, got {rule.max_grad_norm}. Use None for no bound."
        )
    has_more = rule.rebase_size is not None or rule.max_grad_norm is not None or rule.orthogonalize
    if rule.per_token and has_more:
        raise ValueError(
            "with gates per token, gradients are taken at the start of every chunk and written one by one; "
            f"got rebase_size {rule.rebase_size}, max_grad_norm {rule.max_grad_norm} and orthogonalize "
            f"{rule.orthogonalize}. Leave them out, or use gates per chunk."
        )


def _check_state(state: TitansState, q: Tensor, num_sequences: int, rule: Rule) -> None:
    num_heads, width = q.shape[2:]
    if len(state.weights) < 2:
        raise ValueError(
            f"state.weights must be a gain and at least one matrix, got {len(state.weights)} tensors."
        )
    hidden = state.weights[1].shape[-1]
    widths = [width, *(hidden for _ in state.weights[2:]), width]
    lead = (num_sequences, num_heads)
    expected = [(*lead, 1, width), *((*lead, a, b) for a, b in zip(widths, widths[1:], strict=False))]
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    nets = {
        "weights": expected,
        "base": expected,
        "momentum": expected if rule.use_momentum else [],
        "pending": [] if rule.per_token else expected,
    }
    for name, shapes in nets.items():
        parts: tuple[Tensor, ...] = getattr(state, name)
        found = [tuple(x.shape) for x in parts]
        if found != shapes:
            raise ValueError(
                f"state.{name} must have the shapes {shapes} for {num_sequences} sequences, got {found}. "
                "Select the rows of the state that continue in this call."
            )
        for x in parts:
            if x.dtype != acc:
                raise ValueError(
                    f"the state of a call with {q.dtype} inputs must be {acc}, got {name} {x.dtype}."
                )
    sums = None if state.gates is None else tuple(state.gates.shape)
    if sums != (None if rule.per_token else (*lead, 2)):
        raise ValueError(
            f"state.gates must be {'None' if rule.per_token else f'of shape {(*lead, 2)}'}, got {sums}."
        )
    if len(state.position) != num_sequences or any(not 0 <= n < rule.period for n in state.position):
        raise ValueError(
            f"state.position must hold {num_sequences} integers from 0 to {rule.period - 1}, got "
            f"{state.position}."
        )
