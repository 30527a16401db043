"""Losses, mixing matrices and weight maps of conversion against the numbers of the papers' own code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memzoo.kernels import LinearState, linear_attention, linear_divergence
from memzoo.models.conversion import expand_gqa
from memzoo.train.conversion.losses import (
    attention_row_loss,
    attention_transfer_loss,
    hidden_alignment_loss,
    mixing_matrix_loss,
)

DATA = np.load(Path(__file__).parent / "conversion_a.npz")


def golden(name: str) -> Tensor:
    return torch.from_numpy(DATA[name])


def assert_close(actual: Tensor, expected: Tensor, bound: float = 1e-9) -> None:
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, atol=bound, rtol=0)


@pytest.mark.parametrize("window", ["sw", "tk"])
def test_attention_transfer(window: str) -> None:
    student, teacher = golden(f"lolcats.{window}.y"), golden("lolcats.teacher_y")
    loss = 1000 * attention_transfer_loss(student, teacher)
    assert_close(loss, golden(f"lolcats.{window}.loss_mse_x1000"))
    rows = attention_row_loss(golden(f"lolcats.{window}.attn"), golden("lolcats.teacher_attn"))
    assert_close(rows, golden(f"lolcats.{window}.loss_xent"))


def test_hidden_alignment() -> None:
    student, teacher = golden("loss.student_hidden"), golden("loss.teacher_hidden")
    assert_close(hidden_alignment_loss(student, teacher), golden("loss.hidden_radlads"))
    assert_close(hidden_alignment_loss(student, teacher, scaled=False), golden("loss.hidden_mohawk"))


@pytest.mark.parametrize("loss", [attention_transfer_loss, hidden_alignment_loss])
def test_normalised_losses_do_not_know_the_size_of_the_teacher(loss) -> None:
    student, teacher = golden("loss.student_hidden"), golden("loss.teacher_hidden")
    plain, louder = (loss(factor * student, factor * teacher, normalize=True) for factor in (1, 30))
    torch.testing.assert_close(plain, louder)
    assert loss(30 * student, 30 * teacher) > 20 * loss(student, teacher)


def test_divergence_per_token_and_the_published_sum() -> None:
    student, teacher = golden("loss.student_logits"), golden("loss.teacher_logits")
    identity = torch.eye(student.shape[-1], dtype=torch.float64)  # logits are their own hidden states
    flat = (x.flatten(0, 1) for x in (student, teacher))
    kl = linear_divergence(next(flat), identity, next(flat), identity)
    assert_close(kl, golden("loss.kl_per_token"))
    assert_close(kl * student.shape[1], golden("loss.kl_mambainllama_batchmean3d"))


def test_mixing_matrix_of_discrete_mamba2() -> None:
    x, c, b = golden("mohawk.x"), golden("mohawk.C"), golden("mohawk.B")  # (B, T, H, P), (B, T, H, N)
    g = F.logsigmoid(-golden("mohawk.A_log"))  # (B, T, H)
    out, state = linear_attention(c, b, x, g=g, scale=1.0, return_state=True)
    skip = golden("mohawk.D")[:, None] * x
    assert_close(out + skip, golden("mohawk.y"))
    assert isinstance(state, LinearState)
    assert_close(state.memory.transpose(-1, -2), golden("mohawk.final_state"))
    # the matrix, column by column: what token t reads of a 1 written by token s
    length, heads = x.shape[1], x.shape[2]
    ones = torch.eye(length, dtype=torch.float64)[None, :, None].expand(x.shape[0], -1, heads, -1)
    matrix = linear_attention(c, b, ones, g=g, scale=1.0)[0] + golden("mohawk.D")[:, None] * ones
    matrix = matrix.transpose(1, 2)  # (B, H, T, T)
    assert_close(matrix, golden("mohawk.matrix"))
    assert_close(mixing_matrix_loss(matrix, golden("mohawk.teacher_attn")), golden("mohawk.loss_stage1"))


def test_grouped_heads_are_repeated_as_wholes() -> None:
    heads, groups = int(DATA["gqa.num_kv_heads"]), int(DATA["gqa.groups"])
    assert torch.equal(expand_gqa(golden("gqa.W"), heads, groups), golden("gqa.expanded"))
    with pytest.raises(ValueError, match="cannot be 3 heads"):
        expand_gqa(golden("gqa.W"), 3, groups)


def test_gates_of_liger_reuse_the_key_projection() -> None:
    q, k, v = golden("liger.q"), golden("liger.k"), golden("liger.v")  # (B, T, H, D), (B, T, G, D)
    groups = q.shape[2] // k.shape[2]
    g = (F.logsigmoid(k) / 16).repeat_interleave(groups, dim=2)
    assert_close(g, golden("liger.log_decay"))
    q, k = q.softmax(-1), k.softmax(-1).repeat_interleave(groups, dim=2)
    v = v.repeat_interleave(groups, dim=2)
    # decays per channel, by their definition: the keys carry the decay that the queries undo
    total = g.cumsum(1)
    weights = torch.einsum("bthd,bshd->bhts", q * total.exp(), k * (-total).exp()).tril()
    assert_close(torch.einsum("bhts,bshe->bthe", weights, v), golden("liger.gla_branch"))
