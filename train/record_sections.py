"""Records of evaluations as sections of a page: one plot per question, all models in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .report_page import Plot, Section, Series

Record = Mapping[str, Any]


def sections_of(records: Sequence[Record]) -> list[Section]:
    """The sections of a page that shows these records, the list of the records last.

    Args:
        records: what `read_record` returned: of `memzoo evaluate`, `memzoo convert` or the demonstration, in
            any mixture.

    Raises:
        ValueError: no record, or one of a kind that no section shows.
    """
    if not records:
        raise ValueError("there is no record to show. Give at least one, as `memzoo evaluate` writes them.")
    for record in records:
        if record["name"] not in _SECTIONS:
            raise ValueError(
                f"a page cannot show the record {record['name']!r}. It shows {', '.join(_SECTIONS)}."
            )
    found: list[Section] = []
    for make in dict.fromkeys(_SECTIONS.values()):
        names = [name for name, other in _SECTIONS.items() if other is make]
        chosen = [record for record in records if record["name"] in names]
        if chosen:
            found += make(chosen)
    return [*found, _sources(records)]


def comparison_sections(results: Mapping[str, Any]) -> list[Section]:
    """Sections from the results of `comparison_results`: perplexity by position per book, and state bytes."""
    rows: Mapping[str, Any] = results["rows"]
    found = []
    for book in dict.fromkeys(book for row in rows.values() for book in row["books"]):
        shown = {name: row["books"][book] for name, row in rows.items() if book in row["books"]}
        found.append(_positions(f"Perplexity by position: {_plain(book)}", shown, "each window starts empty"))
    sizes = [
        Series(name, [int(n) for n in row["state_num_bytes"]], _megabytes(row["state_num_bytes"].values()))
        for name, row in rows.items()
    ]
    found.append(Section("State", plots=[_state_plot(sizes)]))
    differences = [["difference in nats per token", "text", "mean", "interval", "windows"]]
    for label, pairs in results.get("differences", {}).items():
        for book, pair in pairs.items():
            differences.append([label, _plain(book), *_difference(pair)])
    if len(differences) > 1:
        found.append(Section("Paired differences", table=differences))
    return found


def _perplexity(records: Sequence[Record]) -> list[Section]:
    """One section per text, size of the windows and tokenizer: only those can be compared."""
    found = []
    for settings, group in _grouped(records, "text", "document", "window_size", "first_token", "tokenizer"):
        shown = {label: record["results"] for label, record in _labelled(group)}
        windows = next(iter(shown.values()))["num_windows"]
        text = (
            f"Document {settings['document']} from token {settings['first_token']:,} on, windows of "
            f"{settings['window_size']:,} tokens, each with an empty memory at its start; first record: "
            f"{windows} windows. Tokenizer {settings['tokenizer']}."
        )
        found.append(_positions(f"Perplexity by position: {_plain(settings['text'])}", shown, text))
    return found


def _positions(title: str, shown: Mapping[str, Mapping[str, Any]], text: str) -> Section:
    series = [
        Series(
            label,
            [(part["first"] + part["last"]) / 2 + 1 for part in results["by_position"]],
            [part["perplexity"] for part in results["by_position"]],
        )
        for label, results in shown.items()
    ]
    table = [["model", "loss (nats per token)", "perplexity"]]
    table += [[label, f"{found['loss']:.4f}", f"{found['perplexity']:.2f}"] for label, found in shown.items()]
    plot = Plot(title, "position in the window (tokens)", "perplexity", series, y_log=True)
    return Section(title, text, [plot], table)


def _tasks(records: Sequence[Record]) -> list[Section]:
    """Accuracy by length, and by depth at the longest, one section per task."""
    found = []
    for settings, group in _grouped(records, "task"):
        task = settings["task"]
        name = _plain(str(task["type"]))
        by_length, by_depth = [], []
        for label, record in _labelled(group):
            rows = sorted(record["results"]["lengths"], key=lambda row: row["length"])
            by_length.append(_accuracies(label, [row["length"] for row in rows], rows))
            parts = rows[-1]["by_depth"]
            middles = [(part["first"] + part["end"]) / 2 for part in parts]
            by_depth.append(_accuracies(f"{label}, {rows[-1]['length']:,} tokens", middles, parts))
        unit, limits = "accuracy", (-0.02, 1.02)
        plots = [
            Plot(f"{name} by length", "length (tokens)", unit, by_length, y_range=limits),
            Plot(f"{name} by depth", "depth of the evidence", unit, by_depth, x_log=False, y_range=limits),
        ]
        fields = ", ".join(f"{key} {value}" for key, value in task.items() if key != "type")
        chance = group[0]["results"].get("chance")
        text = f"Settings: {fields or 'as they are'}. Bars show one standard error."
        text += "" if chance is None else f" Chance is {chance:.4f}."
        found.append(Section(f"Task: {name}", text, plots))
    return found


def _accuracies(label: str, places: Sequence[float], rows: Sequence[Mapping[str, Any]]) -> Series:
    errors = [row["accuracy_standard_error"] for row in rows]
    return Series(label, places, [row["accuracy"] for row in rows], errors)


def _mqar(records: Sequence[Record]) -> list[Section]:
    table = [["model", "tokens", "pairs", "accuracy", "standard error", "examples"]]
    for label, record in _labelled(records):
        task, results = record["config"]["task"], record["results"]
        error = results["standard_error"]
        table.append(
            [
                label,
                f"{task['input_seq_len']:,}",
                str(task["num_kv_pairs"]),
                f"{results['accuracy']:.4f}",
                "" if error is None else f"{error:.4f}",
                f"{results['num_examples']:,}",
            ]
        )
    return [Section("Associative recall (MQAR)", table=table)]


def _speed(records: Sequence[Record]) -> list[Section]:
    """Figures of reading, writing, state and memory, one section per machine setting."""
    found = []
    for settings, group in _grouped(records, "batch_size", "dtype", "device", "threads"):
        rows = [(label, record["results"]["lengths"]) for label, record in _labelled(group)]

        def series(key: str, scale: float = 1.0, rows: Any = rows) -> list[Series]:
            return [
                Series(
                    label,
                    [row["length"] for row in lengths],
                    [None if row[key] is None else row[key] / scale for row in lengths],
                )
                for label, lengths in rows
            ]

        def plot(title: str, unit: str, key: str, scale: float = 1.0, series: Any = series) -> Plot:
            return Plot(title, "tokens read", unit, series(key, scale), y_log=True)

        plots = [
            plot("Reading", "tokens per second", "prefill_tokens_per_second"),
            plot("Writing", "tokens per second", "decode_tokens_per_second"),
            _state_plot(series("state_bytes", 1e6)),
        ]
        if any(row["peak_bytes"] is not None for _, lengths in rows for row in lengths):
            plots.append(plot("Peak memory of reading, beyond the model", "MB", "peak_bytes", 1e6))
        text = (
            f"Batch {settings['batch_size']}, {settings['dtype']}, {settings['device']}, "
            f"{settings['threads']} threads; medians of runs in turns."
        )
        found.append(Section("Speed and memory", text, plots))
    return found


def _compare(records: Sequence[Record]) -> list[Section]:
    table = [["a", "b", "a - b (nats per token)", "interval", "windows"]]
    for record in records:
        config = record["config"]
        table.append([str(config["a"]), str(config["b"]), *_difference(record["results"])])
    return [Section("Paired differences", table=table)]


def _comparisons(records: Sequence[Record]) -> list[Section]:
    return [section for record in records for section in comparison_sections(record["results"])]


_SECTIONS: dict[str, Callable[[Sequence[Record]], list[Section]]] = {
    "evaluate/perplexity": _perplexity,
    "evaluate/task": _tasks,
    "evaluate/mqar": _mqar,
    "evaluate/speed": _speed,
    "evaluate/compare": _compare,
    "convert": _comparisons,
    "demo": _comparisons,
}


def _sources(records: Sequence[Record]) -> Section:
    """How to repeat every record."""
    table = [["record", "model", "command", "commit", "date", "machine"]]
    for record in records:
        hardware = record.get("hardware") or {}
        accelerator = (hardware.get("accelerator") or {}).get("name")
        machine = accelerator or f"{hardware.get('processor')}, {hardware.get('torch_threads')} threads"
        table.append(
            [
                str(record["name"]),
                _label(record),
                str(record.get("command") or ""),
                str(record.get("commit") or "")[:10],
                str(record.get("date") or "")[:10],
                machine,
            ]
        )
    return Section("Records", "Every figure above comes from one of these.", table=table)


def _grouped(records: Sequence[Record], *keys: str) -> list[tuple[dict[str, Any], list[Record]]]:
    """Records of equal settings together, in order."""
    groups: list[tuple[dict[str, Any], list[Record]]] = []
    for record in records:
        settings = {key: record["config"].get(key) for key in keys}
        same = next((group for other, group in groups if other == settings), None)
        if same is None:
            groups.append((settings, [record]))
        else:
            same.append(record)
    return groups


def _labelled(records: Sequence[Record]) -> list[tuple[str, Record]]:
    """Every record with the name of its model; a number tells records of one model apart."""
    found: list[tuple[str, Record]] = []
    for record in records:
        label = _label(record)
        number = 1 + sum(_label(other) == label for _, other in found)
        found.append((label if number == 1 else f"{label} ({number})", record))
    return found


def _label(record: Record) -> str:
    return str(record["config"].get("model") or "")


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _megabytes(values: Any) -> list[float | None]:
    return [value / 1e6 for value in values]


def _state_plot(series: Sequence[Series]) -> Plot:
    return Plot("State", "tokens read", "MB", series, y_log=True)


def _difference(pair: Mapping[str, Any]) -> list[str]:
    return [
        f"{pair['mean']:+.4f}",
        f"[{pair['t_low']:+.4f}, {pair['t_high']:+.4f}] ({pair['confidence']:.0%})",
        str(pair["num_pairs"]),
    ]
