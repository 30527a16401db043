"""The state of a `MemoryLM` in the form of a Hugging Face cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .decoder import ModelState


class MemoryCache(Cache):
    """The state of a generation in the form that `generate` hands around.

    The cache owns its state and gives its memory away to each next step; a state passed in is copied.

    Args:
        state: what the model has read so far, to continue from (prefix caching, a loaded state); None for
            nothing.

    Attributes:
        state: the current state, None before the first token.
    """

    def __init__(self, state: ModelState | None = None) -> None:
        super().__init__(layers=[])
        self.state = None if state is None else state.clone()
        self._num_columns = 0 if state is None else int(state.num_tokens.max())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input read so far: the tokens, and padding where prompts were unequal."""
        return self._num_columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: there is no maximum."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """Never: the state changes its type and sizes as it pleases."""
        return False

    def update_state(self, state: ModelState | None, num_columns: int) -> None:
        """Takes the state after `num_columns` further columns of input."""
        self.state = state
        self._num_columns += num_columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps the rows that beam search goes on with."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps, reorders or repeats rows."""
        if self.state is not None:
            self.state = self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        if self.state is not None:
            self.state = self.state.select(torch.arange(self.state.batch_size).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forgets everything."""
        self.state = None
        self._num_columns = 0

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a memory cannot forget its last tokens.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a memory cannot be cut back to an earlier token. "
            "Keep a copy (cache.state.clone()) and start a new MemoryCache from it."
        )

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the cache holds states, not keys and values.

        Raises:
            ValueError: always.
        """
        raise ValueError("MemoryCache holds the states of MemoryForCausalLM and serves no other model.")
