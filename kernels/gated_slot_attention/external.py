"""Gated slot attention by flash-linear-attention, on CUDA."""

import torch
from torch import Tensor

from .types import SlotState

# Dimensions: N sequences, H heads, K key width, V value width, M slots


def can_run_fla(q: Tensor, k: Tensor) -> bool:
    """Whether flash-linear-attention covers these tensors."""
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[1] > 0
        and q.shape[2] == k.shape[2]
    )


def gated_slot_attention_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    g: Tensor,
    *,
    scale: float,
    initial_state: SlotState | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, SlotState | None]:
    """The whole operation. Untested until a GPU record agrees with the reference."""
    from fla.ops.gsa import chunk_gsa

    output, state = chunk_gsa(
        q=q,
        k=k,
        v=v,
        s=slots.to(q.dtype),
        g=g.float(),
        scale=scale,
        initial_state=None if initial_state is None else tuple(initial_state),
        output_final_state=return_state,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(q.device),
    )
    return output, SlotState(*state) if return_state else None
