"""Retention gates, other scores of tokens, and the two attentions whose keys fade."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from memzoo.layers import TokenMixer, build_mixer, probe
from memzoo.layers.parts.retention_gate import GATE_KINDS, RetentionGate, automatic_bias
from memzoo.layers.parts.token_scores import (
    DMSScore,
    FastKVzipScore,
    KVzapScore,
    LocretScore,
    TokenScore,
    dms_decisions,
    dms_loss,
    locret_loss,
)
from memzoo.testing import assert_close

M, H, G, D = 12, 4, 2, 6
HEADS = {"d_model": M, "num_heads": H, "num_kv_heads": G, "head_dim": D}


def heads(tokens: int = 9, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, q, k, v."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((M,), (H, D), (G, D), (G, D))
    return tuple(torch.randn(2, tokens, *s, generator=generator, dtype=dtype) for s in shapes)


def gated(**fields: object) -> TokenMixer:
    torch.manual_seed(0)
    return build_mixer({**HEADS, "type": "gated_attention", "gate_width": 8, **fields})


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_a_gate_begins_by_keeping_everything(kind: str) -> None:
    torch.manual_seed(0)
    gate = RetentionGate(M, G, D, width=8, kind=kind, train_length=512).double()
    gate.init_weights()
    x, _, k, v = heads()
    g = gate(x, k, v)
    assert g.shape == (2, 9, G)
    assert gate.first_bias == math.log(20 * 512)
    assert (512 * g.abs() < 0.06).all()
    assert (g < 0).all()
    count = sum(parameter.numel() for parameter in gate.parameters())
    size = 2 * G * D if gate.reads_keys else M
    own = {"mlp": 8, "mlp3": 8 + 8 * 8 + 8, "kv": 8, "kv_swiglu": size * 8}[kind]
    assert count == size * 8 + own + 8 * G + G


def test_biases() -> None:
    assert automatic_bias(16) == 8.0
    assert automatic_bias(128_000) == pytest.approx(14.76, abs=0.01)
    assert RetentionGate(M, G, D, bias_init=18.0).first_bias == 18.0
    for bias in ("high", math.nan, True):
        with pytest.raises(ValueError, match="number or"):
            RetentionGate(M, G, D, bias_init=bias)
    with pytest.raises(ValueError, match="Did you mean 'kv_swiglu'"):
        RetentionGate(M, G, D, kind="kv_swigluu")
    with pytest.raises(ValueError, match="reads keys and values"):
        RetentionGate(M, G, D, kind="kv")(heads()[0])


def test_half_precision_keeps_the_bias_and_small_rates() -> None:
    torch.manual_seed(0)
    gate = RetentionGate(M, G, D, width=8, bias_init=17.96)
    gate.init_weights()
    x = heads(dtype=torch.float32)[0]
    expected = gate(x)
    gate.bfloat16()
    assert {parameter.dtype for parameter in gate.parameters()} == {torch.float32}
    found = gate(x.bfloat16())
    assert found.dtype == torch.float32
    assert_close("rates", found / expected, torch.ones_like(expected), 0.01)


@pytest.mark.parametrize("kind", ["mlp", "kv"])
def test_gates_off_is_attention_and_gates_on_begin_near_it(kind: str) -> None:
    mixer = gated(gate=kind, train_length=64)
    plain = build_mixer({**HEADS, "type": "attention"})
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if "gate" not in k})
    x = heads(60, torch.float32)[0]
    expected = plain(x).hidden
    assert_close("gates on", mixer(x).hidden, expected, 0.05)
    assert not torch.equal(mixer(x).hidden, expected)
    mixer.memory_enabled = False
    state = mixer(x[:, :20], return_state=True).state
    found = mixer(x[:, 20:59], state, return_state=True)
    last = mixer.step(x[:, 59], found.state).hidden
    whole = torch.cat([mixer(x[:, :20]).hidden, found.hidden, last[:, None]], 1)
    assert_close("gates off", whole, expected, 1e-6)


def test_log_retentions_come_out_with_gradient_and_under_a_probe() -> None:
    mixer = gated(gate_bias=1.0)
    x = heads(20, torch.float32)[0]
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :6] = False
    with probe() as seen:
        out = mixer(x, mask=mask, return_extras=True)
    g = out.extras["log_retention"]
    assert g.shape == (2, 20, G)
    assert not g[1, :6].any()
    assert torch.equal(seen["log_retention"][0][0], g[mask].detach())
    g.sum().backward()
    assert mixer.retention_gate.in_proj.weight.grad.any()
    assert mixer.q_proj.weight.grad is None


def test_forgetting_attention_without_forgetting_is_attention() -> None:
    fields = HEADS
    mixer = build_mixer({"type": "forgetting_attention", **fields, "gate_bias": 200.0})
    plain = build_mixer({"type": "attention", **fields, "rope_theta": None})
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if "f_proj" not in k})
    x = heads(30, torch.float32)[0]
    assert_close("outputs", mixer(x).hidden, plain(x).hidden, 1e-6)
    with pytest.raises(ValueError, match="gate_bias must be a number"):
        build_mixer({"type": "forgetting_attention", **fields, "gate_bias": "auto"})


SCORES = [
    LocretScore(H, G, D, width=8),
    FastKVzipScore(M, H, G, rank=4, num_sinks=3),
    KVzapScore(M, G),
    KVzapScore(M, G, width=8),
    DMSScore(M, G),
    RetentionGate(M, G, D, width=8),
    RetentionGate(M, G, D, width=8, kind="kv"),
]


@pytest.mark.parametrize("module", SCORES, ids=lambda module: type(module).__name__)
def test_scores_share_one_interface_and_belong_to_their_token(module: TokenScore) -> None:
    torch.manual_seed(0)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    inputs = heads()
    whole = module.score(*inputs)
    assert whole.shape == (2, 9, G)
    assert_close("one token", module.score(*(x[:, 3:4] for x in inputs)), whole[:, 3:4], 1e-12)
    other = heads(10)
    for i, name in enumerate(("hidden", "queries", "keys", "values")):
        changed = [other[j][:, 1:] if i == j else x for j, x in enumerate(inputs)]
        assert torch.equal(module.score(*changed), whole) == (name not in module.reads)


def test_fast_kvzip_is_its_formula() -> None:
    torch.manual_seed(0)
    module = FastKVzipScore(M, H, G, rank=4, num_sinks=3).double()
    x = heads()[0]
    queries = module.q_norm(module.q_proj(x).view(2, 9, G, H // G, 4))
    keys = module.k_norm(module.k_proj(x).view(2, 9, G, 4))
    own = torch.einsum("btghr,btgr->btgh", queries, keys) / 2 + module.bias
    away = torch.einsum("btghr,gsr->btghs", queries, module.sinks) / 2
    expected = (1 / (1 + (away - own[..., None]).exp().sum(-1))).mean(-1)
    assert_close("score", module.score(x), expected, 1e-12)


def test_losses_of_the_neighbours() -> None:
    scores, targets = torch.tensor([[[0.0], [2.0]]]), torch.tensor([[[0.5], [0.0]]])
    assert float(locret_loss(scores, targets)) == pytest.approx((0.125 + 1.5) / 2 + 0.0025 * 4)
    assert float(locret_loss(scores[:, :1], targets[:, :1])) == pytest.approx(0.125)
    logits = torch.tensor([[[5.0], [-5.0]]], requires_grad=True)
    drawn = dms_decisions(logits, 2.0, torch.Generator().manual_seed(0))
    assert drawn.tolist() == [[[1.0], [0.0]]]
    loss = dms_loss(drawn, 50, 100, 4.0)  # a ratio of 2.5: 0.6 are to leave, 0.5 do
    assert float(loss.detach()) == pytest.approx(0.1)
    loss.backward()
    assert (logits.grad < 0).all()
    assert float(dms_loss(drawn.detach(), 0, 100, 4.0)) == 0.0


def test_missing_inputs_of_locret_are_named() -> None:
    with pytest.raises(ValueError, match="before the rotation"):
        LocretScore(H, G, D).score(heads()[0])
