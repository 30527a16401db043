"""Measuring speed: the figures are of the runs they claim to be of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM
from memzoo.train import speed
from memzoo.train.speed import measure_speed, peak_memory

KEYS = {
    "length", "prefill_tokens_per_second", "decode_tokens_per_second", "prefill_seconds",
    "decode_seconds_per_token", "state_bytes", "declared_state_bytes", "peak_bytes",
}  # fmt: skip


def small_model(mixer: str = "attention") -> MemoryLM:
    torch.manual_seed(0)
    return MemoryLM(ModelConfig(vocab_size=31, d_model=16, layers=[{"type": mixer, "num_heads": 2}]))


def test_state_bytes_are_those_after_the_context() -> None:
    rows = measure_speed(small_model(), [600, 8], chunk_size=64, decode_tokens=2, repetitions=1, batch_size=2)
    assert [row["length"] for row in rows] == [8, 600]
    assert all(set(row) == KEYS for row in rows)
    for row in rows:
        assert row["state_bytes"] == row["declared_state_bytes"]
        assert row["state_bytes"] == small_model().state_num_bytes(row["length"], 2)
    assert rows[1]["state_bytes"] > rows[0]["state_bytes"]
    constant = measure_speed(small_model("based"), [8, 40], decode_tokens=2, repetitions=1)
    assert constant[0]["state_bytes"] == constant[1]["state_bytes"]


def test_rates_are_tokens_over_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading takes 4, 1 and 2 seconds, writing 3, 9 and 6; the first writing is not counted."""
    taken = iter([4.0, 1.0, 2.0, 100.0, 3.0, 9.0, 6.0])
    seen: list[int] = []

    def timed(run: Callable[[], object], device: torch.device) -> float:
        run()
        return next(taken)

    monkeypatch.setattr(speed, "_seconds", timed)
    model = small_model()
    model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    progress: list[tuple[int, ...]] = []
    (row,) = measure_speed(
        model, [10], chunk_size=4, decode_tokens=3, on_step=lambda *done: progress.append(done)
    )
    assert row["prefill_tokens_per_second"] == 10 / 2
    assert row["decode_tokens_per_second"] == 3 / 6
    assert row["prefill_seconds"] == {"median": 2.0, "min": 1.0, "max": 4.0}
    assert seen == [4] + [4, 4, 2] * 4 + [1] * 3 * 4
    assert progress[-1] == (8, 8)


def test_decoding_leaves_the_kept_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    model.train()
    seen: list[int] = []
    step = MemoryLM.step

    def counted(self: MemoryLM, ids: torch.Tensor, state, **options):  # type: ignore[no-untyped-def]
        seen.append(int(state.num_tokens[0]))
        return step(self, ids, state, **options)

    monkeypatch.setattr(MemoryLM, "step", counted)
    measure_speed(model, [5], decode_tokens=2, repetitions=2)
    assert seen == [5, 6] * 3
    assert model.training, "the mode of the model is as it was"


def test_peak_memory_sees_a_large_tensor() -> None:
    device = torch.device("cpu")
    peak = peak_memory(lambda: torch.ones(25_000_000), device)
    if peak is None:
        pytest.skip("the system does not report peak memory")
    assert 9.5e7 < peak < 2e8


def test_sizes_are_checked_first() -> None:
    model = small_model()
    for message, options in (
        ("lengths is empty", {"lengths": []}),
        ("lengths must be at least 1, got 0", {"lengths": [4, 0]}),
        ("decode_tokens must be at least 1", {"lengths": [4], "decode_tokens": 0}),
        ("repetitions must be at least 1", {"lengths": [4], "repetitions": -1}),
    ):
        with pytest.raises(ValueError, match=message):
            measure_speed(model, **options)  # type: ignore[arg-type]
