"""The state of the fast-weight memory, and the settings that one call fixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from .nets import NETS

# Dimensions: N sequences, H heads, P numbers in all matrices of one head's net


def unpack_fast_weights(flat: Tensor, shapes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """The matrices in a tensor of a `FastWeightState`.

    Args:
        flat: (..., P), weights, momentum or pending steps.
        shapes: rows and columns of each matrix, as `fast_weight_shapes` gives them.

    Returns:
        Views (..., rows, columns), in the order of the net.

    Raises:
        ValueError: P is not the number of entries of these matrices.
    """
    sizes = [rows * columns for rows, columns in shapes]
    if flat.shape[-1] != sum(sizes):
        raise ValueError(
            f"flat must have {sum(sizes)} columns for matrices of {shapes}, got {flat.shape[-1]}."
        )
    pieces = flat.split(sizes, dim=-1)
    return [piece.unflatten(-1, shape) for piece, shape in zip(pieces, shapes, strict=True)]


class FastWeightState(NamedTuple):
    """Everything the memory keeps of the tokens it has read; its size does not depend on their number.

    The matrices of a net lie flattened one after the other, in the order of `weights` of
    `fast_weight_scan`; `unpack_fast_weights` takes them apart. float32, or float64 for float64 input.

    Attributes:
        weights: (N, H, P), the net as the last complete chunk left it.
        pending: (N, H, P), steps of the open chunk, not yet applied.
        num_tokens: (N,) int64 on the CPU, tokens read so far: where the open chunk began.
        momentum: (N, H, P), or None without momentum.
        momentum_sum: (N, H), momentum of the tokens of the open chunk, or None without momentum.
    """

    weights: Tensor
    pending: Tensor
    num_tokens: Tensor
    momentum: Tensor | None = None
    momentum_sum: Tensor | None = None


class FastWeightOptions(TypedDict, total=False):
    """What stays the same over all calls of a sequence; see `fast_weight_scan`."""

    net: str
    residual: bool
    loss: str
    optimizer: str
    fast_norm: str
    chunk_size: int
    max_grad_norm: float | None
    ns_steps: int
    ns_dtype: torch.dtype | None
    detach_norm: bool
    bptt_chunks: int | None
    recompute: bool
    backend: str


@dataclass(frozen=True)
class Rule:
    """What a fast-weight memory is and how it learns; the arguments of `fast_weight_scan`, checked.

    Attributes:
        shapes: rows and columns of each matrix of the net.
    """

    shapes: tuple[tuple[int, int], ...]
    net: str
    residual: bool
    loss: str
    optimizer: str
    fast_norm: str
    chunk_size: int
    max_grad_norm: float | None
    ns_steps: int
    ns_dtype: torch.dtype | None
    bptt_chunks: int | None

    def unpack(self, flat: Tensor) -> list[Tensor]:
        """Views (..., rows, columns) of the matrices in flat (..., P)."""
        return unpack_fast_weights(flat, self.shapes)

    def blocks(self, flat: Tensor) -> list[Tensor]:
        """Views (..., G, rows, columns) of the blocks of matrices in flat (..., P), as in nets.py."""
        matrices, found = iter(self.shapes), []
        for count in NETS[self.net].blocks:
            shapes = [next(matrices) for _ in range(count)]
            found.append((count, *shapes[0]))
        pieces = flat.split([count * rows * columns for count, rows, columns in found], dim=-1)
        return [piece.unflatten(-1, shape) for piece, shape in zip(pieces, found, strict=True)]

    def block_lengths(self, lengths: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Row lengths (H, G, rows) of blocks from those (H, rows) of matrices."""
        each = iter(lengths)
        return tuple(
            torch.stack([next(each) for _ in range(count)], dim=-2) for count in NETS[self.net].blocks
        )


def pack(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices (..., rows, columns) one after the other: (..., P)."""
    return torch.cat([matrix.flatten(-2) for matrix in matrices], dim=-1)


def pack_blocks(blocks: Sequence[Tensor]) -> Tensor:
    """Blocks (..., G, rows, columns) one after the other: (..., P)."""
    return torch.cat([block.flatten(-3) for block in blocks], dim=-1)
