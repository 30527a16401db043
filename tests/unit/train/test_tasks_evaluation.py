"""Recall by length and depth: the figures are those of a plain reading, however the reading is cut."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from memzoo import cli
from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM
from memzoo.models.hf import save_model
from memzoo.records import read_record
from memzoo.train.data.mqar import IGNORE_INDEX
from memzoo.train.data.tasks import TASKS, Task, TaskExamples, make_task, split_rng
from memzoo.train.data.text_tasks import make_text_task
from memzoo.train.data.tokenizers import byte_tokenizer
from memzoo.train.task_evaluation import (
    Answers,
    answer_tokens,
    recall_on_task,
    recall_on_text_task,
    text_example,
)

CONFIG = ModelConfig(
    vocab_size=257,
    d_model=16,
    layers=[
        {"type": "sliding_window", "window_size": 5, "num_heads": 2},
        {"type": "based", "feature_dim": 4, "num_heads": 2, "chunk_size": 7},
    ],
)
NEEDLE = make_task({"type": "needle", "num_values": 2, "num_distractors": 3}, seq_len=64)


@pytest.fixture(scope="module")
def model() -> MemoryLM:
    torch.manual_seed(0)
    return MemoryLM(CONFIG)


def joined(task: Task, num_examples: int, seed: int = 0) -> TaskExamples:
    """The examples that an evaluation reads."""
    drawn = [
        task.examples(split_rng(seed, "evaluate", task.seq_len, number), 1) for number in range(num_examples)
    ]
    return TaskExamples(
        *(torch.cat([getattr(one, name) for one in drawn]) for name in ("inputs", "labels", "evidence"))
    )


class Oracle(torch.nn.Module):
    """A model that knows the labels, and is wrong where it is told to be."""

    def __init__(self, answers: torch.Tensor, vocab_size: int) -> None:
        super().__init__()
        self.answers, self.position, self.longest = answers, 0, 0
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.embed_tokens = SimpleNamespace(weight=torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, state: Any, **options: Any) -> SimpleNamespace:
        assert (state is None) == (self.position == 0), "the state is carried"
        here = self.answers[:, self.position : self.position + input_ids.shape[1]]
        self.position += input_ids.shape[1]
        self.longest = max(self.longest, input_ids.shape[1])
        hidden = F.one_hot(here.clamp(min=0), self.config.vocab_size).float()
        return SimpleNamespace(hidden_states=(hidden,), state="read" if options["return_state"] else None)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return 10 * hidden


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("name", sorted(TASKS))
def test_an_oracle_is_right_and_its_mistakes_are_counted(name: str, chunk_size: int) -> None:
    task = make_task({"type": name}, seq_len=64)
    examples = joined(task, 6)
    knowing = examples.labels.clone()
    oracle = Oracle(knowing, task.vocab_size)
    found = answer_tokens(oracle, examples, chunk_size=chunk_size)  # type: ignore[arg-type]
    assert bool(found.is_right.all())
    assert oracle.longest == min(chunk_size, 64), "no call reads more than a chunk"
    assert float(found.loss.max()) < 0.1
    asked = (knowing != IGNORE_INDEX).nonzero()
    assert found.example.tolist() == asked[:, 0].tolist()
    assert found.depth.tolist() == pytest.approx((examples.evidence[tuple(asked.T)] / 64).tolist())

    wrong = asked[asked[:, 0] == 4][0]
    knowing[tuple(wrong)] = 0  # the blank is no answer
    found = answer_tokens(Oracle(knowing, task.vocab_size), examples, chunk_size=chunk_size)  # type: ignore[arg-type]
    assert (~found.is_right).nonzero().flatten().tolist() == [asked.tolist().index(wrong.tolist())]
    summary = found.summary(4)
    assert summary["exact_match"] == pytest.approx(5 / 6)
    num_asked = len(asked) // 6
    assert summary["accuracy"] == pytest.approx(1 - 1 / (6 * num_asked))


def test_figures_by_hand() -> None:
    found = Answers(
        example=torch.tensor([0, 0, 1, 1, 2, 2]),
        is_right=torch.tensor([True, True, True, False, False, False]),
        loss=torch.tensor([0.0, 2.0, 1.0, 1.0, 4.0, 4.0]),
        depth=torch.tensor([0.1, 0.2, 0.3, 0.9, 0.6, 1.0], dtype=torch.float64),
    )
    summary = found.summary(2)
    assert summary["num_examples"] == 3
    assert summary["accuracy"] == pytest.approx(0.5)
    assert summary["accuracy_standard_error"] == pytest.approx(0.5 / math.sqrt(3))
    assert summary["exact_match"] == pytest.approx(1 / 3)
    assert summary["exact_match_standard_error"] == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))
    assert summary["loss"] == pytest.approx((1 + 1 + 4) / 3)
    first, second = summary["by_depth"]
    assert (first["first"], first["end"], second["first"], second["end"]) == (0, 0.5, 0.5, 1)
    assert (first["num_examples"], first["accuracy"], first["exact_match"]) == (2, 1.0, 1.0)
    assert (second["num_examples"], second["accuracy"]) == (2, 0.0)
    assert second["loss"] == pytest.approx((1 + 4) / 2)
    assert [part["first"] for part in found.summary(4)["by_depth"]] == [0, 0.25, 0.5, 0.75]
    alone = Answers(
        torch.tensor([7]), torch.tensor([True]), torch.tensor([0.0]), torch.tensor([0.5]).double()
    )
    assert alone.summary(2)["accuracy_standard_error"] is None
    assert len(alone.summary(2)["by_depth"]) == 1


def test_figures_are_those_of_a_plain_reading(model: MemoryLM) -> None:
    found = recall_on_task(model, NEEDLE, [64, 128], num_examples=30, batch_size=8, chunk_size=19)
    assert found["chance"] == NEEDLE.chance
    for row, length in zip(found["lengths"], (64, 128), strict=True):
        examples = joined(
            make_task({"type": "needle", "num_values": 2, "num_distractors": 3}, seq_len=length), 30
        )
        with torch.no_grad():
            logits = model(examples.inputs).logits
        asked = examples.labels != IGNORE_INDEX
        right = (logits.argmax(-1) == examples.labels)[asked].double()
        losses = F.cross_entropy(logits[asked], examples.labels[asked], reduction="none")
        assert row["length"] == length
        assert row["num_examples"] == 30
        assert row["accuracy"] == pytest.approx(float(right.mean()))
        assert row["exact_match"] == pytest.approx(float(right.view(30, 2).prod(1).mean()))
        assert row["loss"] == pytest.approx(float(losses.mean()), abs=1e-5)
        assert row["state_num_bytes"] == model.state_num_bytes(length)
        assert row["tokens_per_second"] > 0


@pytest.mark.parametrize(
    "options", [{"batch_size": 1}, {"chunk_size": 1}, {"batch_size": 7, "chunk_size": 50}]
)
def test_batches_and_chunks_change_no_number(model: MemoryLM, options: dict[str, int]) -> None:
    whole = recall_on_task(model, NEEDLE, [64], num_examples=12)["lengths"][0]
    cut = recall_on_task(model, NEEDLE, [64], num_examples=12, **options)["lengths"][0]
    assert cut["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    for key in ("accuracy", "exact_match", "num_examples"):
        assert cut[key] == whole[key]
        assert [part[key] for part in cut["by_depth"]] == [part[key] for part in whole["by_depth"]]


def test_more_examples_begin_with_the_same_ones_and_seeds_differ(model: MemoryLM) -> None:
    few, many = (recall_on_task(model, NEEDLE, [64], num_examples=number) for number in (5, 6))
    other = recall_on_task(model, NEEDLE, [64], num_examples=5, seed=1)
    assert few["lengths"][0]["loss"] != many["lengths"][0]["loss"]
    assert few["lengths"][0]["loss"] != other["lengths"][0]["loss"]
    assert torch.equal(joined(NEEDLE, 5).inputs, joined(NEEDLE, 6).inputs[:5])


def test_the_mode_of_the_model_is_left_as_it_was_and_progress_is_told(model: MemoryLM) -> None:
    model.train()
    seen: list[tuple[int, int]] = []
    recall_on_task(
        model,
        NEEDLE,
        [64, 65],
        num_examples=5,
        batch_size=3,
        on_example=lambda *numbers: seen.append(numbers),
    )
    assert model.training
    assert seen == [(3, 10), (5, 10), (8, 10), (10, 10)]


def test_what_cannot_be_measured_is_refused_before_the_reading(model: MemoryLM) -> None:
    with pytest.raises(ValueError, match="at length 5: NeedleTask needs at least"):
        recall_on_task(model, NEEDLE, [64, 5])
    with pytest.raises(ValueError, match="there is no length"):
        recall_on_task(model, NEEDLE, [])
    with pytest.raises(ValueError, match="the task has 512 tokens, the model 257"):
        recall_on_task(model, make_task({"type": "mqar"}, seq_len=64), [64])
    with pytest.raises(ValueError, match="num_examples must be at least 1, got 0"):
        recall_on_task(model, NEEDLE, [64], num_examples=0)
    text = make_text_task({"type": "needle_text"}, seq_len=512)
    small = MemoryLM(ModelConfig(vocab_size=200, d_model=8, layers=[{"type": "based", "num_heads": 1}]))
    with pytest.raises(ValueError, match="the tokenizer has 257 tokens, the model 200"):
        recall_on_text_task(small, byte_tokenizer(), text, [512])
    with pytest.raises(ValueError, match="what is hidden and asked takes about"):
        recall_on_text_task(model, byte_tokenizer(), text, [512, 20])


def test_a_text_is_scored_at_the_tokens_of_its_answers() -> None:
    tokenizer = byte_tokenizer()
    task = make_text_task({"type": "needle_text", "num_values": 2}, seq_len=400)
    examples = text_example(task, tokenizer, seed=0, number=3)
    asked = examples.labels != IGNORE_INDEX
    assert int(asked.sum()) == 2 * task.num_digits
    found = answer_tokens(Oracle(examples.labels, 257), examples, chunk_size=90)  # type: ignore[arg-type]
    assert bool(found.is_right.all())
    # a label is the token that follows
    whole = tokenizer.decode(examples.inputs[0]) + tokenizer.decode(examples.labels[0, -1:])
    assert codes_at_the_end(whole) == tokenizer.decode(examples.labels[asked])


def codes_at_the_end(text: str) -> str:
    """The codes of the answer, written together."""
    return text.rsplit(" are ", 1)[1].replace(", ", "")


def test_texts_are_measured_by_length(model: MemoryLM) -> None:
    task = make_text_task({"type": "variable_tracking_text"}, seq_len=512)
    seen: list[tuple[int, int]] = []
    found = recall_on_text_task(
        model,
        byte_tokenizer(),
        task,
        [300, 600],
        num_examples=3,
        chunk_size=128,
        on_example=lambda *numbers: seen.append(numbers),
    )
    assert [row["length"] for row in found["lengths"]] == [300, 600]
    assert all(row["num_examples"] == 3 for row in found["lengths"])
    assert seen[-1] == (6, 6)
    again = recall_on_text_task(model, byte_tokenizer(), task, [300], num_examples=3)
    assert again["lengths"][0]["loss"] == pytest.approx(found["lengths"][0]["loss"], abs=1e-5)


def test_the_command_writes_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: MemoryLM
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(model, tmp_path / "model", byte_tokenizer())
    run = ["evaluate", "task", "--model", "model", "--num_examples", "4", "--output", "record.json"]
    settings = ["--settings", "{num_distractors: 3, depth: [0, 0.5]}"]
    assert cli.main([*run, "--task", "needle", "--lengths", "[64, 128]", *settings]) == 0
    assert "chance is 0.0625" in capsys.readouterr().out
    record = read_record("record.json")
    assert record["name"] == "evaluate/task"
    assert record["config"]["task"] == {"type": "needle", "num_distractors": 3, "depth": [0, 0.5]}
    assert [row["length"] for row in record["results"]["lengths"]] == [64, 128]
    assert all(part["end"] <= 0.75 for row in record["results"]["lengths"] for part in row["by_depth"])

    assert cli.main([*run, "--task", "needle_text", "--lengths", "300"]) == 0
    assert "all" in capsys.readouterr().out
    assert "tokenizer" in read_record("record.json")["config"]

    for flags, message in (
        (["--task", "needel"], "Did you mean 'needle'?"),
        (["--task", "needle", "--settings", "{num_value: 2}"], "Did you mean 'num_values'?"),
        (["--task", "needle", "--lengths", "[64, 2]"], "at length 2: NeedleTask needs at least 4 tokens"),
        (["--task", "needle", "--lengths", "[]"], "lengths is empty"),
        (["--task", "needle_text", "--lengths", "[30]"], "what is hidden and asked takes about"),
    ):
        assert cli.main([*run, *flags]) == 2
        assert message in capsys.readouterr().err


def test_tasks_are_measured_alike_and_shown_on_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: MemoryLM
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(model, tmp_path / "model", byte_tokenizer())
    entries = "[{task: copying, lengths: [32, 64], num_examples: 1}, {task: needle, lengths: [64]}]"
    run = ["evaluate", "all", "--models", "model", "--task", entries, "--output", "page"]
    assert cli.main(run) == 0
    assert {path.name for path in Path("page").glob("*.json")} == {"00_task.json", "01_task.json"}
    text = Path("page/page.html").read_text()
    assert "Task: copying" in text
    assert "Task: needle" in text
