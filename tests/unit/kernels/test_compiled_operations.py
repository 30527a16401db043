"""The loops over tiles and chunks as operations of torch.compile: the same numbers, shapes and gradients."""

import pytest
import torch
from torch import Tensor

from memzoo.kernels import LinearState, attention, linear_attention
from memzoo.testing import assert_close


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def results(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    total = sum((x * x.detach().cos()).sum() for x in outputs)
    return [*outputs, *torch.autograd.grad(total, inputs)]


@pytest.mark.parametrize("return_stats", [False, True])
@pytest.mark.parametrize("window", [(None, 0), (4, 2)])
def test_attention(
    monkeypatch: pytest.MonkeyPatch, window: tuple[int | None, int], return_stats: bool
) -> None:
    inputs = draw((2, 20, 4, 5), (2, 20, 2, 5), (2, 20, 2, 3))

    def run() -> list[Tensor]:
        out = attention(
            *inputs, window_size=window[0], num_sinks=window[1], return_stats=return_stats, backend="torch"
        )
        return results([x for x in out if x is not None], inputs)

    expected = run()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for actual, wanted in zip(run(), expected, strict=True):
        assert_close("as one operation", actual, wanted, 1e-12)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("with_decay", [False, True])
def test_linear_attention(
    monkeypatch: pytest.MonkeyPatch, normalize: bool, with_state: bool, with_decay: bool
) -> None:
    inputs = draw((2, 20, 4, 5), (2, 20, 2, 5), (2, 20, 2, 3), (2, 20, 2), (2, 2, 5, 3), (2, 2, 5))
    q, k, v, g, memory, normalizer = inputs
    used = [q, k, v] + [g] * with_decay + [memory] * with_state + [normalizer] * (with_state and normalize)

    def run() -> list[Tensor]:
        state = LinearState(memory, normalizer if normalize else None) if with_state else None
        output, final = linear_attention(
            q.square(),
            k.square(),
            v,
            g=-g.square() if with_decay else None,
            normalize=normalize,
            initial_state=state,
            return_state=True,
            chunk_size=8,
        )
        return results([output, *(x for x in final if x is not None)], used)

    expected = run()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for actual, wanted in zip(run(), expected, strict=True):
        assert_close("as one operation", actual, wanted, 1e-12)


def test_operations_are_declared_rightly() -> None:
    q, k, v = draw((4, 2, 6, 5), (4, 6, 5), (4, 6, 3))
    tile = [0, 4, 0, 6, 0, 0, 0, 6, 0, 0]
    for return_stats in (False, True):
        arguments = (q, k, v, tile, 3, 0.5, return_stats)
        torch.library.opcheck(torch.ops.memzoo.tiled_attention.default, arguments)
    g = -draw((4, 6))[0].detach().square()
    memory, normalizer = draw((1, 4, 5, 3), (1, 4, 5))
    plan = ([0, 6], 4, 0.5, True, True)
    for arguments in (
        (q, k, v, g.requires_grad_(), memory, normalizer, *plan),
        (q, k, v, None, None, None, [0, 2, 2, 4], 4, 0.5, False, True),
    ):
        torch.library.opcheck(torch.ops.memzoo.chunked_linear_attention.default, arguments)
