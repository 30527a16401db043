"""Training of retention gates: the losses, a stage that trains nothing else, and gates saved alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from memzoo.kernels import soft_cache_size
from memzoo.models.checkpoints.errors import CheckpointError
from memzoo.models.config import ModelConfig
from memzoo.models.conversion import (
    ConversionPlan,
    attach_retention_gates,
    check_parity,
    convert_mixers,
    gate_weights,
    load_gates,
    memory_off,
    save_gates,
)
from memzoo.models.decoder import MemoryLM
from memzoo.testing import assert_close
from memzoo.train.conversion.modules import Capacity, DistillModule
from memzoo.train.conversion.recipe import ConversionRecipe, check_recipe
from memzoo.train.conversion.recipe_stage import Stage
from memzoo.train.conversion.retention import capacity_loss, distillation_loss, log_retentions, soft_sizes
from memzoo.train.conversion.updates import freeze_except
from memzoo.train.data.batches import TokenBatch
from memzoo.train.optim import OptimizerConfig

V = 30


def base(seed: int = 0, **changes: object) -> MemoryLM:
    torch.manual_seed(seed)
    config = {
        "vocab_size": V,
        "d_model": 16,
        "layers": {"type": "attention"},
        "num_layers": 2,
        "mixer_defaults": {"num_heads": 4, "num_kv_heads": 2},
        "mlp": {"type": "swiglu", "d_ff": 24},
        "tie_embeddings": True,
        **changes,
    }
    return MemoryLM(ModelConfig(**config)).eval()


def batch(rows: int = 2, length: int = 24, **parts: torch.Tensor) -> TokenBatch:
    ids = torch.randint(0, V, (rows, length + 1), generator=torch.Generator().manual_seed(3))
    return TokenBatch(ids[:, :-1], ids[:, 1:], **parts)


# ------------------------------------------------------------------ losses


def test_nothing_above_the_budget_is_exactly_nothing() -> None:
    g = (-torch.rand(1, 12, 2, dtype=torch.float64)).requires_grad_()
    for options in ({}, {"normalizer": "paper"}, {"scope": "global"}):
        loss = capacity_loss(soft_cache_size(g), 20, **options)
        assert float(loss.detach()) == 0.0
        assert not torch.autograd.grad(loss, g)[0].any()


def test_a_share_of_the_sequence_padding_and_documents() -> None:
    torch.manual_seed(0)
    g = -0.1 * torch.rand(2, 20, 3, dtype=torch.float64)
    whole = soft_cache_size(g)
    assert float(capacity_loss(whole, 0.25)) == float(capacity_loss(whole, 5))
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :7] = False
    ids = torch.zeros(2, 20, dtype=torch.int64)
    masked = soft_sizes(g, TokenBatch(ids, ids, mask=mask))
    packed = torch.cat([g[:1], g[1:, 7:]], 1)
    ids = torch.zeros(1, 33, dtype=torch.int64)
    together = soft_sizes(packed, TokenBatch(ids, ids, cu_seqlens=torch.tensor([0, 20, 33])))
    for found, wanted in zip(masked, together, strict=True):
        assert torch.equal(found, wanted)
    assert together[1].tolist() == [[*range(20), *range(13)]]
    assert together[2].tolist() == [[20] * 20 + [13] * 13]
    assert torch.equal(together[0][0, 20:], soft_cache_size(g[1:, 7:])[0])
    sizes, positions, lengths = together
    for normalizer in ("active", "paper"):
        parts = [
            capacity_loss(sizes[:, a:b], 0.3 * (b - a), normalizer=normalizer) for a, b in ((0, 20), (20, 33))
        ]
        found = capacity_loss(sizes, 0.3, positions=positions, lengths=lengths, normalizer=normalizer)
        counts = [20, 13]
        if normalizer == "active":
            limits = 0.3 * lengths[..., None]
            counts = [int((sizes > limits)[:, a:b].sum()) for a, b in ((0, 20), (20, 33))]
        wanted = sum(part * count for part, count in zip(parts, counts, strict=True)) / sum(counts)
        assert_close(normalizer, found, wanted, 1e-12)
    inner = torch.ones(2, 20, dtype=torch.bool)
    inner[:, 15:] = False
    for normalizer in ("active", "paper"):
        found = capacity_loss(whole, 3, mask=inner, normalizer=normalizer)
        assert_close("mask", found, capacity_loss(whole[:, :15], 3, normalizer=normalizer), 1e-12)


def test_bad_losses_are_named() -> None:
    sizes, logits, labels = torch.ones(1, 4, 2), torch.zeros(1, 4, 3), torch.zeros(1, 4, dtype=torch.int64)
    for budget in (0, -1, float("inf"), True, "8"):
        with pytest.raises(ValueError, match="budget must be a number"):
            capacity_loss(sizes, budget)
    with pytest.raises(ValueError, match=r"normalizer .actve. is unknown\. Did you mean 'active'"):
        capacity_loss(sizes, 2, normalizer="actve")
    with pytest.raises(ValueError, match="scope"):
        capacity_loss(sizes, 2, scope="layer")
    with pytest.raises(ValueError, match="kind 'kl' is unknown"):
        distillation_loss(logits, logits, labels, kinds=("kl",))
    with pytest.raises(ValueError, match="at least one of"):
        distillation_loss(logits, logits, labels, kinds=())
    with pytest.raises(ValueError, match="no layer gives log-retentions"):
        log_retentions({"layers.0.head_outputs": sizes})


@pytest.mark.parametrize("block_size", [3, 100])
def test_distillation_counts_the_positions_that_predict_a_label(block_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 9, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    labels = torch.randint(5, (2, 9), generator=generator)
    labels[0, 4] = labels[1, 0] = -100
    asked = labels[:, 1:] != -100
    log_q, log_p = (x[:, :-1][asked].log_softmax(-1) for x in (student, teacher))
    wanted = {
        "fwkl": F.kl_div(log_q, log_p, log_target=True, reduction="batchmean"),
        "rvkl": F.kl_div(log_p, log_q, log_target=True, reduction="batchmean"),
        "ntp": F.nll_loss(log_q, labels[:, 1:][asked]),
    }
    for reduction, share in (("mean", 1 / 3), ("sum", 1.0)):
        found = distillation_loss(
            student, teacher, labels, kinds=tuple(wanted), base_reduction=reduction, block_size=block_size
        )
        expected = share * sum(wanted.values())
        assert_close(reduction, found, expected, 1e-12)
        for pair in zip(
            *(torch.autograd.grad(x, student, retain_graph=True)[0] for x in (found, expected)), strict=True
        ):
            assert_close("gradient", *pair, 1e-12)
    nothing = distillation_loss(student, teacher, torch.full_like(labels, -100))
    assert float(nothing.detach()) == 0.0


# ------------------------------------------------------------------ gates in a model


def test_gates_leave_the_model_as_it_is() -> None:
    source = base()
    plan = ConversionPlan(target={"type": "gated_attention", "gate_width": 8, "train_length": 24})
    tokens = batch().input_ids
    student, report = convert_mixers(source, plan, tokens)
    assert not report.output_scales
    assert set(report.new_parameters) == set(gate_weights(student))
    check_parity(source, student, report, tokens).raise_on_failure()
    assert report.checks[-1].name.endswith("gates ignored")
    weights = student.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in source.state_dict().items())
    with memory_off(student):
        assert torch.equal(student(tokens).logits, source(tokens).logits)
    assert_close("gates on", student(tokens).logits, source(tokens).logits, 0.02)


def test_a_stage_trains_gates_and_nothing_else_below_the_budget() -> None:
    source = base()
    student = attach_retention_gates(source, gate_width=8, train_length=24)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    freeze_except(student, gate_weights(student))
    loss = {"kl": 0.5, "reverse_kl": 0.1, "ce": 0.5, "capacity": 4.0}
    module = DistillModule(student, source, OptimizerConfig(), loss, capacity=Capacity(4))
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # no trainer
    optimizer = torch.optim.Adam(gate_weights(student).values(), lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        total = module.training_step(batch(), 0)
        total.backward()
        optimizer.step()
    found = {name: values[-1] for name, values in module.history.items()}
    parts = sum(weight * found[name] for name, weight in loss.items())
    assert found["loss"] == pytest.approx(parts, rel=1e-5)
    assert module.history["size_by_budget"][0] == pytest.approx(12.5 / 4, rel=0.05)
    assert found["size_by_budget"] < 0.6 * module.history["size_by_budget"][0]
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in gate_weights(student)), name


def test_losses_of_the_module_are_those_from_logits() -> None:
    source, student = base(), attach_retention_gates(base(), gate_width=8, gate_bias=1.0)
    given = batch(mask=torch.arange(24) < torch.tensor([[24], [17]]))
    given.labels[1, 16:] = -100
    module = DistillModule(
        student, source, OptimizerConfig(), {"kl": 1.0, "reverse_kl": 1.0, "ce": 1.0, "capacity": 1.0},
        capacity=Capacity(0.2, "paper", "global"),
    )  # fmt: skip
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    module.training_step(given, 0)
    out = student(given.input_ids, mask=given.mask, return_extras=True)
    teacher = source(given.input_ids, mask=given.mask).logits
    tokens = torch.cat([torch.full((2, 1), -100), given.labels], 1)  # labels that are not shifted
    padded = [F.pad(x, (0, 0, 0, 1)) for x in (out.logits, teacher)]
    for name, kind in (("kl", "fwkl"), ("reverse_kl", "rvkl"), ("ce", "ntp")):
        wanted = float(distillation_loss(*padded, tokens, kinds=(kind,)).detach())
        assert module.history[name][0] == pytest.approx(wanted, rel=1e-4)
    sizes = soft_sizes(log_retentions(out.extras), given)[0]
    assert sizes.shape == (1, 41, 4)
    assert module.history["size_by_budget"][0] > 0


def test_stages_and_recipes_that_cannot_be() -> None:
    stage = {"name": "gates", "train": "new", "steps": 1, "lr": 0.1}
    with pytest.raises(ValueError, match="capacity and a budget belong together"):
        Stage(**stage, loss={"capacity": 1.0})
    with pytest.raises(ValueError, match="capacity and a budget belong together"):
        Stage(**stage, loss={"kl": 1.0}, budget=8)
    with pytest.raises(ValueError, match="budget must be a number"):
        Stage(**stage, loss={"capacity": 1.0}, budget=-8)
    with pytest.raises(ValueError, match="capacity_scope must be one of head, global"):
        Stage(**stage, loss={"capacity": 1.0}, budget=8, capacity_scope="layer")
    only = Stage(**stage, loss={"capacity": 1.0}, budget=8)
    recipe = ConversionRecipe(target={"type": "lolcats", "window_size": 4, "feature_dim": 4}, stages=[only])
    assert recipe.last_end_to_end is None
    with pytest.raises(ValueError, match="for retention gates, which lolcats"):
        check_recipe(recipe, base().config, with_control=False)
    with pytest.raises(ValueError, match="needs a budget"):
        DistillModule(base(), base(), OptimizerConfig(), {"capacity": 1.0})


# ------------------------------------------------------------------ gates alone


def test_gates_are_saved_alone_and_come_back(tmp_path: Path) -> None:
    source = base()
    gated = attach_retention_gates(source, [1], gate_width=8, gate_bias=2.0)
    with torch.no_grad():
        for parameter in gate_weights(gated).values():
            parameter.normal_()
    save_gates(gated, tmp_path / "gates", base="toy")
    numbers = sum(parameter.numel() for parameter in gate_weights(gated).values())
    assert (tmp_path / "gates" / "gates.safetensors").stat().st_size < 4 * numbers + 1024
    tokens = batch().input_ids
    for model in (source, attach_retention_gates(source, [1], gate_width=8)):
        assert torch.equal(load_gates(model, tmp_path / "gates")(tokens).logits, gated(tokens).logits)
    assert not gate_weights(source)
    low = load_gates(base().bfloat16(), tmp_path / "gates")
    for name, parameter in gate_weights(low).items():
        assert torch.equal(parameter, gate_weights(gated)[name])


def test_gates_of_another_model_are_refused(tmp_path: Path) -> None:
    save_gates(attach_retention_gates(base(), gate_width=8), tmp_path / "gates", base="toy")
    with pytest.raises(ValueError, match=r"belong to 'toy' and do not fit this model: layers.0.* no place"):
        load_gates(attach_retention_gates(base(), [1], gate_width=8), tmp_path / "gates")
    wide = base(mixer_defaults={"num_heads": 4, "num_kv_heads": 4})
    with pytest.raises(ValueError, match="the sizes of the layers differ"):
        load_gates(wide, tmp_path / "gates")
    with pytest.raises(ValueError, match="has shape"):
        load_gates(wide, tmp_path / "gates", strict=False)
    part = load_gates(attach_retention_gates(base(), [1], gate_width=8), tmp_path / "gates", strict=False)
    assert all(name.startswith("layers.1.") for name in gate_weights(part))
    with pytest.raises(ValueError, match="no retention gates"):
        save_gates(base(), tmp_path / "none", base="toy")
    with pytest.raises(ValueError, match="layers of attention, layer 0 is gated_attention"):
        attach_retention_gates(attach_retention_gates(base()))
    path = tmp_path / "gates" / "gates.json"
    path.write_text(json.dumps({"base": "toy", "layers": {}}))
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_gates(base(), tmp_path / "gates")
