"""One stage of a conversion, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...layers.contract import suggest
from ..optim import OptimizerConfig
from ..sizes import check_sizes
from .retention import NORMALIZERS, SCOPES, check_budget

ALIGNMENT_LOSSES = ("mixer_out", "attn_out", "hidden")
END_TO_END_LOSSES = ("kl", "reverse_kl", "ce", "capacity")
TRAINABLE = ("new", "mixers", "lora", "all")
TOKENS = ("all", "labelled")
_LONGEST_NAME = 50  # it becomes part of file names


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training.

    Attributes:
        name: of its rows and files.
        loss: loss -> weight. Each new mixer on its teacher's hidden states: `mixer_out` (squared error of its
            output), `attn_out` (of its heads), `hidden` (length of the error of its output). Or of the whole
            model on its own states `kl` (divergence from the teacher), `reverse_kl` (the other way round),
            `ce` (next token), and `capacity` (what retention gates keep above `budget`).
        train: "new" (parameters that the source does not have), "mixers" (all of the new mixers), "lora"
            (low-rank updates), or "all".
        steps: optimiser steps.
        lr: peak learning rate.
        tokens: over which the losses are taken: "all", or "labelled" for those at which the data asks for the
            next; None takes all in an alignment, labelled ones end to end.
        seq_len: tokens of one window of text.
        batch_size: windows per batch.
        accumulate: batches per optimiser step.
        recompute: run blocks again in the backward pass instead of keeping what they computed (end to end).
        normalize: divide alignment losses by the size of the teacher's output, layer by layer.
        window_dropout: share of the steps in which every window is shrunk to the token itself (and sinks),
            so that the memory has to carry the rest.
        sizes: size -> smallest and largest: every step draws one for all layers (`window_size`, `num_sinks`,
            `chunk_size`), so that the model works with any.
        budget: with `capacity`, tokens that each head may keep, or below 1 their share of the window.
        capacity_normalizer: "active" or "paper", see `memzoo.train.conversion.retention.capacity_loss`.
        capacity_scope: "head", or "global" for one budget of all heads and layers together.
        lora_rank: rank of the updates, with "lora"; the control gets the rank that matches its budget.
        lora_targets: linear layers that are updated.
        new_lr_scale: with "lora", rate of the new parameters as a multiple of lr; 0 freezes them.
        schedule: how the rate falls after the warm-up: cosine, linear or constant.
        warmup_steps: steps of linear rise; None takes a tenth of the steps, 10 at most.
        weight_decay: decoupled decay of matrices.
        clip: largest length of the gradient.
    """

    name: str
    loss: Mapping[str, float]
    train: str
    steps: int
    lr: float
    tokens: str | None = None
    seq_len: int = 1024
    batch_size: int = 1
    accumulate: int = 1
    recompute: bool = False
    normalize: bool = True
    window_dropout: float = 0.0
    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    budget: float | None = None
    capacity_normalizer: str = "active"
    capacity_scope: str = "head"
    lora_rank: int = 16
    lora_targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    new_lr_scale: float = 0.0
    schedule: str = "cosine"
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        is_plain = isinstance(self.name, str) and self.name.replace("_", "").replace("-", "").isalnum()
        if not is_plain or len(self.name) > _LONGEST_NAME:
            raise ValueError(
                f"a stage needs a name of at most {_LONGEST_NAME} letters, digits, - and _, got "
                f"{self.name!r:.150}."
            )
        where = f"stage {self.name!r}"
        known = (*ALIGNMENT_LOSSES, *END_TO_END_LOSSES)
        if not isinstance(self.loss, Mapping) or not self.loss:
            raise ValueError(
                f"{where}: loss must map losses to weights, got {self.loss!r}. Write {{kl: 1.0}}."
            )
        for key, weight in self.loss.items():
            if key not in known:
                raise ValueError(f"{where}: unknown loss {key!r}. {suggest(str(key), known)}")
            _check_number(f"{where}: the weight of {key}", weight)
        if len({key in ALIGNMENT_LOSSES for key in self.loss}) > 1:
            raise ValueError(
                f"{where}: {', '.join(self.loss)} cannot be mixed. {', '.join(ALIGNMENT_LOSSES)} compare "
                f"mixers given the teacher's states, {', '.join(END_TO_END_LOSSES)} the model on its own: "
                "use two stages."
            )
        if not any(self.loss.values()):
            raise ValueError(f"{where}: all weights of its losses are 0. Give one above 0.")
        if self.train not in TRAINABLE:
            raise ValueError(f"{where}: train must be one of {', '.join(TRAINABLE)}, got {self.train!r}.")
        if self.is_alignment and self.train in ("lora", "all"):
            raise ValueError(
                f"{where}: an alignment trains parts of the new mixers, got train={self.train!r}. "
                "Use new or mixers."
            )
        for name in ("steps", "seq_len", "batch_size", "accumulate", "lora_rank", "warmup_steps"):
            value, least = getattr(self, name), int(name != "steps" and name != "warmup_steps")
            if name == "warmup_steps" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{where}: {name} must be an integer of at least {least}, got {value!r}.")
        for name in ("lr", "clip"):
            _check_number(f"{where}: {name}", getattr(self, name), is_positive=True)
        for name in ("new_lr_scale", "weight_decay", "window_dropout"):
            _check_number(f"{where}: {name}", getattr(self, name))
        if self.window_dropout > 1:
            raise ValueError(
                f"{where}: window_dropout must be a share, at most 1, got {self.window_dropout}."
            )
        check_sizes(where, self.sizes)
        for name in ("normalize", "recompute"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{where}: {name} must be true or false, got {getattr(self, name)!r}.")
        if self.recompute and self.is_alignment:
            raise ValueError(f"{where}: recompute has no effect in an alignment. Leave it out.")
        if self.tokens is not None and self.tokens not in TOKENS:
            raise ValueError(f"{where}: tokens must be one of {', '.join(TOKENS)}, got {self.tokens!r}.")
        if self.tokens == "all" and "ce" in self.loss:
            raise ValueError(
                f"{where}: the loss ce is taken where the data asks for the next token, got tokens=all. "
                "Leave tokens out."
            )
        self._check_capacity(where)
        _check_names(f"{where}: lora_targets", self.lora_targets)
        self.optimizer  # noqa: B018  # raises on an unknown schedule

    def _check_capacity(self, where: str) -> None:
        if ("capacity" in self.loss) != (self.budget is not None):
            raise ValueError(
                f"{where}: the loss capacity and a budget belong together, got budget={self.budget!r} and "
                f"the losses {', '.join(self.loss)}. Give both or neither."
            )
        if self.budget is not None:
            check_budget(self.budget)
        for name, known in (("capacity_normalizer", NORMALIZERS), ("capacity_scope", SCOPES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{where}: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}."
                )

    @property
    def is_alignment(self) -> bool:
        """Whether the mixers are compared one by one, on the teacher's hidden states."""
        return next(iter(self.loss)) in ALIGNMENT_LOSSES

    @property
    def counts_all(self) -> bool:
        """Whether the losses are taken over all tokens, not over labelled ones alone."""
        return self.is_alignment if self.tokens is None else self.tokens == "all"

    @property
    def optimizer(self) -> OptimizerConfig:
        """AdamW as the stage wants it."""
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ValueError(
                f"stage {self.name!r}: schedule must be cosine, linear or constant, got {self.schedule!r}."
            )
        warmup = min(10, self.steps // 10) if self.warmup_steps is None else self.warmup_steps
        return OptimizerConfig(
            lr=self.lr,
            weight_decay=self.weight_decay,
            warmup_steps=warmup,
            schedule=self.schedule,  # type: ignore[arg-type]  # checked above
        )


def _check_number(what: str, value: Any, *, is_positive: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0 or (is_positive and value == 0):
        wanted = "a positive number" if is_positive else "a number of at least 0"
        # YAML reads 1e-3, without a point, as text
        raise ValueError(f"{what} must be {wanted}, got {value!r}. Write it as 0.001 or 1.0e-3.")


def _check_names(what: str, value: Any) -> None:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{what} must be a list of names, got {value!r}. Write [NAME, ...].")
