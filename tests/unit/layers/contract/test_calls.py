"""What a mixer says to a caller who made a mistake, the forms of input, and the probe."""

import dataclasses

import peft
import pytest
import torch

from memzoo.layers import build_mixer, is_probing, list_mixers, mixer_config, probe, record, register_mixer
from memzoo.layers.contract import MixerConfig, build_context, check_choice
from memzoo.layers.registry import mixer_entry
from memzoo.testing import small_configs

WINDOW = {"type": "sliding_window", "d_model": 8, "num_heads": 2, "window_size": 3}


@pytest.fixture(scope="module")
def mixer():
    torch.manual_seed(0)
    return build_mixer(WINDOW).eval()


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
ROW = X[:1]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m: m(X[0]), ValueError, "expects \\(B, T, d_model\\) with d_model=8, got \\(5, 8\\)"),
        (lambda m: m(X[..., :4]), ValueError, "d_model=8"),
        (lambda m: m(X, mask=torch.ones(2, 4, dtype=torch.bool)), ValueError, "mask must have the shape"),
        (lambda m: m(X, mask=torch.ones(2, 5)), TypeError, "mask.bool\\(\\)"),
        (lambda m: m(X, cu_seqlens=torch.tensor([0, 5])), ValueError, "packs sequences in one row"),
        (lambda m: m(ROW, cu_seqlens=torch.tensor([0, 4])), ValueError, "ends at the 5 tokens"),
        (lambda m: m(ROW, cu_seqlens=torch.tensor([0, 4, 3, 5])), ValueError, "never decreases"),
        (
            lambda m: m(ROW, cu_seqlens=torch.tensor([0, 5]), mask=torch.arange(5)[None] > 0),
            ValueError,
            "drop the padding before packing",
        ),
        (
            lambda m: m(X, streams={"roles": torch.zeros(2, 4)}),
            ValueError,
            "stream 'roles' must have the shape",
        ),
        (lambda m: m(X, overrides={"chunk_size": 3}), ValueError, "It takes num_sinks, window_size"),
        (lambda m: m(X, overrides={"window_size": 0}), ValueError, "window_size must be an integer"),
        (lambda m: m(ROW, cu_seqlens=torch.tensor([0.0, 2.5, 5.0])), TypeError, "must be integers"),
        (lambda m: m(X, (1, 2)), TypeError, "got tuple"),
        (lambda m: m(X, m.init_state(3)), ValueError, "made for batch size 3, but the input holds 2"),
        (lambda m: m.step(X[:, 0], None), ValueError, "init_state"),
        (lambda m: m.step(X, m.init_state(2)), ValueError, "expects \\(N, d_model\\)"),
    ],
)
def test_mistakes_of_a_call_are_named(mixer, call, error, message):
    with pytest.raises(error, match=message):
        call(mixer)


EVERY_TYPE = [(name, number) for name in list_mixers() for number in (0, 1)]


@pytest.mark.parametrize("name, number", EVERY_TYPE)
def test_the_meta_device_gives_shapes(name, number):
    mixer = build_mixer(small_configs(name)[number]).to("meta")
    x = torch.empty(2, 2 * mixer.span + 3, mixer.d_model, device="meta", requires_grad=True)
    out = mixer(x, return_state=True)
    assert out.hidden.is_meta
    assert out.hidden.shape == x.shape
    out.hidden.sum().backward()
    assert x.grad.shape == x.shape
    assert mixer(x, out.state).hidden.shape == x.shape
    assert mixer.step(x[:, 0], out.state).hidden.shape == (2, mixer.d_model)
    assert mixer(x[:1], cu_seqlens=torch.tensor([0, 3, x.shape[1]])).hidden.shape == x[:1].shape


@pytest.mark.parametrize(
    "weights, given", [("float32", "float64"), ("bfloat16", "float32"), ("float32", "int64")]
)
@pytest.mark.parametrize("name", list_mixers())
def test_an_input_of_another_dtype_is_named(name, weights, given):
    mixer = build_mixer(small_configs(name)[0]).to(getattr(torch, weights))
    x = torch.ones(2, 5, mixer.d_model).to(getattr(torch, given))
    message = rf"is torch\.{given}, its weights are torch\.{weights}\. Convert"
    with pytest.raises(ValueError, match=message):
        mixer(x)
    with pytest.raises(ValueError, match=message):
        mixer.step(x[:, 0], mixer.init_state(2))


def test_dtypes_that_go_together_are_let_through(mixer):
    wide = build_mixer(WINDOW).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mixer(X.bfloat16()).hidden.dtype == torch.bfloat16
        for module, x in ((mixer, X.double()), (wide, X)):  # float64 is left alone by autocast
            with pytest.raises(ValueError, match="Convert one of them"):
                module(x)
    # low-rank updates keep float32 weights inside a bfloat16 model
    half = build_mixer(WINDOW).bfloat16()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"])
    wrapped = peft.tuners.lora.LoraModel(half, {"default": config}, "default")
    for parameter_name, parameter in wrapped.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = parameter.data.float()
    assert half(X.bfloat16()).hidden.dtype == torch.bfloat16


LAYERS = {
    "attention": {"type": "attention", "num_heads": 2},
    "narrow attention": {"type": "attention", "num_heads": 4},
    "window 3": {"type": "sliding_window", "num_heads": 2, "window_size": 3},
    "window 4": {"type": "sliding_window", "num_heads": 2, "window_size": 4},
    "linear": {"type": "linear_attention", "num_heads": 2},
    "linear, no normaliser": {"type": "linear_attention", "num_heads": 2, "normalize": False},
    "convolution": {"type": "base_conv", "conv_size": 3},
    "long convolution": {"type": "base_conv", "conv_size": 4},
    "lolcats": {"type": "lolcats", "num_heads": 2, "window_size": 3, "feature_dim": 2},
    "terrace": {"type": "lolcats", "num_heads": 2, "window_size": 3, "feature_dim": 2, "window": "terrace"},
    "sum": {"type": "parallel", "mixers": [{"type": "attention", "num_heads": 2}, {"type": "base_conv"}]},
    "other sum": {
        "type": "parallel",
        "mixers": [{"type": "base_conv"}, {"type": "attention", "num_heads": 2}],
    },
    "sum of three": {"type": "parallel", "mixers": [{"type": "base_conv"}] * 3},
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_state_of_another_mixer_is_refused(name):
    mixer = build_mixer({"d_model": 8, **LAYERS[name]})
    for other, entry in LAYERS.items():
        state = build_mixer({"d_model": 8, **entry})(X, return_state=True).state
        if other == name:
            mixer(X, state)
            mixer.step(X[:, 0], state)
            continue
        with pytest.raises((TypeError, ValueError), match=r"(?i)the state .* another|of another mixer"):
            mixer(X, state)
        with pytest.raises((TypeError, ValueError), match="another"):
            mixer.step(X[:, 0], state)


def test_a_mask_that_hides_nothing_is_the_dense_form(mixer):
    base = mixer(X).hidden
    assert torch.equal(mixer(X, mask=torch.ones(2, 5, dtype=torch.bool)).hidden, base)
    packed = mixer(ROW, mask=torch.ones(1, 5, dtype=torch.bool), cu_seqlens=torch.tensor([0, 2, 5])).hidden
    assert torch.equal(packed, mixer(ROW, cu_seqlens=torch.tensor([0, 2, 5]), max_seqlen=3).hidden)


def test_context_describes_dense_packed_and_masked_calls():
    dense = build_context((2, 3), torch.device("cpu"), num_seen=torch.tensor([4, 4]))
    assert (dense.lengths, dense.starts, dense.uniform_num_seen) == ((3, 3), (4, 4), 4)
    assert dense.positions.tolist() == [[4, 5, 6]] * 2
    assert dense.num_tokens_after.tolist() == [7, 7]

    ragged = build_context((2, 2), torch.device("cpu"), num_seen=torch.tensor([1, 5]))
    assert (ragged.starts, ragged.uniform_num_seen) == ((1, 5), None)
    assert ragged.positions.tolist() == [[1, 2], [5, 6]]

    cu_seqlens = torch.tensor([0, 2, 2, 5])
    packed = build_context(
        (1, 5), torch.device("cpu"), num_seen=torch.tensor([3, 9, 0]), cu_seqlens=cu_seqlens
    )
    assert packed.lengths == (2, 0, 3)
    assert packed.positions.tolist() == [[3, 4, 0, 1, 2]]

    mask = torch.tensor([[False, True, True], [True, False, False]])
    roles = torch.arange(6).view(2, 3)
    masked = build_context((2, 3), torch.device("cpu"), mask=mask, streams={"roles": roles})
    assert masked.lengths == (2, 1)
    assert masked.positions.tolist() == [[0, 1, 0]]
    assert masked.streams["roles"].tolist() == [[1, 2, 3]]
    assert masked.unpack(masked.pack(roles[..., None])).squeeze(-1).tolist() == [[0, 1, 2], [3, 0, 0]]
    parts = masked.split(masked.pack(roles[..., None]))
    assert [part.shape[0] for part in parts] == [2, 1]
    assert torch.equal(masked.merge(parts), masked.pack(roles[..., None]))


def test_in_place_writing_needs_a_call_without_gradients():
    arguments = (2, 1), torch.device("cpu")
    assert not build_context(*arguments, in_place=True).in_place
    with torch.no_grad():
        assert build_context(*arguments, in_place=True).in_place


@pytest.mark.parametrize(
    "values, message",
    [
        ({**WINDOW, "windw_size": 3}, "Did you mean 'window_size'"),
        ({**WINDOW, "type": "slidin_window"}, "Did you mean 'sliding_window'"),
        ({**WINDOW, "type": "mamba"}, "Did you mean 'mamba1' or 'mamba2' or 'mamba3'"),
        ({"type": "sliding_window", "d_model": 8, "num_heads": 2}, "needs the keys \\['window_size'\\]"),
        ({"d_model": 8}, "needs a type"),
        ({**WINDOW, "d_model": 0}, "d_model must be an integer of at least 1, got 0"),
        ({**WINDOW, "d_model": True}, "d_model must be an integer"),
        ({**WINDOW, "num_heads": 3}, "multiple of num_heads"),
    ],
)
def test_mistakes_of_a_config_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        build_mixer(values)


def test_configs_are_plain_data_both_ways():
    for name in list_mixers():
        for values in mixer_entry(name).small_configs():
            config = mixer_config({"type": name, **values})
            assert mixer_config(config.to_dict()) == config
            assert mixer_config(config) is config


def test_a_name_cannot_be_registered_twice():
    with pytest.raises(ValueError, match="'attention' is registered already"):
        register_mixer("attention", mixer_entry("attention").mixer, MixerConfig)


def test_a_registration_with_other_classes_is_refused():
    entry = mixer_entry("attention")
    for mixer, config in (
        (entry.config, entry.mixer),
        (build_mixer(WINDOW), entry.config),
        (entry.mixer, torch.nn.Module),
    ):
        with pytest.raises(TypeError, match="'another' must be a subclass of"):
            register_mixer("another", mixer, config)
    assert "another" not in list_mixers()


@pytest.mark.parametrize("given", ["based", None, ["based"]])
def test_a_config_that_is_no_mapping_is_refused(given):
    with pytest.raises(
        ValueError, match=r'must be a mapping .* Write \{"type": "based", "d_model": \.\.\.\}'
    ):
        build_mixer(given)


def test_a_choice_suggests_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'sliding'"):
        check_choice("window", "slidng", ("sliding", "terrace"))


def test_probe_collects_detached_values_and_nests():
    record("ignored", torch.ones(1))
    with probe() as outer:
        assert is_probing()
        record("a", torch.ones(1, requires_grad=True))
        with probe() as inner:
            record("a", torch.zeros(1))
        record("a", torch.full((1,), 2.0))
    assert not is_probing()
    assert [float(value) for value in outer["a"]] == [1, 0, 2]
    assert [float(value) for value in inner["a"]] == [0]
    assert not outer["a"][0].requires_grad
    assert "ignored" not in outer


def test_probe_records_nothing_while_a_block_is_recomputed():
    def block(x):
        record("seen", x)
        return (x * 2).sin()

    x = torch.ones(3, requires_grad=True)
    with probe() as seen:
        torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()
    assert len(seen["seen"]) == 1


def test_a_state_put_together_from_two_batches_is_refused():
    mixer = build_mixer({"type": "mamba3", "d_model": 8, "head_dim": 4})
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    state = mixer(x, return_state=True).state
    mixed = dataclasses.replace(state, value=state.value[:1])
    with pytest.raises(ValueError, match=r"the state has 2 rows, but value has the shape \(1, 1, 4, 4\)"):
        mixer(x, mixed)
