"""Perplexity by position, recall, comparison of records, and the table of layers."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM
from memzoo.train.data.mqar import MQARConfig, mqar
from memzoo.train.evaluate import (
    PositionLosses,
    compare_records,
    position_edges,
    position_losses,
    recall_on_mqar,
)
from memzoo.train.inspection import facts_table, inspect_model
from memzoo.train.speed import peak_memory

CPU = torch.device("cpu")

CONFIG = ModelConfig(
    vocab_size=64,
    d_model=16,
    layers=[
        {"type": "sliding_window", "window_size": 5, "num_heads": 2},
        {"type": "based", "feature_dim": 4, "num_heads": 2, "chunk_size": 7},
    ],
    mlp={"type": "swiglu", "d_ff": 24},
)


@pytest.fixture(scope="module")
def model() -> MemoryLM:
    torch.manual_seed(0)
    return MemoryLM(CONFIG)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(64, (200,), generator=torch.Generator().manual_seed(1))


def test_losses_are_those_of_each_window_alone(model: MemoryLM, tokens: torch.Tensor) -> None:
    found = position_losses(model, tokens, window_size=40, num_windows=3, first_token=9)
    assert found.starts == (9, 49, 89)
    for row, start in zip(found.losses, found.starts, strict=True):
        logits = model(tokens[None, start : start + 40]).logits[0]
        expected = F.cross_entropy(logits, tokens[start + 1 : start + 41], reduction="none")
        assert torch.allclose(row, expected, atol=1e-6)
    assert found.loss == pytest.approx(float(found.losses.mean()), abs=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.window_losses == pytest.approx(found.losses.mean(dim=1).tolist(), abs=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 7, 40, 1000])
def test_reading_in_pieces_changes_no_number(model: MemoryLM, tokens: torch.Tensor, chunk_size: int) -> None:
    whole = position_losses(model, tokens, window_size=40)
    pieces = position_losses(model, tokens, window_size=40, chunk_size=chunk_size)
    assert torch.allclose(whole.losses, pieces.losses, atol=1e-5)
    assert len(whole.starts) == 4, "199 predictions fill four windows of 40"


def test_the_mode_of_the_model_is_left_as_it_was(model: MemoryLM, tokens: torch.Tensor) -> None:
    model.train()
    seen = []
    position_losses(model, tokens, window_size=40, on_window=lambda done, total: seen.append((done, total)))
    assert model.training
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_buckets_cover_the_window_once() -> None:
    losses = PositionLosses(torch.arange(20.0).view(2, 10), (0, 10), seconds=1.0)
    low, high = losses.buckets([0, 4, 10])
    assert (low["first"], low["last"], high["first"], high["last"]) == (0, 3, 4, 9)
    assert low["window_losses"] == [1.5, 11.5]
    assert high["loss"] == pytest.approx(11.5)
    weighted = (4 * low["loss"] + 6 * high["loss"]) / 10
    assert weighted == pytest.approx(losses.loss)
    assert position_edges(1024) == [0, 64, 128, 256, 512, 1024]
    assert position_edges(100) == [0, 64, 100]
    assert position_edges(64) == [0, 64]
    with pytest.raises(ValueError, match="edges must ascend"):
        losses.buckets([0, 5, 5])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"window_size": 300}, "room for 0 windows of 300"),
        ({"window_size": 40, "num_windows": 5}, "room for 4 windows of 40"),
        ({"window_size": 40, "first_token": 190}, "room for 0 windows"),
        ({"window_size": 0}, "window_size must be at least 1"),
        ({"chunk_size": 0, "window_size": 40}, "chunk_size must be at least 1"),
        ({"window_size": 40, "num_windows": 0}, "num_windows >= 1"),
    ],
)
def test_windows_that_do_not_fit_are_refused(
    model: MemoryLM, tokens: torch.Tensor, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        position_losses(model, tokens, **settings)


class Oracle(MemoryLM):
    """Knows the answers to one task, and errs in the first example."""

    def __init__(self, task: MQARConfig) -> None:
        super().__init__(CONFIG)
        self.inputs, self.labels = mqar(task)

    def forward(self, input_ids: torch.Tensor, *args: object, **kwargs: object) -> object:
        rows = [(self.inputs == ids).all(1).nonzero()[0, 0] for ids in input_ids]
        answers = torch.stack([self.labels[row] * (row != 0) for row in rows]).clamp(min=0)
        return type("Output", (), {"logits": F.one_hot(answers, 64).float()})


def test_recall_is_the_mean_over_examples() -> None:
    task = MQARConfig(vocab_size=64, input_seq_len=16, num_kv_pairs=2, num_examples=10, seed=3)
    found = recall_on_mqar(Oracle(task), task, batch_size=4)
    assert found["accuracy"] == pytest.approx(0.9)
    assert found["standard_error"] == pytest.approx(0.1)
    assert found["num_examples"] == 10
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        recall_on_mqar(Oracle(task), task, batch_size=0)
    with pytest.raises(ValueError, match="the task has 128 tokens, the model 64"):
        recall_on_mqar(MemoryLM(CONFIG), MQARConfig(vocab_size=128, num_examples=1))


def record(losses: list[float], **config: object) -> dict[str, object]:
    settings = {"text": "emma", "tokenizer": "x", "window_size": 4, "first_token": 0} | config
    return {"config": settings, "results": {"starts": [0, 4, 8], "window_losses": losses}}


def test_a_loss_beyond_all_bounds_is_an_infinite_perplexity() -> None:
    losses = PositionLosses(torch.full((1, 4), 800.0), (0,), 1.0)
    found = losses.to_dict()
    assert found["loss"] == 800.0
    assert found["perplexity"] == found["by_position"][0]["perplexity"] == math.inf


def test_records_are_compared_window_by_window() -> None:
    difference = compare_records(record([1.0, 2.0, 3.0]), record([1.1, 2.2, 3.3]))
    assert difference.mean == pytest.approx(-0.2)
    with pytest.raises(ValueError, match="text is 'emma' in one and 'moby_dick' in the other"):
        compare_records(record([1, 2, 3]), record([1, 2, 3], text="moby_dick"))
    with pytest.raises(ValueError, match="the record of 'evaluate/mqar' has no losses of windows"):
        compare_records({"name": "evaluate/mqar", "config": {}, "results": {}}, record([1, 2, 3]))
    shifted = record([1, 2, 3])
    shifted["results"]["starts"] = [1, 5, 9]
    with pytest.raises(ValueError, match="start at different tokens"):
        compare_records(record([1, 2, 3]), shifted)


@pytest.mark.parametrize("num_tokens", [0, 3, 100])
def test_the_table_adds_up_to_the_model(model: MemoryLM, num_tokens: int) -> None:
    rows = inspect_model(CONFIG, num_tokens)
    assert [row.name for row in rows] == ["embedding", "layers.0", "layers.1", "head", "total"]
    assert rows[-1].num_parameters == model.num_parameters()
    assert rows[-1].flops_per_token == model.flops_per_token(num_tokens)
    assert rows[-1].state_num_bytes == sum(row.state_num_bytes for row in rows[:-1])
    shown = facts_table(rows).splitlines()
    assert f"{model.num_parameters():,}" in shown[-1]
    with pytest.raises(ValueError, match="num_tokens must not be negative"):
        inspect_model(CONFIG, -1)


def test_a_long_window_never_holds_all_its_logits() -> None:
    """Those of 32,768 tokens are 262 MB here."""
    torch.manual_seed(0)
    layers = [{"type": "sliding_window", "window_size": 64}, {"type": "linear_attention"}]
    model = MemoryLM(ModelConfig(vocab_size=2000, d_model=32, layers=layers, mixer_defaults={"num_heads": 2}))
    tokens = torch.randint(2000, (32_769,), generator=torch.Generator().manual_seed(1))
    position_losses(model, tokens, window_size=2048, num_windows=1)
    peak = peak_memory(partial(position_losses, model, tokens, window_size=32_768, num_windows=1), CPU)
    if peak is None:
        pytest.skip("the system does not report peak memory")
    assert peak < 1e8
