"""The policies of kvpress on the model and the rows of `policies.py`, for an environment that has kvpress.

    python benchmarks/policies.py --export                     here: writes model and rows into runs/policies
    PEER/bin/python benchmarks/kvpress_peer.py runs/policies   in the environment of kvpress
    python benchmarks/policies.py --peers runs/policies/kvpress.json

Neither memzoo nor its environment is needed (kvpress wants older transformers). A press acts at the end of a
prompt and changes no output of it, so every prompt is read once and handed to the hooks of all presses; for
the first row that is compared with a prompt that was read under the press. Each press keeps as many tokens as
the budget says. Head-wise presses hide tokens instead of dropping them: their bytes are those of everything.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prompts
import torch
from prompts import Part
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

# Dimensions: N rows, T tokens, G key/value heads, D head width, M model width, V vocabulary

FULL = "full"
NO_BUDGET = (FULL, "think")  # measured once
Press = Any


def presses(last: int) -> dict[str, Callable[[float], Press]]:
    """Name -> what makes the press that drops a share of the tokens.

    Args:
        last: queries of the observation windows.
    """
    import kvpress as k

    def snapkv(ratio: float) -> Press:
        return k.SnapKVPress(ratio, window_size=last)

    return {
        "streaming_llm": lambda ratio: k.StreamingLLMPress(ratio, n_sink=4),
        "snapkv": snapkv,
        "snapkv, AdaKV": lambda ratio: k.AdaKVPress(snapkv(ratio)),
        "snapkv, merging": lambda ratio: k.MergingPress(snapkv(ratio)),
        "snapkv, CriticalKV": lambda ratio: k.CriticalKVPress(snapkv(ratio)),
        "pyramidkv": lambda ratio: k.PyramidKVPress(ratio, window_size=last),
        "tova": k.TOVAPress,
        "key_norm": k.KnormPress,
        "keydiff": k.KeyDiffPress,
        "expected attention": k.ExpectedAttentionPress,
        "think": lambda ratio: k.ThinKPress(0.5, window_size=last),
        "observed attention": k.ObservedAttentionPress,
    }


EAGER = ("observed attention",)  # which look at attention weights that only this implementation gives


@dataclass(frozen=True)
class Reading:
    """A prompt that was read with full attention.

    Attributes:
        attentions: the attention layers.
        keywords: of their calls, without the cache.
        outputs: what they gave.
        cache: keys and values (N, G, T, D) of every layer.
        logits: (N, 1, V) after the last token.
    """

    attentions: list[nn.Module]
    keywords: list[dict[str, Any]]
    outputs: list[tuple[Tensor, Tensor | None]]
    cache: list[tuple[Tensor, Tensor]]
    logits: Tensor


@torch.no_grad()
def read(model: Any, ids: Tensor, implementation: str) -> Reading:
    """Reads prompts (N, T)."""
    keywords: list[dict[str, Any]] = []
    outputs: list[Any] = []

    def after(module: nn.Module, arguments: Any, given: dict[str, Any], output: Any) -> None:
        keywords.append({key: value for key, value in given.items() if key != "past_key_values"})
        outputs.append(output)

    attentions = [layer.self_attn for layer in model.model.layers]
    cache = DynamicCache()
    hooks = [module.register_forward_hook(after, with_kwargs=True) for module in attentions]
    model.set_attn_implementation(implementation)
    try:
        logits = step(model, ids, cache, 0)
    finally:
        for hook in hooks:
            hook.remove()
    return Reading(attentions, keywords, outputs, [(x.keys, x.values) for x in cache.layers], logits)


def step(model: Any, ids: Tensor, cache: DynamicCache, position: int) -> Tensor:
    """Reads tokens (N, T) from a position on; logits (N, 1, V) after the last."""
    places = torch.arange(position, position + ids.shape[1])
    logits: Tensor = model(
        ids, past_key_values=cache, position_ids=places[None], cache_position=places, logits_to_keep=1
    ).logits
    return logits


def upto(reading: Reading, index: int, cut: int) -> tuple[dict[str, Any], Any, Tensor, Tensor]:
    """Keywords, output, keys and values of a layer as they are after the first `cut` tokens."""
    given = dict(reading.keywords[index])
    given["hidden_states"] = given["hidden_states"][:, :cut]
    given["position_embeddings"] = tuple(x[:, :cut] for x in given["position_embeddings"])
    given["cache_position"] = torch.arange(cut)
    given["position_ids"] = torch.arange(cut)[None]
    out, weights = reading.outputs[index]
    weights = None if weights is None else weights[:, :, :cut, :cut]
    k, v = (x[:, :, :cut].clone() for x in reading.cache[index])  # some presses write into them
    return given, (out[:, :cut], weights), k, v


@torch.no_grad()
def compressed(model: Any, press: Press | None, reading: Reading, cut: int) -> DynamicCache:
    """The cache after the first `cut` tokens, as the hooks of the press leave it."""
    cache = DynamicCache()
    layers = [upto(reading, index, cut) for index in range(len(reading.cache))]
    for index, (module, (_, _, k, v)) in enumerate(zip(reading.attentions, layers, strict=True)):
        cache.update(k, v, index)
        module.masked_key_indices = None  # of another press
    if press is not None:
        with press(model):
            for module, (given, output, *_) in zip(reading.attentions, layers, strict=True):
                press.forward_hook(module, [], {**given, "past_key_values": cache}, output)
    return cache


@torch.no_grad()
def check(model: Any, press: Press, part: Part, cut: int, implementation: str) -> None:
    """Raises ValueError where handing over a prompt differs from reading it under the press."""
    ids = part.ids[:1, :cut]
    mine = compressed(model, press, read(model, ids, implementation), cut)
    theirs = DynamicCache()
    with press(model):
        step(model, ids, theirs, 0)
    for index, (one, other) in enumerate(zip(mine.layers, theirs.layers, strict=True)):
        alike = one.keys.shape == other.keys.shape and torch.allclose(one.keys, other.keys, atol=1e-5)
        if not alike:
            raise ValueError(
                f"layer {index}: {type(press).__name__} keeps other entries under its own hooks."
            )


def share_dropped(budget: int, cut: int) -> float:
    """The ratio with which `budget` of `cut` tokens stay, however it is rounded; 0 where all do."""
    return max(0.0, 1 - (budget + 0.25) / cut)


def measured(
    model: Any, make: Callable[[float], Press] | None, budget: int, part: Part, reading: Reading
) -> dict[str, Any]:
    """Figures of one press on one part, as those of `policies.py`."""
    begin, found = time.perf_counter(), dict[str, Any]()
    for name, cut in part.cuts.items():
        ratio = share_dropped(budget, cut)
        press = None if make is None or ratio == 0 else make(ratio)
        cache = compressed(model, press, reading, cut)
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

        def one(tokens: Tensor, position: int, cache: DynamicCache = cache) -> Tensor:
            return step(model, tokens, cache, position)

        with torch.no_grad():
            found[name] = prompts.continued(part, cut, reading.logits, one)
        found["bytes"] = size // len(part.ids)
    return {**found, "seconds": time.perf_counter() - begin}


def budgets(name: str, settings: dict[str, Any]) -> dict[float, int]:
    """Share of the context -> tokens that stay."""
    shares = [1.0] if name == FULL else settings["shares"]
    chosen = shares[-1:] if name in NO_BUDGET else shares
    return {share: max(8, int(share * settings["context"])) for share in chosen}


def evaluate(
    model: Any, parts: Sequence[Part], settings: dict[str, Any], known: dict[str, Callable[[float], Press]]
) -> Iterator[dict[tuple[str, float], list[dict[str, Any]]]]:
    """Figures by press and share of all parts so far, after each part."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for part in parts:
        for implementation in ("sdpa", "eager"):
            asked = [name for name in (FULL, *known) if (name in EAGER) == (implementation == "eager")]
            if not asked:
                continue
            reading = read(model, part.ids[:, : part.first], implementation)
            for name in asked:
                make = known.get(name)
                if make is not None and part is parts[0]:
                    check(model, make(0.5), part, part.first, implementation)
                for share, budget in budgets(name, settings).items():
                    figures = measured(model, make, budget, part, reading)
                    found.setdefault((name, share), []).append(figures)
        yield found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every press; the file is written after every part."""
    options_of = argparse.ArgumentParser(description="The policies of kvpress, for benchmarks/policies.py.")
    options_of.add_argument(
        "folder", type=Path, help="where `policies.py --export` has written model and rows"
    )
    options_of.add_argument("--only", action="append", help="press, may be repeated")
    options_of.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    options = options_of.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    parts, settings = prompts.read_parts(options.folder / "prompts.json")
    model = AutoModelForCausalLM.from_pretrained(options.folder / "model", dtype=torch.float32).eval()
    known = presses(settings["last"])
    for name in options.only or ():
        if name not in known:
            raise ValueError(f"there is no press {name!r}. Known: {', '.join(known)}.")
    known = {name: make for name, make in known.items() if not options.only or name in options.only}
    versions = {name: importlib.metadata.version(name) for name in ("kvpress", "transformers", "torch")}
    begin = time.perf_counter()
    for number, found in enumerate(evaluate(model, parts, settings, known), start=1):
        rows = [
            {"case": name, "share": share, **prompts.joined(figures)}
            for (name, share), figures in found.items()
        ]
        made = {
            "prompts": prompts.digest(options.folder / "prompts.json"),
            "parts": number,
            "versions": versions,
            "rows": rows,
        }
        (options.folder / "kvpress.json").write_text(json.dumps(made), encoding="utf-8")
        print(f"[{number}/{len(parts)}] after {time.perf_counter() - begin:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
