"""Stages of conversion: losses, isolation of layers, low-rank updates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from memzoo.models.config import ModelConfig
from memzoo.models.conversion import convert_mixers
from memzoo.models.decoder import MemoryLM
from memzoo.train.data.batches import TokenBatch
from memzoo.train.distillation import (
    AlignmentModule,
    DistillModule,
    TeacherReadings,
    distillation_loss,
    freeze_except,
    lora_size,
    low_rank_updates,
)
from memzoo.train.optim import OptimizerConfig

GOLDEN = Path(__file__).parents[2] / "golden" / "conversion_a.npz"
HYBRID = {"type": "lolcats", "window_size": 4, "feature_dim": 5}


def teacher() -> MemoryLM:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=30,
        d_model=16,
        layers={"type": "attention"},
        num_layers=3,
        mixer_defaults={"num_heads": 4, "num_kv_heads": 2},
        mlp={"type": "swiglu", "d_ff": 24},
        tie_embeddings=True,
    )
    return MemoryLM(config).eval()


def batch() -> TokenBatch:
    ids = torch.randint(0, 30, (2, 21), generator=torch.Generator().manual_seed(3))
    return TokenBatch(ids[:, :-1], ids[:, 1:])


def test_distillation_loss_is_the_golden_kl_per_token() -> None:
    data = np.load(GOLDEN)
    student = torch.from_numpy(data["loss.student_logits"]).requires_grad_()
    loss = distillation_loss(student, torch.from_numpy(data["loss.teacher_logits"]))
    assert loss.item() == pytest.approx(float(data["loss.kl_per_token"]), abs=1e-6)


def test_distillation_loss_in_slices_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 13, 11, generator=generator, dtype=torch.float64).requires_grad_()
    expected = torch.randn(2, 13, 14, generator=generator, dtype=torch.float64)  # padded vocabulary
    log_p = expected[..., :11].log_softmax(-1)
    whole = (log_p.exp() * (log_p - student.log_softmax(-1))).sum(-1).mean()
    (gradient,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr("memzoo.train.distillation.KL_CHUNK", 4)
    loss = distillation_loss(student, expected)
    loss.backward()
    torch.testing.assert_close(loss.double(), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(student.grad, gradient, atol=1e-9, rtol=0)


def test_alignment_gives_other_layers_exactly_zero_gradient() -> None:
    source = teacher()
    student, report = convert_mixers(source, HYBRID)
    freeze_except(student, report.new_parameters)
    module = AlignmentModule(student, source, [1], OptimizerConfig())
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # no trainer
    module.training_step(batch(), 0).backward()
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
        elif name.startswith("layers.1."):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_alignment_learns() -> None:
    source = teacher()
    student, report = convert_mixers(source, HYBRID)
    freeze_except(student, report.new_parameters)
    module = AlignmentModule(student, source, report.layers, OptimizerConfig())
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = module.training_step(batch(), 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_low_rank_updates_train_only_what_they_should_and_merge() -> None:
    source = teacher()
    student, report = convert_mixers(source, HYBRID)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    targets = ("q_proj", "o_proj")
    expected = 3 * lora_size(student, targets) + report.num_new
    names = list(report.new_parameters)
    with low_rank_updates(student, rank=3, alpha=6, targets=targets, also_train=names) as (wrapped, count):
        assert count == expected
        assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == expected
        torch.testing.assert_close(wrapped(batch().input_ids).logits, student(batch().input_ids).logits)
        module = DistillModule(wrapped, source, OptimizerConfig(), kl_weight=1.0, ce_weight=0.5)
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(15):
            optimizer.zero_grad()
            loss = module.training_step(batch(), 0)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        tuned = wrapped(batch().input_ids).logits.detach()
    assert losses[-1] < losses[0]
    assert set(student.state_dict()) == set(before)  # the updates are merged, names as before
    torch.testing.assert_close(student(batch().input_ids).logits, tuned, atol=1e-4, rtol=1e-4)
    for name, tensor in student.state_dict().items():
        may_change = name in report.new_parameters or name.split(".")[-2] in targets
        assert may_change or torch.equal(tensor, before[name]), name


def test_a_teacher_reads_a_text_once_and_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    source = teacher()
    ids, labels = (x.reshape(1, -1) for x in (batch().input_ids, batch().labels))
    given = [batch(), TokenBatch(ids, labels), TokenBatch(ids, labels, torch.tensor([0, 5, 40]))]
    expected = [source(b.input_ids, cu_seqlens=b.cu_seqlens).logits.detach() for b in given]
    num_bytes = sum(4 * source.config.d_model * b.num_tokens for b in given)
    readings, scarce = TeacherReadings(num_bytes), TeacherReadings(num_bytes - 1)
    for kept in (readings, scarce):
        for b, logits in zip(given, expected, strict=True):
            assert torch.equal(kept.logits(source, b), logits)
    calls = []
    forward = source.forward
    monkeypatch.setattr(source, "forward", lambda *a, **k: calls.append(a) or forward(*a, **k))
    for b, logits in zip(given, expected, strict=True):
        assert torch.equal(readings.logits(source, b), logits)
    assert not calls
    for b, logits in zip(given, expected, strict=True):
        assert torch.equal(scarce.logits(source, b), logits)
    assert len(calls) == 1


def test_refuses_unknown_parameters_and_losses() -> None:
    source = teacher()
    with pytest.raises(ValueError, match="no parameters"):
        freeze_except(source, ["layers.0.mixer.z_proj.weight"])
    with pytest.raises(ValueError, match="not both 0"):
        DistillModule(source, source, OptimizerConfig(), kl_weight=0.0, ce_weight=0.0)
