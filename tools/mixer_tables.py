"""Tables and figures of whole layers: speed and memory (`mixers.json`), recall (`recall_frontier.json`)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from record_tables import MEMORY_FIGURE, markdown, provenance, readable, records

SPEED_FIGURE = MEMORY_FIGURE.with_name("mixers.svg")
FRONTIER_FIGURE = MEMORY_FIGURE.with_name("recall_frontier.svg")
BASELINE = "attention"
BOTH = "forward+backward"


def speed_table(argument: str, page: Path) -> str:
    """Thousand tokens per second of each layer by length, and its speed over full attention."""
    parts = []
    for path, record in records("mixers.json"):
        rows = record["results"]["rows"]
        for mode in ("forward", BOTH):
            for dtype in dict.fromkeys(row["dtype"] for row in rows):
                parts.append(_speed_part(rows, record["results"]["skipped"], mode, dtype))
        parts.append(_decode_part(rows))
        parts.append(_operations_part(record["results"].get("operations", [])))
        parts.append(_wanted_part(record["results"]["wanted"]))
        parts.append(f"\n![Speed over full attention]({_up(page)}figures/{SPEED_FIGURE.name})\n\n")
        parts.append(provenance(path, record, page))
    return "\n" + "".join(parts) + "\n" if parts else ""


def _speed_part(rows: Sequence[Mapping[str, Any]], skipped: Sequence[Any], mode: str, dtype: str) -> str:
    own = [row for row in rows if (row["mode"], row["dtype"]) == (mode, dtype)]
    lengths = sorted({row["tokens"] for row in own})
    table = []
    for name in dict.fromkeys(row["mixer"] for row in (*own, *skipped) if row["mode"] == mode):
        found = {row["tokens"]: row for row in own if row["mixer"] == name}
        cells = []
        for length in lengths:
            row = found.get(length)
            speed = row and row["speed_over_attention"]
            ratio = f" ({speed:.2g}x)" if speed else ""
            cells.append(f"{row['tokens_per_second'] / 1000:.3g}{ratio}" if row else "")
        peak = found[lengths[-1]]["peak_mib"] if lengths and lengths[-1] in found else None
        table.append([name, *cells, "" if peak is None else f"{peak:,.0f}"])
    header = ["layer", *(f"{n:,} tokens" for n in lengths), f"peak MiB at {lengths[-1]:,}" if lengths else ""]
    intro = f"Thousand tokens per second, {mode}, {dtype}; in brackets the speed over full attention:\n\n"
    return intro + markdown(header, table) + "\n"


def _decode_part(rows: Sequence[Mapping[str, Any]]) -> str:
    own = [row for row in rows if row["mode"] == "decode"]
    contexts = sorted({row["tokens"] for row in own})
    dtypes = list(dict.fromkeys(row["dtype"] for row in own))
    table = []
    for name in dict.fromkeys(row["mixer"] for row in own):
        found = {(row["dtype"], row["tokens"]): row for row in own if row["mixer"] == name}
        cells = [
            f"{found[dtype, context]['median_ms']:.3g}" if (dtype, context) in found else ""
            for dtype in dtypes
            for context in contexts
        ]
        state = next(iter(found.values()))["state_bytes"]
        table.append([name, *cells, readable(state, "B")])
    header = [
        "layer",
        *(f"ms after {context:,}, {dtype}" for dtype in dtypes for context in contexts),
        f"state at {contexts[0]:,}, {dtypes[0]}" if contexts else "",
    ]
    return "One decoded token:\n\n" + markdown(header, table) + "\n"


def _operations_part(rows: Sequence[Mapping[str, Any]]) -> str:
    timed = [row for row in rows if "skipped" not in row]
    if not timed:
        return ""
    lengths = sorted({row["tokens"] for row in timed})
    table = []
    for key in dict.fromkeys((row["recurrence"], row["by"], row["dtype"]) for row in timed):
        found = {r["tokens"]: r for r in timed if (r["recurrence"], r["by"], r["dtype"]) == key}
        cells = [
            f"{found[n]['median_ms']:.4g} ({found[n]['speed_of_ours']:.2g}x)" if n in found else ""
            for n in lengths
        ]
        table.append([*key, *cells])
    header = ["recurrence", "by", "dtype", *(f"{n:,} tokens" for n in lengths)]
    intro = (
        "The recurrence alone, forward+backward on the same tensors, ms; in brackets the time over that of"
        " ours:\n\n"
    )
    return intro + markdown(header, table) + "\n"


def _wanted_part(checks: Sequence[Mapping[str, Any]]) -> str:
    if not checks:
        return ""
    missed = [check for check in checks if not check["reached"]]
    lines = [f"{len(checks) - len(missed)} of {len(checks)} aims of the benchmark are reached"]
    lines[0] += ". Missed:\n" if missed else ".\n"
    lines += [
        f"- {check['what']}: {check['value']:.3g}, {check['bound']} {check['wanted']:g}" for check in missed
    ]
    return "\n".join(lines) + "\n\n"


def frontier_table(argument: str, page: Path) -> str:
    """Recall of each point, one figure per seed."""
    parts = []
    for path, record in records("recall_frontier.json"):
        rows = []
        for (mixer, setting, size), accuracies in _points(record["results"]["points"]).items():
            shares = ", ".join(f"{accuracy:.1%}" for accuracy in accuracies)
            rows.append([mixer, setting, readable(size, "B"), shares])
        table = markdown(["mixer", "setting", "state", "recall, one figure per seed"], rows)
        figure = f"\n![Recall against the size of the state]({_up(page)}figures/{FRONTIER_FIGURE.name})\n\n"
        parts.append(table + figure + provenance(path, record, page))
    return "\n" + "\n".join(parts) + "\n" if parts else ""


def _points(points: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, int], list[float]]:
    """(mixer, setting, state bytes) -> accuracy of each seed."""
    found: dict[tuple[str, str, int], list[float]] = {}
    for point in points:
        setting = ", ".join(
            f"{key} {value}" for key, value in point["settings"].items() if key not in ("num_heads", "type")
        )
        found.setdefault((point["mixer"], setting, point["state_bytes"]), []).append(point["accuracy"])
    return found


def _up(page: Path) -> str:
    return "" if page.parent.name == "docs" else "../"


def figures() -> Iterator[tuple[Path, Any, Callable[[Path, Any], None]]]:
    """(file, data, function that draws it) of each figure whose record is there."""
    for _, record in records("mixers.json"):
        data: dict[str, dict[str, dict[str, float]]] = {}
        for row in record["results"]["rows"]:
            if row["mode"] == BOTH and row["speed_over_attention"] and row["mixer"] != BASELINE:
                own = data.setdefault(row["dtype"], {}).setdefault(row["mixer"], {})
                own[str(row["tokens"])] = round(row["speed_over_attention"], 4)
        yield SPEED_FIGURE, data, _draw_speed
    for _, record in records("recall_frontier.json"):
        curves: dict[str, list[list[float]]] = {}
        for (mixer, _, size), accuracies in _points(record["results"]["points"]).items():
            spread = [min(accuracies), statistics.mean(accuracies), max(accuracies)]
            curves.setdefault(mixer, []).append([size, *(round(value, 4) for value in spread)])
        yield FRONTIER_FIGURE, curves, _draw_frontier


def _figure(path: Path, columns: int) -> tuple[Any, Any, tuple[float, float]]:
    """pyplot, settings that give the same file for the same data, and the size of the figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = {"svg.hashsalt": path.stem, "svg.fonttype": "none", "font.family": "sans-serif"}
    return plt, plt.rc_context(settings), (5 * columns + 2, 4)


def _save(plt: Any, figure: Any, path: Path, data: Any) -> None:
    figure.tight_layout()
    metadata = {"Date": None, "Creator": None, "Description": json.dumps(data)}
    figure.savefig(path, format="svg", metadata=metadata)
    plt.close(figure)


def _draw_speed(path: Path, data: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Speed over full attention against the length, a panel for each precision."""
    plt, context, size = _figure(path, len(data))
    with context:
        figure, axes = plt.subplots(1, len(data), figsize=size, sharey=True, squeeze=False)
        for axis, (dtype, curves) in zip(axes[0], data.items(), strict=True):
            for index, (name, points) in enumerate(curves.items()):
                style = "--" if name.startswith("transformers") else "-"
                lengths = [int(length) for length in points]
                axis.plot(
                    lengths, list(points.values()), style, marker=".", color=f"C{index % 10}", label=name
                )
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel(f"tokens ({dtype})")
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel("speed over full attention, forward + backward")
        axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        _save(plt, figure, path, data)


def _draw_frontier(path: Path, data: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Recall against the bytes of the state, with the spread over seeds."""
    plt, context, size = _figure(path, 1)
    with context:
        figure, axis = plt.subplots(figsize=size)
        for name, points in data.items():
            sizes, low, mean, high = zip(*sorted(points), strict=True)
            errors = [
                [m - x for m, x in zip(mean, low, strict=True)],
                [x - m for m, x in zip(mean, high, strict=True)],
            ]
            axis.errorbar(sizes, mean, yerr=errors, marker="o", capsize=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("state of the mixer, one sequence (bytes)")
        axis.set_ylabel("recall (MQAR)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        _save(plt, figure, path, data)


TABLES: dict[str, Callable[[str, Path], str]] = {
    "mixer_speed": speed_table,
    "recall_frontier": frontier_table,
}
