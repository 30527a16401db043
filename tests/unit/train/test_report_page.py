"""Pages from records: what is in them, and what they refuse."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pytest

from memzoo import cli
from memzoo.records import read_record, write_record
from memzoo.train.record_sections import comparison_sections, sections_of
from memzoo.train.report_page import Plot, Section, Series, draw, render_page


def perplexity(model: str, loss: float = 3.0, **config: Any) -> dict[str, Any]:
    parts = [
        {"first": 0, "last": 63, "loss": loss, "perplexity": 2.7**loss},
        {"first": 64, "last": 255, "loss": loss - 1, "perplexity": 2.7 ** (loss - 1)},
    ]
    settings = {"model": model, "text": "moby_dick", "document": 0, "window_size": 256, "first_token": 0}
    results = {"loss": loss, "perplexity": 2.7**loss, "num_windows": 2, "by_position": parts}
    return record("evaluate/perplexity", settings | {"tokenizer": "abc"} | config, results)


def speed(model: str, peak: int | None = 3_000_000, **config: Any) -> dict[str, Any]:
    row = {"prefill_tokens_per_second": 900.0, "decode_tokens_per_second": 20.0, "state_bytes": 5_000_000}
    rows = [row | {"length": n, "peak_bytes": peak} for n in (256, 4096)]
    settings = {"model": model, "batch_size": 1, "dtype": "float32", "device": "cpu", "threads": 1}
    return record("evaluate/speed", settings | config, {"lengths": rows})


def task(model: str, name: str = "needle", accuracy: float = 0.5, **settings: Any) -> dict[str, Any]:
    figures = {"accuracy": accuracy, "accuracy_standard_error": 0.1}
    depths = [{"first": first, "end": first + 0.5, **figures} for first in (0.0, 0.5)]
    rows = [{"length": n, **figures, "by_depth": depths} for n in (64, 256)]
    config = {"model": model, "task": {"type": name, **settings}}
    return record("evaluate/task", config, {"lengths": rows, "chance": 0.125})


def record(name: str, config: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    return {
        "format_version": 1,
        "name": name,
        "command": f"memzoo {name} <all>",
        "commit": "0123456789abcdef",
        "date": "2026-11-23T10:00:00+00:00",
        "hardware": {"processor": "AMD", "torch_threads": 2, "accelerator": None},
        "config": config,
        "results": results,
    }


def plots(sections: list[Section]) -> dict[str, Plot]:
    return {plot.title: plot for section in sections for plot in section.plots}


def test_models_that_were_measured_alike_share_a_plot() -> None:
    sections = sections_of(
        [
            perplexity("a"),
            speed("a"),
            perplexity("b", 2.0),
            speed("b", None),
            task("a"),
            task("b"),
            perplexity("a"),
        ]
    )
    found = plots(sections)
    assert [series.label for series in found["Perplexity by position: moby dick"].series] == [
        "a",
        "b",
        "a (2)",
    ]
    assert list(found["Perplexity by position: moby dick"].series[0].x) == [32.5, 160.5]
    assert [series.label for series in found["needle by length"].series] == ["a", "b"]
    assert found["needle by length"].series[0].errors == [0.1, 0.1]
    assert found["needle by depth"].series[0].label == "a, 256 tokens"
    assert list(found["needle by depth"].series[0].x) == [0.25, 0.75]
    assert list(found["State"].series[1].y) == [5.0, 5.0]
    assert list(found["Peak memory of reading, beyond the model"].series[1].y) == [None, None]
    assert [section.title for section in sections][-1] == "Records"
    rows = sections[-1].table[1:]
    assert len(rows) == 7
    assert rows[0][:4] == ["evaluate/perplexity", "a", "memzoo evaluate/perplexity <all>", "0123456789"]


def test_what_cannot_be_compared_is_kept_apart() -> None:
    sections = sections_of(
        [
            perplexity("a"),
            perplexity("b", window_size=1024),
            perplexity("c", tokenizer="other"),
            speed("a"),
            speed("b", threads=2),
            task("a"),
            task("a", "copying"),
            task("a", num_keys=3),
        ]
    )
    counts = [len(plot.series) for section in sections for plot in section.plots]
    assert counts == [1] * len(counts)
    assert [section.title for section in sections].count("Speed and memory") == 2


def test_a_plot_is_a_picture_and_gaps_stay_gaps() -> None:
    plot = Plot("t", "x", "y", [Series("a", [1, 2, 4], [1.0, None, 3.0], [0.1, None, None])], y_log=True)
    assert draw(plot).startswith(b"\x89PNG")
    page = render_page(
        "A & B", [Section("S", "text <b>", [plot], [["h"], ["<i>"]], "lines & more")], note="n<"
    )
    assert "<h1>A &amp; B</h1>" in page
    for escaped in ("text &lt;b&gt;", "<td>&lt;i&gt;</td>", "lines &amp; more", "<p>n&lt;</p>"):
        assert escaped in page
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    numbers = re.findall(r"<td>([^<]*)</td>", page)
    assert numbers[:6] == ["1", "1", "2", "", "4", "3"]
    assert "http" not in page, "nothing is fetched"


def test_rows_of_a_conversion_become_sections() -> None:
    book = perplexity("x")["results"]
    rows = {
        name: {"num_trained": 1, "state_num_bytes": {"1024": 10, "32768": 20}, "books": {"emma": book}}
        for name in ("teacher", "hybrid")
    }
    pair = {"mean": 0.03, "num_pairs": 8, "confidence": 0.95, "t_low": 0.01, "t_high": 0.05}
    results = {"rows": rows, "differences": {"control - hybrid": {"emma": pair}}}
    sections = comparison_sections(results)
    found = plots(sections)
    assert [series.label for series in found["Perplexity by position: emma"].series] == ["teacher", "hybrid"]
    assert list(found["State"].series[0].x) == [1024, 32768]
    assert sections[-1].table[1] == ["control - hybrid", "emma", "+0.0300", "[+0.0100, +0.0500] (95%)", "8"]
    from_record = sections_of([record("convert", {"target": {}}, results)])
    assert plots(from_record).keys() == found.keys()


def test_compare_and_recall_records_are_tables() -> None:
    pair = {"mean": -0.03, "num_pairs": 8, "confidence": 0.95, "t_low": -0.05, "t_high": -0.01}
    recall = {"accuracy": 0.9, "standard_error": None, "num_examples": 100}
    shape = {"input_seq_len": 64, "num_kv_pairs": 4}
    sections = sections_of(
        [
            record("evaluate/compare", {"a": "a.json", "b": "b.json"}, pair),
            record("evaluate/mqar", {"model": "m", "task": shape}, recall),
        ]
    )
    tables = {section.title: section.table[1] for section in sections}
    assert tables["Paired differences"] == ["a.json", "b.json", "-0.0300", "[-0.0500, -0.0100] (95%)", "8"]
    assert tables["Associative recall (MQAR)"] == ["m", "64", "4", "0.9000", "", "100"]


def test_other_records_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot show the record 'bench/mixer'"):
        sections_of([record("bench/mixer", {}, {})])
    with pytest.raises(ValueError, match="there is no record to show"):
        sections_of([])


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, made in (("a, b.json", perplexity("a")), ("c.json", speed("c"))):
        write_record(name, name=made["name"], config=made["config"], results=made["results"])
    chosen = ["evaluate", "page", "--records", "a, b.json", "c.json"]
    assert cli.main([*chosen, "--output", "out/page.html", "--title", "Two"]) == 0
    page = (tmp_path / "out" / "page.html").read_text()
    assert page.count("<img") == 5
    assert "<title>Two</title>" in page
    assert str(read_record("c.json")["commit"])[:10] in page
    for message, arguments in (
        ("ends in .html", [*chosen, "--output", "page.pdf"]),
        ("there is no record 'd.json'", ["evaluate", "page", "--records", "d.json", "--output", "p.html"]),
        ("there is no record to show", ["evaluate", "page", "--records", "[]", "--output", "p.html"]),
    ):
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err
