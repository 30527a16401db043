"""Windows that end with the cell of a grid: every backend against the definition, across splits."""

import pytest
import torch
from torch import Tensor

from memzoo.kernels import KVPrefix, attention

# Each: size, grid and sinks of a window
WINDOWS = [(6, 3, 0), (4, 4, 2), (5, 2, 7), (5, 2, 0), (7, 4, 1), (1, 1, 0)]


def heads(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    return tuple(
        torch.randn(2, num_tokens, n, 5, generator=generator, dtype=torch.float64) for n in (4, 2, 2)
    )


def by_mask(q: Tensor, k: Tensor, v: Tensor, window_size: int, window_grid: int, num_sinks: int) -> Tensor:
    """Softmax under a written-out mask."""
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])
    last = (i // window_grid + 1) * window_grid - 1
    visible = (j <= i) & ((last - j < window_size) | (j < num_sinks))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("num_tokens", [1, 5, 12, 23])
def test_grid_window_equals_its_mask(backend: str, window: tuple[int, int, int], num_tokens: int) -> None:
    q, k, v = heads(num_tokens)
    size, grid, sinks = window
    out = attention(
        q, k, v, window_size=size, window_grid=grid, num_sinks=sinks, backend=backend, return_stats=True
    )
    torch.testing.assert_close(out.output, by_mask(q, k, v, *window), rtol=0, atol=1e-12)
    assert bool((out.lse >= out.row_max).all())


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("window", WINDOWS)
def test_grid_window_continues_at_any_token(backend: str, window: tuple[int, int, int]) -> None:
    q, k, v = heads(23)
    size, grid, sinks = window
    whole = by_mask(q, k, v, *window)
    for cut in range(1, 23):
        first = max(cut - size, 0)
        kept = min(sinks, cut)
        sink_k, sink_v = (x.new_zeros(2, sinks, 2, 5) for x in (k, v))
        sink_k[:, :kept], sink_v[:, :kept] = k[:, :kept], v[:, :kept]
        past_k, past_v = (x.new_zeros(2, size, 2, 5) for x in (k, v))
        past_k[:, size - (cut - first) :], past_v[:, size - (cut - first) :] = (
            k[:, first:cut],
            v[:, first:cut],
        )
        prefix = KVPrefix(past_k, past_v, torch.tensor([cut, cut]), sink_k, sink_v)
        rest = (x[:, cut:] for x in (q, k, v))
        out = attention(
            *rest, window_size=size, window_grid=grid, num_sinks=sinks, prefix=prefix, backend=backend
        )
        torch.testing.assert_close(out.output, whole[:, cut:], rtol=0, atol=1e-12)


def test_grid_window_of_packed_rows_and_gradients() -> None:
    q, k, v = (x[:1].requires_grad_() for x in heads(23))
    bounds = torch.tensor([0, 9, 9, 10, 23])
    options = {"window_size": 6, "window_grid": 3, "num_sinks": 1, "cu_seqlens": bounds}
    fast = attention(q, k, v, **options, backend="torch").output
    slow = attention(q, k, v, **options, backend="reference").output
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    cotangent = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(fast, (q, k, v), cotangent),
        torch.autograd.grad(slow, (q, k, v), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("size", "grid"), [(None, 4), (4, 5), (4, 0)])
def test_grid_that_no_window_fits_is_refused(size: int | None, grid: int) -> None:
    q, k, v = heads(5)
    with pytest.raises(ValueError, match="window_grid must lie between 1 and window_size"):
        attention(q, k, v, window_size=size, window_grid=grid)
