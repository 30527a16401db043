"""Gated slot attention: the two chunked passes against the definition."""

import sys

import pytest
import torch
from torch import Tensor

from memzoo.kernels import SlotState, gated_slot_attention
from memzoo.testing import assert_close

CHUNK = 8
R = torch.zeros


class Case:
    """Random arguments of one call, all wanting a gradient."""

    def __init__(
        self,
        seed: int,
        rows: int,
        num_tokens: int,
        groups: tuple[int, int] = (2, 2),
        *,
        own_slots: bool = True,
        num_states: int = 0,
        dtype: torch.dtype = torch.float64,
        decay: float = 0.3,
    ):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        heads, kv_heads = groups
        self.tensors = {
            "q": random(rows, num_tokens, heads, 5),
            "k": random(rows, num_tokens, kv_heads, 5),
            "v": random(rows, num_tokens, kv_heads, 3),
            "g": -decay * random(rows, num_tokens, kv_heads, 4).abs(),
        }
        if own_slots:
            self.tensors["slots"] = random(rows, num_tokens, kv_heads, 4)
        if num_states:
            self.tensors["keys"] = random(num_states, kv_heads, 5, 4)
            self.tensors["values"] = random(num_states, kv_heads, 4, 3)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        for name, x in self.tensors.items():
            self.tensors[name] = x.to(acc if name in ("keys", "values") else dtype).requires_grad_()

    def call(self, backend: str = "torch", **options: object) -> dict[str, Tensor]:
        given = dict(self.tensors)
        keys, values = given.pop("keys", None), given.pop("values", None)
        state = None if keys is None else SlotState(keys, values)
        output, final = gated_slot_attention(
            **given,
            initial_state=state,
            return_state=True,
            backend=backend,
            **{"chunk_size": CHUNK, **options},
        )
        return {"output": output, "final keys": final.keys, "final values": final.values}

    def with_gradients(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """The results and the gradients of a random function of all of them."""
        generator = torch.Generator().manual_seed(99)
        total = sum(
            (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum()
            for x in results.values()
        )
        grads = torch.autograd.grad(total, list(self.tensors.values()))
        return {**results, **{f"d {name}": d for name, d in zip(self.tensors, grads, strict=True)}}


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype
        assert_close(name, actual[name], expected[name], bound)


@pytest.mark.parametrize("own_slots", [False, True])
@pytest.mark.parametrize("groups", [(2, 2), (4, 2)])
@pytest.mark.parametrize("num_tokens", [1, 8, 19])
def test_dense_equals_the_definition(num_tokens: int, groups: tuple[int, int], own_slots: bool) -> None:
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        for num_states in (0, 2):
            case = Case(1, 2, num_tokens, groups, own_slots=own_slots, num_states=num_states, dtype=dtype)
            compare(*[case.with_gradients(case.call(name)) for name in ("torch", "reference")], bound)


def test_groups_of_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(2, 2, 90, num_states=2)
    whole = case.with_gradients(case.call())
    monkeypatch.setattr(sys.modules["memzoo.kernels.linear_attention.groups"], "_GROUP_ELEMENTS", 1)
    compare(case.with_gradients(case.call()), whole, 1e-12)


def test_packed_rows_and_splits_equal_the_whole() -> None:
    bounds = [0, 3, 3, 29, 30]
    case = Case(3, 1, 30, num_states=4)
    packed, definition = (
        case.with_gradients(case.call(name, cu_seqlens=torch.tensor(bounds)))
        for name in ("torch", "reference")
    )
    compare(packed, definition, 1e-9)
    outputs, keys, values = [], [], []
    for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        state = SlotState(case.tensors["keys"][n : n + 1], case.tensors["values"][n : n + 1])
        middle = min(start + 11, end)
        for a, b in ((start, middle), (middle, end)):
            given = {name: case.tensors[name][:, a:b] for name in ("q", "k", "v", "g", "slots")}
            output, state = gated_slot_attention(
                **given, initial_state=state, return_state=True, chunk_size=CHUNK
            )
            outputs.append(output)
        keys.append(state.keys)
        values.append(state.values)
    results = {
        "output": torch.cat(outputs, 1),
        "final keys": torch.cat(keys),
        "final values": torch.cat(values),
    }
    compare(case.with_gradients(results), packed, 1e-10)


def test_causal_to_the_last_bit() -> None:
    first, other = (Case(seed, 2, 37, dtype=torch.float32) for seed in (4, 5))
    before = first.call()["output"]
    for t in (1, CHUNK - 1, CHUNK, 20):
        grads = torch.autograd.grad(before[:, :t].sum(), list(first.tensors.values()), retain_graph=True)
        assert all(not bool(grad[:, t:].any()) for grad in grads)
        mixed = Case(4, 2, 37, dtype=torch.float32)
        for name in mixed.tensors:
            mixed.tensors[name] = torch.cat([first.tensors[name][:, :t], other.tensors[name][:, t:]], 1)
        assert torch.equal(mixed.call()["output"][:, :t], before[:, :t])


def test_gradcheck() -> None:
    case = Case(6, 1, 5, (2, 1), num_states=1)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        case.tensors = dict(zip(case.tensors, tensors, strict=True))
        return tuple(case.call(chunk_size=2).values())

    assert torch.autograd.gradcheck(function, list(case.tensors.values()))


@pytest.mark.parametrize("decay", [20.0, 300.0])
def test_strong_decay_neither_overflows_nor_loses_the_gradient(decay: float) -> None:
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        case = Case(7, 2, 40, num_states=2, dtype=dtype)
        with torch.no_grad():
            case.tensors["g"][:] = -decay
            case.tensors["g"][:, 10:15] = 0.0  # no decay between strong ones
        results = [case.with_gradients(case.call(name, chunk_size=64)) for name in ("torch", "reference")]
        compare(*results, bound)


def test_bfloat16_keeps_its_sums_in_float32() -> None:
    case = Case(8, 2, 100, dtype=torch.bfloat16, decay=0.02)
    ours, definition = (case.with_gradients(case.call(name)) for name in ("torch", "reference"))
    exact = Case(8, 2, 100)
    exact.tensors = {name: x.detach().double().requires_grad_() for name, x in case.tensors.items()}
    for name, expected in exact.with_gradients(exact.call("reference")).items():
        error, allowed = (
            float((x[name].double() - expected).detach().abs().max()) for x in (ours, definition)
        )
        factor = 3 if name.startswith("d ") else 2
        assert error <= factor * allowed + 1e-5 * float(expected.detach().abs().max())


def test_empty_calls_return_the_state() -> None:
    for backend in ("torch", "reference"):
        case = Case(9, 2, 0, num_states=2)
        results = case.call(backend)
        assert results["output"].shape == (2, 0, 2, 3)
        assert torch.equal(results["final keys"], case.tensors["keys"])
        assert torch.equal(results["final values"], case.tensors["values"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"v": R(2, 6, 1, 3).double()}, "k and v in heads"),
        ({"q": R(2, 6, 3, 5).double()}, "multiple of its heads"),
        ({"g": R(2, 5, 2, 4)}, r"g must have shape \(2, 6, 2, 'M'\)"),
        ({"g": R(2, 6, 2, 4) + 1}, "at most 0, got a maximum of 1"),
        ({"slots": R(2, 6, 2, 3)}, r"slots must have the shape \(2, 6, 2, 4\) of g"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"initial_state": SlotState(R(2, 2, 5, 4), R(2, 2, 4, 3))}, "initial_state.keys.*float64.*float32"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_slot_attention(**{**Case(10, 2, 6).tensors, **arguments})
