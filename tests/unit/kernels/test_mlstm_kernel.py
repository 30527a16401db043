"""mLSTM: the chunked form against the definition, carried states, packed rows, extreme gates, causality."""

import pytest
import torch
from torch import Tensor

from memzoo.kernels import MLSTMState, mlstm
from memzoo.testing import assert_close

CHUNK = 8
NAMES = ("q", "k", "v", "input_gate", "forget_gate")


class Case:
    """Random arguments of one call, all wanting a gradient."""

    def __init__(
        self,
        rows: int,
        num_tokens: int,
        *,
        num_states: int = 0,
        gate: float = 2.0,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        heads = (rows, num_tokens, 2)
        drawn = [
            random(*heads, 5),
            random(*heads, 5),
            random(*heads, 3),
            gate * random(*heads),
            random(*heads),
        ]
        self.tensors = {name: x.to(dtype) for name, x in zip(NAMES, drawn, strict=True)}
        if num_states:
            acc = torch.float64 if dtype == torch.float64 else torch.float32
            self.tensors["memory"] = random(num_states, 2, 5, 3).to(acc)
            self.tensors["normalizer"] = random(num_states, 2, 5).to(acc)
            self.tensors["stabilizer"] = random(num_states, 2).to(acc)
        for x in self.tensors.values():
            x.requires_grad_()

    def call(self, backend: str = "torch", **options: object) -> dict[str, Tensor]:
        given = dict(self.tensors)
        parts = [given.pop(name) for name in ("memory", "normalizer", "stabilizer") if name in given]
        output, final = mlstm(
            **given,
            initial_state=MLSTMState(*parts) if parts else None,
            return_state=True,
            backend=backend,
            **{"chunk_size": CHUNK, **options},
        )
        return {"output": output, **final._asdict()}

    def with_gradients(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """The results and the gradients of a random function of all of them."""
        generator = torch.Generator().manual_seed(99)
        total = sum(
            (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum()
            for x in results.values()
        )
        grads = torch.autograd.grad(total, list(self.tensors.values()))
        return results | {f"grad {name}": grad for name, grad in zip(self.tensors, grads, strict=True)}

    def check(self, bound: float, **options: object) -> None:
        expected = self.with_gradients(self.call("reference", **options))
        for name, actual in self.with_gradients(self.call(**options)).items():
            assert_close(name, actual, expected[name], bound)


@pytest.mark.parametrize("num_states", [0, 2])
@pytest.mark.parametrize("num_tokens", [1, 5, 8, 19])
def test_chunks_and_single_tokens_equal_the_definition(num_tokens: int, num_states: int) -> None:
    Case(2, num_tokens, num_states=num_states).check(1e-9)


def test_packed_rows_with_empty_sequences_equal_the_definition() -> None:
    case = Case(1, 20, num_states=4)
    case.check(1e-9, cu_seqlens=torch.tensor([0, 3, 3, 19, 20]))
    state = case.call(cu_seqlens=torch.tensor([0, 3, 3, 19, 20]))
    for name in ("memory", "normalizer", "stabilizer"):
        assert torch.equal(state[name][1], case.tensors[name][1])


def test_a_larger_eps_has_its_gradient_through_the_stabiliser() -> None:
    Case(2, 19, num_states=2).check(1e-9, eps=0.3)


def test_float32_and_bfloat16() -> None:
    Case(2, 19, num_states=2, dtype=torch.float32).check(1e-4)
    truth = Case(2, 70, num_states=2)
    half = Case(2, 70, num_states=2, dtype=torch.bfloat16)
    for wide, x in zip(truth.tensors.values(), half.tensors.values(), strict=True):
        wide.data.copy_(x.detach())
    expected = truth.call("reference")["output"]
    allowed = 2 * (half.call("reference")["output"] - expected).abs().max() + 1e-6
    assert (half.call()["output"] - expected).abs().max() <= allowed


def test_a_call_may_be_cut_anywhere() -> None:
    case = Case(2, 21)
    whole = case.call()
    pieces, state = [], None
    for start, end in ((0, 6), (6, 7), (7, 7), (7, 18), (18, 21)):
        given = {name: x[:, start:end] for name, x in case.tensors.items()}
        out, state = mlstm(**given, initial_state=state, return_state=True, chunk_size=CHUNK)
        pieces.append(out)
    assert_close("output", torch.cat(pieces, 1), whole["output"], 1e-12)
    for name, part in state._asdict().items():
        assert_close(name, part, whole[name], 1e-12)


def test_later_tokens_change_no_bit_of_earlier_outputs() -> None:
    case = Case(1, 13, dtype=torch.float32)
    first = case.call()["output"]
    with torch.no_grad():
        case.tensors["input_gate"][:, 6] += 30  # one maximum for the chunk would rescale every row
        case.tensors["forget_gate"][:, 6] -= 30
    second = case.call()["output"]
    assert torch.equal(first[:, :6], second[:, :6])
    assert not torch.equal(first[:, 6], second[:, 6])


@pytest.mark.parametrize("value", [-1e4, -90.0, -20.0, 20.0, 1e4])
@pytest.mark.parametrize("gates", [("input_gate",), ("forget_gate",), ("input_gate", "forget_gate")])
def test_extreme_gates_stay_finite(gates: tuple[str, ...], value: float) -> None:
    for num_tokens in (1, 19):
        case = Case(2, num_tokens, num_states=2, dtype=torch.float32)
        with torch.no_grad():
            for gate in gates:
                case.tensors[gate].fill_(value)
        for backend in ("torch", "reference"):
            for name, x in case.with_gradients(case.call(backend)).items():
                assert torch.isfinite(x).all(), f"{name} of {backend}, {num_tokens} tokens"


def test_a_closed_input_gate_writes_nothing() -> None:
    case = Case(1, 9)
    with torch.no_grad():
        case.tensors["input_gate"][:, 4:] = -float("inf")
        case.tensors["forget_gate"][:, 4:] = 1e4
    whole = case.call()
    short, state = mlstm(**{name: x[:, :4] for name, x in case.tensors.items()}, return_state=True)
    for name, part in state._asdict().items():
        assert_close(name, whole[name], part, 1e-12)
    assert_close("output", whole["output"][:, :4], short, 1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": torch.zeros(2, 6, 2, 4)}, "must agree in batch, tokens and heads"),
        ({"v": torch.zeros(2, 6, 1, 3)}, "must agree in batch, tokens and heads"),
        ({"v": torch.zeros(2, 6, 2, 3).double()}, "share one dtype"),
        ({"input_gate": torch.zeros(2, 6)}, r"input_gate must have shape \(2, 6, 2\)"),
        ({"forget_gate": torch.zeros(2, 6, 1)}, r"forget_gate must have shape \(2, 6, 2\)"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"eps": -1.0}, "eps must not be negative"),
        ({"backend": "fla"}, "is not a backend of mlstm"),
        (
            {"initial_state": MLSTMState(torch.zeros(1, 2, 5, 3), torch.zeros(2, 2, 5), torch.zeros(2, 2))},
            r"memory must have shape \(2, 2, 5, 3\)",
        ),
        (
            {
                "initial_state": MLSTMState(
                    torch.zeros(2, 2, 5, 3).double(), torch.zeros(2, 2, 5), torch.zeros(2, 2)
                )
            },
            "must be torch.float32, got memory torch.float64",
        ),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], message: str) -> None:
    given = {name: x.detach() for name, x in Case(2, 6, dtype=torch.float32).tensors.items()}
    with pytest.raises(ValueError, match=message):
        mlstm(**{**given, **arguments})
