"""The inner nets of test-time training in closed form: linear maps with tanh-GELU between, inside a norm.

f(x) = x + LN(g(x)),   g(x) = x W1 + b1   or   gelu(x W1 + b1) W2 + b2
loss = 1/2 |f(k) - v|^2, so that LN(g(k)) is drawn towards v - k
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Dimensions: ... leading dimensions with heads last among them, C tokens, F head width, G hidden width


class Norm(NamedTuple):
    """The norm of the nets: weight and bias (H, 1, F), and what is added to the variance."""

    weight: Tensor
    bias: Tensor
    eps: float

    def standardize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (..., H, C, F) with mean 0 and variance 1, and the factor (..., H, C, 1) that made it so."""
        centered = z - z.mean(-1, keepdim=True)
        factor = torch.rsqrt(centered.square().mean(-1, keepdim=True) + self.eps)
        return centered * factor, factor

    def apply(self, z: Tensor) -> Tensor:
        """LN(z)."""
        return self.standardize(z)[0] * self.weight + self.bias

    def loss_gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """Gradient of 1/2 |LN(z) - target|^2 by z."""
        unit, factor = self.standardize(z)
        slope = (unit * self.weight + self.bias - target) * self.weight
        inner = slope - slope.mean(-1, keepdim=True) - unit * (slope * unit).mean(-1, keepdim=True)
        return inner * factor


class Writes(NamedTuple):
    """What the tokens of a mini-batch would write, all taken at its start.

    Attributes:
        inputs: of each map, (..., C, F or G); the first are the keys.
        gradients: of each map's output, (..., C, G or F).
    """

    inputs: list[Tensor]
    gradients: list[Tensor]

    def sums(self, rate: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the weights, summed over tokens of rates (..., C, 1)."""
        found: list[Tensor] = []
        for x, gradient in zip(self.inputs, self.gradients, strict=True):
            scaled = rate * gradient
            product = x.mT * scaled if x.shape[-2] == 1 else x.mT @ scaled
            found += [product, scaled.sum(-2, keepdim=True)]
        return tuple(found)


def activate(z: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return F.gelu(z, approximate="tanh")


def activation_slope(z: Tensor) -> Tensor:
    """Derivative of `activate`."""
    z = z.clamp(-10, 10)  # beyond, it is 0 or 1 in every precision, and cubes stay finite
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(scale * (z + cubic * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t.square()) * scale * (1 + 3 * cubic * z.square())


def writes(weights: tuple[Tensor, ...], k: Tensor, v: Tensor, norm: Norm) -> Writes:
    """Gradients of the loss of every token at the given weights.

    Args:
        weights: W1, b1 and so on with leading dimensions that fit those of k.
        k, v: (..., C, F).
        norm: of the net.
    """
    maps = list(zip(weights[::2], weights[1::2], strict=True))
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for weight, bias in maps:
        x = activate(outputs[-1]) if outputs else k
        inputs.append(x)
        outputs.append(x @ weight + bias)
    gradients = [norm.loss_gradient(outputs[-1], v - k)]
    for (weight, _), z in zip(reversed(maps[1:]), reversed(outputs[:-1]), strict=True):
        gradients.insert(0, (gradients[0] @ weight.mT) * activation_slope(z))
    return Writes(inputs, gradients)
