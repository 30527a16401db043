"""Sizes drawn anew in every step, so that a model works with any: windows, sinks, chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..layers.contract import suggest
from ..layers.contract.context import OVERRIDES

Sizes = Mapping[str, Sequence[int]]


def check_sizes(where: str, sizes: Any) -> None:
    """Raises ValueError unless sizes maps known names to a smallest and a largest integer."""
    example = "Write {window_size: [64, 512]}."
    if not isinstance(sizes, Mapping):
        raise ValueError(f"{where}: sizes must map names to ranges, got {sizes!r}. {example}")
    for name, bounds in sizes.items():
        if name not in OVERRIDES:
            raise ValueError(f"{where}: unknown size {name!r}. {suggest(str(name), OVERRIDES)}")
        is_pair = isinstance(bounds, (list, tuple)) and len(bounds) == 2
        least = 0 if name == "num_sinks" else 1
        if not is_pair or any(isinstance(bound, bool) or not isinstance(bound, int) for bound in bounds):
            raise ValueError(
                f"{where}: {name} must be the smallest and the largest integer, got {bounds!r}. {example}"
            )
        if not least <= bounds[0] <= bounds[1]:
            raise ValueError(
                f"{where}: {name} must go from at least {least} up to something no smaller, got {bounds!r}."
            )


def draw_sizes(sizes: Sizes, generator: torch.Generator) -> dict[str, int]:
    """One of each size, uniform between its smallest and its largest."""
    return {
        name: int(torch.randint(low, high + 1, (), generator=generator))
        for name, (low, high) in sorted(sizes.items())
    }


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator that depends on seed and step alone, so that a resumed run draws the same."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)
