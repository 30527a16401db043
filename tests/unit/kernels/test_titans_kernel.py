"""The neural memory of Titans: its forms against the definition, cuts, packed rows, causality."""

import pytest
import torch
from torch import Tensor

from memzoo.kernels import TitansState, titans
from memzoo.testing import assert_close

SIZE, HEADS, WIDTH = 4, 2, 3
TOKENS = ("q", "k", "v", "rate", "gates")
DEEP, FLAT = ((1, 3), (3, 5), (5, 3)), ((1, 3), (3, 3))
KINDS = {
    "chunk": (DEEP, {"max_grad_norm": 0.5}),
    "moving base": (DEEP, {"rebase_size": 8, "loss_scale": 0.3}),
    "orthogonal": (((1, 3), (3, 5), (5, 5), (5, 3)), {"orthogonalize": True}),
    "chunk, no momentum": (FLAT, {"use_momentum": False}),
    "token": (DEEP, {"per_token": True}),
    "token, no momentum": (FLAT, {"per_token": True, "use_momentum": False}),
}
ALL = pytest.mark.parametrize("kind", KINDS)


class Case:
    """Random arguments of one call, all wanting a gradient."""

    def __init__(
        self,
        kind: str,
        rows: int,
        num_tokens: int,
        positions: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        net, self.options = KINDS[kind]

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        heads = (rows, num_tokens, HEADS)
        self.tensors = {name: random(*heads, WIDTH).to(dtype) for name in ("q", "k", "v")}
        self.tensors["rate"] = 0.1 * random(*heads).sigmoid().to(acc)
        self.tensors["gates"] = random(*heads, 2).to(acc)
        lead = (len(positions), HEADS)
        read = torch.tensor([n % SIZE for n in positions])
        parts = {"weights": 0.5, "base": 0.5}
        if self.options.get("use_momentum", True):
            parts["momentum"] = 0.1
        for part, scale in parts.items():
            for index, shape in enumerate(net):
                self.tensors[f"{part} {index}"] = scale * random(*lead, *shape).to(acc)
        if not self.options.get("per_token", False):
            for index, shape in enumerate(net):
                self.tensors[f"pending {index}"] = (
                    0.1 * read[:, None, None, None] * random(*lead, *shape)
                ).to(acc)
            self.tensors["gates "] = (read[:, None, None] * random(*lead, 2)).to(acc)
        self.positions = positions
        for x in self.tensors.values():
            x.requires_grad_()

    @property
    def state(self) -> TitansState:
        nets = [
            tuple(x for name, x in self.tensors.items() if name.startswith(f"{part} "))
            for part in ("weights", "base", "momentum", "pending")
        ]
        return TitansState(*nets, self.tensors.get("gates "), self.positions)

    def call(self, backend: str = "torch", **options: object) -> dict[str, Tensor]:
        given = {name: self.tensors[name] for name in TOKENS}
        output, state = self.run(given, self.state, backend=backend, **options)
        return {"output": output, **named(state)}

    def run(self, given: dict[str, Tensor], state: TitansState, **options: object):
        return titans(**given, state=state, chunk_size=SIZE, return_state=True, **{**self.options, **options})

    def with_gradients(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """The results and the gradients of a random function of all of them."""
        generator = torch.Generator().manual_seed(99)
        total = sum(
            (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum()
            for x in results.values()
        )
        grads = torch.autograd.grad(total, list(self.tensors.values()), materialize_grads=True)
        return results | {f"grad {name}": grad for name, grad in zip(self.tensors, grads, strict=True)}

    def check(self, bound: float, **options: object) -> None:
        expected = self.with_gradients(self.call("reference", **options))
        for name, actual in self.with_gradients(self.call(**options)).items():
            assert_close(name, actual, expected[name], bound)


def named(state: TitansState) -> dict[str, Tensor]:
    nets = {part: getattr(state, part) for part in ("weights", "base", "momentum", "pending")}
    found = {f"{part} {index}": x for part, net in nets.items() for index, x in enumerate(net)}
    if state.gates is not None:
        found["gates"] = state.gates
    return {**found, "position": torch.tensor(state.position).double()}


@ALL
@pytest.mark.parametrize(
    ("num_tokens", "positions"),
    [(1, (0, 0)), (1, (3, 2)), (3, (1, 1)), (4, (0, 0)), (4, (1, 2)), (14, (3, 3))],
)
def test_forms_equal_the_definition(kind, num_tokens, positions) -> None:
    Case(kind, 2, num_tokens, positions).check(1e-9)


@ALL
def test_packed_rows_with_empty_sequences_equal_the_definition(kind) -> None:
    case = Case(kind, 1, 26, (2, 3, 0, 1, 0))
    bounds = torch.tensor([0, 1, 1, 18, 22, 26])
    case.check(1e-9, cu_seqlens=bounds)
    found = case.call(cu_seqlens=bounds)
    for name, x in named(case.state).items():
        assert torch.equal(found[name][1], x[1])


@ALL
def test_a_call_may_be_cut_anywhere(kind) -> None:
    case = Case(kind, 2, 21, (0, 0))
    whole, pieces, state = case.call(), [], case.state
    for start, end in ((0, 6), (6, 7), (7, 7), (7, 18), (18, 21)):
        given = {name: case.tensors[name][:, start:end] for name in TOKENS}
        out, state = case.run(given, state)
        pieces.append(out)
    assert_close("output", torch.cat(pieces, 1), whole["output"], 1e-11)
    for name, part in named(state).items():
        assert_close(name, part, whole[name], 1e-11)


@ALL
def test_later_tokens_change_no_bit_of_earlier_outputs(kind) -> None:
    case = Case(kind, 1, 15, (1,), dtype=torch.float32)
    first = case.call()["output"]
    with torch.no_grad():
        for name in TOKENS[:3]:
            case.tensors[name][:, 9] += 30
    second = case.call()["output"]
    assert torch.equal(first[:, :9], second[:, :9])
    assert not torch.equal(first[:, 9], second[:, 9])


@pytest.mark.parametrize("kind", ["moving base", "token"])
def test_float32_bfloat16_and_autocast(kind) -> None:
    Case(kind, 2, 14, (2, 2), dtype=torch.float32).check(1e-4)
    truth, half = (Case(kind, 2, 30, (0, 0), dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    for wide, x in zip(truth.tensors.values(), half.tensors.values(), strict=True):
        wide.data.copy_(x.detach())
    expected = truth.call("reference")["output"]
    allowed = 2 * (half.call("reference")["output"] - expected).abs().max() + 1e-6
    assert (half.call()["output"] - expected).abs().max() <= allowed
    single = Case(kind, 2, 14, (2, 2), dtype=torch.float32)
    plain = single.with_gradients(single.call())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = single.with_gradients(single.call())
    for name, x in plain.items():
        assert torch.equal(cast[name], x), name


@pytest.mark.parametrize("kind", ["chunk", "token", "orthogonal"])
def test_gates_at_their_ends_stay_finite(kind) -> None:
    case = Case(kind, 1, 14, (1,), dtype=torch.float32)
    with torch.no_grad():
        case.tensors["gates"].copy_(torch.where(case.tensors["gates"] > 0, 200.0, -200.0))
        case.tensors["rate"][:, 3:9] = 0
    for name, x in case.with_gradients(case.call()).items():
        assert x.isfinite().all(), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": torch.zeros(2, 6, 2, 4)}, "must have one shape"),
        ({"v": torch.zeros(2, 6, 2, 3).double()}, "share one dtype"),
        ({"rate": torch.zeros(2, 6)}, r"rate must have shape \(2, 6, 2\)"),
        ({"gates": torch.zeros(2, 6, 2)}, r"gates must have shape \(2, 6, 2, 2\)"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"rebase_size": 6}, "must be a multiple of chunk_size 4"),
        ({"loss_scale": 0.0}, "loss_scale must be"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be"),
        ({"per_token": True}, "with gates per token"),
        ({"backend": "fla"}, "is not a backend of titans"),
        ({"position": (0, 4)}, "from 0 to 3"),
        ({"weights": ()}, "got 0 tensors"),
        ({"pending": ()}, "state.pending must have the shapes"),
        ({"gates of state": None}, "state.gates must be of shape"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], message: str) -> None:
    case = Case("chunk", 2, 6, (0, 0), dtype=torch.float32)
    given = {name: case.tensors[name].detach() for name in TOKENS}
    state = case.state
    if "gates of state" in arguments:
        arguments, state = {}, state._replace(gates=None)
    of_state = {name: x for name, x in arguments.items() if name in ("position", "weights", "pending")}
    others = {name: x for name, x in arguments.items() if name not in of_state}
    with pytest.raises(ValueError, match=message):
        titans(**{**given, "state": state._replace(**of_state), "chunk_size": SIZE, **case.options, **others})
