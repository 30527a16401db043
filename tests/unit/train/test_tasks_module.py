"""Tasks as training data: lengths, order, seeds, resuming, workers, and the command line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from memzoo import cli
from memzoo.train.data.batches import ResumableLoader, TokenBatch
from memzoo.train.data.task_module import TaskDataModule

NEEDLE = {"type": "needle", "num_distractors": 2}


def module(**settings: Any) -> TaskDataModule:
    given = {"train_lengths": [32, 64], "batch_size": 4, "num_batches": 12, "num_eval_examples": 10}
    return TaskDataModule(**({"task": NEEDLE} | given | settings))


def ids(loader: ResumableLoader) -> list[torch.Tensor]:
    return [batch.input_ids for batch in loader]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[bool]:
    return [torch.equal(one, other) for one, other in zip(a, b, strict=True)]


def test_a_mixture_draws_the_length_of_each_batch() -> None:
    lengths = [batch.shape[1] for batch in ids(module(num_batches=400).train_dataloader())]
    assert set(lengths) == {32, 64}
    assert 140 < lengths.count(32) < 260
    assert lengths != sorted(lengths)


def test_a_curriculum_goes_through_the_lengths_in_their_order() -> None:
    loader = module(length_order="curriculum", train_lengths=[64, 32, 48]).train_dataloader()
    assert [batch.shape[1] for batch in ids(loader)] == [64] * 4 + [32] * 4 + [48] * 4


def test_every_epoch_is_fresh_and_repeatable() -> None:
    loader = module(train_lengths=[32]).train_dataloader()
    first = ids(loader)
    loader.sampler.set_epoch(1)
    second = ids(loader)
    loader.sampler.set_epoch(0)
    assert all(same(first, ids(loader)))
    assert not any(same(first, second))


def test_examples_of_an_epoch_and_of_the_splits_differ() -> None:
    data = module(train_lengths=[64], num_batches=50)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    rows = [tuple(row) for loader in loaders for batch in ids(loader) for row in batch.tolist()]
    assert len(rows) == 50 * 4 + 10 + 10
    assert len(set(rows)) == len(rows)


def test_evaluation_reads_every_length_once_and_always_the_same() -> None:
    data = module(eval_lengths=[64, 128], eval_batch_size=6)
    shapes = [tuple(batch.shape) for batch in ids(data.val_dataloader())]
    assert shapes == [(6, 64), (4, 64), (6, 128), (4, 128)]
    loader = data.val_dataloader()
    first = ids(loader)
    loader.sampler.set_epoch(3)
    assert all(same(first, ids(loader)))
    assert [tuple(batch.shape) for batch in ids(module().test_dataloader())] == [(10, 32), (10, 64)]


def test_the_seed_decides() -> None:
    assert all(same(ids(module(seed=7).train_dataloader()), ids(module(seed=7).train_dataloader())))
    one, other = (module(seed=seed, train_lengths=[32]).train_dataloader() for seed in (7, 8))
    assert not any(same(ids(one), ids(other)))


def test_a_stopped_epoch_goes_on_where_it_stopped() -> None:
    whole = ids(module().train_dataloader())
    loader = module().train_dataloader()
    iterator = iter(loader)
    read = [next(iterator).input_ids for _ in range(5)]
    resumed = module().train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert all(same(whole, read + ids(resumed)))


def test_worker_processes_change_nothing() -> None:
    alone = ids(module(num_batches=4).train_dataloader())
    assert all(same(alone, ids(module(num_batches=4, num_workers=2).train_dataloader())))


def test_batches_carry_the_labels_of_the_task() -> None:
    batch = next(iter(module().train_dataloader()))
    assert isinstance(batch, TokenBatch)
    assert batch.mask is None
    assert batch.cu_seqlens is None
    assert int(batch.num_labels()) == batch.num_rows


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"task": {"type": "needel"}}, r"task type 'needel' is unknown. Did you mean 'needle'"),
        ({"task": {"type": "needle", "num_vales": 2}}, "Did you mean 'num_values'"),
        ({"train_lengths": []}, "there is no length"),
        ({"train_lengths": [64, 4]}, "at length 4: NeedleTask needs at least 8 tokens"),
        ({"eval_lengths": [2]}, "at length 2"),
        ({"train_lengths": [True]}, "seq_len must be an integer"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_batches": 0}, "num_batches and num_eval_examples must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**32}, "seed must lie in"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**settings)


def test_a_model_with_too_small_a_vocabulary_is_refused_before_the_first_batch() -> None:
    data = module()
    assert data.vocab_size == 66
    assert data.seq_len == 64
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(config=SimpleNamespace(vocab_size=65)))
    with pytest.raises(ValueError, match="the task has 66 tokens, the model 65"):
        data.setup("fit")
    data.trainer.lightning_module.config.vocab_size = 66
    data.setup("fit")


RUN = {
    "model": {"config": {"vocab_size": 80, "d_model": 8, "layers": [{"type": "based", "num_heads": 1}]}},
    "data": {
        "type": "task",
        "task": {"type": "needle", "num_distractors": 2, "depth": [0.0, 0.5]},
        "train_lengths": [32, 48],
        "eval_lengths": [64],
        "num_batches": 3,
        "num_eval_examples": 4,
        "batch_size": 2,
    },
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "logger": False},
}


def test_the_command_line_trains_on_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump(RUN))
    run = ["train", "fit", "--config", "run.yaml"]
    assert cli.main([*run, "--data.task.num_values=2", "--output", "model"]) == 0
    assert (tmp_path / "model" / "config.json").is_file()
    capsys.readouterr()
    for flags, message in (
        (["--data.task.num_vales=2"], "Did you mean 'num_values'"),
        (["--data.task.type=copyin"], "Did you mean 'copying'"),
        (["--data.train_length=[8]"], "train_lengths"),
        (["--data.length_order=curiculum"], "length_order"),
        (["--model.config.vocab_size=60"], "the task has 66 tokens, the model 60"),
    ):
        assert cli.main([*run, *flags, "--output", "other"]) == 2
        assert message in capsys.readouterr().err
