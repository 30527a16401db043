"""MQAR settings, metric and data module."""

from __future__ import annotations

import pytest
import torch

from memzoo.train.data.batches import ResumableLoader
from memzoo.train.data.mqar import MQARConfig, mqar, recall_accuracy
from memzoo.train.data.mqar_module import MQARBatches, MQARDataModule, MQARSegment


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"input_seq_len": 63}, "input_seq_len must be even, got 63"),
        ({"vocab_size": 64}, "vocab_size must be larger than input_seq_len, got 64 and 64"),
        ({"num_kv_pairs": 17}, "17 pairs with 0 updates need input_seq_len >= 68, got 64"),
        ({"num_updates": 5}, "num_updates must lie between 0 and num_kv_pairs=4, got 5"),
        ({"num_examples": 0}, "num_examples must be at least 1, got 0"),
        ({"power_a": 0.0}, "power_a must be positive, got 0.0"),
        ({"seed": -1}, "seed must lie in"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MQARConfig(**fields)


def test_global_random_states_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    mqar(MQARConfig(num_examples=3, random_non_queries=True))
    assert torch.equal(torch.rand(2), expected)


def test_random_non_queries_change_only_the_empty_positions() -> None:
    plain, labels = mqar(MQARConfig(num_examples=20, seed=9))
    filled, same_labels = mqar(MQARConfig(num_examples=20, seed=9, random_non_queries=True))
    assert torch.equal(labels, same_labels)
    assert torch.equal(filled[plain != 0], plain[plain != 0])
    assert (filled[plain == 0] != 0).float().mean() > 0.99


def test_accuracy_is_the_mean_over_examples() -> None:
    labels = torch.tensor([[-100, 5, -100, 7], [3, -100, -100, -100], [-100, -100, -100, -100]])
    predictions = torch.tensor([[1, 5, 2, 0], [3, 9, 9, 9], [1, 1, 1, 1]])
    assert recall_accuracy(predictions, labels).item() == 0.75
    with pytest.raises(ValueError, match="not logits"):
        recall_accuracy(predictions[..., None], labels)


def small_module(**settings: object) -> MQARDataModule:
    segments = [
        MQARSegment(input_seq_len=16, num_kv_pairs=2, num_examples=10),
        MQARSegment(input_seq_len=32, num_kv_pairs=4, num_examples=6),
    ]
    return MQARDataModule(vocab_size=64, train_segments=segments, batch_size=4, **settings)


def test_batches_keep_segments_apart_and_in_order() -> None:
    shapes = [tuple(batch.input_ids.shape) for batch in small_module().train_dataloader()]
    assert shapes == [(4, 16), (4, 16), (2, 16), (4, 32), (2, 32)]


def test_every_epoch_is_fresh_and_repeatable() -> None:
    loader = small_module().train_dataloader()
    first = [batch.input_ids for batch in loader]
    loader.sampler.set_epoch(1)
    second = [batch.input_ids for batch in loader]
    loader.sampler.set_epoch(0)
    again = [batch.input_ids for batch in loader]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    fixed = small_module(fresh_every_epoch=False).train_dataloader()
    fixed.sampler.set_epoch(5)
    assert all(torch.equal(a, b.input_ids) for a, b in zip(first, fixed, strict=True))


def test_training_validation_and_test_use_separate_seeds() -> None:
    module = small_module()
    parts = (module.train_configs, module.val_configs, module.test_configs)
    seeds = [[config.seed for config in part] for part in parts]
    assert len({seed for part in seeds for seed in part}) == 6
    assert max(seeds[0]) < 2**31 <= min(seeds[1] + seeds[2])


def test_a_stopped_epoch_goes_on_where_it_stopped() -> None:
    whole = [batch.input_ids for batch in small_module().train_dataloader()]
    loader = small_module().train_dataloader()
    iterator = iter(loader)
    read = [next(iterator).input_ids for _ in range(2)]
    resumed = small_module().train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    rest = [batch.input_ids for batch in resumed]
    assert all(torch.equal(a, b) for a, b in zip(whole, read + rest, strict=True))
    assert len(list(resumed)) == len(whole), "the next epoch starts at its beginning"


def test_worker_processes_change_nothing() -> None:
    alone = [batch.input_ids for batch in small_module().train_dataloader()]
    helped = [batch.input_ids for batch in small_module(num_workers=2).train_dataloader()]
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_processes_share_an_epoch_without_overlap() -> None:
    source = MQARBatches(small_module().train_configs, batch_size=2)
    parts = [
        [batch.input_ids for batch in ResumableLoader(source, num_processes=2, process_index=index)]
        for index in range(2)
    ]
    whole = [batch.input_ids for batch in ResumableLoader(source)]
    interleaved = [batch for pair in zip(*parts, strict=True) for batch in pair]
    assert all(torch.equal(a, b) for a, b in zip(whole, interleaved, strict=True))


def test_bad_loader_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        MQARDataModule(batch_size=0)
    with pytest.raises(ValueError, match="num_workers must be at least 0"):
        MQARDataModule(num_workers=-1)
    with pytest.raises(ValueError, match="train_segments is empty"):
        MQARDataModule(train_segments=[])
