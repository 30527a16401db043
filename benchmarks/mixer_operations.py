"""The recurrences of Mamba-2 and Gated DeltaNet alone, on the same tensors: ours and public ones for a CPU.

A whole layer is projections for the most part, which are the same for everyone; here is the rest. Sizes are
those of the layers of width 512 that `mixers.py` times.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from memzoo.kernels import linear_attention

# Dimensions: B batch (1), T tokens, H heads, K key width, V value width

CHUNK = 64  # of every one of them
OURS = "memzoo"
Function = Callable[..., Tensor]


def recurrences(scale: int = 1) -> dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Function]]]:
    """Recurrence -> (shape of each input behind T, who -> its function of these inputs).

    Args:
        scale: divides the widths, for a trial.
    """
    state, head, key, value = (size // scale for size in (128, 64, 48, 96))
    return {
        "Mamba-2": (
            {"q": (1, state), "k": (1, state), "v": (16, head), "step": (16,)},
            {OURS: _mamba2, "transformers": _mamba2_transformers},
        ),
        "Gated DeltaNet": (
            {"q": (8, key), "k": (8, key), "v": (8, value), "step": (8,), "beta": (8,)},
            {OURS: _delta, "transformers": _delta_transformers, "fla plain": _delta_fla},
        ),
    }


def timed(
    dtype: str, tokens: int, device: torch.device, options: Any, scale: int = 1
) -> Iterator[dict[str, Any]]:
    """Forward with the backward pass to all inputs, in turns; a row says what cannot be imported."""
    for recurrence, (shapes, functions) in recurrences(scale).items():
        made = torch.Generator().manual_seed(0)
        inputs = {
            name: torch.randn(1, tokens, *shape, generator=made).to(device, getattr(torch, dtype))
            for name, shape in shapes.items()
        }
        inputs["k"] = F.normalize(inputs["k"], dim=-1)
        calls: dict[str, Callable[[], object]] = {}
        for who, function in functions.items():
            row = {"recurrence": recurrence, "by": who, "dtype": dtype, "tokens": tokens}
            try:
                function(**{name: x[:, :CHUNK] for name, x in inputs.items()})
            except ImportError as error:
                yield {**row, "skipped": f"cannot be imported: {error}"}
                continue
            calls[who] = _both(function, inputs)
        times = common.time_interleaved(
            calls, device=device, budget_s=options.budget, warmup=1, min_repeats=3, max_repeats=20
        )
        for who, taken in times.items():
            peak = common.peak_memory(calls[who], device)
            yield {
                "recurrence": recurrence,
                "by": who,
                "dtype": dtype,
                "tokens": tokens,
                **taken,
                "speed_of_ours": taken["median_ms"] / times[OURS]["median_ms"],
                "peak_mib": None if peak is None else peak / 2**20,
            }


def _both(function: Function, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}

    def run() -> None:
        out = function(**leaves)
        torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))

    return run


def _log_decay(step: Tensor) -> Tensor:
    return -F.softplus(step.float())


def _mamba2(q: Tensor, k: Tensor, v: Tensor, step: Tensor) -> Tensor:
    delta = F.softplus(step.float())
    return linear_attention(q, k, v, g=-delta, beta=delta, scale=1.0, chunk_size=CHUNK)[0]


def _mamba2_transformers(q: Tensor, k: Tensor, v: Tensor, step: Tensor) -> Tensor:
    module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    function = inspect.unwrap(module.mamba2_chunk_scan)
    rates = -torch.ones(step.shape[-1], device=v.device)
    found = function(v, step, rates, k, q, CHUNK, dt_softplus=True)
    return found[0] if isinstance(found, tuple) else found


def _delta(q: Tensor, k: Tensor, v: Tensor, step: Tensor, beta: Tensor) -> Tensor:
    g = _log_decay(step)
    return linear_attention(q, k, v, g=g, beta=beta.sigmoid(), rule="delta", chunk_size=CHUNK)[0]


def _delta_transformers(q: Tensor, k: Tensor, v: Tensor, step: Tensor, beta: Tensor) -> Tensor:
    module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    function = inspect.unwrap(module.torch_chunk_gated_delta_rule)
    found: Tensor = function(q, k, v, g=_log_decay(step), beta=beta.sigmoid(), chunk_size=CHUNK)[0]
    return found


def _delta_fla(q: Tensor, k: Tensor, v: Tensor, step: Tensor, beta: Tensor) -> Tensor:
    module = importlib.import_module("fla.ops.gated_delta_rule.naive")
    found: Tensor = module.naive_chunk_gated_delta_rule(
        q, k, v, _log_decay(step), beta.sigmoid(), chunk_size=CHUNK
    )[0]
    return found
