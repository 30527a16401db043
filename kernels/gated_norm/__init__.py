"""Root-mean-square normalisation of groups of channels beside a gate."""

from torch import Tensor
from torch.compiler import is_compiling

from ..autograd import without_autocast
from ..backend import choose_backend
from ..checks import check_rank
from .chunked import gated_rms_norm_torch
from .reference import ACTIVATIONS, NormOptions, gated_rms_norm_reference

__all__ = ["ACTIVATIONS", "gated_rms_norm"]

# Dimensions: B batch, T tokens, D channels


def gated_rms_norm(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    num_groups: int = 1,
    activation: str = "silu",
    norm_before_gate: bool = False,
    eps: float = 1e-5,
    skip: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """RMS normalisation of groups of channels beside a gate, as in Mamba-2 (arXiv 2405.21060).

        gate first   norm(y act(z)) weight        norm first   norm(y) weight act(z)
        norm(h) = h / sqrt(mean(h^2) + eps)       over the channels of a group

    Computed in float32, in float64 for float64 gates; the backward pass keeps nothing but the inputs.

    Args:
        y: (B, T, D).
        z: (B, T, D), the gate before its activation.
        weight: (D,).
        num_groups: groups of neighbouring channels, each normalised on its own; a divisor of D.
        activation: "silu" or "sigmoid".
        norm_before_gate: whether the gate acts on what is normalised already.
        eps: added to the mean square.
        skip: u (B, T, D) and f (D,), for y + f u in place of y.
        backend: "auto", "reference" or "torch".

    Returns:
        (B, T, D) in the dtype of z.

    Raises:
        ValueError: sizes that do not agree, or an unknown activation.
    """
    check_rank("y", y, "(B, T, D)")
    channels = y.shape[2]
    if z.shape != y.shape:
        raise ValueError(f"z must have the shape of y, {tuple(y.shape)}, got {tuple(z.shape)}.")
    if weight.shape != (channels,):
        raise ValueError(f"weight must have shape {(channels,)}, got {tuple(weight.shape)}.")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels, got {num_groups}.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
    if skip is not None and (skip[0].shape != y.shape or skip[1].shape != (channels,)):
        raise ValueError(
            f"skip must be tensors {tuple(y.shape)} and {(channels,)}, got {tuple(skip[0].shape)} and "
            f"{tuple(skip[1].shape)}."
        )
    options = NormOptions(num_groups, activation, norm_before_gate, eps)
    u, factor = skip or (None, None)
    chosen = choose_backend("gated_rms_norm", backend, ("torch",))
    with without_autocast(y.device):
        # what a compiler or a GPU fuses by itself needs no pieces
        if chosen == "reference" or is_compiling() or y.device.type != "cpu":
            return gated_rms_norm_reference(y, z, weight, u, factor, options)
        return gated_rms_norm_torch(y, z, weight, u, factor, options)
