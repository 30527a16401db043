"""Linear attention by flash-linear-attention, on CUDA."""

import importlib
from typing import Any

import torch
from torch import Tensor

from .types import LinearState

# Dimensions: B batch, T tokens, N sequences, H heads, HV value heads, K key width, V value width

_MAX_KEY_WIDTH = 256


def can_run_fla(q: Tensor, k: Tensor, v: Tensor, normalize: bool) -> bool:
    """Whether flash-linear-attention covers these tensors."""
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and not normalize
        and q.shape[1] > 0
        and q.shape[2] == k.shape[2]
        and q.shape[3] <= _MAX_KEY_WIDTH
    )


def linear_attention_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    *,
    rule: str,
    scale: float,
    initial_state: LinearState | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, LinearState | None]:
    """Linear attention without normaliser. Untested until a GPU record agrees with the reference."""
    # every value head with queries, keys and decays of its own: not all of these kernels group heads
    q, k = (_repeat(x, v.shape[2]) for x in (q, k))
    g = None if g is None else _repeat(g, v.shape[2])
    per_channel = g is not None and g.dim() == 4
    given: dict[str, Any] = {} if g is None else {"g": g.float()}
    if rule == "delta":
        module, name = ("kda", "chunk_kda") if per_channel else ("gated_delta_rule", "chunk_gated_delta_rule")
        if g is None:
            module, name = "delta_rule", "chunk_delta_rule"
        given["beta"] = v.new_ones(v.shape[:3]) if beta is None else beta
    else:
        module, name = ("gla", "chunk_gla") if per_channel else ("simple_gla", "chunk_simple_gla")
        v = v if beta is None else (v * beta[..., None]).to(q.dtype)
    output, memory = getattr(importlib.import_module(f"fla.ops.{module}"), name)(
        q=q,
        k=k,
        v=v,
        **given,
        scale=scale,
        initial_state=None if initial_state is None else initial_state.memory,
        output_final_state=return_state,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(q.device),
    )
    return output, LinearState(memory) if return_state else None


def _repeat(x: Tensor, num_heads: int) -> Tensor:
    """Repeat heads (axis 2) so that there are `num_heads`."""
    return x if x.shape[2] == num_heads else x.repeat_interleave(num_heads // x.shape[2], 2)
