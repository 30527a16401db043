"""The study of recall out of the reach of the window."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memzoo.records import read_record


def test_the_quick_form_tests_with_the_memory_off_and_other_sizes(tmp_path: Path) -> None:
    import past_window

    arguments = ["--quick", "--records", str(tmp_path), "--work", str(tmp_path / "work")]
    assert past_window.main([*arguments, "--only", "random sizes"]) == 0
    window, drawn = read_record(tmp_path / "past_window.json")["results"]["runs"]
    assert (window["variant"], drawn["variant"]) == ("window", "random sizes")
    assert "memory_off" not in window
    assert set(drawn["other_sizes"]) == {f"window {w}, chunk {c}" for w, c in past_window.OTHER_SIZES}
    assert 0 <= drawn["memory_off"] <= 1
    begin = len(list((tmp_path / "work").iterdir()))
    assert past_window.main([*arguments, "--only", "random sizes"]) == 0
    assert len(list((tmp_path / "work").iterdir())) == begin == 2


@pytest.mark.parametrize("name", ["window", "allmem", "linear, width 16, 12 needles"])
def test_the_evidence_is_out_of_the_reach_of_the_window(name: str) -> None:
    import past_window

    from memzoo.train.data.mqar import IGNORE_INDEX
    from memzoo.train.data.tasks import make_task, split_rng

    variant = past_window.VARIANTS[name]
    drawn = make_task(variant.task, seq_len=variant.length).examples(split_rng(0, "test", 0, 0), 50)
    first_answer = (drawn.labels != IGNORE_INDEX).int().argmax(1)
    last_evidence = torch.as_tensor(drawn.evidence).flatten(1).amax(1)
    assert int((first_answer - last_evidence).min()) >= variant.mixer["window_size"]


def test_other_sizes_have_the_same_weights() -> None:
    import past_window

    from memzoo.models.config import ModelConfig
    from memzoo.models.decoder import MemoryLM

    model = MemoryLM(ModelConfig(vocab_size=66, d_model=64, layers=[dict(past_window.ALLMEM)]))
    other = past_window._resized(model, 8, 4)
    assert (other.config.mixers[0].window_size, other.config.mixers[0].chunk_size) == (8, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
