"""Value heads that share keys and decay each on their own: the form of Mamba-2 against the definition."""

import pytest
import torch
from torch import Tensor

from memzoo.kernels import LinearState, linear_attention
from memzoo.testing import assert_close

CHUNK = 5
NAMES = ("q", "k", "v", "g")


class Case:
    """Two key heads with three value heads each; all arguments want a gradient."""

    def __init__(
        self,
        seed: int,
        rows: int,
        num_tokens: int,
        *,
        num_states: int = 0,
        dtype: torch.dtype = torch.float64,
        decay: float = 0.3,
    ):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        q, k = (random(rows, num_tokens, 2, 4) for _ in range(2))
        g = -decay * random(rows, num_tokens, 6).abs()
        made = {"q": q, "k": k, "v": random(rows, num_tokens, 6, 3), "g": g}
        if num_states:
            made["memory"] = random(num_states, 6, 4, 3)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        self.tensors = {
            name: x.to(dtype if name in ("q", "k", "v") else acc).requires_grad_() for name, x in made.items()
        }

    def call(self, backend: str = "torch", **options: object) -> dict[str, Tensor]:
        """Output and final state of a call on all tensors."""
        given = dict(self.tensors)
        memory = given.pop("memory", None)
        output, final = linear_attention(
            **given,
            initial_state=None if memory is None else LinearState(memory),
            return_state=True,
            backend=backend,
            **{"chunk_size": CHUNK, **options},
        )
        return {"output": output, "memory": final.memory}

    def with_gradients(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """The results and the gradients of a random function of all of them."""
        generator = torch.Generator().manual_seed(99)
        total = sum(
            (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum()
            for x in results.values()
        )
        grads = torch.autograd.grad(total, list(self.tensors.values()), allow_unused=True)
        named = zip(self.tensors.items(), grads, strict=True)
        return {
            **results,
            **{f"d {name}": torch.zeros_like(x) if d is None else d for (name, x), d in named},
        }


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype
        assert_close(name, actual[name], expected[name], bound)


@pytest.mark.parametrize("num_states", [0, 2])
@pytest.mark.parametrize("num_tokens", [1, 4, 5, 17])
def test_dense_equals_the_definition(num_tokens: int, num_states: int) -> None:
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        case = Case(1, 2, num_tokens, num_states=num_states, dtype=dtype)
        compare(*(case.with_gradients(case.call(name)) for name in ("torch", "reference")), bound)


@pytest.mark.parametrize("num_states", [0, 4])
def test_packed_equals_the_definition(num_states: int) -> None:
    case = Case(2, 1, 18, num_states=num_states)
    bounds = torch.tensor([0, 3, 3, 17, 18])
    compare(
        *(case.with_gradients(case.call(name, cu_seqlens=bounds)) for name in ("torch", "reference")), 1e-9
    )


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_chunk_size_changes_nothing(chunk_size: int) -> None:
    case = Case(3, 2, 17, num_states=2)
    compare(*(case.with_gradients(case.call(chunk_size=size)) for size in (chunk_size, CHUNK)), 1e-12)


def test_outputs_alone_have_the_same_gradients() -> None:
    """Without a wanted state the last chunk is not written."""
    case = Case(4, 2, 17, num_states=2)
    grads = []
    for backend in ("torch", "reference"):
        memory = case.tensors["memory"]
        given = {name: case.tensors[name] for name in NAMES}
        output, state = linear_attention(
            **given, initial_state=LinearState(memory), backend=backend, chunk_size=CHUNK
        )
        assert state is None
        grads.append(torch.autograd.grad(output.square().sum(), list(case.tensors.values())))
    for name, actual, expected in zip(case.tensors, *grads, strict=True):
        assert_close(name, actual, expected, 1e-9)


def test_causal_to_the_last_bit() -> None:
    first, other = (Case(seed, 2, 17, dtype=torch.float32) for seed in (5, 6))
    before = first.call()["output"]
    inputs = list(first.tensors.values())
    for t in (1, CHUNK - 1, CHUNK, 12):
        grads = torch.autograd.grad(before[:, :t].sum(), inputs, retain_graph=True)
        assert all(not bool(grad[:, t:].any()) for grad in grads)
        mixed = Case(5, 2, 17, dtype=torch.float32)
        for name in mixed.tensors:
            mixed.tensors[name] = torch.cat([first.tensors[name][:, :t], other.tensors[name][:, t:]], 1)
        assert torch.equal(mixed.call()["output"][:, :t], before[:, :t])


def test_gradcheck() -> None:
    case = Case(7, 2, 5, num_states=2)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        case.tensors = dict(zip(case.tensors, tensors, strict=True))
        return tuple(case.call(chunk_size=2).values())

    assert torch.autograd.gradcheck(function, list(case.tensors.values()), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decay", [20.0, 300.0])
def test_strong_decay_neither_overflows_nor_loses_the_gradient(dtype: torch.dtype, decay: float) -> None:
    case = Case(8, 2, 17, num_states=2, dtype=dtype, decay=decay)
    with torch.no_grad():
        case.tensors["g"][:, 6:9] = 0.0  # weak decay between strong ones
        case.tensors["g"][:, [0, 12]] = -torch.inf
    results = [case.with_gradients(case.call(name)) for name in ("torch", "reference")]
    assert all(bool(torch.isfinite(x).all()) for x in results[0].values())
    compare(*results, 1e-9 if dtype == torch.float64 else 1e-4)


def test_bfloat16_accumulates_in_float32() -> None:
    case = Case(9, 2, 200, dtype=torch.bfloat16, decay=0.02)
    ours, definition = (case.with_gradients(case.call(name)) for name in ("torch", "reference"))
    exact = Case(9, 2, 200)
    exact.tensors = {name: x.detach().double().requires_grad_() for name, x in case.tensors.items()}
    truth = exact.with_gradients(exact.call("reference"))
    assert ours["memory"].dtype == torch.float32
    for name, expected in truth.items():
        error, allowed = (
            float((x[name].double() - expected).detach().abs().max()) for x in (ours, definition)
        )
        # the last term is the rounding of float32 sums, which the definition takes in another order
        factor = 3 if name.startswith("d ") else 2
        assert error <= factor * allowed + 1e-5 * float(expected.detach().abs().max())


def test_an_empty_call_returns_the_state() -> None:
    case = Case(11, 2, 0, num_states=2)
    results = case.call()
    assert results["output"].shape == (2, 0, 6, 3)
    assert torch.equal(results["memory"], case.tensors["memory"])


def test_the_given_state_is_left_alone() -> None:
    case = Case(10, 2, 17, num_states=2)
    kept = {name: x.detach().clone() for name, x in case.tensors.items()}
    case.with_gradients(case.call())
    assert all(torch.equal(kept[name], x) for name, x in case.tensors.items())


def test_rounding_does_not_pile_up_over_a_long_sequence() -> None:
    """The gradient of a rate of decay is a sum over all tokens, in which no error may have one sign."""
    found = {}
    for dtype in (torch.float64, torch.float32):
        case = Case(8, 1, 8192, dtype=dtype, decay=20.0)
        output = case.call(chunk_size=64)["output"]
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        (grad,) = torch.autograd.grad((output * weights.to(dtype)).sum(), case.tensors["g"])
        found[dtype] = grad.double().sum(1)
    assert_close("sum over the tokens", found[torch.float32], found[torch.float64], 1e-4)
