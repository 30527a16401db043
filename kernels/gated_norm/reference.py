"""Gated RMS normalisation by the definition."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Dimensions: B batch, T tokens, D channels

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


class NormOptions(NamedTuple):
    """The plain arguments of `memzoo.kernels.gated_rms_norm`."""

    num_groups: int
    activation: str
    norm_before_gate: bool
    eps: float


def gated_rms_norm_reference(
    y: Tensor, z: Tensor, weight: Tensor, u: Tensor | None, factor: Tensor | None, options: NormOptions
) -> Tensor:
    """The definition of `memzoo.kernels.gated_rms_norm` on checked arguments."""
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    y, gate = y.to(wide), ACTIVATIONS[options.activation](z.to(wide))
    if u is not None and factor is not None:
        y = y + u.to(wide) * factor.to(wide)
    if not options.norm_before_gate:
        y = y * gate
    groups = y.unflatten(-1, (options.num_groups, -1))
    groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + options.eps)
    y = groups.flatten(-2) * weight.to(wide)
    return (y * gate if options.norm_before_gate else y).to(z.dtype)
