"""MQAR samples against the benchmark's own generator, bit for bit, and what the forgetting variant means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from memzoo.train.data.mqar import MQARConfig, mqar

GOLDEN = np.load(Path(__file__).parent / "mqar_a.npz")
FIELDS = (
    "vocab_size",
    "num_examples",
    "input_seq_len",
    "seed",
    "power_a",
    "num_kv_pairs",
    "random_non_queries",
)


def golden_config(case: str, **extra: int) -> MQARConfig:
    fields = {name: GOLDEN[f"{case}.cfg.{name}"].item() for name in FIELDS}
    return MQARConfig(**fields, **extra)


@pytest.mark.parametrize("case", ["mqar0", "mqar1", "mqar2"])
def test_samples_are_bit_exact(case: str) -> None:
    inputs, labels = mqar(golden_config(case))
    assert torch.equal(inputs, torch.from_numpy(GOLDEN[f"{case}.inputs"]))
    assert torch.equal(labels, torch.from_numpy(GOLDEN[f"{case}.labels"]))


@pytest.mark.parametrize("input_seq_len, num_kv_pairs", [(64, 16), (128, 8), (384, 16), (512, 128)])
def test_slots_follow_numpy_choice(input_seq_len: int, num_kv_pairs: int) -> None:
    """The fast draw and numpy's own draw agree, on both sides of the length where the fast one is used."""
    config = MQARConfig(
        vocab_size=600,
        input_seq_len=input_seq_len,
        num_kv_pairs=num_kv_pairs,
        num_examples=20,
        seed=5,
        power_a=0.1,
    )
    rng = np.random.RandomState(5)
    keys = [rng.choice(np.arange(1, 300), num_kv_pairs, replace=False) for _ in range(20)]
    values = [rng.choice(np.arange(300, 600), num_kv_pairs, replace=False) for _ in range(20)]
    num_slots = (input_seq_len - 2 * num_kv_pairs) // 2
    weights = 0.1 * np.arange(1, num_slots + 1) ** (0.1 - 1)
    probabilities = weights / weights.sum()
    inputs, labels = mqar(config)
    for row in range(20):
        slots = rng.choice(num_slots, num_kv_pairs, replace=False, p=probabilities)
        positions = torch.from_numpy(2 * num_kv_pairs + 2 * slots)
        assert torch.equal(inputs[row, positions], torch.from_numpy(keys[row]))
        assert torch.equal(labels[row, positions], torch.from_numpy(values[row]))


def check_forgetting(
    inputs: np.ndarray, labels: np.ndarray, num_pairs: int, num_updates: int, vocab_size: int
) -> None:
    """Assert everything that defines the forgetting variant."""
    context_len = 2 * (num_pairs + num_updates)
    for tokens, targets in zip(inputs.tolist(), labels.tolist(), strict=True):
        keys, values = tokens[0:context_len:2], tokens[1:context_len:2]
        assert len(set(keys[:num_pairs])) == num_pairs
        assert all(1 <= key < vocab_size // 2 for key in keys)
        assert all(vocab_size // 2 <= value < vocab_size for value in values)
        updated = keys[num_pairs:]
        assert len(set(updated)) == num_updates
        assert set(updated) <= set(keys[:num_pairs])
        first = dict(zip(keys[:num_pairs], values[:num_pairs], strict=True))
        latest = first | dict(zip(updated, values[num_pairs:], strict=True))
        asked = [position for position, target in enumerate(targets) if target != -100]
        assert sorted(tokens[position] for position in asked) == sorted(first)
        assert all(position >= context_len and position % 2 == 0 for position in asked)
        assert all(targets[position] == latest[tokens[position]] for position in asked)
        assert all(
            tokens[position] == 0 for position in range(context_len, len(tokens)) if position not in asked
        )


def test_forgetting_variant_means_what_the_golden_samples_mean() -> None:
    num_updates = GOLDEN["forget.cfg.num_updates"].item()
    config = golden_config("forget", num_updates=num_updates)
    sizes = (config.num_kv_pairs, num_updates, config.vocab_size)
    check_forgetting(GOLDEN["forget.inputs"], GOLDEN["forget.labels"], *sizes)
    inputs, labels = mqar(config)
    assert inputs.shape == GOLDEN["forget.inputs"].shape
    check_forgetting(inputs.numpy(), labels.numpy(), *sizes)


def test_an_update_always_changes_the_value() -> None:
    config = MQARConfig(vocab_size=64, input_seq_len=48, num_kv_pairs=6, num_updates=6, num_examples=300)
    inputs, _ = mqar(config)
    for tokens in inputs.tolist():
        first = dict(zip(tokens[0:12:2], tokens[1:12:2], strict=True))
        new = dict(zip(tokens[12:24:2], tokens[13:24:2], strict=True))
        assert all(new[key] != first[key] for key in new)
