"""Parameter groups, schedules and the language-model module."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memzoo.layers import tag_parameter
from memzoo.models.config import ModelConfig
from memzoo.train.data.batches import TokenBatch
from memzoo.train.modules import LanguageModelModule
from memzoo.train.optim import OptimizerConfig, build_optimizer, lr_factor, parameter_groups


def test_groups_follow_the_tags() -> None:
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    no_decay = tag_parameter(nn.Parameter(torch.ones(2, 2)), weight_decay=False)
    slow = tag_parameter(nn.Parameter(torch.ones(2, 2)), lr_scale=0.1)
    frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    groups = parameter_groups([matrix, vector, no_decay, slow, frozen], lr=0.5, weight_decay=0.2)
    found = [(group["lr"], group["weight_decay"], [id(p) for p in group["params"]]) for group in groups]
    assert found == [
        (0.5, 0.2, [id(matrix)]),
        (0.5, 0.0, [id(vector), id(no_decay)]),
        (0.05, 0.2, [id(slow)]),
    ]


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="every parameter is frozen"):
        build_optimizer([nn.Parameter(torch.ones(1), requires_grad=False)], OptimizerConfig())


@pytest.mark.parametrize("schedule, last", [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)])
def test_schedules_rise_then_fall(schedule: str, last: float) -> None:
    factor = lr_factor(OptimizerConfig(schedule=schedule, warmup_steps=9), num_steps=100)
    values = [factor(step) for step in range(101)]
    assert values[:9] == pytest.approx([(step + 1) / 10 for step in range(9)])
    assert values[9] == 1.0
    assert values[100] == pytest.approx(last)
    assert values[9:] == sorted(values[9:], reverse=True)
    middle = {
        "cosine": 0.1 + 0.9 * (1 + math.cos(math.pi * 45 / 91)) / 2,
        "linear": 0.1 + 0.9 * (1 - 45 / 91),
    }
    assert values[54] == pytest.approx(middle.get(schedule, 1.0))
    assert factor(500) == pytest.approx(last), "a run that goes on keeps the last rate"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": math.nan}, "lr must be positive and finite, got nan"),
        ({"lr": math.inf}, "lr must be positive and finite, got inf"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and not negative"),
        ({"weight_decay": math.nan}, "weight_decay must be finite and not negative, got nan"),
        ({"eps": -1.0}, "eps must be finite and not negative, got -1.0"),
        ({"beta2": 1.0}, "beta2 must lie in"),
        ({"min_lr_ratio": 2.0}, "min_lr_ratio must lie in"),
    ],
)
def test_bad_optimizer_settings_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)


def small_config(**fields: object) -> ModelConfig:
    layers = [{"type": "sliding_window", "window_size": 4, "num_heads": 2}]
    return ModelConfig(vocab_size=32, d_model=8, layers=layers, **fields)


def test_loss_is_the_mean_over_labelled_positions_alone() -> None:
    torch.manual_seed(0)
    module = LanguageModelModule(small_config())
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(32, (3, 10), generator=generator)
    labels = torch.where(torch.rand(3, 10, generator=generator) < 0.4, ids, -100)
    loss = module.training_step(TokenBatch(ids, labels), 0)
    every = module.model(ids).logits
    expected = F.cross_entropy(every.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_packed_documents_do_not_see_one_another() -> None:
    torch.manual_seed(0)
    module = LanguageModelModule(small_config())
    ids = torch.arange(12)[None] % 7
    batch = TokenBatch(ids, ids, torch.tensor([0, 5, 12]))
    together = module(batch)
    apart = module(TokenBatch(ids[:, 5:], ids[:, 5:]))
    assert torch.allclose(together[:, 5:], apart, atol=1e-6)


def test_linear_maps_of_mixers_follow_their_width_when_asked() -> None:
    torch.manual_seed(0)
    wide = ModelConfig(vocab_size=32, d_model=64, layers=[{"type": "based", "num_heads": 1}])
    default = LanguageModelModule(wide).model.blocks[0].mixer.q_proj.weight.std()
    scaled = LanguageModelModule(wide, mixer_init_scale=2.0).model.blocks[0].mixer.q_proj.weight.std()
    assert default.item() == pytest.approx(0.02, rel=0.2)
    assert scaled.item() == pytest.approx(2 / 8, rel=0.2)


def test_the_checkpoint_of_another_model_is_refused() -> None:
    checkpoint: dict[str, object] = {}
    LanguageModelModule(small_config()).on_save_checkpoint(checkpoint)
    LanguageModelModule(small_config()).on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="norm is 'rms' there and 'layer' here"):
        LanguageModelModule(small_config(norm="layer")).on_load_checkpoint(checkpoint)
