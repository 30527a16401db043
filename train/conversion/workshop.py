"""Where a conversion happens: one folder in which runs are trained and rows measured, each only once.

    FOLDER/work/stages/RUN-STAGE/    weights that a stage left
    FOLDER/work/rows/ROW/            losses of a measured row
    FOLDER/work/teacher/             what the teacher read

A conversion that was killed goes on in the same folder, with the same bits as one that was not. What is
damaged there is done again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from ...layers.contract import probe
from ...models.checkpoints.errors import CheckpointError
from ...models.checkpoints.files import read_json, write_folder, write_json
from ...models.checkpoints.safetensors_files import read_safetensors, write_safetensors_in_place
from ...models.conversion import (
    ConversionPlan,
    LayerSelection,
    ParityReport,
    check_parity,
    convert_mixers,
    layer_errors,
    other_mixers,
    select_layers,
)
from ...models.decoder import MemoryLM
from ..data.batches import BatchSource
from ..data.tokenizers import load_tokenizer
from ..evaluate import PositionLosses, position_losses
from ..task_evaluation import recall_on_text_task
from .comparison import Row
from .data import read_batches
from .recipe import ConversionRecipe, recall_task
from .recipe_stage import Stage
from .stage import Segment, StageFacts, StageSettings, run_stage, verified
from .teacher import TeacherReadings, weights_digest
from .updates import linear_layers

logger = logging.getLogger(__name__)

LOSSES_NAME = "losses.safetensors"
ROW_NAME = "row.json"


@dataclass
class Conversion:
    """A converted model with what is known about it.

    Attributes:
        model: the hybrid, in the dtype of its source.
        report: what the surgery did and its parity checks.
        stages: what each stage did.
        layer_errors: error of each new mixer on the teacher's states after training (before it: in `report`).
        window_shares: share of the softmax in each mixer that joins window and memory, after training.
    """

    model: MemoryLM
    report: ParityReport
    stages: list[StageFacts]
    layer_errors: dict[int, float] = field(default_factory=dict)
    window_shares: dict[int, float] = field(default_factory=dict)

    @property
    def num_trained(self) -> int:
        """Numbers that were trained in any stage."""
        return count_trained(self.stages)

    @property
    def num_tokens(self) -> int:
        """Tokens of training text read."""
        return sum(facts.num_tokens for facts in self.stages)

    @property
    def seconds(self) -> dict[str, float]:
        """Duration of each stage; runs share what the teacher made of the text."""
        return {facts.name: facts.seconds for facts in self.stages}


def count_trained(stages: Sequence[StageFacts]) -> int:
    """Numbers that were trained in any of these stages; those trained twice count once."""
    trained: dict[str, int] = {}
    for facts in stages:
        if facts.steps:
            trained |= facts.trained
    return sum(trained.values()) + sum(facts.num_low_rank for facts in stages if facts.steps)


@dataclass(frozen=True)
class Run:
    """One training: a plan and the stages it goes through.

    Attributes:
        name: of its files and rows.
        plan: what is converted.
        stages: each with the text it reads.
    """

    name: str
    plan: ConversionPlan
    stages: tuple[tuple[Stage, tuple[Segment, ...]], ...]


class Workshop:
    """Trains runs and measures rows in a folder; what is there already is taken from there.

    Args:
        folder: for the results.
        teacher: the pretrained model (float32 or bfloat16); it is not changed.
        tokenizer: folder or .gguf file of its tokenizer.
        recipe: texts and seed.
        tokens: book -> (L,) ids, for the rows.
        windows: arguments of `position_losses`: num_windows, window_size, first_token.
        settings: how stages are run.
        cache: folder for what the teacher reads; None takes one inside `folder`.
        guide: the model whose distribution end-to-end stages learn; None takes the teacher.

    Attributes:
        num_parts: stages and rows of the whole conversion, for the progress lines.
    """

    def __init__(
        self,
        folder: Path,
        teacher: MemoryLM,
        tokenizer: str,
        recipe: ConversionRecipe,
        *,
        tokens: Mapping[str, Tensor],
        windows: Mapping[str, int],
        settings: StageSettings,
        cache: Path | None = None,
        guide: MemoryLM | None = None,
    ) -> None:
        self.folder, self.work = folder, folder / "work"
        self.teacher, self.tokenizer, self.recipe = teacher, tokenizer, recipe
        self.tokens, self.windows, self.settings = tokens, windows, settings
        self.low_teacher = copy.deepcopy(teacher).to(torch.bfloat16)
        self.low_guide = self.low_teacher if guide is None else copy.deepcopy(guide).to(torch.bfloat16)
        self.readings = TeacherReadings(cache or self.work / "teacher", weights_digest(self.low_guide))
        self.rows: list[Row] = []
        self.num_parts = 0
        self._num_begun = 0
        self._sources: dict[tuple[int, int], BatchSource] = {}

    @property
    def device(self) -> torch.device:
        """Where rows are measured: where the stages train."""
        is_cpu = self.settings.accelerator == "cpu" or not torch.cuda.is_available()
        return torch.device("cpu" if is_cpu else "cuda")

    def sources(self, seq_len: int, batch_size: int) -> BatchSource:
        """All batches of one size, in the order of the seed."""
        key = (seq_len, batch_size)
        if key not in self._sources:
            self._sources[key] = read_batches(
                self.recipe.data,
                tokenizer=self.tokenizer,
                seq_len=seq_len,
                batch_size=batch_size,
                seed=self.recipe.seed,
            )
        return self._sources[key]

    def first_window(self) -> Tensor:
        """(1, T) ids of the first window of training."""
        stage = self.recipe.all_stages[0]
        return self.sources(stage.seq_len, stage.batch_size).batch(0, 0).input_ids[:1]

    def untrained(self, plan: ConversionPlan) -> MemoryLM:
        """The model right after the surgery, the same at every call."""
        seed_everything(self.recipe.seed, verbose=False)
        return convert_mixers(self.teacher, plan, self.first_window())[0]

    def train(
        self, run: Run, on_stage: Callable[[str, MemoryLM, list[StageFacts]], None] = lambda *_: None
    ) -> Conversion:
        """Surgery, parity checks and all stages of a run.

        Args:
            on_stage: called with the name of each stage as it ends, the student and what was done so far.

        Raises:
            ValueError: a plan or text that does not fit, or a failed parity check.
        """
        seed_everything(self.recipe.seed, verbose=False)
        student, report = convert_mixers(self.teacher, run.plan, self.first_window())
        check_parity(self.teacher, student, report, self.first_window())
        report.raise_on_failure()
        student = student.to(torch.bfloat16)
        done: list[StageFacts] = []
        for number, (stage, segments) in enumerate(run.stages):
            facts = run_stage(
                stage,
                student,
                self.low_teacher if stage.is_alignment else self.low_guide,
                layers=report.layers,
                fresh=list(report.new_parameters),
                segments=segments,
                sources=self.sources,
                folder=self.work / "stages" / f"{run.name}-{number + 1}-{stage.name}",
                seed=self.recipe.seed + 1 + number,
                readings=self.readings,
                settings=self.settings,
                label=self._label(f"{run.name}: {stage.name}"),
            )
            done.append(facts)
            on_stage(stage.name, student, done)
        model = self._joined(run, student, done)
        found = Conversion(model, report, done)
        with torch.no_grad():
            found.layer_errors = layer_errors(self.teacher, model, report.layers, self.first_window())
            found.window_shares = window_shares(model, self.first_window())
        return found

    def _joined(self, run: Run, student: MemoryLM, done: Sequence[StageFacts]) -> MemoryLM:
        """The model right after the surgery with what was trained: the rest never went through bfloat16."""
        trained = {name for facts in done if facts.steps for name in facts.trained}
        for stage, _ in run.stages:
            if stage.train == "lora" and stage.steps:
                trained |= {f"{name}.weight" for name, _ in linear_layers(student, stage.lora_targets)}
        model = self.untrained(run.plan)
        weights = student.state_dict()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in trained:
                    parameter.copy_(weights[name])
        return model

    def measure(
        self,
        name: str,
        model: Callable[[], MemoryLM],
        num_trained: int = 0,
        switched: Callable[[MemoryLM], AbstractContextManager[None]] = lambda model: nullcontext(),
    ) -> Row:
        """Losses of a model on the windows of all books, in bfloat16; measured once and kept.

        Args:
            name: of the row.
            model: makes the model; called only when it has to be measured.
            num_trained: trainable numbers that were tuned.
            switched: what to do to the model meanwhile, for example `memory_off`.
        """
        asked = self.recipe.recall
        digest = hashlib.sha256(json.dumps([name, dict(self.windows)]).encode())
        if asked is not None:
            digest.update(json.dumps(dict(asked)).encode())
        for book, ids in self.tokens.items():
            digest.update(book.encode() + ids.numpy().tobytes())
        plain, label = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-"), self._label(name)
        folder = self.work / "rows" / f"{plain}-{digest.hexdigest()[:12]}"
        made = model()
        found = _read_row(folder)
        if found is None:
            low = copy.deepcopy(made).to(self.device, torch.bfloat16).eval()
            with switched(low):
                found = self._losses(label, low), None if asked is None else self._recall(label, low)
            _write_row(folder, *found)
        losses, recall = found
        row = Row(name, made.config, losses, num_trained, recall)
        self.rows.append(row)
        if losses:
            logger.info("%s: perplexity %s", name, {b: round(x.perplexity, 2) for b, x in losses.items()})
        return row

    def choose_layers(self, stages: Sequence[tuple[Stage, tuple[Segment, ...]]]) -> ConversionPlan:
        """The recipe's plan with its blocks settled; a measured choice aligns all blocks first.

        Args:
            stages: the alignment stages of the recipe with their text.
        """
        plan = self.recipe.plan
        if not isinstance(plan.layers, LayerSelection):
            return plan
        depth = self.teacher.config.depth
        if not plan.is_measured:
            return ConversionPlan(target=plan.target, layers=plan.converted_layers(depth), gqa=plan.gqa)
        path = self.work / "selection.json"
        kept = _read_kept(path, depth)
        if kept is None:
            everything = ConversionPlan(target=plan.target, gqa=plan.gqa)
            aligned = self.train(Run("selection", everything, tuple(stages)))
            scores = layer_scores(self.teacher, aligned.model, self.first_window(), plan.layers.method)
            kept = select_layers(plan.layers, depth, scores)
            write_json(path, {"kept": kept, "scores": {str(k): v for k, v in scores.items()}})
        layers = [index for index in range(depth) if index not in kept]
        return ConversionPlan(target=plan.target, layers=layers, gqa=plan.gqa)

    def _label(self, name: str) -> str:
        """The name of the next part with its number, for a progress line."""
        self._num_begun += 1
        return f"[{self._num_begun}/{self.num_parts}] {name}" if self.num_parts else name

    def _losses(self, name: str, model: MemoryLM) -> dict[str, PositionLosses]:
        total = self.windows["num_windows"] * len(self.tokens)
        losses = {}
        with tqdm(
            desc=name, unit="window", total=total, disable=not (self.settings.progress and total), leave=False
        ) as line:
            for book, ids in self.tokens.items():
                losses[book] = position_losses(
                    model, ids, **self.windows, on_window=lambda done, total: line.update()
                )
        return losses

    def _recall(self, name: str, model: MemoryLM) -> dict[str, Any]:
        """What the model recalls of what the recipe asks."""
        assert self.recipe.recall is not None
        task, num_examples = recall_task(self.recipe.recall)
        with tqdm(
            desc=name, unit="context", total=num_examples, disable=not self.settings.progress, leave=False
        ) as line:
            found = recall_on_text_task(
                model,
                load_tokenizer(self.tokenizer),
                task,
                [task.seq_len],
                num_examples=num_examples,
                on_example=lambda done, total: line.update(),
            )
        recall: dict[str, Any] = found["lengths"][0]
        return recall


def layer_scores(
    teacher: MemoryLM, student: MemoryLM, tokens: Tensor, method: str = "loss"
) -> dict[int, float]:
    """How much is lost in each block that is converted, for `select_layers`.

    Args:
        teacher: the source.
        student: all blocks converted and aligned, same dtype.
        tokens: (B, T) ids.
        method: "mse", the relative squared error of the mixer on the teacher's states; or "loss", the rise of
            the next-token loss, in nats, when this block alone is converted.

    Returns:
        block -> score.
    """
    with torch.no_grad():
        layers = range(teacher.config.depth)
        if method == "mse":
            return layer_errors(teacher, student, layers, tokens)
        base = _next_token_loss(teacher, tokens)
        scores = {}
        for index in layers:
            with other_mixers(teacher, student, [index]):
                scores[index] = _next_token_loss(teacher, tokens) - base
        return scores


@torch.no_grad()
def window_shares(model: MemoryLM, tokens: Tensor) -> dict[int, float]:
    """Share of the softmax over the window in the weights of each mixer that also reads a memory.

    Args:
        tokens: (B, T) ids.

    Returns:
        block -> mean over tokens, heads and rows; only blocks that record a `window_share`.
    """
    shares = {}
    hidden = model.embed(tokens)
    for index, block in enumerate(model.blocks):
        with probe() as seen:
            mixed = block.mixer(block.mixer_input(hidden)).hidden
        if "window_share" in seen:
            shares[index] = float(
                torch.stack([share.float().mean() for share in seen["window_share"]]).mean()
            )
        hidden = block.after_mixer(hidden, mixed)
    return shares


def _next_token_loss(model: MemoryLM, tokens: Tensor) -> float:
    logits = model(tokens).logits[:, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def _read_kept(path: Path, depth: int) -> list[int] | None:
    """The blocks that were chosen; None where they were not, or the file is damaged."""
    if not path.is_file():
        return None
    try:
        kept = read_json(path).get("kept")
    except CheckpointError:
        kept = None
    if isinstance(kept, list) and set(kept) <= set(range(depth)):
        return kept
    logger.warning("%s cannot be used; the blocks are chosen again", path)
    return None


def _write_row(folder: Path, losses: Mapping[str, PositionLosses], recall: dict[str, Any] | None) -> None:
    tensors = {book: found.losses.contiguous() for book, found in losses.items()}
    facts = {
        "books": {
            book: {"starts": list(found.starts), "seconds": found.seconds} for book, found in losses.items()
        },
        "recall": recall,
    }
    write_folder(
        folder,
        {
            LOSSES_NAME: lambda path: write_safetensors_in_place(path, tensors),
            ROW_NAME: lambda path: _write_plain(path, facts),
        },
        extra={"kind": "conversion_row"},
    )


def _read_row(folder: Path) -> tuple[dict[str, PositionLosses], dict[str, Any] | None] | None:
    """None where the row has not been measured, or its files are damaged."""
    if not verified(folder):
        return None
    facts: dict[str, Any] = read_json(folder / ROW_NAME)
    tensors = read_safetensors(folder / LOSSES_NAME)
    losses = {
        book: PositionLosses(tensors[book], tuple(entry["starts"]), entry["seconds"])
        for book, entry in facts["books"].items()
    }
    return losses, facts["recall"]


def _write_plain(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
