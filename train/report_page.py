"""Pages of measured results: plots with their numbers, and one HTML file that holds everything.

page = render_page("Two models", [Section("Perplexity", plots=[Plot(...)])])
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_STYLE = """body{font:16px/1.5 sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem}
img{max-width:100%} pre{background:#f4f4f4;padding:1rem;overflow-x:auto}
table{border-collapse:collapse;margin:1rem 0;font-size:14px} caption{text-align:left;font-weight:bold}
td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:right}
td:first-child,th:first-child{text-align:left}
td{overflow-wrap:anywhere}
img.map{width:32%} .strip{white-space:pre-wrap}"""


@dataclass(frozen=True)
class Series:
    """One line of a plot.

    Attributes:
        label: the model; a label has one colour on a whole page.
        x: positions, ascending.
        y: values, one per position; None leaves a gap.
        errors: half the height of the error bars.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    errors: Sequence[float | None] | None = None


@dataclass(frozen=True)
class Plot:
    """One picture.

    Attributes:
        title: what is shown.
        x_label: with its unit.
        y_label: with its unit.
        series: the lines.
        x_log: positions in powers of two.
        y_log: values in powers of ten.
        y_range: fixed limits, for shares.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    x_log: bool = True
    y_log: bool = False
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Heatmap:
    """A picture of a matrix.

    Attributes:
        title: what is shown.
        x_label, y_label: of columns and rows.
        values: rows of numbers from 0 to 1; 1 is dark.
    """

    title: str
    x_label: str
    y_label: str
    values: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: heading.
        text: plain text below it.
        plots: pictures; each is followed by its numbers.
        table: rows of cells, header first.
        lines: text in fixed width, such as a table that a command printed.
        heatmaps: pictures of matrices, beside one another.
        strip: pieces of a text, each with a number from 0 to 1 that colours its background.
    """

    title: str
    text: str = ""
    plots: Sequence[Plot] = ()
    table: Sequence[Sequence[str]] = ()
    lines: str = ""
    heatmaps: Sequence[Heatmap] = ()
    strip: Sequence[tuple[str, float]] = ()


def render_page(title: str, sections: Sequence[Section], *, note: str = "") -> str:
    """One HTML page with its pictures inside.

    Args:
        title: of the page.
        sections: its parts, in order.
        note: plain text below the title.
    """
    colours = _colours(sections)
    parts = [
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8"><title>{html.escape(title)}</title>',
        f"<style>{_STYLE}</style>\n<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(note)}</p>" if note else "",
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.text:
            parts.append(f"<p>{html.escape(section.text)}</p>")
        for plot in section.plots:
            picture = base64.b64encode(draw(plot, colours)).decode()
            parts.append(f'<img alt="{html.escape(plot.title)}" src="data:image/png;base64,{picture}">')
            parts.append(f"<details><summary>numbers</summary>{_table(_numbers(plot))}</details>")
        for heatmap in section.heatmaps:
            picture = base64.b64encode(draw_heatmap(heatmap)).decode()
            parts.append(
                f'<img class="map" alt="{html.escape(heatmap.title)}" src="data:image/png;base64,{picture}">'
            )
        if section.strip:
            parts.append(f'<p class="strip">{"".join(_coloured(*piece) for piece in section.strip)}</p>')
        if section.table:
            parts.append(_table(section.table))
        if section.lines:
            parts.append(f"<pre>{html.escape(section.lines)}</pre>")
    return "\n".join(part for part in parts if part) + "\n</html>\n"


def draw(plot: Plot, colours: Mapping[str, str] | None = None) -> bytes:
    """A plot as a PNG picture.

    Args:
        plot: what to draw.
        colours: label -> colour; by default in the order of the series.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, StrMethodFormatter

    figure = Figure(figsize=(8, 4.2))
    FigureCanvasAgg(figure)
    axis: Any = figure.add_subplot()
    colours = colours or _colours([Section("", plots=[plot])])
    for series in plot.series:
        shown = [index for index, value in enumerate(series.y) if value is not None]
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "color": colours[series.label]}
        errors = None
        if series.errors is not None:
            errors = [series.errors[index] or 0.0 for index in shown]
        axis.errorbar(
            [series.x[index] for index in shown],
            [series.y[index] for index in shown],
            yerr=errors,
            label=series.label,
            capsize=3,
            **style,
        )
    if plot.x_log:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    if plot.y_log:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(LogFormatter())
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    if plot.y_range is not None:
        axis.set_ylim(*plot.y_range)
    axis.set_title(plot.title)
    axis.set_xlabel(plot.x_label)
    axis.set_ylabel(plot.y_label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return picture.getvalue()


def draw_heatmap(heatmap: Heatmap) -> bytes:
    """A matrix as a PNG picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 3.6))
    FigureCanvasAgg(figure)
    axis: Any = figure.add_subplot()
    axis.imshow(heatmap.values, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axis.set_title(heatmap.title, fontsize=9)
    axis.set_xlabel(heatmap.x_label, fontsize=8)
    axis.set_ylabel(heatmap.y_label, fontsize=8)
    axis.tick_params(labelsize=7)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    return picture.getvalue()


def _coloured(text: str, share: float) -> str:
    """A piece of text on a background that says how much of it is left."""
    shown = html.escape(text).replace("\n", "<br>")
    return f'<span style="background:rgba(220,110,0,{share:.2f})" title="{share:.2f}">{shown}</span>'


def _colours(sections: Sequence[Section]) -> dict[str, str]:
    """Label -> colour, in the order in which labels first occur."""
    labels = dict.fromkeys(
        series.label for section in sections for plot in section.plots for series in plot.series
    )
    return {label: f"C{index % 10}" for index, label in enumerate(labels)}


def _numbers(plot: Plot) -> list[list[str]]:
    """The values of a plot as a table: a row per position, a column per series."""
    found = [dict(zip(series.x, series.y, strict=True)) for series in plot.series]
    rows = [[plot.x_label, *(series.label for series in plot.series)]]
    for place in sorted({x for series in plot.series for x in series.x}):
        values = (values.get(place) for values in found)
        rows.append([f"{place:,.10g}", *("" if value is None else f"{value:,.5g}" for value in values)])
    return rows


def _table(rows: Sequence[Sequence[str]]) -> str:
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows[1:]
    )
    return f"<table><tr>{header}</tr>\n{body}</table>"
