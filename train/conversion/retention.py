"""Losses of retention gates: what is kept beyond a budget, and how far the outputs are from the teacher's.

The gates of a model (mixer `gated_attention`) give g per token and head. Their soft cache size S_t counts
what is left of all tokens at step t (`kernels.soft_cache_size`); a hinge on it pushes S below the budget M
while a distillation keeps the outputs (TRIM-KV, arXiv 2512.03324).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...kernels import soft_cache_size
from ...layers.contract import suggest
from ..data.batches import TokenBatch
from ..data.mqar import IGNORE_INDEX

# Dimensions: B rows, T tokens, A heads of all layers, V vocabulary, P positions with a loss

NORMALIZERS = ("active", "paper")
SCOPES = ("head", "global")
KINDS = ("fwkl", "ntp", "rvkl")
_EXTRA = "log_retention"


def check_budget(budget: float) -> None:
    """Raises ValueError unless a budget is a number above 0: tokens, or below 1 a share of the sequence."""
    is_number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    if not is_number or not 0 < budget < float("inf"):
        raise ValueError(
            f"a budget must be a number of tokens above 0, or below 1 a share of the text, got {budget!r}."
        )


def capacity_loss(
    sizes: Tensor,
    budget: float,
    *,
    positions: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    normalizer: str = "active",
    scope: str = "head",
) -> Tensor:
    """How far soft cache sizes are above a budget.

        active    sum r / count (r > 0),   r = max(0, S - M) / max(1, p - M)      (the published code)
        paper     mean of max(0, S - M) / (p + 1)                                 (the published text)

    p is the position of the token, M the budget. With scope "global" S is summed over all heads, and M and p
    count once per head (arXiv 2605.09649).

    Args:
        sizes: (B, T, A), S of every token and head.
        budget: M, tokens per head, or below 1 their share of the sequence.
        positions: (B, T) integers; None counts from the start of each row.
        lengths: (B, T), tokens of the sequence that a token belongs to, for a budget below 1; None takes T.
        mask: (B, T) bool, True = real token; None for all.
        normalizer: "active" or "paper".
        scope: "head" or "global".

    Returns:
        A scalar; exactly 0 with gradient 0 where nothing is above the budget.

    Raises:
        ValueError: an impossible budget, or an unknown normalizer or scope.
    """
    check_budget(budget)
    for name, value, known in (("normalizer", normalizer, NORMALIZERS), ("scope", scope, SCOPES)):
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown. {suggest(str(value), known)}")
    batch_size, num_tokens, num_heads = sizes.shape
    if positions is None:
        positions = torch.arange(num_tokens, device=sizes.device).expand(batch_size, -1)
    place = positions[..., None].to(sizes.dtype)  # (B, T, 1)
    limit: Tensor | float = budget
    if budget < 1:
        limit = budget * (num_tokens if lengths is None else lengths[..., None].to(sizes.dtype))
    if scope == "global":
        sizes = sizes.sum(-1, keepdim=True)
        place, limit, unit = place * num_heads, limit * num_heads, float(num_heads)
    else:
        unit = 1.0
    excess = (sizes - limit).clamp(min=0)
    if mask is not None:
        excess = excess * mask[..., None]
    if normalizer == "active":
        rates = excess / (place - limit).clamp(min=1)
        return rates.sum() / (rates > 0).sum().clamp(min=1)
    rates = excess / (place + unit)
    if mask is None:
        return rates.mean() if rates.numel() else rates.sum()
    return rates.sum() / (mask.sum() * rates.shape[-1]).clamp(min=1)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    kinds: Sequence[str] = ("fwkl", "ntp"),
    mask: str = "next",
    base_reduction: str = "mean",
    block_size: int = 8192,
) -> Tensor:
    """How far next-token distributions are from the teacher's and from the text.

        fwkl   mean KL(teacher || student)      rvkl   mean KL(student || teacher)
        ntp    mean cross-entropy of the next token

    The training of this library takes the same from hidden states (`kernels.linear_divergence`); this is for
    models that give logits. They are worked on some positions at a time, in float32 at least.

    Args:
        student_logits: (B, T, V).
        teacher_logits: (B, T, V); gets no gradient.
        labels: (B, T), the tokens themselves, -100 = no loss. Position t predicts label t + 1.
        kinds: which terms to take.
        mask: "next": divergences count where the next label counts. "same": where the label of the position
            itself does (the published code).
        base_reduction: "mean" of the terms (the published code) or their "sum" (the published text).
        block_size: positions worked on at once.

    Raises:
        ValueError: no or unknown kinds, or an unknown mask or reduction.
    """
    for name, value, known in (
        ("mask", mask, ("next", "same")),
        ("base_reduction", base_reduction, ("mean", "sum")),
        *(("kind", kind, KINDS) for kind in kinds),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown. {suggest(str(value), known)}")
    if not kinds:
        raise ValueError(f"kinds must name at least one of {', '.join(KINDS)}, got none.")
    follows = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # the label that each position predicts
    teacher_logits = teacher_logits.detach()
    terms = []
    for kind in kinds:
        if kind == "ntp":
            asked = follows != IGNORE_INDEX
            pair = (student_logits[asked], follows[asked])
            terms.append(_mean_in_blocks(_cross_entropy, pair, block_size))
            continue
        asked = (labels if mask == "same" else follows) != IGNORE_INDEX
        pair = (student_logits[asked], teacher_logits[asked])
        terms.append(_mean_in_blocks(_forward if kind == "fwkl" else _backward, pair, block_size))
    total = torch.stack(terms).sum()
    return total / len(terms) if base_reduction == "mean" else total


def log_retentions(extras: Mapping[str, Tensor]) -> Tensor:
    """(B, T, A) of all gated layers, from the extras of a model.

    Raises:
        ValueError: no layer gave any.
    """
    found = [value for name, value in extras.items() if name.rpartition(".")[2] == _EXTRA]
    if not found:
        raise ValueError(
            "no layer gives log-retentions. Convert the model to gated_attention, or leave the loss "
            "capacity out."
        )
    return torch.cat(found, -1)


def soft_sizes(log_retention: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Soft cache sizes (1 or B, T or L, A) of the real tokens of a batch, their positions and the lengths of
    their sequences.

    Args:
        log_retention: (B, T, A).
        batch: what the model read.
    """
    bounds = batch.cu_seqlens
    if batch.mask is not None:
        log_retention = log_retention[batch.mask][None]
        bounds = F.pad(batch.mask.sum(1).cpu().cumsum(0), (1, 0))
    shape, device = log_retention.shape[:2], log_retention.device
    if bounds is None:
        positions = torch.arange(shape[1], device=device).expand(shape)
        lengths = torch.full(shape, shape[1], device=device)
    else:
        counts = bounds.diff()
        starts = torch.repeat_interleave(bounds[:-1], counts)
        positions = (torch.arange(shape[1]) - starts)[None].to(device)
        lengths = torch.repeat_interleave(counts, counts)[None].to(device)
    return soft_cache_size(log_retention, cu_seqlens=bounds), positions, lengths


def _mean_in_blocks(
    loss: Callable[[Tensor, Tensor], Tensor], pair: tuple[Tensor, Tensor], block_size: int
) -> Tensor:
    """Mean over positions (P, ...) of a summed loss, whose intermediate values are made again, not kept."""
    student, other = pair
    wide = torch.promote_types(student.dtype, torch.float32)
    total = student[:0].sum(dtype=wide)  # keeps the result in the graph where no position counts
    for mine, theirs in zip(student.split(block_size), other.split(block_size), strict=True):
        total = total + checkpoint(loss, mine, theirs, use_reentrant=False)
    return total / max(1, len(student))


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -_log_softmax(logits).gather(1, targets[:, None]).sum()


def _forward(student: Tensor, teacher: Tensor) -> Tensor:
    log_p = _log_softmax(teacher)
    return (log_p.exp() * (log_p - _log_softmax(student))).sum()


def _backward(student: Tensor, teacher: Tensor) -> Tensor:
    log_q = _log_softmax(student)
    return (log_q.exp() * (log_q - _log_softmax(teacher))).sum()
