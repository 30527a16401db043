"""Stages of conversion: losses, isolation of layers, low-rank updates."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from memzoo.layers.contract import LayerOutput
from memzoo.models.config import ModelConfig
from memzoo.models.conversion import ConversionPlan, ParityReport, convert_mixers, relative_error
from memzoo.models.decoder import MemoryLM
from memzoo.train.conversion.modules import AlignmentModule, DistillModule
from memzoo.train.conversion.page import block_means
from memzoo.train.conversion.recipe_stage import Stage
from memzoo.train.conversion.stage import Segment, SegmentBatches, StageSettings, run_stage
from memzoo.train.conversion.teacher import TeacherReadings, last_hidden, weights_digest
from memzoo.train.conversion.updates import freeze_except, lora_size, low_rank_updates
from memzoo.train.data.batches import BatchSource, TokenBatch
from memzoo.train.data.mqar import IGNORE_INDEX
from memzoo.train.optim import OptimizerConfig

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


def convert(source: MemoryLM) -> tuple[MemoryLM, ParityReport]:
    return convert_mixers(source, ConversionPlan(target=HYBRID))


@pytest.mark.parametrize("loss", ["mixer_out", "attn_out", "hidden"])
def test_alignment_gives_other_layers_exactly_zero_gradient(loss: str) -> None:
    source = teacher()
    student, report = convert(source)
    freeze_except(student, report.new_parameters)
    module = AlignmentModule(student, source, OptimizerConfig(), [1], {loss: 1.0})
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
    student, report = convert(source)
    freeze_except(student, report.new_parameters)
    module = AlignmentModule(student, source, OptimizerConfig(), report.layers, {"mixer_out": 1.0})
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
    student, report = convert(source)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    targets = ("q_proj", "o_proj")
    expected = 3 * lora_size(student, targets) + report.num_new
    names = list(report.new_parameters)
    with low_rank_updates(student, rank=3, targets=targets, also_train=names) as wrapped:
        assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == expected
        torch.testing.assert_close(wrapped(batch().input_ids).logits, student(batch().input_ids).logits)
        module = DistillModule(wrapped, source, OptimizerConfig(), {"kl": 1.0, "ce": 0.5})
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


def test_updates_of_new_projections_train_both(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = ConversionPlan(target={"type": "linear_attention", "feature_dim": 3})
    student, report = convert_mixers(teacher(), plan)
    names = list(report.new_parameters)
    assert "layers.0.mixer.q_proj.weight" in names
    with low_rank_updates(student, rank=1, targets=("q_proj",), also_train=names) as wrapped:
        trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert "model.layers.0.mixer.q_proj.base_layer.weight" in trained
    assert "model.layers.0.mixer.q_proj.lora_A.default.weight" in trained


def test_a_teacher_reads_a_text_once_and_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = teacher()
    ids, labels = (x.reshape(1, -1) for x in (batch().input_ids, batch().labels))
    mask = torch.arange(20) < torch.tensor([[20], [12]])
    given = [
        batch(),
        TokenBatch(ids, labels),
        TokenBatch(ids, labels, torch.tensor([0, 5, 40])),
        TokenBatch(batch().input_ids, batch().labels, mask=mask),
    ]
    expected = [last_hidden(source, b).detach() for b in given]
    assert len({tuple(x.flatten()[-16:].tolist()) for x in expected}) == 4
    num_bytes = sum(4 * source.config.d_model * b.input_ids.numel() for b in given)
    digest = weights_digest(source)
    for name, size in (("all", 2 * num_bytes), ("scarce", num_bytes - 1)):
        readings = TeacherReadings(tmp_path / name, digest, size)
        for b, hidden in zip(given, expected, strict=True):
            assert torch.equal(readings.hidden(source, b), hidden)
    calls = []
    forward = source.forward
    monkeypatch.setattr(source, "forward", lambda *a, **k: calls.append(a) or forward(*a, **k))

    def read_again(name: str, digest: str) -> int:
        calls.clear()
        readings = TeacherReadings(tmp_path / name, digest, 0)
        for b, hidden in zip(given, expected, strict=True):
            assert torch.equal(readings.hidden(source, b), hidden)
        return len(calls)

    assert read_again("all", digest) == 0
    assert read_again("scarce", digest) == 1
    assert read_again("all", "another teacher") == 4
    damaged = next((tmp_path / "all").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-7])
    assert read_again("all", digest) == 1


def test_the_digest_is_that_of_the_weights() -> None:
    source, other = teacher(), teacher()
    assert weights_digest(source) == weights_digest(other)
    with torch.no_grad():
        other.norm.weight[0] += 1e-6
    assert weights_digest(source) != weights_digest(other)


def test_segments_are_read_one_after_another_and_again_from_the_start() -> None:
    class Numbers(BatchSource):
        num_batches = 3

        def batch(self, epoch: int, index: int) -> TokenBatch:
            number = torch.tensor([[10 * epoch + index]])
            return TokenBatch(number, number)

    segments = [Segment(8, 1, 1, 3), Segment(8, 1, 4, 2)]
    batches = SegmentBatches(segments, lambda seq_len, batch_size: Numbers())
    assert len(batches) == 5
    assert [int(batches.batch(0, index).input_ids) for index in range(5)] == [1, 2, 10, 11, 12]
    with pytest.raises(IndexError):
        batches.batch(0, 5)


def test_refuses_unknown_parameters_and_losses() -> None:
    source = teacher()
    with pytest.raises(ValueError, match="no parameters"):
        freeze_except(source, ["layers.0.mixer.z_proj.weight"])
    with pytest.raises(ValueError, match="not all 0"):
        DistillModule(source, source, OptimizerConfig(), {"kl": 0.0, "ce": 0.0})


def test_a_line_of_losses_has_few_points() -> None:
    assert block_means([3.0, 1.0, 2.0], 400) == ([1, 2, 3], [3.0, 1.0, 2.0])
    assert block_means([3.0, 1.0, 2.0, 4.0, 7.0], 3) == ([2, 4, 5], [2.0, 3.0, 7.0])
    ends, means = block_means([0.5] * 100_001)
    assert len(ends) == len(means) <= 400
    assert ends[-1] == 100_001
    assert block_means([]) == ([], [])


def test_alignment_holds_one_layer_and_gives_the_gradient_of_the_mean() -> None:
    source = teacher()
    student, report = convert(source)
    freeze_except(student, report.new_parameters)
    module = AlignmentModule(student, source, OptimizerConfig(), report.layers, {"mixer_out": 1.0})
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    held: list[int] = []
    distance = module._distance

    def counting(new: LayerOutput, old: LayerOutput, counted: torch.Tensor) -> torch.Tensor:
        held.append(sum(out() is not None for out in alive))
        alive.append(weakref.ref(new.hidden))
        return distance(new, old, counted)

    alive: list[weakref.ref[torch.Tensor]] = []
    module._distance = counting  # type: ignore[method-assign]
    (0.5 * module.training_step(batch(), 0)).backward()
    assert held == [0, 0, 0]
    given = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    hidden, losses = source.embed(batch().input_ids), []
    for old, new in zip(source.blocks, student.blocks, strict=True):
        normed = old.mixer_input(hidden).detach()
        target = old.mixer(normed).hidden.detach()
        losses.append(relative_error(new.mixer(normed).hidden, target))
        hidden = old.after_mixer(hidden, target).detach()
    (0.5 * torch.stack(losses).mean()).backward()
    assert set(given) == set(report.new_parameters)
    for name, parameter in student.named_parameters():
        if name in given:
            torch.testing.assert_close(given[name], parameter.grad, msg=name)


def half_labelled() -> TokenBatch:
    given = batch()
    labels = given.labels.clone()
    labels[0, 3:] = IGNORE_INDEX
    labels[1, :9] = IGNORE_INDEX
    return TokenBatch(given.input_ids, labels)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("loss", ["mixer_out", "attn_out", "hidden"])
def test_alignment_over_labelled_tokens_sees_no_others(loss: str, normalize: bool) -> None:
    source = teacher()
    student, _ = convert(source)
    given = half_labelled()
    asked = given.labels != IGNORE_INDEX
    normed = source.blocks[0].mixer_input(source.embed(given.input_ids))
    old, new = (model.blocks[0].mixer(normed, return_extras=True) for model in (source, student))
    if loss == "attn_out":
        mine, known = (out.extras["head_outputs"][asked] for out in (new, old))
    else:
        mine, known = new.hidden[asked], old.hidden[asked]
    error = mine - known
    if loss == "hidden":
        lengths = known.norm(dim=-1).mean() if normalize else torch.tensor(4.0)  # sqrt(M)
        expected = error.norm(dim=-1).mean() / lengths
    else:
        expected = error.square().mean() / (known.square().mean() if normalize else 1)
    found = {}
    for counts_all in (False, True):
        module = AlignmentModule(
            student, source, OptimizerConfig(), [0], {loss: 1.0}, normalize=normalize, counts_all=counts_all
        )
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        found[counts_all] = module.training_step(given, 0).detach()
    torch.testing.assert_close(found[False], expected.detach())
    assert abs(found[True] / found[False] - 1) > 0.01


def test_an_alignment_learns_nothing_from_a_batch_without_labels() -> None:
    source = teacher()
    student, report = convert(source)
    freeze_except(student, report.new_parameters)
    module = AlignmentModule(
        student, source, OptimizerConfig(), report.layers, {"mixer_out": 1.0}, counts_all=False
    )
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    ids = batch().input_ids
    loss = module.training_step(TokenBatch(ids, torch.full_like(ids, IGNORE_INDEX)), 0)
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_distillation_counts_all_tokens_where_it_is_told_to() -> None:
    source = teacher()
    student, _ = convert(source)
    given = half_labelled()
    mask = torch.arange(20) < torch.tensor([[20], [14]])
    divergence = torch.nn.functional.kl_div(
        student(given.input_ids, mask=mask).logits.log_softmax(-1),
        source(given.input_ids, mask=mask).logits.log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    for counts_all, counted in ((False, given.labels != IGNORE_INDEX), (True, mask)):
        module = DistillModule(student, source, OptimizerConfig(), {"kl": 1.0}, counts_all=counts_all)
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        loss = module.training_step(TokenBatch(given.input_ids, given.labels, mask=mask), 0)
        torch.testing.assert_close(loss, divergence[counted].mean(), atol=1e-5, rtol=1e-4)


def test_a_stage_over_labelled_tokens_wants_labels(tmp_path: Path) -> None:
    class Unasked(BatchSource):
        num_batches = 2

        def batch(self, epoch: int, index: int) -> TokenBatch:
            ids = batch().input_ids
            return TokenBatch(ids, torch.full_like(ids, IGNORE_INDEX))

    source = teacher()
    student, report = convert(source)
    stage = Stage(name="a", loss={"mixer_out": 1.0}, train="new", steps=2, lr=0.1, tokens="labelled")
    with pytest.raises(ValueError, match=r"stage 'a' is over labelled tokens, and the first 2 batches"):
        run_stage(
            stage,
            student,
            source,
            layers=report.layers,
            fresh=list(report.new_parameters),
            segments=[Segment(20, 2, 0, 2)],
            sources=lambda *size: Unasked(),
            folder=tmp_path / "a",
            seed=0,
            readings=TeacherReadings(),
            settings=StageSettings(progress=False, accelerator="cpu", precision="32-true"),
            label="a",
        )


def test_an_alignment_counts_all_tokens_unless_told_otherwise() -> None:
    rest = {"name": "a", "train": "new", "steps": 1, "lr": 0.1}
    assert Stage(loss={"mixer_out": 1.0}, **rest).counts_all
    assert not Stage(loss={"mixer_out": 1.0}, tokens="labelled", **rest).counts_all
    assert not Stage(loss={"kl": 1.0}, **rest).counts_all
    assert Stage(loss={"kl": 1.0}, tokens="all", **rest).counts_all
