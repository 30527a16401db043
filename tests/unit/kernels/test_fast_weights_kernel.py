"""The fast-weight memory: chunks against the definition, any split, packing, gradients, causality, errors."""

import itertools

import pytest
import torch
from torch import Tensor

from memzoo.kernels import (
    FastWeightState,
    empty_fast_weights,
    fast_weight_scan,
    fast_weight_shapes,
    fast_weight_step,
    newton_schulz,
    unpack_fast_weights,
)
from memzoo.kernels.backend import available_backends
from memzoo.testing import assert_close

needs_triton = pytest.mark.skipif(
    "triton" not in available_backends("fast_weight_scan"), reason="Triton is made for Linux only"
)

HEADS, WIDTH, HIDDEN, CHUNK = 2, 5, 6, 4
CONFIGS = {
    "internal": {},
    "post, l2": {"fast_norm": "post", "loss": "l2"},
    "pre, mlp": {"fast_norm": "pre", "net": "mlp"},
    "none, linear, sgd, l2": {"fast_norm": "none", "net": "linear", "optimizer": "sgd", "loss": "l2"},
    "clipped, mlp, l2, no residual": {"net": "mlp", "loss": "l2", "max_grad_norm": 0.3, "residual": False},
    "muon, post": {"fast_norm": "post", "optimizer": "muon", "residual": False},
    "muon without momentum, pre": {"fast_norm": "pre", "optimizer": "muon", "has_momentum": False},
    "detached norms, linear": {"net": "linear", "detach_norm": True},
    "truncated": {"bptt_chunks": 2},
}
# what random splits and packing have to tell apart
SPLIT_CONFIGS = ["internal", "pre, mlp", "none, linear, sgd, l2", "muon, post", "truncated"]


class Case:
    """Random arguments of one call, all wanting a gradient."""

    def __init__(
        self,
        rows: int,
        num_tokens: int,
        *,
        dtype: torch.dtype = torch.float64,
        value_width: int = WIDTH,
        has_momentum: bool | None = None,
        net: str = "swiglu",
        seed: int = 0,
        **options: object,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        shape = (rows, num_tokens, HEADS)
        shapes = fast_weight_shapes(net, WIDTH, HIDDEN, value_width)
        unit = torch.nn.functional.normalize
        given = {
            "q": unit(random(*shape, WIDTH), dim=-1),
            "k": unit(random(*shape, WIDTH), dim=-1),
            "v": random(*shape, value_width),
            "rates": 0.2 * random(*shape, len(shapes)).sigmoid(),
            "momentum": random(*shape).sigmoid(),
        }
        if has_momentum is False or options.get("optimizer") == "sgd":
            del given["momentum"]
        self.tokens = {name: x.to(dtype).requires_grad_() for name, x in given.items()}
        self.weights = [(random(HEADS, *s) / s[1] ** 0.5).requires_grad_() for s in shapes]
        self.options = {"net": net, "chunk_size": CHUNK, **options}

    def call(
        self, backend: str = "torch", *, piece: slice = slice(None), **more: object
    ) -> tuple[Tensor, FastWeightState]:
        given = {"momentum": None} | {name: x[:, piece] for name, x in self.tokens.items()}
        return fast_weight_scan(
            **given, weights=self.weights, return_state=True, backend=backend, **{**self.options, **more}
        )

    def state(self, num_tokens: int, *, seed: int = 5) -> FastWeightState:
        """A state in the middle of a chunk, cut off from what made it."""
        past = Case(len(self.tokens["q"]), num_tokens, seed=seed, **self._kind())
        past.weights = self.weights
        return parts_wanting_gradients(past.call()[1])

    def _kind(self) -> dict:
        has_momentum = "momentum" in self.tokens
        return {**self.options, "has_momentum": has_momentum, "value_width": self.tokens["v"].shape[-1]}

    def results(self, out: Tensor, state: FastWeightState, *also: Tensor) -> dict[str, Tensor]:
        """Output, state, and the gradients of a random function of both by all inputs and `also`."""
        generator = torch.Generator().manual_seed(99)
        ends = {"output": out} | {n: x for n, x in state._asdict().items() if x is not None}
        drawn = {n: torch.randn(x.shape, generator=generator, dtype=torch.float64) for n, x in ends.items()}
        total = sum((x * drawn[n].to(x.dtype)).sum() for n, x in ends.items() if x.requires_grad)
        names = [*self.tokens, *(f"weights {i}" for i in range(len(self.weights)))]
        leaves = [*self.tokens.values(), *self.weights]
        names, leaves = names + [f"state {i}" for i in range(len(also))], leaves + list(also)
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        filled = (torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))
        return ends | {f"grad {name}": grad for name, grad in zip(names, filled, strict=True)}


def parts_wanting_gradients(state: FastWeightState) -> FastWeightState:
    return FastWeightState(
        *(x.detach().requires_grad_() if x is not None and x.is_floating_point() else x for x in state)
    )


def leaves_of(state: FastWeightState | None) -> list[Tensor]:
    return [] if state is None else [x for x in state if x is not None and x.requires_grad]


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert_close(name, x, expected[name], bound)


def make(name: str, rows: int, num_tokens: int, **more: object) -> Case:
    return Case(rows, num_tokens, **{**CONFIGS[name], **more})


@pytest.mark.parametrize("num_seen", [0, 6])
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 11])
@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_and_single_tokens_equal_the_definition(name: str, num_tokens: int, num_seen: int) -> None:
    case = make(name, 2, num_tokens)
    state = case.state(num_seen) if num_seen else None
    found = [
        case.results(*case.call(backend, initial_state=state), *leaves_of(state))
        for backend in ("torch", "reference")
    ]
    compare(*found, 1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_recomputed_chunks_have_the_gradients_of_kept_ones(name: str) -> None:
    case = make(name, 2, 33, value_width=WIDTH)
    state = case.state(6)
    found = [
        case.results(*case.call(recompute=recompute, initial_state=state), *leaves_of(state))
        for recompute in (True, False)
    ]
    compare(*found, 1e-12)


def test_values_may_be_wider_than_keys_without_a_residual() -> None:
    for net in ("linear", "mlp", "swiglu"):
        case = Case(1, 9, net=net, residual=False, value_width=3)
        compare(case.results(*case.call()), case.results(*case.call("reference")), 1e-9)
    with pytest.raises(ValueError, match="residual=True needs values as wide as keys, got widths 3 and 5"):
        Case(1, 2, value_width=3).call()


@pytest.mark.parametrize("name", SPLIT_CONFIGS)
def test_a_call_may_be_cut_anywhere(name: str) -> None:
    num_tokens = 26
    case = make(name, 2, num_tokens)
    whole = case.results(*case.call())
    generator = torch.Generator().manual_seed(3)
    splits = [list(range(num_tokens + 1)), [0, 0, num_tokens], [0, CHUNK, 2 * CHUNK, 25, 26, 26]]
    for _ in range(4):
        cuts = torch.randint(0, num_tokens + 1, (5,), generator=generator).tolist()
        splits.append(sorted([0, num_tokens, *cuts]))
    for cuts in splits:
        pieces, state = [], None
        for start, end in itertools.pairwise(cuts):
            out, state = case.call(piece=slice(start, end), initial_state=state)
            pieces.append(out)
        compare(case.results(torch.cat(pieces, 1), state), whole, 1e-10)


@pytest.mark.parametrize("name", SPLIT_CONFIGS)
def test_packed_sequences_are_those_alone(name: str) -> None:
    bounds = [0, 3, 3, 17, 18, 21]  # two of equal length apart, one empty
    case = make(name, 1, 21)
    packed = case.results(*case.call(cu_seqlens=torch.tensor(bounds)))
    alone = [case.call(piece=slice(*ends)) for ends in itertools.pairwise(bounds)]
    columns = zip(*(state for _, state in alone), strict=True)
    joined = FastWeightState(*(None if x[0] is None else torch.cat(x) for x in columns))
    out = torch.cat([out for out, _ in alone], 1)
    compare(packed, case.results(out, joined), 1e-12)
    reference = case.results(*case.call("reference", cu_seqlens=torch.tensor(bounds)))
    compare(packed, reference, 1e-9)


@pytest.mark.parametrize("name", SPLIT_CONFIGS)
def test_rows_may_stand_at_different_tokens_of_their_chunks(name: str) -> None:
    case = make(name, 4, 6)
    _, whole = make(name, 4, 9, seed=5).call()
    parts = [make(name, 4, 9, seed=5) for _ in range(4)]
    past = [p.call(piece=slice(0, n))[1] for p, n in zip(parts, (3, 9, 0, 7), strict=True)]
    columns = zip(*past, strict=True)
    rows = (None if c[0] is None else torch.stack([x[n] for n, x in enumerate(c)]) for c in columns)
    state = parts_wanting_gradients(FastWeightState(*rows))
    assert state.num_tokens.tolist() == [3, 9, 0, 7]
    assert whole.num_tokens.tolist() == [9] * 4
    many = case.results(*case.call(initial_state=state), *leaves_of(state))
    compare(many, case.results(*case.call("reference", initial_state=state), *leaves_of(state)), 1e-9)
    pieces, after = [], state
    for t in range(6):
        token = {name: x[:, t] for name, x in case.tokens.items()}
        out, after = fast_weight_step(
            **({"momentum": None} | token), weights=case.weights, state=after, **case.options
        )
        pieces.append(out)
    compare(case.results(torch.stack(pieces, 1), after, *leaves_of(state)), many, 1e-10)


def test_gradients_agree_with_finite_differences() -> None:
    case = Case(1, 6, chunk_size=2)
    state = case.state(3)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        tokens, weights, parts = tensors[:5], tensors[5:8], tensors[8:]
        carried = FastWeightState(parts[0], parts[1], state.num_tokens, *parts[2:])
        out, after = fast_weight_scan(
            *tokens, weights, initial_state=carried, return_state=True, **case.options
        )
        return out, after.weights, after.momentum, after.pending, after.momentum_sum

    inputs = (*case.tokens.values(), *case.weights, *leaves_of(state))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


def test_writing_back_to_the_learned_net_sums_over_rows() -> None:
    case = Case(3, 10)
    rows = [Case(3, 10) for _ in range(3)]
    whole = torch.autograd.grad(case.call()[0].square().sum(), case.weights)
    parts = [torch.autograd.grad(c.call()[0][n].square().sum(), c.weights) for n, c in enumerate(rows)]
    for total, *own in zip(whole, *parts, strict=True):
        assert_close("weights", total, sum(own), 1e-12)


def test_internal_and_post_normalisation_differ_in_their_reads_only() -> None:
    case = Case(2, 4 * CHUNK)
    shapes = fast_weight_shapes("swiglu", WIDTH, HIDDEN)
    internal, post = (case.call(fast_norm=name)[1] for name in ("internal", "post"))
    assert_close("momentum", internal.momentum, post.momentum, 1e-4)
    pairs = zip(unpack_fast_weights(internal.weights, shapes), case.weights, strict=True)
    for matrix, (raw, initial) in zip(unpack_fast_weights(post.weights, shapes), pairs, strict=True):
        normal = raw / raw.norm(dim=-1, keepdim=True) * initial.norm(dim=-1, keepdim=True)
        assert_close("weights", normal, matrix, 1e-4)
        assert (raw - matrix).abs().max() > 0.01


def test_an_open_chunk_and_later_tokens_change_nothing() -> None:
    case = Case(2, 11, dtype=torch.float32)
    first = case.call()[0]
    with torch.no_grad():
        for x in case.tokens.values():
            x[:, 6:] += 3
    second = case.call()[0]
    assert torch.equal(first[:, :6], second[:, :6])
    assert not torch.equal(first[:, 6], second[:, 6])
    # token 5 wrote into the chunk that token 7 reads in, token 8 is the first to see it
    grad = torch.autograd.grad(second[:, 7].sum(), case.tokens["v"], retain_graph=True)[0]
    assert grad[:, :4].abs().min() > 0
    assert not grad[:, 4:].any()
    grad = torch.autograd.grad(second[:, 8].sum(), case.tokens["v"])[0]
    assert grad[:, 4:8].abs().min() > 0
    assert not grad[:, 8:].any()


@pytest.mark.parametrize("num_tokens", [0, 1, CHUNK - 1, CHUNK, 6 * CHUNK])
def test_the_state_has_one_layout_and_size(num_tokens: int) -> None:
    case = Case(2, num_tokens, dtype=torch.bfloat16)
    out, state = case.call()
    empty = empty_fast_weights(case.weights, 2, has_momentum=True, dtype=torch.bfloat16)
    assert out.shape == (2, num_tokens, HEADS, WIDTH)
    assert out.dtype == torch.bfloat16
    for x, expected in zip(state, empty, strict=True):
        assert x.shape == expected.shape
        assert x.dtype == expected.dtype
    if num_tokens == 0:
        assert all(torch.equal(x, expected) for x, expected in zip(state, empty, strict=True))
    if num_tokens % CHUNK == 0:
        assert not state.pending.any()
        assert not state.momentum_sum.any()


def test_a_full_last_chunk_is_applied() -> None:
    case = Case(1, CHUNK)
    _, state = case.call()
    assert (state.weights - empty_fast_weights(case.weights, 1, has_momentum=True).weights).any()


def test_the_state_given_is_not_changed() -> None:
    case = Case(2, 3 * CHUNK)
    state = case.state(2)
    kept = [x.clone() for x in state]
    for tokens in (slice(0, 1), slice(None)):
        with torch.no_grad():
            case.call(piece=tokens, initial_state=state)
        assert all(torch.equal(x, y) for x, y in zip(state, kept, strict=True))


def test_float32_and_bfloat16() -> None:
    case = Case(2, 3 * CHUNK + 1, dtype=torch.float32)
    compare(case.results(*case.call()), case.results(*case.call("reference")), 1e-4)
    half = Case(2, 40, dtype=torch.bfloat16)
    truth = Case(2, 40)
    for name, x in truth.tokens.items():
        x.data.copy_(half.tokens[name].detach())
    expected = truth.call("reference")[0]
    allowed = 2 * (half.call("reference")[0] - expected).abs().max() + 1e-6
    assert (half.call()[0] - expected).abs().max() <= allowed


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_autocast_rounds_nothing(num_tokens: int) -> None:
    case = Case(2, num_tokens, dtype=torch.float32)
    state = empty_fast_weights(case.weights, 2, has_momentum=True, dtype=torch.float32)
    plain = case.results(*case.call(initial_state=state))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, after = case.call(initial_state=state)
    compare(case.results(out, after), plain, 0.0)


@pytest.mark.parametrize("optimizer", ["momentum", "muon"])
def test_tokens_without_rates_or_keys_write_nothing_and_stay_finite(optimizer: str) -> None:
    for name in ("rates", "k"):
        case = Case(1, 3 * CHUNK, optimizer=optimizer, max_grad_norm=0.5)
        with torch.no_grad():
            case.tokens[name].zero_()
        out, state = case.call()
        for label, x in case.results(out, state).items():
            assert torch.isfinite(x).all(), label
        if name == "rates":
            assert not state.momentum.any()


def test_gradients_end_at_the_cut_of_truncated_backpropagation() -> None:
    case = Case(1, 4 * CHUNK, bptt_chunks=2)
    out, _ = case.call()
    grad = torch.autograd.grad(out[:, -1].sum(), case.tokens["v"])[0]
    assert not grad[:, : 2 * CHUNK].any()
    assert grad[:, 2 * CHUNK : 3 * CHUNK].abs().min() > 0
    whole = Case(1, 4 * CHUNK)
    grad = torch.autograd.grad(whole.call()[0][:, -1].sum(), whole.tokens["v"])[0]
    assert grad[:, : 3 * CHUNK].abs().min() > 0
    assert torch.equal(out, whole.call()[0])


def test_the_orthogonal_factor_of_newton_schulz() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 8, 20), (2, 20, 8)):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        u, values, vh = torch.linalg.svd(newton_schulz(x), full_matrices=False)
        assert values.min() > 0.9
        assert values.max() < 1.16
        a, _, b = torch.linalg.svd(x, full_matrices=False)
        assert_close("directions", u @ vh, a @ b, 1e-10)
    one = [(3.4445, -4.7750, 2.0315)]
    twice = newton_schulz(newton_schulz(x, 1, coefficients=one), 1, coefficients=one)
    assert twice.shape == x.shape
    assert newton_schulz(x.float(), dtype=torch.bfloat16).dtype == torch.float32
    for arguments, message in (
        ((torch.zeros(3),), r"must have shape \(..., A, B\)"),
        ((x, -1), "steps must not be negative"),
        ((x, 6), "steps must be at most the 5 coefficients"),
    ):
        with pytest.raises(ValueError, match=message):
            newton_schulz(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"net": "swigl"}, "net must be one of linear, mlp, swiglu, got 'swigl'. Did you mean 'swiglu'"),
        ({"fast_norm": "inner"}, "fast_norm must be one of internal, post, pre, none, got 'inner'"),
        ({"loss": "mse"}, "loss must be one of dot, l2"),
        ({"optimizer": "adam"}, "optimizer must be one of sgd, momentum, muon"),
        ({"net": "mlp"}, r"weights must hold 2 matrices for net='mlp' \(in, out\), got 3"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0"),
        ({"bptt_chunks": 0}, "bptt_chunks must be at least 1"),
        ({"ns_steps": 6}, "ns_steps must be from 0 to 5, got 6"),
        ({"optimizer": "sgd"}, "has no momentum"),
        ({"momentum": None}, 'optimizer="momentum" needs momentum'),
        ({"momentum": torch.zeros(2, 6)}, r"momentum must have shape \(2, 6, 2\)"),
        ({"rates": torch.zeros(2, 6, 2, 2)}, r"rates must have shape \(2, 6, 2, 3\)"),
        ({"k": torch.zeros(2, 5, 2, 5)}, "q and k must have one shape"),
        ({"v": torch.zeros(2, 6, 2, 5).double()}, "share one dtype"),
        ({"backend": "fla"}, "is not a backend of fast_weight_scan"),
        (
            {"weights": [torch.zeros(1, 6, 5)] * 3},
            r"the matrix 'gate' in weights must have shape \(2, 6, 5\)",
        ),
        (
            {"weights": [torch.zeros(2, 6, 5), torch.zeros(2, 7, 5), torch.zeros(2, 5, 6)]},
            r"the matrix 'up' in weights must have shape \(2, 6, 5\)",
        ),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], message: str) -> None:
    case = Case(2, 6, dtype=torch.float32)
    given = {name: x.detach() for name, x in case.tokens.items()} | {"weights": case.weights}
    with pytest.raises(ValueError, match=message):
        fast_weight_scan(**{**given, **case.options, **arguments})


def test_a_state_of_another_call_is_refused() -> None:
    case = Case(2, 3)
    state = case.state(2)
    for wrong, message in (
        (state._replace(weights=state.weights[:1]), r"weights must have shape \(2, 2, 90\)"),
        (state._replace(pending=state.pending.float()), "dtype torch.float64, got .* torch.float32"),
        (state._replace(momentum=None), "a call with momentum cannot continue a state that has no momentum"),
        (state._replace(num_tokens=state.num_tokens[:1]), "num_tokens must hold 2 integers on the CPU"),
    ):
        with pytest.raises(ValueError, match=message):
            case.call(initial_state=wrong)
    plain = Case(2, 3, optimizer="sgd")
    with pytest.raises(ValueError, match="a call without momentum cannot continue a state that has momentum"):
        plain.call(initial_state=state)
    with pytest.raises(ValueError, match="flat must have 90 columns"):
        unpack_fast_weights(state.weights[..., 1:], fast_weight_shapes("swiglu", WIDTH, HIDDEN))
    with pytest.raises(ValueError, match="net must be one of"):
        fast_weight_shapes("cnn", 4)


@needs_triton
@pytest.mark.parametrize("fast_norm", ["internal", "post", "none"])
@pytest.mark.parametrize("has_momentum", [True, False])
def test_triton_agrees_with_the_definition(fast_norm: str, has_momentum: bool) -> None:
    """Chunks of more tokens than it holds at once, an open one in front and behind, and gradients."""
    options = {"fast_norm": fast_norm, "optimizer": "momentum" if has_momentum else "sgd", "chunk_size": 40}
    case = Case(2, 100, dtype=torch.float32, has_momentum=has_momentum, **options)
    case.weights = [x.detach().float().requires_grad_() for x in case.weights]
    past = Case(2, 7, dtype=torch.float32, has_momentum=has_momentum, seed=5, **options)
    past.weights = case.weights
    state = parts_wanting_gradients(past.call()[1])
    found = [
        case.results(*case.call(backend, initial_state=state), *leaves_of(state))
        for backend in ("triton", "reference")
    ]
    compare(*found, 1e-4)


@needs_triton
def test_triton_covers_packed_rows_and_says_what_it_does_not() -> None:
    bounds = torch.tensor([0, 9, 9, 30])
    case = Case(1, 30, dtype=torch.float32, residual=False, value_width=3)
    with torch.no_grad():
        found, expected = (case.call(name, cu_seqlens=bounds)[0] for name in ("triton", "torch"))
    assert_close("output", found, expected, 1e-5)
    with pytest.raises(ValueError, match="does not cover this call"):
        Case(1, 8, net="mlp", dtype=torch.float32).call("triton")
