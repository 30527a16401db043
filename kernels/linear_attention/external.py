"""Linear attention by flash-linear-attention, on CUDA."""

import torch
from torch import Tensor

from .types import LinearState

# Dimensions: B batch, T tokens, N sequences, H heads, K key width, V value width

_MAX_KEY_WIDTH = 256


def can_run_fla(q: Tensor, k: Tensor, v: Tensor, normalize: bool) -> bool:
    """Whether flash-linear-attention covers these tensors."""
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and not normalize
        and q.shape[1] > 0
        and q.shape[2] == k.shape[2] == v.shape[2]
        and q.shape[3] <= _MAX_KEY_WIDTH
    )


def linear_attention_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *,
    scale: float,
    initial_state: LinearState | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, LinearState | None]:
    """Linear attention without normaliser. Untested until a GPU record agrees with the reference."""
    from fla.ops.simple_gla import chunk_simple_gla

    output, memory = chunk_simple_gla(
        q=q,
        k=k,
        v=v,
        g=None if g is None else g.float(),
        scale=scale,
        initial_state=None if initial_state is None else initial_state.memory,
        output_final_state=return_state,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(q.device),
    )
    return output, LinearState(memory) if return_state else None
