"""What a run will need, said before it, against what it then takes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from memzoo.models.config import ModelConfig
from memzoo.train import preflight, random_state
from memzoo.train.data.batches import TokenBatch
from memzoo.train.modules import LanguageModelModule
from memzoo.train.preflight import LiveBytes, estimate_step

MODELS: dict[str, Any] = {
    "attention": {
        "layers": {"type": "attention", "num_heads": 4},
        "num_layers": 4,
        "mlp": {"type": "swiglu", "d_ff": 128},
    },
    "memory": {
        "layers": [
            {"type": "based", "feature_dim": 8, "num_heads": 2},
            {"type": "sliding_window", "window_size": 16, "num_heads": 2},
            {"type": "based", "feature_dim": 8, "num_heads": 2},
        ]
    },
}


def module(name: str, recompute: bool = False, **settings: Any) -> LanguageModelModule:
    config = ModelConfig.from_dict({"vocab_size": 301, "d_model": 64, **MODELS[name]})
    made = LanguageModelModule(config, recompute=recompute, **settings)
    made.log = lambda *arguments, **named: None  # type: ignore[method-assign]
    return made.train()


def measured(made: LanguageModelModule, rows: int, tokens: int) -> tuple[int, int]:
    """Peak bytes of a real forward and backward, gradients included, and the bytes of those."""
    ids = torch.randint(301, (rows, tokens))
    with LiveBytes() as counter:
        made.training_step(TokenBatch(ids, ids), 0).backward()
    return counter.peak, sum(parameter.nbytes for parameter in made.parameters())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_estimate_is_near_what_a_step_takes(name: str, recompute: bool) -> None:
    made = module(name, recompute)
    found = estimate_step(made, 4, 200)
    peak, gradients = measured(made, 4, 200)
    assert found.gradients == gradients
    guess = found.activations + found.gradients + found.head
    assert 1 / 1.5 < guess / peak < 1.5, (guess, peak)
    assert found.optimizer == 2 * gradients
    assert found.total > guess
    assert found.state == 0


def test_recomputation_and_length_count() -> None:
    kept, again = (estimate_step(module("attention", recompute), 4, 200) for recompute in (False, True))
    assert again.activations < 0.7 * kept.activations
    assert again.flops == pytest.approx(4 / 3 * kept.flops)
    # beyond what is measured: as a real step
    made = module("attention")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "MAX_MEASURED_TOKENS", 128)
        extended = estimate_step(made, 1, 1000).activations
    assert extended == pytest.approx(estimate_step(made, 1, 1000).activations, rel=0.1)


def test_flops_are_those_of_the_model() -> None:
    made = module("attention")
    found = estimate_step(made, 2, 100, num_batches=3)
    matrices = sum(weight.numel() for block in made.model.blocks for weight in block.parameters())
    least = 3 * 2 * (matrices + 301 * 64) * 600  # two per multiply-add, three passes
    assert least < found.flops < 1.5 * least


def test_precision_and_frozen_weights_count() -> None:
    made = module("memory")
    full = estimate_step(made, 4, 64)
    half = estimate_step(made, 4, 64, precision=torch.bfloat16)
    assert 0.4 * full.activations < half.activations < 0.9 * full.activations
    assert half.weights == 1.5 * full.weights
    for parameter in made.model.blocks[0].parameters():
        parameter.requires_grad_(False)
    part = estimate_step(made, 4, 64)
    assert part.num_trained < full.num_trained == full.num_parameters
    assert part.gradients + part.optimizer == 3 * 4 * part.num_trained
    carried = estimate_step(module("memory", carry_state=True), 4, 64)
    assert carried.state == 2 * made.model.state_num_bytes(64, 4)


def test_nothing_is_drawn_and_nothing_is_left() -> None:
    made = module("memory")
    before = random_state.capture()
    estimate_step(made, 2, 64)
    preflight.matmul_rate(torch.device("cpu"), torch.float32, 0.01)
    after = random_state.capture()
    assert torch.equal(before["torch"], after["torch"])
    assert before["python"] == after["python"]
    assert all(parameter.grad is None for parameter in made.parameters())


class FakeTrainer:
    """As much of a trainer as the callback looks at."""

    is_global_zero, precision, accumulate_grad_batches = True, "32-true", 2
    max_epochs, max_steps = -1, 100

    class strategy:  # noqa: N801
        root_device = torch.device("cpu")

    class datamodule:  # noqa: N801
        batch_size, seq_len = 4, 64


def test_it_speaks_before_the_run_and_warns_where_it_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []
    callback = preflight.Preflight(said.append)
    with caplog.at_level(logging.WARNING):
        callback.on_fit_start(FakeTrainer(), module("memory"))  # type: ignore[arg-type]
    assert not caplog.text
    assert len(said) == 3
    assert "parameters" in said[0]
    assert "activations" in said[0]
    assert "free in the machine" in said[1]
    assert "for 100 steps" in said[2]
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 1000)
    with caplog.at_level(logging.WARNING):
        callback.on_fit_start(FakeTrainer(), module("memory"))  # type: ignore[arg-type]
    assert "THIS RUN WILL NOT FIT" in caplog.text
    assert callback.estimate is not None


def test_words() -> None:
    assert [preflight.size(number) for number in (10, 2048, 5 << 20, 3 << 30)] == [
        "10 B",
        "2 KiB",
        "5 MiB",
        "3 GiB",
    ]
    assert [preflight.duration(number) for number in (0.25, 30, 120, 7200, 172800)] == [
        "250 ms",
        "30 s",
        "2 min",
        "2 h",
        "2 days",
    ]
    free = preflight.free_bytes(torch.device("cpu"))
    assert free is not None
    assert free > 1 << 20
