"""Root-mean-square normalisation, computed in float32 (float64 for float64 input)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...kernels import gated_rms_norm
from ..contract.mixer import tag_parameter


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019).

    Args:
        width: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = tag_parameter(nn.Parameter(torch.ones(width)), weight_decay=False)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GatedRMSNorm(nn.Module):
    """RMS normalisation of groups of channels beside a gate, as in Mamba (arXiv 2405.21060).

        gate first   norm(y silu(z)) * weight        norm first   norm(y) * weight * silu(z)

    Args:
        width: size of the last dimension.
        num_groups: groups of neighbouring channels, each normalised on its own.
        eps: added to the mean square.
        norm_before_gate: whether the gate acts on what is normalised already.
    """

    def __init__(
        self, width: int, num_groups: int = 1, eps: float = 1e-5, *, norm_before_gate: bool = False
    ) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.eps = eps
        self.norm_before_gate = norm_before_gate
        self.weight = tag_parameter(nn.Parameter(torch.ones(width)), weight_decay=False)

    def reset_parameters(self) -> None:
        """Ones."""
        nn.init.ones_(self.weight)

    def forward(self, y: Tensor, z: Tensor, skip: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Normalises and gates y (B, T, D) by z (B, T, D); the result has the dtype of z.

        Args:
            skip: u (B, T, D) and w (D,), for y + w u in place of y.
        """
        return gated_rms_norm(
            y,
            z,
            self.weight,
            num_groups=self.num_groups,
            norm_before_gate=self.norm_before_gate,
            eps=self.eps,
            skip=skip,
        )

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        order = "norm, gate" if self.norm_before_gate else "gate, norm"
        return f"{self.weight.shape[0]}, groups={self.num_groups}, eps={self.eps}, order={order}"
