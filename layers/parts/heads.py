"""Widths of heads that follow from the width of the model."""

from __future__ import annotations

import math

from .state_space import is_number


def head_width(d_model: int, expand: float, num_heads: int, *, name: str, instead: str) -> int:
    """Width of one of `num_heads` heads that together are `expand` times as wide as the model.

    Args:
        name, instead: fields of the config that hold `expand` and the width itself, for the message.

    Raises:
        ValueError: the heads do not divide that width.
    """
    width = expand * d_model / num_heads if is_number(expand) and expand < math.inf else 0.0
    if not (width >= 1 and abs(width - round(width)) < 1e-6):
        raise ValueError(
            f"{name} * d_model must be a positive multiple of the {num_heads} heads, got {expand!r} * "
            f"{d_model}. Or set {instead}."
        )
    return round(width)
