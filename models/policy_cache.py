"""Bounded caches under plain transformers models.

    policy = streaming_llm(256)
    with attach_policy(model, policy):
        model.generate(**prompt, past_key_values=PolicyCache(model.config, policy))

The model keeps its weights and its code. While the policy is attached, its attention layers call a function
of ours, which reads the cache entry by entry: whatever mask the model has built, a query sees the valid
entries up to its own position. Padding never enters the cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ..layers.contract import State
from ..layers.policies import (
    EvictionPolicy,
    FlatState,
    LayerMemory,
    Observation,
    Place,
    PolicyState,
    make_policy,
)

# Dimensions: B batch rows, T tokens of a call, H query heads, G key/value heads, D head width, C entries


@dataclass(kw_only=True)
class PolicyCacheState(State):
    """The bounded layers of a `PolicyCache`, as a file keeps them."""

    layers: tuple[PolicyState, ...]


class PolicyCacheLayer(CacheLayerMixin):
    """One layer of a bounded cache.

    Args:
        policy: what stays.
        index: of the layer in its model.
        num_layers: of the model.
        rotation: rotary frequencies, for policies that rerotate.

    Where heads may hold unequal numbers of entries, they are kept one behind the other between two calls.
    """

    is_sliding = False

    def __init__(
        self, policy: EvictionPolicy, index: int, num_layers: int, rotation: Tensor | None = None
    ) -> None:
        super().__init__()
        self.policy, self.index, self.num_layers = policy, index, num_layers
        self.rotation = rotation
        self._held: PolicyState | FlatState | None = None
        self.num_columns = 0  # of input, padding included, as transformers counts
        self.has_padding = False
        self.extra: Tensor | None = None  # (B, T, G) of the tokens of the current call
        self.ends: Tensor | None = None  # (B, T) True where one of them ends a sentence
        self.is_attached = False
        self.leader: PolicyCacheLayer | None = None  # whose choice of tokens this layer follows
        self.pending: list[tuple[Tensor, Place]] = []  # queries of prompts that wait for their budgets

    @property
    def state(self) -> PolicyState | None:
        """What is held, one row per sequence; None before the first token."""
        return self._held.padded() if isinstance(self._held, FlatState) else self._held

    @state.setter
    def state(self, state: PolicyState | None) -> None:
        self._held = FlatState.of(state) if state is not None and self.policy.is_ragged else state

    def num_bytes(self) -> int:
        """Bytes of what is held."""
        return 0 if self._held is None else self._held.num_bytes()

    # ------------------------------------------------------------------ what transformers asks for

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hands new keys and values on to the attached attention function, which reads them.

        Raises:
            ValueError: the model has no policy attached, or one of another cache.
        """
        if not self.is_attached:
            raise ValueError(
                "a PolicyCache needs the policy attached to the model. "
                "Write: with attach_policy(model, policy): model.generate(..., past_key_values=cache)."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.num_columns

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1  # the name of get_max_length in transformers 5.6

    def reset(self) -> None:
        self.state, self.num_columns, self.has_padding = None, 0, False
        self.is_initialized = False

    def offload(self) -> None:
        state = self.state
        if state is not None:
            self.state = state.to("cpu")

    def prefetch(self) -> None:
        state = self.state
        if state is not None:
            self.state = state.to(self.device)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        state = self.state
        if state is not None:
            self.state = state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        state = self.state
        if state is not None:
            self.state = state.select(torch.arange(state.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what was evicted cannot come back.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a bounded cache cannot be cut back to fewer tokens, which assisted decoding needs. "
            "Use greedy decoding, sampling or beam search."
        )

    # ------------------------------------------------------------------ reading

    def read(
        self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scale: float, base: Callable[..., Tensor]
    ) -> Tensor:
        """Attention of the tokens of a call, (B, T, H, D); the cache is then that after them.

        Args:
            q: (B, T, H, D).
            k, v: (B, T, G, D).
            real: (B, T) bool, False where padded; None where nothing is.
            scale: factor of the logits.
            base: attention of the model itself over given keys and values (B, S, G, D).
        """
        (batch, length), state = q.shape[:2], self.state
        place = Place(
            scale=scale,
            layer=self.index,
            num_layers=self.num_layers,
            rotation=self.rotation,
            is_deferred=self.policy.is_shared or (self.policy.allocator.needs_stats and state is None),
        )
        if state is None:
            lengths = [length] * batch if real is None else [int(n) for n in real.sum(-1)]
            state = self._empty(q, k, v, lengths)
        had_padding, self.has_padding = self.has_padding, self.has_padding or real is not None
        self.num_columns += length
        needs_rows = place.is_deferred and not self.policy.is_shared
        memories = self._memories(state, by_row=real is not None or needs_rows)
        out = None
        if self._fits(memories, length, had_padding, real):
            # nothing is evicted before the output is there: the model's own attention, to the bit
            out = base(
                *(torch.cat([_past(memories, name), x], dim=1) for name, x in (("key", k), ("value", v)))
            )
        found, memories = self._read_rows(memories, q, k, v, real, place, has_output=out is not None)
        self.state = PolicyState.of(memories)
        return found if out is None else out

    def memories(self) -> list[LayerMemory]:
        """Working forms of the rows, grouped as `pending` is."""
        state = self.state
        assert state is not None
        return self._memories(state, by_row=len(self.pending) == state.batch_size)

    def settle(self, row: int, budget: int) -> None:
        """Gives a row its budget, and compresses it after a prompt that was read with all layers."""
        state = self.state
        assert state is not None
        memories = self._memories(state, by_row=True)
        queries, place = self.pending[row]
        memory = replace(memories[row], budget=budget)
        if queries.shape[1] > 1:
            memory = self.policy.compress(memory, queries, place=replace(place, is_deferred=False)).trimmed()
        memories[row] = memory
        self.state = PolicyState.of(memories)

    def stats(self, row: int) -> Tensor:
        """What the layer tells the allocator about a row's prompt."""
        state = self.state
        assert state is not None
        memory = self._memories(state, by_row=True)[row]
        queries, place = self.pending[row]
        assert place.scale is not None
        obs = Observation(memory.num_seen, place.scale, queries, queries.shape[1])
        return self.policy.allocator.observe(memory.entries, obs)

    def _fits(self, memories: list[LayerMemory], length: int, had_padding: bool, real: Tensor | None) -> bool:
        """Whether every token read is held, and will be until the outputs of this call are known."""
        if had_padding or (real is not None and memories[0].num_seen):
            return False
        is_whole = self.policy.prefill == "one_shot" and length > 1
        lookup = self.policy.lookup
        return all(
            part.entries.num_slots == part.num_seen
            and (not self.policy.is_ragged or bool(part.entries.valid.all()))
            and part.packed is None
            and (is_whole or part.num_seen + length - 1 <= part.budget)
            and (length > 1 or lookup is None or part.num_seen < lookup.budget)
            for part in memories
        )

    def _read_rows(
        self,
        memories: list[LayerMemory],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        real: Tensor | None,
        place: Place,
        *,
        has_output: bool,
    ) -> tuple[Tensor, list[LayerMemory]]:
        """Groups of equal rows at once, others one by one; padding is left out and its output is zero."""
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        leader = None if self.leader is None else self.leader.state
        after: list[LayerMemory] = []
        self.pending = []
        start = 0
        for memory in memories:
            rows = slice(start, start + memory.entries.order.shape[0])
            start = rows.stop
            columns: Any = slice(None) if real is None else real[rows][0].nonzero().squeeze(-1)
            tokens = [x[rows][:, columns] for x in (q, k, v)]
            extra, ends = (None if x is None else x[rows][:, columns] for x in (self.extra, self.ends))
            if leader is not None:
                place = replace(place, leader=leader.order[rows].transpose(1, 2))
            if has_output:
                memory = self.policy.absorb(memory, *tokens, extra=extra, ends=ends, place=place)
            else:
                found, memory = self.policy.read(memory, *tokens, extra=extra, ends=ends, place=place)
                out[rows, columns] = found
            if place.is_deferred:
                self.pending.append((tokens[0], place))
            after.append(memory.trimmed())
        return out, after

    def _memories(self, state: PolicyState, *, by_row: bool) -> list[LayerMemory]:
        """Working forms: all rows in one where they agree and may be read together, else row by row."""
        seen, budgets = state.num_tokens.tolist(), state.budget.tolist()
        if not by_row and len(set(seen)) == 1 and len(set(budgets)) == 1:
            return [state.memory(slice(0, len(seen)), num_seen=seen[0], budget=budgets[0])]
        return [
            state.memory(slice(row, row + 1), num_seen=seen[row], budget=budgets[row]).trimmed()
            for row in range(len(seen))
        ]

    def _empty(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> PolicyState:
        """The empty state; budgets follow the prompts."""
        allocator = self.policy.allocator
        budgets = [allocator.layer_budgets(self.num_layers, n)[self.index] for n in lengths]
        for budget in set(budgets):
            self.policy.check_budget(budget)
        state = self.policy.empty_state(
            q.shape[0],
            q.shape[2],
            k.shape[2],
            k.shape[3],
            v.shape[3],
            budget=0,
            slots=0,
            device=k.device,
            dtype=k.dtype,
        )
        return replace(state, budget=torch.tensor(budgets, dtype=torch.int64))


class PolicyCache(Cache):
    """A cache for `generate` and `forward` of transformers models, bounded by a policy.

    Every full-attention layer is bounded; layers with a sliding window keep their own cache.

    Args:
        config: of the model.
        policy: what stays; plain data works too (`make_policy`).

    Raises:
        ValueError: the policy does not fit, or the model has layers that hold no keys and values.
    """

    def __init__(self, config: Any, policy: EvictionPolicy | Mapping[str, Any]) -> None:
        self.policy = make_policy(policy)
        text = config.get_text_config(decoder=True)
        types = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
        rotation = _rotary_frequencies(text) if self.policy.rerotate else None
        layers: list[CacheLayerMixin] = []
        for index, kind in enumerate(types):
            if kind == "full_attention" and index not in self.policy.skipped(len(types)):
                layers.append(PolicyCacheLayer(self.policy, index, len(types), rotation))
            elif kind == "full_attention":
                layers.append(DynamicLayer())
            elif kind == "sliding_attention":
                layers.append(DynamicSlidingWindowLayer(sliding_window=text.sliding_window))
            else:
                raise ValueError(
                    f"layer {index} is of the type {kind!r}, which PolicyCache does not know. It serves full "
                    "and sliding attention."
                )
        super().__init__(layers=layers)
        group = self.policy.share_layers
        for layer in self.bounded:
            first = layers[layer.index // group * group]
            if first is not layer and isinstance(first, PolicyCacheLayer):
                layer.leader = first

    @property
    def bounded(self) -> list[PolicyCacheLayer]:
        """The layers that the policy rules."""
        return [layer for layer in self.layers if isinstance(layer, PolicyCacheLayer)]

    @property
    def is_compileable(self) -> bool:
        """Never: what is held depends on the data."""
        return False

    def finish(self, index: int) -> None:
        """After the last layer has read a call: budgets from what all layers have seen of a prompt, or one
        compression of all layers.
        """
        layers = self.bounded
        if not layers or layers[-1].index != index or not layers[-1].pending:
            return
        if self.policy.is_shared:
            self._share()
            return
        for row in range(len(layers[-1].pending)):
            stats = [layer.stats(row) for layer in layers]
            length = layers[-1].pending[row][0].shape[1]
            budgets = self.policy.allocator.layer_budgets(len(layers), length, stats)
            for layer, budget in zip(layers, budgets, strict=True):
                layer.settle(row, budget)
        for layer in layers:
            layer.pending = []

    def _share(self) -> None:
        """Compresses all layers together, those rows that have read enough."""
        layers = self.bounded
        held = [layer.memories() for layer in layers]
        changed = False
        for group, memories in enumerate(zip(*held, strict=True)):
            queries, places = zip(*(layer.pending[group] for layer in layers), strict=True)
            if self.policy.is_due(memories[0].num_seen, queries[0].shape[1]):
                found = self.policy.compress_together(memories, queries, places)
                for of_layer, memory in zip(held, found, strict=True):
                    of_layer[group] = memory.trimmed()
                changed = True
        for layer, of_layer in zip(layers, held, strict=True):
            layer.pending = []
            if changed:
                layer.state = PolicyState.of(of_layer)

    def memory_bytes(self) -> int:
        """Bytes of everything held: keys, values, positions, scores, counts, queries of the window."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, PolicyCacheLayer):
                total += layer.num_bytes()
            elif layer.is_initialized:
                total += layer.keys.nbytes + layer.values.nbytes
        return total

    def kept_positions(self, layer: int) -> Tensor:
        """(B, G, C) positions held in a layer, in each sequence's own count; -1 marks an empty slot.

        Raises:
            ValueError: the layer is not bounded, or nothing has been read.
        """
        chosen = self.layers[layer]
        state = chosen.state if isinstance(chosen, PolicyCacheLayer) else None
        if state is None:
            raise ValueError(
                f"layer {layer} holds no chosen entries. Read a prompt first, and name a bounded layer."
            )
        return state.order.transpose(1, 2).long() - 1

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what is held as a safetensors file, so that a prompt need not be read again.

        Raises:
            ValueError: nothing has been read, or some layers are not bounded.
        """
        states = [state for layer in self.bounded if (state := layer.state) is not None]
        if len(states) != len(self.layers):
            raise ValueError(
                f"{len(states)} of {len(self.layers)} layers hold something that can be saved. Read a prompt "
                "first; caches with layers that no policy rules cannot be saved."
            )
        first = self.bounded[0]
        notes = {
            "columns": str(first.num_columns),
            "has_padding": str(first.has_padding),
            "policy": repr(self.policy),
        }
        PolicyCacheState(num_tokens=states[0].num_tokens, layers=tuple(states)).save(path, notes)

    def load(self, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> PolicyCache:
        """Takes over what `save` wrote; returns this cache.

        Raises:
            ValueError: damaged, of another policy, or of a model with other layers.
        """
        state, notes = State.load(path, device), State.read_notes(path)
        if not isinstance(state, PolicyCacheState) or len(state.layers) != len(self.layers):
            raise ValueError(
                f"{path} holds no cache of {len(self.layers)} layers. Give the file of this model."
            )
        if notes.get("policy") != repr(self.policy):
            raise ValueError(
                f"{path} was written under the policy {notes.get('policy')}, this cache has {self.policy!r}. "
                "Make the PolicyCache with that policy."
            )
        for layer, held in zip(self.bounded, state.layers, strict=True):
            layer.state, layer.num_columns = held, int(notes["columns"])
            layer.has_padding = notes["has_padding"] == "True"
            layer.dtype, layer.device, layer.is_initialized = held.key.dtype, held.key.device, True
        return self


def _rotary_frequencies(config: Any) -> Tensor:
    """(D'/2,) rotary frequencies of a model, from its config."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = getattr(config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type", "default")
    if kind in ROPE_INIT_FUNCTIONS:
        return ROPE_INIT_FUNCTIONS[kind](config, "cpu")[0].double()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
    return float(parameters.get("rope_theta", 10000.0)) ** -exponent


def _past(memories: list[LayerMemory], name: str) -> Tensor:
    """Keys or values held (B, S, G, D) of rows that hold equally many entries."""
    return torch.cat([getattr(part.entries, name).transpose(1, 2) for part in memories])
