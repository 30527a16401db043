"""The soft cache size: definition, blocks and Triton (in the interpreter)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memzoo.kernels import available_backends, soft_cache_size
from memzoo.kernels.retention import chunked
from memzoo.testing import assert_close

needs_triton = pytest.mark.skipif(
    "triton" not in available_backends("soft_cache_size"), reason="Triton is made for Linux only"
)


def log_retention(rows: int, tokens: int, heads: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rates of all sizes: some that keep everything, some that forget at once."""
    generator = torch.Generator().manual_seed(tokens)
    rates = 10 ** (4 * torch.rand(rows, tokens, heads, generator=generator, dtype=torch.float64) - 4)
    rates[:, ::7] = 0
    rates[:, 3::11] = 20
    return (-rates).to(dtype).requires_grad_()


def value_and_gradient(g: Tensor, bounds: Tensor | None, backend: str) -> list[Tensor]:
    sizes = soft_cache_size(g, cu_seqlens=bounds, backend=backend)
    weights = torch.randn(sizes.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [sizes, *torch.autograd.grad((sizes * weights.to(sizes.dtype)).sum(), g)]


def dense(g: Tensor) -> Tensor:
    """(T, H) by one matrix per head."""
    age = torch.arange(len(g), dtype=g.dtype)[:, None] - torch.arange(len(g), dtype=g.dtype)
    kept = (age.clamp(min=0)[..., None] * g).exp()
    return kept.masked_fill((age < 0)[..., None], 0).sum(1)


@pytest.mark.parametrize("tokens", [1, 63, 64, 150])
def test_definition_and_blocks(tokens: int) -> None:
    g = log_retention(2, tokens)
    expected = value_and_gradient(g, None, "reference")
    for row in (0, 1):
        assert_close("dense matrix", expected[0][row], dense(g[row]), 1e-12)
    for name, bound in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        found = value_and_gradient(g.detach().to(name).requires_grad_(), None, "torch")
        for actual, wanted in zip(found, expected, strict=True):
            assert_close("blocks", actual, wanted, bound)


def test_more_documents_than_a_byte_counts() -> None:
    lengths = [1 + n % 5 for n in range(300)] + [0, 130]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    g = log_retention(1, sum(lengths))
    alone = [value_and_gradient(part, None, "reference")[0] for part in g.split(lengths, 1)]
    for backend in ("reference", "torch"):
        sizes = soft_cache_size(g, cu_seqlens=bounds, backend=backend)
        assert_close(backend, sizes, torch.cat(alone, 1), 1e-10)
    grad = torch.autograd.grad(soft_cache_size(g, cu_seqlens=bounds)[:, : int(bounds[200])].sum(), g)[0]
    assert not grad[:, int(bounds[200]) :].any()


@needs_triton
def test_triton_agrees_with_the_definition() -> None:
    lengths = [70, 0, 1, 64, 20]
    g = log_retention(1, sum(lengths), dtype=torch.float32)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    for packed in (bounds, None):
        expected = value_and_gradient(g, packed, "reference")
        for actual, wanted in zip(value_and_gradient(g, packed, "triton"), expected, strict=True):
            assert_close("triton", actual, wanted, 1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_extremes(backend: str) -> None:
    kept = soft_cache_size(torch.zeros(1, 70, 1), backend=backend)
    assert torch.equal(kept[0, :, 0], torch.arange(1.0, 71.0))
    g = torch.full((1, 70, 1), float("-inf"), requires_grad=True)
    gone = soft_cache_size(g, backend=backend)
    assert torch.equal(gone, torch.ones_like(gone))
    (grad,) = torch.autograd.grad(gone.sum(), g)
    assert not grad.any()
    assert soft_cache_size(torch.zeros(2, 0, 3), backend=backend).shape == (2, 0, 3)
    assert soft_cache_size(torch.zeros(0, 4, 3), backend=backend).shape == (0, 4, 3)


def test_sizes_do_not_depend_on_later_tokens_and_no_pair_is_stored() -> None:
    g = log_retention(1, 200, heads=1, dtype=torch.float32).detach()
    other = g.clone()
    other[:, 150:] = -1
    assert torch.equal(soft_cache_size(g)[:, :150], soft_cache_size(other)[:, :150])
    saved: list[int] = []

    def keep(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        soft_cache_size(g.requires_grad_()).sum()
    assert sum(saved) <= 4 * g.numel()


def test_compiled_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    g = log_retention(1, 70)
    bounds = torch.tensor([0, 66, 70])
    expected = value_and_gradient(g, bounds, "torch")
    monkeypatch.setattr(chunked, "is_compiling", lambda: True)
    for actual, wanted in zip(value_and_gradient(g, bounds, "torch"), expected, strict=True):
        assert torch.equal(actual, wanted)
    torch.library.opcheck(torch.ops.memzoo.soft_cache_size.default, (g[0], [66, 4]))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"must have shape \(B, T, H\)"):
        soft_cache_size(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="floating-point"):
        soft_cache_size(torch.zeros(2, 3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="triton"):
        soft_cache_size(torch.zeros(1, 3, 1, dtype=torch.float64), backend="triton")
