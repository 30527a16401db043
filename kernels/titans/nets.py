"""The net of the neural memory in closed form.

f(x) = x + (1 + gamma) LN(g(x)),   g(x) = gelu(... gelu(x W1) W2 ...) Wp   (erf form, no activation behind Wp)
loss = scale |f(k) - v|^2
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import Tensors

# Dimensions: ... leading dimensions with heads last among them, C tokens, F head width, G hidden width

NORM_EPS = 1e-5


class Writes(NamedTuple):
    """Gradients of the loss of every token, by parts.

    Attributes:
        inputs: of each matrix, (..., C, F or G).
        gradients: of each matrix's output, (..., C, G or F).
        gain: of gamma, (..., C, F).
    """

    inputs: list[Tensor]
    gradients: list[Tensor]
    gain: Tensor

    def sums(self, rate: Tensor) -> Tensors:
        """Gradients of the net, summed over tokens of rates (..., C, 1)."""
        pairs = zip(self.inputs, self.gradients, strict=True)
        products = (x.mT * (rate * grad) if x.shape[-2] == 1 else x.mT @ (rate * grad) for x, grad in pairs)
        return ((rate * self.gain).sum(-2, keepdim=True), *products)


def read(net: Tensors, x: Tensor) -> Tensor:
    """f(x) for x (..., C, F)."""
    return x + (1 + net[0]) * standardize(_outputs(net, x)[1][-1])[0]


def writes(net: Tensors, k: Tensor, v: Tensor, scale: float) -> Writes:
    """Gradients at a net of the loss of tokens k, v (..., C, F)."""
    inputs, outputs = _outputs(net, k)
    unit, factor = standardize(outputs[-1])
    gain = 1 + net[0]
    error = 2 * scale * (k + gain * unit - v)
    slope = error * gain
    inner = slope - slope.mean(-1, keepdim=True) - unit * (slope * unit).mean(-1, keepdim=True)
    gradients = [inner * factor]
    for weight, z in zip(reversed(net[2:]), reversed(outputs[:-1]), strict=True):
        gradients.insert(0, (gradients[0] @ weight.mT) * _slope(z))
    return Writes(inputs, gradients, error * unit)


def standardize(z: Tensor) -> tuple[Tensor, Tensor]:
    """z (..., C, F) with mean 0 and variance 1, and the factor (..., C, 1) that made it so."""
    centered = z - z.mean(-1, keepdim=True)
    factor = torch.rsqrt(centered.square().mean(-1, keepdim=True) + NORM_EPS)
    return centered * factor, factor


def _outputs(net: Tensors, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of every matrix."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for weight in net[1:]:
        inputs.append(F.gelu(outputs[-1]) if outputs else x)
        outputs.append(inputs[-1] @ weight)
    return inputs, outputs


def _slope(z: Tensor) -> Tensor:
    """Derivative of the erf form of GELU."""
    z = z.clamp(-12, 12)  # beyond, it is 0 or 1 in every precision
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density
