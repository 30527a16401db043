"""Memory that a run carries from batch to batch: detached, per split, part of the checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ..layers.contract import State
from ..models.decoder import MemoryLM, ModelState
from .data.batches import TokenBatch

logger = logging.getLogger(__name__)


class CarriedStates:
    """The state after the last batch of each split ("train", "val", "test").

    Row b of a batch goes on where row b of the batch before has stopped, unless the batch says that it begins
    anew. States are kept without their graph, so no gradient crosses the border of a batch.
    """

    def __init__(self) -> None:
        self._states: dict[str, ModelState] = {}

    def before(self, split: str, batch: TokenBatch, model: MemoryLM) -> ModelState | None:
        """The memory with which the rows of a batch begin; None is an empty one.

        Raises:
            ValueError: the batch is packed, does not say which rows go on, or has another number of rows than
                the one before.
        """
        if batch.cu_seqlens is not None:
            raise ValueError(
                "carry_state needs one sequence per row, got a packed batch. "
                "Set data.contiguous: true, or leave carry_state out."
            )
        if batch.resets is None:
            raise ValueError(
                "carry_state needs rows that go on in the next batch; this data says of none that it does. "
                "Set data.contiguous: true, or leave carry_state out."
            )
        state = self._states.get(split)
        if state is None or batch.resets.all():
            return None
        if state.batch_size != batch.num_rows:
            raise ValueError(
                f"carry_state needs batches of one size, got {batch.num_rows} rows after {state.batch_size}. "
                "Leave the last, smaller batch of an epoch out."
            )
        weight = model.embed_tokens.weight
        empty = model.init_state(batch.num_rows, device=weight.device, dtype=weight.dtype)
        return state.to(weight.device).restart(batch.resets, empty)

    def after(self, split: str, state: ModelState) -> None:
        """Keeps the memory after a batch."""
        self._states[split] = state.detach()

    def drop(self, split: str) -> None:
        """Forgets a split: its next batch begins with an empty memory."""
        self._states.pop(split, None)

    def to_plain(self) -> dict[str, Any]:
        """The training state as plain data; the other splits begin empty and are not saved."""
        return {split: state.to_plain() for split, state in self._states.items() if split == "train"}

    def load_plain(self, data: Mapping[str, Any]) -> None:
        """Takes over what `to_plain` gave.

        Raises:
            ValueError: damaged, or not the state of a model.
        """
        self._states.clear()
        if "train" not in data:
            logger.warning("the checkpoint holds no carried state: every row begins with an empty memory")
            return
        state = State.from_plain(data["train"])
        if not isinstance(state, ModelState):
            raise ValueError(
                f"the carried state is a {type(state).__name__}, expected that of a model. "
                "Resume from another checkpoint."
            )
        self._states["train"] = state
