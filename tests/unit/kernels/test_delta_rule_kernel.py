"""Linear attention with the delta rule and with a decay per key channel, against the definition."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memzoo.kernels import LinearState, linear_attention
from memzoo.kernels.linear_attention.triangular import unit_lower_inverse
from memzoo.testing import assert_close

CHUNK = 8
# Each: heads of q, of k, of v.
GROUPS = [(2, 2, 2), (2, 2, 4), (4, 2, 2)]
# Each: decay and rule; what is additive without a decay per channel has tests of its own.
KINDS = [("none", "delta"), ("head", "delta"), ("channel", "delta"), ("channel", "additive")]
R = torch.zeros


class Case:
    """Random arguments of one call, all wanting a gradient; keys of length 1."""

    def __init__(
        self,
        seed: int,
        rows: int,
        num_tokens: int,
        kind: tuple[str, str],
        groups: tuple[int, int, int] = (2, 2, 2),
        *,
        num_states: int = 0,
        normalize: bool = False,
        dtype: torch.dtype = torch.float64,
        decay: float = 0.3,
    ):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        num_heads, num_key_heads, num_value_heads = groups
        q = random(rows, num_tokens, num_heads, 5)
        k = F.normalize(random(rows, num_tokens, num_key_heads, 5), dim=-1)
        v = random(rows, num_tokens, num_value_heads, 3)
        beta = 2 * random(rows, num_tokens, num_value_heads).sigmoid()
        self.tensors = {"q": q, "k": k, "v": v, "beta": beta}
        if normalize:
            self.tensors["q"], self.tensors["k"] = q.abs(), k.abs()
        if kind[0] != "none":
            shape = (rows, num_tokens, num_value_heads, *((5,) if kind[0] == "channel" else ()))
            self.tensors["g"] = -decay * random(*shape).abs()
        if num_states:
            self.tensors["memory"] = random(num_states, num_value_heads, 5, 3)
            if normalize:
                self.tensors["normalizer"] = random(num_states, num_key_heads, 5).abs()
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        for name, x in self.tensors.items():
            self.tensors[name] = x.to(acc if name in ("memory", "normalizer") else dtype).requires_grad_()
        self.options = {"rule": kind[1], "normalize": normalize, "chunk_size": CHUNK}

    def call(self, backend: str = "torch", **options: object) -> dict[str, Tensor]:
        """Output and final state of a call on all tensors."""
        given = dict(self.tensors)
        memory, normalizer = given.pop("memory", None), given.pop("normalizer", None)
        state = None if memory is None else LinearState(memory, normalizer)
        output, final = linear_attention(
            **given, initial_state=state, return_state=True, backend=backend, **{**self.options, **options}
        )
        results = {"output": output, "memory": final.memory}
        if final.normalizer is not None:
            results["normalizer"] = final.normalizer
        return results

    def cut(self, start: int, end: int) -> dict[str, Tensor]:
        """The tokens from `start` to before `end`."""
        return {
            name: x[:, start:end] for name, x in self.tensors.items() if name in ("q", "k", "v", "g", "beta")
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("num_tokens", [1, 5, 8, 19])
def test_dense_equals_the_definition(
    num_tokens: int, groups: tuple[int, int, int], kind: tuple[str, str]
) -> None:
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        for num_states in (0, 2):
            case = Case(1, 2, num_tokens, kind, groups, num_states=num_states, dtype=dtype)
            results = [case.with_gradients(case.call(name)) for name in ("torch", "reference")]
            compare(*results, bound)


@pytest.mark.parametrize("kind", KINDS)
def test_many_chunks_equal_the_definition(kind: tuple[str, str]) -> None:
    case = Case(2, 1, 300, kind, num_states=1)
    results = [case.with_gradients(case.call(name, chunk_size=64)) for name in ("torch", "reference")]
    compare(*results, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_chunks_change_nothing(kind: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(24, 2, 90, kind, num_states=2)
    whole = case.with_gradients(case.call())
    monkeypatch.setattr(sys.modules["memzoo.kernels.linear_attention.groups"], "_GROUP_ELEMENTS", 1)
    compare(case.with_gradients(case.call()), whole, 1e-12)


@pytest.mark.parametrize("kind", [("head", "delta"), ("channel", "delta"), ("channel", "additive")])
def test_beta_and_decay_of_key_heads_may_be_left_out_or_shared(kind: tuple[str, str]) -> None:
    case = Case(3, 2, 19, kind, (2, 2, 4), num_states=2)
    del case.tensors["beta"]
    case.tensors["g"] = case.tensors["g"][:, :, :2].detach().requires_grad_()
    results = [case.with_gradients(case.call(name)) for name in ("torch", "reference")]
    compare(*results, 1e-9)
    explicit = case.call(beta=torch.ones_like(case.tensors["v"][..., 0]))
    assert_close("output", explicit["output"], results[0]["output"], 1e-12)


@pytest.mark.parametrize("groups", [(2, 2, 2), (4, 2, 2)])
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("num_tokens", [1, 19])
def test_a_normaliser_counts_what_is_written(
    num_tokens: int, decay: str, groups: tuple[int, int, int]
) -> None:
    case = Case(4, 2, num_tokens, (decay, "additive"), groups, num_states=2, normalize=True)
    results = [case.with_gradients(case.call(name)) for name in ("torch", "reference")]
    compare(*results, 1e-9)


@pytest.mark.parametrize("chunk_size", [1, 3, 32, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_chunk_size_changes_nothing(chunk_size: int, kind: tuple[str, str]) -> None:
    case = Case(5, 2, 37, kind, num_states=2)
    results = [case.with_gradients(case.call(chunk_size=size)) for size in (chunk_size, CHUNK)]
    compare(*results, 1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[18, 19], [1, 0, 8, 27, 1]])
def test_any_split_equals_the_whole(cuts: list[int], kind: tuple[str, str]) -> None:
    case = Case(6, 2, 37, kind, (2, 2, 4), num_states=2)
    whole = case.with_gradients(case.call())
    state: LinearState | None = LinearState(case.tensors["memory"])
    pieces, at = [], 0
    for length in cuts:
        output, state = linear_attention(
            **case.cut(at, at + length), **case.options, initial_state=state, return_state=True
        )
        pieces.append(output)
        at += length
    assert state is not None
    pieced = case.with_gradients({"output": torch.cat(pieces, 1), "memory": state.memory})
    compare(pieced, whole, 1e-10)


@pytest.mark.parametrize("num_states", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_separate(kind: tuple[str, str], num_states: int) -> None:
    bounds = [0, 3, 3, 29, 30]
    case = Case(7, 1, 30, kind, num_states=num_states)
    packed, definition = (
        case.with_gradients(case.call(name, cu_seqlens=torch.tensor(bounds)))
        for name in ("torch", "reference")
    )
    outputs, memories = [], []
    for n, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        own = LinearState(case.tensors["memory"][n : n + 1]) if num_states else None
        output, state = linear_attention(
            **case.cut(start, end), **case.options, initial_state=own, return_state=True
        )
        assert state is not None
        outputs.append(output)
        memories.append(state.memory)
    separate = case.with_gradients({"output": torch.cat(outputs, 1), "memory": torch.cat(memories)})
    compare(packed, separate, 1e-12)
    compare(packed, definition, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_passes_a_packed_boundary(kind: tuple[str, str]) -> None:
    case = Case(8, 1, 30, kind)
    results = case.call(cu_seqlens=torch.tensor([0, 13, 30]))
    inputs = list(case.tensors.values())
    for mine, other, row in ((slice(13, None), slice(13), 1), (slice(13), slice(13, None), 0)):
        total = results["output"][:, mine].sum() + results["memory"][row].sum()
        grads = torch.autograd.grad(total, inputs, retain_graph=True)
        assert all(not bool(grad[:, other].any()) for grad in grads)
        assert all(bool(grad[:, mine].any()) for grad in grads)


@pytest.mark.parametrize("kind", KINDS)
def test_causal_to_the_last_bit(kind: tuple[str, str]) -> None:
    first, other = (Case(seed, 2, 37, kind, dtype=torch.float32) for seed in (9, 10))
    before = first.call()["output"]
    inputs = list(first.tensors.values())
    for t in (1, CHUNK - 1, CHUNK, 20):
        grads = torch.autograd.grad(before[:, :t].sum(), inputs, retain_graph=True)
        assert all(not bool(grad[:, t:].any()) for grad in grads)
        mixed = Case(9, 2, 37, kind, dtype=torch.float32)
        for name in mixed.tensors:
            mixed.tensors[name] = torch.cat([first.tensors[name][:, :t], other.tensors[name][:, t:]], 1)
        assert torch.equal(mixed.call()["output"][:, :t], before[:, :t])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_independent_to_the_last_bit(kind: tuple[str, str]) -> None:
    first, other = (Case(seed, 2, 20, kind, dtype=torch.float32) for seed in (11, 12))
    expected = first.with_gradients(first.call())
    with torch.no_grad():
        for name, x in first.tensors.items():
            x[1] = other.tensors[name][1]
    actual = first.with_gradients(first.call())
    assert all(torch.equal(actual[name][0], expected[name][0]) for name in expected)
    assert not torch.equal(actual["output"][1], expected["output"][1])


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: tuple[str, str]) -> None:
    case = Case(13, 1, 5, kind, (2, 1, 1), num_states=1)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        case.tensors = dict(zip(case.tensors, tensors, strict=True))
        return tuple(case.call(chunk_size=2).values())

    assert torch.autograd.gradcheck(function, list(case.tensors.values()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decay", [20.0, 300.0, torch.inf])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[0] != "none"])
def test_strong_decay_neither_overflows_nor_loses_the_gradient(
    kind: tuple[str, str], decay: float, dtype: torch.dtype
) -> None:
    case = Case(14, 2, 40, kind, num_states=2, dtype=dtype)
    with torch.no_grad():
        case.tensors["g"][:] = -decay
        case.tensors["g"][:, 10:15] = 0.0  # no decay between strong ones
    results = [case.with_gradients(case.call(name, chunk_size=64)) for name in ("torch", "reference")]
    compare(*results, 1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("keys", ["equal", "zero", "random"])
def test_hard_corrections(keys: str, beta: float) -> None:
    for kind in KINDS[:3]:
        case = Case(15, 1, 70, kind, num_states=1, dtype=torch.float32, decay=0.001)
        with torch.no_grad():
            case.tensors["beta"][:] = beta
            if keys == "equal":
                case.tensors["k"][:] = case.tensors["k"][:, :1].clone()
            elif keys == "zero":
                case.tensors["k"][:] = 0
        results = [case.with_gradients(case.call(name, chunk_size=64)) for name in ("torch", "reference")]
        compare(*results, 1e-4)
        assert all(bool(torch.isfinite(x).all()) for x in results[0].values())


@pytest.mark.parametrize("size", [1, 2, 64])
def test_inverse_where_powers_would_explode(size: int) -> None:
    # Equal keys and beta = 2: powers of L reach 1e18 and more, its inverse stays within -2 and 2.
    lower = 2 * torch.ones(3, size, size).tril(-1)
    inverse = unit_lower_inverse(lower)
    expected = torch.linalg.inv(lower.double() + torch.eye(size, dtype=torch.float64))
    assert_close("inverse", inverse, expected.float(), 1e-6)
    assert not inverse.triu(1).any()


@pytest.mark.parametrize("kind", KINDS)
def test_long_bfloat16_stays_finite(kind: tuple[str, str]) -> None:
    case = Case(16, 1, 100_000, kind, (1, 1, 1), dtype=torch.bfloat16, decay=0.001)
    results = case.with_gradients(case.call(chunk_size=64))
    assert results["output"].dtype == torch.bfloat16
    assert results["memory"].dtype == torch.float32
    assert all(bool(torch.isfinite(x).all()) for x in results.values())


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_accumulates_in_float32(kind: tuple[str, str]) -> None:
    case = Case(17, 2, 150, kind, dtype=torch.bfloat16, decay=0.02)
    ours, definition = (case.with_gradients(case.call(name)) for name in ("torch", "reference"))
    exact = Case(17, 2, 150, kind)
    exact.tensors = {name: x.detach().double().requires_grad_() for name, x in case.tensors.items()}
    truth = exact.with_gradients(exact.call("reference"))
    for name, expected in truth.items():
        error, allowed = (
            float((x[name].double() - expected).detach().abs().max()) for x in (ours, definition)
        )
        # the last term is the rounding of float32 sums, which the definition takes in another order
        factor = 3 if name.startswith("d ") else 2
        assert error <= factor * allowed + 1e-5 * float(expected.detach().abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_empty_calls_return_the_state(backend: str, kind: tuple[str, str]) -> None:
    case = Case(18, 2, 0, kind, (2, 2, 4), num_states=2)
    results = case.with_gradients(case.call(backend))
    assert results["output"].shape == (2, 0, 4, 3)
    assert torch.equal(results["memory"], case.tensors["memory"])
    assert bool(results["d memory"].any())


@pytest.mark.parametrize("num_tokens", [1, 20])
def test_the_given_state_is_left_alone(num_tokens: int) -> None:
    for kind in KINDS:
        case = Case(19, 2, num_tokens, kind, num_states=2)
        kept = {name: x.detach().clone() for name, x in case.tensors.items()}
        case.with_gradients(case.call())
        assert all(torch.equal(kept[name], x) for name, x in case.tensors.items())


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_round_the_sums(kind: tuple[str, str]) -> None:
    case = Case(20, 1, 20, kind, dtype=torch.float32)
    plain = case.with_gradients(case.call())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = case.with_gradients(case.call())
    compare(inside, plain, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [("head", "delta"), ("channel", "delta")])
def test_compiles_without_a_break(kind: tuple[str, str]) -> None:
    case = Case(21, 2, 7, kind, dtype=torch.float32)

    def function(tensors: dict[str, Tensor]) -> Tensor:
        return linear_attention(**tensors, **{**case.options, "chunk_size": 4})[0]

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [case.with_gradients({"output": f(case.tensors)}) for f in (compiled, function)]
    compare(*results, 1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "hebb"}, "rule must be 'additive' or 'delta', got 'hebb'"),
        ({"normalize": True}, "which the delta rule does not keep"),
        ({"g": R(2, 6, 2, 3)}, r"g must have shape \(2, 6, 2\).*key width 5.*got \(2, 6, 2, 3\)"),
        ({"g": R(2, 6, 2, 5) + 0.5}, "at most 0, got a maximum of 0.5"),
        ({"beta": R(2, 6, 3)}, r"beta must have shape \(2, 6, 2\).*got \(2, 6, 3\)"),
        ({"beta": R(2, 6, 2) - 0.1}, r"must lie in \[0, 2\], got -0.1 to -0.1"),
        ({"beta": R(2, 6, 2) + 2.5}, r"must lie in \[0, 2\], got 2.5 to 2.5"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], message: str) -> None:
    case = Case(22, 2, 6, ("channel", "delta"))
    with pytest.raises(ValueError, match=message):
        linear_attention(**{**case.tensors, "rule": "delta", **arguments})


def test_beta_of_grouped_values_cannot_be_normalised() -> None:
    case = Case(23, 1, 4, ("none", "additive"), (2, 2, 4), normalize=True)
    with pytest.raises(ValueError, match="as many key heads as value heads"):
        case.call()
