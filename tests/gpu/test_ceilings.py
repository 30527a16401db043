"""Memory and time on CUDA grow as they should, whatever the card."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memzoo.kernels import attention, linear_attention
from memzoo.layers import build_mixer, list_mixers
from memzoo.testing import Subject, small_configs

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and torch finds none", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import common

CUDA = torch.device("cuda")
pytestmark = pytest.mark.gpu


def _window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, window_size=512, num_sinks=4).output


def _linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return linear_attention(q, k, v)[0]


def _run(function: Callable[[Tensor, Tensor, Tensor], Tensor], tokens: int) -> Callable[[], object]:
    inputs = [
        torch.randn(1, tokens, 16, 64, device=CUDA, dtype=torch.bfloat16).requires_grad_() for _ in range(3)
    ]
    return lambda: torch.autograd.grad(function(*inputs).sum(), inputs)


@pytest.mark.parametrize("function", [_window, _linear])
def test_memory_and_time_are_linear_in_length(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    short, long = _run(function, 16384), _run(function, 32768)
    short(), long()
    memory = [common.peak_memory(run, CUDA) for run in (short, long)]
    assert memory[0] is not None
    assert memory[1] is not None
    assert memory[1] < 2.1 * memory[0]
    times = common.time_interleaved({"short": short, "long": long}, device=CUDA)
    # quadratic work would take four times as long
    assert times["long"]["median_ms"] < 2.6 * times["short"]["median_ms"]


@pytest.mark.parametrize("kind", list_mixers())
def test_a_donated_step_holds_no_more_than_state_and_token(kind: str) -> None:
    mixer = build_mixer(small_configs(kind)[0])
    subject = Subject(mixer, dtype=torch.float32, device="cuda")
    streams = {name: stream[:, 0] for name, stream in subject.streams(4, 1).items()}
    with torch.no_grad():
        state = subject.mixer(subject.inputs(4), streams=subject.streams(4), return_state=True).state
        token = subject.inputs(4, 1)[:, 0]
        for _ in range(2):
            state = subject.mixer.step(token, state, streams=streams, donate=True).state
        held = torch.cuda.memory_allocated()
        for _ in range(64):
            state = subject.mixer.step(token, state, streams=streams, donate=True).state
        declared = subject.mixer.state_num_bytes(int(state.num_tokens[0]), 4)
        assert torch.cuda.memory_allocated() - held <= max(declared, 1 << 16)
