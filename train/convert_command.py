"""What `memzoo convert` runs: the signature is the flags, the docstring the help."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .command_parts import check_output, model_place, say_waiting

RESULTS = ("hybrid", "control", "unaligned", "gates", "report.json")


def convert(
    source: str,
    output: str,
    recipe: str = "lolcats",
    control: bool = True,
    ablations: bool = False,
    books: Sequence[str] = ("moby_dick", "emma"),
    num_windows: int = 8,
    window_size: int = 1024,
    seed: int | None = None,
    steps: dict[str, int] | None = None,
    loss: dict[str, dict[str, float]] | None = None,
    accelerator: str = "auto",
    guide: str | None = None,
    teacher_cache: str | None = None,
    save_seconds: float = 60.0,
    dry_run: bool = False,
    overwrite: bool = False,
) -> str:
    """Convert a pretrained model into a memory hybrid, tune it, and measure it beside its controls.

    A conversion that was cut short goes on when the same command is given again.

    Args:
        source: folder of a Llama-style model, a .gguf file, or "smollm2-135m" (fetched once into the cache).
        output: folder for the results: `hybrid/` (and `control/`) as Hugging Face folders, `gates/` with the
            retention gates alone where it has some, `report.json` and `index.html`.
        recipe: name of a shipped recipe (configs/convert) or a YAML file.
        control: also train the control, a window with the same sinks, budget, tokens and seed but no memory.
        ablations: also measure the hybrid after each stage, and train it without its alignment.
        books: bundled texts for the comparison; an empty list leaves it out.
        num_windows: windows of each book, one after another.
        window_size: tokens of each; every window starts with an empty memory.
        seed: replaces the seed of the recipe.
        steps: replaces the steps of stages, for example {align: 10, tune: 60}.
        loss: replaces weights of losses of stages, for example {gates: {capacity: 0}}; the others stay.
        accelerator: where to train, as Lightning names it.
        guide: a larger model with the same tokenizer, whose distribution end-to-end stages learn (`kl`); by
            default the source itself.
        teacher_cache: folder that keeps what the teacher read, for other conversions of the same model.
        save_seconds: time between two checkpoints inside a stage.
        dry_run: only do the surgery, and say what it took over and whether the parity checks pass.
        overwrite: replace the results of an earlier conversion in the output folder; an unfinished one starts
            anew.
    """
    from ..models.checkpoints.folder import load_model, read_model_config
    from ..models.conversion import gate_weights, save_gates
    from ..models.hf import save_model
    from ..records import (
        current_command,
        refuse_content,
        results_folder,
        without_places,
        write_record,
        write_text_atomically,
    )
    from .conversion.card import model_card
    from .conversion.comparison import CAPTION, comparison_results, comparison_table
    from .conversion.folder import claimed, finish, is_begun, start_anew
    from .conversion.page import comparison_sections
    from .conversion.recipe import check_books, check_guide, check_recipe, read_recipe, shown_recipe
    from .conversion.run import (
        FIRST_TOKEN,
        Comparison,
        book_tokens,
        check_accelerator,
        convert_and_compare,
        surgery_report,
        training_results,
    )
    from .conversion.stage import StageSettings
    from .data.tokenizers import load_tokenizer
    from .evaluate import window_starts
    from .report_page import render_page

    chosen = read_recipe(recipe, seed=seed, steps=steps, loss=loss)
    check_accelerator(accelerator)
    if not save_seconds >= 0:
        raise ValueError(f"save_seconds must be at least 0, got {save_seconds}.")
    if books and num_windows < 2:
        raise ValueError(
            f"num_windows must be at least 2, got {num_windows}: differences between rows need an interval. "
            'Or leave the comparison out with --books "[]".'
        )
    place = model_place(source)
    # all that can be wrong is found before the weights are read
    check_recipe(chosen, read_model_config(place), with_control=control)
    if dry_run:
        say_waiting("surgery and parity checks")
        return surgery_report(load_model(place).eval(), place, chosen)
    folder = Path(output)
    if any((folder / name).resolve() == Path(place).resolve() for name in ("hybrid", "control")):
        raise ValueError(
            f"the source {source!r} would be replaced by the result. Name another output folder."
        )
    if not overwrite and not is_begun(folder):
        refuse_content(folder, RESULTS)
    results_folder(folder)
    for name in ("hybrid", "control") if control else ("hybrid",):
        results_folder(folder / name)
    check_output(str(folder / "report.json"))
    if teacher_cache is not None:
        results_folder(teacher_cache)
    tokenizer = load_tokenizer(place)
    guide_place = None if guide is None else model_place(guide)
    if guide is not None:
        check_guide(chosen, guide)
    if guide_place is not None and load_tokenizer(guide_place).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"the guide {guide!r} has another vocabulary than the source: their tokens cannot be compared. "
            "Take a larger model of the same family."
        )
    tokens = {book: book_tokens(tokenizer, book) for book in ([books] if isinstance(books, str) else books)}
    check_books(chosen, tokens)
    for ids in tokens.values():
        window_starts(len(ids), window_size, num_windows, FIRST_TOKEN)

    def save(name: str, conversion: Any) -> None:
        if name == "hybrid":
            _drop_results(folder)
        if name in ("hybrid", "control"):
            save_model(conversion.model, folder / name, tokenizer)
        if name == "hybrid" and gate_weights(conversion.model):
            save_gates(conversion.model, folder / "gates", base=Path(source).resolve().name)

    say_waiting("reading the training text and the weights")
    with _storage(folder), claimed(folder):
        if overwrite:
            start_anew(folder)
        rows, conversions = convert_and_compare(
            load_model(place).eval(),
            place,
            chosen,
            folder,
            tokens=tokens,
            comparison=Comparison(
                control=control, ablations=ablations, num_windows=num_windows, window_size=window_size
            ),
            settings=StageSettings(accelerator=accelerator, save_seconds=save_seconds),
            guide=None if guide_place is None else load_model(guide_place).eval(),
            cache=None if teacher_cache is None else Path(teacher_cache),
            # saved as soon as it is trained, so that a later failure loses nothing
            on_trained=save,
        )
        results = comparison_results(rows) | training_results(conversions)
        results["guide"] = None if guide is None else Path(guide).resolve().name
        results["report"] = conversions["hybrid"].report.to_dict()
        for name in ("hybrid", "control"):
            if name in conversions:
                card = model_card(
                    source, chosen, rows, conversions[name], is_control=name == "control", guide=guide
                )
                write_text_atomically(folder / name / "README.md", card)
        title = f"{Path(source).resolve().name} as a memory hybrid"
        page = render_page(
            title, comparison_sections(rows, conversions), note="All numbers are in report.json."
        )
        write_text_atomically(folder / "index.html", page)
        write_record(
            folder / "report.json",
            name="convert",
            config=shown_recipe(chosen),
            results=results,
            command=without_places(current_command()),
        )
        finish(folder)
    places = f"page written to {folder / 'index.html'}\nmodel written to {folder / 'hybrid'}"
    return f"{CAPTION}\n\n{comparison_table(rows)}\n\n{places}"


@contextmanager
def _storage(folder: Path) -> Iterator[None]:
    """Says what to do when the storage is full or broken; what is done is kept."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
            raise
        raise _storage_error(folder, error) from error
    except SafetensorError as error:  # of weights being exported; it has no number
        if "I/O error" not in str(error):
            raise
        raise _storage_error(folder, error) from error


def _storage_error(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"the conversion in {str(folder)!r} could not write to its storage ({error}). Make room, and give "
        "the same command again to go on."
    )


def _drop_results(folder: Path) -> None:
    """Remove what an earlier conversion left and a new one may not replace."""
    import shutil

    from ..models.checkpoints.files import MANIFEST_NAME

    for name in ("report.json", "index.html"):
        (folder / name).unlink(missing_ok=True)
    for name in ("control", "gates"):
        if (folder / name / MANIFEST_NAME).is_file():
            shutil.rmtree(folder / name)
