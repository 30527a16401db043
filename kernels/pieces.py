"""Functions of single tokens, worked on piece by piece in the processor's cache.

A chain of cheap operations over a long row reads and writes memory once per operation. Taken some tokens at a
time it stays in cache, and keeping only its inputs for the backward pass, where it runs again, costs less
than reading back what it computed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .autograd import backward_without_autocast, without_autocast

# Dimensions: B batch, T tokens, C tokens of a piece

# Numbers of one piece of the first input (256 KiB of float32), and the fewest tokens of it.
PIECE_NUMBERS = 2**16
PIECE_TOKENS = 16


def piece_size(like: Tensor) -> int:
    """Tokens of a piece of a tensor (B, T, ...)."""
    numbers = like.shape[0] * like.shape[2:].numel()
    return max(PIECE_TOKENS, PIECE_NUMBERS // max(1, numbers))


def in_pieces(
    function: Callable[..., Tensor], tokens: Sequence[Tensor], parameters: Sequence[Tensor] = ()
) -> Tensor:
    """`function(*tokens, *parameters)`, evaluated piece by piece on a CPU.

    Args:
        function: takes tensors (B, C, ...) and the parameters to one tensor (B, C, ...); every output token
            depends on the input tokens of the same place alone.
        tokens: (B, T, ...) each.
        parameters: tensors that all tokens share; they reach the function in float32 at least, so that the
            sum of their gradients over pieces is rounded once.

    Returns:
        (B, T, ...), the same numbers as without pieces.
    """
    first = tokens[0]
    parameters = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in parameters]
    # what a compiler or a GPU fuses by itself needs no pieces
    if is_compiling() or first.device.type != "cpu" or first.shape[1] <= piece_size(first):
        with without_autocast(first.device):
            return function(*tokens, *parameters)
    return _Pieces.apply(function, len(tokens), *tokens, *parameters)


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], num_tokens: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.function, ctx.num_tokens = function, num_tokens
        tokens, parameters = tensors[:num_tokens], tensors[num_tokens:]
        size = piece_size(tokens[0])
        with without_autocast(tokens[0].device):
            parts = [
                function(*part, *parameters) for part in zip(*(x.split(size, 1) for x in tokens), strict=True)
            ]
        return torch.cat(parts, 1)

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, num_tokens = ctx.saved_tensors, ctx.num_tokens
        wanted = [n for n, is_wanted in enumerate(ctx.needs_input_grad[2:]) if is_wanted]
        grads: list[Tensor | None] = [None] * len(tensors)
        for n in wanted:
            grads[n] = torch.empty_like(tensors[n]) if n < num_tokens else torch.zeros_like(tensors[n])
        size = piece_size(tensors[0])
        for t0 in range(0, grad.shape[1], size):
            piece = slice(t0, t0 + size)
            leaves = [x.detach() if n >= num_tokens else x[:, piece].detach() for n, x in enumerate(tensors)]
            for n in wanted:
                leaves[n].requires_grad_()
            with torch.enable_grad():
                output = ctx.function(*leaves)
            found = torch.autograd.grad(output, [leaves[n] for n in wanted], grad[:, piece])
            for n, value in zip(wanted, found, strict=True):
                target = grads[n]
                assert target is not None
                if n < num_tokens:
                    target[:, piece] = value
                else:
                    target += value
        return None, None, *grads
