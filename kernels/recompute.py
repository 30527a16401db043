"""Scans over steps whose backward pass runs the steps again.

A scan of S steps keeps the carried tensors of about sqrt(S) places, and the intermediate results of as many
steps while its backward pass is at work; the rest of its memory is what the caller gave and gets.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .autograd import backward_without_autocast

# Dimensions: S steps

Tensors = tuple[Tensor, ...]
Step = Callable[[Tensors, Tensors, Tensors], tuple[Tensor, Tensors]]


def scan(
    step: Step,
    carried: Tensors,
    inputs: Tensors,
    constants: Tensors,
    *,
    recompute: bool = True,
    group_size: int | None = None,
    forward: Step | None = None,
) -> tuple[Tensor, Tensors]:
    """output_s, carried = step(carried, inputs_s, constants) for every s in order.

    Args:
        step: a function of tensors alone; what it returns as carried has the shapes of what it was given.
        carried: tensors before the first step.
        inputs: (S, ...) each, S at least 1.
        constants: tensors that every step sees.
        recompute: False keeps what every step computes for the backward pass instead.
        group_size: steps between two kept places; None for about sqrt(S).
        forward: takes the place of `step` where no gradient is recorded, with the same results.

    Returns:
        The outputs (S, ...), and the tensors carried out of the last step. Differentiable once.
    """
    num_steps = inputs[0].shape[0]
    # a compiler decides by itself what to store
    if torch.compiler.is_compiling():
        return _run(step, carried, inputs, constants)
    if not torch.is_grad_enabled():
        return _run(forward or step, carried, inputs, constants)
    if not recompute:
        return _run(step, carried, inputs, constants)
    length = group_size or math.isqrt(num_steps - 1) + 1
    groups = [(start, min(start + length, num_steps)) for start in range(0, num_steps, length)]
    sizes = (len(carried), len(inputs), len(constants))
    outputs, *final = _Scan.apply((step, forward or step), groups, sizes, *carried, *inputs, *constants)
    return outputs, tuple(final)


def _run(step: Step, carried: Tensors, inputs: Tensors, constants: Tensors) -> tuple[Tensor, Tensors]:
    outputs = []
    for pieces in zip(*(x.unbind(0) for x in inputs), strict=True):
        output, carried = step(carried, pieces, constants)
        outputs.append(output)
    return torch.stack(outputs), carried


class _Scan(torch.autograd.Function):
    """`_run` with a backward pass that runs one group of steps at a time again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensors:
        (step, fast), groups, sizes, *tensors = arguments
        carried, inputs, constants = _split(tuple(tensors), sizes)
        entering: list[Tensor] = []
        outputs = []
        for start, end in groups:
            entering.extend(carried)
            output, carried = _run(fast, carried, tuple(x[start:end] for x in inputs), constants)
            outputs.append(output)
        ctx.save_for_backward(*inputs, *constants, *entering)
        ctx.plan = (step, groups, sizes)
        return torch.cat(outputs), *carried

    @staticmethod
    @backward_without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        step, groups, (num_carried, num_inputs, num_constants) = ctx.plan
        d_outputs, *d_carried = grads
        inputs, constants, entering = _split(
            ctx.saved_tensors, (num_inputs, num_constants, num_carried * len(groups))
        )
        d_inputs = [torch.zeros_like(x) for x in inputs]
        d_constants = [torch.zeros_like(x) for x in constants]
        for index, (start, end) in reversed(list(enumerate(groups))):
            carried = entering[index * num_carried : (index + 1) * num_carried]
            given = (*carried, *(x[start:end] for x in inputs), *constants)
            leaves = tuple(x.detach().requires_grad_() for x in given)
            with torch.enable_grad():
                output, final = _run(step, *_split(leaves, (num_carried, num_inputs, num_constants)))
            results = zip((output, *final), (d_outputs[start:end], *d_carried), strict=True)
            reached = [
                (x, grad) for x, grad in results if x.requires_grad
            ]  # not what a step fills with zeros
            values, weights = zip(*reached, strict=True)
            found = torch.autograd.grad(values, leaves, weights, materialize_grads=True)
            next_carried, pieces, shares = _split(found, (num_carried, num_inputs, num_constants))
            d_carried = list(next_carried)
            for whole, piece in zip(d_inputs, pieces, strict=True):
                whole[start:end] = piece
            for total, share in zip(d_constants, shares, strict=True):
                total += share
        return None, None, None, *d_carried, *d_inputs, *d_constants


def _split(tensors: Tensors, sizes: tuple[int, int, int]) -> tuple[Tensors, Tensors, Tensors]:
    first, second = sizes[0], sizes[0] + sizes[1]
    assert len(tensors) == sum(sizes)
    return tensors[:first], tensors[first:second], tensors[second:]
