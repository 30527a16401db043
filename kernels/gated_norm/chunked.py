"""Gated RMS normalisation some tokens at a time, in the processor's cache, with its gradient in closed form.

With h what is normalised, r = 1 / sqrt(mean(h^2) + eps), n = r h and c the mean of dn n over the group:

    dh = r (dn - c n)

Only the inputs are kept; a piece is computed again where its gradient is made, in place wherever it can be.
"""

from typing import Any

import torch
from torch import Tensor

from ..autograd import backward_without_autocast
from ..pieces import piece_size
from .reference import ACTIVATIONS, NormOptions

# Dimensions: B batch, T tokens, D channels, C tokens of a piece, G groups, E channels of a group


def gated_rms_norm_torch(
    y: Tensor, z: Tensor, weight: Tensor, u: Tensor | None, factor: Tensor | None, options: NormOptions
) -> Tensor:
    """`memzoo.kernels.gated_rms_norm` on checked arguments."""
    result: Tensor = _GatedNorm.apply(y, z, weight, u, factor, options)
    return result


class _Piece:
    """What both passes need of some tokens, in the accumulation dtype."""

    def __init__(
        self,
        y: Tensor,
        z: Tensor,
        u: Tensor | None,
        factor: Tensor | None,
        wide: torch.dtype,
        options: NormOptions,
    ) -> None:
        self.z = z.to(wide)
        self.gate = ACTIVATIONS[options.activation](self.z)  # (B, C, D)
        self.u = None if u is None else u.to(wide)
        self.y = y.to(wide)
        if self.u is not None and factor is not None:
            self.y = torch.addcmul(self.y, self.u, factor)
        hidden = self.y if options.norm_before_gate else self.y * self.gate
        groups = hidden.unflatten(-1, (options.num_groups, -1))  # (B, C, G, E)
        mean_square = torch.linalg.vector_norm(groups, dim=-1, keepdim=True).square_() / groups.shape[-1]
        self.rate = mean_square.add_(options.eps).rsqrt_()  # (B, C, G, 1)
        self.normed = groups * self.rate


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        z: Tensor,
        weight: Tensor,
        u: Tensor | None,
        factor: Tensor | None,
        options: NormOptions,
    ) -> Tensor:
        ctx.save_for_backward(y, z, weight, u, factor)
        ctx.options = options
        wide = torch.float64 if z.dtype == torch.float64 else torch.float32
        wide_weight, wide_factor = weight.to(wide), None if factor is None else factor.to(wide)
        out = z.new_empty(z.shape)
        for t in _pieces(z):
            piece = _Piece(y[:, t], z[:, t], None if u is None else u[:, t], wide_factor, wide, options)
            result = piece.normed.flatten(-2).mul_(wide_weight)
            out[:, t] = result.mul_(piece.gate) if options.norm_before_gate else result
        return out

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight, u, factor = ctx.saved_tensors
        options: NormOptions = ctx.options
        wide = torch.float64 if z.dtype == torch.float64 else torch.float32
        wide_weight, wide_factor = weight.to(wide), None if factor is None else factor.to(wide)
        dy, dz = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (y, z))
        du = None if u is None else torch.empty(u.shape, dtype=u.dtype, device=u.device)
        d_weight = torch.zeros_like(wide_weight)
        d_factor = torch.zeros_like(wide_weight)
        for t in _pieces(z):
            piece = _Piece(y[:, t], z[:, t], None if u is None else u[:, t], wide_factor, wide, options)
            normed = piece.normed.flatten(-2)  # (B, C, D)
            if options.norm_before_gate:
                d_scaled = grad[:, t] * piece.gate
                d_gate = (grad[:, t] * normed).mul_(wide_weight)
            else:
                d_scaled = grad[:, t].to(wide)
            d_weight += (d_scaled * normed).sum((0, 1))
            d_normed = (d_scaled * wide_weight).view_as(piece.normed)
            share = (d_normed * piece.normed).mean(-1, keepdim=True)  # (B, C, G, 1)
            d_hidden = d_normed.addcmul_(piece.normed, share, value=-1).mul_(piece.rate).flatten(-2)
            if not options.norm_before_gate:
                d_gate = d_hidden * piece.y
                d_hidden.mul_(piece.gate)
            dy[:, t] = d_hidden
            if options.activation == "silu":
                dz[:, t] = torch.ops.aten.silu_backward(d_gate, piece.z)
            else:
                dz[:, t] = torch.ops.aten.sigmoid_backward(d_gate, piece.gate)
            if du is not None and piece.u is not None and wide_factor is not None:
                d_factor += (d_hidden * piece.u).sum((0, 1))
                du[:, t] = d_hidden.mul_(wide_factor)
        return (
            dy,
            dz,
            d_weight.to(weight.dtype),
            du,
            None if factor is None else d_factor.to(factor.dtype),
            None,
        )


def _pieces(like: Tensor) -> list[slice]:
    size = piece_size(like)
    return [slice(t, t + size) for t in range(0, like.shape[1], size)]
