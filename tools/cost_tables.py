"""Regenerate the tables and figures of the documentation from the code and from the benchmark records.

    python tools/cost_tables.py             write what is out of date
    python tools/cost_tables.py --check     only name it; exit code 1 if there is any

A page marks each table with `<!-- table: NAME ARGUMENT -->` and `<!-- end table -->`; what stands between
is replaced. Tables of measured figures come from `benchmarks/records/*.json` and are empty where the
record does not exist (`record_tables.py`). The figures (`*.svg`) carry their data in their metadata and are
drawn again only when the data changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mixer_tables
import record_tables
import torch
from record_tables import markdown, readable

from memzoo.layers import TokenMixer, build_mixer
from memzoo.layers.parts.feature_maps import list_feature_maps, make_feature_map
from memzoo.layers.presets import PRESETS
from memzoo.layers.registry import mixer_entry
from memzoo.train.command_line import DATA_TYPES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FIGURES = DOCS / "mixers" / "figures"

LENGTHS = (1024, 32_768, 1_000_000)
FIGURE_LENGTHS = tuple(2**power for power in range(7, 21))
HEADS = {"d_model": 1024, "num_heads": 16}
FULL = ("full attention", {"type": "attention", **HEADS})
ALLMEM = {"type": "allmem", **HEADS, "num_kv_heads": 8}
WINDOW = {"type": "sliding_window", "window_size": 256, "num_sinks": 4}
BMOJO = {
    "type": "bmojo",
    **HEADS,
    "window_size": 512,
    "mixers": [{"type": "mamba2", "expand": 1, "d_state": 64}],
}

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
    "gated": [
        FULL,
        ("`retnet`", {"type": "retnet", **HEADS}),
        ("`simple_gla`", {"type": "simple_gla", **HEADS}),
        ("`gla`", {"type": "gla", **HEADS}),
        ("`delta_net`", {"type": "delta_net", **HEADS}),
        ("`gated_delta_net`", {"type": "gated_delta_net", **HEADS}),
        ("`kda`", {"type": "kda", **HEADS}),
        ("`gsa`", {"type": "gsa", **HEADS}),
        ("`mlstm`", {"type": "mlstm", **HEADS}),
    ],
    "lolcats": [
        FULL,
        ("sliding, window 64 + 4 sinks", {"type": "lolcats", **HEADS, "num_sinks": 4}),
        ("terrace, window 64", {"type": "lolcats", **HEADS, "window": "terrace"}),
        ("memory off", {"type": "lolcats", **HEADS, "num_sinks": 4, "memory_enabled": False}),
    ],
    "fast_weights": [
        FULL,
        ("`fast_weight_memory`", {"type": "fast_weight_memory", "d_model": 1024, "num_heads": 8}),
        ("`allmem`, window 4,096 + 128 sinks", {**ALLMEM, "window_size": 4096, "num_sinks": 128}),
        ("`allmem`, window 256 + 4 sinks", {**ALLMEM, "window_size": 256, "num_sinks": 4}),
        ("`lact`, window 2,048", {"type": "lact", **HEADS, "window_size": 2048}),
    ],
    "bmojo": [
        FULL,
        ("B'MOJO-F, window 512", BMOJO),
        ("B'MOJO, window 512, 512 stored", {**BMOJO, "eidetic_size": 512}),
        ("B'MOJO, window 512, everything stored", {**BMOJO, "eidetic_size": None}),
        ("window 1,024", {"type": "sliding_window", **HEADS, "window_size": 1024}),
    ],
    "mamba": [
        FULL,
        ("`mamba1`", {"type": "mamba1", "d_model": 1024}),
        ("`mamba2`", {"type": "mamba2", "d_model": 1024}),
        ("`mamba2`, d_state 64", {"type": "mamba2", "d_model": 1024, "d_state": 64}),
        ("`mamba3`", {"type": "mamba3", "d_model": 1024}),
    ],
    "ttt": [
        FULL,
        ("`ttt_linear`", {"type": "ttt_linear", **HEADS}),
        ("`ttt_mlp`", {"type": "ttt_mlp", **HEADS}),
        ("`titans`", {"type": "titans", **HEADS}),
        ("`titans`, gates per token", {"type": "titans", **HEADS, "gates": "token"}),
        (
            "`memory_as_context`, segments of 64",
            {"type": "memory_as_context", **HEADS, "mixers": [{"type": "titans", "num_heads": 16}]},
        ),
        (
            "`persistent_tokens`: window 256 + 4 sinks, gated by `titans`",
            {
                "type": "persistent_tokens",
                "d_model": 1024,
                "mixers": [
                    {
                        "type": "parallel",
                        "combine": "product",
                        "mixers": [{**WINDOW, "num_heads": 16}, {"type": "titans", "num_heads": 16}],
                    }
                ],
            },
        ),
    ],
    "trimkv": [
        FULL,
        ("`gated_attention`", {"type": "gated_attention", **HEADS}),
        ("`forgetting_attention`", {"type": "forgetting_attention", **HEADS}),
    ],
    "policy_attention": [
        FULL,
        ("`policy_attention`, `streaming_llm` 1,024", {"type": "policy_attention", **HEADS}),
        (
            "`policy_attention`, `tova` 256",
            {"type": "policy_attention", **HEADS, "policy": {"type": "tova", "budget": 256}},
        ),
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
    for path, data, drawn in (*record_tables.figures(), *mixer_tables.figures()):
        if figure_data(path) != data:
            stale.append(path)
            if not options.check:
                path.parent.mkdir(parents=True, exist_ok=True)
                drawn(path, data)
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


def preset_table(base: str, page: Path) -> str:
    """The presets of a mixer type with what they set."""
    rows = []
    for name, preset in PRESETS.items():
        if preset.base == base:
            values = ", ".join(f"`{field}: {_yaml(value)}`" for field, value in preset.defaults.items())
            rows.append([f"`{name}`", f"[{preset.source}](https://arxiv.org/abs/{preset.source})", values])
    return markdown(["name", "paper", "what it sets"], rows)


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
        from memzoo.train.conversion.recipe import ConversionRecipe
        from memzoo.train.conversion.recipe_stage import Stage

        return ConversionRecipe if name == "recipe" else Stage
    if name == "optimizer":
        from memzoo.train.optim import OptimizerConfig

        return OptimizerConfig
    if name == "language_model":
        from memzoo.train.modules import LanguageModelModule

        return LanguageModelModule
    if name.removeprefix("data_") in DATA_TYPES:
        module, _, attribute = DATA_TYPES[name.removeprefix("data_")].partition(":")
        return getattr(importlib.import_module(module), attribute)
    if name == "data_set":
        from memzoo.train.data.datasets_source import DatasetSource

        return DatasetSource
    if name.startswith("task_"):
        from memzoo.train.data.tasks import TASKS
        from memzoo.train.data.text_tasks import TEXT_TASKS

        return {**TASKS, **TEXT_TASKS}[name.removeprefix("task_")]
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
        if part.startswith(("Mapping", "dict")):
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


TABLES: dict[str, Callable[[str, Path], str]] = {
    "fields": field_table,
    "costs": cost_table,
    "feature_maps": feature_map_table,
    **mixer_tables.TABLES,
    "presets": preset_table,
    **record_tables.TABLES,
}


if __name__ == "__main__":
    sys.exit(main())
