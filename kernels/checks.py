"""Checks of arguments that several operations share."""

from torch import Tensor


def check_rank(name: str, x: Tensor, shape: str) -> None:
    """Raise unless `x` has as many dimensions as the letters in `shape`, such as "(B, T, H, D)"."""
    rank = shape.rstrip(",)").count(",") + 1
    if x.dim() != rank:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}.")


def check_dtypes(**tensors: Tensor) -> None:
    """Raise unless all tensors share one floating-point dtype."""
    names = list(tensors)
    first = tensors[names[0]]
    if not first.is_floating_point():
        raise ValueError(f"{names[0]} must be a floating-point tensor, got {first.dtype}.")
    for name in names[1:]:
        if tensors[name].dtype != first.dtype:
            raise ValueError(
                f"{', '.join(names)} must share one dtype, got {names[0]} {first.dtype} and {name} "
                f"{tensors[name].dtype}."
            )
