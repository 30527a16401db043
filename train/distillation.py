"""Lightning modules of conversion: align each new mixer with the attention it replaces, then tune the whole
model.

Stage 1 (attention transfer, Zhang et al. 2024, arXiv 2410.10254): every new mixer is given the teacher's
hidden states of its own layer, so errors do not add up and layers do not see one another. Stage 2: the
student runs on its own states and learns the teacher's next-token distribution through low-rank updates of
its projections.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from ..models.conversion import relative_error
from ..models.decoder import MemoryLM
from .data.batches import TokenBatch
from .data.mqar import IGNORE_INDEX
from .optim import OptimizerConfig, build_optimizer, lr_factor

# Dimensions: B rows, T tokens, M model width, V vocabulary

KL_CHUNK = 32  # tokens worked on at once: their logits stay in the processor's cache
KEPT_BYTES = 2**30  # of a teacher's hidden states


class TeacherReadings:
    """What a frozen teacher made of the text it has read: a second run over it costs only the teacher's head.

    Kept are the last hidden states, M numbers per token where the logits are V, until `max_bytes` are held;
    what comes later is read again.

    Args:
        max_bytes: 0 keeps nothing.
    """

    def __init__(self, max_bytes: int = KEPT_BYTES) -> None:
        self.num_bytes_left = max_bytes
        self._hidden: dict[tuple[Any, ...], Tensor] = {}

    @torch.no_grad()
    def logits(self, teacher: MemoryLM, batch: TokenBatch) -> Tensor:
        """(B, T, V), the same numbers whether the batch was read before or not."""
        ids, borders = batch.input_ids, batch.cu_seqlens
        key = (
            tuple(ids.shape),
            ids.cpu().numpy().tobytes(),
            None if borders is None else tuple(borders.tolist()),
        )
        if key in self._hidden:
            return teacher.head(self._hidden[key])
        out = teacher(batch.input_ids, cu_seqlens=batch.cu_seqlens, return_hidden_states=True)
        last = out.hidden_states[-1]
        if last.numel() * last.element_size() <= self.num_bytes_left:
            self.num_bytes_left -= last.numel() * last.element_size()
            self._hidden[key] = last
        return out.logits


class StudentModule(LightningModule):
    """Common to both stages: a student with some trainable parameters, a frozen teacher, one optimiser."""

    def __init__(self, student: nn.Module, teacher: MemoryLM, optimizer: OptimizerConfig) -> None:
        super().__init__()
        self.student = student
        # in a list: neither saved nor trained with the student
        self._teacher = [teacher.requires_grad_(False).eval()]
        self.optimizer_config = optimizer

    @property
    def teacher(self) -> MemoryLM:
        return self._teacher[0]

    def setup(self, stage: str) -> None:
        self.teacher.to(self.device)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = build_optimizer(self.student.parameters(), self.optimizer_config)
        num_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(self.optimizer_config, num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class AlignmentModule(StudentModule):
    """Stage 1: relative squared error between the outputs of old and new mixers on the teacher's hidden
    states.

    The error of a layer is divided by the mean square of the teacher's output, so that a loud layer does not
    drown the others.

    Args:
        layers: blocks that were converted; only their mixers are read.
    """

    def __init__(
        self, student: MemoryLM, teacher: MemoryLM, layers: Sequence[int], optimizer: OptimizerConfig
    ) -> None:
        super().__init__(student, teacher, optimizer)
        self.layers = frozenset(layers)

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        losses = []
        assert isinstance(self.student, MemoryLM)
        hidden = self.teacher.embed_tokens(batch.input_ids)  # (B, T, M)
        for index, (old, new) in enumerate(zip(self.teacher.blocks, self.student.blocks, strict=True)):
            with torch.no_grad():
                normed = old.mixer_input(hidden)
                target = old.mixer(normed, cu_seqlens=batch.cu_seqlens).hidden
            if index in self.layers:
                losses.append(relative_error(new.mixer(normed, cu_seqlens=batch.cu_seqlens).hidden, target))
            if len(losses) == len(self.layers):
                break
            with torch.no_grad():
                hidden = old.after_mixer(hidden, target)
        loss = torch.stack(losses).mean()
        self.log("align_loss", loss, prog_bar=True, batch_size=batch.num_rows)
        return loss


class DistillModule(StudentModule):
    """Stage 2: kl_weight KL(teacher || student) + ce_weight cross-entropy, per token, temperature 1.

    Args:
        kl_weight, ce_weight: weights of the two losses.
        readings: of this teacher in earlier runs, to be used and added to; None keeps none.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: MemoryLM,
        optimizer: OptimizerConfig,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
        readings: TeacherReadings | None = None,
    ) -> None:
        super().__init__(student, teacher, optimizer)
        self.readings = TeacherReadings(0) if readings is None else readings
        if kl_weight < 0 or ce_weight < 0 or kl_weight + ce_weight == 0:
            raise ValueError(
                f"kl_weight and ce_weight must be >= 0 and not both 0, got {kl_weight} and {ce_weight}."
            )
        self.kl_weight, self.ce_weight = kl_weight, ce_weight

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        logits = self.student(batch.input_ids, cu_seqlens=batch.cu_seqlens).logits
        loss = logits.new_zeros((), dtype=torch.float32)
        if self.kl_weight:
            kl = distillation_loss(logits, self.readings.logits(self.teacher, batch))
            self.log("kl", kl, prog_bar=True, batch_size=batch.num_rows)
            loss = loss + self.kl_weight * kl
        if self.ce_weight:
            ce = F.cross_entropy(
                logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORE_INDEX
            )
            self.log("ce", ce, prog_bar=True, batch_size=batch.num_rows)
            loss = loss + self.ce_weight * ce
        return loss


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher || student), temperature 1, in float32 (float64 for float64 logits).

    Only the student gets a gradient. It is made together with the loss, a few tokens at a time, so no float32
    copy of all logits is ever kept.

    Args:
        student_logits, teacher_logits: (B, T, V). Vocabularies may differ by padding at the end; the surplus
            is ignored.
    """
    width = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student, teacher = student_logits[..., :width].flatten(0, 1), teacher_logits[..., :width].flatten(0, 1)
    loss: Tensor = _Divergence.apply(student, teacher)
    return loss


class _Divergence(torch.autograd.Function):
    """KL(teacher || student) of logits (N, V), averaged over N; d loss / d student = (q - p) / N."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        wide = torch.float64 if student.dtype == torch.float64 else torch.float32
        needs_grad = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student) if needs_grad else None
        count = max(student.shape[0], 1)
        total = student.new_zeros((), dtype=wide)
        for start in range(0, student.shape[0], KL_CHUNK):
            part = slice(start, start + KL_CHUNK)
            log_p = F.log_softmax(teacher[part].to(wide), dim=-1)
            log_q = F.log_softmax(student[part].to(wide), dim=-1)
            p = log_p.exp()
            total += log_p.sub_(log_q).mul_(p).sum()
            if gradient is not None:
                gradient[part] = log_q.exp_().sub_(p).div_(count)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total / count

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * d_loss.to(gradient.dtype), None


def freeze_except(model: nn.Module, names: Iterable[str]) -> int:
    """Makes only the named parameters trainable, in float32; returns how many numbers that are.

    Raises:
        ValueError: a name that the model does not have.
    """
    wanted = set(names)
    count = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
        if name in wanted:
            wanted.discard(name)
            parameter.data = parameter.data.float()
            count += parameter.numel()
    if wanted:
        raise ValueError(
            f"the model has no parameters {sorted(wanted)[:5]}. Take names from model.named_parameters()."
        )
    return count


@contextmanager
def low_rank_updates(
    model: MemoryLM, *, rank: int, alpha: float, targets: Sequence[str], also_train: Iterable[str] = ()
) -> Iterator[tuple[nn.Module, int]]:
    """Trains low-rank updates (Hu et al. 2021, through peft) of the named projections; on leaving they are
    merged into them.

    Args:
        rank: of the updates. 0 adds none.
        targets: names of linear layers, such as q_proj; every layer of that name gets an update.
        also_train: further parameters to train, by their name in `model`.

    Yields:
        the model with its updates, and the number of trainable numbers.
    """
    extra = set(also_train)
    count = freeze_except(model, extra)
    if rank == 0:
        yield model, count
        return
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0, bias="none")
    wrapped = LoraModel(model, {"default": config}, "default")
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            count += parameter.numel()
        elif name.removeprefix("model.") in extra:
            parameter.requires_grad_(True)
    try:
        yield wrapped, count
    finally:
        wrapped.merge_and_unload()


@contextmanager
def scaled_rates(model: nn.Module, names: Iterable[str], scale: float) -> Iterator[None]:
    """Multiplies the own rates (tags) of the named parameters while it is entered."""
    parameters = dict(model.named_parameters())
    tagged = [(parameters[name], getattr(parameters[name], "_lr_scale", 1.0)) for name in names]
    for parameter, own in tagged:
        parameter._lr_scale = own * scale  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter, own in tagged:
            parameter._lr_scale = own  # type: ignore[attr-defined]


def lora_size(model: MemoryLM, targets: Sequence[str]) -> int:
    """Trainable numbers per rank of `low_rank_updates` on the named layers."""
    return sum(
        module.in_features + module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    )
