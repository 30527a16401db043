"""Losses of the alignment: how far a new mixer is from the attention it replaces, given the same input.

Each is taken in float32 (float64 for float64 input) and averaged over tokens. With `normalize` it is divided
by the same measure of the teacher's output, so that a loud layer does not drown the others; the published
losses are those without.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Dimensions: B rows, T tokens, H heads, D head width, M model width

_LEAST = 1e-12  # of a denominator


def attention_transfer_loss(student: Tensor, teacher: Tensor, *, normalize: bool = False) -> Tensor:
    """Mean squared error of the outputs of the heads, before the output projection (LoLCATs, arXiv
    2410.10254, section 3.1; released with a factor of 1000).

    Args:
        student, teacher: (..., H, D).
        normalize: divide by the mean square of the teacher.
    """
    student, teacher = _wide(student), _wide(teacher)
    error = (student - teacher).square().mean()
    return error / teacher.square().mean().clamp(min=_LEAST) if normalize else error


def hidden_alignment_loss(
    student: Tensor, teacher: Tensor, *, normalize: bool = False, scaled: bool = True
) -> Tensor:
    """Mean length of the difference of the mixer's outputs, after the output projection.

    Args:
        student, teacher: (..., M).
        normalize: divide by the mean length of the teacher's outputs.
        scaled: divide the length by sqrt(M) (RADLADS, arXiv 2505.03005); without it the loss is that of
            MOHAWK's second stage (arXiv 2408.10189).
    """
    student, teacher = _wide(student), _wide(teacher)
    error = torch.linalg.vector_norm(student - teacher, dim=-1).mean()
    if normalize:
        return error / torch.linalg.vector_norm(teacher, dim=-1).mean().clamp(min=_LEAST)
    return error / teacher.shape[-1] ** 0.5 if scaled else error


def mixing_matrix_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean Frobenius distance between two sequence-mixing matrices (MOHAWK, arXiv 2408.10189, section 3.1).

    Args:
        student, teacher: (B, H, T, T); row t holds the weights with which token t reads. For softmax
            attention these are the attention weights. Memory grows with T squared: use short windows.
    """
    return torch.linalg.matrix_norm(_wide(student) - _wide(teacher)).mean()


def attention_row_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean cross-entropy of attention rows, -sum_j teacher_tj log student_tj (LoLCATs at 405B parameters).

    Args:
        student, teacher: (B, H, T, T) weights that sum to 1 over the last axis; 0 where nothing is read.
    """
    student, teacher = _wide(student), _wide(teacher)
    logs = torch.where(teacher > 0, student.clamp(min=_LEAST).log(), 0.0)
    return -(teacher * logs).sum(-1).mean()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
