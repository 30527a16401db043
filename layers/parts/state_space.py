"""What the Mamba layers share: initial values, and parameters that stay in float32."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import tag_parameter

_HALF = (torch.bfloat16, torch.float16)


class Float32Parameters(nn.Module):
    """A module some of whose parameters stay in float32 where it is converted to a half precision.

    Rates of decay and biases of step sizes act through exponentials over thousands of tokens: eight bits of
    mantissa make another model of them.
    """

    float32_parameters: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: self.get_parameter(name).data for name in self.float32_parameters}
        result = super()._apply(fn, recurse)
        for name, data in before.items():
            parameter = self.get_parameter(name)
            if parameter.dtype in _HALF and data.dtype not in _HALF:
                grad, parameter.grad = parameter.grad, None
                parameter.data = data.to(parameter.device, torch.float32)
                parameter.grad = None if grad is None else grad.float()
        return result


def decay_rates(A_log: Tensor, dtype: torch.dtype) -> Tensor:
    """-exp(A_log) in the accumulation dtype of activations of `dtype`."""
    return -A_log.to(torch.float64 if dtype == torch.float64 else torch.float32).exp()


def undecayed(*shape: int) -> nn.Parameter:
    """A parameter without weight decay, yet to be filled."""
    return tag_parameter(nn.Parameter(torch.empty(*shape)), weight_decay=False)


def init_linear(linear: nn.Linear, scale: float = 1.0) -> None:
    """Weights uniform within scale / sqrt(fan in), the default of torch; biases zero."""
    bound = scale / math.sqrt(linear.in_features)
    nn.init.uniform_(linear.weight, -bound, bound)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def fill(parameter: Tensor, values: Callable[[Tensor], Tensor]) -> None:
    """Fills a parameter with what `values` makes of an empty float32 tensor of its shape.

    On the meta device there is nothing to fill, and the arithmetic would load torch's compiler.
    """
    if not parameter.is_meta:
        with torch.no_grad():
            parameter.copy_(values(torch.empty_like(parameter, dtype=torch.float32)))


def init_step_bias(bias: Tensor, smallest: float, largest: float, floor: float) -> None:
    """Fills a bias so that its softplus is log-uniform between two step sizes, and at least `floor`."""

    def values(empty: Tensor) -> Tensor:
        steps = empty.uniform_(math.log(smallest), math.log(largest)).exp_().clamp_(min=floor)
        return steps + torch.log(-torch.expm1(-steps))  # the inverse of softplus

    fill(bias, values)


def is_number(value: object) -> bool:
    """Whether a value is a number, infinity included, and no boolean; no integer that a float cannot hold."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, float) and not math.isnan(value)


def check_pair(name: str, pair: object, lowest: float) -> None:
    """Raises ValueError unless `pair` is two numbers in order, the first at least `lowest`."""
    is_pair = isinstance(pair, tuple) and len(pair) == 2 and all(is_number(end) for end in pair)
    if not is_pair or not lowest <= pair[0] <= pair[1]:  # type: ignore[index]  # checked on its left
        raise ValueError(f"{name} must be two numbers {lowest:g} <= a <= b, got {pair!r}.")


def check_step_range(config: Any) -> None:
    """Raises ValueError unless 0 < dt_min <= dt_max and dt_floor > 0, all of them numbers."""
    given = (config.dt_min, config.dt_max, config.dt_floor)
    if (
        not all(is_number(value) for value in given)
        or not 0 < config.dt_min <= config.dt_max < math.inf
        or not 0 < config.dt_floor < math.inf
    ):
        raise ValueError(
            "initial step sizes need 0 < dt_min <= dt_max and dt_floor > 0, got "
            f"dt_min {config.dt_min!r}, dt_max {config.dt_max!r} and dt_floor {config.dt_floor!r}."
        )
