"""Freed memory stays with the process, and goes back at the end."""

import pytest
import torch

from memzoo.train.host_memory import freed_memory_kept
from memzoo.train.speed import resident_bytes

MIB = 2**20


def growth() -> float:
    """MiB by which the process has grown after a tensor of 256 MiB came and went."""
    before = resident_bytes()
    torch.ones(64 * MIB)
    return (resident_bytes() - before) / MIB


def test_what_is_freed_stays_until_the_end() -> None:
    growth()
    start = resident_bytes()
    with freed_memory_kept() as has_effect:
        if not has_effect:
            pytest.skip("this is not glibc")
        # an aligned block may not fit into the hole that one of the same size has left
        assert min(growth() for _ in range(6)) < 64
        held = resident_bytes()
        assert held - start > 192 * MIB
    assert held - resident_bytes() > 192 * MIB
