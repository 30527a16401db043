"""Retention gates against stored numbers of the authors' code and formulas (trimkv.md beside this file).

Bounds as the file states: 1e-5 absolute for gates, attention and sums.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from memzoo.kernels import decayed_attention, soft_cache_size
from memzoo.layers.parts.retention_gate import RetentionGate
from memzoo.train.conversion.retention import capacity_loss, distillation_loss

FILE = np.load(Path(__file__).parent / "trimkv_a.npz")
BOUND = 1e-5
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])


def array(name: str) -> Tensor:
    """A stored array, floating-point numbers in float64."""
    values = torch.from_numpy(FILE[name])
    return values.double() if values.is_floating_point() else values


def by_tokens(name: str) -> Tensor:
    """A stored array (B, heads, T, ...) as (B, T, heads, ...)."""
    return array(name).transpose(1, 2)


def agree(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found.detach() - expected).abs().max()) <= BOUND


@pytest.mark.parametrize("kind", ["mlp", "kv", "kv_swiglu"])
def test_gates(kind: str) -> None:
    theirs = {"mlp": "gate_rg", "kv": "gate_rg2", "kv_swiglu": "gate_rg3"}[kind]
    gate = RetentionGate(32, 2, 8, width=16, kind=kind).double()
    names = {"linear1": "in_proj", "linear2": "out_proj", "gate_proj": "in_proj", "down_proj": "out_proj"}
    weights = {}
    for name in FILE.files:
        if name.startswith(f"{theirs}."):
            module, _, rest = name.removeprefix(f"{theirs}.").partition(".")
            weights[".".join(filter(None, (names.get(module, module), rest)))] = array(name)
    gate.load_state_dict(weights)
    k, v = by_tokens("gate_kv").chunk(2, -1)
    agree(gate(array("gate_x"), k, v), by_tokens(f"{theirs}_log_beta"))


@BACKENDS
def test_attention_and_its_gradients(backend: str) -> None:
    leaves = [by_tokens(f"attn_{name}").requires_grad_() for name in ("q", "k", "v", "log_beta")]
    out = decayed_attention(*leaves, scale=float(array("attn_scale")), backend=backend)
    agree(out, by_tokens("attn_out_additive"))
    found = torch.autograd.grad((out * by_tokens("attn_w")).sum(), leaves)
    for grad, name in zip(found, ("dq", "dk", "dv", "dlog_beta"), strict=True):
        agree(grad, by_tokens(f"attn_{name}"))


def test_attention_with_scaled_logits() -> None:
    q, k, v, g = (by_tokens(f"attn_{name}") for name in ("q", "k", "v", "log_beta"))
    out = decayed_attention(q, k, v, g, form="scaled", scale=float(array("attn_scale")))
    agree(out, by_tokens("attn_out_logit_scale"))


@BACKENDS
def test_soft_cache_size(backend: str) -> None:
    g = by_tokens("attn_log_beta")
    agree(soft_cache_size(g, backend=backend), by_tokens("retention_sum"))
    packed = soft_cache_size(g.flatten(0, 1)[None], cu_seqlens=packed_bounds(), backend=backend)
    agree(packed.view_as(g), by_tokens("packed_retention_sum"))


def packed_bounds() -> Tensor:
    """Boundaries of all documents of all rows, one row after the other."""
    begins = (array("packed_positions").flatten() == 0).nonzero().squeeze(1)
    return torch.cat([begins, torch.tensor([array("packed_positions").numel()])])


@BACKENDS
def test_capacity_losses_and_their_gradients(backend: str) -> None:
    budget, positions = float(array("cap_budget")), array("packed_positions")
    g = by_tokens("attn_log_beta").requires_grad_()
    loss = capacity_loss(soft_cache_size(g, backend=backend), budget)
    agree(loss, array("cap_loss_active"))
    agree(torch.autograd.grad(loss, g)[0], by_tokens("cap_loss_active_dlog_beta"))
    sizes = soft_cache_size(g.detach(), backend=backend)
    agree(capacity_loss(sizes, budget, normalizer="paper"), array("cap_loss_paper_per_head").mean())
    for row, column in ((0, 0), (1, 1)):
        one = capacity_loss(sizes[row : row + 1, :, column : column + 1], budget, normalizer="paper")
        agree(one, array("cap_loss_paper_per_head")[row, column])
    agree(capacity_loss(sizes, budget, scope="global"), array("cap_loss_global"))
    packed = g.flatten(0, 1)[None]
    sizes = soft_cache_size(packed, cu_seqlens=packed_bounds(), backend=backend)
    loss = capacity_loss(sizes, budget, positions=positions.view(1, -1))
    agree(loss, array("packed_cap_loss_active"))
    agree(torch.autograd.grad(loss, g)[0], by_tokens("packed_cap_loss_active_dlog_beta"))


@pytest.mark.parametrize("kinds", ["fwkl", "rvkl", "ntp", "fwkl_ntp"])
@pytest.mark.parametrize("block_size", [5, 8192])
def test_distillation(kinds: str, block_size: int) -> None:
    student, teacher, labels = (array(f"distill_{name}") for name in ("student", "teacher", "labels"))
    found = distillation_loss(
        student, teacher, labels, kinds=kinds.split("_"), mask="same", block_size=block_size
    )
    agree(found, array(f"distill_{kinds}"))
