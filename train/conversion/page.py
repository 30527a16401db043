"""The page of a conversion: its table, its plots, what the mixers became."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..report_page import Plot, Section, Series
from .comparison import Row, comparison_table, state_bytes
from .workshop import Conversion

MOST_POINTS = 400  # of a line of losses
STATE_LENGTHS = tuple(2**power for power in range(7, 21))
HOW_TO_READ = (
    "Perplexity per token on books that were not trained on; every window starts with an empty memory. The "
    "memory has earned its place when control - hybrid is above 0: the hybrid is better than the same budget "
    "of text and trained numbers spent without a memory. Branch off - hybrid above 0 says that the hybrid "
    "uses its memory. Differences are paired by window; an interval that contains 0 shows nothing."
)


def comparison_sections(rows: Sequence[Row], conversions: Mapping[str, Conversion]) -> list[Section]:
    """Table and plots of a comparison, and what each training did, as parts of a page.

    Args:
        rows: as measured.
        conversions: by the name of their run, the hybrid among them.
    """
    sections = [Section("Comparison", text=HOW_TO_READ, lines=comparison_table(rows))]
    if rows[0].losses:
        sections.append(Section("Perplexity by position", plots=position_plots(rows)))
    sections.append(Section("Memory of one sequence", plots=[state_plot(rows)]))
    sections.append(Section("Training", plots=_loss_plots(conversions), table=_stage_table(conversions)))
    plots = _mixer_plots(conversions["hybrid"])
    if plots:
        sections.append(Section("What the new mixers became", plots=plots))
    return sections


def position_plots(rows: Sequence[Row]) -> list[Plot]:
    """Perplexity against the position in the window, one plot per book."""
    plots = []
    for book in rows[0].losses:
        lines = []
        for row in rows:
            buckets = row.losses[book].buckets()
            middle = [(bucket["first"] + bucket["last"] + 1) / 2 for bucket in buckets]
            lines.append(Series(row.name, middle, [bucket["perplexity"] for bucket in buckets]))
        plots.append(
            Plot(book.replace("_", " "), "position in the window (tokens)", "perplexity", lines, y_log=True)
        )
    return plots


def state_plot(rows: Sequence[Row]) -> Plot:
    """Bytes of the state of teacher and hybrid against the tokens read."""
    shown = [row for row in rows if row.name in ("teacher, full attention", "hybrid")]
    lines = [
        Series(row.name, STATE_LENGTHS, [state_bytes(row.config, count) / 1e6 for count in STATE_LENGTHS])
        for row in shown
    ]
    return Plot("State", "tokens read", "state of one sequence (MB)", lines, y_log=True)


def _loss_plots(conversions: Mapping[str, Conversion]) -> list[Plot]:
    lines: dict[str, list[Series]] = {}
    for run, conversion in conversions.items():
        for facts in conversion.stages:
            for name, values in facts.history.items():
                if name.startswith("layer_") or (name == "loss" and {"kl", "ce"} & set(facts.history)):
                    continue
                kind = "alignment loss" if name == "loss" else name
                label = f"{run}: {facts.name}"
                lines.setdefault(kind, []).append(Series(label, *block_means(values)))
    return [Plot(kind, "batch", kind, found, x_log=False, y_log=True) for kind, found in lines.items()]


def block_means(values: Sequence[float], most: int = MOST_POINTS) -> tuple[list[int], list[float]]:
    """Figures of successive batches as at most `most` points: the last batch of each block, and its mean."""
    size = max(1, -(-len(values) // most))
    blocks = [values[first : first + size] for first in range(0, len(values), size)]
    ends = [min(first + size, len(values)) for first in range(0, len(values), size)]
    return ends, [sum(block) / len(block) for block in blocks]


def _stage_table(conversions: Mapping[str, Conversion]) -> list[list[str]]:
    rows = [["run", "stage", "steps", "tokens", "trained numbers", "seconds"]]
    for run, conversion in conversions.items():
        for facts in conversion.stages:
            trained = sum(facts.trained.values()) + facts.num_low_rank
            rows.append(
                [
                    run,
                    facts.name,
                    f"{facts.steps:,}",
                    f"{facts.num_tokens:,}",
                    f"{trained:,}",
                    f"{facts.seconds:,.0f}",
                ]
            )
    return rows


def _mixer_plots(hybrid: Conversion) -> list[Plot]:
    plots = []
    errors = {"before training": hybrid.report.layer_errors, "after training": hybrid.layer_errors}
    lines = [Series(label, list(found), list(found.values())) for label, found in errors.items() if found]
    if lines:
        plots.append(
            Plot(
                "Error of each mixer on the teacher's states",
                "block",
                "relative squared error",
                lines,
                x_log=False,
                y_log=all(value > 0 for line in lines for value in line.y if value is not None),
            )
        )
    if hybrid.window_shares:
        shares = hybrid.window_shares
        line = Series("share of the window's softmax", list(shares), list(shares.values()))
        title = "How much of the weight the window takes; the memory has the rest"
        plots.append(Plot(title, "block", "share", [line], x_log=False, y_range=(0.0, 1.0)))
    return plots
