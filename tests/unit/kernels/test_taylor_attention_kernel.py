"""Taylor attention: the definition, the torch form and the Triton kernels (in the interpreter)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memzoo.kernels import LinearState, available_backends, taylor_attention
from memzoo.kernels.taylor_attention import num_features, taylor_features
from memzoo.kernels.taylor_attention.features import from_powers, to_powers
from memzoo.testing import assert_close

LAYOUTS = ("compact", "expanded")
needs_triton = pytest.mark.skipif(
    "triton" not in available_backends("taylor_attention"), reason="Triton is made for Linux only"
)


def inputs(
    lengths: list[int], heads: int = 4, groups: int = 2, d: int = 5, width: int = 19
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, d), (groups, d), (groups, width))
    return tuple(torch.randn(1, sum(lengths), *shape, generator=generator) for shape in shapes)


def state(num: int, layout: str, groups: int = 2, d: int = 5, width: int = 19) -> LinearState:
    """A memory of random numbers, and a sum of keys as after many of them."""
    generator = torch.Generator().manual_seed(1)
    features = num_features(d, layout)
    normalizer = torch.rand(num, groups, features, generator=generator)
    normalizer[:, :, 0] += 200
    return LinearState(torch.randn(num, groups, features, width, generator=generator), normalizer)


def outputs_and_gradients(
    backend: str, layout: str, normalize: bool, lengths: list[int], start: LinearState | None
) -> dict[str, Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in zip("qkv", inputs(lengths), strict=True)}
    q, k, v = leaves.values()
    if start is not None:
        leaves["memory"] = start.memory.clone().requires_grad_()
        if normalize:
            assert start.normalizer is not None
            leaves["normalizer"] = start.normalizer.clone().requires_grad_()
        start = LinearState(leaves["memory"], leaves.get("normalizer"))
    output, after = taylor_attention(
        q,
        k,
        v,
        layout=layout,
        normalize=normalize,
        initial_state=start,
        return_state=True,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        backend=backend,
    )
    assert after is not None
    found = {"output": output, "after memory": after.memory}
    if after.normalizer is not None:
        found["after normalizer"] = after.normalizer
    generator = torch.Generator().manual_seed(2)
    loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in found.values())
    assert isinstance(loss, Tensor)
    loss.backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        found[f"gradient of {name}"] = leaf.grad
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_the_expansion_of_exp(layout: str) -> None:
    q, k, v = (x.double() for x in inputs([30], heads=2))
    output, _ = taylor_attention(q, k, v, layout=layout, eps=0.0)
    u = torch.einsum("bihd,bjhd->bhij", q, k) / 5**0.5
    weights = (1 + u + u**2 / 2).tril()
    expected = torch.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, keepdim=True), v)
    assert_close("output", output, expected, 1e-10)


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("carries", [True, False])
def test_triton_agrees_with_the_definition(layout: str, normalize: bool, carries: bool) -> None:
    lengths = [40, 0, 1, 33]
    start = state(4, layout) if carries else None
    expected = outputs_and_gradients("reference", layout, normalize, lengths, start)
    found = outputs_and_gradients("triton", layout, normalize, lengths, start)
    assert list(found) == list(expected)
    for name, truth in expected.items():
        assert_close(name, found[name], truth, 1e-5)


@needs_triton
def test_triton_reads_dense_batches_and_the_paper_s_width() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 35, 2, width, generator=generator) for width in (16, 16, 64))
    expected, truth = taylor_attention(q, k, v, return_state=True, backend="reference")
    output, after = taylor_attention(q, k, v, return_state=True, backend="triton")
    assert truth is not None
    assert after is not None
    assert_close("output", output, expected, 1e-5)
    assert_close("memory", after.memory, truth.memory, 1e-5)


@needs_triton
def test_triton_gradients_do_not_see_the_future_or_another_sequence() -> None:
    q, k, v = (x.requires_grad_() for x in inputs([20, 20]))
    bounds = torch.tensor([0, 20, 40])
    output, _ = taylor_attention(q, k, v, cu_seqlens=bounds, backend="triton")
    grads = torch.autograd.grad(output[:, 20:30].sum(), (q, k, v))
    for grad in grads:
        assert grad[:, 20:30].abs().sum() > 0
        assert not grad[:, :20].any()
        assert not grad[:, 30:].any()


def test_the_interpreter_is_not_chosen_by_itself() -> None:
    q, k, v = inputs([8])
    q.requires_grad_()
    output, _ = taylor_attention(q, k, v)
    expected, _ = taylor_attention(q, k, v, backend="torch")
    assert torch.equal(output, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_powers_hold_what_features_hold(layout: str) -> None:
    memory = state(2, layout).memory.double()
    back = from_powers(*to_powers(memory, 5, layout), layout)
    queries = taylor_features(torch.randn(2, 2, 7, 5, dtype=torch.float64), layout)
    assert_close("what queries read", queries @ back, queries @ memory, 1e-12)
    if layout == "compact":
        assert_close("memory", back, memory, 1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "dense"}, "layout must be one of compact, expanded, got 'dense'"),
        ({"backend": "fla"}, "not a backend of taylor_attention"),
        ({"q": torch.zeros(1, 8, 4, 6)}, "one width per head, got 6 and 5"),
        (
            {"q": torch.zeros(1, 8, 4, 17), "k": torch.zeros(1, 8, 2, 17), "backend": "triton"},
            "does not cover",
        ),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    arguments = dict(zip("qkv", inputs([8]), strict=True)) | change
    if change.get("backend") == "triton" and "triton" not in available_backends("taylor_attention"):
        message = "needs CUDA"
    with pytest.raises(ValueError, match=message):
        taylor_attention(**arguments)  # type: ignore[arg-type]
