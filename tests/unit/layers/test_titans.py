"""The neural memory of Titans as a layer: settings that amplify rounding, and gates at their ends."""

import copy

import pytest
import torch
from torch import Tensor

from memzoo.kernels import use_backend
from memzoo.layers import TokenMixer, build_mixer
from memzoo.testing import Subject, check_streaming

FAST = {"type": "titans", "d_model": 6, "num_heads": 1, "head_dim": 5, "chunk_size": 4, "expansion": 1.5}
GATES = pytest.mark.parametrize("gates", ["chunk", "token"])


def build(**settings: object) -> TokenMixer:
    torch.manual_seed(0)
    return build_mixer({**FAST, **settings})


def amplification(subject: Subject, x: Tensor) -> float:
    """Relative change of the outputs over that of the tokens, for a change that stays small."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        before, after = (subject.mixer(item).hidden for item in (x, x * (1 + 1e-9 * noise)))
    return float((after - before).abs().max() / before.abs().max()) / 1e-9


def test_a_net_that_forgets_fast_amplifies_rounding_by_its_definition() -> None:
    """What float32 loses there, the definition loses too; float64 keeps the bound of the contract."""
    hard = build(gates="token", qk_norm="l2", conv_size=3, max_lr=0.2)
    subject, low = (Subject(hard, dtype=dtype) for dtype in (torch.float64, torch.float32))
    check_streaming(subject, splits=8)
    x = subject.inputs(2, 150)
    with torch.no_grad():
        exact, fast = subject.mixer(x).hidden, low.mixer(x.float()).hidden
        with use_backend("reference"):
            slow = low.mixer(x.float()).hidden
    errors = [float((found - exact).abs().max()) for found in (fast, slow)]
    assert errors[0] <= 4 * errors[1]
    mild = build(gates="token", qk_norm="l2", conv_size=3, max_lr=0.02, decay_init=0.001)
    assert amplification(Subject(mild, dtype=torch.float64), x) < 20 < amplification(subject, x)


@GATES
@pytest.mark.parametrize("decay", [-300.0, 300.0])
@pytest.mark.parametrize("rate", [-300.0, 300.0])
def test_gates_at_their_ends(gates: str, decay: float, rate: float) -> None:
    """Nothing or all forgotten, nothing or all written, zero, equal and huge tokens: finite everywhere."""
    mixer = build(gates=gates, max_lr=0.5)
    with torch.no_grad():
        mixer.decay_proj.bias.fill_(decay)
        mixer.rate_proj.bias.fill_(rate)
    tokens = torch.randn(1, 30, 6, generator=torch.Generator().manual_seed(1))
    for x in (tokens, torch.zeros_like(tokens), tokens[:, :1].expand_as(tokens), 1e4 * tokens):
        for dtype in (torch.float32, torch.bfloat16):
            own, leaf = copy.deepcopy(mixer).to(dtype), x.to(dtype, copy=True).requires_grad_()
            out = own(leaf, return_state=True)
            (out.hidden.float().square().sum() + out.state.weights.sum()).backward()
            found = [out.hidden, out.state.weights, leaf.grad, *(p.grad for p in own.parameters())]
            assert all(bool(t.isfinite().all()) for t in found if t is not None)


@GATES
def test_many_tokens_in_bfloat16(gates: str) -> None:
    mixer = build(gates=gates, chunk_size=64, max_lr=0.1, decay_init=0.2).bfloat16()
    x = torch.randn(1, 20_000, 6, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.no_grad():
        early = mixer(x[:, :2000], return_state=True).state
        late = mixer(x[:, 2000:], early, return_state=True)
    assert bool(late.hidden.isfinite().all())
    assert float(late.state.weights.abs().max()) <= 4 * float(early.weights.abs().max())
