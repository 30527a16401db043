"""Test-time training: dual and single forms against the definition, cuts, packed rows, causality."""

import pytest
import torch
from torch import Tensor

from memzoo.kernels import TTTState, ttt
from memzoo.testing import assert_close

SIZE, HEADS, WIDTH = 4, 2, 3
TOKENS = ("q", "k", "v", "rate")
LINEAR, MLP = ((3, 3), (1, 3)), ((3, 5), (1, 5), (5, 3), (1, 3))
NETS = pytest.mark.parametrize("net", [LINEAR, MLP], ids=["linear", "mlp"])


class Case:
    """Random arguments of one call, all wanting a gradient."""

    def __init__(
        self,
        net: tuple[tuple[int, int], ...],
        rows: int,
        num_tokens: int,
        positions: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        acc = torch.float64 if dtype == torch.float64 else torch.float32

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        heads = (rows, num_tokens, HEADS)
        self.tensors = {name: random(*heads, WIDTH).to(dtype) for name in ("q", "k", "v")}
        self.tensors["rate"] = 0.3 * random(*heads).sigmoid().to(acc)
        self.tensors["reader_rate"] = (random(SIZE).abs() / (1 + torch.arange(SIZE))).to(acc)
        self.tensors["norm_weight"] = (1 + 0.3 * random(HEADS, WIDTH)).to(dtype)
        self.tensors["norm_bias"] = (0.3 * random(HEADS, WIDTH)).to(dtype)
        lead = (len(positions), HEADS)
        read = torch.tensor(positions)[:, None, None, None]
        for index, shape in enumerate(net):
            self.tensors[f"weights {index}"] = 0.5 * random(*lead, *shape).to(acc)
            self.tensors[f"pending {index}"] = (0.1 * read * random(*lead, *shape)).to(acc)
        self.positions = positions
        for x in self.tensors.values():
            x.requires_grad_()

    @property
    def state(self) -> TTTState:
        parts = [
            tuple(x for name, x in self.tensors.items() if name.startswith(kind))
            for kind in ("weights", "pending")
        ]
        return TTTState(parts[0], parts[1], self.positions)

    def call(self, backend: str = "torch", **options: object) -> dict[str, Tensor]:
        given = {name: x for name, x in self.tensors.items() if " " not in name}
        output, state = ttt(**given, state=self.state, return_state=True, backend=backend, **options)
        return {"output": output, **named(state)}

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


def named(state: TTTState) -> dict[str, Tensor]:
    parts = {"weights": state.weights, "pending": state.pending}
    found = {f"{kind} {index}": x for kind, xs in parts.items() for index, x in enumerate(xs)}
    return {**found, "position": torch.tensor(state.position).double()}


@NETS
@pytest.mark.parametrize("positions", [(0, 0), (3, 3), (1, 2)])
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 14])
def test_forms_equal_the_definition(net, positions, num_tokens) -> None:
    Case(net, 2, num_tokens, positions).check(1e-10)


@NETS
def test_packed_rows_with_empty_sequences_equal_the_definition(net) -> None:
    case = Case(net, 1, 26, (2, 3, 0, 1, 0))
    bounds = torch.tensor([0, 1, 1, 18, 22, 26])
    case.check(1e-10, cu_seqlens=bounds)
    found = named(
        ttt(
            **{n: x for n, x in case.tensors.items() if " " not in n},
            state=case.state,
            cu_seqlens=bounds,
            return_state=True,
        )[1]
    )
    for name, x in named(case.state).items():
        assert torch.equal(found[name][1], x[1])


@NETS
def test_a_call_may_be_cut_anywhere(net) -> None:
    case = Case(net, 2, 21, (0, 0))
    whole, pieces, state = case.call(), [], case.state
    shared = {name: case.tensors[name] for name in ("reader_rate", "norm_weight", "norm_bias")}
    for start, end in ((0, 6), (6, 7), (7, 7), (7, 18), (18, 21)):
        given = {name: case.tensors[name][:, start:end] for name in TOKENS}
        out, state = ttt(**given, **shared, state=state, return_state=True)
        pieces.append(out)
    assert_close("output", torch.cat(pieces, 1), whole["output"], 1e-12)
    for name, part in named(state).items():
        assert_close(name, part, whole[name], 1e-12)


@NETS
def test_later_tokens_change_no_bit_of_earlier_outputs(net) -> None:
    case = Case(net, 1, 15, (1,), dtype=torch.float32)
    first = case.call()["output"]
    with torch.no_grad():
        for name in ("q", "k", "v"):
            case.tensors[name][:, 9] += 30
    second = case.call()["output"]
    assert torch.equal(first[:, :9], second[:, :9])
    assert not torch.equal(first[:, 9], second[:, 9])


@NETS
def test_float32_bfloat16_and_autocast(net) -> None:
    Case(net, 2, 14, (2, 2), dtype=torch.float32).check(1e-4)
    truth, half = (Case(net, 2, 30, (0, 0), dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    for wide, x in zip(truth.tensors.values(), half.tensors.values(), strict=True):
        wide.data.copy_(x.detach())
    expected = truth.call("reference")["output"]
    allowed = 2 * (half.call("reference")["output"] - expected).abs().max() + 1e-6
    assert (half.call()["output"] - expected).abs().max() <= allowed
    single = Case(net, 2, 14, (2, 2), dtype=torch.float32)
    plain = single.with_gradients(single.call())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = single.with_gradients(single.call())
    for name, x in plain.items():
        assert torch.equal(cast[name], x), name


def num_stored(num_tokens: int) -> int:
    """Numbers that a call keeps for its backward pass."""
    case, sizes = Case(LINEAR, 1, num_tokens, (0,)), []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        case.call()
    return sum(sizes)


def test_the_backward_pass_keeps_no_weights_of_most_mini_batches() -> None:
    more = num_stored(64 * SIZE) - num_stored(16 * SIZE)
    per_token = HEADS * (3 * WIDTH + 1)  # q, k, v and rate
    # weights and what is pending at four more groups of mini-batches, and the index of the outputs
    assert more <= 48 * SIZE * per_token + 2 * 4 * HEADS * (WIDTH + 1) * WIDTH + 48 * SIZE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": torch.zeros(2, 6, 2, 4)}, "must have one shape"),
        ({"v": torch.zeros(2, 6, 2, 3).double()}, "share one dtype"),
        ({"rate": torch.zeros(2, 6)}, r"rate must have shape \(2, 6, 2\)"),
        ({"reader_rate": torch.zeros(0)}, "a rate for each place"),
        ({"norm_bias": torch.zeros(2)}, r"norm_bias must have shape \(2, 3\)"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"backend": "fla"}, "is not a backend of ttt"),
        ({"position": (0, 4)}, "from 0 to 3"),
        ({"position": (0,)}, "must hold 2 integers"),
        ({"weights": ()}, "got 0 tensors"),
        ({"pending": (torch.zeros(2, 2, 3, 3),)}, "state.pending must have the shapes"),
        ({"pending": (torch.zeros(2, 2, 3, 3).double(), torch.zeros(2, 2, 1, 3))}, "must be torch.float32"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], message: str) -> None:
    case = Case(LINEAR, 2, 6, (0, 0), dtype=torch.float32)
    given = {name: x.detach() for name, x in case.tensors.items() if " " not in name}
    of_state = {name: x for name, x in arguments.items() if name in TTTState._fields}
    others = {name: x for name, x in arguments.items() if name not in of_state}
    with pytest.raises(ValueError, match=message):
        ttt(**{**given, "state": case.state._replace(**of_state), **others})
