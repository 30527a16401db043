"""Bounded caches on SmolLM2-135M: what every policy keeps of a context, and what it costs.

    python benchmarks/policies.py                      every policy at 12, 25 and 50 % of 512 tokens
    python benchmarks/policies.py --gates trained=runs/trimkv/gates      and with these retention gates
    python benchmarks/policies.py --peers runs/policies/kvpress.json     and beside kvpress
    python benchmarks/policies.py --only h2o           one policy (and the full cache)
    python benchmarks/policies.py --quick              to try the script, on a model of random weights

A context of two books is read and compressed, then 64 further tokens are read one by one: their loss is that
of the evicting path. Needles: a number told somewhere in the context is asked for at its end; `asked` has the
question in the compressed context, `later` reads it after the compression. All figures have their standard
error, and perplexities a paired difference to the full cache. Bytes are those of the tensors held after the
context, per row.

Most cases read the context whole and compress it then; those named `grid` evict while they read, every 16
tokens (whether the question comes before or after an eviction is then decided by its place alone, so `asked`
and `later` are one figure), and are measured at 25 %. `--gates NAME=FOLDER` adds retention gates that
`memzoo convert --recipe trimkv` has left in FOLDER; gates without training are always there. A context is
read by the model once for all cases that compress at its end, in parts of a few rows, and every figure of a
part is kept in `runs/policies`: a run that was stopped goes on, and the record grows part by part.

`runs/policies` also holds model and rows for `kvpress_peer.py`, which measures the policies of kvpress in an
environment of their own; `--peers` takes its file, and adds our cases of the same rules, which compress a
prompt and nothing after it.

A second table times single tokens of a small model after 1k to 64k tokens, with a full and with bounded
caches; the bounded ones have read every token.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import common
import numpy as np
import points
import prompts
import replay
import torch
from prompts import Part
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from memzoo.layers.parts.retention_gate import RetentionGate
from memzoo.layers.policies import kv_bytes, make_policy
from memzoo.models.checkpoints.fetch import fetch_smollm2
from memzoo.models.checkpoints.folder import export_llama_folder, load_model
from memzoo.models.checkpoints.tokenizers import tokenizer_from_gguf
from memzoo.models.conversion import attach_retention_gates, save_gates
from memzoo.models.policy_attach import attach_policy
from memzoo.models.policy_cache import PolicyCache
from memzoo.models.policy_gates import attach_gates
from memzoo.train.data.text_tasks import TextExamples, make_text_task
from memzoo.train.data.texts import load_text

# Dimensions: N rows, L tokens of a row, V vocabulary

NAME = "policies"
WORK = Path("runs") / NAME
BOOKS = ("moby_dick", "emma")
SHARES = (0.12, 0.25, 0.5)
MIDDLE = (0.25,)  # of cases that read every context anew
INTERVAL = 16
NEVER = 2**30  # an interval that no sequence here reaches: only prompts are compressed
UNTRAINED = "untrained"
GATES_FILE = "gates.safetensors"
SAME = 1e-3  # nats that losses of the same weights may differ by in two environments
LENGTHS = (1024, 4096, 16_384, 65_536)
SIZES = (
    ("context", 512, "tokens of a context"),
    ("rest", 64, "tokens read after it"),
    ("windows", 12, "contexts per book"),
    ("needles", 48, "needles"),
    ("rows", 8, "rows read together"),
)
DECODED = {
    "streaming_llm": {},
    "h2o": {},
    "tova": {},
    "key_norm": {},
    "snapkv": {"window": 32},
    "retention": {},
}


@dataclass(frozen=True)
class Row:
    """A text or a needle: tokens (L,), the first that is judged, and which of the two it is."""

    ids: Tensor
    first: int
    is_needle: bool


@dataclass(frozen=True, eq=False)
class Asked:
    """A figure to measure: its table, case and share of the context, and the policy as plain data."""

    table: str
    name: str
    share: float
    policy: dict[str, Any] | None


def cases(
    heads: Sequence[Sequence[int]],
    boundaries: Sequence[int],
    gates: Sequence[str] = (),
    last: int = 32,
) -> dict[str, dict[str, Any]]:
    """Policies by name, without their budgets.

    Args:
        heads: retrieval heads of every layer, for CompressKV.
        boundaries: tokens that end a sentence, for SentenceKV.
        gates: names of retention gates; the first also evict while they read, and share one budget.
        last: queries of the observation windows; half as many tokens are forced where a method wants some.
    """
    once: dict[str, Any] = {"prefill": "one_shot"}
    grid = {"interval": INTERVAL}
    window, ends = {"window": last}, {"sinks": 4, "recent": last // 2}
    gated = {f"retention, {name}": {"type": "retention", "gates": name, **once} for name in gates}
    for name in gates[:1]:
        gated[f"retention, {name}, one budget"] = {"type": "retention", "gates": name, "scope": "global"}
        gated[f"retention, {name}, grid"] = {"type": "retention", "gates": name, **grid}
    sentences = {"boundary_ids": list(boundaries), "start": last // 2, "recent": last // 2}
    return {
        **gated,
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
        "sentencekv": {"type": "sentencekv", **window, **sentences},
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


def peer_cases(last: int = 32) -> dict[str, dict[str, Any]]:
    """Our policies by the rules of kvpress: a prompt is compressed, what is read after it stays."""
    once: dict[str, Any] = {"prefill": "one_shot", "interval": NEVER}
    window = {"window": last}
    return {
        "streaming_llm": {"type": "streaming_llm", **once},
        "observed attention": {"type": "h2o", "normalize": True, "recent_ratio": 0.0, **once},
        "snapkv": {"type": "snapkv", **window, **once},
        "snapkv, AdaKV": {"type": "snapkv", "adaptive": True, **window, **once},
        "snapkv, merging": {"type": "snapkv", "merge": True, **window, **once},
        "pyramidkv": {"type": "pyramidkv", **window, "interval": NEVER},
        "tova": {"type": "tova", **once},
        "key_norm": {"type": "key_norm", **once},
        "keydiff": {"type": "keydiff", **once},
        "think": {"type": "think", "ratio": 0.5, **window, "recent": 1, "interval": NEVER},
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
def measured(
    model: LlamaForCausalLM,
    values: Mapping[str, Any] | None,
    part: Part,
    gates: Mapping[str, Path],
    reader: Reader,
) -> dict[str, Any]:
    """Figures of one policy on one part: `text`, or `asked` and `later`, one per row; bytes per row; seconds.

    Args:
        model: what reads.
        values: the policy as plain data; None for the cache that keeps everything.
        part: the rows.
        gates: name -> folder of retention gates.
        reader: gives the rows as full attention reads them.
    """
    begin, found = time.perf_counter(), dict[str, Any]()
    values = None if values is None else dict(values)
    chosen = None if values is None else values.pop("gates", None)
    policy = None if values is None else make_policy(values)
    if chosen is not None:
        attach_gates(model, gates[chosen])
    for name, cut in part.cuts.items():
        if name == "later" and policy is not None and policy.is_exact:
            found[name] = found["asked"]  # any split of the row gives the same
            continue
        with nullcontext() if policy is None else attach_policy(model, policy):
            if policy is None:
                reading = reader.reading(part)
                cache, logits = replay.full_cache(model, reading, cut), reading.logits
                size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            elif policy.is_exact:
                cache = PolicyCache(model.config, policy)
                logits = model(part.ids[:, :cut], past_key_values=cache, logits_to_keep=1).logits
                size = cache.memory_bytes()
            else:
                reading = reader.reading(part)
                cache, logits = replay.policy_cache(model, policy, reading, cut), reading.logits
                size = cache.memory_bytes()

            def step(tokens: Tensor, position: int, cache: Any = cache) -> Tensor:
                return model(tokens, past_key_values=cache).logits

            found[name] = prompts.continued(part, cut, logits, step)
        found["bytes"] = size // len(part.ids)
    return {**found, "seconds": time.perf_counter() - begin}


class Reader:
    """Reads a part with full attention when the first policy asks for it, and keeps it for the others."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model, self._held = model, (None, None)

    def reading(self, part: Part) -> replay.Reading:
        """The rows up to the first token that is judged."""
        if self._held[0] is not part:
            self._held = (None, None)  # frees the old one first
            self._held = (part, replay.read(self.model, part.ids[:, : part.first]))
        return self._held[1]


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
    """Milliseconds per token, and bytes of the cache, after `length` tokens; "full" keeps everything.

    The median is that of a step without a compression, the mean holds the compressions of `steps` tokens.
    """
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
    for layer in model.model.layers:
        layer.self_attn.retention_gate = RetentionGate(256, 4, 32, train_length=length)
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
    mean = sum(times) / len(times)
    return {"policy": kind, "tokens": length, "bytes": size, "mean_ms": mean, **common.summarize(times)}


def load_real(folder: Path) -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct in float32, from a folder that is written where it is missing."""
    if not (folder / "config.json").is_file():
        export_llama_folder(load_model(fetch_smollm2(), dtype=torch.float32), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval()


def load_toy(folder: Path) -> LlamaForCausalLM:
    """A model of random weights, in a folder too."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    model.save_pretrained(folder)
    return model


def text_rows(tokenizer: Any, context: int, rest: int, num_windows: int) -> list[Row]:
    """Windows of the books."""
    rows = []
    for book in BOOKS:
        ids = torch.tensor(tokenizer(load_text(book)[0].text).input_ids)
        starts = torch.linspace(0.3 * len(ids), 0.9 * len(ids), num_windows).long().tolist()
        rows += [Row(ids[start : start + context + rest], context, False) for start in starts]
    return rows


def needle_rows(needles: TextExamples) -> list[Row]:
    """Needles with their answers; of longer prompts the first tokens of the book are left out."""
    shortest = min(answers[0][0] for answers in needles.answers)
    rows = []
    for ids, ((first, end), *_), (told, *_) in zip(
        needles.ids, needles.answers, needles.evidence, strict=True
    ):
        if told < first - shortest:
            raise ValueError("a needle would be cut off. Choose another --needles.")
        rows.append(Row(ids[first - shortest : end], shortest, True))
    return rows


def in_parts(rows: Sequence[Row], size: int) -> list[Part]:
    """Rows of equal lengths together, `size` at a time; texts and needles in turns."""
    alike: dict[tuple[int, int, bool], list[Tensor]] = {}
    for row in rows:
        alike.setdefault((len(row.ids), row.first, row.is_needle), []).append(row.ids)
    kinds = [
        [Part(torch.stack(ids[start : start + size]), first, is_needle) for start in range(0, len(ids), size)]
        for (_, first, is_needle), ids in alike.items()
    ]
    return [part for turn in zip_longest(*kinds) for part in turn if part is not None]


def sentence_ends(tokenizer: Any) -> list[int]:
    """Tokens whose text ends a sentence or a line."""
    texts = (tokenizer.decode([index]) for index in range(len(tokenizer)))
    return [index for index, text in enumerate(texts) if text.rstrip(" \"')").endswith((".", "!", "?", "\n"))]


def find_gates(given: Sequence[str], work: Path, **untrained: Any) -> dict[str, Path]:
    """Name -> folder of the gates that were given, and of gates as they are before any training."""
    found: dict[str, Path] = {}
    for item in given:
        name, _, folder = item.partition("=")
        if not name or not folder or name == UNTRAINED:
            raise ValueError(f"--gates must be NAME=FOLDER with a name of its own, got {item!r}.")
        found[name] = Path(folder)
        if not (found[name] / GATES_FILE).is_file():
            raise ValueError(f"{folder} holds no {GATES_FILE}. Give the folder `gates` of a conversion.")
    found[UNTRAINED] = work / "untrained_gates"
    if not found[UNTRAINED].is_dir():
        torch.manual_seed(0)
        gated = attach_retention_gates(load_model(work / "model"), **untrained)
        save_gates(gated, found[UNTRAINED], base="SmolLM2-135M-Instruct")
    return found


def asked_for(
    chosen: Mapping[str, Mapping[str, Any]], peer_rows: Sequence[Mapping[str, Any]], context: int, last: int
) -> list[Asked]:
    """What is to be measured; the full cache first."""
    found = [Asked("quality", "full", 1.0, None)]
    for name, case in chosen.items():
        is_grid = "interval" in case
        shares = MIDDLE if is_grid else SHARES[-1:] if case["type"] == "think" else SHARES
        found += [Asked("quality", name, share, budgeted(case, share, context)) for share in shares]
    own = peer_cases(last)
    for row in peer_rows:
        name, share = row["case"], row["share"]
        if name in own:
            found.append(Asked("kvpress", name, share, budgeted(own[name], share, context)))
    return found


def measure_all(
    model: LlamaForCausalLM,
    parts: Sequence[Part],
    asked: Sequence[Asked],
    gates: Mapping[str, Path],
    folder: Path,
    threads: int,
) -> Iterator[dict[Asked, list[dict[str, Any]]]]:
    """Figures of all parts so far, after each."""
    reader, found = Reader(model), {item: list[dict[str, Any]]() for item in asked}
    of_gates = {name: prompts.digest(place / GATES_FILE) for name, place in gates.items()}
    for part in parts:
        rows = hashlib.sha256(part.ids.numpy().tobytes()).hexdigest()
        for item in asked:
            settings = {"policy": item.policy, "rows": rows, "first": part.first, "threads": threads}
            if item.policy is not None and "gates" in item.policy:
                settings["gates"] = of_gates[item.policy["gates"]]
            file = f"{item.table}_{item.name}_{item.share:.0%}".replace(" ", "_").replace(",", "")
            make = partial(measured, model, item.policy, part, gates, reader)
            found[item].append(points.kept(folder, file, settings, make))
        yield found


def summaries(
    config: Any,
    context: int,
    found: Mapping[Asked, list[dict[str, Any]]],
    peer_rows: Sequence[Mapping[str, Any]],
) -> dict[str, list[dict[str, Any]]]:
    """The rows of the tables `quality` and, where there are peers, `kvpress`."""
    whole = {(item.table, item.name, item.share): prompts.joined(parts) for item, parts in found.items()}
    full = whole["quality", "full", 1.0]
    results: dict[str, list[dict[str, Any]]] = {"quality": []}
    for item in found:
        if item.table == "quality":
            plain = None if item.policy is None else {k: v for k, v in item.policy.items() if k != "gates"}
            row = {"case": item.name, "share": item.share, "declared_bytes": kv_bytes(config, context, plain)}
            results["quality"].append(row | prompts.summary(whole[item.table, item.name, item.share], full))
    for row in peer_rows:
        # of a run that is under way only the first rows are there
        theirs = {**row, **{kind: row[kind][: len(full[kind])] for kind in prompts.KINDS}}
        gaps = [abs(a - b) for a, b in zip(theirs["text"], full["text"], strict=True)]
        if row["case"] == "full" and max(gaps, default=0.0) > SAME:
            raise ValueError(f"losses of full caches differ by {max(gaps):.2g}: these are other weights.")
        own = full if row["case"] == "full" else whole.get(("kvpress", row["case"], row["share"]))
        results.setdefault("kvpress", []).append(
            {
                "case": row["case"],
                "share": row["share"],
                "kvpress": prompts.summary(theirs, full),
                "memzoo": None if own is None else prompts.summary(own, full),
            }
        )
    return results


def read_peers(path: Path, rows: Path, num_parts: int) -> dict[str, Any]:
    """What `kvpress_peer.py` has written for the same rows.

    Raises:
        ValueError: it is of other rows, or not finished.
    """
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["parts"] != num_parts:
        raise ValueError(f"{path} has {found['parts']} of {num_parts} parts. Let kvpress_peer.py finish.")
    if found["prompts"] != prompts.digest(rows):
        raise ValueError(f"{path} is of other rows than {rows}. Run kvpress_peer.py again.")
    return found


def figures_of(row: Mapping[str, Any]) -> list[str]:
    """Cells of a table: perplexity, loss above that of the full cache, needles, bytes."""
    shown = [f"{row['perplexity']:.2f}"]
    for key, form in (("above_full", "+.4f"), ("asked", ".1%"), ("later", ".1%")):
        found = row[key]
        shown.append(
            "" if found is None else f"{found['mean']:{form}} ({found['standard_error']:{form.strip('+')}})"
        )
    return [*shown, f"{row['bytes']:,}"]


def print_tables(results: Mapping[str, list[dict[str, Any]]]) -> None:
    """All tables, as plain text."""
    header = ["perplexity", "nats above full", "asked", "later", "bytes"]
    quality = [(row["case"], f"{row['share']:.0%}", *figures_of(row)) for row in results["quality"]]
    print(common.table(quality, ("policy", "budget", *header)))
    beside = []
    for row in results.get("kvpress", ()):
        for library in ("kvpress", "memzoo"):
            if row[library] is not None:
                beside.append((row["case"], f"{row['share']:.0%}", library, *figures_of(row[library])))
    if beside:
        print(common.table(beside, ("rule", "budget", "library", *header)))
    times = [
        (r["policy"], r["tokens"], r["median_ms"], r["mean_ms"], r["bytes"])
        for r in results.get("decoding", ())
    ]
    if times:
        print(common.table(times, ("policy", "tokens", "ms per token", "mean", "bytes")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what is missing, writes the record after every part, prints the tables."""
    options_of = common.parser("Bounded caches on SmolLM2-135M.")
    options_of.add_argument("--only", action="append", help="policy, may be repeated")
    options_of.add_argument("--gates", action="append", help="NAME=FOLDER of trained gates, may be repeated")
    options_of.add_argument("--peers", type=Path, help="what kvpress_peer.py has written")
    options_of.add_argument("--export", action="store_true", help="write model and rows for it, and stop")
    for name, default, what in SIZES:
        options_of.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: %(default)s)")
    options_of.add_argument("--work", type=Path, default=WORK, help="folder of what is done")
    options_of.add_argument("--skip-decoding", action="store_true", help="leave the table of times out")
    options = options_of.parse_args(arguments)
    common.prepare(options)
    if options.quick:
        work, context, last = options.work / "quick", 96, 8
        model, boundaries, gate = load_toy(work / "model"), [3], {"gate_width": 8}
        drawn = torch.randint(3, 64, (8, 100), generator=torch.Generator().manual_seed(0))
        rows = [Row(row, context, index % 2 == 1) for index, row in enumerate(drawn)]
        heads = [[0, 1]] * 4
    else:
        work, context, last, gate = options.work, options.context, 32, {"train_length": options.context}
        model, tokenizer = load_real(work / "model"), tokenizer_from_gguf(fetch_smollm2())
        boundaries = sentence_ends(tokenizer)
        task = make_text_task({"type": "needle_text"}, seq_len=context)
        rows = text_rows(tokenizer, context, options.rest, options.windows)
        rows += needle_rows(task.examples(tokenizer, np.random.default_rng(1), options.needles))
        heads = []
    parts = in_parts(rows, options.rows)
    settings = {"context": context, "last": last, "shares": SHARES}
    prompts.write_parts(work / "prompts.json", parts, settings)
    if options.export:
        print(f"{work} is ready for kvpress_peer.py")
        return 0
    if not options.quick:
        heads = retrieval_heads(model, task.examples(tokenizer, np.random.default_rng(2), 8))
    gates = find_gates(options.gates or (), work, **gate)
    known = cases(heads, boundaries, list(gates), last)
    for name in options.only or ():
        if name not in known:
            raise ValueError(f"there is no case {name!r}. Known: {', '.join(known)}.")
    chosen = {name: case for name, case in known.items() if not options.only or name in options.only}
    peers = (
        {"rows": []}
        if options.peers is None
        else read_peers(options.peers, work / "prompts.json", len(parts))
    )
    config = {**settings, "cases": known, "rows": options.rows, "threads": torch.get_num_threads()}
    config["peers"] = {key: value for key, value in peers.items() if key != "rows"}
    results: dict[str, list[dict[str, Any]]] = {}
    asked = asked_for(chosen, peers["rows"], context, last)
    begin = time.perf_counter()
    for number, found in enumerate(
        measure_all(model, parts, asked, gates, work / "figures", config["threads"]), start=1
    ):
        results = summaries(model.config, context, found, peers["rows"])
        common.save(options, NAME, config, results)
        print(f"[{number}/{len(parts)}] after {time.perf_counter() - begin:.0f} s", flush=True)
    if not options.skip_decoding:
        results["decoding"] = decoding_rows(options.quick)
        common.save(options, NAME, config, results)
    print_tables(results)
    return 0


def decoding_rows(quick: bool) -> list[dict[str, Any]]:
    """Times and bytes of every cache at every length."""
    lengths, budget, steps = ((128, 256), 48, 2) if quick else (LENGTHS, 512, 128)
    return [decoding(kind, length, budget, steps) for kind in ("full", *DECODED) for length in lengths]


if __name__ == "__main__":
    sys.exit(main())
