"""The whole AllMem layer against an independent computation of the paper's equations (allmem.md)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memzoo.kernels import unpack_fast_weights
from memzoo.layers import build_mixer
from memzoo.layers.contract import TokenMixer
from memzoo.testing import assert_close

DATA = np.load(Path(__file__).parent / "allmem_a.npz")
BOUND = 1e-10
CASE = json.loads(str(DATA["config_json"]))["layer"]


def array(name: str) -> Tensor:
    return torch.from_numpy(DATA[f"layer__{name}"])


# parameter -> arrays of the file, which lie one below the other where there are several; matrices act on the
# right there
PARAMETERS = {
    "mixers.0.q_proj.weight": ("A_Q",),
    "mixers.0.k_proj.weight": ("A_K",),
    "mixers.0.v_proj.weight": ("A_V",),
    "mixers.0.o_proj.weight": ("A_O",),
    "mixers.1.q_proj.weight": ("W_Q",),
    "mixers.1.k_proj.weight": ("W_K",),
    "mixers.1.v_proj.weight": ("W_V",),
    "mixers.1.o_proj.weight": ("W_O",),
    "mixers.1.conv.weight": ("conv_q", "conv_k", "conv_v"),
    "mixers.1.q_norm.weight": ("q_norm",),
    "mixers.1.k_norm.weight": ("k_norm",),
    "mixers.1.o_norm.weight": ("out_norm",),
    "mixers.1.gate.weight": ("W_gate",),
    "mixers.1.gate.bias": ("b_gate",),
    "mixers.1.net.rates.weight": ("W_eta",),
    "mixers.1.net.rates.bias": ("b_eta",),
    "mixers.1.net.momentum.weight": ("W_mu",),
    "mixers.1.net.momentum.bias": ("b_mu",),
    "mixers.1.net.full.0": ("Wg",),
    "mixers.1.net.full.1": ("Wu",),
    "mixers.1.net.full.2": ("Wd",),
    "coefficient": ("alpha",),
}
TURNED = ("W_", "A_")


def golden(prefix: str, name: str, shape: torch.Size) -> Tensor:
    parts = [array(f"{prefix}{part}") for part in PARAMETERS[name]]
    if PARAMETERS[name][0].startswith(TURNED):
        parts = [part.T for part in parts]
    return torch.cat(parts).reshape(shape)


def allmem() -> TokenMixer:
    mixer = build_mixer(
        {
            "type": "allmem",
            "d_model": 24,
            "num_heads": CASE["num_heads"],
            "num_kv_heads": CASE["num_kv_heads"],
            "head_dim": CASE["head_dim"],
            "rope_theta": CASE["rope_theta"],
            "window_size": CASE["window"],
            "num_sinks": CASE["sinks"],
            "mem_heads": CASE["n_mem_heads"],
            "mem_dim": CASE["mem_dim"],
            "hidden_mult": CASE["hidden_mult"],
            "conv_size": CASE["conv_kernel"],
            "chunk_size": CASE["chunk_size"],
            "norm_eps": CASE["rms_eps"],
        }
    ).double()
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name in PARAMETERS:
                parameter.copy_(golden("p.", name, parameter.shape))
        # the block has normalised with the weight of the attention
        mixer.mixers[1].input_scale.copy_(array("p.in_norm") / array("p.attn_in_norm"))
    return mixer


def block_norm(x: Tensor) -> Tensor:
    wide = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + CASE["rms_eps"])
    return wide * array("p.attn_in_norm")


def test_outputs_of_both_branches() -> None:
    mixer, hidden = allmem(), block_norm(array("x"))
    assert_close("y", mixer(hidden).hidden, array("y"), BOUND)
    assert_close("y_swa", mixer.mixers[0](hidden).hidden, array("y_swa"), BOUND)
    assert_close("y_mem", mixer.mixers[1](hidden).hidden, array("y_mem"), BOUND)


def test_gradients_of_input_and_every_parameter() -> None:
    mixer = allmem()
    x, scale = array("x").requires_grad_(), mixer.mixers[1].input_scale
    named = {name: parameter for name, parameter in mixer.named_parameters() if parameter is not scale}
    assert set(named) == set(PARAMETERS)
    y = mixer(block_norm(x)).hidden
    grads = torch.autograd.grad(y, [x, scale, *named.values()], array("grad_y"))
    assert_close("x", grads[0], array("grad_x"), BOUND)
    assert_close("in_norm", grads[1] / array("p.attn_in_norm"), array("grad_p.in_norm"), BOUND)
    for (name, parameter), grad in zip(named.items(), grads[2:], strict=True):
        assert_close(name, grad, golden("grad_p.", name, parameter.shape), BOUND)


def test_token_by_token_and_the_final_net() -> None:
    mixer, hidden = allmem(), block_norm(array("x"))
    state, outputs = mixer.init_state(len(hidden)), []
    with torch.no_grad():
        for x_t in hidden.unbind(1):
            out = mixer.step(x_t, state)
            state = out.state
            outputs.append(out.hidden)
    assert_close("y", torch.stack(outputs, 1), array("y"), BOUND)
    memory = mixer.mixers[1]
    net = state.mixers[1].net
    for kind, flat in (("", net.weights), ("M_", net.momentum)):
        for name, matrix in zip(
            ("Wg", "Wu", "Wd"), unpack_fast_weights(flat, memory.net.shapes), strict=True
        ):
            assert_close(f"{kind}{name}", matrix, array(f"final_{kind}{name}"), BOUND)
