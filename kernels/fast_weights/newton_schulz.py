"""Newton-Schulz iteration: the orthogonal factor of a matrix by products alone (Muon)."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Dimensions: ... batch, A rows, B columns

# (a, b, c) of each step, as in LaCT (arXiv 2505.23884, its code). Singular values above a hundredth of the
# largest end between 0.97 and 1.15.
LACT_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def newton_schulz(
    matrices: Tensor,
    steps: int = 5,
    *,
    coefficients: Sequence[tuple[float, float, float]] = LACT_COEFFICIENTS,
    eps: float = 1e-7,
    floor: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Brings the singular values of matrices near 1 and leaves their directions.

        X = G / (|G|_F + eps),   then `steps` times with A = X X^T:   X <- a X + (b A + c A^2) X

    Zero matrices stay zero. Differentiable.

    Args:
        matrices: (..., A, B).
        steps: how often.
        coefficients: (a, b, c) of each step, at least `steps`, or one triple for all steps.
        eps: added to the Frobenius norm.
        floor: what the Frobenius norm is raised to where it is smaller; with eps 0 as in the code of Titans.
        dtype: in which the products are made, default that of `matrices`. The published code uses bfloat16,
            which differs by several percent.

    Returns:
        (..., A, B) in the dtype of `matrices`.

    Raises:
        ValueError: fewer than two dimensions, negative steps, or too few coefficients.
    """
    if matrices.dim() < 2:
        raise ValueError(f"matrices must have shape (..., A, B), got {tuple(matrices.shape)}.")
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}.")
    if len(coefficients) == 1:
        coefficients = tuple(coefficients) * steps
    if steps > len(coefficients):
        raise ValueError(
            f"steps must be at most the {len(coefficients)} coefficients, got {steps}. "
            "Give one triple per step, or a single one for all."
        )
    x = matrices if dtype is None else matrices.to(dtype)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / ((norm.clamp(min=floor) if floor else norm) + eps)
    for a, b, c in coefficients[:steps]:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)
