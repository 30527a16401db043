"""ModelConfig: the forms of `layers`, defaults, round trips, and errors that name the thing."""

import copy

import pytest

from memzoo.models.config import ModelConfig

ATTENTION = {"type": "attention"}
WINDOW = {"type": "sliding_window", "window_size": 4}
BASE = {"vocab_size": 11, "d_model": 16, "mixer_defaults": {"num_heads": 2}}


def types(config: ModelConfig) -> list[str]:
    return [mixer.type for mixer in config.mixers]


@pytest.mark.parametrize(
    ("layers", "num_layers", "expected"),
    [
        (ATTENTION, 3, "aaa"),
        ([ATTENTION, WINDOW], None, "as"),
        ({"pattern": [WINDOW, WINDOW, ATTENTION], "repeat": 2}, None, "ssassa"),
        ({"pattern": [WINDOW, ATTENTION]}, 6, "sasasa"),
        ([ATTENTION, {"pattern": [WINDOW, ATTENTION], "repeat": 2}, WINDOW], 6, "asasas"),
    ],
)
def test_forms_of_layers(layers, num_layers, expected):
    config = ModelConfig(**BASE, layers=layers, num_layers=num_layers)
    assert "".join(name[0] for name in types(config)) == expected
    assert config.depth == config.num_layers == len(expected)


def test_defaults_fill_only_fields_that_exist_and_are_not_set():
    defaults = {"num_heads": 4, "num_sinks": 3, "rope_theta": 500.0}
    own = {**WINDOW, "num_heads": 2}
    config = ModelConfig(vocab_size=11, d_model=16, layers=[ATTENTION, own], mixer_defaults=defaults)
    attention, window = config.mixers
    assert (attention.num_heads, attention.rope_theta) == (4, 500.0)
    assert not hasattr(attention, "num_sinks")
    assert (window.num_heads, window.num_sinks, window.d_model) == (2, 3, 16)


def test_round_trip_through_plain_data():
    config = ModelConfig(
        **BASE,
        layers={"pattern": [WINDOW, ATTENTION], "repeat": 2},
        mlp=[{"type": "none"}, {"type": "swiglu", "d_ff": 8}, {"type": "gelu", "d_ff": 4}, {"type": "none"}],
        norm="layer",
        tie_embeddings=True,
    )
    plain = config.to_dict()
    again = ModelConfig.from_dict(plain)
    assert again == config
    assert again.mixers == config.mixers
    plain["layers"]["pattern"].clear()
    assert len(config.mixers) == 4


def test_replacing_mixers_drops_defaults_that_nobody_has_any_more():
    config = ModelConfig(
        vocab_size=11,
        d_model=16,
        layers=WINDOW,
        num_layers=2,
        mixer_defaults={"num_heads": 2, "num_sinks": 1},
    )
    before = copy.deepcopy(config.to_dict())
    changed = config.replace_mixers({0: ATTENTION})
    assert types(changed) == ["attention", "sliding_window"]
    assert changed.mixers[1] == config.mixers[1]
    assert config.replace_mixers({0: ATTENTION, 1: ATTENTION}).mixer_defaults == {"num_heads": 2}
    assert config.to_dict() == before
    with pytest.raises(ValueError, match="layer 2 does not exist"):
        config.replace_mixers({2: ATTENTION})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be an integer of at least 1, got 0"),
        ({"d_model": "wide"}, "d_model must be"),
        ({"norm": "rsm"}, "Did you mean 'rms'"),
        ({"norm_eps": 0}, "norm_eps"),
        ({"tie_embeddings": 1}, "tie_embeddings must be true or false"),
        ({"layers": []}, "layers is empty"),
        ({"layers": ATTENTION}, "num_layers must say"),
        ({"layers": "attention"}, "layers must be"),
        ({"layers": [{"window_size": 3}]}, "layer 0 is"),
        ({"layers": [{"type": "atention"}]}, "Did you mean 'attention'"),
        ({"layers": [{**WINDOW, "window_sizes": 3}]}, r"layer 0: unknown key 'window_sizes'.*'window_size'"),
        ({"layers": [{**WINDOW, "window_size": 0}]}, "window_size must be"),
        ({"layers": [{**ATTENTION, "num_heads": 3}]}, "multiple of num_heads"),
        ({"layers": [ATTENTION], "num_layers": 2}, "describes 1 blocks, but num_layers is 2"),
        ({"layers": {"pattern": [ATTENTION], "repeats": 2}}, "Did you mean 'repeat'"),
        ({"layers": {"pattern": [ATTENTION, WINDOW]}, "num_layers": 3}, "needs repeat"),
        ({"layers": {"pattern": [ATTENTION], "repeat": 0}}, "repeat must be"),
        ({"layers": {"pattern": [ATTENTION], "repeat": 10**9}}, "more than 4096 blocks"),
        ({"layers": [{"pattern": [ATTENTION] * 3, "repeat": 2000}]}, "more than 4096 blocks"),
        ({"layers": ATTENTION, "num_layers": 10**6}, "num_layers must be at most 4096"),
        ({"mixer_defaults": {"num_heads": 2, "num_head": 2}}, r"'num_head', which no mixer.*'num_heads'"),
        ({"mixer_defaults": {"num_heads": 2, "type": "attention"}}, "cannot set"),
        ({"mlp": {"type": "swigglu", "d_ff": 3}}, "Did you mean 'swiglu'"),
        ({"mlp": {"type": "swiglu"}}, "needs d_ff"),
        ({"mlp": {"type": "none", "d_ff": 3}}, "unknown key 'd_ff'"),
        ({"mlp": [{"type": "none"}] * 2}, "mlp lists 2 entries for 1 layers"),
    ],
)
def test_errors_name_the_thing(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**BASE, "layers": [ATTENTION], **changes})


def test_unknown_and_missing_keys():
    with pytest.raises(ValueError, match=r"unknown key 'vocabsize'.*'vocab_size'"):
        ModelConfig.from_dict({**BASE, "layers": [ATTENTION], "vocabsize": 3})
    with pytest.raises(ValueError, match=r"needs the keys \['layers'\]"):
        ModelConfig.from_dict(BASE)


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "memzoo.layers.Attention", "../attention"])
def test_only_registered_names_are_mixers(name):
    with pytest.raises(ValueError, match="is unknown"):
        ModelConfig(**{**BASE, "layers": [{"type": name}], "mixer_defaults": {}})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("d_model", {"d_model": 10**12}),
        ("vocab_size", {"vocab_size": 10**19}),
        ("d_ff", {"mlp": {"type": "swiglu", "d_ff": 10**12}}),
        ("num_layers", {"layers": {"type": "base_conv"}, "num_layers": 10**12}),
        ("window_size", {"layers": [{"type": "sliding_window", "num_heads": 2, "window_size": 10**19}]}),
        ("feature_dim", {"layers": [{"type": "based", "num_heads": 2, "feature_dim": 10**12}]}),
        ("conv_size", {"layers": [{"type": "base_conv", "conv_size": 10**12}]}),
    ],
)
def test_sizes_that_no_tensor_has_are_refused(name: str, changes: dict) -> None:
    values = {"vocab_size": 8, "d_model": 8, "layers": [{"type": "base_conv"}], **changes}
    with pytest.raises(ValueError, match=f"{name} must be at most 2,147,483,647, got 10?,000,000"):
        ModelConfig(**values)
