"""The score of retention gates: what is left of a token, or what will be over the next steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..contract import check_choice
from .entries import Entries
from .policy import EvictionPolicy, Prefill
from .reading import Observation
from .scorers import Scorer
from .selection import GlobalBudget, HeadAdaptive, Selector

# Dimensions: B sequences, T tokens, G key/value heads, C entries

_LEAST_NORM = 1e-12


@dataclass(frozen=True)
class Retention(Scorer):
    """The tokens of which most is left stay: g * age, g from the gate of the layer (TRIM-KV, 2512.03324).

    Attributes:
        age_offset: age of the newest token: 0 in the paper's text, so that it stays; 2 in the published code.
        lookahead: n for log(sum_{m < n} beta^(age + m)), what is left over the next n steps; 1 for g * age.
        key_norm: add the log of the norm of the key.
    """

    age_offset: int = 0
    lookahead: int = 1
    key_norm: bool = False

    def __post_init__(self) -> None:
        if self.lookahead < 1 or self.age_offset < 0:
            raise ValueError(
                f"lookahead must be at least 1 and age_offset at least 0, got {self.lookahead} and "
                f"{self.age_offset}."
            )

    @property
    def has_extra(self) -> bool:
        return True

    def score(self, entries: Entries, obs: Observation) -> Tensor:
        assert entries.extra is not None
        g = entries.extra.detach()  # (B, G, C)
        scores = g * (obs.num_seen - entries.order + self.age_offset)
        if self.lookahead > 1:
            ahead = _log1mexp(self.lookahead * g) - _log1mexp(g)
            scores = scores + torch.where(g < 0, ahead, math.log(self.lookahead))
        if self.key_norm:
            norm = entries.key.detach().to(g.dtype).norm(dim=-1)
            scores = scores + norm.clamp(min=_LEAST_NORM).log()
        return scores

    def extra(self, attention: nn.Module, hidden_states: Tensor) -> Tensor:
        """(B, T, G) from the gate that `attach_gates` put into an attention layer of transformers.

        Raises:
            ValueError: there is none.
        """
        gate = getattr(attention, "retention_gate", None)
        if gate is None:
            raise ValueError(
                f"{type(attention).__name__} has no retention gate. Call attach_gates(model, folder) first."
            )
        g: Tensor = gate(hidden_states)
        return g


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without loss of digits at either end."""
    return torch.where(x < -math.log(2), torch.log1p(-x.exp()), (-torch.expm1(x)).log())


def retention(
    budget: int,
    *,
    sinks: int = 0,
    recent: int | float = 0,
    age_offset: int = 0,
    lookahead: int = 1,
    key_norm: bool = False,
    scope: str = "head",
    floor: float = 0.0,
    threshold: float | None = None,
    interval: int = 1,
    prefill: Prefill | None = None,
) -> EvictionPolicy:
    """What the retention gates of the model say (TRIM-KV, Bui et al., 2512.03324); see `Retention`.

    Args:
        budget: entries per head.
        sinks, recent: first and last tokens that always stay.
        age_offset, lookahead, key_norm: as in `Retention`.
        scope: "head": each has its budget; "layer", "global": the heads of a layer, or of all layers of a
            model, share theirs by what their gates say (the last is for models of transformers).
        floor: share of the budget that every head keeps then.
        threshold: of the scope "global": tokens of which less than this is left go although there is room.
        interval, prefill: see `EvictionPolicy`; by default "grid", of the scope "global" "one_shot".

    Raises:
        ValueError: an unknown scope, or a threshold with another scope than "global".
    """
    check_choice("scope", scope, ("head", "layer", "global"))
    selector: Selector | None = None
    if scope != "head":
        selector = GlobalBudget(floor, threshold) if scope == "global" else HeadAdaptive(floor)
    if threshold is not None and scope != "global":
        raise ValueError(f"a threshold goes with the scope global, got {scope}. Leave one of them out.")
    return EvictionPolicy(
        scorer=Retention(age_offset, lookahead, key_norm),
        budget=budget,
        sinks=sinks,
        recent=recent,
        selector=selector,
        interval=interval,
        prefill=prefill or ("one_shot" if scope == "global" else "grid"),
        name="retention",
    )
