"""Depthwise causal convolution: the shifted form against the definition and torch's convolution."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memzoo.kernels import causal_conv
from memzoo.testing import assert_close


def tensors(
    rows: int, num_tokens: int, kernel_size: int, num_tails: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(10 * num_tokens + kernel_size)
    shapes = ((rows, num_tokens, 5), (5, kernel_size), (5,), (num_tails, kernel_size - 1, 5))
    return [
        torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes
    ]


def everything(y: Tensor, tail: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    total = (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).sin()).sum() + tail.square().sum()
    grads = torch.autograd.grad(total, inputs, allow_unused=True)
    return [y, tail, *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True))]


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 20])
@pytest.mark.parametrize("kernel_size", [1, 2, 4])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_dense_equals_the_definition(num_tokens: int, kernel_size: int, activation: str | None) -> None:
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        x, weight, bias, tail = inputs = tensors(2, num_tokens, kernel_size, 2, dtype)
        results = [
            everything(*causal_conv(x, weight, bias, activation=activation, tail=tail, backend=name), inputs)
            for name in ("torch", "reference")
        ]
        for i, (actual, expected) in enumerate(zip(*results, strict=True)):
            assert_close(f"tensor {i}", actual, expected, bound)


def test_a_row_without_sequences() -> None:
    x, weight, bias, tail = tensors(1, 0, 4, 0)
    y, last = causal_conv(x, weight, bias, tail=tail, cu_seqlens=torch.tensor([0]))
    assert y.shape == (1, 0, 5)
    assert last.shape == (0, 3, 5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_equals_the_convolution_of_torch(backend: str) -> None:
    x, weight, bias, _ = tensors(2, 20, 4, 2)
    expected = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), weight[:, None], bias, groups=5).transpose(1, 2)
    y, tail = causal_conv(x, weight, bias, backend=backend)
    assert_close("y", y, expected, 1e-12)
    assert torch.equal(tail, x[:, -3:])


@pytest.mark.parametrize("cuts", [[10, 10], [1, 1, 0, 2, 16], [19, 1]])
def test_any_split_equals_the_whole(cuts: list[int]) -> None:
    x, weight, bias, tail = tensors(2, 20, 4, 2)
    whole, last = causal_conv(x, weight, bias, activation="silu", tail=tail)
    pieces = []
    for part in x.split(cuts, dim=1):
        y, tail = causal_conv(part, weight, bias, activation="silu", tail=tail)
        pieces.append(y)
    assert_close("y", torch.cat(pieces, 1), whole, 1e-12)
    assert torch.equal(tail, last)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("kernel_size", [1, 4])
def test_packed_equals_separate(backend: str, kernel_size: int) -> None:
    x, weight, bias, tail = inputs = tensors(1, 12, kernel_size, 4)
    bounds = [0, 2, 2, 9, 12]
    y, last = causal_conv(x, weight, bias, tail=tail, cu_seqlens=torch.tensor(bounds), backend=backend)
    separate = [
        causal_conv(x[:, a:b], weight, bias, tail=tail[n : n + 1], backend=backend)
        for n, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
    ]
    expected = everything(
        *(torch.cat(p, dim) for p, dim in zip(zip(*separate, strict=True), (1, 0), strict=True)), inputs
    )
    for actual, wanted in zip(everything(y, last, inputs), expected, strict=True):
        assert_close("packed", actual, wanted, 1e-12)


def test_a_short_sequence_shifts_its_tail() -> None:
    x = torch.arange(1.0, 3.0).view(1, 2, 1)
    tail = torch.tensor([[[7.0], [8.0], [9.0]]])
    _, last = causal_conv(x, torch.ones(1, 4), tail=tail)
    assert last.flatten().tolist() == [9.0, 1.0, 2.0]
    _, last = causal_conv(x[:, :0], torch.ones(1, 4), tail=tail)
    assert torch.equal(last, tail)
    _, last = causal_conv(x, torch.ones(1, 4))
    assert last.flatten().tolist() == [0.0, 1.0, 2.0]


def test_the_tail_does_not_keep_the_row_alive() -> None:
    x, weight, _, _ = tensors(1, 12, 4, 1)
    for cu_seqlens in (None, torch.tensor([0, 12])):
        _, tail = causal_conv(x, weight, cu_seqlens=cu_seqlens)
        assert tail.untyped_storage().nbytes() == tail.numel() * tail.element_size()


def test_nothing_passes_a_boundary_or_back_in_time() -> None:
    x, weight, bias, _ = tensors(1, 12, 4, 1, torch.float32)
    y, _ = causal_conv(x, weight, bias, cu_seqlens=torch.tensor([0, 5, 12]))
    assert not torch.autograd.grad(y[:, 5:].sum(), x, retain_graph=True)[0][:, :5].any()
    assert not torch.autograd.grad(y[:, :5].sum(), x)[0][:, 5:].any()
    poisoned = torch.cat([torch.full_like(x[:, :5], float("nan")), x[:, 5:]], 1)
    assert torch.equal(
        causal_conv(poisoned, weight, bias, cu_seqlens=torch.tensor([0, 5, 12]))[0][:, 5:], y[:, 5:]
    )
    changed = torch.cat([x[:, :7], 3 * x[:, 7:]], 1)
    assert torch.equal(causal_conv(changed, weight, bias)[0][:, :7], causal_conv(x, weight, bias)[0][:, :7])


def test_gradcheck() -> None:
    inputs = tensors(1, 6, 3, 2)

    def function(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv(
            x, weight, bias, activation="silu", tail=tail, cu_seqlens=torch.tensor([0, 1, 6]), backend="torch"
        )

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("packed", [False, True])
def test_bfloat16_sums_in_float32(packed: bool) -> None:
    x, weight, bias, tail = tensors(1, 40, 4, 1, torch.bfloat16)
    cu_seqlens = torch.tensor([0, 40]) if packed else None
    y, last = causal_conv(x, weight, bias, activation="silu", tail=tail, cu_seqlens=cu_seqlens)
    exact, _ = causal_conv(*(t.double() for t in (x, weight, bias)), activation="silu", tail=tail.double())
    assert y.dtype == last.dtype == torch.bfloat16
    assert torch.equal(y, exact.float().bfloat16())


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4, 1e-30])
def test_extreme_inputs_stay_finite(value: float) -> None:
    x = torch.full((1, 8, 5), value, dtype=torch.bfloat16, requires_grad=True)
    y, _ = causal_conv(x, torch.full((5, 4), 0.5, dtype=torch.bfloat16), activation="silu")
    assert bool(torch.isfinite(y).all())
    assert bool(torch.isfinite(torch.autograd.grad(y.float().sum(), x)[0]).all())


@pytest.mark.slow
def test_compiles_without_a_break() -> None:
    x, weight, bias, _ = inputs = tensors(2, 9, 4, 2, torch.float32)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv(x, weight, bias, activation="silu")

    results = [
        everything(*f(x, weight, bias), inputs[:3])
        for f in (torch.compile(function, fullgraph=True), function)
    ]
    for actual, expected in zip(*results, strict=True):
        assert_close("compiled", actual, expected, 1e-5)


X, W = torch.zeros(2, 6, 5), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, r"x must have shape \(B, T, D\), got \(6, 5\)"),
        ({"weight": W[:4]}, r"weight must have shape \(5, K\)"),
        ({"weight": W[:, :0]}, "K at least 1"),
        ({"bias": W}, r"bias must have shape \(5,\)"),
        ({"activation": "gelu"}, "activation must be None or"),
        ({"tail": X[:, :2]}, r"tail must have shape \(2, 3, 5\)"),
        ({"tail": X[:1, :3]}, r"tail must have shape \(2, 3, 5\)"),
        ({"tail": X[:, :3].double()}, "share one dtype"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "batch size must be 1"),
        ({"backend": "sdpa"}, "is not a backend of causal_conv"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_conv(**{"x": X, "weight": W, **arguments})
