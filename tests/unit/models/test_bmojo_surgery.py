"""B'MOJO in the place of attention: what it takes over, and how far it equals its source before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memzoo.models.config import ModelConfig
from memzoo.models.conversion import ConversionPlan, check_parity, convert_mixers, memory_off
from memzoo.models.conversion.plan import exact_reach, softmax_reach
from memzoo.models.decoder import MemoryLM

TARGET: dict[str, Any] = {"type": "bmojo", "window_size": 8, "mixers": [{"type": "mamba2"}]}
BOTH = {"zero_gate": True, "eidetic_size": 4}  # a stored token is seen as its image too


def teacher() -> MemoryLM:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50,
        d_model=24,
        layers={"type": "attention"},
        num_layers=2,
        mixer_defaults={"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "qkv_bias": True},
        mlp={"type": "swiglu", "d_ff": 32},
        tie_embeddings=True,
    )
    return MemoryLM(config).eval()


def tokens(length: int) -> torch.Tensor:
    return torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "options", [{}, {"eidetic_size": 4}, {"tie_weights": False}, {"zero_gate": True}, BOTH]
)
def test_up_to_its_window_the_model_is_its_source(options: dict[str, Any]) -> None:
    source = teacher()
    student, report = convert_mixers(source, ConversionPlan(target={**TARGET, **options}))
    check_parity(source, student, report, tokens(40))
    report.raise_on_failure()
    reach = 16 if options == {"zero_gate": True} else 8
    assert exact_reach(student.config.mixers[0]) == reach
    assert softmax_reach(student.config.mixers[0]) == 8
    assert any(f"first {reach} tokens" in check.name for check in report.checks)
    assert (source(tokens(40)).logits - student(tokens(40)).logits).abs().max() > 1e-4
    assert not report.dropped


def test_what_the_fading_stream_takes_over() -> None:
    source = teacher()
    student, _ = convert_mixers(source, ConversionPlan(target={**TARGET, "tie_weights": False}))
    old, new = (model.blocks[0].mixer.state_dict() for model in (source, student))
    for name in ("q_proj.weight", "k_proj.bias", "v_proj.weight", "k_norm.weight"):
        assert torch.equal(new[name], old[name])
        assert torch.equal(new[f"fading_{name}"], old[name])
    inner = student.blocks[0].mixer.mixers[0]
    width = inner.config.num_heads * inner.config.head_dim
    assert torch.equal(inner.out_proj.weight, old["o_proj.weight"])
    assert torch.equal(inner.in_proj.weight[3 * width : 4 * width], old["q_proj.weight"])


def test_with_the_gate_at_zero_it_is_a_window_twice_as_wide() -> None:
    source = teacher()
    student, _ = convert_mixers(source, ConversionPlan(target={**TARGET, "zero_gate": True}))
    window, _ = convert_mixers(source, ConversionPlan(target={"type": "sliding_window", "window_size": 16}))
    torch.testing.assert_close(student(tokens(40)).logits, window(tokens(40)).logits, rtol=0, atol=1e-5)
    narrow, _ = convert_mixers(source, ConversionPlan(target={"type": "sliding_window", "window_size": 8}))
    with memory_off(student):
        torch.testing.assert_close(student(tokens(40)).logits, narrow(tokens(40)).logits, rtol=0, atol=1e-5)
