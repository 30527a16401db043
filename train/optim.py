"""Optimiser and learning-rate schedule, with the wishes that parameters carry as tags."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up.

    Args:
        lr: peak learning rate; a parameter tagged with ``lr_scale`` gets this times its scale.
        weight_decay: decoupled decay. Vectors and parameters tagged ``weight_decay=False`` (norms, gates,
            decays) get none.
        beta1: share of the old running mean of the gradient that each step keeps.
        beta2: share of the old running mean of the squared gradient that each step keeps.
        eps: added to the root of that mean square, below which a step no longer grows.
        schedule: how the rate falls after the warm-up, over the whole run.
        warmup_steps: optimiser steps of linear rise from (almost) zero.
        min_lr_ratio: the last rate as a share of the peak, for ``cosine`` and ``linear``.

    Raises:
        ValueError: a number out of its range.
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}.")
        for name in ("weight_decay", "eps", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}.")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must lie in [0, 1], got {self.min_lr_ratio}.")


def parameter_groups(
    parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Sort trainable parameters into groups by their tags.

    Tags are set by `memzoo.layers.tag_parameter`. A vector never decays, tagged or not.

    Returns:
        groups for a torch optimiser: plain matrices first, then by rate.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim >= 2 and not getattr(parameter, "_no_weight_decay", False)
        groups.setdefault((getattr(parameter, "_lr_scale", 1.0), decays), []).append(parameter)
    return [
        {"params": members, "lr": lr * scale, "weight_decay": weight_decay if decays else 0.0}
        for (scale, decays), members in sorted(
            groups.items(), key=lambda item: (item[0][0] != 1.0, item[0][0], not item[0][1])
        )
    ]


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the tagged groups of ``parameters``."""
    groups = parameter_groups(parameters, lr=config.lr, weight_decay=config.weight_decay)
    if not groups:
        raise ValueError(
            "nothing to train: every parameter is frozen. Unfreeze some with requires_grad_(True)."
        )
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def lr_factor(config: OptimizerConfig, num_steps: int) -> Callable[[int], float]:
    """The learning rate at each optimiser step, as a share of the peak.

    Args:
        num_steps: optimiser steps of the whole run, warm-up included.
    """
    warmup = config.warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.schedule == "constant":
            return 1.0
        progress = min((step - warmup) / max(num_steps - warmup, 1), 1.0)
        fall = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * fall

    return factor
