"""What a run will need, said before its first step: memory beside what the machine has, and time.

Memory is measured without memory: every kind of block runs forward and backward on the meta device, where
tensors have sizes but no content, and the bytes that are alive at once are counted. Time is the FLOPs of a
step over the rate of a short matrix product, which no run reaches: a lower bound.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..kernels.linear_cross_entropy import default_chunk_size
from ..models.decoder import MemoryLM
from . import random_state
from .data.batches import BatchSource
from .modules import LanguageModelModule, planned_steps

logger = logging.getLogger(__name__)

# Longer rows are measured at three shorter lengths and extended as a polynomial of second degree.
MAX_MEASURED_TOKENS = 512
OPTIMIZER_COPIES = 2  # AdamW keeps two running means per trained number

# Dimensions: B rows, T tokens, H heads, D head width, M model width, V vocabulary


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one optimiser step needs, in bytes and FLOPs.

    Attributes:
        num_parameters: of the model; ``num_trained`` of them get gradients.
        weights: the parameters, with their copies in lower precision under ``*-mixed``.
        gradients: of the trained parameters.
        optimizer: running means of AdamW.
        activations: the most that forward and backward of one batch hold at once beyond these.
        head: logits of the positions worked on at once, and the gradients made with the loss.
        state: memory carried from batch to batch.
        flops: of all batches of one step.
    """

    num_parameters: int
    num_trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    state: int
    flops: int

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head + self.state


def estimate_step(
    module: LanguageModelModule,
    num_rows: int,
    num_tokens: int,
    *,
    num_batches: int = 1,
    precision: torch.dtype = torch.float32,
) -> Estimate:
    """What one optimiser step needs; draws no random numbers and allocates nothing.

    Args:
        module: its config, its switches and which of its parameters are trained are read.
        num_rows: B, rows of a batch.
        num_tokens: T, tokens of a row.
        num_batches: batches accumulated for one step.
        precision: of the activations.
    """
    model = module.model
    weights = sum(parameter.nbytes for parameter in model.parameters())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trained)
    is_mixed = precision != next(model.parameters()).dtype
    vocab_size, width = model.config.vocab_size, model.config.d_model
    rows = min(default_chunk_size(vocab_size), num_rows * num_tokens)
    passes = 4 if model.gradient_checkpointing else 3  # forward once more, and backward as two forwards
    states = model.state_num_bytes(num_tokens, num_rows, precision)
    return Estimate(
        num_parameters=model.num_parameters(),
        num_trained=sum(parameter.numel() for parameter in trained),
        weights=weights + (weights * precision.itemsize // 4 if is_mixed else 0),
        gradients=gradients,
        optimizer=OPTIMIZER_COPIES * gradients,
        activations=measure_activations(model, num_rows, num_tokens, precision),
        head=2 * 4 * rows * vocab_size
        + 4 * vocab_size * width
        + precision.itemsize * num_rows * num_tokens * width,
        state=0 if module.carried is None else 2 * states,  # the one before and the one after a batch
        # a mean over the positions of a row is that of its middle
        flops=passes * num_batches * num_rows * num_tokens * model.flops_per_token(num_tokens // 2),
    )


def measure_activations(
    model: MemoryLM, num_rows: int, num_tokens: int, precision: torch.dtype = torch.float32
) -> int:
    """Bytes alive at once in forward and backward of the blocks, weights and their gradients left out.

    Args:
        model: built from its config once more, on the meta device.
        num_rows: B.
        num_tokens: T.
        precision: of the activations.
    """
    if num_tokens <= MAX_MEASURED_TOKENS:
        return _measure(model, num_rows, num_tokens, precision)
    lengths = [MAX_MEASURED_TOKENS // 4, MAX_MEASURED_TOKENS // 2, MAX_MEASURED_TOKENS]
    sizes = [_measure(model, num_rows, length, precision) for length in lengths]
    # Lagrange's polynomial through three lengths: attention masks grow with the square, all else linearly
    total = 0.0
    for i, length in enumerate(lengths):
        share = float(sizes[i])
        for j, other in enumerate(lengths):
            if j != i:
                share *= (num_tokens - other) / (length - other)
        total += share
    return max(int(total), sizes[-1])


def _measure(model: MemoryLM, num_rows: int, num_tokens: int, precision: torch.dtype) -> int:
    with random_state.untouched():
        ghost = MemoryLM(model.config, device="meta", dtype=precision)
    for ours, theirs in zip(ghost.parameters(), model.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    ghost.train()
    kinds: dict[str, list[nn.Module]] = {}
    for block, mixer, mlp in zip(ghost.blocks, model.config.mixers, model.config.mlps, strict=True):
        kinds.setdefault(repr((mixer, mlp)), []).append(block)
    # One block alone, and what each further one of its kind adds: the sum over all blocks follows.
    alone, added = 0, 0
    for blocks in kinds.values():
        first = _peak(ghost, blocks[:1], num_rows, num_tokens)
        second = _peak(ghost, [blocks[0], blocks[0]], num_rows, num_tokens)
        if model.gradient_checkpointing:  # kept are the inputs; one block at a time has all of its own
            added += len(blocks) * precision.itemsize * num_rows * num_tokens * model.config.d_model
            alone = max(alone, first)
        else:
            added += len(blocks) * (second - first)
            alone = max(alone, first - (second - first))
    return alone + added


def _peak(ghost: MemoryLM, blocks: list[nn.Module], num_rows: int, num_tokens: int) -> int:
    ghost.layers = nn.ModuleList(blocks)
    ids = torch.zeros(num_rows, num_tokens, dtype=torch.int64, device="meta")
    trained = [parameter for parameter in ghost.parameters() if parameter.requires_grad]
    with LiveBytes() as counter, _AttentionWithoutScores():
        out = ghost(ids, return_hidden_states="last", last_only=True)
        hidden = out.hidden_states[0]
        if hidden.requires_grad:
            hidden.sum().backward()
    gradients = sum(parameter.nbytes for parameter in trained if parameter.grad is not None)
    ghost.zero_grad()
    return max(counter.peak - gradients, 0)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the block that are still alive.

    Attributes:
        live: bytes alive now.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


class _AttentionWithoutScores(TorchFunctionMode):
    """Lets torch's attention keep what its kernels on real devices keep; on meta it would hold all scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3], (kwargs or {}).get("attn_mask", args[3] if args[3:] else None))
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])  # (B, H, T, D)
        sums = q.new_empty(q.shape[:-1], dtype=torch.float32)  # (B, H, T)
        # a mask of truth values is made into one of numbers
        scores = None if mask is None else mask.new_empty(mask.shape, dtype=q.dtype)
        ctx.save_for_backward(q, k, v, out, sums, scores)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class Preflight(Callback):
    """Says before the first step what a run will need, and warns where that is more than there is.

    Only for a `LanguageModelModule`.

    Args:
        say: takes one line of text; None writes to stderr.

    Attributes:
        estimate: what was found; None before, and for other modules.
    """

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.say = say or _to_stderr
        self.estimate: Estimate | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        shape = batch_shape(trainer)
        if not isinstance(pl_module, LanguageModelModule) or shape is None or not trainer.is_global_zero:
            return
        device = trainer.strategy.root_device
        precision = activation_dtype(str(trainer.precision), next(pl_module.model.parameters()).dtype)
        try:
            self.estimate = found = estimate_step(
                pl_module, *shape, num_batches=trainer.accumulate_grad_batches, precision=precision
            )
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            # of a mixer or kernel that cannot run on the meta device; the run itself may well go on
            logger.info("preflight: no estimate of this model (%s)", error)
            return
        rate = matmul_rate(device, precision)
        self.say(memory_line(found))
        there = free_bytes(device)
        where = "on the accelerator" if device.type == "cuda" else "in the machine"
        # the weights are there already
        needed = found.total - found.weights
        if there is not None:
            self.say(f"preflight: {size(needed)} more than now, {size(there)} are free {where}")
            if needed > there:
                logger.warning(
                    "THIS RUN WILL NOT FIT: a step needs about %s more than now, and %s are free %s. "
                    "Make data.batch_size smaller (and trainer.accumulate_grad_batches larger) or "
                    "data.seq_len, set model.recompute: true, or trainer.precision: bf16-mixed.",
                    size(needed),
                    size(there),
                    where,
                )
        self.say(time_line(found, rate, planned_steps(trainer)))


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def batch_shape(trainer: Trainer) -> tuple[int, int] | None:
    """Rows and tokens of a training batch, from the sizes its data names or from the first and last one."""
    data = trainer.datamodule
    if data is None:
        return None
    rows, tokens = getattr(data, "batch_size", None), getattr(data, "seq_len", None)
    if isinstance(rows, int) and isinstance(tokens, int):
        return rows, tokens
    source = getattr(data.train_dataloader(), "dataset", None)
    if not isinstance(source, BatchSource):
        return None
    with random_state.untouched():
        batches = [source.batch(0, index) for index in (0, source.num_batches - 1)]
    # segments of several lengths follow one another
    return max(((batch.num_rows, batch.input_ids.shape[1]) for batch in batches), key=lambda pair: pair[1])


def activation_dtype(precision: str, dtype: torch.dtype) -> torch.dtype:
    """Type of the activations under a precision of Lightning, such as ``bf16-mixed``."""
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else dtype


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """FLOPs per second of a square matrix product, the best of a few."""
    width = 512 if device.type == "cpu" else 4096
    matrix = torch.ones(width, width, device=device, dtype=dtype)
    best, begin = float("inf"), time.perf_counter()
    with torch.no_grad():
        while best == float("inf") or time.perf_counter() - begin < seconds:
            started = time.perf_counter()
            matrix @ matrix
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - started)
    return 2 * width**3 / best


def free_bytes(device: torch.device) -> int | None:
    """Memory that a run can still take: of the accelerator, else of the machine or its control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")))
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (
            (group / name).read_text(encoding="utf-8") for name in ("memory.max", "memory.current")
        )
        found.append(max(int(limit) - int(used), 0))
    if not found:
        with suppress(AttributeError, OSError, ValueError):
            found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(found, default=None)


def memory_line(found: Estimate) -> str:
    """The parts of the memory in words."""
    carried = f" + carried state {size(found.state)}" if found.state else ""
    return (
        f"preflight: {found.num_parameters:,} parameters ({found.num_trained:,} trained); "
        f"weights {size(found.weights)} + gradients {size(found.gradients)} + "
        f"optimiser {size(found.optimizer)} + activations {size(found.activations)} + "
        f"head and loss {size(found.head)}{carried} = about {size(found.total)}"
    )


def time_line(found: Estimate, rate: float, num_steps: int) -> str:
    """The least time in words."""
    seconds = found.flops / rate
    return (
        f"preflight: {found.flops / 1e9:,.3g} GFLOP per step, at {rate / 1e9:,.3g} GFLOP/s no less than "
        f"{duration(seconds)} per step and {duration(seconds * num_steps)} for {num_steps:,} steps; "
        "the progress line says what it really takes"
    )


def size(num_bytes: int) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024  # type: ignore[assignment]
    return f"{num_bytes:,.3g} GiB"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    for unit, length in (("s", 60), ("min", 60), ("h", 24)):
        if seconds < length:
            return f"{seconds:.3g} {unit}"
        seconds /= length
    return f"{seconds:,.3g} days"
