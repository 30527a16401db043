"""Heads of unequal lengths, one behind the other: what a cache keeps of them between two calls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .entries import FIELDS, PolicyState

# Dimensions: N sequences, S slots, G key/value heads, X entries of all heads


@dataclass
class FlatState:
    """A `PolicyState` without its empty slots.

    Attributes:
        entries: name -> (X, ...) what the state holds per slot, head after head of sequence after sequence.
        lengths: (N, G) int32, entries of each head.
        rest: the state without slots.
    """

    entries: dict[str, Tensor | None]
    lengths: Tensor
    rest: PolicyState

    @classmethod
    def of(cls, state: PolicyState) -> FlatState:
        """The flat form; slots in use must come first, as they do in every state."""
        used = state.order.transpose(1, 2) > 0  # (N, G, S)
        slotted = {name: getattr(state, name) for name in FIELDS}
        nothing: dict[str, Any] = {name: None if x is None else x[:, :0] for name, x in slotted.items()}
        return cls(
            entries={name: None if x is None else x.transpose(1, 2)[used] for name, x in slotted.items()},
            lengths=used.sum(-1, dtype=torch.int32),
            rest=replace(state, **nothing).clone(),  # a view would keep the slots alive
        )

    def padded(self) -> PolicyState:
        """The state, with as many slots as the fullest head needs."""
        most = int(self.lengths.max()) if self.lengths.numel() else 0
        used = torch.arange(most, device=self.lengths.device) < self.lengths[..., None]  # (N, G, S)

        def spread(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            slots = x.new_zeros(*used.shape, *x.shape[1:])
            slots[used] = x
            return slots.transpose(1, 2)

        slotted: dict[str, Any] = {name: spread(x) for name, x in self.entries.items()}
        return replace(self.rest, **slotted)

    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        held = sum(x.nbytes for x in self.entries.values() if x is not None)
        return held + self.lengths.nbytes + self.rest.num_bytes()
