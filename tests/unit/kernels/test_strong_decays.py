"""Weak log-decays behind strong ones keep their digits in float32, and so do the gradients of both."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memzoo.kernels import gated_slot_attention, linear_attention, mlstm
from memzoo.kernels.linear_attention.log_sums import LogSums
from memzoo.testing import assert_close

TOKENS, CHUNK, WIDTH = 130, 64, 4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_decays(*shape: int) -> Tensor:
    """-20 for two tokens in five, otherwise weak."""
    uniform = torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.where(uniform < 0.4, -20.0, -0.1 * uniform)


def additive(g: Tensor, heads: int = 1, **options: object) -> tuple[Tensor, ...]:
    """Linear attention with 2 value heads and `heads` of queries and keys."""
    q, k = (drawn(1, TOKENS, heads, WIDTH, seed=n).to(g.dtype) for n in (2, 3))
    v = drawn(1, TOKENS, 2, WIDTH, seed=4).to(g.dtype)
    if options:
        k = F.normalize(k, dim=-1)
    out, state = linear_attention(q, k, v, g=g, return_state=True, chunk_size=CHUNK, **options)
    return out, state.memory


def delta(g: Tensor) -> tuple[Tensor, ...]:
    return additive(g, heads=2, rule="delta", beta=torch.sigmoid(drawn(1, TOKENS, 2, seed=5)).to(g.dtype))


def slots(g: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (drawn(1, TOKENS, 2, WIDTH, seed=n).to(g.dtype) for n in (2, 3, 4))
    out, state = gated_slot_attention(q, k, v, g, return_state=True, chunk_size=CHUNK)
    return out, *state


def gated_memory(g: Tensor) -> tuple[Tensor, ...]:
    """mLSTM, whose log-decays are logsigmoid of its forget gates."""
    q, k, v = (drawn(1, TOKENS, 2, WIDTH, seed=n).to(g.dtype) for n in (2, 3, 4))
    input_gate = drawn(1, TOKENS, 2, seed=5).to(g.dtype)
    forget_gate = g - torch.log(-torch.expm1(g))
    out, state = mlstm(q, k, v, input_gate, forget_gate, return_state=True, chunk_size=CHUNK)
    return out, *state


PER_HEAD, PER_CHANNEL = (1, TOKENS, 2), (1, TOKENS, 2, WIDTH)
CASES = {
    "head": (lambda g: additive(g, heads=2), PER_HEAD),
    "shared keys": (additive, PER_HEAD),
    "delta, head": (delta, PER_HEAD),
    "channel": (lambda g: additive(g, heads=2), PER_CHANNEL),
    "delta, channel": (delta, PER_CHANNEL),
    "slots": (slots, PER_CHANNEL),
    "mlstm": (gated_memory, PER_HEAD),
}


def test_factors_between_tokens_are_exact() -> None:
    g = log_decays(3, CHUNK).float()
    total = g.double().cumsum(-1)
    expected = (total[:, :, None] - total[:, None]).tril().clamp(min=-60).exp().tril()
    sums = LogSums(g)
    assert_close("between", sums.between().tril(), expected, 5e-7)
    assert_close("to the end", sums.to_end(), expected[:, -1], 5e-7)
    assert_close("from the start", sums.from_start(), total.clamp(min=-60).exp(), 5e-7)


@pytest.mark.parametrize("case", CASES)
def test_weak_decays_behind_strong_ones(case: str) -> None:
    call, shape = CASES[case]
    g = log_decays(*shape).float()
    for actual, expected in zip(call(g), call(g.double()), strict=True):
        assert_close(case, actual, expected, 1.5e-6)


# Of mLSTM the gradients of its maxima, which cancel, are as large as those of what is not forgotten; with
# shared keys the gradient is the difference of two sums over all that is read and written.
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("mlstm", "shared keys")])
def test_gradient_of_a_rate_that_forgets_everything(case: str) -> None:
    """Next to nothing, so that it is not to be drowned by the rounding of what is not forgotten."""
    call, shape = CASES[case]

    def gradient(call: Callable[[Tensor], tuple[Tensor, ...]], dtype: torch.dtype) -> Tensor:
        rate = torch.tensor(20.0, dtype=dtype, requires_grad=True)
        results = call((-rate).expand(shape))
        total = sum((x * drawn(*x.shape, seed=6).to(dtype)).sum() for x in results)
        return torch.autograd.grad(total, rate)[0]

    assert_close(case, gradient(call, torch.float32), gradient(call, torch.float64), 2e-6)
