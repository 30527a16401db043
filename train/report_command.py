"""What `memzoo evaluate page` and `all` run: signatures are the flags, docstrings the help."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from .command_parts import model_place

Settings = Mapping[str, Any]


def page(records: Sequence[str], output: str, title: str = "Evaluation") -> str:
    """One HTML page with plots from any mixture of records; models that were measured alike share a plot.

    Args:
        records: .json files that `memzoo evaluate` or `memzoo convert` wrote.
        output: .html file to write; pictures are inside.
        title: of the page.
    """
    from ..records import read_record, results_folder, write_text_atomically
    from .record_sections import sections_of
    from .report_page import render_page

    if Path(output).suffix != ".html" or Path(output).is_dir():
        raise ValueError(f"a page is an .html file, got {output!r}. Choose a name that ends in .html.")
    results_folder(Path(output).parent)
    sections = sections_of([read_record(record) for record in records])
    write_text_atomically(output, render_page(title, sections))
    return f"page written to {output}"


def evaluate_all(
    models: Sequence[str],
    output: str,
    perplexity: Sequence[dict[str, Any]] = (),
    speed: Sequence[dict[str, Any]] = (),
    mqar: Sequence[dict[str, Any]] = (),
    task: Sequence[dict[str, Any]] = (),
    title: str = "Evaluation",
    overwrite: bool = False,
) -> str:
    """Measure several models alike, from one file, with a page of the results.

    Args:
        models: folders of models, .gguf files, or "smollm2-135m".
        output: folder for the records and `page.html`.
        perplexity: flags of `memzoo evaluate perplexity` without model and output, one entry per measurement.
        speed: flags of `memzoo evaluate speed`, in the same way.
        mqar: flags of `memzoo evaluate mqar`.
        task: flags of `memzoo evaluate task`.
        title: of the page.
        overwrite: replace the records and the page of an earlier evaluation in the folder.
    """
    from ..records import refuse_content, results_folder
    from .evaluate_command import evaluate_mqar, evaluate_perplexity, evaluate_speed
    from .task_commands import evaluate_task

    asked: list[tuple[str, Callable[..., str], Sequence[Settings]]] = [
        ("perplexity", evaluate_perplexity, perplexity),
        ("mqar", evaluate_mqar, mqar),
        ("task", evaluate_task, task),
        ("speed", evaluate_speed, speed),
    ]
    if not models or not any(entries for _, _, entries in asked):
        raise ValueError(
            "there is nothing to measure. Give --models and a file of measurements, such as "
            "--config evaluate/small."
        )
    folder = Path(output)
    # all that can be wrong with the settings is found before the first measurement
    work: list[tuple[str, Callable[..., str], dict[str, Any]]] = []
    for name, function, entries in asked:
        for entry in entries:
            for model in models:
                model_place(model)
                record = folder / f"{len(work):02d}_{name}.json"
                settings = _checked(name, function, {**entry, "model": model, "output": str(record)})
                work.append((name, function, settings))
    if not overwrite:
        refuse_content(folder)
    results_folder(folder)
    shown = []
    for name, function, settings in work:
        shown.append(f"{settings['model']}, {name}:\n{function(**settings)}\n")
    made = [settings["output"] for _, _, settings in work]
    return "\n".join([*shown, page(made, str(folder / "page.html"), title)])


def _checked(name: str, function: Callable[..., str], settings: Settings) -> dict[str, Any]:
    """The arguments of a measurement, read as the command line would read them."""
    from jsonargparse import ArgumentParser

    from ..layers.contract import suggest

    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(function)
    for key in settings:
        if key not in signature(function).parameters:
            raise ValueError(f"{name} has no setting {key!r}. {suggest(key, signature(function).parameters)}")
    found: dict[str, Any] = parser.parse_object(dict(settings)).as_dict()
    return found
