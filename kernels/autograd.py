"""What the operations share about autocast and hand-written backward passes."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A block in which autocast is off; the meta device has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def backward_without_autocast(function: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Make a `backward` differentiable once, and deaf to an autocast that is on where the caller runs it."""

    @functools.wraps(function)
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        # not from ctx.saved_tensors: a checkpointed block may unpack them only once
        device = next((grad.device for grad in grads if grad is not None), torch.device("cpu"))
        with without_autocast(device):
            return function(ctx, *grads)

    return once_differentiable(backward)
