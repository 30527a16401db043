"""Evaluation on synthetic tasks: how much of what it has read a model recalls, by length and by depth.

Texts are read in chunks with the state carried from one to the next, and only the questions go through the
head, so that the memory needed does not grow with the length beyond what the state itself takes.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.decoder import MemoryLM
from .data.mqar import IGNORE_INDEX
from .data.tasks import Task, TaskExamples, split_rng
from .data.tasks.base import NO_EVIDENCE
from .data.text_tasks import TextTask
from .evaluate import DEFAULT_CHUNK, LOSS_CHUNK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Dimensions: N examples, L tokens of an example, V vocabulary, A answer tokens of all examples

Config = TypeVar("Config", Task, TextTask)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Answers:
    """What became of each token that was asked for.

    Attributes:
        example: (A,) int64, the example it belongs to.
        is_right: (A,) bool, whether it was the most likely token.
        loss: (A,) float32, its cross-entropy in nats.
        depth: (A,) float64, where its evidence stands, as a share of the text.
    """

    example: Tensor
    is_right: Tensor
    loss: Tensor
    depth: Tensor

    @classmethod
    def join(cls, parts: Sequence[Answers]) -> Answers:
        """The answers of several batches."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def summary(self, num_depths: int) -> dict[str, Any]:
        """Figures over the examples, each of which counts once.

        Args:
            num_depths: buckets of equal width into which the depths are put.

        Returns:
            ``accuracy`` (mean over examples of the share of answer tokens that are right), ``exact_match``
            (share of examples without a wrong token), both with their standard errors, ``loss``, and
            ``by_depth``, the same per bucket that holds evidence.
        """
        bucket = (self.depth * num_depths).long().clamp(0, num_depths - 1)
        by_depth = []
        for number in range(num_depths):
            inside = bucket == number
            if bool(inside.any()):
                ends = {"first": number / num_depths, "end": (number + 1) / num_depths}
                by_depth.append(ends | self._figures(inside))
        everything = torch.ones_like(self.is_right)
        return {**self._figures(everything), "by_depth": by_depth}

    def _figures(self, chosen: Tensor) -> dict[str, Any]:
        """Figures of the chosen answers; examples without any do not count."""
        _, example = self.example[chosen].unique(return_inverse=True)
        num_examples = int(example.max()) + 1
        count = torch.bincount(example).double()
        share = torch.bincount(example, self.is_right[chosen].double()) / count
        loss = torch.bincount(example, self.loss[chosen].double()) / count
        accuracy, accuracy_error = _mean_with_error(share)
        exact, exact_error = _mean_with_error((share == 1).double())
        return {
            "num_examples": num_examples,
            "accuracy": accuracy,
            "accuracy_standard_error": accuracy_error,
            "exact_match": exact,
            "exact_match_standard_error": exact_error,
            "loss": float(loss.mean()),
        }


@torch.no_grad()
def answer_tokens(
    model: MemoryLM, examples: TaskExamples, *, chunk_size: int = DEFAULT_CHUNK, first_example: int = 0
) -> Answers:
    """Let a model read examples, and compare its predictions with the answers.

    Args:
        model: the model, in evaluation mode.
        examples: what is read and asked; every answer is given to the model before the next is asked.
        chunk_size: tokens per call of the model; the state is carried from call to call.
        first_example: number of the first example.
    """
    device = model.embed_tokens.weight.device
    length = examples.inputs.shape[1]
    asked = examples.labels != IGNORE_INDEX  # (N, L)
    is_right = torch.zeros_like(asked)
    losses = torch.zeros(asked.shape)
    last_asked = int(asked.any(0).nonzero().max())
    state = None
    for low in range(0, last_asked + 1, chunk_size):
        high = min(low + chunk_size, length)
        out = model(
            examples.inputs[:, low:high].to(device),
            state,
            return_state=high <= last_asked,
            return_hidden_states="last",
            last_only=True,
        )
        state = out.state
        here = asked[:, low:high]
        if not bool(here.any()):
            continue
        assert out.hidden_states is not None
        hidden = out.hidden_states[0][here.to(device)]
        targets = examples.labels[:, low:high][here]
        found = []
        for part, wanted in zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True):
            logits = model.head(part).float().cpu()
            found.append((logits.argmax(-1) == wanted, F.cross_entropy(logits, wanted, reduction="none")))
        is_right[:, low:high][here] = torch.cat([right for right, _ in found])
        losses[:, low:high][here] = torch.cat([loss for _, loss in found])
    example, _ = asked.nonzero(as_tuple=True)
    return Answers(
        example + first_example, is_right[asked], losses[asked], examples.evidence[asked].double() / length
    )


def recall_on_task(
    model: MemoryLM,
    config: Task,
    lengths: Sequence[int],
    *,
    num_examples: int = 200,
    batch_size: int = 50,
    chunk_size: int = DEFAULT_CHUNK,
    num_depths: int = 4,
    seed: int = 0,
    on_example: Progress | None = None,
) -> dict[str, Any]:
    """Recall of a model on a synthetic task, at each of some lengths.

    Args:
        model: the model; it is put into evaluation mode for the call.
        config: the task; its own length does not count.
        lengths: tokens per example.
        num_examples: examples of each length. They depend on the seed, the length and their number only.
        batch_size: examples read at once; changes no number.
        chunk_size: tokens read at once; changes no number.
        num_depths: buckets of the figures by depth.
        seed: seed of the examples; no training meets them, whatever its seed.
        on_example: called with (examples done, examples in all), for a progress line.

    Returns:
        plain data for a record: ``chance``, and under ``lengths`` one entry per length, see
        `Answers.summary`; with the bytes of the state of one example at its end, and tokens per second.

    Raises:
        ValueError: a length at which the task is not possible, or a model with too small a vocabulary.
    """
    _check_counts(
        num_examples=num_examples, batch_size=batch_size, chunk_size=chunk_size, num_depths=num_depths
    )
    tasks = at_lengths(config, lengths)
    if config.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the task has {config.vocab_size} tokens, the model {model.config.vocab_size}. "
            "Evaluate with the settings of training."
        )

    def batches(task: Task) -> Iterator[tuple[int, TaskExamples]]:
        for start in range(0, num_examples, batch_size):
            numbers = range(start, min(start + batch_size, num_examples))
            drawn = [
                task.examples(split_rng(seed, "evaluate", task.seq_len, number), 1) for number in numbers
            ]
            names = [field.name for field in dataclasses.fields(TaskExamples)]
            yield start, TaskExamples(*(torch.cat([getattr(one, name) for one in drawn]) for name in names))

    rows = _measure(model, tasks, batches, num_examples, chunk_size, num_depths, on_example)
    return {"chance": config.chance, "lengths": rows}


def recall_on_text_task(
    model: MemoryLM,
    tokenizer: PreTrainedTokenizerFast,
    config: TextTask,
    lengths: Sequence[int],
    *,
    num_examples: int = 50,
    chunk_size: int = DEFAULT_CHUNK,
    num_depths: int = 4,
    seed: int = 0,
    on_example: Progress | None = None,
) -> dict[str, Any]:
    """Recall of a pretrained model on a task in English, at each of some lengths.

    A context is right when every token of every answer is the most likely one after all before it.

    Args:
        model: the model; it is put into evaluation mode for the call.
        tokenizer: its tokenizer.
        config: the task; its own length does not count.
        lengths: tokens per context.
        num_examples: contexts of each length, read one by one; as in `recall_on_task`.
        chunk_size, num_depths, seed, on_example: as in `recall_on_task`.

    Returns:
        as `recall_on_task`, without ``chance``.

    Raises:
        ValueError: a length at which the task is not possible, or a model with too small a vocabulary.
    """
    _check_counts(num_examples=num_examples, chunk_size=chunk_size, num_depths=num_depths)
    tasks = at_lengths(config, lengths)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}. "
            "Give the tokenizer of the model."
        )
    for task in tasks:  # a context that is too short is found before the first is read
        text_example(task, tokenizer, seed=seed, number=0)

    def batches(task: TextTask) -> Iterator[tuple[int, TaskExamples]]:
        for number in range(num_examples):
            yield number, text_example(task, tokenizer, seed=seed, number=number)

    return {"lengths": _measure(model, tasks, batches, num_examples, chunk_size, num_depths, on_example)}


def text_example(
    task: TextTask, tokenizer: PreTrainedTokenizerFast, *, seed: int, number: int
) -> TaskExamples:
    """One context of an evaluation as inputs and labels (1, L), the last token of its answer left out."""
    drawn = task.examples(tokenizer, split_rng(seed, "evaluate", task.seq_len, number), 1)
    ids = drawn.ids[0]
    inputs = ids[None, :-1]
    labels = torch.full_like(inputs, IGNORE_INDEX)
    evidence = torch.full_like(inputs, NO_EVIDENCE)
    for (first, end), source in zip(drawn.answers[0], drawn.evidence[0], strict=True):
        labels[0, first - 1 : end - 1] = ids[first:end]
        evidence[0, first - 1 : end - 1] = source
    return TaskExamples(inputs, labels, evidence)


def _measure(
    model: MemoryLM,
    tasks: Sequence[Config],
    batches: Callable[[Config], Iterator[tuple[int, TaskExamples]]],
    num_examples: int,
    chunk_size: int,
    num_depths: int,
    on_example: Progress | None,
) -> list[dict[str, Any]]:
    """One row of figures per task."""
    dtype = model.embed_tokens.weight.dtype
    was_training = model.training
    model.eval()
    rows = []
    try:
        for place, task in enumerate(tasks):
            parts, seconds, num_tokens = [], 0.0, 0
            for first, examples in batches(task):
                clock = time.monotonic()
                parts.append(answer_tokens(model, examples, chunk_size=chunk_size, first_example=first))
                seconds += time.monotonic() - clock
                num_tokens += examples.inputs.numel()
                if on_example is not None:
                    done = place * num_examples + first + len(examples.inputs)
                    on_example(done, len(tasks) * num_examples)
            rows.append(
                {"length": task.seq_len}
                | Answers.join(parts).summary(num_depths)
                | {
                    "state_num_bytes": model.state_num_bytes(task.seq_len, 1, dtype),
                    "tokens_per_second": num_tokens / max(seconds, 1e-9),
                }
            )
    finally:
        model.train(was_training)
    return rows


def at_lengths(config: Config, lengths: Sequence[int]) -> list[Config]:
    """The same task at several lengths.

    Raises:
        ValueError: no length, or one at which the task is not possible; the message names it.
    """
    if not lengths:
        raise ValueError("there is no length. Give at least one, for example [128, 512].")
    made = []
    for length in lengths:
        try:
            made.append(dataclasses.replace(config, seq_len=length))
        except ValueError as error:
            raise ValueError(f"at length {length}: {error}") from None
    return made


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")


def _mean_with_error(values: Tensor) -> tuple[float, float | None]:
    """Mean and its standard error; the latter is None for a single value."""
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(values.mean()), error
