"""Losses of a linear head some positions at a time, made together with their gradients.

For a chunk of positions with logits z = h W^T, probabilities q and the wanted distribution p:

    d loss / d z = q - p        d loss / d h = (q - p) W        d loss / d W += (q - p)^T h

so nothing of a chunk has to be kept for the backward pass, which only multiplies by the incoming gradient.
Kept are the gradients, (N, M) and (V, M): logits of one chunk exist at a time, (N, V) never.
The divergence the other way round, KL(q || p), has q (log q - log p - KL) in the place of q - p.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..autograd import backward_without_autocast, without_autocast

# Dimensions: N positions, C positions of a chunk, V vocabulary, M model width

# Logits held at once, in numbers (48 MiB of float32; 256 positions of a vocabulary of 49,152). The weight and
# its gradient pass through memory once per chunk, so small chunks are slow; larger ones only cost memory.
CHUNK_NUMBERS = 12 * 2**20
# Positions whose softmax is taken at once: in float32 their logits stay in the processor's cache.
SOFTMAX_ROWS = 32

# (positions (C,), logits (C, V), where to write their gradient or None) -> sum of the losses
_ChunkLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_Sums = tuple[Tensor, Tensor, Tensor]


def default_chunk_size(vocab_size: int) -> int:
    """Positions whose logits are worth holding at once."""
    return max(16, CHUNK_NUMBERS // max(vocab_size, 1))


def linear_cross_entropy_torch(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk_size: int
) -> Tensor:
    """Chunked form of `memzoo.kernels.linear_cross_entropy`; arguments are already checked."""
    plan = (ignore_index, chunk_size, _product_dtype(hidden), *_needed(hidden, weight))
    if is_compiling():
        total = _cross_entropy_op(hidden, weight, targets, *plan)[0]
    else:
        total = _LossSum.apply(hidden, weight, lambda h, w: _cross_entropy_sums(h, w, targets, *plan))
    return total / (targets != ignore_index).sum().clamp(min=1)


def linear_divergence_torch(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    reverse: bool,
    chunk_size: int,
) -> Tensor:
    """Chunked form of `memzoo.kernels.linear_divergence`; arguments are already checked."""
    teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()
    dtypes = _product_dtype(hidden), _product_dtype(teacher_hidden)
    plan = (reverse, chunk_size, *dtypes, *_needed(hidden, weight))
    if is_compiling():
        total = _divergence_op(hidden, weight, teacher_hidden, teacher_weight, *plan)[0]
    else:
        total = _LossSum.apply(
            hidden, weight, lambda h, w: _divergence_sums(h, w, teacher_hidden, teacher_weight, *plan)
        )
    return total / max(1, hidden.shape[0])


def _product_dtype(x: Tensor) -> torch.dtype:
    """What autocast would make of a product; it leaves float64 alone."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def _needed(hidden: Tensor, weight: Tensor) -> tuple[bool, bool]:
    is_recorded = torch.is_grad_enabled()
    return is_recorded and hidden.requires_grad, is_recorded and weight.requires_grad


class _LossSum(torch.autograd.Function):
    """A sum of losses whose gradients were made with it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, sums: Callable[[Tensor, Tensor], _Sums]) -> Tensor:
        total, d_hidden, d_weight = sums(hidden, weight)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled(ctx, d_total), None


def _scaled(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, Tensor | None]:
    saved = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
    d_hidden, d_weight = (gradient * d_total if is_needed else None for gradient, is_needed in saved)
    return d_hidden, d_weight


def _cross_entropy_sums(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    chunk_size: int,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
) -> _Sums:
    """Sum over the labelled positions, and its gradients."""

    def loss(positions: Tensor, logits: Tensor, d_logits: Tensor | None) -> Tensor:
        labels = targets[positions, None].long()  # (C, 1)
        parts = []
        for rows in _row_blocks(logits):
            log_q = _log_softmax(logits[rows])
            parts.append(-log_q.gather(1, labels[rows]).sum())
            if d_logits is not None:
                ones = torch.ones_like(labels[rows], dtype=log_q.dtype)
                d_logits[rows] = log_q.exp_().scatter_add_(1, labels[rows], -ones)
        return torch.stack(parts).sum()

    positions = (targets != ignore_index).nonzero().squeeze(1)
    return _sum_chunks(hidden, weight, positions, chunk_size, dtype, need_hidden, need_weight, loss)


def _divergence_sums(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    reverse: bool,
    chunk_size: int,
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
) -> _Sums:
    """Sum over all positions, and its gradients; surplus entries of the larger vocabulary are left out."""
    width = min(weight.shape[0], teacher_weight.shape[0])
    teacher_weight = teacher_weight[:width].to(teacher_dtype)

    def loss(positions: Tensor, logits: Tensor, d_logits: Tensor | None) -> Tensor:
        teacher_logits = teacher_hidden[positions].to(teacher_dtype) @ teacher_weight.t()  # (C, V)
        parts = []
        for rows in _row_blocks(logits):
            log_q = _log_softmax(logits[rows])
            log_p = _log_softmax(teacher_logits[rows]).to(log_q.dtype)
            if reverse:
                q = log_q.exp()
                excess = log_q.sub_(log_p)
                each = (q * excess).sum(1, keepdim=True)
                parts.append(each.sum())
                if d_logits is not None:
                    d_logits[rows] = excess.sub_(each).mul_(q)
                continue
            p = log_p.exp()
            parts.append(log_p.sub_(log_q).mul_(p).sum())
            if d_logits is not None:
                d_logits[rows] = log_q.exp_().sub_(p)
        return torch.stack(parts).sum()

    positions = torch.arange(hidden.shape[0], device=hidden.device)
    return _sum_chunks(
        hidden, weight, positions, chunk_size, dtype, need_hidden, need_weight, loss, width=width
    )


def _sum_chunks(
    hidden: Tensor,
    weight: Tensor,
    positions: Tensor,
    chunk_size: int,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    loss: _ChunkLoss,
    width: int | None = None,
) -> _Sums:
    """The loss summed over the given positions; gradients (N, M) and (V, M), without numbers if not needed.

    Products run in `dtype`, sums in float32 (float64 for float64), gradients have the dtypes of the inputs.
    """
    acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=acc, device=hidden.device)
    d_hidden = torch.zeros_like(hidden) if need_hidden else hidden.new_empty(0)
    d_weight = torch.zeros_like(weight, dtype=acc) if need_weight else weight.new_empty(0)
    with without_autocast(hidden.device):
        head = weight[:width].to(dtype)  # (V, M)
        for part in positions.split(chunk_size) if len(positions) else ():
            x = hidden[part].to(dtype)  # (C, M)
            logits = x @ head.t()  # (C, V)
            d_logits = torch.empty_like(logits) if need_hidden or need_weight else None
            total += loss(part, logits, d_logits)
            if d_logits is None:
                continue
            if need_hidden:
                d_hidden[part] = (d_logits @ head).to(d_hidden.dtype)
            if need_weight and dtype == acc:
                d_weight[:width].addmm_(d_logits.t(), x)
            elif need_weight:
                d_weight[:width] += d_logits.t() @ x
    return total, d_hidden, d_weight.to(weight.dtype)


def _row_blocks(logits: Tensor) -> list[slice]:
    return [slice(row, row + SOFTMAX_ROWS) for row in range(0, logits.shape[0], SOFTMAX_ROWS)]


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)


# Under torch.compile the loop over chunks is one opaque operation: unrolled it would take minutes to compile,
# and the number of labelled positions would break the graph.
_cross_entropy_op = torch.library.custom_op(
    "memzoo::linear_cross_entropy",
    _cross_entropy_sums,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, SymInt chunk_size, "
    "ScalarType dtype, bool need_hidden, bool need_weight) -> (Tensor, Tensor, Tensor)",
)
_divergence_op = torch.library.custom_op(
    "memzoo::linear_divergence",
    _divergence_sums,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor teacher_hidden, Tensor teacher_weight, bool reverse, "
    "SymInt chunk_size, ScalarType dtype, ScalarType teacher_dtype, bool need_hidden, bool need_weight) "
    "-> (Tensor, Tensor, Tensor)",
)


def _empty_sums(hidden: Tensor, weight: Tensor, *plan: Any) -> _Sums:
    acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    need_hidden, need_weight = plan[-2:]
    return (
        torch.empty((), dtype=acc, device=hidden.device),
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
    )


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: _Sums) -> None:
    ctx.save_for_backward(output[1], output[2])
    ctx.num_others = len(inputs) - 2


def _op_backward(ctx: Any, d_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *_scaled(ctx, d_total), *(None,) * ctx.num_others


for _operation in (_cross_entropy_op, _divergence_op):
    _operation.register_fake(_empty_sums)
    _operation.register_autograd(_op_backward, setup_context=_save_gradients)
