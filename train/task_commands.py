"""`memzoo evaluate task`: recall on a synthetic task, or on one in English, by length and depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .command_parts import (
    DType,
    check_output,
    load_for_use,
    model_place,
    progress_line,
    table,
    write_if_asked,
)


def evaluate_task(
    model: str,
    task: str,
    lengths: Sequence[int] = (512,),
    settings: dict[str, bool | int | float | str | list[float] | None] | None = None,
    num_examples: int = 100,
    batch_size: int = 20,
    chunk_size: int = 1024,
    num_depths: int = 4,
    seed: int = 0,
    tokenizer: str | None = None,
    device: str = "auto",
    dtype: DType = "float32",
    output: str | None = None,
) -> str:
    """Recall of a model on a synthetic task at several lengths.

    Tasks of tokens, for models trained on them: associative_retrieval, copying, mqar, multi_document_recall,
    needle, variable_tracking. Tasks in English, for pretrained models: needle_text, variable_tracking_text.

    Args:
        model: folder of a model, a .gguf file, or "smollm2-135m" (fetched once into the cache).
        task: name of the task.
        lengths: tokens per example; they may be longer than any in training.
        settings: fields of the task, for example {num_distractors: 3}.
        num_examples: examples of each length.
        batch_size: examples read at once; those in English are read one by one.
        chunk_size: tokens read at once, which bounds the memory and changes no number.
        num_depths: buckets of the figures by depth.
        seed: seed of the examples.
        tokenizer: folder or .gguf file of the tokenizer for tasks in English; by default that of the model.
        device: auto, cpu or cuda.
        dtype: precision of the weights.
        output: .json file for the record.
    """
    check_output(output)
    from ..layers.contract import suggest
    from ..models.reading import tokenizer_fingerprint
    from .data.tasks import TASKS, make_task
    from .data.text_tasks import TEXT_TASKS, make_text_task
    from .data.tokenizers import load_tokenizer
    from .task_evaluation import at_lengths, recall_on_task, recall_on_text_task

    if task not in TASKS and task not in TEXT_TASKS:
        raise ValueError(f"task {task!r} is unknown. {suggest(task, [*TASKS, *TEXT_TASKS])}")
    if not lengths:
        raise ValueError("lengths is empty. Give at least one, for example [128, 512].")
    described: dict[str, Any] = {"type": task, **(settings or {})}
    common: dict[str, Any] = {
        "num_examples": num_examples,
        "chunk_size": chunk_size,
        "num_depths": num_depths,
        "seed": seed,
    }
    record = {"model": model, "task": described, "lengths": list(lengths), **common, "dtype": dtype}
    progress = progress_line("examples")
    if task in TEXT_TASKS:
        in_english = make_text_task(described, seq_len=lengths[0])
        at_lengths(in_english, lengths)
        place = model_place(model)
        words = load_tokenizer(tokenizer or place)
        record |= {"tokenizer": tokenizer_fingerprint(words)}
        loaded = load_for_use(place, device, dtype)
        results = recall_on_text_task(loaded, words, in_english, lengths, **common, on_example=progress)
    else:
        of_tokens = make_task(described, seq_len=lengths[0])
        at_lengths(of_tokens, lengths)
        loaded = load_for_use(model, device, dtype)
        record |= {"batch_size": batch_size}
        results = recall_on_task(
            loaded, of_tokens, lengths, **common, batch_size=batch_size, on_example=progress
        )
    record |= {"device": str(loaded.embed_tokens.weight.device)}
    write_if_asked(output, "evaluate/task", record, results)
    return _report(results)


def _report(results: dict[str, Any]) -> str:
    """Length and depth against the figures, and what a reader without memory would score."""
    rows = [("length", "depth", "accuracy", "all right", "loss", "examples")]
    for at_length in results["lengths"]:
        for part in (*at_length["by_depth"], at_length):
            depth = f"{part['first']:.2f}..{part['end']:.2f}" if "first" in part else "all"
            rows.append(
                (
                    str(at_length["length"]),
                    depth,
                    _with_error(part, "accuracy"),
                    _with_error(part, "exact_match"),
                    f"{part['loss']:.3f}",
                    str(part["num_examples"]),
                )
            )
    text = table(rows)
    if "chance" in results:
        text += f"\n\nchance is {results['chance']:.4f}"
    return text


def _with_error(part: dict[str, Any], name: str) -> str:
    error = part[f"{name}_standard_error"]
    return f"{part[name]:.3f}" + ("" if error is None else f" +- {error:.3f}")
