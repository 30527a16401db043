"""Losses of a linear head, from hidden states, without the logits of all positions."""

import torch
from torch import Tensor

from ..backend import choose_backend
from ..checks import check_dtypes, check_rank
from .chunked import default_chunk_size, linear_cross_entropy_torch, linear_divergence_torch
from .reference import linear_cross_entropy_reference, linear_divergence_reference

__all__ = ["default_chunk_size", "linear_cross_entropy", "linear_divergence"]

# Dimensions: N positions, V vocabulary, M model width


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean cross-entropy of softmax(hidden weight^T) over the labelled positions.

    The gradients are made with the loss, some positions at a time, so logits of (N, V) never exist and a call
    under `torch.no_grad` makes none. Sums are float32 (float64 for float64 input); inside autocast the
    products run in its dtype. The result can be differentiated once.

    Args:
        hidden: (N, M); N = 0 is allowed.
        weight: (V, M), the head; its gradient is summed in float32.
        targets: (N,) integers, the wanted entry of each position.
        ignore_index: target of the positions without a loss.
        chunk_size: positions worked on at once; changes speed and memory, not the result. Default: as many as
            make logits of 48 MiB in float32.
        backend: "auto", "reference" or "torch".

    Returns:
        A scalar, float32 (float64 for float64 input). Without any labelled position it is 0 and all gradients
        are 0.

    Raises:
        ValueError: sizes or dtypes that do not agree, or a target outside the vocabulary.
    """
    _check_head("hidden", hidden, "weight", weight)
    check_rank("targets", targets, "(N,)")
    if targets.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"targets must have one entry per position, got {targets.shape[0]} for {hidden.shape[0]} "
            "positions of hidden."
        )
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integers, got {targets.dtype}.")
    if not torch.compiler.is_compiling() and targets.device.type == "cpu":
        _check_targets(targets, weight.shape[0], ignore_index)
    chunk_size = _chunk_size(chunk_size, weight)
    if choose_backend("linear_cross_entropy", backend, ("torch",)) == "reference":
        return linear_cross_entropy_reference(hidden, weight, targets, ignore_index)
    return linear_cross_entropy_torch(hidden, weight, targets, ignore_index, chunk_size)


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    reverse: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean over positions of KL(teacher || student), temperature 1, from hidden states and heads.

    Works as `linear_cross_entropy` does. The teacher gets no gradient.

    Args:
        hidden: (N, M), of the student; N = 0 is allowed and gives 0.
        weight: (V, M), the student's head.
        teacher_hidden: (N, M'), of the teacher.
        teacher_weight: (V', M'). Vocabularies may differ by padding at the end; the surplus is ignored.
        reverse: KL(student || teacher) instead.
        chunk_size: positions worked on at once; changes speed and memory, not the result.
        backend: "auto", "reference" or "torch".

    Returns:
        A scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: sizes or dtypes that do not agree.
    """
    _check_head("hidden", hidden, "weight", weight)
    _check_head("teacher_hidden", teacher_hidden, "teacher_weight", teacher_weight)
    if teacher_hidden.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"student and teacher must have read the same positions, got {hidden.shape[0]} and "
            f"{teacher_hidden.shape[0]}."
        )
    chunk_size = _chunk_size(chunk_size, weight)
    if choose_backend("linear_divergence", backend, ("torch",)) == "reference":
        return linear_divergence_reference(hidden, weight, teacher_hidden, teacher_weight, reverse)
    return linear_divergence_torch(hidden, weight, teacher_hidden, teacher_weight, reverse, chunk_size)


def _check_head(hidden_name: str, hidden: Tensor, weight_name: str, weight: Tensor) -> None:
    check_rank(hidden_name, hidden, "(N, M)")
    check_rank(weight_name, weight, "(V, M)")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{hidden_name} and {weight_name} must have one width, got {hidden.shape[1]} and "
            f"{weight.shape[1]}."
        )
    if weight.shape[0] < 1:
        raise ValueError(f"{weight_name} must have at least one row, got {tuple(weight.shape)}.")
    if hidden.device.type == "meta" or not torch.is_autocast_enabled(hidden.device.type):
        check_dtypes(**{hidden_name: hidden, weight_name: weight})


def _check_targets(targets: Tensor, vocab_size: int, ignore_index: int) -> None:
    is_wrong = (targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))
    if is_wrong.any():
        raise ValueError(
            f"targets must be 0 to {vocab_size - 1}, or ignore_index={ignore_index} for positions without a "
            f"loss, got {int(targets[is_wrong][0])}."
        )


def _chunk_size(chunk_size: int | None, weight: Tensor) -> int:
    if chunk_size is None:
        return default_chunk_size(weight.shape[0])
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    return chunk_size
