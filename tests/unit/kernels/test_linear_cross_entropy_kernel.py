"""Losses of a linear head: the chunked forms against the definition, their gradients, their memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memzoo.kernels import linear_cross_entropy, linear_divergence
from memzoo.testing import assert_close

Loss = Callable[..., Tensor]
N, V, M = 23, 17, 6
LOSSES = ["cross_entropy", "divergence", "reversed"]


def make(name: str, dtype: torch.dtype = torch.float64, **sizes: int) -> tuple[Loss, Tensor, Tensor]:
    """(loss of hidden and weight, hidden, weight)."""
    n, v, m = (sizes.get(key, default) for key, default in (("n", N), ("v", V), ("m", M)))
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight = draw(n, m).requires_grad_(), draw(v, m).requires_grad_()
    if name == "cross_entropy":
        targets = torch.randint(v, (n,), generator=generator)
        targets[::3] = -100
        return lambda h, w, **options: linear_cross_entropy(h, w, targets, **options), hidden, weight
    teacher = draw(n, 5), draw(v + 2, 5)
    reverse = name == "reversed"
    return (
        lambda h, w, **options: linear_divergence(h, w, *teacher, reverse=reverse, **options),
        hidden,
        weight,
    )


def with_gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [loss, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk_size", [1, 7, N, None])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_chunks_agree_with_the_definition(
    name: str, chunk_size: int | None, dtype: torch.dtype, bound: float
) -> None:
    exact, *inputs = make(name)
    expected = with_gradients(exact(*inputs, backend="reference"), *inputs)
    loss, *inputs = make(name, dtype)
    actual = with_gradients(loss(*inputs, chunk_size=chunk_size), *inputs)
    assert actual[0].dtype == dtype
    for what, found, wanted in zip(("loss", "hidden", "weight"), actual, expected, strict=True):
        assert_close(what, found, wanted, bound)


def test_cross_entropy_is_that_of_torch() -> None:
    _, hidden, weight = make("cross_entropy")
    targets = torch.arange(N) % V
    targets[2] = 99
    wanted = F.cross_entropy(hidden @ weight.t(), targets, ignore_index=99)
    for backend in ("reference", "torch"):
        found = linear_cross_entropy(hidden, weight, targets, ignore_index=99, backend=backend)
        assert_close(backend, found, wanted, 1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("sizes", [(V, V), (V, V + 3), (V + 3, V)])
def test_divergence_leaves_the_surplus_of_a_vocabulary_out(backend: str, sizes: tuple[int, int]) -> None:
    student, teacher = (torch.randn(N, M, dtype=torch.float64) for _ in range(2))
    weight, teacher_weight = (torch.randn(size, M, dtype=torch.float64).requires_grad_() for size in sizes)
    log_q, log_p = (
        (h @ w[:V].t()).log_softmax(-1) for h, w in ((student, weight), (teacher, teacher_weight))
    )
    wanted = F.kl_div(log_q, log_p.detach(), log_target=True, reduction="batchmean")
    found = linear_divergence(student, weight, teacher, teacher_weight, backend=backend)
    assert_close("loss", found, wanted, 1e-12)
    gradient, of_teacher = torch.autograd.grad(found, (weight, teacher_weight), allow_unused=True)
    assert of_teacher is None
    assert not gradient[V:].any()
    assert_close("weight", gradient, torch.autograd.grad(wanted, weight)[0], 1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    loss, *inputs = make(name)
    assert torch.autograd.gradcheck(lambda h, w: loss(h, w, chunk_size=4) * 3, inputs)


@pytest.mark.parametrize("name", LOSSES)
def test_only_what_needs_a_gradient_gets_one(name: str) -> None:
    loss, hidden, weight = make(name)
    whole = with_gradients(loss(hidden, weight), hidden, weight)
    (of_hidden,) = torch.autograd.grad(loss(hidden, weight.detach()), hidden)
    (of_weight,) = torch.autograd.grad(loss(hidden.detach(), weight), weight)
    assert torch.equal(of_hidden, whole[1])
    assert torch.equal(of_weight, whole[2])
    assert not loss(hidden.detach(), weight.detach()).requires_grad
    with torch.no_grad():
        assert torch.equal(loss(hidden, weight), whole[0])


@pytest.mark.parametrize("name", LOSSES)
def test_the_incoming_gradient_scales_both_and_may_come_twice(name: str) -> None:
    loss, *inputs = make(name)
    once = with_gradients(loss(*inputs), *inputs)[1:]
    total = loss(*inputs)
    for factor in (1.0, -2.5):
        grads = torch.autograd.grad(total, inputs, torch.tensor(factor, dtype=total.dtype), retain_graph=True)
        for found, wanted in zip(grads, once, strict=True):
            assert_close("gradient", found, factor * wanted, 1e-14)


def test_a_weight_that_is_also_the_embedding_gets_both_gradients() -> None:
    weight = torch.randn(V, M, dtype=torch.float64).requires_grad_()
    ids, targets = torch.randint(V, (2, N))
    found = linear_cross_entropy(F.embedding(ids, weight).tanh(), weight, targets, chunk_size=5)
    wanted = F.cross_entropy(F.embedding(ids, weight).tanh() @ weight.t(), targets)
    assert_close(
        "weight", torch.autograd.grad(found, weight)[0], torch.autograd.grad(wanted, weight)[0], 1e-12
    )


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("size", [0, 5])
def test_no_labelled_position_gives_zero(backend: str, size: int) -> None:
    hidden, weight = torch.randn(size, M).requires_grad_(), torch.randn(V, M).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full((size,), -100), backend=backend)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert not gradient.any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("is_autocast", [True, False])
def test_bfloat16(name: str, is_autocast: bool) -> None:
    exact, *inputs = make(name, n=200, v=300, m=32)
    expected = with_gradients(exact(*inputs), *inputs)
    loss, *inputs = make(name, torch.float32 if is_autocast else torch.bfloat16, n=200, v=300, m=32)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        own = [loss(*inputs, chunk_size=32), loss(*inputs, backend="reference")]
    found, plain = (with_gradients(one, *inputs) for one in own)
    assert found[0].dtype == torch.float32
    for index, factor in enumerate((2, 3, 3)):
        assert found[index].dtype == plain[index].dtype
        errors = [
            float((one[index].double() - expected[index]).detach().abs().max()) for one in (found, plain)
        ]
        assert 0 < errors[0] <= factor * errors[1]


def test_autocast_takes_a_narrow_input_beside_a_wide_weight() -> None:
    _, hidden, weight = make("cross_entropy", torch.float32)
    narrow = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(narrow, weight, torch.arange(N) % V)
    loss.backward()
    assert (narrow.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of entries of any tensor that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("is_autocast", [True, False])
def test_no_tensor_has_the_size_of_all_logits(name: str, is_autocast: bool) -> None:
    loss, *inputs = make(name, torch.float32, n=512, v=256, m=8)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        with LargestTensor() as seen, torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            loss(*inputs, chunk_size=32).backward()
    assert seen.largest == 32 * 256 * 4  # logits of one chunk; in bfloat16 all of them would be 512 * 256 * 2
    assert sum(x.numel() for x in saved if x.dim()) <= (512 + 256) * 8 + 512
    with LargestTensor() as seen:
        loss(*inputs, chunk_size=512)
    assert seen.largest >= 300 * 256 * 4  # the counter counts


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_operation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    loss, *inputs = make(name)
    expected = with_gradients(loss(*inputs), *inputs)
    compiled = torch.compile(lambda h, w: loss(h, w) * 2, fullgraph=True, backend="aot_eager")
    found = with_gradients(compiled(*inputs), *inputs)
    for actual, wanted in zip(found, expected, strict=True):
        assert_close("compiled", actual, 2 * wanted, 1e-12)
    module = importlib.import_module("memzoo.kernels.linear_cross_entropy.chunked")
    monkeypatch.setattr(module, "is_compiling", lambda: True)
    for actual, wanted in zip(with_gradients(loss(*inputs), *inputs), expected, strict=True):
        assert_close("as one operation", actual, wanted, 1e-12)


def test_operations_are_declared_rightly() -> None:
    hidden, weight = (torch.randn(size, M, dtype=torch.float64).requires_grad_() for size in (N, V))
    teacher = torch.randn(N, 4, dtype=torch.float64), torch.randn(V, 4, dtype=torch.float64)
    wide = torch.float64
    ops = torch.ops.memzoo
    for flags in ((True, True), (True, False), (False, True)):
        arguments = hidden.detach().requires_grad_(flags[0]), weight.detach().requires_grad_(flags[1])
        targets = torch.arange(N) % V
        torch.library.opcheck(ops.linear_cross_entropy.default, (*arguments, targets, -100, 8, wide, *flags))
        for reverse in (False, True):
            given = (*arguments, *teacher, reverse, 8, wide, wide, *flags)
            torch.library.opcheck(ops.linear_divergence.default, given)


HIDDEN, WEIGHT, TARGETS = torch.zeros(4, M), torch.zeros(V, M), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": torch.zeros(2, 2, M)}, r"hidden must have shape \(N, M\)"),
        ({"weight": torch.zeros(V, M + 1)}, "one width, got 6 and 7"),
        ({"weight": torch.zeros(0, M)}, "at least one row"),
        ({"weight": torch.zeros(V, M).double()}, "share one dtype"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "got 3 for 4 positions"),
        ({"targets": torch.zeros(4)}, "must be integers, got torch.float32"),
        ({"targets": torch.tensor([0, 1, -100, V])}, "0 to 16, or ignore_index=-100 .* got 17"),
        ({"targets": torch.tensor([0, 1, -1, 2])}, "got -1"),
        ({"chunk_size": 0}, "at least 1, got 0"),
        ({"backend": "fla"}, "not a backend of linear_cross_entropy"),
    ],
)
def test_wrong_arguments_of_cross_entropy(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher_hidden": torch.zeros(5, M)}, "same positions, got 4 and 5"),
        ({"teacher_weight": torch.zeros(V, M + 1)}, "teacher_hidden and teacher_weight must have one width"),
        ({"chunk_size": -1}, "at least 1, got -1"),
    ],
)
def test_wrong_arguments_of_divergence(arguments: dict[str, Any], message: str) -> None:
    given = {"hidden": HIDDEN, "weight": WEIGHT, "teacher_hidden": HIDDEN, "teacher_weight": WEIGHT}
    with pytest.raises(ValueError, match=message):
        linear_divergence(**{**given, **arguments})
