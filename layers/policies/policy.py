"""One cache, many rules: attend, observe, score, keep the best.

A cache grows by every token read. At every multiple of `interval` of a sequence's own tokens it is compressed
to its budget: the scorer rates the entries, sinks and recent ones are forced, the best stay, and what leaves
is dropped, merged or kept in fewer bits. So the result never depends on how a sequence was cut into calls,
except in the mode `prefill="one_shot"`, where each call of several tokens is read whole and compressed at its
end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..contract import check_choice
from .budgets import Allocator, UniformBudget
from .entries import Entries, LayerMemory, PolicyState, by_position
from .lookup import Lookup
from .merging import Merger
from .reading import Observation, attend, wide_dtype
from .scorers import Scorer
from .selection import Selector, settled
from .steps import asked, chosen, following, left_out, scattered, sentence_numbers, without
from .tiers import Tier

# Dimensions: B sequences with equally many tokens read, T tokens, H query heads, G key/value heads, C
# entries, D key width, E value width, W queries of the observation window

Prefill = Literal["grid", "one_shot"]


@dataclass(frozen=True)
class Place:
    """Where a layer stands.

    Attributes:
        scale: factor of its logits; None for D ** -0.5.
        layer, num_layers: its index, and how many layers the model has.
        rotation: rotary frequencies, for `rerotate`.
        leader: (B, G', C') `order` of the layer whose choice this one follows, or None.
        is_deferred: a call of several tokens is not compressed here: the model does so after its last layer;
            nor is a single token where all layers share one budget.
    """

    scale: float | None = None
    layer: int = 0
    num_layers: int = 1
    rotation: Tensor | None = None
    leader: Tensor | None = None
    is_deferred: bool = False


@dataclass(frozen=True, kw_only=True)
class EvictionPolicy:
    """How a cache stays small; the presets of `memzoo.layers.policies` are made of it.

    Attributes:
        scorer: rates the entries.
        budget: entries a head keeps, or an allocator that says so for every layer.
        sinks: first tokens of a sequence that always stay.
        recent: last tokens that always stay, or a share of the budget (below 1).
        interval: tokens between two compressions, on the grid of each sequence's own tokens.
        prefill: "grid", or "one_shot": a call of several tokens is read whole, with full attention, and
            compressed at its end.
        group_reduce: how scores of query heads become one of their key/value head, "mean" or "max".
        selector: chooses from the scores; None takes the best of every head.
        merger: what becomes of evicted entries; None drops them.
        tier: a second store of lower precision; None keeps every entry whole.
        lookup: which of the entries held a single token reads; None reads all. After a prompt nothing leaves.
        mass_correction: merged entries count in the softmax as the tokens they stand for.
        rerotate: positions are ranks in the cache instead of those in the text.
        skip_layers: layers of a model that keep everything, negative ones from the end.
        share_layers: so many consecutive layers keep the same tokens, those that the first one chooses.
        fixed_slot: single tokens read after a prompt push out the entry this far from the end of the
            compressed prompt, whatever its score (Elastic Cache).
        name: of the method.

    Raises:
        ValueError: sizes out of range, or a budget too small for sinks and recent tokens.
    """

    scorer: Scorer
    budget: int | Allocator
    sinks: int = 0
    recent: int | float = 0
    interval: int = 1
    prefill: Prefill = "grid"
    group_reduce: Literal["mean", "max"] = "mean"
    selector: Selector | None = None
    merger: Merger | None = None
    tier: Tier | None = None
    lookup: Lookup | None = None
    mass_correction: bool = False
    rerotate: bool = False
    skip_layers: tuple[int, ...] = ()
    share_layers: int = 1
    fixed_slot: int | None = None
    name: str = "policy"

    def __post_init__(self) -> None:
        check_choice("prefill", self.prefill, ("grid", "one_shot"))
        check_choice("group_reduce", self.group_reduce, ("mean", "max"))
        if self.interval < 1:
            raise ValueError(
                f"interval must be at least 1, got {self.interval}. 1 compresses at every token."
            )
        if self.sinks < 0 or self.recent < 0:
            raise ValueError(f"sinks and recent must not be negative, got {self.sinks} and {self.recent}.")
        if self.tier is not None and self.lookup is not None:
            raise ValueError(
                "a lookup reads whole entries, which a tier does not keep. Leave one of them out."
            )
        if self.prefill == "grid" and (self.tier or self.lookup or self.allocator.needs_prompt):
            raise ValueError(f"{self.name} needs the whole prompt. Set prefill to one_shot.")
        if self.is_shared:
            self._check_shared()
        if isinstance(self.budget, int):
            self.check_budget(self.budget)

    @property
    def allocator(self) -> Allocator:
        """How the budget is shared among layers."""
        return UniformBudget(self.budget) if isinstance(self.budget, int) else self.budget

    @property
    def is_exact(self) -> bool:
        """Whether any split of a sequence into calls gives the same result."""
        return self.prefill == "grid"

    @property
    def is_shared(self) -> bool:
        """Whether all layers of a model share one budget, and are compressed together."""
        return self.selector is not None and self.selector.spans_layers

    @property
    def is_ragged(self) -> bool:
        """Whether heads may hold unequal numbers of entries."""
        return self.selector is not None or (self.merger is not None and self.merger.chooses)

    def skipped(self, num_layers: int) -> set[int]:
        """Layers of a model that keep everything."""
        return {index % num_layers for index in self.skip_layers if -num_layers <= index < num_layers}

    def num_recent(self, budget: int) -> int:
        """Last tokens that always stay under a budget."""
        return int(self.recent * budget) if self.recent < 1 else int(self.recent)

    def check_budget(self, budget: int) -> None:
        """Raises ValueError where a budget leaves nothing to choose."""
        if budget < 1:
            raise ValueError(f"budget must be at least 1, got {budget}. Leave the policy out to keep all.")
        forced = self.sinks + self.num_recent(budget)
        if self.tier is not None or self.selector is not None:
            if self.selector is not None:
                self.selector.check(forced, budget)
            return  # the budgets of others do not count the forced entries
        if forced > budget or (self.sinks and budget <= self.sinks + 1):
            raise ValueError(
                f"a budget of {budget} entries is too small for {self.sinks} sinks and "
                f"{self.num_recent(budget)} recent tokens. Raise the budget or lower the other two."
            )
        if self.scorer.window >= budget:
            raise ValueError(
                f"a budget of {budget} entries must be larger than the observation window of "
                f"{self.scorer.window} queries. Raise the budget or shorten the window."
            )

    def width(self, budget: int, num_groups: int, num_layers: int = 1) -> int:
        """The most entries that one head may keep."""
        return budget if self.selector is None else self.selector.width(budget, num_groups, num_layers)

    def mean_width(self, budget: int) -> int:
        """The most entries that heads keep on average."""
        return budget if self.selector is None else self.selector.mean_width(budget)

    def _check_shared(self) -> None:
        if self.prefill == "grid":
            raise ValueError(
                f"{self.name} compares layers, which read a call one after another: it can compress only at "
                "the end of a call. Set prefill to one_shot."
            )
        chooses = self.merger is not None and self.merger.chooses
        if chooses or self.tier or self.share_layers > 1 or self.fixed_slot or self.allocator.needs_prompt:
            raise ValueError(
                f"{self.name} shares one budget among all layers: it goes with no tier, merged runs, shared "
                "choices, fixed slots or budgets from the prompt. Leave them out."
            )

    # ------------------------------------------------------------------ the cache of one layer

    def empty_state(
        self,
        batch_size: int,
        num_heads: int,
        num_groups: int,
        key_dim: int,
        value_dim: int,
        *,
        budget: int,
        slots: int,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> PolicyState:
        """The state of sequences without tokens."""
        wide = wide_dtype(dtype)
        stored = wide if self.merger is not None else dtype  # what is merged again and again must not round
        shape = (batch_size, slots, num_groups)

        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*size, device=device, dtype=dtype)

        window, scorer, merger = self.scorer.window, self.scorer, self.merger
        return PolicyState(
            num_tokens=torch.zeros(batch_size, dtype=torch.int64),
            budget=torch.full((batch_size,), budget, dtype=torch.int64),
            key=zeros(*shape, key_dim, dtype=stored),
            value=zeros(*shape, value_dim, dtype=stored),
            order=zeros(*shape, dtype=torch.int32),
            score=zeros(*shape, dtype=wide) if scorer.accumulates else None,
            count=zeros(*shape, dtype=torch.int32) if merger is not None else None,
            extra=zeros(*shape, dtype=wide) if scorer.has_extra else None,
            sentence=zeros(*shape, dtype=torch.int32) if self.lookup is not None else None,
            queries=zeros(batch_size, window, num_heads, key_dim, dtype=dtype) if window else None,
            threshold=(
                torch.full((batch_size, 1), NO_THRESHOLD, device=device, dtype=wide)
                if merger is not None and merger.has_threshold
                else None
            ),
            question=(
                zeros(batch_size, num_groups, key_dim + 1, dtype=wide) if self.lookup is not None else None
            ),
        )

    def read(
        self,
        memory: LayerMemory,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        extra: Tensor | None = None,
        ends: Tensor | None = None,
        place: Place | None = None,
    ) -> tuple[Tensor, LayerMemory]:
        """Reads tokens: attends, and compresses on the grid. The memory given is not changed.

        Args:
            memory: of B sequences with equally many tokens read.
            q: (B, T, H, D), rotated.
            k: (B, T, G, D), rotated.
            v: (B, T, G, E).
            extra: (B, T, G) the number of each token, where the scorer wants one.
            ends: (B, T) bool, True where a token ends a sentence; where there is a lookup.
            place: of the layer.

        Returns:
            (B, T, H, E), and the memory after the tokens.
        """
        place = _located(place, q)
        outputs, done, length = [], 0, q.shape[1]
        is_whole = self.prefill == "one_shot" and length > 1
        while done < length:
            due = self.interval - memory.num_seen % self.interval
            end = length if is_whole else min(length, done + due)
            part = slice(done, end)
            brought = [None if x is None else x[:, part] for x in (extra, ends)]
            memory = self._append(memory, q[:, part], k[:, part], v[:, part], *brought)
            out, memory = self._attend(memory, q[:, part], place)
            outputs.append(out)
            memory = self._settle(memory, q[:, part], place, is_whole)
            done = end
        if not outputs:
            return q.new_zeros(*q.shape[:3], v.shape[-1]), memory
        return torch.cat(outputs, dim=1), memory

    def absorb(
        self,
        memory: LayerMemory,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        extra: Tensor | None = None,
        ends: Tensor | None = None,
        place: Place | None = None,
    ) -> LayerMemory:
        """The memory after tokens whose outputs the caller knows: nothing was to be evicted before the last.

        Args: as in `read`.
        """
        place, length = _located(place, q), q.shape[1]
        if length == 0:
            return memory
        memory = self._append(memory, q, k, v, extra, ends)
        if self.scorer.accumulates:
            _, memory = self._attend(memory, q, place)
        return self._settle(memory, q, place, self.prefill == "one_shot" and length > 1)

    def compress(
        self, memory: LayerMemory, q: Tensor, *, place: Place | None = None, is_prompt: bool = True
    ) -> LayerMemory:
        """The memory within its budget; the memory itself where it already is.

        Args:
            memory: what is held, the newest tokens included.
            q: (B, n, H, D) queries read since the last compression, the newest last.
            place: of the layer.
            is_prompt: a call of several tokens has been read whole.
        """
        place = _located(place, q)
        entries, budget = memory.entries, memory.budget
        obs = self._observation(memory, q, place)
        if self.tier is not None:
            return self.tier.settle(memory, obs, self.scorer, is_prompt=is_prompt)
        if entries.num_slots <= budget:
            return memory
        if self.fixed_slot is not None and not is_prompt:
            return replace(memory, entries=without(entries, budget, self.fixed_slot))
        if place.leader is not None:
            return replace(memory, entries=following(entries, place.leader))
        scores = self._rate(memory, obs)
        if self.merger is not None and self.merger.chooses:
            return replace(memory, entries=self.merger.choose(entries, scores, budget))
        return self._kept(memory, *self.select(scores, entries, budget))

    def compress_together(
        self, memories: Sequence[LayerMemory], queries: Sequence[Tensor], places: Sequence[Place]
    ) -> list[LayerMemory]:
        """The memories of all layers within their common budget; for policies that are `is_shared`.

        Args:
            memories: of the same sequences in each layer, the newest tokens included.
            queries: (B, n, H, D) of each layer, read since the last compression, the newest last.
            places: of the layers.
        """
        assert self.selector is not None
        scores = []
        for memory, q, place in zip(memories, queries, places, strict=True):
            obs = self._observation(memory, q, _located(place, q))
            scores.append(settled(self._rate(memory, obs)))
        keeps = self.selector.share(scores, [memory.budget for memory in memories])
        return [
            memory
            if bool((keep == memory.entries.valid).all())
            else self._kept(memory, *chosen(keep, memory.entries))
            for memory, keep in zip(memories, keeps, strict=True)
        ]

    def is_due(self, num_seen: int, length: int) -> bool:
        """Whether a call of `length` tokens, after which `num_seen` are read, ends with a compression."""
        if self.prefill == "one_shot" and length > 1:
            return True
        return length > 0 and num_seen % self.interval == 0 and self.lookup is None

    def _kept(self, memory: LayerMemory, index: Tensor, keep: Tensor | None) -> LayerMemory:
        """The memory with these slots, as `select` gives them; the others are dropped or merged."""
        entries = memory.entries
        kept = entries.take(index, keep)
        if self.merger is None:
            return replace(memory, entries=kept)
        evicted = left_out(index, keep, entries)
        kept, threshold = self.merger.merge(kept, evicted, memory.threshold)
        return replace(memory, entries=kept, threshold=threshold)

    def select(self, scores: Tensor, entries: Entries, budget: int) -> tuple[Tensor, Tensor | None]:
        """Which slots stay.

        Args:
            scores: (B, G, C), +inf where forced, -inf in empty slots.
            entries: what is scored.
            budget: entries of a head.

        Returns:
            (B, G, n) slots sorted by position, and (B, G, n) which of them count, None for all.
        """
        scores = settled(scores)
        if self.selector is None:
            best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :budget]
            return best.gather(-1, by_position(entries.order.gather(-1, best))), None
        keep = self.selector.keep(scores, entries, budget)  # (B, G, C)
        order = torch.where(keep, entries.order, 0)
        index = by_position(order)[..., : self.width(budget, scores.shape[1])]
        return index, keep.gather(-1, index)

    # ------------------------------------------------------------------ steps of reading

    def _append(
        self,
        memory: LayerMemory,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extra: Tensor | None,
        ends: Tensor | None = None,
    ) -> LayerMemory:
        """The memory with new tokens behind its entries; nothing is evicted."""
        if self.lookup is not None and ends is None:
            raise ValueError(f"policy {self.name!r} wants `ends`, where sentences end. Give it.")
        entries, length = memory.entries, q.shape[1]
        seen = memory.num_seen + length
        order = torch.arange(memory.num_seen + 1, seen + 1, device=k.device, dtype=torch.int32)
        shape = (k.shape[0], k.shape[2], length)
        new = Entries(
            key=k.transpose(1, 2),
            value=v.transpose(1, 2),
            order=order.expand(shape),
            score=None if entries.score is None else entries.score.new_zeros(shape),
            count=None if entries.count is None else entries.count.new_ones(shape),
            extra=None if entries.extra is None or extra is None else extra.transpose(1, 2),
            sentence=None if ends is None else sentence_numbers(memory, ends)[:, None].expand(shape),
        )
        entries = Entries.concat([entries, new])
        if self.is_ragged:  # the empty slots of some heads would lie between old and new
            entries = entries.take(by_position(entries.order))
        queries = memory.queries
        if queries is not None:
            queries = torch.cat([queries, q.detach()], dim=1)[:, -queries.shape[1] :]
        question = memory.question if ends is None else asked(memory, q, ends)
        return replace(memory, entries=entries, num_seen=seen, queries=queries, question=question)

    def _attend(self, memory: LayerMemory, q: Tensor, place: Place) -> tuple[Tensor, LayerMemory]:
        """Attention of the newest tokens, whose entries are in the memory; scores grow by what they saw."""
        assert place.scale is not None
        seen, length = memory.num_seen, q.shape[1]
        entries = memory.entries
        held = entries if self.tier is None else self.tier.all_entries(memory)
        found = None
        if self.lookup is not None and memory.question is not None and length == 1:
            found = self.lookup.slots(entries, memory.question)
        if found is not None:
            held = entries.take(*found)
        gained: list[Tensor] = []
        observe: Callable[[Tensor], None] | None = None
        if self.scorer.accumulates:
            obs = self._observation(memory, q, place)

            def observe(weights: Tensor) -> None:
                if found is None:
                    weights = weights[..., held.num_slots - entries.num_slots :]
                else:
                    weights = scattered(weights, found[0], entries.num_slots)
                gained.append(self.scorer.observe(weights, obs))

        out = attend(
            q,
            held,
            torch.arange(seen - length + 1, seen + 1, device=q.device),
            scale=place.scale,
            observe=observe,
            mass_correction=self.mass_correction,
            rotation=place.rotation if self.rerotate else None,
        )
        if gained:
            score = entries.score
            assert score is not None
            memory = replace(memory, entries=replace(entries, score=score + sum(gained)))
        return out, memory

    def _settle(self, memory: LayerMemory, q: Tensor, place: Place, is_whole: bool) -> LayerMemory:
        """Compression where it is due."""
        is_deferred = place.is_deferred and (is_whole or self.is_shared)
        if is_deferred or not self.is_due(memory.num_seen, q.shape[1]):
            return memory
        return self.compress(memory, q, place=place, is_prompt=is_whole)

    def _observation(self, memory: LayerMemory, q: Tensor, place: Place) -> Observation:
        """What the scorer is told."""
        assert place.scale is not None
        queries = q.detach()
        if memory.queries is not None and memory.queries.shape[1] > q.shape[1]:
            queries = memory.queries
            if memory.num_seen < queries.shape[1]:
                queries = queries[:, queries.shape[1] - memory.num_seen :]
        return Observation(
            num_seen=memory.num_seen,
            scale=place.scale,
            queries=queries,
            num_new=q.shape[1],
            layer=place.layer,
            num_layers=place.num_layers,
            group_reduce=self.group_reduce,
        )

    def _rate(self, memory: LayerMemory, obs: Observation) -> Tensor:
        """(B, G, C) the scores as the selection sees them: +inf where forced, -inf in empty slots."""
        entries = memory.entries
        order, recent = entries.order, self.num_recent(memory.budget)
        forced = (order <= self.sinks) | (order > memory.num_seen - recent)
        scores = self.scorer.score(entries, obs).masked_fill(forced, torch.inf)
        return scores.masked_fill(order == 0, -torch.inf)


NO_THRESHOLD = -2.0  # below every cosine: nothing has been merged yet


def _located(place: Place | None, q: Tensor) -> Place:
    place = Place() if place is None else place
    return place if place.scale is not None else replace(place, scale=q.shape[-1] ** -0.5)
