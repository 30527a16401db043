"""Gated DeltaNet and KDA layers against stored outputs of released code (linear_attention.md: *_module).

The arrays are float32, computed by other code in float32: bounds as the file states, 1e-4.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from memzoo.layers import TokenMixer, build_mixer
from memzoo.layers.parts.decay import SoftplusDecay

DATA = np.load(Path(__file__).parent / "linear_attention_a.npz")
HEADS = {"d_model": 16, "num_heads": 2, "head_dim": 8, "value_dim": 8, "chunk_size": 5}
CONFIGS = {
    "gdn_module": {"type": "gated_delta_net", "num_value_heads": 4, "norm_eps": 1e-6, **HEADS},
    "kda_module": {"type": "kda", **HEADS},
}
WEIGHTS = {
    "gdn_module": {
        "q_proj.weight": "W_q",
        "k_proj.weight": "W_k",
        "v_proj.weight": "W_v",
        "conv.weight": "conv_weight",
        "decay.proj.weight": "W_a",
        "decay.A_log": "A_log",
        "decay.dt_bias": "dt_bias",
        "beta.proj.weight": "W_b",
        "gate.proj.weight": "W_z",
        "o_norm.weight": "norm_weight",
        "o_proj.weight": "W_o",
    },
    "kda_module": {
        "q_proj.weight": "q_proj.weight",
        "k_proj.weight": "k_proj.weight",
        "v_proj.weight": "v_proj.weight",
        "conv.weight": "conv1d.weight",
        "decay.proj.down.weight": "forget_gate.f_a_proj.weight",
        "decay.proj.up.weight": "forget_gate.f_b_proj.weight",
        "decay.A_log": "forget_gate.A_log",
        "decay.dt_bias": "forget_gate.dt_bias",
        "beta.proj.weight": "b_proj.weight",
        "gate.proj.down.weight": "g_a_proj.weight",
        "gate.proj.up.weight": "g_b_proj.weight",
        "o_norm.weight": "o_norm.weight",
        "o_proj.weight": "o_proj.weight",
    },
}


def golden(name: str) -> Tensor:
    return torch.from_numpy(DATA[name])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def build(case: str) -> TokenMixer:
    """The layer with every weight of the case; `load_state_dict` refuses what is missing."""
    mixer = build_mixer(CONFIGS[case])
    own = mixer.state_dict()
    mixer.load_state_dict(
        {name: golden(f"{case}.{theirs}").view_as(own[name]) for name, theirs in WEIGHTS[case].items()}
    )
    return mixer


@pytest.mark.parametrize("case", CONFIGS)
def test_outputs_gradients_and_states(case: str) -> None:
    mixer = build(case)
    x = golden(f"{case}.x").requires_grad_()
    out = mixer(x, return_state=True)
    assert_close(out.hidden, golden(f"{case}.y"))
    assert_close(out.state.memory, golden(f"{case}.final_state"))
    out.hidden.backward(golden(f"{case}.dy"))
    assert_close(x.grad, golden(f"{case}.grad_x"))
    for ours in ("decay.A_log", "decay.dt_bias"):
        grad = mixer.get_parameter(ours).grad
        assert_close(grad, golden(f"{case}.grad_{WEIGHTS[case][ours]}").view_as(grad))


def test_the_tail_is_the_stored_one_without_its_oldest_column() -> None:
    state = build("gdn_module")(golden("gdn_module.x"), return_state=True).state
    assert_close(state.tail.transpose(1, 2), golden("gdn_module.conv_state")[..., 1:])


@pytest.mark.parametrize("case", CONFIGS)
def test_prefill_then_decode(case: str) -> None:
    mixer, x = build(case), golden(f"{case}.x")
    out = mixer(x[:, :7], return_state=True)
    pieces, state = [out.hidden], out.state
    for t in range(7, 21):
        out = mixer.step(x[:, t], state, donate=True)
        pieces.append(out.hidden[:, None])
        state = out.state
    assert_close(torch.cat(pieces, dim=1), golden(f"{case}.y"))


@pytest.mark.parametrize(("bound", "array"), [(None, "g"), (-5.0, "g_lower_bound")])
def test_decays_of_kda(bound: float | None, array: str) -> None:
    x = golden("kda_gate.x")  # (B, T, heads, channels) before the gate: the projection is the identity
    part = SoftplusDecay(12, *x.shape[2:], bound=bound).to(x.dtype)
    part.proj.weight.data = torch.eye(12, dtype=x.dtype)
    part.A_log.data, part.dt_bias.data = golden("kda_gate.A_log").flatten(), golden("kda_gate.dt_bias")
    torch.testing.assert_close(part(x.flatten(-2)), golden(f"kda_gate.{array}"), rtol=0, atol=1e-12)
