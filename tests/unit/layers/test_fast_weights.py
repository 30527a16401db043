"""Layers with a net that learns while they read: AllMem, LaCT and the memory by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memzoo.layers import build_mixer, mixer_config, probe
from memzoo.models.config import ModelConfig
from memzoo.models.conversion import ConversionPlan, check_parity, convert_mixers, memory_off
from memzoo.models.decoder import MemoryLM

MEMORY = {"type": "fast_weight_memory", "d_model": 12, "num_heads": 2, "mem_dim": 8, "chunk_size": 5}
ALLMEM = {"type": "allmem", "window_size": 8, "num_sinks": 2, "mem_dim": 12, "chunk_size": 8}


def teacher() -> MemoryLM:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50,
        d_model=24,
        layers={"type": "attention"},
        num_layers=2,
        mixer_defaults={"num_heads": 4, "num_kv_heads": 2, "head_dim": 6},
        mlp={"type": "swiglu", "d_ff": 32},
        tie_embeddings=True,
    )
    return MemoryLM(config).eval()


def tokens(length: int) -> torch.Tensor:
    return torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(1))


def test_a_converted_model_is_its_teacher_while_the_sequence_fits_the_window() -> None:
    source = teacher()
    student, report = convert_mixers(source, ConversionPlan(target=ALLMEM))
    check_parity(source, student, report, tokens(40))
    report.raise_on_failure()
    assert (source(tokens(8)).logits - student(tokens(8)).logits).abs().max() < 1e-5
    windowed, _ = convert_mixers(
        source, ConversionPlan(target={"type": "sliding_window", "window_size": 8, "num_sinks": 2})
    )
    torch.testing.assert_close(student(tokens(40)).logits, windowed(tokens(40)).logits, rtol=0, atol=1e-5)


def test_the_memory_takes_nothing_from_the_attention_even_where_shapes_agree() -> None:
    source = teacher()
    student, report = convert_mixers(
        source, ConversionPlan(target=ALLMEM)
    )  # mem_dim is the width of the keys
    memory = {name for name in report.new_parameters if ".mixers.1." in name}
    assert memory == {name for name in student.state_dict() if ".mixers.1." in name}
    assert report.dropped == []


def test_the_memory_can_be_switched_off() -> None:
    source = teacher()
    student, _ = convert_mixers(source, ConversionPlan(target=ALLMEM))
    with torch.no_grad():
        for block in student.blocks:
            block.mixer.coefficient.fill_(0.5)
    windowed, _ = convert_mixers(
        source, ConversionPlan(target={"type": "sliding_window", "window_size": 8, "num_sinks": 2})
    )
    expected = windowed(tokens(40)).logits
    assert (student(tokens(40)).logits - expected).abs().max() > 1e-3
    with memory_off(student):
        torch.testing.assert_close(student(tokens(40)).logits, expected, rtol=0, atol=1e-5)


def test_every_parameter_but_the_coefficient_waits_for_it() -> None:
    mixer = build_mixer({**ALLMEM, "d_model": 24, "num_heads": 4})
    x = torch.randn(1, 30, 24)

    def moved() -> set[str]:
        mixer.zero_grad()
        mixer(x).hidden.square().sum().backward()
        return {name for name, p in mixer.named_parameters() if p.grad is not None and bool(p.grad.any())}

    assert not any(name.startswith("mixers.1.") for name in moved())
    assert "coefficient" in moved()
    with torch.no_grad():
        mixer.coefficient.fill_(0.1)
    assert {name for name, _ in mixer.named_parameters()} == moved()


@pytest.mark.parametrize("kind", ["fast_weight_memory", "lact"])
def test_orthogonal_steps_keep_the_contract_of_splits_in_float64(kind: str) -> None:
    own: dict[str, Any] = (
        {"mem_dim": 8} if kind == "fast_weight_memory" else {"fast_heads": 1, "window_size": 4}
    )
    torch.manual_seed(0)
    mixer = build_mixer(
        {"type": kind, "d_model": 8, "num_heads": 2, **own, "chunk_size": 5, "muon": True, "lr_init": 0.1}
    ).double()
    x = torch.randn(2, 33, 8, dtype=torch.float64)
    whole = mixer(x).hidden
    state, parts, start = None, [], 0
    for size in (1, 7, 0, 12, 1, 1, 11):
        out = mixer(x[:, start : start + size], state, return_state=True)
        parts.append(out.hidden)
        state, start = out.state, start + size
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)


def test_a_call_may_have_its_own_chunks_but_not_with_a_state() -> None:
    mixer, x = build_mixer(MEMORY), torch.randn(1, 20, 12)
    other = build_mixer({**MEMORY, "chunk_size": 7})
    other.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(x, overrides={"chunk_size": 7}).hidden, other(x).hidden)
    with pytest.raises(ValueError, match="overridden only in calls without a state; got 7 for 5"):
        mixer(x, overrides={"chunk_size": 7}, return_state=True)


def test_allmem_takes_all_three_sizes_for_one_call() -> None:
    settings = {**ALLMEM, "d_model": 24, "num_heads": 4}
    mixer, x = build_mixer(settings), torch.randn(1, 40, 24)
    sizes = {"window_size": 5, "num_sinks": 1, "chunk_size": 6}
    other = build_mixer({**settings, **sizes})
    other.load_state_dict(mixer.state_dict())
    for made in (mixer, other):
        with torch.no_grad():
            made.coefficient.fill_(0.5)
    torch.testing.assert_close(mixer(x, overrides=sizes).hidden, other(x).hidden)


def test_health_of_the_memory_can_be_looked_at() -> None:
    mixer = build_mixer(MEMORY)
    with probe() as seen:
        assert mixer(torch.randn(2, 11, 12)).state is None
    assert seen["fast_rate"][0].shape == (2, 11, 2, 3)
    assert seen["fast_momentum"][0].shape == (2, 11, 2)
    assert seen["fast_weight_norm"][0].shape == seen["fast_step_norm"][0].shape == (2, 2)


@pytest.mark.parametrize("num_tokens", [128, 65_536])
def test_the_state_has_one_size(num_tokens: int) -> None:
    mixer = build_mixer({**ALLMEM, "d_model": 24, "num_heads": 4})
    assert mixer.state_num_bytes(num_tokens) == mixer.init_state(1).num_bytes()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mem_dim": 9}, "mem_dim must be a multiple of num_heads, got 9 and 2"),
        ({"net": "swigl"}, "swiglu"),
        ({"low_rank": 2, "net": "mlp"}, "low_rank is for the gate and up matrices"),
        ({"lr_init": 0.0}, "lr_init must be positive"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixer_config({**MEMORY, **change})
