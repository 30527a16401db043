"""What our hand-written backward passes share."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def backward_without_autocast(function: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Make a `backward` differentiable once, and deaf to an autocast that is on where the caller runs it."""

    @functools.wraps(function)
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        # not from ctx.saved_tensors: a checkpointed block may unpack them only once
        device = next((grad.device for grad in grads if grad is not None), torch.device("cpu"))
        with torch.autocast(device.type, enabled=False):
            return function(ctx, *grads)

    return once_differentiable(backward)
