"""Which tokens are hard to predict, and which of them are kept: the innovation test of B'MOJO.

Zancato et al., arXiv 2407.06324, Algorithm 1 and appendix B.2, with a test at the ends of chunks.
"""

import torch
from torch import Tensor

from .autograd import without_autocast
from .causal_conv import causal_conv

# Dimensions: B batch, T tokens, N sequences, M width, P order of the predictor, S slots of the store, K
# chunks, C candidates of a chunk, J slots after a selection

RMS_EPS = 1e-6


def predictor_weights(order: int, decay: float) -> list[float]:
    """Weights of the last outputs, the newest first: decay, decay^2, .., scaled to sum 1."""
    weights = [decay**lag for lag in range(1, order + 1)]
    return [weight / sum(weights) for weight in weights]


def innovation_scores(
    x: Tensor,
    weights: Tensor,
    *,
    tail: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How far each token lies from a weighted average of those before it.

        u_t = x_t / sqrt(mean(x_t^2) + 1e-6),   e_t = mean((u_t - sum_{i=1..P} w_i u_{t-i})^2)

    Means run over the width; u is zero before the start, so that the first token scores 1 (but for the 1e-6).
    Float32, or float64 for float64 input. No gradient reaches x; that of the weights is the gradient of a
    prediction loss.

    Args:
        x: (B, T, M); T = 0 is allowed.
        weights: (M, P), the newest input first.
        tail: (N, P, M) inputs u before the first token, oldest first; None for zeros.
        cu_seqlens: (N+1,) int64 CPU boundaries of a packed row (B = 1).

    Returns:
        scores (B, T), and the new tail (N, P, M).
    """
    with without_autocast(x.device):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        u = x.detach().to(wide)
        u = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + RMS_EPS)
        taps = torch.cat(
            [weights.to(wide).flip(1), weights.new_zeros(weights.shape[0], 1, dtype=wide)], dim=1
        )
        guess, tail = causal_conv(
            u, taps, tail=None if tail is None else tail.detach().to(wide), cu_seqlens=cu_seqlens
        )
        scores = (u - guess).square().mean(-1)
        return scores, tail


def select_eidetic(rank: Tensor, candidates: Tensor, capacity: int | None) -> Tensor:
    """The best entries after every chunk, each chunk offering some more: top(top(A) + B) = top(A + B).

    Args:
        rank: (N, S) rank of the entries kept so far, in order of their positions; -inf for an empty slot.
        candidates: (N, K, C) ranks of the tokens that each chunk offers, in order of their positions; -inf
            for none. Of equal ranks the earlier position wins.
        capacity: entries that are kept; None keeps all.

    Returns:
        (N, K, J) int64, what is kept from each chunk on: s < S is the slot s, S + k C + c candidate c of
        chunk k, negative is none; ascending up to the empty ones. J is the capacity, or S + K C.
    """
    num_rows, num_slots = rank.shape
    num_chunks, num_offered = candidates.shape[1:]
    if capacity is None:
        entry = torch.arange(num_slots + num_chunks * num_offered, device=rank.device)
        is_filled = torch.cat([rank, candidates.flatten(1)], 1) > -torch.inf  # (N, J)
        chunk = torch.arange(num_chunks, device=rank.device)[:, None]
        is_offered = entry < num_slots + (chunk + 1) * num_offered  # (K, J)
        return torch.where(is_filled[:, None] & is_offered, entry, -1)
    kept = torch.arange(num_slots, device=rank.device).expand(num_rows, -1)
    steps = []
    for number, offered in enumerate(candidates.unbind(1)):
        first = num_slots + number * num_offered
        new = torch.arange(first, first + num_offered, device=rank.device).expand(num_rows, -1)
        rank, kept = torch.cat([rank, offered], 1), torch.cat([kept, new], 1)
        best = rank.sort(dim=1, descending=True, stable=True).indices[:, :capacity].sort(1).values
        rank, kept = rank.gather(1, best), kept.gather(1, best)
        steps.append(torch.where(rank > -torch.inf, kept, -1))
    if not steps:
        return kept.new_zeros(num_rows, 0, capacity)
    # fewer entries than the capacity so far
    return torch.stack([torch.nn.functional.pad(x, (0, capacity - x.shape[1]), value=-1) for x in steps], 1)
