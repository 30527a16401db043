"""Surgery: what is copied, what is new, and the parity checks of a converted model."""

from __future__ import annotations

import pytest
import torch

from memzoo.kernels import causal_conv
from memzoo.models.config import ModelConfig
from memzoo.models.conversion import (
    ConversionPlan,
    LayerSelection,
    StackedSource,
    WeightSource,
    check_parity,
    convert_mixers,
    expand_gqa,
    memory_off,
    other_mixers,
    register_weight_map,
    select_layers,
    weight_map,
    window_of,
)
from memzoo.models.decoder import MemoryLM

HEADS = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "rope_theta": 10000.0,
    "qk_norm": True,
    "qkv_bias": True,
}
HYBRID = {"type": "lolcats", "window_size": 8, "num_sinks": 2, "feature_dim": 5}


def convert(source: MemoryLM, target: dict, layers: list[int] | None = None, **options: str):
    return convert_mixers(source, ConversionPlan(target=target, layers=layers, **options))


def teacher(seed: int = 0) -> MemoryLM:
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=50,
        d_model=24,
        layers={"type": "attention"},
        num_layers=3,
        mixer_defaults=HEADS,
        mlp={"type": "swiglu", "d_ff": 32},
        tie_embeddings=True,
    )
    return MemoryLM(config).eval()


def tokens(length: int = 40) -> torch.Tensor:
    return torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(1))


def test_zero_converted_layers_equal_the_source_to_the_bit() -> None:
    source = teacher()
    student, report = convert(source, HYBRID, layers=[])
    check_parity(source, student, report, tokens())
    report.raise_on_failure()
    assert torch.equal(source(tokens()).logits, student(tokens()).logits)
    assert report.num_new == 0


def test_copies_every_shared_weight_and_lists_the_new_ones() -> None:
    source = teacher()
    student, report = convert(source, HYBRID, layers=[0, 2])
    kept = source.state_dict()
    for name, tensor in student.state_dict().items():
        if name in kept:
            assert torch.equal(tensor, kept[name]), name
        else:
            assert name in report.new_parameters
            assert report.new_parameters[name] == tuple(tensor.shape)
    assert all(name.split(".")[1] in ("0", "2") for name in report.new_parameters)
    assert report.dropped == []
    assert report.num_new == sum(
        p.numel() for n, p in student.named_parameters() if n in report.new_parameters
    )


def test_equals_the_source_while_the_sequence_fits_the_window() -> None:
    source = teacher()
    student, report = convert(source, HYBRID)
    check_parity(source, student, report, tokens())
    report.raise_on_failure()
    reach = HYBRID["window_size"]
    short, long = tokens(reach), tokens(40)
    assert (source(short).logits - student(short).logits).abs().max() < 1e-4
    assert (source(long).logits - student(long).logits).abs().max() > 1e-3  # beyond it they differ
    assert all(error > 0 for error in report.layer_errors.values())


@pytest.mark.parametrize("is_broken", [False, True])
def test_half_precision_is_compared_mixer_by_mixer_in_float32(is_broken: bool) -> None:
    source = teacher().bfloat16()
    student, report = convert(source, HYBRID)
    if is_broken:
        with torch.no_grad():
            student.blocks[1].mixer.v_proj.weight.mul_(1.01)
    check_parity(source, student, report, tokens())
    check = next(check for check in report.checks if "window" in check.name)
    assert "float32" in check.name
    assert check.passed is not is_broken
    assert check.bound == 1e-4


def test_a_broken_copy_is_reported() -> None:
    source = teacher()
    student, report = convert(source, HYBRID)
    with torch.no_grad():
        student.layers[1].mixer.q_proj.weight.add_(0.5)
        student.norm.weight.add_(1.0)
    check_parity(source, student, report, tokens())
    with pytest.raises(ValueError, match=r"does not agree with its source.*weights outside"):
        report.raise_on_failure()
    assert sum(not check.passed for check in report.checks) == 2


@pytest.mark.parametrize("layers", [[3], [-1], [0, 0]])
def test_refuses_impossible_layers(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="distinct numbers from 0 to 2"):
        convert(teacher(), HYBRID, layers=layers)


def test_refuses_unknown_targets_and_keys() -> None:
    with pytest.raises(ValueError, match="lolcats"):
        convert(teacher(), {"type": "lolcat"})
    with pytest.raises(ValueError, match="window_size"):
        convert(teacher(), {"type": "sliding_window", "window_sise": 4})


def test_does_not_change_the_source() -> None:
    source = teacher()
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    student, _ = convert(source, HYBRID)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())


BESIDE = {
    "type": "parallel",
    "combine": "channel",
    "mixers": [{"type": "sliding_window", "window_size": 8, "num_sinks": 2}, {"type": "linear_attention"}],
}


def test_composites_take_the_weights_inside_them() -> None:
    source = teacher()
    student, report = convert(source, BESIDE)
    check_parity(source, student, report, tokens())
    report.raise_on_failure()
    assert any("first 8 tokens" in check.name for check in report.checks)
    old = source.state_dict()
    for number in (0, 1):
        for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"):
            new = student.state_dict()[f"layers.1.mixer.mixers.{number}.{name}"]
            assert torch.equal(new, old[f"layers.1.mixer.{name}"])
    assert {name.rpartition("mixer.")[2] for name in report.new_parameters} == {"coefficient"}
    sums, _ = convert(source, {**BESIDE, "combine": "sum"})
    assert (sums(tokens(8)).logits - source(tokens(8)).logits).abs().max() > 1e-3


def test_heads_are_expanded_as_wholes() -> None:
    source = teacher()
    target = {"type": "sliding_window", "window_size": 40}
    student, report = convert(source, target, gqa="expand")
    check_parity(source, student, report, tokens())
    report.raise_on_failure()  # 40 tokens, all inside the window: the same logits
    mixer = student.blocks[0].mixer
    assert mixer.k_proj.weight.shape == (24, 24)
    assert mixer.k_proj.bias.shape == (24,)
    assert len(report.expanded) == 3 * 4  # weights and biases of keys and values
    assert not report.new_parameters
    assert not report.dropped


def test_a_mixer_may_bring_its_own_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memzoo.models.conversion.weight_maps._WEIGHT_MAPS", {})
    source = teacher()
    plain = weight_map(source.config.mixers[0], source.config.mixers[1])
    register_weight_map("linear_attention", lambda old, new: {"q_proj.weight": plain["o_proj.weight"]})
    with pytest.raises(ValueError, match="has a weight map already"):
        register_weight_map("linear_attention", lambda old, new: {})
    student, report = convert(source, {"type": "linear_attention"})
    weights = student.state_dict(), source.state_dict()
    assert torch.equal(weights[0]["layers.2.mixer.q_proj.weight"], weights[1]["layers.2.mixer.o_proj.weight"])
    assert "layers.2.mixer.k_proj.weight" in report.new_parameters
    assert "layers.2.mixer.k_proj.weight" in report.dropped


def test_rows_of_a_fused_projection_come_from_several_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of queries and of repeated keys; the rest keeps its initialisation and counts as new."""
    source = teacher()
    monkeypatch.setattr("memzoo.models.conversion.weight_maps._WEIGHT_MAPS", {})
    parts = {4: WeightSource("q_proj.weight"), 30: WeightSource("k_proj.weight", 2, 2)}
    register_weight_map("base_conv", lambda old, new: {"in_proj.weight": StackedSource(parts)})
    student, report = convert(source, {"type": "base_conv"}, layers=[1])
    weight, old = student.blocks[1].mixer.in_proj.weight, source.blocks[1].mixer
    q, k = old.q_proj.weight, expand_gqa(old.k_proj.weight, 2, 2)
    assert torch.equal(weight[4:28], q)
    assert torch.equal(weight[30:54], k)
    name = "layers.1.mixer.in_proj.weight"
    assert report.new_parameters[name] == (weight.shape[0] - 48, 24)
    assert name in report.expanded
    assert not {f"layers.1.mixer.{old}.weight" for old in ("q_proj", "k_proj")} & set(report.dropped)
    total = sum(parameter.numel() for parameter in student.parameters())
    assert report.num_copied + report.num_new == total
    parts[weight.shape[0] - 3] = WeightSource("q_proj.weight")
    with pytest.raises(ValueError, match="Correct the weight map"):
        convert(source, {"type": "base_conv"}, layers=[1])


@pytest.mark.parametrize("kind", ["delta_net", "gated_delta_net", "gla", "gsa", "kda", "mlstm", "retnet"])
@pytest.mark.parametrize("gqa", ["keep", "expand"])
def test_attention_becomes_a_recurrence_with_its_projections(kind: str, gqa: str) -> None:
    source = teacher()
    student, report = convert(source, {"type": kind, "chunk_size": 4}, layers=[1], gqa=gqa)
    mixer, old = student.blocks[1].mixer, source.blocks[1].mixer
    groups = 1 if gqa == "keep" and kind != "mlstm" else 2  # mlstm has no grouped heads
    assert torch.equal(mixer.q_proj.weight, old.q_proj.weight)
    assert torch.equal(mixer.k_proj.weight, expand_gqa(old.k_proj.weight, 2, groups))
    assert torch.equal(mixer.v_proj.weight, expand_gqa(old.v_proj.weight, 2, groups))
    assert torch.equal(mixer.o_proj.weight, old.o_proj.weight)
    assert "layers.1.mixer.o_norm.weight" in report.new_parameters
    assert not [name for name in report.dropped if name.endswith("proj.weight")]
    tokens = torch.randint(0, source.config.vocab_size, (1, 11), generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(student(tokens).logits).all()


def test_attention_becomes_mamba2_with_its_projections() -> None:
    source = teacher()
    target = {"type": "mamba2", "conv_size": 2}  # groups and widths follow from the attention
    student, report = convert(source, target, layers=[1])
    mixer, old = student.blocks[1].mixer, source.blocks[1].mixer
    z, x, b, c, dt = mixer.in_proj.weight.split([24, 24, 24, 24, 4])
    assert torch.equal(x, expand_gqa(old.v_proj.weight, 2, 2))
    assert torch.equal(b, expand_gqa(old.k_proj.weight, 2, 2))
    assert torch.equal(c, old.q_proj.weight)
    assert torch.equal(mixer.out_proj.weight, old.o_proj.weight)
    assert report.new_parameters["layers.1.mixer.in_proj.weight"] == (len(z) + len(dt), 24)
    assert "layers.1.mixer.out_proj.weight" not in report.new_parameters
    wider, report = convert(source, {**target, "d_state": 8, "num_groups": 1}, layers=[1])
    assert torch.equal(wider.blocks[1].mixer.in_proj.weight[24:48], expand_gqa(old.v_proj.weight, 2, 2))
    assert report.new_parameters["layers.1.mixer.in_proj.weight"] == (24 + 8 + 8 + 4, 24)
    other, report = convert(source, {**target, "expand": 2, "num_groups": 1}, layers=[1])
    assert "layers.1.mixer.out_proj.weight" in report.new_parameters
    assert student(tokens()).logits.isfinite().all()
    assert other(tokens()).logits.isfinite().all()


def test_memory_off_silences_what_is_nothing_but_a_memory() -> None:
    source = teacher()
    student, _ = convert(source, {"type": "linear_attention"}, layers=[1])
    on = student(tokens()).logits
    with memory_off(student):
        off = student(tokens(), return_state=True)
        step = student.step(tokens()[:, 0], off.state).logits
        with torch.no_grad():
            parts = [student(tokens()[:, :17], return_state=True)]
            parts.append(student(tokens()[:, 17:], parts[0].state))
    torch.testing.assert_close(torch.cat([part.logits for part in parts], 1), off.logits)
    assert step.isfinite().all()
    assert torch.equal(student(tokens()).logits, on)
    with torch.no_grad():
        student.blocks[1].mixer.o_proj.weight.zero_()
    assert torch.equal(student(tokens()).logits, off.logits)


@pytest.mark.parametrize("combine", ["sum", "channel"])
def test_memory_off_leaves_the_window_of_a_parallel_mixer_in_any_order(combine: str) -> None:
    source = teacher()
    inner = [{"type": "linear_attention"}, {"type": "sliding_window", "window_size": 5}, HYBRID]
    student, _ = convert(source, {"type": "parallel", "combine": combine, "mixers": inner})
    for block in student.blocks:
        if combine == "channel":
            torch.nn.init.constant_(block.mixer.coefficient, 0.5)
    with memory_off(student):
        off = student(tokens()).logits
    with torch.no_grad():
        for block in student.blocks:
            block.mixer.mixers[0].o_proj.weight.zero_()
            block.mixer.mixers[2].memory_enabled = False
    assert torch.equal(student(tokens()).logits, off)


def test_mixers_are_lent_to_another_model_and_come_back() -> None:
    source = teacher()
    student, _ = convert(source, HYBRID)
    before = source(tokens()).logits
    with other_mixers(source, student, [0, 1, 2]):
        assert torch.equal(source(tokens()).logits, student(tokens()).logits)
    assert torch.equal(source(tokens()).logits, before)


def test_layers_that_keep_their_attention() -> None:
    uniform = LayerSelection(method="uniform", keep=0.25)
    assert select_layers(uniform, 28) == [0, 4, 8, 12, 16, 20, 24]
    assert select_layers(LayerSelection(method="even_odd"), 5) == [1, 3]
    scores = {0: 0.1, 1: 0.5, 2: 0.5, 3: 0.2}
    assert select_layers(LayerSelection(method="loss", keep=2), 4, scores) == [1, 2]
    assert select_layers(LayerSelection(method="mse", keep=3), 4, scores) == [1, 2, 3]
    for keep in (0, 4):
        assert len(select_layers(LayerSelection(keep=keep), 4)) == keep
    with pytest.raises(ValueError, match="needs a score for each of 4 blocks"):
        select_layers(LayerSelection(method="mse", keep=3), 4, {0: 1.0})
    plan = ConversionPlan(target=HYBRID, layers=LayerSelection(keep=1))
    assert plan.converted_layers(3) == [1, 2]


def test_windows_of_targets() -> None:
    assert window_of({"type": "lolcats"}) == {"window_size": 64, "num_sinks": 0}
    assert window_of(BESIDE) == {"window_size": 8, "num_sinks": 2}
    assert window_of({"type": "linear_attention"}) is None


def test_a_mixer_that_begins_louder_than_the_attention_is_scaled_down_to_it() -> None:
    source = teacher()

    @torch.no_grad()
    def loudness(model: MemoryLM, index: int) -> float:
        block, hidden = source.blocks[index], source.embed(tokens())
        for before in source.blocks[:index]:
            hidden = before.after_mixer(hidden, before.mixer(before.mixer_input(hidden)).hidden)
        mixed = model.blocks[index].mixer(block.mixer_input(hidden)).hidden
        return float(mixed.square().mean().sqrt())

    loud = {"type": "mamba2", "head_dim": 6}
    torch.manual_seed(3)
    raw, _ = convert(source, loud)
    torch.manual_seed(3)
    student, report = convert_mixers(source, ConversionPlan(target=loud), tokens())
    assert set(report.output_scales) == {i for i in range(3) if loudness(raw, i) > loudness(source, i)}
    assert report.output_scales
    for index, scale in report.output_scales.items():
        assert scale == pytest.approx(loudness(source, index) / loudness(raw, index))
        assert loudness(student, index) == pytest.approx(loudness(source, index), rel=1e-4)
    assert str(next(iter(report.output_scales))) in report.summary()


def test_a_mixer_that_begins_equal_to_the_attention_is_never_scaled() -> None:
    source = teacher()
    student, report = convert_mixers(source, ConversionPlan(target=HYBRID), tokens())
    assert report.output_scales == {}
    assert torch.equal(student.layers[0].mixer.o_proj.weight, source.layers[0].mixer.o_proj.weight)


def test_convolutions_of_new_mixers_begin_as_the_identity() -> None:
    student, _ = convert(teacher(), {"type": "gated_delta_net"})
    conv = student.layers[0].mixer.conv
    x = torch.randn(2, 7, conv.weight.shape[0])
    y, _ = causal_conv(x, conv.weight, conv.bias, activation="silu")
    assert torch.equal(y, torch.nn.functional.silu(x))


def test_the_memory_of_allmem_begins_with_the_projections_of_the_attention() -> None:
    source = teacher()
    student, report = convert_mixers(source, ConversionPlan(target={"type": "allmem", "window_size": 6}))
    old, memory = source.blocks[0].mixer, student.blocks[0].mixer.mixers[1]
    key_heads, groups = HEADS["num_kv_heads"], HEADS["num_heads"] // HEADS["num_kv_heads"]
    assert memory.config.num_heads == key_heads
    heads = old.q_proj.weight.unflatten(0, (key_heads, groups, -1))
    assert torch.equal(memory.q_proj.weight, heads.mean(1).flatten(0, 1))
    assert torch.equal(memory.k_proj.weight, old.k_proj.weight)
    assert torch.equal(memory.v_proj.weight, old.v_proj.weight)
    columns = old.o_proj.weight.unflatten(1, (key_heads, groups, -1))
    assert torch.equal(memory.o_proj.weight, columns.sum(2).flatten(1, 2))
    # they are trained like all that the source does not have
    assert {f"layers.0.mixer.mixers.1.{name}_proj.weight" for name in "qkvo"} <= set(report.new_parameters)
    other, _ = convert_mixers(
        source, ConversionPlan(target={"type": "allmem", "window_size": 6, "mem_dim": 8, "mem_heads": 1})
    )
    assert other.blocks[0].mixer.mixers[1].q_proj.weight.shape == (8, source.config.d_model)
