"""Regenerate the tables and figures of the documentation from the code and from the benchmark records.

    python tools/cost_tables.py             write what is out of date
    python tools/cost_tables.py --check     only name it; exit code 1 if there is any

A page marks each table with `<!-- table: NAME ARGUMENT -->` and `<!-- end table -->`; what stands between
is replaced. Tables of measured figures come from `benchmarks/records/*.json` and are empty where the
record does not exist. The figures (`docs/mixers/figures/*.svg`) carry their data in their metadata and are
drawn again only when the data changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from memzoo.layers import TokenMixer, build_mixer
from memzoo.layers.parts.feature_maps import list_feature_maps, make_feature_map
from memzoo.layers.registry import mixer_entry
from memzoo.records import read_record

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RECORDS = ROOT / "benchmarks" / "records"
FIGURES = DOCS / "mixers" / "figures"

LENGTHS = (1024, 32_768, 1_000_000)
FIGURE_LENGTHS = tuple(2**power for power in range(7, 21))
HEADS = {"d_model": 1024, "num_heads": 16}
FULL = ("full attention", {"type": "attention", **HEADS})
WINDOW = {"type": "sliding_window", "window_size": 256, "num_sinks": 4}

# page -> (label, mixer); the first row is what the figure compares with
SUBJECTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "attention": [
        FULL,
        ("full attention, 4 key/value heads", {**FULL[1], "num_kv_heads": 4}),
        ("window 1,024 + 4 sinks", {**WINDOW, **HEADS, "window_size": 1024}),
        ("window 256 + 4 sinks", {**WINDOW, **HEADS}),
    ],
    "linear": [
        FULL,
        ("`linear_attention`, elu + 1", {"type": "linear_attention", **HEADS}),
        ("`based`, feature_dim 16", {"type": "based", **HEADS}),
        ("`based`, feature_dim 24", {"type": "based", **HEADS, "feature_dim": 24}),
        ("`base_conv`, gated", {"type": "base_conv", "d_model": 1024}),
        ("`base_conv`, zoology", {"type": "base_conv", "d_model": 1024, "variant": "zoology"}),
    ],
    "lolcats": [
        FULL,
        ("sliding, window 64 + 4 sinks", {"type": "lolcats", **HEADS, "num_sinks": 4}),
        ("terrace, window 64", {"type": "lolcats", **HEADS, "window": "terrace"}),
        ("memory off", {"type": "lolcats", **HEADS, "num_sinks": 4, "memory_enabled": False}),
    ],
    "composites": [
        FULL,
        (
            "`parallel`: window 256 + 4 sinks, `linear_attention`",
            {
                "type": "parallel",
                "d_model": 1024,
                "combine": "channel",
                "mixers": [{**WINDOW, "num_heads": 16}, {"type": "linear_attention", "num_heads": 16}],
            },
        ),
        (
            "`sequential`: `base_conv`, `based`",
            {
                "type": "sequential",
                "d_model": 1024,
                "mixers": [{"type": "base_conv"}, {"type": "based", "num_heads": 16}],
            },
        ),
    ],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check; 1 when a check found something."""
    parser = argparse.ArgumentParser(description="Regenerate the tables and figures of the documentation.")
    parser.add_argument("--check", action="store_true", help="write nothing, only name what is out of date")
    options = parser.parse_args(arguments)
    stale = []
    for page in pages():
        old = page.read_text(encoding="utf-8")
        new = refreshed(old, page)
        if new != old:
            stale.append(page)
            if not options.check:
                page.write_text(new, encoding="utf-8")
    for name in SUBJECTS:
        if figure_data(FIGURES / f"{name}.svg") != state_curves(name):
            stale.append(FIGURES / f"{name}.svg")
            if not options.check:
                draw(name)
    for path in stale:
        print(f"{'out of date' if options.check else 'wrote'}: {path.relative_to(ROOT)}")
    return 1 if stale and options.check else 0


def pages() -> list[Path]:
    """All pages, sorted."""
    return sorted(DOCS.glob("*.md")) + sorted(DOCS.glob("*/*.md"))


def refreshed(text: str, page: Path) -> str:
    """The text of a page with every table made anew.

    Raises:
        ValueError: a table that this script does not know.
    """

    def table(match: re.Match[str]) -> str:
        name, _, argument = match["what"].partition(" ")
        if name not in TABLES:
            raise ValueError(f"{page.name}: there is no table {name!r}. Known: {', '.join(TABLES)}.")
        content = TABLES[name](argument, page)
        return f"<!-- table: {match['what']} -->\n{content}<!-- end table -->"

    return re.sub(r"<!-- table: (?P<what>.+?) -->\n.*?<!-- end table -->", table, text, flags=re.DOTALL)


# ---------------------------------------------------------------------------------------------- costs


def build(config: Mapping[str, Any]) -> TokenMixer:
    """The mixer without memory for its weights."""
    with torch.device("meta"):
        return build_mixer(config)


def cost_table(name: str, page: Path) -> str:
    """State bytes and FLOPs per token of the subjects of a page."""
    header = ["mixer", *(f"state at {n:,}" for n in LENGTHS), *(f"FLOPs at {n:,}" for n in LENGTHS)]
    rows = []
    for label, config in SUBJECTS[name]:
        mixer = build(config)
        sizes = [readable(mixer.state_num_bytes(n, 1, torch.bfloat16), "B") for n in LENGTHS]
        rows.append([label, *sizes, *(readable(mixer.flops_per_token(n), "") for n in LENGTHS)])
    return markdown(header, rows)


def state_curves(name: str) -> dict[str, list[int]]:
    """Label -> state bytes at `FIGURE_LENGTHS`; without the markup of the labels."""
    return {
        label.replace("`", ""): [build(config).state_num_bytes(n, 1, torch.bfloat16) for n in FIGURE_LENGTHS]
        for label, config in SUBJECTS[name]
    }


def figure_data(path: Path) -> dict[str, list[int]] | None:
    """The data that a figure was drawn from; None if there is no such figure."""
    if not path.is_file():
        return None
    found = re.search(r"<dc:description>(.*?)</dc:description>", path.read_text(encoding="utf-8"), re.DOTALL)
    return json.loads(found.group(1)) if found else None


def draw(name: str) -> None:
    """State bytes against tokens read."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = state_curves(name)
    with plt.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure, axis = plt.subplots(figsize=(7, 4))
        for index, (label, sizes) in enumerate(curves.items()):
            style = "--" if index == 0 else "-"
            axis.plot(FIGURE_LENGTHS, [size / 1e6 for size in sizes], style, marker=".", label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("tokens read")
        axis.set_ylabel("state of one layer, one sequence (MB, bfloat16)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        figure.tight_layout()
        FIGURES.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None, "Creator": None, "Description": json.dumps(curves)}
        figure.savefig(FIGURES / f"{name}.svg", format="svg", metadata=metadata)
        plt.close(figure)


# ---------------------------------------------------------------------------------------------- fields


def field_table(name: str, page: Path) -> str:
    """Fields of a mixer config (`attention`) or of another class, with defaults and meaning."""
    rows = [
        [f"`{field}`", kind, default, meaning]
        for field, kind, default, meaning in fields_of(_class(name))
        if not (name.startswith("task_") and field == "seq_len")  # the lengths stand beside a task
    ]
    return markdown(["field", "type", "default", "meaning"], rows)


def fields_of(cls: type) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of every setting of a class, from its signature and docstrings."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        meanings.update(_meanings(base.__doc__ or ""))
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in ("type", "d_model") and name in meanings and cls.__name__ != "ModelConfig":
            continue  # every mixer has them
        factory = next(
            (
                item.default_factory
                for item in (dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ())
                if item.name == name and item.default_factory is not dataclasses.MISSING
            ),
            None,
        )
        default = "required"
        if factory is not None:
            default = f"`{_yaml(factory())}`"
        elif parameter.default is not inspect.Parameter.empty:
            default = f"`{_yaml(parameter.default)}`"
        if name not in meanings:
            raise ValueError(f"{cls.__name__} does not document {name}.")
        yield name, _kind(parameter.annotation), default, meanings[name]


def feature_map_table(argument: str, page: Path) -> str:
    """The feature maps with the number of features for heads of width 16."""
    rows = []
    for name in list_feature_maps():
        options = {"num_heads": 1} if name == "hedgehog_lolcats" else {}
        made = make_feature_map(name, 16, **options)
        summary = (inspect.getdoc(type(made)) or "").split("\n")[0]
        rows.append([f"`{name}`", str(made.out_dim), "yes" if made.is_positive else "no", summary])
    return markdown(["name", "features of a head of 16", "may be normalised", "what"], rows)


def _class(name: str) -> type:
    if name == "model":
        from memzoo.models.config import ModelConfig

        return ModelConfig
    if name in ("recipe", "stage"):
        from memzoo.train.conversion.recipe import ConversionRecipe, Stage

        return ConversionRecipe if name == "recipe" else Stage
    if name == "optimizer":
        from memzoo.train.optim import OptimizerConfig

        return OptimizerConfig
    if name == "language_model":
        from memzoo.train.modules import LanguageModelModule

        return LanguageModelModule
    if name == "data_text":
        from memzoo.train.data.text import TextDataModule

        return TextDataModule
    if name == "data_chat":
        from memzoo.train.data.chat import ChatDataModule

        return ChatDataModule
    if name == "data_stream":
        from memzoo.train.data.stream_module import StreamDataModule

        return StreamDataModule
    if name == "data_set":
        from memzoo.train.data.datasets_source import DatasetSource

        return DatasetSource
    if name == "data_task":
        from memzoo.train.data.task_module import TaskDataModule

        return TaskDataModule
    if name.startswith("task_"):
        from memzoo.train.data.tasks import TASKS

        return TASKS[name.removeprefix("task_")]
    if name == "data_mqar":
        from memzoo.train.data.mqar_module import MQARDataModule

        return MQARDataModule
    return mixer_entry(name).config


def _meanings(docstring: str) -> dict[str, str]:
    """Name -> text of the entries under `Attributes:` or `Args:`; `a, b: text` counts for both."""
    found: dict[str, str] = {}
    inside, names = False, ""
    for line in inspect.cleandoc(docstring).split("\n"):
        if line in ("Attributes:", "Args:"):
            inside = True
        elif line and not line.startswith(" "):
            inside = False
        elif inside and (entry := re.match(r"    ([\w, ]+): (.*)", line)):
            names = entry[1]
            found[names] = entry[2]
        elif inside and line.strip():
            found[names] += f" {line.strip()}"
    return {name.strip(): text for names, text in found.items() for name in names.split(",")}


def _kind(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    text = text.replace("builtins.", "")
    plain = {
        "str": "text",
        "bool": "true or false",
        "int": "integer",
        "float": "number",
        "None": "null",
        "tuple[MixerConfig, ...]": "list of mixers",
        "Sequence[MQARSegment]": "list of segments",
        "LayerPlan": "entry or list",
        "DatasetSource": "data set",
        "ModelConfig": "model config",
        "OptimizerConfig": "mapping",
        "LayerSelection": "selection",
        "Sequence[Stage | Mapping[str, Any]]": "list of stages",
        "tuple[float, float]": "pair of numbers",
    }
    if text in plain:
        return plain[text]
    parts = []
    for part in text.split(" | "):
        if part.startswith("Mapping"):
            parts.append("mapping")
        elif part.startswith("Literal"):
            parts.append("one of " + part[len("Literal[") : -1].replace('"', ""))
        elif inner := re.fullmatch(r"Sequence\[(\w+)\]", part):
            parts.append("list of " + {"str": "texts", "int": "integers"}.get(inner[1], "segments"))
        else:
            parts.append(plain[part])
    return " or ".join(parts)


def _yaml(value: Any) -> str:
    """A default as YAML would write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    if dataclasses.is_dataclass(value):
        return _yaml(dataclasses.asdict(value))  # type: ignore[arg-type]
    if isinstance(value, float):
        return re.sub(r"^(\d+)e", r"\1.0e", repr(value)).replace("e-0", "e-")  # YAML wants the point
    return str(value)


# ---------------------------------------------------------------------------------------------- records


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


def conversion_table(argument: str, page: Path) -> str:
    """The rows of conversions with their paired differences, from `demo*.json` and `convert*.json`."""
    parts = []
    for path, record in [*records("demo*.json"), *records("convert*.json")]:
        results = record["results"]
        books = list(next(iter(results["rows"].values()))["books"])
        rows = []
        for name, row in results["rows"].items():
            sizes = [readable(row["state_num_bytes"][str(n)], "B") for n in LENGTHS]
            perplexities = [f"{row['books'][book]['perplexity']:.2f}" for book in books]
            rows.append(
                [name, *perplexities, *sizes, f"{row['num_trained']:,}" if row["num_trained"] else ""]
            )
        header = ["model", *(f"perplexity, {book}" for book in books)]
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
    "fields": field_table,
    "costs": cost_table,
    "feature_maps": feature_map_table,
    "recall": recall_table,
    "decoding": decode_table,
    "conversion": conversion_table,
    "kernels": kernel_table,
    "records": record_table,
}


if __name__ == "__main__":
    sys.exit(main())
