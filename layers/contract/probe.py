"""Recording what a layer does, for pictures and debugging, at no cost when nobody looks.

    with memzoo.layers.probe() as seen:
        model(tokens)
    seen["window_mass"]        # list of detached tensors, one per call of `record`, in order

Recording is off under torch.compile and while a checkpointed block is recomputed in the backward pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_active: list[dict[str, list[Tensor]]] = []


@contextmanager
def probe() -> Iterator[dict[str, list[Tensor]]]:
    """Collects everything that layers `record` inside the block: name -> list of detached tensors."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    _active.append(seen)
    try:
        yield seen
    finally:
        # by identity: two empty probes compare equal
        del _active[next(i for i, item in enumerate(_active) if item is seen)]


def record(name: str, value: Tensor) -> None:
    """Hands `value` (any shape) to every open probe."""
    if torch.compiler.is_compiling() or not _active:
        return
    if torch._C._current_graph_task_id() != -1:  # inside a backward pass: a recomputation
        return
    for seen in _active:
        seen[name].append(value.detach())


def is_probing() -> bool:
    """Whether a probe is open; lets a layer skip work that only a probe needs."""
    return bool(_active) and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() == -1
