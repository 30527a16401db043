"""The whole LaCT layer against the official code (lact.md)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from memzoo.layers import build_mixer
from memzoo.layers.contract import TokenMixer
from memzoo.testing import assert_close

DATA = np.load(Path(__file__).parent / "lact_a.npz")
CASES = json.loads(str(DATA["config_json"]))
BOUND = 1e-7  # of lact.md: rates pass through float32 in the reference
OFFSET = math.log(math.expm1(0.001))  # which the reference adds to the rates before the softplus


def load(case: str) -> dict[str, Tensor]:
    prefix = f"{case}__"
    return {
        name.removeprefix(prefix): torch.from_numpy(DATA[name])
        for name in DATA.files
        if name.startswith(prefix)
    }


def gate_up_down(rates: Tensor) -> Tensor:
    """Rows of the file are gate, down, up per head."""
    return rates.unflatten(0, (-1, 3))[:, [0, 2, 1]].flatten(0, 1)


def lact(case: str) -> TokenMixer:
    config, arrays = CASES[case], load(case)
    is_low_rank = config["w0_w2_low_rank"] > 0
    mixer = build_mixer(
        {
            "type": "lact",
            "d_model": config["hidden_size"],
            "num_heads": config["num_attn_heads"],
            "fast_heads": config["num_lact_heads"],
            "hidden_mult": config["inter_multi"],
            "low_rank": config["w0_w2_low_rank"] if is_low_rank else None,
            "window_size": config["window_size"],
            "chunk_size": config["lact_chunk_size"],
            "qk_norm": config["attn_qk_norm"],
            "value_silu": not config["no_v_silu"],
            "memory_rope": not config["ttt_nope"],
            "rope_theta": config["rope_theta"],
            "momentum": config["use_momentum"],
        }
    ).double()
    q, k, v = arrays["p.qkv.weight"].chunk(3)
    values = {
        "q_proj.weight": q,
        "k_proj.weight": k,
        "v_proj.weight": v,
        "o_proj.weight": arrays["p.o_proj.weight"],
        "qk_scale": arrays["p.qk_scale"].T,
        "qk_offset": arrays["p.qk_offset"].T,
        "net.rates.weight": gate_up_down(arrays["p.lr_proj.weight"]),
        "net.rates.bias": gate_up_down(arrays["p.lr_proj.bias"]) + OFFSET,
        "scale_proj.weight": arrays["p.ttt_scale_proj.weight"],
        "scale_proj.bias": arrays["p.ttt_scale_proj.bias"],
        "memory_norm.weight": arrays["p.ttt_norm.weight"],
    }
    if config["attn_qk_norm"]:
        values |= {f"{name}.weight": arrays[f"p.{name}.weight"] for name in ("q_norm", "k_norm")}
    if config["use_momentum"]:
        values |= {f"net.momentum.{name}": arrays[f"p.momentum_proj.0.{name}"] for name in ("weight", "bias")}
    if is_low_rank:
        for index, name in enumerate(("w0", "w2")):
            values[f"net.left.{index}"] = arrays[f"p.{name}.w_left"]
            values[f"net.right.{index}"] = arrays[f"p.{name}.w_right"]
        values["net.full.0"] = arrays["p.w1"]
    else:
        values |= {f"net.full.{i}": arrays[f"p.{name}"] for i, name in enumerate(("w0", "w2", "w1"))}
    mixer.load_state_dict(values)
    return mixer


@pytest.mark.parametrize("case", ["layer", "layer_lr"])
def test_output_and_gradient(case: str) -> None:
    mixer, arrays = lact(case), load(case)
    x = arrays["x"].requires_grad_()
    y = mixer(x).hidden
    assert_close("y", y, arrays["y"], BOUND)
    (grad,) = torch.autograd.grad(y, x, arrays["grad_y"])
    assert_close("grad_x", grad, arrays["grad_x"], BOUND)


@pytest.mark.parametrize("case", ["layer", "layer_lr"])
def test_token_by_token(case: str) -> None:
    mixer, arrays = lact(case), load(case)
    state, outputs = mixer.init_state(len(arrays["x"])), []
    with torch.no_grad():
        for x_t in arrays["x"].unbind(1):
            out = mixer.step(x_t, state)
            state = out.state
            outputs.append(out.hidden)
    assert_close("y", torch.stack(outputs, 1), arrays["y"], BOUND)
