"""From a pretrained model to a hybrid, with the control that says whether its memory earns its place.

    hybrid     the recipe: surgery, then its stages
    control    window and sinks instead of the new mixer, the same text in the same order, as many trainable
               numbers, all of it spent on the recipe's last end-to-end stage
    ablation   the new mixer without its alignment: all steps are that end-to-end stage

Every row is measured on the same windows of the same books.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from ...models.conversion import ConversionPlan, check_parity, convert_mixers, memory_off
from ...models.decoder import MemoryLM
from ..data.documents import encode_documents
from ..data.texts import load_text
from .comparison import UNALIGNED_ROW, Row
from .data import batches_digest, read_batches
from .folder import as_json, begin, note_run
from .recipe import ConversionRecipe, control_plan, shown_recipe
from .recipe_stage import Stage
from .stage import Segment, SegmentBatches, StageFacts, StageSettings, trained_names
from .teacher import weights_digest
from .updates import lora_size
from .workshop import Conversion, Run, Workshop, count_trained

# of the comparison: tokens per window, and the token of each book at which the first window starts
WINDOW_SIZE = 1024
FIRST_TOKEN = 8192

CONTROL_ROW = "control: window + sinks, same budget"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is trained and measured beside the hybrid.

    Attributes:
        control: train the control.
        ablations: also measure the hybrid after each stage, and train it without its alignment.
        num_windows, window_size, first_token: windows of each book, from `first_token` on.
    """

    control: bool = True
    ablations: bool = False
    num_windows: int = 8
    window_size: int = WINDOW_SIZE
    first_token: int = FIRST_TOKEN


def convert_and_compare(
    teacher: MemoryLM,
    tokenizer: str,
    recipe: ConversionRecipe,
    folder: Path,
    *,
    tokens: Mapping[str, Tensor],
    comparison: Comparison | None = None,
    settings: StageSettings | None = None,
    cache: Path | None = None,
    guide: MemoryLM | None = None,
    on_trained: Callable[[str, Conversion], None] = lambda name, conversion: None,
) -> tuple[list[Row], dict[str, Conversion]]:
    """Converts by a recipe and measures teacher, windows, hybrid, ablations and control.

    Args:
        teacher: the pretrained model (float32 or bfloat16); it is not changed.
        tokenizer: folder or .gguf file of the tokenizer.
        recipe: what to do.
        folder: for the results; a conversion with the same settings that was cut short there goes on.
        tokens: book -> (L,) ids.
        comparison: what is measured beside the hybrid.
        settings: how stages are run.
        cache: folder that keeps what the teacher read for other conversions; None keeps it until the end.
        guide: a larger model with the same tokenizer, whose distribution end-to-end stages learn; None takes
            the teacher.
        on_trained: called with the name of a run ("hybrid", "control", "unaligned") and its result as soon as
            it is trained, again after a restart.

    Returns:
        the rows in the order of the table, and the conversions by the name of their run.

    Raises:
        ValueError: a target or layers that do not fit the teacher, text too short for one window, or another
            conversion in the folder.
    """
    wanted = comparison or Comparison()
    windows = {name: value for name, value in asdict(wanted).items() if name not in ("control", "ablations")}
    shop = Workshop(
        folder,
        teacher,
        tokenizer,
        recipe,
        tokens=tokens,
        windows=windows,
        settings=settings or StageSettings(),
        cache=cache,
        guide=guide,
    )
    text = segments(recipe)
    begin(
        folder,
        {
            "recipe": shown_recipe(recipe),
            "source": weights_digest(teacher),
            "guide": None if guide is None else weights_digest(guide),
            "text": batches_digest(SegmentBatches(text, shop.sources)),
            "threads": torch.get_num_threads(),
        },
    )
    hybrid_stages = tuple((stage, (part,)) for stage, part in zip(recipe.all_stages, text, strict=True))
    shop.num_parts = count_parts(recipe, wanted)
    plan = shop.choose_layers([pair for pair in hybrid_stages if pair[0].is_alignment])
    memoryless = {count: _with_layers(control_plan(recipe, count), plan) for count in (0, None)}
    window = memoryless[None].target
    size, sinks = window["window_size"], window.get("num_sinks", 0)

    shop.measure("teacher, full attention", lambda: teacher)
    shop.measure(f"window {size}", lambda: shop.untrained(memoryless[0]))
    if sinks:
        shop.measure(f"window {size} + {sinks} sinks", lambda: shop.untrained(memoryless[None]))
    shop.measure("hybrid before training", lambda: shop.untrained(plan))

    conversions: dict[str, Conversion] = {}

    def after_stage(name: str, student: MemoryLM, done: list[StageFacts]) -> None:
        if wanted.ablations and len(done) < len(hybrid_stages):
            shop.measure(f"hybrid after {name}", lambda: student, count_trained(done))

    def train(run: Run, on_stage: Any = lambda *_: None) -> Conversion:
        found = conversions[run.name] = shop.train(run, on_stage)
        note_run(folder, run.name, run_facts(found))
        on_trained(run.name, found)
        return found

    hybrid = train(Run("hybrid", plan, hybrid_stages), after_stage)
    shop.measure("hybrid", lambda: hybrid.model, hybrid.num_trained)
    branch_off = partial(memory_off, layers=hybrid.report.layers)
    shop.measure("hybrid, memory branch off", lambda: hybrid.model, hybrid.num_trained, branch_off)
    last = recipe.last_end_to_end
    if wanted.ablations and last is not None and len(hybrid_stages) > 1:
        merged = merged_stage(recipe, last, "end-to-end")
        unaligned = train(Run("unaligned", plan, ((merged, tuple(text)),)))
        shop.measure(UNALIGNED_ROW, lambda: unaligned.model, unaligned.num_trained)
    if wanted.control and last is not None:
        stage = control_stage(recipe, last, hybrid, shop.untrained(memoryless[None]))
        control = train(Run("control", memoryless[None], ((stage, tuple(text)),)))
        shop.measure(CONTROL_ROW, lambda: control.model, control.num_trained)
    return shop.rows, conversions


def count_parts(recipe: ConversionRecipe, comparison: Comparison) -> int:
    """Stages and rows of a conversion."""
    stages, last = recipe.all_stages, recipe.last_end_to_end
    rows = 5 + bool(control_plan(recipe).target.get("num_sinks", 0))  # teacher, windows, before, hybrid, off
    selection = sum(stage.is_alignment for stage in stages) if recipe.plan.is_measured else 0
    control = 2 if comparison.control and last is not None else 0
    ablations = 0
    if comparison.ablations:
        ablations = len(stages) - 1 + (2 if last is not None and len(stages) > 1 else 0)
    return rows + len(stages) + selection + control + ablations


def surgery_report(teacher: MemoryLM, tokenizer: str, recipe: ConversionRecipe) -> str:
    """What the surgery of a recipe takes over and whether the parity checks pass; nothing is trained.

    Where the blocks are chosen by a measurement, all of them are converted.

    Raises:
        ValueError: a parity check failed; the message names those that did.
    """
    stage = recipe.all_stages[0]
    batches = read_batches(
        recipe.data, tokenizer=tokenizer, seq_len=stage.seq_len, batch_size=1, seed=recipe.seed
    )
    seed_everything(recipe.seed, verbose=False)
    tokens = batches.batch(0, 0).input_ids[:1]
    student, report = convert_mixers(teacher, recipe.plan, tokens)
    check_parity(teacher, student, report, tokens)
    report.raise_on_failure()
    return report.summary()


def segments(recipe: ConversionRecipe) -> list[Segment]:
    """The text of each stage; stages with batches of equal size go on where the one before stopped."""
    read: dict[tuple[int, int], int] = {}
    found = []
    for stage in recipe.all_stages:
        size = (stage.seq_len, stage.batch_size)
        count = stage.steps * stage.accumulate
        found.append(Segment(*size, first=read.get(size, 0), num_batches=count))
        read[size] = read.get(size, 0) + count
    return found


def merged_stage(recipe: ConversionRecipe, last: Stage, name: str) -> Stage:
    """One end-to-end stage over all batches of a recipe, as large as those of its last one.

    The number of batches is that of the recipe; a last step may be smaller where stages accumulate
    differently.
    """
    num_batches = sum(part.num_batches for part in segments(recipe))
    return replace(last, name=name, steps=-(-num_batches // last.accumulate))


def control_stage(recipe: ConversionRecipe, last: Stage, hybrid: Conversion, window: MemoryLM) -> Stage:
    """The training of the control: all steps of the recipe, as many trainable numbers as the hybrid had.

    Where the hybrid trained whole mixers or everything, so does the control; else it gets low-rank updates of
    the rank that comes nearest.
    """
    kinds = {stage.train for stage in recipe.all_stages if stage.steps}
    stage = replace(
        merged_stage(recipe, last, "tune"),
        loss={name: weight for name, weight in last.loss.items() if name != "capacity"},
        budget=None,
        window_dropout=0.0,
        sizes={},
        new_lr_scale=0.0,
    )
    if "all" in kinds:
        return replace(stage, train="all")
    per_rank = lora_size(window, last.lora_targets)
    rank = max(1, round(hybrid.num_trained / per_rank)) if per_rank else 0
    inside = replace(stage, train="mixers")
    layers = hybrid.report.layers
    num_inside = sum(
        parameter.numel()
        for name, parameter in window.named_parameters()
        if name in set(trained_names(inside, window, layers, []))
    )
    if not per_rank or rank * per_rank >= num_inside:  # updates as large as what they update
        return inside
    return replace(stage, train="lora", lora_rank=rank)


def run_facts(conversion: Conversion) -> dict[str, Any]:
    """What a run did, as plain data: its stages with first and last losses, and what its mixers became."""
    return {
        "converted_layers": conversion.report.layers,
        "num_trained": conversion.num_trained,
        "num_tokens": conversion.num_tokens,
        "stages": [
            {
                "name": facts.name,
                "steps": facts.steps,
                "num_tokens": facts.num_tokens,
                "num_trained": sum(facts.trained.values()) + facts.num_low_rank,
                "seconds": facts.seconds,
                "first": {name: values[0] for name, values in facts.history.items() if values},
                "last": {name: values[-1] for name, values in facts.history.items() if values},
            }
            for facts in conversion.stages
        ],
        "layer_errors": {
            "before": as_json(conversion.report.layer_errors),
            "after": as_json(conversion.layer_errors),
        },
        "window_shares": as_json(conversion.window_shares),
    }


def check_accelerator(name: str) -> None:
    """Raises ValueError for an accelerator that Lightning does not know or this machine does not have."""
    try:
        Trainer(
            accelerator=name,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
    except (ValueError, MisconfigurationException) as error:
        raise ValueError(f"accelerator {name!r} cannot be used: {error} Use auto or cpu.") from error


def training_results(conversions: Mapping[str, Conversion]) -> dict[str, Any]:
    """Seconds of each stage, tokens read and what the mixers became, for a record."""
    return {
        "stage_seconds": {name: found.seconds for name, found in conversions.items()},
        "tokens_read": {name: found.num_tokens for name, found in conversions.items()},
        "runs": {name: run_facts(found) for name, found in conversions.items()},
    }


def book_tokens(tokenizer: Any, name: str) -> Tensor:
    """Ids (L,) of the first document of a bundled text."""
    (ids,) = encode_documents(tokenizer, [load_text(name)[0].text])
    return torch.from_numpy(ids)


def _with_layers(plan: ConversionPlan, chosen: ConversionPlan) -> ConversionPlan:
    return replace(plan, layers=chosen.layers)
