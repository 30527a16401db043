"""`parallel` and `sequential`: what they compute, what they hand on, what they refuse."""

import pytest
import torch
from torch import Tensor

from memzoo.layers import LayerOutput, TokenMixer, build_mixer, mixer_config
from memzoo.layers.parallel import Parallel
from memzoo.layers.sequential import Sequential

WINDOW = {"type": "sliding_window", "num_heads": 2, "window_size": 3}
LINEAR = {"type": "linear_attention", "num_heads": 2, "feature_dim": 3}
CONV = {"type": "base_conv"}
LOLCATS = {"type": "lolcats", "num_heads": 2, "window_size": 3, "feature_dim": 2}


def build(kind: str, mixers: list[dict], **config: object) -> TokenMixer:
    torch.manual_seed(0)
    mixer = build_mixer({"type": kind, "d_model": 8, "mixers": mixers, **config}).double()
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name.startswith("mixers."):
                parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    return mixer


def tokens(num_tokens: int = 10) -> Tensor:
    return torch.randn(2, num_tokens, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_sum() -> None:
    mixer, x = build("parallel", [WINDOW, LINEAR, CONV]), tokens()
    expected = sum(inner(x).hidden for inner in mixer.mixers)
    torch.testing.assert_close(mixer(x).hidden, expected, rtol=0, atol=1e-14)


def test_gates_start_at_one_half_and_follow_the_token() -> None:
    mixer, x = build("parallel", [WINDOW, LINEAR], combine="gated"), tokens()
    outputs = [inner(x).hidden for inner in mixer.mixers]
    torch.testing.assert_close(mixer(x).hidden, sum(outputs) / 2, rtol=0, atol=1e-14)
    mixer.gate_proj.weight.data.normal_(generator=torch.Generator().manual_seed(2))
    gates = mixer.gate_proj(x).sigmoid()
    expected = gates[..., :1] * outputs[0] + gates[..., 1:] * outputs[1]
    torch.testing.assert_close(mixer(x).hidden, expected, rtol=0, atol=1e-14)


def test_channel_coefficients_start_at_zero_but_can_learn() -> None:
    mixer, x = build("parallel", [WINDOW, LINEAR, CONV], combine="channel"), tokens()
    first, *others = (inner(x).hidden for inner in mixer.mixers)
    out = mixer(x).hidden
    assert torch.equal(out, first)
    out.square().sum().backward()
    assert bool((mixer.coefficient.grad != 0).all())
    mixer.coefficient.data.normal_(generator=torch.Generator().manual_seed(2))
    expected = first + mixer.coefficient[0] * others[0] + mixer.coefficient[1] * others[1]
    torch.testing.assert_close(mixer(x).hidden, expected, rtol=0, atol=1e-14)


def test_sequential_feeds_each_output_to_the_next() -> None:
    mixer, x = build("sequential", [CONV, WINDOW, LINEAR]), tokens()
    expected = x
    for inner in mixer.mixers:
        expected = inner(expected).hidden
    assert torch.equal(mixer(x).hidden, expected)


def test_nested_composites_keep_the_contract_across_a_cut() -> None:
    inner = {
        "type": "parallel",
        "combine": "gated",
        "mixers": [WINDOW, {"type": "sequential", "mixers": [CONV, LINEAR]}],
    }
    mixer, x = build("sequential", [CONV, inner]), tokens()
    whole = mixer(x, return_state=True)
    first = mixer(x[:, :4], return_state=True)
    second = mixer(x[:, 4:], first.state, return_state=True)
    torch.testing.assert_close(
        torch.cat([first.hidden, second.hidden], dim=1), whole.hidden, rtol=0, atol=1e-12
    )
    names = [name for name, _ in whole.state.named_tensors()]
    assert "mixers.1.mixers.1.mixers.0.tail" in names
    assert mixer.state_num_bytes(10, 2, torch.float64) == whole.state.num_bytes()


def test_donated_state_is_poisoned_inside_too() -> None:
    mixer, x = build("parallel", [WINDOW, LINEAR]), tokens()
    with torch.no_grad():
        state = mixer(x, return_state=True).state
        mixer.step(x[:, 0], state, donate=True)
    with pytest.raises(ValueError, match="donate=True"):
        state.mixers[0].check_usable()


def test_extras_and_losses_carry_the_number_of_their_mixer() -> None:
    mixer, x = build("parallel", [WINDOW, LOLCATS]), tokens()

    class Lossy(type(mixer.mixers[0])):
        def mix(self, x: Tensor, ctx: object, state: object) -> LayerOutput:
            out = super().mix(x, ctx, state)
            out.aux["balance"] = (torch.ones(2), torch.ones(2))
            return out

    mixer.mixers[0].__class__ = Lossy
    out = mixer(x, mask=torch.arange(10).expand(2, 10) < 9, return_extras=True)
    assert list(out.aux) == ["0.balance"]
    assert list(out.extras) == ["0.head_outputs", "1.head_outputs"]
    assert all(heads.shape == (2, 10, 2, 4) for heads in out.extras.values())


def test_what_inner_mixers_need_and_allow_holds_for_the_whole() -> None:
    class Segmented(type(build_mixer({**WINDOW, "d_model": 8}))):
        exact = "segment"
        needs = frozenset({"roles"})
        segment_size = 6

    class Other(Segmented):
        segment_size = 4

    config = mixer_config({"type": "parallel", "d_model": 8, "mixers": [WINDOW, CONV, WINDOW]})
    inner = [Segmented(config.mixers[0]), build_mixer(config.mixers[1]), Other(config.mixers[2])]
    mixer = Parallel(config, inner)
    assert mixer.exact == "segment"
    assert mixer.needs == {"roles"}
    assert mixer.segment_size == 12
    with pytest.raises(ValueError, match="needs the per-token streams"):
        mixer(torch.zeros(1, 3, 8))
    assert Parallel.needs == frozenset()


def test_reset_parameters_reaches_the_inner_mixers() -> None:
    mixer = build("parallel", [WINDOW, LINEAR], combine="channel")
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(float("nan"))
    mixer.reset_parameters()
    assert all(bool(torch.isfinite(parameter).all()) for parameter in mixer.parameters())
    assert not bool(mixer.coefficient.any())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixers": [WINDOW]}, "at least two inner mixers, got 1"),
        (
            {"mixers": [WINDOW, {**LINEAR, "d_model": 6}]},
            "has d_model=6, the 'parallel' mixer around it has 8",
        ),
        ({"mixers": [WINDOW, LINEAR], "combine": "gate"}, "Did you mean 'gated'"),
        (
            {"mixers": [WINDOW, {"type": "linear_atention", "num_heads": 2}]},
            "Did you mean 'linear_attention'",
        ),
    ],
)
def test_refused_configurations(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mixer({"type": "parallel", "d_model": 8, **values})


def test_mixers_that_do_not_fit_the_config_are_refused() -> None:
    config = mixer_config({"type": "sequential", "d_model": 8, "mixers": [WINDOW, CONV]})
    swapped = [build_mixer(inner) for inner in reversed(config.mixers)]
    with pytest.raises(ValueError, match=r"Use memzoo\.layers\.build_mixer"):
        Sequential(config, swapped)


def test_mixer_with_a_norm_of_its_own_is_refused() -> None:
    config = mixer_config({"type": "parallel", "d_model": 8, "mixers": [WINDOW, CONV]})
    inner = [build_mixer(item) for item in config.mixers]
    inner[1].owns_norm = True
    with pytest.raises(ValueError, match="mixers\\[1\\] \\('base_conv'\\) normalises its own input"):
        Parallel(config, inner)


def test_plain_data_round_trip() -> None:
    config = build("parallel", [WINDOW, LINEAR], combine="gated").config
    assert mixer_config(config.to_dict()) == config
