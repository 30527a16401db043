"""Linear attention against numbers of the papers' own code (linear_attention.md beside this file)."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memzoo.kernels import LinearState, gated_slot_attention, linear_attention, mlstm
from memzoo.testing import assert_close

FILE = Path(__file__).parent / "linear_attention_a.npz"
# The bounds of the .md.
BOUNDS = [(torch.float64, 1e-9), (torch.float32, 1e-4)]
# T is 22: chunks below, equal, above, and one that divides nothing.
CHUNKS = [1, 5, 16, 22, 64]


def load(case: str, dtype: torch.dtype) -> dict[str, Tensor]:
    with np.load(FILE) as data:
        return {
            name.removeprefix(f"{case}."): torch.from_numpy(data[name]).to(dtype)
            for name in data.files
            if name.startswith(f"{case}.")
        }


def check(
    case: dict[str, Tensor], inputs: dict[str, Tensor], output: Tensor, states: list[Tensor], bound: float
) -> None:
    """Compares output, final states and the gradient of every input, as the .md defines them."""
    assert_close("o", output, case["o"], bound)
    total = (output * case["do"]).sum()
    names = ["final_state"] if "final_state" in case else ["final_state0", "final_state1"]
    for name, state in zip(names, states, strict=False):
        if name in case:
            expected = case[name].view_as(state)
            assert_close(name, state, expected, bound)
            total = total + (state * case[f"d{name}"].view_as(state)).sum()
    for (name, x), grad in zip(
        inputs.items(), torch.autograd.grad(total, list(inputs.values())), strict=True
    ):
        assert_close(f"grad_{name}", grad, case[f"grad_{name}"], bound)
        assert x.shape == grad.shape


def leaves(case: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: case[name].requires_grad_() for name in names}


def backends() -> list[tuple[str, int]]:
    return [("reference", 64), *(("torch", chunk) for chunk in CHUNKS)]


@pytest.mark.parametrize("dtype, bound", BOUNDS)
@pytest.mark.parametrize("backend, chunk_size", backends())
class TestGolden:
    def test_linear(self, backend: str, chunk_size: int, dtype: torch.dtype, bound: float) -> None:
        case = load("linear", dtype)
        inputs = leaves(case, "q", "k", "v", "s0")
        output, state = linear_attention(
            inputs["q"],
            inputs["k"],
            inputs["v"],
            initial_state=LinearState(inputs["s0"]),
            return_state=True,
            backend=backend,
            chunk_size=chunk_size,
        )
        check(case, inputs, output, [state.memory], bound)

    def test_linear_with_normaliser(
        self, backend: str, chunk_size: int, dtype: torch.dtype, bound: float
    ) -> None:
        case = load("linear_norm", dtype)
        inputs = leaves(case, "q", "k", "v")
        output, state = linear_attention(
            F.elu(inputs["q"]) + 1,
            F.elu(inputs["k"]) + 1,
            inputs["v"],
            normalize=True,
            eps=1e-10,
            return_state=True,
            backend=backend,
            chunk_size=chunk_size,
        )
        check(case, inputs, output, [state.memory, state.normalizer], bound)

    def test_based(self, backend: str, chunk_size: int, dtype: torch.dtype, bound: float) -> None:
        case = load("based", dtype)
        inputs = leaves(case, "q", "k", "v")

        def taylor(x: Tensor) -> Tensor:
            """(..., d) -> (..., 1 + d + d^2), whose inner products are 1 + u + u^2 / 2 with u = q . k /
            sqrt(d)."""
            x = x / x.shape[-1] ** 0.25
            squares = (x[..., :, None] * x[..., None, :]).flatten(-2) / 2**0.5
            return torch.cat([torch.ones_like(x[..., :1]), x, squares], -1)

        output, _ = linear_attention(
            taylor(inputs["q"]),
            taylor(inputs["k"]),
            inputs["v"],
            normalize=True,
            scale=1.0,
            eps=1e-6,
            backend=backend,
            chunk_size=chunk_size,
        )
        check(case, inputs, output, [], bound)

    def test_retention(self, backend: str, chunk_size: int, dtype: torch.dtype, bound: float) -> None:
        case = load("retention", dtype)
        inputs = leaves(case, "q", "k", "v")
        decay = torch.log(1 - 2.0 ** (-5 - torch.arange(2, dtype=dtype)))
        output, state = linear_attention(
            **inputs,
            g=decay.expand(2, 22, 2),
            return_state=True,
            backend=backend,
            chunk_size=chunk_size,
        )
        check(case, inputs, output, [state.memory], bound)

    def test_simple_gla(self, backend: str, chunk_size: int, dtype: torch.dtype, bound: float) -> None:
        case = load("simple_gla", dtype)
        inputs = leaves(case, "q", "k", "v", "g", "s0")
        given = {name: x for name, x in inputs.items() if name != "s0"}
        output, state = linear_attention(
            **given,
            initial_state=LinearState(inputs["s0"]),
            return_state=True,
            backend=backend,
            chunk_size=chunk_size,
        )
        check(case, inputs, output, [state.memory], bound)

    @pytest.mark.parametrize("name", ["gla", "delta", "delta_neg", "gdn", "kda"])
    def test_other_decays_and_the_delta_rule(
        self, name: str, backend: str, chunk_size: int, dtype: torch.dtype, bound: float
    ) -> None:
        case = load(name, dtype)
        given = [x for x in ("q", "k", "v", "g", "beta") if x in case]
        inputs = leaves(case, *given, "s0")
        output, state = linear_attention(
            **{x: inputs[x] for x in given},
            rule="additive" if name == "gla" else "delta",
            initial_state=LinearState(inputs["s0"]),
            return_state=True,
            backend=backend,
            chunk_size=chunk_size,
        )
        check(case, inputs, output, [state.memory], bound)

    def test_gsa(self, backend: str, chunk_size: int, dtype: torch.dtype, bound: float) -> None:
        case = load("gsa", dtype)
        inputs = leaves(case, "q", "k", "v", "s", "g")
        output, state = gated_slot_attention(
            inputs["q"],
            inputs["k"],
            inputs["v"],
            inputs["g"],
            slots=inputs["s"],
            scale=1.0,
            return_state=True,
            backend=backend,
            chunk_size=chunk_size,
        )
        check(case, inputs, output, list(state), bound)

    def test_mlstm(self, backend: str, chunk_size: int, dtype: torch.dtype, bound: float) -> None:
        case = load("mlstm", dtype)
        inputs = leaves(case, "q", "k", "v", "i", "f")
        output, state = mlstm(*inputs.values(), return_state=True, backend=backend, chunk_size=chunk_size)
        for name, part in (("C", state.memory), ("n", state.normalizer), ("m", state.stabilizer[..., None])):
            assert_close(name, part, case[name], bound)
        grads = torch.autograd.grad((output * case["do"]).sum(), list(inputs.values()))
        assert_close("o", output, case["o"], bound)
        for name, grad in zip(inputs, grads, strict=True):
            assert_close(f"grad_{name}", grad, case[f"grad_{name}"], bound)


def test_state_cases_are_compared() -> None:
    """Guards the `in case` of `check`: these cases do have final states."""
    assert "final_state" in load("linear", torch.float64)
    assert "final_state1" in load("linear_norm", torch.float64)
    assert "final_state1" in load("gsa", torch.float64)
    for name in ("simple_gla", "gla", "delta", "delta_neg", "gdn", "kda"):
        assert "final_state" in load(name, torch.float64)
