"""Tables and figures of the documentation that show measured figures: each comes from a benchmark record."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from memzoo.records import read_record

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "records"
MEMORY_FIGURE = ROOT / "docs" / "figures" / "training_memory.svg"
LENGTHS = (1024, 32_768, 1_000_000)  # of the states in a record of a conversion


def recall_table(argument: str, page: Path) -> str:
    """Accuracy on MQAR per configuration, from `mqar*.json`."""
    parts = []
    for path, record in records("mqar*.json"):
        runs = record["results"]["runs"]
        rows = []
        for name in dict.fromkeys(run["configuration"] for run in runs):
            own = [run for run in runs if run["configuration"] == name]
            accuracies = ", ".join(f"{run['test_accuracy']:.1%}" for run in own)
            seconds = statistics.median(run["seconds"] for run in own)
            rows.append([f"`{name}`", accuracies, f"{seconds:.0f}"])
        header = ["configuration", "test accuracy, one figure per seed", "seconds of a run (median)"]
        parts.append(markdown(header, rows) + "\n" + provenance(path, record, page))
    return _section("Measured: recall (MQAR)", parts)


def decode_table(argument: str, page: Path) -> str:
    """Milliseconds per decoded token, from `decode.json`; `argument` picks models by a regular expression."""
    parts = []
    for path, record in records("decode.json"):
        generated = {
            (row["model"], row["context"]): row["ms_per_token"] for row in record["results"]["generate"]
        }
        rows = []
        for row in record["results"]["step"]:
            if re.search(argument or ".", row["model"]):
                other = generated.get((row["model"], row["context"]))
                cells = [f"{row['context']:,}", f"{row['ms_per_token']:.2f}"]
                cells.append("" if other is None else f"{other:.2f}")
                rows.append([row["model"], *cells, readable(row["state_bytes"], "B")])
        header = ["model", "context", "ms per token, `step`", "ms per token, `generate`", "state"]
        parts.append(markdown(header, rows) + "\n" + provenance(path, record, page))
    return _section("Measured: decoding", parts)


def loading_table(argument: str, page: Path) -> str:
    """Memory and processor seconds of loading, from `loading.json`."""
    parts = []
    for path, record in records("loading.json"):
        rows = [
            [
                row["source"],
                row["dtype"],
                f"`{row['reader']}`",
                readable(row["weight_bytes"], "B"),
                readable(row["peak_anonymous_bytes"], "B"),
                f"{row['peak_anonymous_ratio']:.2f}",
                f"{row['cpu_seconds']:.2f}",
            ]
            for row in record["results"]["rows"]
        ]
        header = ["source", "dtype", "reader", "weights", "own memory at most", "ratio", "processor seconds"]
        parts.append(markdown(header, rows) + "\n" + provenance(path, record, page))
    return _section("Measured: loading", parts)


def conversion_table(argument: str, page: Path) -> str:
    """The rows of conversions with their paired differences, from `demo*.json` and `convert*.json`.

    Args:
        argument: beginnings of the names of the records that are shown; none for all.
    """
    parts = []
    for path, record in [*records("demo*.json"), *records("convert*.json")]:
        if argument and not path.stem.startswith(tuple(argument.split())):
            continue
        results = record["results"]
        first = next(iter(results["rows"].values()))
        books, asked = list(first["books"]), ["recall"] if "recall" in first else []
        rows = []
        for name, row in results["rows"].items():
            sizes = [readable(row["state_num_bytes"][str(n)], "B") for n in LENGTHS]
            perplexities = [f"{row['books'][book]['perplexity']:.2f}" for book in books]
            recalls = [_share_with_error(row[key]) for key in asked]
            num_trained = f"{row['num_trained']:,}" if row["num_trained"] else ""
            rows.append([name, *perplexities, *recalls, *sizes, num_trained])
        header = [
            "model",
            *(f"perplexity, {book}" for book in books),
            *(f"{key} (std. error)" for key in asked),
        ]
        header += [*(f"state at {n:,}" for n in LENGTHS), "trained numbers"]
        lines = [
            f"- {label}, {book}: {pair['mean']:+.4f} nats per token over {pair['num_pairs']} windows, "
            f"{pair['confidence']:.0%} interval {pair['t_low']:+.4f} to {pair['t_high']:+.4f}"
            for label, found in results.get("differences", {}).items()
            for book, pair in found.items()
        ]
        parts.append(
            f"{path.stem}:\n\n"
            + markdown(header, rows)
            + "\n"
            + "\n".join(lines)
            + "\n\n"
            + provenance(path, record, page)
        )
    return _section("Measured", parts)


def _share_with_error(recall: Mapping[str, Any]) -> str:
    return f"{recall['accuracy']:.1%} ({recall['accuracy_standard_error']:.1%})"


def kernel_table(argument: str, page: Path) -> str:
    """One part of `kernels.json`, as the record has it: `attention` or `linear`."""
    parts = []
    for path, record in records("kernels.json"):
        measured = record["results"].get(argument, [])
        if not measured:
            continue
        settings = list(dict.fromkeys(key for row in measured for key in row["setting"]))
        figures = {
            "median_ms": "ms",
            "peak_mib": "peak MiB",
            "share_of_matmul_rate": "share of matmul rate",
            "relative_error": "relative error",
        }
        shown = [key for key in figures if any(row.get(key) is not None for row in measured)]
        rows = []
        for row in measured:
            cells = [str(row["setting"].get(key, "")) for key in settings]
            if "skipped" in row:
                cells += [f"left out: {row['skipped']}", *[""] * (len(shown) - 1)]
            else:
                cells += ["" if row.get(key) is None else f"{row[key]:.4g}" for key in shown]
            rows.append([row["function"], *cells])
        header = ["function", *settings, *(figures[key] for key in shown)]
        parts.append(markdown(header, rows) + "\n" + provenance(path, record, page))
    return _section("Measured: kernels", parts)


def stateful_table(argument: str, page: Path) -> str:
    """Accuracy at questions whose evidence lies in an earlier batch, from `stateful.json`."""
    parts = []
    for path, record in records("stateful.json"):
        runs = record["results"]["runs"]
        rows = []
        for arm in dict.fromkeys(run["arm"] for run in runs):
            own = [run for run in runs if run["arm"] == arm]
            shares = [
                ", ".join(f"{run[key]:.1%}" for run in own) for key in ("near_accuracy", "far_accuracy")
            ]
            rows.append([arm, *shares, f"{statistics.median(run['cpu_seconds'] for run in own):.0f}"])
        header = ["training", "asked in the same window", "asked three batches later", "CPU seconds (median)"]
        chance = f"Chance is {record['results']['chance']:.1%}; one figure per seed.\n\n"
        parts.append(markdown(header, rows) + "\n" + chance + provenance(path, record, page))
    return "\n" + "\n".join(parts) + "\n" if parts else ""


def memory_table(argument: str, page: Path) -> str:
    """Peak memory of a training step, from `training_memory.json`."""
    parts = []
    for path, record in records("training_memory.json"):
        cases = record["results"]["cases"]
        limit = record["config"]["limit_gib"]
        rows = []
        for tokens, model in dict.fromkeys((case["tokens"], case["model"]) for case in cases):
            cells = [
                _memory(case, limit) if case else ""
                for case in (_case(cases, tokens, model, *variant) for variant in MEMORY_VARIANTS.values())
            ]
            rows.append([f"{tokens:,}", model, *cells])
        up = "../" * len(page.relative_to(ROOT).parents[:-2])
        layers = max(case["layers"] for case in cases)
        intro = (
            f"One step (forward, backward, AdamW; float32, one sequence) of {layers} blocks of the sizes of "
            "SmolLM2-135M: the largest resident set of a fresh process, and in brackets, where counted, the "
            "bytes of its tensors.\n\n"
        )
        figure = f"\n![Peak memory of a training step]({up}figures/{MEMORY_FIGURE.name})\n\n"
        table = markdown(["tokens", "model", *MEMORY_VARIANTS], rows)
        parts.append(intro + table + figure + provenance(path, record, page))
    return "\n" + "\n".join(parts) + "\n" if parts else ""


# name -> (chunked, recompute)
MEMORY_VARIANTS = {
    "all logits": (False, False),
    "all logits, recomputed": (False, True),
    "chunked loss": (True, False),
    "chunked loss, recomputed": (True, True),
}


def _case(
    cases: Sequence[Mapping[str, Any]], tokens: int, model: str, chunked: bool, recompute: bool
) -> Mapping[str, Any] | None:
    wanted = (tokens, model, chunked, recompute)
    found = (c for c in cases if (c["tokens"], c["model"], c["chunked"], c["recompute"]) == wanted)
    return next(found, None)


def _memory(case: Mapping[str, Any], limit: float) -> str:
    if not case["fits"]:
        return f"over {limit:g} GiB"
    counted = f" ({case['tensor_bytes'] / 2**30:.2f})" if "tensor_bytes" in case else ""
    return f"{case['peak_bytes'] / 2**30:.2f} GiB{counted}"


def figures() -> Iterator[tuple[Path, Any, Callable[[Path, Any], None]]]:
    """(file, data, function that draws it) of each figure whose record is there."""
    for _, record in records("training_memory.json"):
        cases = record["results"]["cases"]
        tokens = max(case["tokens"] for case in cases)
        sizes: dict[str, dict[str, float | None]] = {}
        for model in dict.fromkeys(case["model"] for case in cases):
            sizes[model] = {}
            for name, variant in MEMORY_VARIANTS.items():
                case = _case(cases, tokens, model, *variant)
                fits = case is not None and case["fits"]
                sizes[model][name] = round(case["peak_bytes"] / 2**30, 3) if case and fits else None
        yield (
            MEMORY_FIGURE,
            {"tokens": tokens, "limit": record["config"]["limit_gib"], "gib": sizes},
            _draw_memory,
        )


def _draw_memory(path: Path, data: Mapping[str, Any]) -> None:
    """Peak memory per model, a bar for each way to train; hatched to the limit where it did not fit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure, axis = plt.subplots(figsize=(7, 4))
        width = 0.8 / len(MEMORY_VARIANTS)
        for index, name in enumerate(MEMORY_VARIANTS):
            for place, sizes in enumerate(data["gib"].values()):
                size = sizes[name]
                axis.bar(
                    place + (index - 1.5) * width,
                    data["limit"] if size is None else size,
                    width,
                    color="none" if size is None else f"C{index}",
                    edgecolor=f"C{index}",
                    hatch="//" if size is None else None,
                    label=name if place == 0 else None,
                )
        axis.set_xticks(range(len(data["gib"])), list(data["gib"]))
        axis.set_ylabel(f"peak memory of a step on {data['tokens']:,} tokens (GiB)")
        axis.grid(alpha=0.3, axis="y")
        axis.legend(fontsize=8)
        figure.tight_layout()
        metadata = {"Date": None, "Creator": None, "Description": json.dumps(data)}
        figure.savefig(path, format="svg", metadata=metadata)
        plt.close(figure)


def soft_cache_table(argument: str, page: Path) -> str:
    """Seconds and memory of the soft cache size beside a dense matrix, from `soft_cache_size.json`."""
    parts = []
    for path, record in records("soft_cache_size.json"):
        rows = []
        for row in record["results"]["cases"]:
            cells = ["does not fit", "does not fit"]
            if row["fits"]:
                cells = [f"{1000 * row['seconds']:.3g}", readable(row["bytes"], "B")]
            rows.append([f"{row['tokens']:,}", row["form"], *cells])
        header = ["tokens", "form", "ms, forward and backward", "memory"]
        parts.append(markdown(header, rows) + "\n" + provenance(path, record, page))
    return _section("Measured: soft cache size", parts)


def policy_table(argument: str, page: Path) -> str:
    """Bounded caches from `policies.json`: `quality`, `kvpress` or `decoding`."""
    parts = []
    for path, record in records("policies.json"):
        results = record["results"]
        measured = results.get(argument, [])
        if not measured:
            continue
        figures = ["perplexity", "nats above full", "asked", "later", "bytes"]
        if argument == "decoding":
            header = ["cache", "tokens read", "ms per token (median)", "mean", "bytes"]
            rows = [
                [
                    f"`{row['policy']}`",
                    f"{row['tokens']:,}",
                    f"{row['median_ms']:.2f}",
                    f"{row['mean_ms']:.2f}",
                    readable(row["bytes"], "B"),
                ]
                for row in measured
            ]
        elif argument == "kvpress":
            header = ["rule", "budget", "library", *figures]
            rows = [
                [row["case"], f"{row['share']:.0%}", library, *_policy_cells(row[library])]
                for row in measured
                for library in ("kvpress", "memzoo")
                if row[library] is not None
            ]
        else:
            header = ["policy", "budget", *figures]
            rows = [[row["case"], f"{row['share']:.0%}", *_policy_cells(row)] for row in measured]
        intro = "" if argument == "decoding" else _policy_intro(measured[0], record["config"])
        parts.append(intro + markdown(header, rows) + "\n" + provenance(path, record, page))
    titles = {"quality": "quality", "kvpress": "beside kvpress", "decoding": "decoding"}
    return _section(f"Measured: {titles[argument]}", parts)


def _policy_intro(row: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    found = row.get("memzoo", row)
    versions = config["peers"].get("versions", {})
    beside = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "torch")
    text = (
        f"{found['num_texts']} texts and {found['num_needles']} needles, contexts of {config['context']} "
        "tokens; in brackets standard errors, those of the nats above the full cache of paired differences."
    )
    return text + (f" Beside: {beside}.\n\n" if "memzoo" in row else "\n\n")


def _policy_cells(row: Mapping[str, Any]) -> list[str]:
    """Perplexity, loss above that of the full cache, needles asked and later, bytes."""
    cells = ["" if row["perplexity"] is None else f"{row['perplexity']:.2f}"]
    for key, form in (("above_full", ".4f"), ("asked", ".1%"), ("later", ".1%")):
        found = row[key]
        cells.append("" if found is None else f"{found['mean']:{form}} ({found['standard_error']:{form}})")
    return [*cells, "" if row["bytes"] is None else readable(row["bytes"], "B")]


def fast_weight_table(argument: str, page: Path) -> str:
    """Speed by chunk, time of a token and memory of training, from `fast_weights.json`."""
    parts = []
    for path, record in records("fast_weights.json"):
        results, sizes = record["results"], record["config"]["sizes"]
        speed = {(row["memory"], row["chunk"]): f"{row['tokens_per_s']:,.0f}" for row in results["speed"]}
        steps = {(row["memory"], row["past"]): f"{row['median_ms']:.3g}" for row in results["decode"]}
        names = dict.fromkeys(name for name, _ in speed)
        rows = [
            [
                name,
                *(speed.get((name, chunk), "") for chunk in sizes["chunks"]),
                *(steps.get((name, past), "") for past in sizes["past"]),
            ]
            for name in names
        ]
        header = ["memory", *(f"chunk {chunk:,}" for chunk in sizes["chunks"])]
        header += [f"ms per token after {past:,}" for past in sizes["past"]]
        memory = {(row["chunks"], row["recompute"]): row["tensor_bytes"] for row in results["memory"]}
        kept = [
            [str(chunks), *(readable(memory[chunks, recompute], "B") for recompute in (False, True))]
            for chunks in sizes["chunks_of_memory"]
        ]
        parts += [
            f"Width {sizes['width']}, {sizes['heads']} heads, {sizes['tokens']:,} tokens in float32; "
            f"titans-pytorch {results['peer']}. Tokens per second of forward and backward by chunk, and the "
            "time of one decoded token:\n",
            markdown(header, rows),
            f"Tensors of a training step of `fast_weight_memory` (chunks of {sizes['memory_chunk']}):\n",
            markdown(["chunks", "kept", "recomputed (default)"], kept)
            + "\n"
            + provenance(path, record, page),
        ]
    return _section("Measured: speed and memory by chunk", parts)


def record_table(argument: str, page: Path) -> str:
    """All records that are there, with their commands."""
    rows = []
    for path, record in records("*.json"):
        rows.append(
            [
                _link(path, page),
                f"`{record.get('command')}`",
                str(record.get("date", ""))[:10],
                _commit(record),
                _machine(record),
            ]
        )
    if not rows:
        return ""
    return markdown(["record", "command", "date", "commit", "machine"], rows)


def records(pattern: str) -> list[tuple[Path, dict[str, Any]]]:
    """The records whose file names match, sorted."""
    return [(path, read_record(path)) for path in sorted(RECORDS.glob(pattern))]


def provenance(path: Path, record: Mapping[str, Any], page: Path) -> str:
    """Where a table comes from, in one sentence."""
    return (
        f"Record {_link(path, page)}: `{record.get('command')}` at commit {_commit(record)}, "
        f"{_machine(record)}.\n"
    )


def _link(path: Path, page: Path) -> str:
    up = "../" * len(page.relative_to(ROOT).parents[:-1])
    return f"[{path.name}]({up}benchmarks/records/{path.name})"


def _commit(record: Mapping[str, Any]) -> str:
    commit = str(record.get("commit") or "unknown")
    return commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")


def _machine(record: Mapping[str, Any]) -> str:
    hardware = record.get("hardware") or {}
    accelerator = hardware.get("accelerator")
    if accelerator:
        return str(accelerator["name"])
    return f"{hardware.get('processor')}, {hardware.get('torch_threads')} threads"


def _section(title: str, parts: Sequence[str]) -> str:
    return f"\n## {title}\n\n" + "\n".join(parts) + "\n" if parts else ""


# ---------------------------------------------------------------------------------------------- text


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; pipes inside cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def readable(count: float, unit: str) -> str:
    """1,536 -> "1.536 kB"; four digits, decimal units (k, M, G)."""
    value, prefix = float(count), ""
    for prefix in ("", "k", "M", "G"):
        if value < 1000 or prefix == "G":
            break
        value /= 1000
    return f"{value:.4g} {prefix}{unit}".strip()


TABLES: dict[str, Callable[[str, Path], str]] = {
    "recall": recall_table,
    "decoding": decode_table,
    "loading": loading_table,
    "conversion": conversion_table,
    "fast_weights": fast_weight_table,
    "kernels": kernel_table,
    "policies": policy_table,
    "soft_cache_size": soft_cache_table,
    "stateful": stateful_table,
    "training_memory": memory_table,
    "records": record_table,
}
