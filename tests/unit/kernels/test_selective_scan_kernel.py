"""Selective scan: the chunked form against the definition, carried states, packed rows, strong decay."""

import importlib

import pytest
import torch
from torch import Tensor

from memzoo.kernels import selective_scan
from memzoo.testing import assert_close

CHUNK = 4
LENGTHS = [1, 3, 4, 11]
SLICED = ("x", "delta", "B", "C", "z")


class Case:
    """Random arguments of one call, all wanting a gradient."""

    def __init__(
        self,
        seed: int,
        rows: int,
        num_tokens: int,
        *,
        channels: int = 6,
        size: int = 3,
        groups: int = 1,
        constant: str = "",
        num_states: int = 0,
        dtype: torch.dtype = torch.float64,
        decay: float = 1.0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        tokens = (rows, num_tokens)
        made = {
            "x": random(*tokens, channels),
            "delta": random(*tokens, channels),
            "A": -decay * (0.1 + random(channels, size).abs()),
            "B": random(channels, size) if "B" in constant else random(*tokens, groups, size),
            "C": random(channels, size) if "C" in constant else random(*tokens, groups, size),
            "D": random(channels),
            "z": random(*tokens, channels),
            "delta_bias": random(channels),
        }
        if num_states:
            made["initial_state"] = random(num_states, channels, size)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        self.tensors = {
            name: x.to(dtype if name in SLICED else acc).requires_grad_() for name, x in made.items()
        }

    def call(self, backend: str = "torch", **options: object) -> dict[str, Tensor]:
        """Output and final state of a call on all tensors."""
        given = {"chunk_size": CHUNK, "delta_softplus": True, **options}
        y, state = selective_scan(**self.tensors, **given, return_state=True, backend=backend)
        return {"y": y, "state": state}

    def part(self, start: int, end: int) -> dict[str, Tensor]:
        """The arguments of the tokens start .. end, without a state."""
        return {
            name: x[:, start:end] if name in SLICED and x.dim() > 2 else x
            for name, x in self.tensors.items()
            if name != "initial_state"
        }

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


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"groups": 2}, {"constant": "B", "groups": 3}, {"constant": "C"}, {"constant": "BC"}],
    ids=["plain", "groups", "constant-B", "constant-C", "constant-both"],
)
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_dense_equals_the_definition(num_tokens: int, options: dict[str, object], with_state: bool) -> None:
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        case = Case(1, 2, num_tokens, num_states=2 * with_state, dtype=dtype, **options)
        results = [case.with_gradients(case.call(name)) for name in ("torch", "reference")]
        compare(*results, bound)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 16, None])
def test_chunk_size_changes_nothing(chunk_size: int | None) -> None:
    case = Case(2, 2, 13, groups=2, num_states=2)
    results = [case.with_gradients(case.call(chunk_size=size)) for size in (chunk_size, CHUNK)]
    compare(*results, 1e-12)


def test_rows_are_worked_on_in_blocks() -> None:
    case = Case(20, 3, 5, channels=96, size=80, num_states=3)
    assert case.tensors["A"].numel() * 3 > 2**14 > case.tensors["A"].numel() * 2
    results = [case.with_gradients(case.call(name)) for name in ("torch", "reference")]
    compare(*results, 1e-9)


@pytest.mark.parametrize("cuts", [[6, 7], [1, 0, 4, 7, 1], [12, 1], [1] * 13])
def test_any_split_equals_the_whole(cuts: list[int]) -> None:
    case = Case(3, 2, 13, groups=2, num_states=2)
    whole = case.with_gradients(case.call())
    state, pieces, at = case.tensors["initial_state"], [], 0
    for length in cuts:
        y, state = selective_scan(
            **case.part(at, at + length),
            delta_softplus=True,
            initial_state=state,
            return_state=True,
            chunk_size=CHUNK,
            backend="torch",
        )
        pieces.append(y)
        at += length
    compare(case.with_gradients({"y": torch.cat(pieces, 1), "state": state}), whole, 1e-10)


@pytest.mark.parametrize("with_state", [False, True])
def test_packed_equals_separate(with_state: bool) -> None:
    bounds = [0, 3, 3, 14, 15]
    case = Case(4, 1, 15, groups=2, num_states=4 * with_state)
    results = []
    for name in ("torch", "reference"):
        results.append(case.with_gradients(case.call(name, cu_seqlens=torch.tensor(bounds))))
    outputs, states = [], []
    for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        own = case.tensors["initial_state"][n : n + 1] if with_state else None
        y, state = selective_scan(
            **case.part(start, end), delta_softplus=True, initial_state=own, return_state=True
        )
        outputs.append(y)
        states.append(state)
    separate = case.with_gradients({"y": torch.cat(outputs, 1), "state": torch.cat(states)})
    compare(results[0], separate, 1e-12)
    compare(results[0], results[1], 1e-9)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_packed_row_without_sequences(backend: str) -> None:
    results = Case(5, 1, 0).call(backend, cu_seqlens=torch.tensor([0]))
    assert results["y"].shape == (1, 0, 6)
    assert results["state"].shape == (0, 6, 3)


def test_nothing_passes_a_packed_boundary() -> None:
    case = Case(5, 1, 15)
    results = case.call(cu_seqlens=torch.tensor([0, 6, 15]))
    inputs = [case.tensors[name] for name in SLICED]
    later = results["y"][:, 6:].sum() + results["state"][1].sum()
    grads = torch.autograd.grad(later, inputs, retain_graph=True)
    assert all(not bool(grad[:, :6].any()) for grad in grads)
    grads = torch.autograd.grad(results["y"][:, :6].sum() + results["state"][0].sum(), inputs)
    assert all(not bool(grad[:, 6:].any()) for grad in grads)
    with torch.no_grad():
        for x in inputs:
            x[:, :6] = float("nan")
    clean = case.call(cu_seqlens=torch.tensor([0, 6, 15]))
    assert bool(torch.isfinite(clean["y"][:, 6:]).all())
    assert bool(torch.isfinite(clean["state"][1]).all())


def test_causal_to_the_last_bit() -> None:
    first, other = (Case(s, 2, 13, groups=2, dtype=torch.float32) for s in (6, 7))
    before = first.call()["y"]
    inputs = [first.tensors[name] for name in SLICED]
    for t in (1, CHUNK - 1, CHUNK, 9):
        grads = torch.autograd.grad(before[:, :t].sum(), inputs, retain_graph=True)
        assert all(not bool(grad[:, t:].any()) for grad in grads)
        mixed = Case(6, 2, 13, groups=2, dtype=torch.float32)
        for name in SLICED:
            mixed.tensors[name] = torch.cat([first.tensors[name][:, :t], other.tensors[name][:, t:]], 1)
        assert torch.equal(mixed.call()["y"][:, :t], before[:, :t])


def test_batch_rows_are_independent() -> None:
    case, other = Case(8, 3, 9, num_states=3), Case(9, 3, 9, num_states=3)
    both = case.call()
    for name in (*SLICED, "initial_state"):
        row = case.tensors[name][1:2].detach()
        other.tensors[name] = torch.cat([other.tensors[name][:1], row, other.tensors[name][2:]])
    for name in ("A", "D", "delta_bias"):
        other.tensors[name] = case.tensors[name]
    for name, found in other.call().items():
        assert torch.equal(found[1], both[name][1])


@pytest.mark.parametrize("constant", ["", "BC"])
def test_gradcheck(constant: str) -> None:
    case = Case(9, 2, 5, channels=4, size=2, groups=2, constant=constant, num_states=2)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        case.tensors = dict(zip(case.tensors, tensors, strict=True))
        return tuple(case.call(chunk_size=2).values())

    assert torch.autograd.gradcheck(function, list(case.tensors.values()), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decay", [20.0, 300.0])
def test_strong_decay_neither_overflows_nor_loses_the_gradient(dtype: torch.dtype, decay: float) -> None:
    case = Case(10, 2, 20, num_states=2, dtype=dtype, decay=decay)
    with torch.no_grad():
        case.tensors["delta"][:, 10:13] = -60.0  # no step at all between strong ones
    results = [case.with_gradients(case.call(name)) for name in ("torch", "reference")]
    assert all(bool(torch.isfinite(x).all()) for x in results[0].values())
    compare(*results, 1e-9 if dtype == torch.float64 else 1e-4)


def test_a_hundred_thousand_tokens_in_bfloat16() -> None:
    case = Case(11, 1, 100_000, channels=2, size=2, dtype=torch.bfloat16, decay=20.0)
    results = case.with_gradients(case.call(chunk_size=128))
    assert all(bool(torch.isfinite(x).all()) for x in results.values())


def test_bfloat16_accumulates_in_float32() -> None:
    case = Case(12, 2, 200, dtype=torch.bfloat16, decay=0.02)
    ours = case.with_gradients(case.call())
    definition = case.with_gradients(case.call("reference"))
    exact = Case(12, 2, 200)
    exact.tensors = {name: x.detach().double().requires_grad_() for name, x in case.tensors.items()}
    truth = exact.with_gradients(exact.call("reference"))
    assert ours["y"].dtype == torch.bfloat16
    assert ours["state"].dtype == torch.float32
    for name, expected in truth.items():
        error, allowed = (
            float((x[name].double() - expected).detach().abs().max()) for x in (ours, definition)
        )
        # the last term is the rounding of float32 sums, which the definition takes in another order
        factor = 3 if name.startswith("d ") else 2
        assert error <= factor * allowed + 1e-5 * float(expected.detach().abs().max())


@pytest.mark.parametrize("value", [0.0, 1e4, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_inputs_stay_finite(value: float, dtype: torch.dtype) -> None:
    x = torch.full((1, 20, 4), value, dtype=dtype, requires_grad=True)
    b = torch.full((1, 20, 1, 3), value, dtype=dtype, requires_grad=True)
    A = -torch.ones(4, 3, requires_grad=True)
    y, state = selective_scan(x, x, A, b, b, delta_softplus=True, return_state=True, chunk_size=CHUNK)
    grads = torch.autograd.grad(y.float().sum(), (x, b, A))
    assert all(bool(torch.isfinite(t).all()) for t in (y, state, *grads))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_empty_calls_return_the_state(backend: str) -> None:
    case = Case(13, 2, 0, num_states=2)
    results = case.call(backend)
    assert results["y"].shape == (2, 0, 6)
    assert torch.equal(results["state"], case.tensors["initial_state"])
    assert not Case(13, 2, 0).call(backend)["state"].any()


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_the_given_state_is_left_alone(num_tokens: int) -> None:
    case = Case(14, 2, num_tokens, num_states=2)
    kept = {name: x.detach().clone() for name, x in case.tensors.items()}
    case.with_gradients(case.call())
    assert all(torch.equal(kept[name], x) for name, x in case.tensors.items())


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_does_not_round_the_sums(backend: str) -> None:
    case = Case(15, 1, 9, dtype=torch.float32)
    plain = case.with_gradients(case.call(backend))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = case.call(backend)
    compare(case.with_gradients(inside), plain, 0.0)


def test_kept_states_are_no_more_than_the_inputs() -> None:
    """What the backward pass needs grows with T D, not with T D N."""
    case = Case(16, 2, 256, channels=32, size=16, dtype=torch.float32)
    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        case.call(chunk_size=None)
    assert max(sizes) <= 2 * 256 * 32


def test_as_one_operation_of_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(17, 1, 11, groups=2, num_states=3)
    cu_seqlens = torch.tensor([0, 5, 5, 11])
    expected = case.with_gradients(case.call(cu_seqlens=cu_seqlens))
    module = importlib.import_module("memzoo.kernels.selective_scan.chunked")
    monkeypatch.setattr(module, "is_compiling", lambda: True)
    compare(case.with_gradients(case.call(cu_seqlens=cu_seqlens)), expected, 1e-12)


def test_the_operation_is_declared_rightly() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 4), (2, 5, 4), (2, 3, 2), (2, 5, 2, 3), (2, 3, 2), (2, 2, 3, 2))
    tensors = [torch.rand(*s, generator=generator, dtype=torch.float64) for s in shapes]
    tensors[2] = -tensors[2]
    arguments = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.memzoo.selective_scan.default, (*arguments, [0, 5], 2, True))


def make(**changes: object) -> dict[str, object]:
    return {**Case(18, 2, 6).tensors, "delta_softplus": True, **changes}


R = torch.zeros


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": R(2, 6)}, r"x must have shape \(B, T, D\), got \(2, 6\)"),
        ({"A": R(5, 3)}, "one row per channel of x, 6, got"),
        ({"delta": R(2, 5, 6).double()}, r"delta must have the shape \(2, 6, 6\) of x"),
        ({"delta": R(2, 6, 6)}, "delta must have the shape .* torch.float32"),
        ({"B": R(2, 6, 4, 3).double()}, "groups that divide the 6 channels"),
        ({"B": R(2, 6, 1, 4).double()}, r"B must have shape \(2, 6, 'G', 3\)"),
        ({"C": R(5, 3).double()}, r"or \(6, 3\) where it is constant, got \(5, 3\)"),
        ({"C": R(2, 6, 2, 3).double()}, "one number of groups, got 1 and 2"),
        ({"C": R(2, 6, 1, 3)}, "share one dtype"),
        ({"z": R(2, 6, 5).double()}, "z must have the shape"),
        ({"D": R(5)}, r"D must have shape \(6,\)"),
        ({"delta_bias": R(5)}, r"delta_bias must have shape \(6,\)"),
        ({"delta_softplus": False}, "before the softplus"),
        ({"delta_softplus": False, "delta_bias": None}, "step sizes and must be at least 0"),
        ({"A": R(6, 3) + 0.5}, "at most 0, got a maximum of 0.5"),
        ({"initial_state": R(1, 6, 3).double()}, r"must have shape \(2, 6, 3\)"),
        ({"initial_state": R(2, 6, 3)}, r"be torch.float64, got \(2, 6, 3\) torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "batch size must be 1, got 2"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"backend": "triton"}, "is not a backend of selective_scan"),
        ({"backend": "mamba_ssm"}, r"needs CUDA and the package 'mamba_ssm'"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**make(**arguments))
