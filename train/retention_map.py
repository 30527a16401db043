"""What retention gates keep of a text: which token leaves which head when, as numbers and as a page.

The rates are those that the gates give to a text read by full attention, as a one-shot prefill reads it. From
them alone follows what a bounded cache holds at every step, because nothing else ranks its entries.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import soft_cache_size
from ..models.conversion import memory_off
from ..models.decoder import MemoryLM
from .report_page import Heatmap, Plot, Section, Series

# Dimensions: T tokens, L gated layers, G heads of a layer, A = L G heads

NUM_SINKS = 4  # first tokens that the sink score looks at
_SHOWN_HEADS = 6  # maps on a page
_MOST_CELLS = 256  # of a map, in each direction
_BINS = 24  # of the half-lives


@dataclass(frozen=True)
class RetentionFacts:
    """What gates do with a text.

    Attributes:
        kept: (T, A, T) bool, whether a head holds token i after step t.
        half_lives: (T, A) tokens after which half of a token is left.
        sink_scores, window_scores: (A,) share of the first 4 tokens, and of the last `budget`, held at the
            end.
        layer_sizes: (L,) mean soft cache size as a multiple of the budget.
        layers: number of each gated layer in the model.
        budget: tokens per head.
    """

    kept: Tensor
    half_lives: Tensor
    sink_scores: Tensor
    window_scores: Tensor
    layer_sizes: Tensor
    layers: tuple[int, ...]
    budget: int

    @property
    def held_share(self) -> Tensor:
        """(T,) share of the heads that still hold each token at the end."""
        return self.kept[-1].float().mean(0)


def eviction_map(
    log_retention: Tensor, budget: int, *, buffer: int = 1, window: int = 0, age_offset: int = 0
) -> Tensor:
    """Whether a bounded cache holds token i after step t, (T, A, T) bool; once out, a token stays out.

    After every `buffer` tokens each head keeps the `budget` tokens of largest g * age; of equal ones the
    earlier stays.

    Args:
        log_retention: (T, A), g.
        budget: tokens per head.
        buffer: tokens between two evictions.
        window: last tokens that always stay.
        age_offset: age of the newest token.

    Raises:
        ValueError: a budget or buffer below 1, or a window beyond the budget.
    """
    if budget < 1 or buffer < 1 or not 0 <= window <= budget:
        raise ValueError(
            f"budget and buffer must be at least 1 and window from 0 to the budget, got {budget}, {buffer} "
            f"and {window}."
        )
    num_tokens, num_heads = log_retention.shape
    rates = log_retention.T  # (A, T)
    kept = torch.zeros(num_tokens, num_heads, num_tokens, dtype=torch.bool)
    held = torch.zeros(num_heads, 0, dtype=torch.int64)
    for t in range(num_tokens):
        held = torch.cat([held, torch.full((num_heads, 1), t)], 1)  # in order of position
        if (t + 1) % buffer == 0 and held.shape[1] > budget:
            scores = rates.gather(1, held) * (t - held + age_offset)
            scores = scores.masked_fill(held > t - window, math.inf)
            best = scores.sort(dim=1, descending=True, stable=True).indices[:, :budget]
            held = held.gather(1, best.sort(dim=1).values)
        kept[t].scatter_(1, held, True)
    return kept


@torch.no_grad()
def retention_facts(model: MemoryLM, tokens: Tensor, budget: int, *, buffer: int = 1) -> RetentionFacts:
    """Reads a text and says what its gates keep of it.

    Args:
        model: with retention gates.
        tokens: (1, T) ids.
        budget, buffer: of the cache.

    Raises:
        ValueError: the model has no retention gates, or an impossible budget.
    """
    layers = tuple(n for n, mixer in enumerate(model.config.mixers) if mixer.type == "gated_attention")
    if not layers:
        raise ValueError(
            "the model has no retention gates. Train some first: memzoo convert --recipe trimkv --source ..."
        )
    with memory_off(model, layers):
        extras = model(tokens, last_only=True, return_extras=True).extras
    rates = torch.cat([extras[f"layers.{n}.log_retention"] for n in layers], -1)[0].float()  # (T, A)
    kept = eviction_map(rates, budget, buffer=buffer)
    end, start = kept[-1].float(), max(0, tokens.shape[1] - budget)
    sizes = soft_cache_size(rates[None])[0] / budget  # (T, A)
    return RetentionFacts(
        kept=kept,
        half_lives=math.log(2) / (-rates).clamp(min=1e-30),
        sink_scores=end[:, :NUM_SINKS].mean(1),
        window_scores=end[:, start:].mean(1),
        layer_sizes=sizes.mean(0).unflatten(0, (len(layers), -1)).mean(1),
        layers=layers,
        budget=budget,
    )


def punctuation_lift(facts: RetentionFacts, pieces: Sequence[str]) -> float:
    """How much likelier a token of punctuation is held at the end than any token; nan without any.

    Args:
        facts: of a text.
        pieces: the text of each token.
    """
    marks = torch.tensor([bool(x.strip()) and set(x.strip()) <= set(string.punctuation) for x in pieces])
    share, every = facts.held_share, float(facts.held_share.mean())
    return float(share[marks].mean()) / every if bool(marks.any()) and every else math.nan


def retention_sections(facts: RetentionFacts, pieces: Sequence[str]) -> list[Section]:
    """The pictures of a text as parts of a page.

    Args:
        facts: of the text.
        pieces: the text of each token.
    """
    per_layer = facts.kept.shape[1] // len(facts.layers)
    names = [f"layer {layer}, head {head}" for layer in facts.layers for head in range(per_layer)]
    step = max(1, len(names) // _SHOWN_HEADS)
    maps = [
        Heatmap(names[a], "token", "step", _shrunk(facts.kept[:, a].float()).tolist())
        for a in range(0, len(names), step)
    ][:_SHOWN_HEADS]
    layers = list(facts.layers)
    size = Series("soft cache size / budget", layers, facts.layer_sizes.tolist())
    scores = [
        Series(label, list(range(len(names))), values.tolist())
        for label, values in (
            (f"first {NUM_SINKS} tokens", facts.sink_scores),
            (f"last {facts.budget} tokens", facts.window_scores),
        )
    ]
    lift = punctuation_lift(facts, pieces)
    return [
        Section(
            "What is left of the text",
            text=f"Background: share of the heads that still hold the token at the end, at {facts.budget} "
            f"tokens per head. Punctuation is held {lift:.2f} times as often as the average token.",
            strip=list(zip(pieces, facts.held_share.tolist(), strict=True)),
        ),
        Section("Which token leaves when", text="Dark: held after the step.", heatmaps=maps),
        Section("Half-lives", plots=[_half_life_plot(facts)]),
        Section(
            "Layers and heads",
            plots=[
                Plot("Sparsity by layer", "layer", "mean soft cache size / budget", [size], x_log=False),
                Plot("Held at the end", "head, layer by layer", "share", scores, x_log=False, y_range=(0, 1)),
            ],
        ),
    ]


def _half_life_plot(facts: RetentionFacts) -> Plot:
    """How many tokens have which half-life, in powers of two, by thirds of the depth."""
    lives = facts.half_lives.log2().clamp(-4, _BINS - 5).flatten(1)  # (T, A)
    groups = lives.unflatten(1, (len(facts.layers), -1)).tensor_split(min(3, len(facts.layers)), dim=1)
    labels = (
        ("early layers", "middle layers", "late layers") if len(groups) == 3 else ("layers",) * len(groups)
    )
    lines = []
    for number, (label, group) in enumerate(zip(labels, groups, strict=True)):
        counts = torch.histc(group, bins=_BINS, min=-4, max=_BINS - 4)
        places = [2.0 ** (edge + 0.5) for edge in range(-4, _BINS - 4)]
        name = label if len(groups) in (1, 3) else f"{label} {number}"
        lines.append(Series(name, places, (counts / max(1, group.numel())).tolist()))
    return Plot("Half-life of tokens", "half-life (tokens)", "share of tokens and heads", lines)


def _shrunk(values: Tensor) -> Tensor:
    """A map (T, T) of at most 256 cells in each direction, by averages."""
    size = -(-values.shape[0] // _MOST_CELLS)
    if size == 1:
        return values
    return torch.nn.functional.avg_pool2d(values[None, None], size, ceil_mode=True, count_include_pad=False)[
        0, 0
    ]
