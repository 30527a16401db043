"""Rotary position embedding (Su et al., 2021) in the half-split convention, with the public scaling rules.

Nothing is stored: frequencies follow from the configuration and the tables from the positions of the call, so
a module materialised from the meta device needs no repair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contract import SequenceContext, suggest
from .state_space import is_number

_SCALING_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


@dataclass(frozen=True)
class Rotary:
    """Rotates queries and keys by their positions.

    Attributes:
        head_dim: width of a head, even.
        theta: base of the frequencies.
        scaling: None or `{"rope_type": "linear" | "llama3" | "yarn", ...}` with the keys of the Hugging Face
            configs.

    Raises:
        ValueError: odd width, unknown rule, or unknown and missing keys of a rule.
    """

    head_dim: int
    theta: float = 10000.0
    scaling: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise ValueError(
                f"rotary positions need heads of an even width, got {self.head_dim}. Choose an even one, or "
                "go without rotary positions (use_rope: false, or rope_theta: null)."
            )
        if not is_number(self.theta) or not 0 < self.theta < math.inf:
            raise ValueError(f"rope_theta must be a number above 0, got {self.theta!r}.")
        if self.scaling is not None:
            kind = self.kind
            if kind not in _SCALING_KEYS:
                raise ValueError(f"rope_type {kind!r} is not supported. {suggest(kind, _SCALING_KEYS)}")
            given = set(self.scaling) - {"rope_type", "type", "rope_theta"}
            unknown = given - _SCALING_KEYS[kind]
            if unknown:
                raise ValueError(
                    f"rope scaling {kind!r} has no key {sorted(unknown)[0]!r}. "
                    f"{suggest(sorted(unknown)[0], _SCALING_KEYS[kind])}"
                )
            needed = {
                "linear": {"factor"},
                "llama3": _SCALING_KEYS["llama3"],
                "yarn": {"factor", "original_max_position_embeddings"},
            }
            missing = needed.get(kind, set()) - given
            if missing:
                raise ValueError(f"rope scaling {kind!r} needs the keys {sorted(missing)}.")

    @property
    def kind(self) -> str:
        return (
            "default"
            if self.scaling is None
            else str(self.scaling.get("rope_type", self.scaling.get("type", "default")))
        )

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines (..., 1, head_dim) in `dtype` (float32 or float64) for integer positions
        (...).
        """
        frequencies, amplitude = self._frequencies(positions.device, dtype)
        angles = positions.to(dtype)[..., None] * frequencies
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(-2)
        return angles.cos() * amplitude, angles.sin() * amplitude

    def frequencies(self, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
        """(head_dim / 2,) angle per position of each pair of channels."""
        return self._frequencies(device, dtype)[0]

    def rotate(self, x: Tensor, ctx: SequenceContext) -> Tensor:
        """Rotates x (B, T, H, head_dim) by the positions of the call; computed in float32, returned in the
        dtype of x.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        key = (self.head_dim, self.theta, repr(self.scaling), dtype)
        if key not in ctx.tables:
            ctx.tables[key] = self.tables(ctx.positions, dtype)
        return _turned(x, *ctx.tables[key])

    def rotate_by(self, x: Tensor, distance: int) -> Tensor:
        """Rotates all of x (B, T, H, head_dim) as one and the same position does."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return _turned(x, *self.tables(torch.tensor([distance], device=x.device), dtype))

    def _frequencies(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, float]:
        d = self.head_dim
        # exponents in float32 as the public implementations have them; float64 only where the caller works in
        # it
        exponent = torch.arange(0, d, 2, dtype=torch.int64, device=device).to(dtype) / d
        frequencies = 1.0 / (self.theta**exponent)
        scaling, kind = self.scaling, self.kind
        if scaling is None or kind == "default":
            return frequencies, 1.0
        factor = float(scaling["factor"])
        if kind == "linear":
            return frequencies / factor, 1.0
        original = scaling["original_max_position_embeddings"]
        if kind == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            wavelength = 2 * math.pi / frequencies
            smooth = (original / wavelength - low) / (high - low)
            blended = (1 - smooth) * frequencies / factor + smooth * frequencies
            scaled = torch.where(wavelength > original / low, frequencies / factor, frequencies)
            medium = (wavelength <= original / low) & (wavelength >= original / high)
            return torch.where(medium, blended, scaled), 1.0

        # yarn (Peng et al., 2023)
        def dimension(rotations: float) -> float:
            return d * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, d - 1)
        ramp = (torch.arange(d // 2, dtype=dtype, device=device) - low) / (max(high - low, 0.001))
        keep = 1 - ramp.clamp(0, 1)
        amplitude = scaling.get("attention_factor")
        if amplitude is None:
            mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
            amplitude = (
                _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all)
                if mscale and mscale_all
                else _yarn_scale(factor, 1.0)
            )
        return frequencies / factor * (1 - keep) + frequencies * keep, float(amplitude)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
