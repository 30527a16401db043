"""Which tokens of a text the layers with a store kept, and why: a page with the text as a strip per layer."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers import probe
from ..layers.bmojo import BMojoMixer
from ..models.decoder import MemoryLM

_STYLE = """body{font:16px/1.5 sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem}
.strip{font:14px/1.9 monospace;white-space:pre-wrap;overflow-wrap:anywhere}
.kept{outline:2px solid #b03030;outline-offset:-1px}.once{border-bottom:2px dotted #b03030}"""


@dataclass(frozen=True)
class StoredTokens:
    """What one layer did with the tokens of a text.

    Attributes:
        layer: number of the block.
        innovation: of every token.
        entered: chunk from which on a token was stored, None if it never was.
        left: chunk from which on it was no longer, None if it still is or never was.
        chunk_size: tokens of a chunk.
    """

    layer: int
    innovation: list[float]
    entered: list[int | None]
    left: list[int | None]
    chunk_size: int

    @property
    def kept(self) -> list[int]:
        """Positions that are stored at the end of the text."""
        return [
            place
            for place, (begin, end) in enumerate(zip(self.entered, self.left, strict=True))
            if begin is not None and end is None
        ]


@torch.no_grad()
def stored_tokens(model: MemoryLM, tokens: Tensor) -> list[StoredTokens]:
    """Reads a text and tells what each layer with a store did with its tokens.

    Args:
        model: with at least one B'MOJO layer that has a store.
        tokens: (T,) ids.

    Raises:
        ValueError: no layer has a store, or there are no tokens.
    """
    mixers = {index: block.mixer for index, block in enumerate(model.blocks)}
    layers = {
        index: mixer
        for index, mixer in mixers.items()
        if isinstance(mixer, BMojoMixer) and mixer.config.has_store
    }
    if not layers:
        kinds = sorted({mixer.config.type for mixer in mixers.values()})
        raise ValueError(
            f"no layer of this model stores tokens, it has {', '.join(kinds)}. "
            "Give a model with bmojo layers whose eidetic_size is not 0."
        )
    if not tokens.numel():
        raise ValueError("the text has no tokens. Give one that is not empty.")
    was_training = model.training
    model.eval()
    try:
        with probe() as seen:
            model(tokens[None].to(model.embed_tokens.weight.device))
    finally:
        model.train(was_training)
    found = zip(layers.items(), seen["innovation"], seen["stored_positions"], strict=True)
    return [
        _history(index, mixer.config.store_chunk, scores[0], positions[0])
        for (index, mixer), scores, positions in found
    ]


def _history(layer: int, chunk_size: int, scores: Tensor, positions: Tensor) -> StoredTokens:
    """From what each chunk found in the store: positions (U, S), -1 for nothing."""
    num_tokens = len(scores)
    entered: list[int | None] = [None] * num_tokens
    left: list[int | None] = [None] * num_tokens
    before: set[int] = set()
    for chunk, row in enumerate(positions.tolist()):
        now = {place for place in row if place >= 0}
        for place in now - before:
            entered[place] = chunk
        for place in before - now:
            left[place] = chunk
        before = now
    return StoredTokens(layer, scores.float().tolist(), entered, left, chunk_size)


def strip_page(title: str, words: Sequence[str], layers: Sequence[StoredTokens]) -> str:
    """One HTML page: the text once per layer, darker where it was harder to predict, stored tokens framed.

    Args:
        words: what each token reads as.
    """
    parts = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"]
    parts.append(
        f"<h1>{html.escape(title)}</h1><p>Darker: harder to predict from the fading stream. Framed: stored "
        "at the end of the text. Dotted: stored for a while. The score of a token and its time in the store "
        "show where the pointer rests.</p>"
    )
    for layer in layers:
        kept = len(layer.kept)
        parts.append(f"<h2>layer {layer.layer}: {kept} of {len(words)} tokens stored</h2><p class=strip>")
        largest = max(layer.innovation) or 1.0
        parts += [_word(word, place, layer, largest) for place, word in enumerate(words)]
        parts.append("</p>")
    return "\n".join(parts[:2]) + "".join(parts[2:]) + "\n"


def _word(word: str, place: int, layer: StoredTokens, largest: float) -> str:
    score, entered, left = layer.innovation[place], layer.entered[place], layer.left[place]
    note, kind = f"token {place}, innovation {score:.3f}", ""
    if entered is not None:
        note += f", stored from token {entered * layer.chunk_size}"
        kind = " class=kept"
    if left is not None:
        note += f" to {left * layer.chunk_size - 1}"
        kind = " class=once"
    shade = 0.6 * max(0.0, score) / largest
    style = f"background:rgba(230,150,30,{shade:.2f})"
    return f'<span{kind} style="{style}" title="{note}">{html.escape(word)}</span>'


def summary_rows(layers: Sequence[StoredTokens], words: Sequence[str]) -> list[tuple[str, str]]:
    """For each layer what it stored, in a few words."""
    rows = []
    for layer in layers:
        best = sorted(layer.kept, key=lambda place: -layer.innovation[place])[:8]
        scores = [layer.innovation[place] for place in layer.kept]
        level = sum(layer.innovation) / len(layer.innovation)
        mean = f"{sum(scores) / len(scores):.2f}" if scores else "none"
        shown = " ".join(repr(words[place]) for place in best)
        rows.append(
            (
                f"layers.{layer.layer}",
                f"{len(scores)} stored, mean innovation {mean} (all tokens {level:.2f}): {shown}",
            )
        )
    return rows
