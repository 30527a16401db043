"""Bounded caches on SmolLM2-135M: what every policy keeps of a context, and what it costs.

    python benchmarks/policies.py                      every policy at 12, 25 and 50 % of 512 tokens
    python benchmarks/policies.py --only h2o           one policy (and the full cache)
    python benchmarks/policies.py --quick              to try the script, on a model of random weights

A context of two books is read and compressed, then 64 further tokens are read one by one: their loss is that
of the evicting path. Needles: a number told somewhere in the context is asked for at its end; `asked` has the
question in the compressed context, `later` reads it after the compression. Bytes are those of the tensors
held after the context. Cases named `grid` evict while they read, every 16 tokens; the others read the context
whole and compress it then. A case that is done is kept in `runs/policies`, so that a run that was stopped
goes on.

A second table times single tokens of a small model after 1k to 64k tokens, with a full and with bounded
caches; the bounded ones have read every token.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import points
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GgufConfig, LlamaConfig, LlamaForCausalLM

from memzoo.layers.policies import EvictionPolicy, kv_bytes, make_policy
from memzoo.models.checkpoints.fetch import fetch_smollm2
from memzoo.models.checkpoints.tokenizers import tokenizer_from_gguf
from memzoo.models.policy_attach import attach_policy
from memzoo.models.policy_cache import PolicyCache
from memzoo.train.data.text_tasks import TextExamples, make_text_task
from memzoo.train.data.texts import load_text

NAME = "policies"
WORK = Path("runs") / NAME
BOOKS = ("moby_dick", "emma")
SHARES = (0.12, 0.25, 0.5)
INTERVAL = 16
LATER = 32  # last tokens of a needle's prompt, the question among them, that are read after the compression
LENGTHS = (1024, 4096, 16_384, 65_536)
DECODED = {"streaming_llm": {}, "h2o": {}, "tova": {}, "key_norm": {}, "snapkv": {"window": 32}}


def cases(heads: Sequence[Sequence[int]], last: int = 32) -> dict[str, dict[str, Any]]:
    """Policies by name, without their budgets.

    Args:
        heads: retrieval heads of every layer, for CompressKV.
        last: queries of the observation windows; half as many tokens are forced where a method wants some.
    """
    once: dict[str, Any] = {"prefill": "one_shot"}
    grid = {"interval": INTERVAL}
    window, ends = {"window": last}, {"sinks": 4, "recent": last // 2}
    return {
        "streaming_llm": {"type": "streaming_llm", **once},
        "h2o": {"type": "h2o", **once},
        "h2o, CaM": {"type": "h2o", "merge": True, **once},
        "snapkv": {"type": "snapkv", **window, **once},
        "snapkv, AdaKV": {"type": "snapkv", "adaptive": True, **window, **once},
        "pyramidkv": {"type": "pyramidkv", **window},
        "tova": {"type": "tova", **once},
        "key_norm": {"type": "key_norm", **ends, **once},
        "keydiff": {"type": "keydiff", **ends, **once},
        "d2o": {"type": "d2o", **once},
        "kvmerger": {"type": "kvmerger", **once},
        "elastic_cache": {"type": "elastic_cache", "n_sink": 4},
        "compresskv": {"type": "compresskv", "heads": [list(row) for row in heads]},
        "windowkv": {"type": "windowkv", "suffix": last},
        "arkv": {"type": "arkv", **window},
        "think": {"type": "think", "ratio": 0.5, "recent": last},
        "mikv, 2 bits": {"type": "mikv", "lo_bits": 2, "recent": last // 2},
        "mikv, 4 bits": {"type": "mikv", "lo_bits": 4, "recent": last // 2},
        "streaming_llm, grid": {"type": "streaming_llm", **grid},
        "h2o, grid": {"type": "h2o", **grid},
        "snapkv, grid": {"type": "snapkv", **window, **grid},
        "tova, grid": {"type": "tova", **grid},
        "key_norm, grid": {"type": "key_norm", **ends, **grid},
    }


def budgeted(case: Mapping[str, Any], share: float, length: int) -> dict[str, Any]:
    """A case with its budget: a share of the context, where the method has one."""
    budget, kind = max(8, int(share * length)), case["type"]
    if kind == "mikv":
        return {**case, "importance": share}
    if kind == "think":
        return dict(case)
    if kind == "windowkv":
        return {**case, "budget": max(8, budget - case["suffix"])}  # the suffix comes on top
    return {**case, "cache_size" if kind == "arkv" else "budget": budget}


@torch.no_grad()
def continued(
    model: LlamaForCausalLM, policy: EvictionPolicy | None, prompt: Tensor, rest: Tensor
) -> tuple[Tensor, int]:
    """Logits (1, R, V) that predict each token of `rest` (1, R), read one by one; bytes after the prompt."""

    def run(cache: Any, size: Any) -> tuple[Tensor, int]:
        found = [model(prompt, past_key_values=cache, logits_to_keep=1).logits]
        held = size()
        for token in rest[:, :-1].unbind(1):
            found.append(model(token[:, None], past_key_values=cache).logits)
        return torch.cat(found, dim=1), held

    if policy is None:
        full = DynamicCache(config=model.config)
        return run(full, lambda: sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers))
    with attach_policy(model, policy):
        cache = PolicyCache(model.config, policy)
        return run(cache, cache.memory_bytes)


def measured(
    model: LlamaForCausalLM,
    policy: Mapping[str, Any] | None,
    windows: Sequence[Tensor],
    context: int,
    needles: TextExamples | None,
) -> dict[str, Any]:
    """Loss, needle accuracy, bytes and seconds of one policy."""
    chosen, begin = None if policy is None else make_policy(policy), time.perf_counter()
    losses, sizes = [], []
    for window in windows:
        rest = window[None, context:]
        logits, size = continued(model, chosen, window[None, :context], rest)
        losses.append(float(torch.nn.functional.cross_entropy(logits[0].float(), rest[0])))
        sizes.append(size)
    found: dict[str, Any] = {"losses": losses, "perplexity": math.exp(sum(losses) / len(losses))}
    found["bytes"], found["declared_bytes"] = max(sizes), kv_bytes(model.config, context, policy)
    if needles is not None:
        right: dict[str, list[bool]] = {"asked": [], "later": []}
        for ids, ((first, end), *_) in zip(needles.ids, needles.answers, strict=True):
            for name, cut in (("asked", first), ("later", first - LATER)):
                logits, _ = continued(model, chosen, ids[None, :cut], ids[None, cut:end])
                said = logits[0, first - cut :].argmax(-1)
                right[name].append(bool((said == ids[first:end]).all()))
        found["accuracy"] = {name: sum(rows) / len(rows) for name, rows in right.items()}
    found["seconds"] = time.perf_counter() - begin
    return found


@torch.no_grad()
def retrieval_heads(model: LlamaForCausalLM, needles: TextExamples, num_heads: int = 4) -> list[list[int]]:
    """The query heads of each layer that look at the needle while its number is told (CompressKV)."""
    config, original = model.config, model.config._attn_implementation
    total = torch.zeros(config.num_hidden_layers, config.num_attention_heads)
    model.set_attn_implementation("eager")
    for ids, ((first, end), *_), (start, *_) in zip(
        needles.ids, needles.answers, needles.evidence, strict=True
    ):
        weights = model(ids[None, :end], output_attentions=True).attentions
        span = slice(start, start + end - first)
        for layer, rows in enumerate(weights):
            total[layer] += rows[0, :, first - 1 : end - 1, span].sum((1, 2))
    model.set_attn_implementation(original)
    best = total.topk(min(num_heads, total.shape[1]), dim=1).indices.sort(dim=1).values
    return [[int(head) for head in row] for row in best]


@torch.no_grad()
def decoding(kind: str, length: int, budget: int, steps: int) -> dict[str, Any]:
    """Milliseconds per token, and bytes of the cache, after `length` tokens; "full" keeps everything."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2 * max(LENGTHS),
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 512, (1, length + steps))

    def timed(cache: Any) -> list[float]:
        found = []
        for token in ids[:, length:].unbind(1):
            begin = time.perf_counter()
            model(token[:, None], past_key_values=cache)
            found.append(1000 * (time.perf_counter() - begin))
        return found

    if kind == "full":
        full = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):  # what was read does not matter for the time
            full.update(torch.randn(1, 4, length, 32), torch.randn(1, 4, length, 32), layer)
        times = timed(full)
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
    else:
        policy = make_policy({"type": kind, "budget": budget, "interval": 64, **DECODED[kind]})
        with attach_policy(model, policy):
            cache = PolicyCache(config, policy)
            for part in ids[:, :length].split(1024, dim=1):
                model(part, past_key_values=cache, logits_to_keep=1)
            times = timed(cache)
            size = cache.memory_bytes()
    return {"policy": kind, "tokens": length, "bytes": size, **common.summarize(times)}


def load_real(path: Path) -> tuple[LlamaForCausalLM, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        attn_implementation="sdpa",
    )
    return model.eval(), tokenizer_from_gguf(path)


def load_toy() -> LlamaForCausalLM:
    """A model of random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what is missing, writes the record after every case, prints two tables."""
    options_of = common.parser("Bounded caches on SmolLM2-135M.")
    options_of.add_argument("--only", action="append", help="policy, may be repeated")
    options_of.add_argument(
        "--context", type=int, default=512, help="tokens of a context (default: %(default)s)"
    )
    options_of.add_argument(
        "--rest", type=int, default=64, help="tokens read after it (default: %(default)s)"
    )
    options_of.add_argument("--windows", type=int, default=8, help="contexts per book (default: %(default)s)")
    options_of.add_argument("--needles", type=int, default=24, help="needles (default: %(default)s)")
    options_of.add_argument("--work", type=Path, default=WORK, help="folder of finished cases")
    options_of.add_argument("--skip-decoding", action="store_true", help="leave the second table out")
    options = options_of.parse_args(arguments)
    common.prepare(options)
    if options.quick:
        context, rest, last = 96, 4, 8
        model, needles = load_toy(), None
        generator = torch.Generator().manual_seed(0)
        windows = list(torch.randint(3, 64, (1, context + rest), generator=generator))
        heads = [[0, 1]] * 4
    else:
        context, rest, last = options.context, options.rest, 32
        model, tokenizer = load_real(fetch_smollm2())
        windows = []
        for book in BOOKS:
            ids = torch.tensor(tokenizer(load_text(book)[0].text).input_ids)
            starts = torch.linspace(0.3 * len(ids), 0.9 * len(ids), options.windows).long().tolist()
            windows += [ids[start : start + context + rest] for start in starts]
        task = make_text_task({"type": "needle_text"}, seq_len=context)
        needles = task.examples(tokenizer, np.random.default_rng(1), options.needles)
        heads = retrieval_heads(model, task.examples(tokenizer, np.random.default_rng(2), 8))
    known = cases(heads, last)
    for name in options.only or ():
        if name not in known:
            raise ValueError(f"there is no case {name!r}. Known: {', '.join(known)}.")
    described = {
        "context": context,
        "rest": rest,
        "windows": len(windows),
        "needles": 0 if needles is None else len(needles.ids),
        "cases": known,
        "shares": SHARES,
        "threads": torch.get_num_threads(),
    }
    chosen = {name: case for name, case in known.items() if not options.only or name in options.only}
    asked: list[tuple[str, float, dict[str, Any] | None]] = [("full", 1.0, None)]
    for name, case in chosen.items():
        shares = SHARES if case["type"] != "think" else SHARES[-1:]
        asked += [(name, share, budgeted(case, share, context)) for share in shares]
    rows: list[dict[str, Any]] = []
    for index, (name, share, policy) in enumerate(asked, start=1):
        settings = {"policy": policy, **{k: v for k, v in described.items() if k not in ("cases", "shares")}}
        make = partial(measured, model, policy, windows, context, needles)
        file = name.replace(" ", "_").replace(",", "")
        work = options.work / "quick" if options.quick else options.work
        rows.append({"case": name, "share": share, **points.kept(work, file, settings, make)})
        print(f"[{index}/{len(asked)}] {name}, {share:.0%}: {rows[-1]['perplexity']:.2f}", flush=True)
        common.save(options, NAME, described, {"quality": rows})
    table = [
        (
            row["case"],
            f"{row['share']:.0%}",
            row["perplexity"],
            *row.get("accuracy", {}).values(),
            row["bytes"],
        )
        for row in rows
    ]
    header = ("policy", "budget", "perplexity", *rows[0].get("accuracy", {}), "bytes")
    print(common.table(table, header))
    if not options.skip_decoding:
        timed = decoding_rows(options.quick)
        common.save(options, NAME, described, {"quality": rows, "decoding": timed})
        print(common.table([(r["policy"], r["tokens"], r["median_ms"], r["bytes"]) for r in timed],
                           ("policy", "tokens", "ms per token", "bytes")))  # fmt: skip
    return 0


def decoding_rows(quick: bool) -> list[dict[str, Any]]:
    """Times and bytes of every cache at every length."""
    lengths, budget, steps = ((128, 256), 48, 2) if quick else (LENGTHS, 512, 32)
    return [decoding(kind, length, budget, steps) for kind in ("full", *DECODED) for length in lengths]


if __name__ == "__main__":
    sys.exit(main())
