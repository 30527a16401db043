"""Lightning modules of conversion: align each new mixer with the attention it replaces, then train the whole.

Alignment (attention transfer, Zhang et al. 2024, arXiv 2410.10254): every new mixer is given the teacher's
hidden states of its own layer, so errors do not add up and layers do not see one another. End to end: the
student runs on its own states and learns the teacher's next-token distribution, or the text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from ...kernels import linear_cross_entropy, linear_divergence
from ...kernels.autograd import without_autocast
from ...layers.contract import LayerOutput, TokenMixer
from ...models.conversion import find_not_finite, first_not_finite, relative_error
from ...models.decoder import MemoryLM
from ..data.batches import TokenBatch
from ..data.mqar import IGNORE_INDEX
from ..optim import OptimizerConfig, build_optimizer, lr_factor
from ..sizes import Sizes, draw_sizes, step_generator
from .losses import attention_transfer_loss, hidden_alignment_loss
from .retention import capacity_loss, log_retentions, soft_sizes
from .teacher import TeacherReadings, last_output

# Dimensions: B rows, T tokens, M model width, V vocabulary

# of a step with window dropout: the token itself
SHRUNK = {"window_size": 1}


class StudentModule(LightningModule):
    """Common to all stages: a student with some trainable parameters, a frozen teacher, one optimiser.

    Its checkpoints hold what is trained, not the frozen rest.

    Args:
        student: the model, or its wrapper with low-rank updates.
        teacher: frozen here; never saved nor trained with the student.
        optimizer: of the stage.
        window_dropout: share of the steps in which every window is shrunk to the token itself.
        sizes: size -> smallest and largest, of which every step draws its own.
        counts_all: take the losses over all tokens, not over labelled ones alone.
        seed: of these draws.
        label: what an error begins with.

    Attributes:
        history: losses of every batch so far, name -> values.
        num_tokens: tokens read so far.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: MemoryLM,
        optimizer: OptimizerConfig,
        *,
        window_dropout: float = 0.0,
        sizes: Sizes | None = None,
        counts_all: bool = False,
        seed: int = 0,
        label: str = "training",
    ) -> None:
        super().__init__()
        self.label = label
        self.student = student
        self._teacher = [teacher.requires_grad_(False).eval()]  # in a list: no part of this module
        self.optimizer_config = optimizer
        self.window_dropout, self.sizes, self.seed = window_dropout, dict(sizes or {}), seed
        self.counts_all = counts_all
        self.history: dict[str, list[float]] = {}
        self.num_tokens = 0
        self.strict_loading = False

    @property
    def teacher(self) -> MemoryLM:
        return self._teacher[0]

    def setup(self, stage: str) -> None:
        self.teacher.to(self.device)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = build_optimizer(self.student.parameters(), self.optimizer_config)
        factor = lr_factor(self.optimizer_config, self.trainer.max_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the length of the whole gradient; one that is not finite never reaches the weights.

        Raises:
            ValueError: the gradient is not finite.
        """
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        largest = math.inf if gradient_clip_val is None else gradient_clip_val
        length = float(torch.nn.utils.clip_grad_norm_(trained, largest))
        if not math.isfinite(length):
            gradients = ((name, part.grad) for name, part in self.named_parameters() if part.grad is not None)
            name = first_not_finite(gradients)
            self._stop("the gradient", length, None if name is None else f"that of {_plain_name(name)}")

    def check_weights(self) -> None:
        """Raises ValueError when a trained number is not finite."""
        name = first_not_finite(item for item in self.named_parameters() if item[1].requires_grad)
        if name is not None:
            self._stop(f"the weight {_plain_name(name)}", math.nan)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_weights()
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {
            name: tensor for name, tensor in checkpoint["state_dict"].items() if name in trained
        }
        checkpoint["history"], checkpoint["num_tokens"] = as_tensors(self.history), self.num_tokens

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        saved = set(checkpoint["state_dict"])
        if saved != trained:
            odd = sorted(saved ^ trained)
            raise ValueError(
                f"the checkpoint is of another stage: {odd[0]!r} is not on both sides ({len(odd)} such). "
                "Start the conversion anew with --overwrite."
            )
        self.history = {name: values.tolist() for name, values in checkpoint["history"].items()}
        self.num_tokens = checkpoint["num_tokens"]

    def note(self, name: str, value: Tensor, batch: TokenBatch, *, in_line: bool = False) -> None:
        """Keeps a figure of this step, and shows it in the progress line if asked.

        Raises:
            ValueError: it is not finite; the message says where that began.
        """
        number = float(value.detach())
        if not math.isfinite(number):
            read: dict[str, Any] = {"mask": batch.mask, "cu_seqlens": batch.cu_seqlens}
            begins = find_not_finite(self.teacher, batch.input_ids, whose="teacher", **read)
            begins = begins or find_not_finite(self._network, batch.input_ids, **read)
            self._stop(f"the loss {name}", number, begins)
        self.history.setdefault(name, []).append(number)
        if in_line:
            self.log(name, number, prog_bar=True, batch_size=1)

    @property
    def _network(self) -> MemoryLM:
        inner = self.student if isinstance(self.student, MemoryLM) else self.student.model
        assert isinstance(inner, MemoryLM)
        return inner

    def _stop(self, what: str, value: float, begins: str | None = None) -> NoReturn:
        first = "" if begins is None else f" It begins in {begins}."
        raise ValueError(
            f"{self.label}, step {self.global_step + 1}: {what} is {value}, not a finite number.{first} "
            "Lower lr or clip of the stage, or look at the weights of the source. The stage is not kept."
        )

    def counted(self, batch: TokenBatch) -> Tensor:
        """Which tokens the losses are taken over, (B, T) bool."""
        if not self.counts_all:
            return batch.labels != IGNORE_INDEX
        return torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.mask is None else batch.mask

    def overrides(self, step: int) -> dict[str, int]:
        """Sizes to use in a step: a pure function of seed and step, so that a resumed run draws the same."""
        generator = step_generator(self.seed, step)
        is_shrunk = float(torch.rand((), generator=generator)) < self.window_dropout
        drawn = draw_sizes(self.sizes, generator)
        return drawn | SHRUNK if is_shrunk else drawn


class _Settled(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if part is None else part * d_loss for part in ctx.gradients)


class AlignmentModule(StudentModule):
    """New mixers against the attention they replace, on the teacher's hidden states.

    The gradients of a layer are made right after its loss, so that one layer's activations are held at a
    time, whatever the depth.

    Args:
        layers: blocks that were converted; only their mixers are read.
        loss: `mixer_out`, `attn_out` or `hidden` -> weight; the mean over layers is taken.
        normalize: divide by the size of the teacher's output of the layer, over the same tokens.
        counts_all: as in `StudentModule`.
        options: as in `StudentModule`.
    """

    def __init__(
        self,
        student: MemoryLM,
        teacher: MemoryLM,
        optimizer: OptimizerConfig,
        layers: Sequence[int],
        loss: Mapping[str, float],
        *,
        normalize: bool = True,
        counts_all: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(student, teacher, optimizer, counts_all=counts_all, **options)
        self.layers, self.loss, self.normalize = frozenset(layers), dict(loss), normalize

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        losses: list[Tensor] = []
        parameters: list[Tensor] = []
        gradients: list[Tensor | None] = []
        self.num_tokens += batch.num_tokens
        assert isinstance(self.student, MemoryLM)
        overrides, counted = self.overrides(self.global_step), self.counted(batch)
        with torch.no_grad():
            hidden = self.teacher.embed(batch.input_ids)  # (B, T, M)
        for index, (old, new) in enumerate(zip(self.teacher.blocks, self.student.blocks, strict=True)):
            with torch.no_grad():
                normed = old.mixer_input(hidden)
                target = self._read(old.mixer, normed, batch, {})
            if index in self.layers:
                loss = self._distance(self._read(new.mixer, normed, batch, overrides), target, counted)
                trained = [part for part in new.mixer.parameters() if part.requires_grad]
                if trained:
                    with without_autocast(loss.device):
                        gradients += torch.autograd.grad(loss, trained, allow_unused=True)
                parameters += trained
                losses.append(loss.detach())
                self.note(f"layer_{index}", loss, batch)
            if len(losses) == len(self.layers):
                break
            with torch.no_grad():
                hidden = old.after_mixer(hidden, target.hidden)
        total = torch.stack(losses).mean()
        self.note("loss", total, batch, in_line=True)
        made = [None if part is None else part / len(losses) for part in gradients]
        settled: Tensor = _Settled.apply(total, made, *parameters)
        return settled

    def _read(
        self, mixer: TokenMixer, normed: Tensor, batch: TokenBatch, overrides: Mapping[str, int]
    ) -> LayerOutput:
        return mixer(
            normed,
            mask=batch.mask,
            cu_seqlens=batch.cu_seqlens,
            overrides={name: size for name, size in overrides.items() if name in mixer.overridable},
            return_extras="attn_out" in self.loss,
        )

    def _distance(self, student: LayerOutput, teacher: LayerOutput, counted: Tensor) -> Tensor:
        if not bool(counted.any()):  # a batch that asks for nothing
            return 0.0 * student.hidden.sum()
        hidden = (student.hidden[counted], teacher.hidden[counted])  # (tokens, M)
        parts = []
        for name, weight in self.loss.items():
            if name == "mixer_out":
                part = (relative_error if self.normalize else attention_transfer_loss)(*hidden)
            elif name == "attn_out":
                heads = (out.extras["head_outputs"][counted] for out in (student, teacher))
                part = attention_transfer_loss(*heads, normalize=self.normalize)
            else:
                part = hidden_alignment_loss(*hidden, normalize=self.normalize)
            parts.append(weight * part)
        return torch.stack(parts).sum()


@dataclass(frozen=True)
class Capacity:
    """The budget of retention gates and how going over it counts; see `capacity_loss`.

    Attributes:
        budget: tokens per head, or below 1 their share of the window.
        normalizer: "active" or "paper".
        scope: "head" or "global".
    """

    budget: float
    normalizer: str = "active"
    scope: str = "head"


class DistillModule(StudentModule):
    """kl KL(teacher || student) + ce cross-entropy of the next token, per token, temperature 1.

    No logits of the whole text are made: losses and gradients come a few tokens at a time.

    Args:
        loss: `kl`, `reverse_kl` (KL(student || teacher)), `ce` and `capacity` -> weight.
        readings: what this teacher has read; None keeps none.
        capacity: with the loss `capacity`, the budget of the student's retention gates.
        options: as in `StudentModule`.

    Raises:
        ValueError: all weights 0, one below it, or a loss `capacity` without its budget.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: MemoryLM,
        optimizer: OptimizerConfig,
        loss: Mapping[str, float],
        *,
        readings: TeacherReadings | None = None,
        capacity: Capacity | None = None,
        **options: Any,
    ) -> None:
        super().__init__(student, teacher, optimizer, **options)
        self.readings = TeacherReadings() if readings is None else readings
        self.weights = {name: loss.get(name, 0.0) for name in ("kl", "reverse_kl", "ce", "capacity")}
        self.capacity = capacity
        if min(self.weights.values()) < 0 or not any(self.weights.values()):
            given = ", ".join(f"{name} {weight}" for name, weight in self.weights.items())
            raise ValueError(f"the weights of the losses must be >= 0 and not all 0, got {given}.")
        if self.weights["capacity"] and capacity is None:
            raise ValueError("the loss capacity needs a budget. Give capacity=Capacity(budget).")

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        self.num_tokens += batch.num_tokens
        asked = self.counted(batch).flatten()  # (B T,)
        read = last_output(
            self.student,
            batch,
            self.overrides(self.global_step),
            return_extras=bool(self.weights["capacity"]),
        )
        assert read.hidden_states is not None
        hidden = read.hidden_states[0].flatten(0, 1)[asked]
        weight = self._network.head_weight
        loss = hidden.new_zeros((), dtype=torch.float32)
        if self.weights["kl"] or self.weights["reverse_kl"]:
            known = self.readings.hidden(self.teacher, batch).flatten(0, 1)[asked]
            for name in ("kl", "reverse_kl"):
                if self.weights[name]:
                    heads = (weight, known, self.teacher.head_weight)
                    found = linear_divergence(hidden, *heads, reverse=name == "reverse_kl")
                    self.note(name, found, batch, in_line=True)
                    loss = loss + self.weights[name] * found
        if self.weights["ce"]:
            ce = linear_cross_entropy(hidden, weight, batch.labels.flatten()[asked])
            self.note("ce", ce, batch, in_line=True)
            loss = loss + self.weights["ce"] * ce
        if self.weights["capacity"]:
            loss = loss + self.weights["capacity"] * self._over_budget(read.extras, batch)
        self.note("loss", loss, batch)
        return loss

    def _over_budget(self, extras: Mapping[str, Tensor], batch: TokenBatch) -> Tensor:
        """The capacity loss; notes it, and the mean soft cache size as a multiple of the budget."""
        assert self.capacity is not None
        sizes, positions, lengths = soft_sizes(log_retentions(extras), batch)
        found = capacity_loss(sizes, positions=positions, lengths=lengths, **asdict(self.capacity))
        self.note("capacity", found, batch, in_line=True)
        budget = self.capacity.budget
        if budget < 1:
            budget *= float(lengths.double().mean())
        self.note("size_by_budget", sizes.detach().mean() / budget, batch, in_line=True)
        return found


def as_tensors(history: Mapping[str, Sequence[float]]) -> dict[str, Tensor]:
    """Figures of all steps, (steps,) each, to the bit."""
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in history.items()}


def _plain_name(name: str) -> str:
    """The name of a trained parameter in the model, without what wraps it."""
    plain = name.removeprefix("student.").removeprefix("model.")
    return plain.replace(".base_layer.", ".").replace(".default.", ".")
