"""BASED modules against stored outputs of the paper's code (linear_attention.md: based_module, baseconv*).

The arrays are float64 and the layer agrees to rounding, so the bound is far below the 1e-4 that the file asks
for.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from memzoo.layers import TokenMixer, build_mixer
from memzoo.layers.parts.feature_maps import make_feature_map

DATA = np.load(Path(__file__).parent / "linear_attention_a.npz")
BOUND = 1e-12
NAMES = {"q_proj": "proj_q", "k_proj": "proj_k", "v_proj": "proj_v", "o_proj": "out_proj"}


def golden(name: str) -> Tensor:
    return torch.from_numpy(DATA[name])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=BOUND)


def based(feature_map: str) -> TokenMixer:
    mixer = build_mixer(
        {
            "type": "based",
            "d_model": 24,
            "num_heads": 2,
            "feature_dim": 4,
            "feature_map": feature_map,
            "eps": 1e-12,
            "chunk_size": 4,
        }
    ).double()
    for ours, theirs in NAMES.items():
        getattr(mixer, ours).weight.data = golden(f"based_module.{theirs}.weight")
    return mixer


@pytest.mark.parametrize("feature_map", ["taylor", "taylor_compact"])
def test_based_outputs_and_gradients(feature_map: str) -> None:
    mixer = based(feature_map)
    x = golden("based_module.x").requires_grad_()
    y = mixer(x).hidden
    assert_close(y, golden("based_module.y"))
    y.backward(golden("based_module.dy"))
    assert_close(x.grad, golden("based_module.grad_x"))
    for ours, theirs in NAMES.items():
        assert_close(getattr(mixer, ours).weight.grad, golden(f"based_module.grad_{theirs}.weight"))


def test_based_state_in_the_layout_of_the_paper() -> None:
    state = based("taylor")(golden("based_module.x"), return_state=True).state
    assert_close(state.memory.transpose(-1, -2), golden("based_module.kv_state"))
    assert_close(state.normalizer, golden("based_module.k_state"))


def test_based_compact_state_holds_the_same_memory() -> None:
    state = based("taylor_compact")(golden("based_module.x"), return_state=True).state
    probe = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expanded, compact = make_feature_map("taylor", 4)(probe), make_feature_map("taylor_compact", 4)(probe)
    expected = torch.einsum("pf,bhvf->bhpv", expanded, golden("based_module.kv_state"))
    assert_close(torch.einsum("pf,bhfv->bhpv", compact, state.memory), expected)


@pytest.mark.parametrize("feature_map", ["taylor", "taylor_compact"])
def test_based_prefill_then_decode(feature_map: str) -> None:
    mixer, x = based(feature_map), golden("based_module.x")
    out = mixer(x[:, :5], return_state=True)
    pieces, state = [out.hidden], out.state
    for t in range(5, 14):
        out = mixer.step(x[:, t], state, donate=True)
        pieces.append(out.hidden[:, None])
        state = out.state
    assert_close(torch.cat(pieces, dim=1), golden("based_module.y"))


def test_gated_base_conv() -> None:
    mixer = build_mixer({"type": "base_conv", "d_model": 24, "expand": 4, "conv_size": 3}).double()
    weights = {
        "in_proj.weight": golden("baseconv.in_proj.weight"),
        "in_proj.bias": golden("baseconv.in_proj.bias"),
        "out_proj.weight": golden("baseconv.out_proj.weight"),
        "out_proj.bias": golden("baseconv.out_proj.bias"),
        "conv_weight": golden("baseconv.conv.conv.weight").squeeze(1),
    }
    mixer.load_state_dict(weights)
    assert_close(mixer(golden("baseconv.x")).hidden, golden("baseconv.y"))


def test_base_conv_of_zoology() -> None:
    mixer = build_mixer({"type": "base_conv", "d_model": 24, "variant": "zoology", "conv_size": 3}).double()
    weights = {
        "in_proj.weight": golden("baseconv_zoology.projection.weight"),
        "in_proj.bias": golden("baseconv_zoology.projection.bias"),
        "conv_weight": golden("baseconv_zoology.conv.conv.weight").squeeze(1),
        "conv_bias": golden("baseconv_zoology.conv.conv.bias"),
    }
    mixer.load_state_dict(weights)
    assert_close(mixer(golden("baseconv_zoology.x")).hidden, golden("baseconv_zoology.y"))
