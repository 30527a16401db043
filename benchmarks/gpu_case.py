"""One call of a kernel with inputs that reach its corners, and the rule that judges a backend on it.

Truth is the `reference` of the operation in float64 on the CPU. Inputs are numbers that bfloat16 holds
exactly, so that one truth serves every precision; slots that must never be read hold NaN.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from memzoo.testing import ContractError, assert_close

# Dimensions: B batch, T tokens, N sequences

Tensors = dict[str, Tensor]

BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative to max(1, largest true value)
BFLOAT16_FACTORS = {"output": 2.0, "gradient": 3.0}  # of the error that the reference makes in bfloat16


@dataclass(frozen=True)
class Case:
    """One call of an operation.

    Attributes:
        operation: name in `memzoo.kernels.backend.OPERATIONS`.
        name: what is special about the call.
        make: draws the inputs, float64 on the CPU; floating-point inputs get gradients.
        call: runs the operation on inputs with a backend.
        accumulators: inputs that are float32 where the activations are bfloat16.
    """

    operation: str
    name: str
    make: Callable[[torch.Generator], Tensors]
    call: Callable[[Tensors, str], Tensors]
    accumulators: tuple[str, ...] = ()

    @cached_property
    def inputs(self) -> Tensors:
        """Inputs of this case, the same in every run."""
        return self.make(torch.Generator().manual_seed(zlib.crc32(f"{self.operation} {self.name}".encode())))

    @cached_property
    def truth(self) -> Tensors:
        """Outputs and gradients by the definition in float64."""
        return self.run("reference", torch.float64, torch.device("cpu"))

    @cached_property
    def bfloat16_reference(self) -> Tensors:
        """What the definition gives in bfloat16."""
        return self.run("reference", torch.bfloat16, torch.device("cpu"))

    def run(self, backend: str, dtype: torch.dtype, device: torch.device) -> Tensors:
        """Outputs ("output ...") and gradients ("gradient ...") of the call, as float64 on the CPU."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        leaves: Tensors = {}
        for name, tensor in self.inputs.items():
            if tensor.is_floating_point():
                own = wide if name in self.accumulators else dtype
                leaves[name] = tensor.clone().to(device, own).requires_grad_()
            else:
                leaves[name] = tensor.to(device)
        outputs = self.call(leaves, backend)
        found: Tensors = {f"output {name}": out.detach().cpu().double() for name, out in outputs.items()}
        loss = sum((out.double() * _weights(name, out)).sum() for name, out in outputs.items())
        assert isinstance(loss, Tensor)
        loss.backward()
        for name, leaf in leaves.items():
            if leaf.is_floating_point():
                grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                found[f"gradient {name}"] = grad.cpu().double()
        return found

    def check(self, backend: str, dtype: torch.dtype, device: torch.device) -> float:
        """Compare a backend with the truth.

        Returns:
            The largest error as a share of what is allowed.

        Raises:
            ContractError: an error above the bound, a value that is not finite, or a wrong shape.
            ValueError: the backend does not cover this call.
        """
        found = self.run(backend, dtype, device)
        worst = 0.0
        for name, expected in self.truth.items():
            where = f"{self.operation} {self.name}: {name}"
            if dtype in BOUNDS:
                error = assert_close(where, found[name], expected, BOUNDS[dtype])
                worst = max(worst, error / BOUNDS[dtype])
                continue
            assert_close(where, found[name], expected, float("inf"))  # shape, and finite values only
            factor = BFLOAT16_FACTORS[name.split()[0]]
            error = _largest(found[name] - expected)
            own = _largest(self.bfloat16_reference[name] - expected)
            allowed = factor * own + 1e-6
            if not error <= allowed:
                raise ContractError(
                    f"{where}: error {error:.3g}, allowed {allowed:.3g}, {factor:g} times the reference's"
                )
            worst = max(worst, error / allowed)
        return worst


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers that bfloat16 holds exactly."""
    return torch.randn(shape, generator=generator).bfloat16().double()


def _weights(name: str, out: Tensor) -> Tensor:
    """Fixed weights of an output in the loss whose gradients are compared."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return randn(generator, *out.shape).to(out.device)


def bounds_of(lengths: Sequence[int] | None) -> Tensor | None:
    """Boundaries of a packed row; None for a dense batch."""
    return None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)


def rows_of(lengths: Sequence[int] | None, batch_size: int, num_tokens: int) -> tuple[int, int, int]:
    """B, T and N of a call."""
    return (batch_size, num_tokens, batch_size) if lengths is None else (1, sum(lengths), len(lengths))
