"""The matrix bites: one small healthy mixer, thirty-odd faulty twins, and the check that catches each.

S_t = a S_{t-1} + k_t v_t^T,  S halved after every C tokens of the sequence
y_t = W (q_t S_t + mean of the last W values)                            grouped heads
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from memzoo.layers import LayerOutput, MixerConfig, SequenceContext, State, TokenMixer
from memzoo.testing import ContractError, check_mixer, contract_checks

from .probes.common import draw, no_tokens, ring_after, ring_past, wide_dtype

# Dimensions: N sequences, T tokens of one sequence, H query heads, G key/value heads, D head width, W window

HEADS, GROUPS, WIDTH, WINDOW = 4, 2, 3, 3


@dataclass(frozen=True, kw_only=True)
class ToyConfig(MixerConfig):
    type: str = "toy"
    chunk_size: int = 4
    fault: str = ""


@dataclass(kw_only=True)
class ToyState(State):
    memory: Tensor  # (N, G, D, D) float32
    recent: Tensor  # (N, W, G, D) ring of values


class Toy(TokenMixer):
    overridable = frozenset({"chunk_size"})

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.fault = config.fault
        self.q_proj = nn.Linear(config.d_model, HEADS * WIDTH)
        self.k_proj = nn.Linear(config.d_model, GROUPS * WIDTH)
        self.v_proj = nn.Linear(config.d_model, GROUPS * WIDTH)
        self.o_proj = nn.Linear(HEADS * WIDTH, config.d_model)
        self.decay = nn.Parameter(torch.ones(GROUPS))
        self.kept_on_module: Tensor | None = None
        self.init_weights()

    def init_weights(self) -> None:
        draw([self.q_proj, self.k_proj, self.v_proj, self.o_proj])
        if self.fault != "a parameter is not initialised":
            nn.init.ones_(self.decay)

    def init_state(self, batch_size, *, device=None, dtype=None):
        device, dtype = device or self.decay.device, dtype or self.decay.dtype
        memory = torch.zeros(batch_size, GROUPS, WIDTH, WIDTH, device=device, dtype=self._wide(dtype))
        recent = torch.zeros(batch_size, WINDOW, GROUPS, WIDTH, device=device, dtype=dtype)
        if self.fault == "rows of the state are not first":
            recent = recent.transpose(0, 1)
        return ToyState(num_tokens=no_tokens(batch_size), memory=memory, recent=recent)

    def _wide(self, dtype: torch.dtype) -> torch.dtype:
        if self.fault == "accumulation in bfloat16":
            return dtype
        return torch.float32 if self.fault == "accumulation in float32 for float64" else wide_dtype(dtype)

    def forward(self, x, state=None, *, mask=None, return_state=False, **options):
        if mask is not None and self.fault == "padding decays":
            # zeroed tokens write nothing, but they count and they decay
            hidden = super().forward(x.masked_fill(~mask[..., None], 0), state, return_state=return_state)
            return dataclasses.replace(hidden, hidden=hidden.hidden * mask[..., None])
        out = super().forward(x, state, mask=mask, return_state=return_state, **options)
        if mask is not None and return_state and self.fault == "padding counts":
            out.state.num_tokens = out.state.num_tokens + x.shape[1] - mask.sum(-1).cpu()
        if mask is not None and self.fault == "padding gets outputs":
            out.hidden = out.hidden + self.o_proj.bias
        return out

    def step(self, x_t, state, *, streams=None, donate=False):
        donate = donate and self.fault != "a donated state stays usable"
        return super().step(x_t, state, streams=streams, donate=donate)

    def mix(self, x: Tensor, ctx: SequenceContext, state: ToyState | None) -> LayerOutput:
        fault = self.fault
        given = state
        if state is None:
            state = self.init_state(ctx.batch_size, device=x.device, dtype=x.dtype)
        kept = self.kept_on_module
        if fault == "memory kept on the module" and kept is not None and kept.shape == state.memory.shape:
            state = dataclasses.replace(state, memory=kept.to(state.memory))
        if fault == "the future leaks":
            x = x - 0.01 * x.mean(1, keepdim=True)
        if fault == "rows are mixed" and ctx.cu_seqlens is None:
            x = x - 0.01 * x.mean(0, keepdim=True)
        if fault == "the graph breaks" and float(x.detach().square().sum()) < 0:
            return LayerOutput(x)
        heads = (-1, WIDTH)
        q, k, v = (p(x).unflatten(-1, heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        if fault == "a gradient is cut":
            k = k.detach()
        if fault == "zero is divided by zero":
            v = v * (x.abs().amax(-1) / x.abs().amax(-1))[..., None, None]
        recent = state.recent.transpose(0, 1) if fault == "rows of the state are not first" else state.recent
        outputs, memories, rings = [], [], []
        carried = None
        for row, (start, *parts) in enumerate(zip(ctx.starts, *map(ctx.split, (q, k, v)), strict=True)):
            memory, past = state.memory[row], ring_past(recent[row], start)
            if fault == "a packed sequence reads the one before" and ctx.cu_seqlens is not None and row:
                memory = memory + carried
            if fault == "state lost at an unaligned split" and start % self.config.chunk_size:
                memory = torch.zeros_like(memory)
            grid = ctx.starts[0] if fault == "all rows follow the grid of the first" else start
            out, memory, history = self._read_sequence(*parts, memory, past, grid, ctx)
            carried = memory
            outputs.append(out)
            memories.append(memory)
            size = start + parts[0].shape[0] if fault == "the state grows" else WINDOW
            ring = ring_after(history, size, start + parts[0].shape[0])
            if fault == "unused slots hold leftovers":
                ring[start + parts[0].shape[0] :] = parts[0].shape[0]
            rings.append(ring)
        hidden = self.o_proj(ctx.merge(outputs).flatten(-2).to(x.dtype))
        aux = {"size": (hidden.new_zeros(ctx.batch_size), hidden.new_zeros(ctx.batch_size))}
        if fault == "a loss is a mean, not a sum":
            total = torch.stack([part.square().sum() / max(1, part.numel()) for part in ctx.split(v)])
            aux = {"size": (total, torch.ones_like(total))}
        if not ctx.return_state:
            return LayerOutput(hidden, aux=aux)
        memory = torch.stack(memories)
        if fault == "the carried state is detached":
            memory = memory.detach()
        if fault == "memory kept on the module":
            self.kept_on_module = memory.detach()
        if fault == "asking for the state changes outputs":
            hidden = hidden * 1.001
        if fault == "the caller's state is written" and given is not None:
            given.memory.copy_(memory.detach())
        if fault == "donation writes into shared memory" and given is not None:
            if not ctx.in_place and x.shape[1] == 0:
                return LayerOutput(hidden, dataclasses.replace(given), aux)
            if ctx.in_place:
                memory = given.memory.copy_(memory)
        rings = torch.stack(rings)
        if fault == "rows of the state are not first":
            rings = rings.transpose(0, 1)
        if fault == "a tail forgets on an empty call" and x.shape[1] == 0:
            rings = torch.zeros_like(rings)
        return LayerOutput(
            hidden, ToyState(num_tokens=ctx.num_tokens_after, memory=memory, recent=rings), aux
        )

    def _read_sequence(self, q, k, v, memory, past, start, ctx):
        """q (T, H, D), k and v (T, G, D), memory (G, D, D), past values (at most W, G, D)."""
        chunk = ctx.overrides.get("chunk_size", self.config.chunk_size)
        if self.fault == "an override has no effect":
            chunk = self.config.chunk_size
        history = torch.cat([past.to(v.dtype), v])
        decay = torch.sigmoid(self.decay.to(memory.dtype))[:, None, None]
        share = HEADS // GROUPS
        outputs = []
        for t in range(q.shape[0]):
            write = k[t, :, :, None].to(memory.dtype) * v[t, :, None].to(memory.dtype)
            memory = decay * memory + write
            read = memory.repeat_interleave(share, dim=0)
            if self.fault == "step groups heads in another order" and q.shape[0] == 1:
                read = memory.repeat(share, 1, 1)
            out = (q[t, :, None].to(memory.dtype) @ read).squeeze(1)  # (H, D)
            end = past.shape[0] + t + 1
            first = max(0, end - WINDOW)
            if self.fault == "the window is one short after a split" and start:
                first = max(first, past.shape[0] - (WINDOW - 2))
            window = history[first:end]
            if not (ctx.in_place and self.fault == "donation changes outputs"):
                out = out + window.to(memory.dtype).mean(0).repeat_interleave(share, dim=0)
            outputs.append(out)
            position = t + 1 if self.fault == "chunks on the grid of the call" else start + t + 1
            if position % chunk == 0:
                memory = memory / 2
        return (torch.stack(outputs) if outputs else q), memory, history

    def flops_per_token(self, num_tokens: int) -> int:
        flops = 4 * self.d_model * (HEADS + GROUPS) * WIDTH + 2 * HEADS * WIDTH * WIDTH
        return flops // 2 if self.fault == "declared FLOPs count a product once" else flops


FAULTS = {
    "all rows follow the grid of the first": "restart",
    "a donated state stays usable": "value",
    "a gradient is cut": "gradients",
    "a loss is a mean, not a sum": "extras",
    "a packed sequence reads the one before": "packing-float64",
    "a parameter is not initialised": "tooling",
    "a tail forgets on an empty call": "value",
    "accumulation in bfloat16": "bfloat16",
    "accumulation in float32 for float64": "streaming-float64",
    "an override has no effect": "overrides",
    "asking for the state changes outputs": "extras",
    "chunks on the grid of the call": "streaming-float64",
    "declared FLOPs count a product once": "flops",
    "donation changes outputs": "value",
    "donation writes into shared memory": "value",
    "unused slots hold leftovers": "streaming-float64",
    "memory kept on the module": "streaming-float64",
    "padding counts": "padding-float64",
    "padding decays": "padding-float64",
    "padding gets outputs": "padding-float64",
    "rows are mixed": "rows",
    "rows of the state are not first": "rows",
    "state lost at an unaligned split": "streaming-float64",
    "step groups heads in another order": "streaming-float64",
    "the caller's state is written": "value",
    "the carried state is detached": "gradients",
    "the future leaks": "causality",
    "the graph breaks": "compile",
    "the state grows": "size",
    "the window is one short after a split": "streaming-float64",
    "zero is divided by zero": "bfloat16",
}


def _toy(fault: str = "") -> Toy:
    torch.manual_seed(0)
    return Toy(ToyConfig(d_model=6, fault=fault))


def test_the_healthy_twin_passes_every_check():
    report = check_mixer(_toy(), splits=10)
    assert set(FAULTS.values()) <= set(report.errors)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault):
    check = contract_checks(_toy(fault), splits=10)[FAULTS[fault]]
    name = FAULTS[fault].split("-")[0]
    with pytest.raises(ContractError, match=rf"^{name}"):
        check()


def test_bites_catches_a_memory_that_is_never_read():
    class Deaf(Toy):
        def mix(self, x, ctx, state):
            return LayerOutput(self.o_proj(self.q_proj(x)), super().mix(x, ctx, state).state)

    with pytest.raises(ContractError, match=r"^bites"):
        contract_checks(Deaf(ToyConfig(d_model=6)))["bites"]()
