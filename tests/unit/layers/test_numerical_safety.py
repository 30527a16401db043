"""Every linear and state-space mixer at its extremes, and over a hundred thousand tokens in bfloat16.

A layer is driven through its own parameters: tokens carry a switch (-1 or 1) in their first channel and a
constant in their second, and projections that say one thing or another by the switch alone.
"""

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from memzoo.layers import TokenMixer, build_mixer, list_mixers, probe
from memzoo.layers.gated_linear_attention import GatedLinearAttention
from memzoo.layers.gated_slot_attention import GatedSlotAttention
from memzoo.layers.linear_attention import LinearAttention
from memzoo.layers.mamba1 import Mamba1
from memzoo.layers.mamba2 import Mamba2
from memzoo.layers.mamba3 import Mamba3
from memzoo.layers.mlstm import MLSTM
from memzoo.layers.parts.decay import SigmoidDecay, SoftplusDecay
from memzoo.layers.parts.projection import LowRankLinear
from memzoo.layers.registry import mixer_entry
from memzoo.testing import assert_close, small_configs

KINDS = (GatedLinearAttention, GatedSlotAttention, LinearAttention, MLSTM, Mamba1, Mamba2, Mamba3)
# with all their presets, present and future
NAMES = [name for name in list_mixers() if issubclass(mixer_entry(name).mixer, KINDS)]
CONFIGS = [pytest.param(name, i, id=f"{name}-{i}") for name in NAMES for i in (0, 1)]

TOKENS, CUT, CHUNK = 50, 21, 32
STRONG = -20.0  # log-decay per token
SHUT, OPEN = -300.0, 300.0  # beyond these a float32 sigmoid is 0 or 1


def say(weight: Tensor, low: float, high: float) -> None:
    """Rows of a projection give `low` where the switch is -1 and `high` where it is 1."""
    weight.zero_()
    weight[:, 0], weight[:, 1] = (high - low) / 2, (high + low) / 2


def say_all(proj: nn.Module, low: float, high: float) -> None:
    """`say` for a whole projection, of low rank too."""
    if isinstance(proj, LowRankLinear):
        proj.down.weight.zero_()
        proj.down.weight.fill_diagonal_(1)  # the first two channels pass
        proj = proj.up
    say(proj.weight, low, high)
    if proj.bias is not None:
        proj.bias.zero_()


def inverse_softplus(step: float) -> float:
    return SHUT if step == 0 else math.log(math.expm1(step))


def set_decay(mixer: TokenMixer, low: float, high: float) -> bool:
    """Log-decays `low` where the switch is -1 and `high` where it is 1; False where they are fixed."""
    if isinstance(mixer, GatedLinearAttention):
        decay = mixer.decay
        if isinstance(decay, SigmoidDecay):
            say_all(decay.proj, *(16 * g if g else 2 * OPEN for g in (low, high)))
        elif isinstance(decay, SoftplusDecay):
            decay.A_log.zero_()
            decay.dt_bias.zero_()
            say_all(decay.proj, *(inverse_softplus(-g) for g in (low, high)))
        else:
            return False
    elif isinstance(mixer, GatedSlotAttention):
        say_all(mixer.f_proj, *(8 * g if g else 2 * OPEN for g in (low, high)))
    elif isinstance(mixer, MLSTM):
        say_all(mixer.forget_gate, *(g or OPEN for g in (low, high)))
    elif isinstance(mixer, Mamba1):
        set_steps_of_mamba1(mixer, *(inverse_softplus(g / STRONG) for g in (low, high)))
        mixer.A_log.fill_(math.log(-STRONG))
    elif isinstance(mixer, Mamba2):
        rows = mixer.in_proj.weight[-mixer.config.num_heads :]
        say(rows, *(inverse_softplus(g / STRONG) for g in (low, high)))
        mixer.A_log.fill_(math.log(-STRONG))
        mixer.dt_bias.zero_()
    elif isinstance(mixer, Mamba3):
        rows = mixer.in_proj.weight.split(mixer.widths)
        say(rows[4], *(inverse_softplus(-g) for g in (low, high)))
        rows[5].zero_()  # a rate of 1
        mixer.dt_bias.zero_()
    else:
        return False
    return True


def set_steps_of_mamba1(mixer: Mamba1, low: float, high: float) -> None:
    """Steps before their softplus: channel 0 carries the switch through convolution and silu."""
    mixer.in_proj.weight[0].zero_()
    mixer.in_proj.weight[0, 0] = 5
    if mixer.in_proj.bias is not None:
        mixer.in_proj.bias.zero_()
    mixer.conv1d.weight[0].zero_()
    mixer.conv1d.weight[0, -1] = 1
    if mixer.conv1d.bias is not None:
        mixer.conv1d.bias[0] = 0
    mixer.x_proj.weight[0].zero_()
    mixer.x_proj.weight[0, 0] = 1
    left, right = nn.functional.silu(torch.tensor([-5.0, 5.0])).tolist()
    slope = (high - low) / (right - left)
    mixer.dt_proj.weight.zero_()
    mixer.dt_proj.weight[:, 0] = slope
    mixer.dt_proj.bias.fill_(low - slope * left)


def set_write(mixer: TokenMixer, low: float, high: float) -> bool:
    """Write steps of the delta rule, input gates of mLSTM, lambda of Mamba-3: before their sigmoid."""
    if isinstance(mixer, GatedLinearAttention) and mixer.beta is not None:
        say_all(mixer.beta.proj, low, high)
    elif isinstance(mixer, MLSTM):
        say_all(mixer.input_gate, low, high)
    elif isinstance(mixer, Mamba3):
        say(mixer.in_proj.weight.split(mixer.widths)[6], low, high)
    else:
        return False
    return True


def set_keys_to_zero(mixer: TokenMixer) -> bool:
    if isinstance(mixer, Mamba1):
        mixer.x_proj.weight.split([mixer.config.step_width, *[mixer.config.d_state] * 2])[1].zero_()
    elif isinstance(mixer, Mamba2):
        start = 2 * mixer.channels
        end = start + mixer.config.num_groups * mixer.config.d_state
        mixer.in_proj.weight[start:end].zero_()
        biases = (mixer.in_proj.bias, start), (mixer.conv1d.bias, mixer.channels)
        for bias, first in biases:
            if bias is not None:
                bias[first : first + end - start].zero_()
    elif isinstance(mixer, Mamba3):
        mixer.in_proj.weight.split(mixer.widths)[2].zero_()
        mixer.B_bias.zero_()
    elif hasattr(mixer, "k_proj"):
        mixer.k_proj.weight.zero_()
    else:
        return False
    return True


def set_output_gate(mixer: TokenMixer, low: float, high: float) -> bool:
    if isinstance(mixer, (Mamba2, Mamba3)):
        say(mixer.in_proj.weight[: mixer.channels], low, high)
    elif isinstance(mixer, Mamba1):
        say(mixer.in_proj.weight[mixer.channels :], low, high)
    elif getattr(mixer, "gate", None) is not None:
        say_all(mixer.gate.proj, low, high)
    else:
        return False
    return True


def set_nothing(mixer: TokenMixer) -> bool:
    return True


# name -> what it does to the parameters of a layer (False where it has no such part), and to its tokens
EXTREMES: dict[str, tuple[Callable[[TokenMixer], bool], Callable[[Tensor], Tensor]]] = {
    "forgets all": (partial(set_decay, low=STRONG, high=STRONG), Tensor.clone),
    "forgets nothing": (partial(set_decay, low=0.0, high=0.0), Tensor.clone),
    "forgets all or little": (partial(set_decay, low=STRONG, high=-0.05), Tensor.clone),
    "writes nothing": (partial(set_write, low=SHUT, high=SHUT), Tensor.clone),
    "writes all": (partial(set_write, low=OPEN, high=OPEN), Tensor.clone),
    "writes all or nothing": (partial(set_write, low=SHUT, high=OPEN), Tensor.clone),
    "zero keys": (set_keys_to_zero, Tensor.clone),
    "huge gates": (partial(set_output_gate, low=-1e4, high=1e4), Tensor.clone),
    "zero tokens": (set_nothing, Tensor.zero_),
    "equal tokens": (set_nothing, lambda x: x.copy_(x[:, :1].clone())),
    "huge tokens": (set_nothing, lambda x: x.mul_(1e4)),
}


def build(name: str, index: int) -> TokenMixer:
    config = small_configs(name)[index]
    if "chunk_size" in config:
        config["chunk_size"] = CHUNK
    torch.manual_seed(0)
    mixer = build_mixer(config)
    with torch.no_grad():
        for parameter in mixer.parameters():  # away from the zeros of a fresh layer
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return mixer


def draw_tokens(mixer: TokenMixer, num_tokens: int) -> Tensor:
    """(1, T, M) with switch and constant."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, num_tokens, mixer.d_model, generator=generator)
    x[..., 0] = 1 - 2.0 * (torch.rand(1, num_tokens, generator=generator) < 0.2)
    x[..., 1] = 1
    return x


def run(
    mixer: TokenMixer, x: Tensor, dtype: torch.dtype, pieces: list[int], grads: bool
) -> dict[str, Tensor]:
    """Output and final state for a call per piece; if asked for, gradients of tokens and parameters."""
    mixer = copy.deepcopy(mixer).to(dtype).requires_grad_(grads)
    leaf = x.detach().to(dtype, copy=True).requires_grad_(grads)
    outputs, state = [], None
    for part in leaf.split(pieces, 1):
        out = mixer(part, state, return_state=True)
        outputs.append(out.hidden)
        state = out.state
    results = {"output": torch.cat(outputs, 1)}
    results |= {key: t for key, t in state.named_tensors() if t.is_floating_point()}
    return results | (gradients(mixer, leaf, results) if grads else {})


def gradients(mixer: TokenMixer, x: Tensor, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a random function of the results, by tokens and parameters."""
    generator = torch.Generator().manual_seed(2)
    total = sum((t.float() * torch.randn(t.shape, generator=generator)).sum() for t in results.values())
    leaves = {"x": x, **dict(mixer.named_parameters())}
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {f"d {key}": grad for key, grad in zip(leaves, grads, strict=True) if grad is not None}


def assert_finite(case: str, tensors: dict[str, Tensor]) -> None:
    broken = [key for key, t in tensors.items() if not bool(torch.isfinite(t).all())]
    assert not broken, f"{case}: {broken}"


@pytest.mark.parametrize(("name", "index"), CONFIGS)
def test_extremes_are_finite_and_may_be_cut(name: str, index: int) -> None:
    whole, halves = [TOKENS], [CUT, TOKENS - CUT]
    driven = []
    for extreme, (drive, shape_tokens) in EXTREMES.items():
        mixer = build(name, index)
        with torch.no_grad():
            if not drive(mixer):
                continue
            x = shape_tokens(draw_tokens(mixer, TOKENS))
        driven.append(extreme)
        expected = run(mixer, x, torch.float32, whole, grads=False)
        found = run(mixer, x, torch.float32, halves, grads=True)
        for key, tensor in expected.items():
            assert_close(f"{extreme}: {key}", found[key], tensor, 1e-5)
        assert_finite(f"{extreme}, float32", found)
        for pieces in (whole, halves):
            grads = pieces is whole
            assert_finite(f"{extreme}, bfloat16", run(mixer, x, torch.bfloat16, pieces, grads))
    assert {"zero keys", "zero tokens", "equal tokens", "huge tokens"} <= set(driven)


@pytest.mark.parametrize("name", NAMES)
def test_the_decays_are_those_that_were_set(name: str) -> None:
    """For layers that show their log-decays."""
    for index in (0, 1):
        mixer = build(name, index)
        with torch.no_grad():
            if not set_decay(mixer, STRONG, 0.0):
                continue
            x = draw_tokens(mixer, TOKENS)
            with probe() as seen:
                mixer(x)
        for log_decay in seen["log_decay"]:
            lowest = getattr(mixer.config, "decay_bound", None) or STRONG
            assert_close("log-decay", log_decay.amin((0, 1)), torch.full_like(log_decay[0, 0], lowest), 1e-4)
            assert_close("log-decay", log_decay.amax((0, 1)), torch.zeros_like(log_decay[0, 0]), 1e-12)


# A sum without forgetting grows with the tokens, at most; every other memory is bounded.
GROWING = {"based", "dpfp", "gated_linear_attention", "hedgehog", "linear_attention", "rebased"}
EARLY, LONG, LAST = 10_000, 100_000, 2_500
SMALL_STATE = {"d_state": 4, "head_dim": 4, "expand": 1, "chunk_size": 128}
ONE_HEAD = {"num_heads": 1, "chunk_size": 128}
LONG_CONFIGS: dict[str, dict[str, object]] = {
    "based": {**ONE_HEAD, "feature_dim": 4},
    "mamba1": {"d_state": 4, "expand": 1},
    "mamba2": SMALL_STATE,
    "mamba3": SMALL_STATE,
    "rebased": {**ONE_HEAD, "feature_dim": 4},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_thousand_tokens_in_bfloat16(name: str) -> None:
    """All but the last two pieces without gradient; those with one, through the state between them."""
    config = {"type": name, **LONG_CONFIGS.get(name, ONE_HEAD), "d_model": 8}
    torch.manual_seed(0)
    mixer = build_mixer(config).bfloat16()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, LONG, 8, generator=generator).bfloat16()
    with torch.no_grad():
        early = mixer(x[:, :EARLY], return_state=True)
        late = mixer(x[:, EARLY : LONG - 2 * LAST], early.state, return_state=True)
    state = late.state
    last = x[:, LONG - 2 * LAST :].requires_grad_()
    outputs = []
    for part in last.split(LAST, 1):
        out = mixer(part, state, return_state=True)
        outputs.append(out.hidden)
        state = out.state
    results = {"output": torch.cat(outputs, 1)}
    results |= {key: t for key, t in state.named_tensors() if t.is_floating_point()}
    assert_finite("end", results | gradients(mixer, last, results))
    assert_finite("middle", {"output": late.hidden, "early": early.hidden})
    growth = LONG / EARLY if name in GROWING else 1
    before = dict(early.state.named_tensors())
    for key, tensor in results.items():
        if key != "output":
            assert float(tensor.detach().abs().max()) <= 2 * growth * float(before[key].abs().max()), key
