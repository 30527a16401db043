"""Retention gates against stored numbers of the authors' code and formulas (trimkv.md beside this file).

Bounds as the file states: 1e-5 absolute for gates, attention and sums.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from memzoo.kernels import decayed_attention, soft_cache_size

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
