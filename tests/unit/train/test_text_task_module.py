"""Tasks in English as training data: labels, order of the draws, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memzoo.train.data.mqar import IGNORE_INDEX
from memzoo.train.data.text_task_module import TextTaskDataModule

TASK = {"type": "needle_text", "num_asked": 3, "num_distractors": 2, "num_digits": 2}


def module(**settings: Any) -> TextTaskDataModule:
    given = {"tokenizer": "bytes", "seq_len": 700, "batch_size": 3, "num_batches": 4, "num_val_examples": 5}
    return TextTaskDataModule(**({"task": TASK} | given | settings))


def test_labels_are_the_next_token_of_every_answer() -> None:
    data = module()
    batch = next(iter(data.train_dataloader()))
    assert batch.input_ids.shape == batch.labels.shape == (3, 700)
    for row, labels in zip(batch.input_ids, batch.labels, strict=True):
        asked = (labels != IGNORE_INDEX).nonzero()[:, 0]
        assert torch.equal(labels[asked], row[asked + 1])
        text = data.tokenizer.decode(row)
        codes = data.tokenizer.decode(row[asked + 1])
        question = text[text.index("Question:") :]
        assert len(codes) == 6  # three codes of two digits
        for code in (codes[:2], codes[2:4], codes[4:]):
            place = question[: question.index(f" is {code}")].rpartition(" of the ")[2]
            assert f"The secret code of the {place} is {code}." in text[: text.index("Question:")]


def test_all_tokens_of_a_context_can_be_labels() -> None:
    batch = next(iter(module(labels="all").train_dataloader()))
    for row, labels in zip(batch.input_ids, batch.labels, strict=True):
        num_read = int((labels != IGNORE_INDEX).sum())
        assert 680 < num_read < 700
        assert torch.equal(labels[:num_read], row[1 : num_read + 1])
        assert (labels[num_read:] == IGNORE_INDEX).all()


def test_every_epoch_is_fresh_and_repeatable_and_validation_is_neither() -> None:
    data = module()

    def rows(loader: Any) -> list[tuple[int, ...]]:
        return [tuple(row) for batch in loader for row in batch.input_ids.tolist()]

    loader = data.train_dataloader()
    first = rows(loader)
    loader.sampler.set_epoch(1)
    second = rows(loader)
    loader.sampler.set_epoch(0)
    assert rows(loader) == first
    val = rows(data.val_dataloader())
    assert len(first) == 12
    assert len(val) == 6  # whole batches
    assert len({*first, *second, *val}) == 30
    assert rows(module(seed=1).train_dataloader()) != first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": {"type": "needle_test"}}, "needle_text"),
        ({"task": {"type": "needle_text", "num_askd": 2}}, "num_asked"),
        ({"task": {**TASK, "num_values": 2}}, "several codes are asked of one place only"),
        ({"task": {**TASK, "num_distractors": 30}}, "num_distractors must be at most 29"),
        ({"labels": "none"}, "labels must be answers or all"),
        ({"num_batches": 0}, "at least 1"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**settings)


def test_a_context_too_short_is_refused_before_the_first_batch() -> None:
    with pytest.raises(ValueError, match="Use a longer context, or hide less"):
        module(seq_len=60).setup()
