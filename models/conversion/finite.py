"""Numbers that are not finite: where they begin, so that a run stops there and says so."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..decoder import MemoryLM


def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor that holds a number that is not finite."""
    return next((name for name, tensor in named if not bool(torch.isfinite(tensor).all())), None)


@torch.no_grad()
def find_not_finite(
    model: MemoryLM,
    input_ids: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    whose: str = "model",
) -> str | None:
    """Where a model begins to give numbers that are not finite, as a part of a sentence; None if nowhere.

    Args:
        model: looked at from its weights to what its head reads.
        input_ids, mask, cu_seqlens: as in `MemoryLM.forward`.
        whose: the model, as a reader knows it.
    """
    weight = first_not_finite(model.named_parameters())
    if weight is not None:
        return f"the weight {weight} of the {whose}"
    out = model(input_ids, mask=mask, cu_seqlens=cu_seqlens, return_hidden_states=True, last_only=True)
    for index, hidden in enumerate(out.hidden_states[1:]):
        if not bool(torch.isfinite(hidden).all()):
            return f"the output of layer {index} of the {whose}"
    return None
