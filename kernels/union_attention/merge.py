"""From the softmax of each of several memories to the softmax over their union."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .types import UnionOutput

# Dimensions: R memories, ... any (tokens and heads), E value width


def merge_streams(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[UnionOutput, Tensor]:
    """One softmax over the union of memories that were read one by one.

        o = sum_r w_r o_r,   w_r = exp(L_r - L),   L = log sum_r exp(L_r)

    Args:
        parts: (output (..., E), lse (...)) of each memory; lse is -inf, and the output zero, where a query
            sees nothing of it. At least one.

    Returns:
        output and lse of the union, and the weights w (R, ...) of the memories, which sum to 1 where a query
        sees anything. Differentiable with respect to outputs and lse.
    """
    lses = torch.stack([lse for _, lse in parts])  # (R, ...)
    is_empty = (lses == -torch.inf).all(0)
    weights = lses.masked_fill(is_empty, 0).softmax(0)
    output = sum(
        weight[..., None] * part.to(weight.dtype)
        for weight, (part, _) in zip(weights.unbind(0), parts, strict=True)
    )
    assert isinstance(output, Tensor)
    lse = lses.masked_fill(is_empty, 0).logsumexp(0).masked_fill(is_empty, -torch.inf)
    return UnionOutput(output.to(parts[0][0].dtype), lse), weights.masked_fill(is_empty, 0)
