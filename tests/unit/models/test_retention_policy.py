"""The policy `retention`: its scores, its mixer, and saved gates in models of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from memzoo.layers import build_mixer, probe
from memzoo.layers.policies import Entries, Observation, PolicyState, Retention, make_policy
from memzoo.models.checkpoints.folder import load_model
from memzoo.models.config import ModelConfig
from memzoo.models.conversion import (
    ConversionPlan,
    attach_retention_gates,
    convert_mixers,
    save_gates,
)
from memzoo.models.decoder import MemoryLM
from memzoo.models.policy_attach import attach_policy
from memzoo.models.policy_cache import PolicyCache
from memzoo.models.policy_gates import attach_gates, detach_gates
from memzoo.testing import assert_close
from memzoo.train.retention_map import eviction_map

HEADS = {"d_model": 16, "num_heads": 4, "num_kv_heads": 2, "gate_width": 8, "gate_bias": 1.0}


def base() -> MemoryLM:
    torch.manual_seed(0)
    layers = {"type": "attention", "num_heads": 4, "num_kv_heads": 2}
    return MemoryLM(ModelConfig(vocab_size=30, d_model=16, layers=layers, num_layers=2)).eval()


def entries(g: Tensor) -> tuple[Entries, Observation]:
    """Tokens 0 .. C - 1 with these rates (1, G, C), and what a scorer is told of them."""
    order = torch.arange(1, g.shape[2] + 1, dtype=torch.int32).expand(g.shape)
    key = torch.randn(*g.shape, 4, generator=torch.Generator().manual_seed(0), dtype=g.dtype)
    seen = Observation(num_seen=g.shape[2], scale=1.0, queries=key[:, :0].transpose(1, 2))
    return Entries(key, key, order, extra=g), seen


def test_scores_are_what_is_left() -> None:
    g = torch.tensor([[[-1e-9, -0.3, -5.0, -700.0, 0.0, -0.01]]], dtype=torch.float64)
    held, seen = entries(g)
    age = torch.arange(5, -1, -1)
    assert_close("score", Retention().score(held, seen), g * age, 1e-12)
    assert_close("offset", Retention(age_offset=2).score(held, seen), g * (age + 2), 1e-12)
    for n in (2, 7):
        exponents = (age[:, None] + torch.arange(n)) * g[0, 0][:, None]
        assert_close("ahead", Retention(lookahead=n).score(held, seen)[0, 0], exponents.logsumexp(1), 1e-9)
    norms = held.key.norm(dim=-1).log()
    assert_close("norm", Retention(key_norm=True).score(held, seen), g * age + norms, 1e-12)
    with pytest.raises(ValueError, match="lookahead must be at least 1"):
        make_policy({"type": "retention", "budget": 4, "lookahead": 0})


@pytest.mark.parametrize("buffer", [1, 4])
def test_the_mixer_keeps_what_the_map_says(buffer: int) -> None:
    torch.manual_seed(0)
    policy = {"type": "retention", "budget": 6, "interval": buffer}
    mixer = build_mixer({"type": "policy_attention", **HEADS, "policy": policy})
    with probe() as seen:
        state = mixer(torch.randn(1, 30, 16), return_state=True).state
    assert isinstance(state, PolicyState)
    kept = eviction_map(seen["log_retention"][0][0], 6, buffer=buffer)[-1]  # (G, T)
    for head in range(2):
        order = state.order[0, :, head]
        assert (order[order > 0] - 1).tolist() == kept[head].nonzero().squeeze(1).tolist()


def test_a_trained_model_becomes_a_bounded_one_with_all_its_weights() -> None:
    gated = attach_retention_gates(base(), gate_width=8, gate_bias=1.0)
    plan = ConversionPlan(target={"type": "policy_attention", "policy": {"type": "retention", "budget": 9}})
    bounded, report = convert_mixers(gated, plan)
    assert not report.new_parameters
    assert not report.dropped
    ids = torch.randint(30, (1, 30), generator=torch.Generator().manual_seed(0))
    short, long = base()(ids).logits, bounded(ids).logits
    assert_close("within the budget", long[:, :9], short[:, :9], 1e-5)
    assert not torch.allclose(long[:, 12:], short[:, 12:], atol=1e-4)


def test_saved_gates_in_a_model_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    gated = attach_retention_gates(load_model(str(tmp_path / "model")).eval(), gate_width=8, gate_bias=1.0)
    save_gates(gated, tmp_path / "gates", base="toy")
    plan = ConversionPlan(
        target={"type": "policy_attention", "policy": {"type": "retention", "budget": 9, "interval": 2}}
    )
    bounded = convert_mixers(gated, plan)[0].eval()
    attach_gates(model, tmp_path / "gates")
    policy = make_policy({"type": "retention", "budget": 9, "interval": 2})
    ids = torch.randint(1, 30, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), attach_policy(model, policy):
        cache = PolicyCache(config, policy)
        first = model(ids[:, :15], past_key_values=cache).logits
        rest = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(15, 20)]
        found = torch.cat([first, *rest], 1)
        expected = bounded(ids).logits
        assert_close("logits", found, expected, 1e-4)
        assert cache.kept_positions(0).shape == (2, 2, 9)
        made = model.generate(
            ids, past_key_values=PolicyCache(config, policy), max_new_tokens=4, do_sample=False
        )
        assert made.shape == (2, 24)
        detach_gates(model)
        with pytest.raises(ValueError, match="has no retention gate"):
            model(ids, past_key_values=PolicyCache(config, policy))
    other = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "num_key_value_heads": 4}))
    with pytest.raises(ValueError, match="belong to 'toy'"):
        attach_gates(other, tmp_path / "gates")
    reader = attach_retention_gates(load_model(str(tmp_path / "model")), gate="kv", gate_width=8)
    save_gates(reader, tmp_path / "kv", base="toy")
    with pytest.raises(ValueError, match="read keys and values"):
        attach_gates(model, tmp_path / "kv")
