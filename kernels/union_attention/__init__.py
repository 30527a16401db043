"""One softmax over several memories: window, fading stream and stored tokens of B'MOJO."""

from collections.abc import Sequence

import torch

from ..autograd import without_autocast
from ..backend import TRITON_INTERPRETED, choose_backend
from ..checks import check_dtypes, check_rank
from .chunked import union_torch
from .lagged import lagged_attention
from .merge import merge_streams
from .reference import union_reference
from .types import SlotStream, UnionOutput

__all__ = ["SlotStream", "UnionOutput", "lagged_attention", "merge_streams", "union_attention"]

# Dimensions: K tiles, C queries of a tile, J slots of a tile, H query heads, G key/value heads, D key width,
# E value width


def union_attention(
    streams: Sequence[SlotStream], *, scale: float | None = None, backend: str = "auto"
) -> UnionOutput:
    """Attention of the queries of each tile over the slots of several memories, under one softmax.

        o = sum_r sum_j exp(s q_r . k_rj) v_rj / sum_r sum_j exp(s q_r . k_rj)    (B'MOJO, arXiv 2407.06324)

    A tile is a set of queries that share their slots: a chunk of a sequence, or one token. Differentiable
    with respect to queries, keys, values, and through the log-sum-exp.

    Args:
        streams: the memories, at least one; see `SlotStream`. Tiles, queries and heads are those of all.
        scale: factor on the logits, default D ** -0.5.
        backend: "auto", "reference", "torch" or "triton" (on CUDA, or in Triton's interpreter; no float64).

    Returns:
        output (K, C, H, E), and lse (K, C, H). A query that sees nothing reads zeros, its lse is -inf.

    Raises:
        ValueError: no memory, or sizes and dtypes that do not agree.
    """
    if not streams:
        raise ValueError("union_attention needs at least one stream, got none.")
    for stream in streams:
        _check(stream, streams[0])
    scale = streams[0].q.shape[-1] ** -0.5 if scale is None else scale
    q = streams[0].q
    # its interpreter only when asked for
    eligible = ("triton", "torch") if q.is_cuda else ("torch", "triton")
    can_run_triton = (
        (q.is_cuda or TRITON_INTERPRETED)
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and q.numel() > 0
        and not torch.compiler.is_compiling()
    )
    chosen = choose_backend("union_attention", backend, eligible if can_run_triton else ("torch",))
    with without_autocast(q.device):
        if chosen == "triton":
            from .triton_kernels import union_triton

            return union_triton(streams, scale)
        return (union_reference if chosen == "reference" else union_torch)(streams, scale)


def _check(stream: SlotStream, first: SlotStream) -> None:
    check_rank("q", stream.q, "(K, C, H, D)")
    check_dtypes(q=stream.q, k=stream.k, v=stream.v)
    if stream.q.shape != first.q.shape or stream.q.dtype != first.q.dtype:
        raise ValueError(
            "all streams need queries of one shape and dtype, got "
            f"{tuple(first.q.shape)} {first.q.dtype} and {tuple(stream.q.shape)} {stream.q.dtype}."
        )
    shape = "(K, J, G, D)" if stream.place is None else "(P, G, D)"
    check_rank("k", stream.k, shape)
    check_rank("v", stream.v, shape)
    num_tiles, _, num_heads, width = stream.q.shape
    if stream.k.shape[:-1] != stream.v.shape[:-1] or stream.k.shape[-1] != width:
        raise ValueError(
            f"k and v must agree in all but their width, and k and q in that, got q {tuple(stream.q.shape)}, "
            f"k {tuple(stream.k.shape)} and v {tuple(stream.v.shape)}."
        )
    if stream.v.shape[-2:] != first.v.shape[-2:] or num_heads % stream.v.shape[-2]:
        raise ValueError(
            f"all streams need the same key/value heads and value width, and the {num_heads} query heads a "
            f"multiple of those heads, got {tuple(first.v.shape[-2:])} and {tuple(stream.v.shape[-2:])}."
        )
    expected = (num_tiles, stream.num_slots)
    if stream.place is None and stream.k.shape[0] != num_tiles:
        raise ValueError(
            f"k needs the {num_tiles} tiles of q, got {stream.k.shape[0]}. Give places for a pool."
        )
    for name in ("place", "first", "last"):
        value = getattr(stream, name)
        if value is not None and tuple(value.shape) != expected:
            raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}.")
