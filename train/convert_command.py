"""What `memzoo convert` runs: the signature is the flags, the docstring the help."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .command_parts import check_output, model_place


def convert(
    source: str,
    output: str,
    recipe: str = "lolcats",
    control: bool = True,
    books: Sequence[str] = ("moby_dick", "emma"),
    num_windows: int = 8,
    seed: int | None = None,
    align_steps: int | None = None,
    tune_steps: int | None = None,
    accelerator: str = "auto",
    overwrite: bool = False,
) -> str:
    """Convert a pretrained model into a memory hybrid, tune it, and measure it beside its controls.

    Args:
        source: folder of a Llama-style model, a .gguf file, or "smollm2-135m" (fetched once into the cache).
        output: folder for the results: `hybrid/` (and `control/`) as Hugging Face folders, `report.json`.
        recipe: name of a shipped recipe (configs/convert) or a YAML file.
        control: also train the control, a window with the same sinks, budget, tokens and seed but no memory.
        books: bundled texts for the comparison; an empty list leaves it out.
        num_windows: windows of 1,024 tokens of each book.
        seed: replaces the seed of the recipe.
        align_steps: replaces the number of alignment steps of the recipe.
        tune_steps: replaces the number of tune steps of the recipe.
        accelerator: where to train, as Lightning names it.
        overwrite: replace the results of an earlier conversion in the output folder.
    """
    from ..models.checkpoints.folder import load_model, read_model_config
    from ..models.hf import save_model
    from ..records import refuse_content, results_folder, write_record
    from .comparison import comparison_results, comparison_table
    from .convert import (
        FIRST_TOKEN,
        WINDOW_SIZE,
        Conversion,
        book_tokens,
        check_accelerator,
        convert_and_compare,
        training_results,
    )
    from .data.tokenizers import load_tokenizer
    from .evaluate import window_starts
    from .recipe import check_recipe, read_recipe, recipe_dict

    chosen = read_recipe(recipe, seed=seed, align_steps=align_steps, tune_steps=tune_steps)
    check_accelerator(accelerator)
    place = model_place(source)
    # all that can be wrong is found before the weights are read
    check_recipe(chosen, read_model_config(place))
    folder = Path(output)
    if not overwrite:
        refuse_content(folder, ("hybrid", "control", "report.json"))
    results_folder(folder)
    for name in ("hybrid", "control") if control else ("hybrid",):
        results_folder(folder / name)
    check_output(str(folder / "report.json"))
    tokenizer = load_tokenizer(place)
    tokens = {book: book_tokens(tokenizer, book) for book in ([books] if isinstance(books, str) else books)}
    for ids in tokens.values():
        window_starts(len(ids), WINDOW_SIZE, num_windows, FIRST_TOKEN)

    def save(name: str, conversion: Conversion) -> None:
        if name == "hybrid":
            _drop_results(folder)
        save_model(conversion.model, folder / name, tokenizer)

    rows, hybrid, tuned_control = convert_and_compare(
        load_model(place).eval(),
        place,
        chosen,
        tokens=tokens,
        num_windows=num_windows,
        with_control=control,
        accelerator=accelerator,
        # saved as soon as it is trained, so that a later failure loses nothing
        on_trained=save,
    )
    results = comparison_results(rows) | training_results(hybrid, tuned_control)
    results["report"] = hybrid.report.to_dict()
    write_record(folder / "report.json", name="convert", config=recipe_dict(chosen), results=results)
    return f"{comparison_table(rows)}\n\nmodel written to {folder / 'hybrid'}"


def _drop_results(folder: Path) -> None:
    """Remove what an earlier conversion left and a new one may not replace."""
    import shutil

    from ..models.checkpoints.files import MANIFEST_NAME

    (folder / "report.json").unlink(missing_ok=True)
    if (folder / "control" / MANIFEST_NAME).is_file():
        shutil.rmtree(folder / "control")
