"""Surgery: what is copied, what is new, and the parity checks of a converted model."""

from __future__ import annotations

import pytest
import torch

from memzoo.models.config import ModelConfig
from memzoo.models.conversion import check_parity, convert_mixers
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
    student, report = convert_mixers(source, HYBRID, layers=[])
    check_parity(source, student, report, tokens())
    report.raise_on_failure()
    assert torch.equal(source(tokens()).logits, student(tokens()).logits)
    assert report.num_new == 0


def test_copies_every_shared_weight_and_lists_the_new_ones() -> None:
    source = teacher()
    student, report = convert_mixers(source, HYBRID, layers=[0, 2])
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
    student, report = convert_mixers(source, HYBRID)
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
    student, report = convert_mixers(source, HYBRID)
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
    student, report = convert_mixers(source, HYBRID)
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
        convert_mixers(teacher(), HYBRID, layers=layers)


def test_refuses_unknown_targets_and_keys() -> None:
    with pytest.raises(ValueError, match="lolcats"):
        convert_mixers(teacher(), {"type": "lolcat"})
    with pytest.raises(ValueError, match="window_size"):
        convert_mixers(teacher(), {"type": "sliding_window", "window_sise": 4})


def test_does_not_change_the_source() -> None:
    source = teacher()
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    student, _ = convert_mixers(source, HYBRID)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
