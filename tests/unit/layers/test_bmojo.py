"""B'MOJO: the exact special cases of the layer, its store, its options, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memzoo.layers import TokenMixer, build_mixer, probe
from memzoo.layers.bmojo import BMojoMixer
from memzoo.layers.canonical import CanonicalSSM
from memzoo.testing import assert_close, assert_states_close, contract_checks

WIDTH, HEADS = 12, 3
MAMBA = {"type": "mamba2", "d_state": 4, "head_dim": 4, "expand": 1}
FORMS = ["merged", "concatenated"]


def tokens(num_tokens: int = 29) -> Tensor:
    return torch.randn(2, num_tokens, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def build(kind: str = "bmojo", **options: Any) -> TokenMixer:
    torch.manual_seed(0)
    options = {"num_heads": HEADS, "num_kv_heads": 1, **options}
    if kind == "bmojo":
        options = {"mixers": [MAMBA], **options}
    mixer = build_mixer({"type": kind, "d_model": WIDTH, **options}).double()
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if not name.endswith(("A_log", "dt_bias", "gate")):
                parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    return mixer


def bmojo(**options: Any) -> BMojoMixer:
    mixer = build(**options)
    assert isinstance(mixer, BMojoMixer)
    return mixer


def peer(of: TokenMixer, kind: str, **options: Any) -> TokenMixer:
    """An attention layer with the weights of another."""
    mixer = build(kind, **options)
    own = mixer.state_dict()
    mixer.load_state_dict({name: of.state_dict()[name] for name in own})
    return mixer


def assert_equal(mixer: TokenMixer, other: nn.Module, num_tokens: int = 29, bound: float = 1e-10) -> None:
    x = tokens(num_tokens)
    with torch.no_grad():
        expected = other(x).hidden
        assert_close("outputs", mixer(x).hidden, expected, bound)
        cut = mixer(x[:, : num_tokens // 2], return_state=True)
        rest = mixer(x[:, num_tokens // 2 :], cut.state).hidden
        assert_close("outputs in two pieces", torch.cat([cut.hidden, rest], 1), expected, bound)
        single = copy.deepcopy(mixer).float()(x.float()).hidden
    assert_close("outputs in float32", single.double(), expected, 1e-5)


# ------------------------------------------------------------------ the special cases of the layer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("eidetic_size", [0, 3, None])
def test_case_1_up_to_a_window_it_is_full_attention(eidetic_size: int | None, form: str) -> None:
    mixer = bmojo(window_size=14, eidetic_size=eidetic_size, form=form)
    assert_equal(mixer, peer(mixer, "attention"), num_tokens=14)


@pytest.mark.parametrize("form", FORMS)
def test_case_2_without_fading_and_store_it_is_a_window(form: str) -> None:
    mixer = bmojo(window_size=5, fading_window_size=0, form=form)
    assert_equal(mixer, peer(mixer, "sliding_window", window_size=5))


@pytest.mark.parametrize("form", FORMS)
def test_case_3_fading_tokens_that_are_the_tokens_double_the_window(form: str) -> None:
    mixer = bmojo(window_size=5, mixers=[], form=form)
    assert_equal(mixer, peer(mixer, "sliding_window", window_size=10))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("eidetic_size", [29, None])
def test_case_4_a_store_of_everything_is_full_attention(eidetic_size: int | None, form: str) -> None:
    mixer = bmojo(
        window_size=3, fading_window_size=0, eidetic_size=eidetic_size, eidetic_chunk_size=1, form=form
    )
    assert_equal(mixer, peer(mixer, "attention"))


def as_ssm_block(**options: Any) -> BMojoMixer:
    """One fading token, read as it is."""
    mixer = bmojo(window_size=0, fading_window_size=1, num_heads=1, num_kv_heads=1, head_dim=WIDTH, **options)
    for linear in (mixer.v_proj, mixer.o_proj):
        nn.init.eye_(linear.weight)
    return mixer


@pytest.mark.parametrize("form", FORMS)
def test_case_5_one_fading_token_is_the_inner_mixer(form: str) -> None:
    mixer = as_ssm_block(form=form)
    block = build_mixer({**MAMBA, "d_model": WIDTH}).double()
    block.load_state_dict(mixer.mixers[0].state_dict())
    assert_equal(mixer, block)


@pytest.mark.parametrize("window", [None, 6])
def test_case_6_stacks_of_both_are_hybrids(window: int | None) -> None:
    """Mamba in turns with full attention as in Jamba, or with a window as in Samba."""
    size = 29 if window is None else window
    pairs = []
    for _ in range(2):
        block = as_ssm_block()
        mamba = build_mixer({**MAMBA, "d_model": WIDTH}).double()
        mamba.load_state_dict(block.mixers[0].state_dict())
        reader = bmojo(window_size=size, fading_window_size=None if window is None else 0)
        kind = "attention" if window is None else "sliding_window"
        attention = peer(reader, kind, **({} if window is None else {"window_size": window}))
        pairs += [(block, mamba), (reader, attention)]
    x = y = tokens()
    with torch.no_grad():
        for ours, public in pairs:
            x, y = x + ours(x).hidden, y + public(y).hidden
    assert_close("hybrid", x, y, 1e-10)


@pytest.mark.parametrize(
    "options", [{"eidetic_size": 0}, {"eidetic_size": 4, "innovation_threshold": float("inf")}]
)
def test_case_7_a_store_that_takes_nothing_changes_nothing(options: dict[str, Any]) -> None:
    plain = bmojo(window_size=5)
    mixer = bmojo(window_size=5, eidetic_chunk_size=3, **options)
    mixer.load_state_dict(plain.state_dict())
    assert_equal(mixer, plain)
    state = mixer(tokens(), return_state=True).state
    assert bool((state.stored_positions() < 0).all())


EXTRA: dict[str, dict[str, Any]] = {
    "wide chunk": {"window_size": 3, "fading_window_size": 9, "eidetic_size": 4, "eidetic_chunk_size": 7},
    "half-life": {"window_size": 4, "eidetic_size": 3, "innovation_half_life": 3.0, "eidetic_sinks": 2},
    "no window": {"window_size": 0, "fading_window_size": 3, "eidetic_size": 3, "eidetic_chunk_size": 2},
    "on the grid": {"window_size": 4, "num_fading": 3, "eidetic_size": 3},
    "on the grid, joined": {"window_size": 4, "num_fading": 6, "eidetic_size": 3, "form": "concatenated"},
    "fixed": {"window_size": 4, "eidetic_size": 3, "eidetic_rope": "fixed", "eidetic_chunk_size": 3},
    "sinks alone": {"window_size": 4, "eidetic_sinks": 2, "rope_theta": None},
    "gated delta net": {
        "window_size": 4,
        "eidetic_size": 3,
        "mixers": [{"type": "gated_delta_net", "num_heads": 2, "head_dim": 4, "value_dim": 8}],
    },
    "mamba": {"window_size": 4, "eidetic_size": 3, "mixers": [{"type": "mamba1", "d_state": 3}]},
}


@pytest.mark.parametrize("name", EXTRA)
def test_case_8_any_split_is_the_whole(name: str) -> None:
    mixer = bmojo(**EXTRA[name])
    x = tokens()
    with torch.no_grad():
        whole = mixer(x, return_state=True)
        for cuts in (range(1, 29), (1, 2, 3, 11, 12, 20), (7,), (16, 24)):
            state, outputs = None, []
            for start, end in zip((0, *cuts), (*cuts, 29), strict=True):
                if end - start == 1 and state is not None:
                    out = mixer.step(x[:, start], state)
                    outputs.append(out.hidden[:, None])
                else:
                    out = mixer(x[:, start:end], state, return_state=True)
                    outputs.append(out.hidden)
                state = out.state
            assert_close("outputs", torch.cat(outputs, 1), whole.hidden, 1e-10)
            assert_states_close("state", state, whole.state, 1e-10)


@pytest.mark.parametrize("name", ["half-life", "no window", "on the grid", "fixed"])
def test_extra_configs_keep_the_contract(name: str) -> None:
    checks = contract_checks(bmojo(**EXTRA[name]), splits=4)
    for check in ("packing-float64", "padding-float64", "causality", "size", "flops", "gradients"):
        checks[check]()


def test_case_9_a_gate_at_zero_is_a_window_twice_as_wide() -> None:
    mixer = bmojo(window_size=5, zero_gate=True)
    assert_equal(mixer, peer(mixer, "sliding_window", window_size=10))


# ------------------------------------------------------------------ store


def test_both_forms_are_the_same_numbers_and_gradients() -> None:
    merged = bmojo(window_size=4, eidetic_size=3, eidetic_chunk_size=3, eidetic_sinks=1)
    joined = bmojo(window_size=4, eidetic_size=3, eidetic_chunk_size=3, eidetic_sinks=1, form="concatenated")
    joined.load_state_dict(merged.state_dict())
    found = []
    for mixer in (merged, joined):
        x = tokens().requires_grad_()
        out = mixer(x).hidden
        found.append((out, *torch.autograd.grad(out.square().sum(), [x, *mixer.parameters()])))
    for one, other in zip(*found, strict=True):
        assert_close("forms", one, other, 1e-10)


def test_every_token_is_visible_until_it_is_judged() -> None:
    """With chunks no longer than the fading window: in the window, as an image, or in the store of a later
    boundary; a token enters at the first boundary behind its window."""
    window, chunk = 4, 4
    mixer = bmojo(window_size=window, eidetic_size=None, eidetic_chunk_size=chunk)
    with torch.no_grad(), probe() as seen:
        mixer(tokens())
    found = seen["stored_positions"][0][0]
    for query in range(29):
        stored = set(found[query // chunk].tolist()) - {-1}
        assert stored == set(range(query // chunk * chunk - window + 1))
        assert stored | set(range(max(0, query - 2 * window + 1), query + 1)) == set(range(query + 1))


def test_the_store_holds_what_was_hardest_to_predict() -> None:
    mixer, x = bmojo(window_size=4, eidetic_size=5, eidetic_sinks=2), tokens()
    with torch.no_grad(), probe() as seen:
        state = mixer(x, return_state=True).state
    scores = seen["innovation"][0]
    judged = 28 // 4 * 4 - 4 + 1
    for row in range(2):
        best = sorted(range(2, judged), key=lambda j: (-float(scores[row, j]), j))[:5]
        assert state.stored_positions()[row].tolist() == [0, 1, *sorted(best)]
    for name in ("window_mass", "fading_mass", "eidetic_mass"):
        assert seen[name][0].shape == (2, 29, HEADS)
    total = seen["window_mass"][0] + seen["fading_mass"][0] + seen["eidetic_mass"][0]
    assert_close("masses", total, torch.ones_like(total), 1e-12)


def test_a_half_life_lets_old_tokens_go() -> None:
    x = tokens(60)
    kept = []
    for life in (None, 2.0):
        mixer = bmojo(window_size=4, eidetic_size=5, innovation_half_life=life)
        with torch.no_grad():
            kept.append(float(mixer(x, return_state=True).state.stored_positions().double().mean()))
    assert kept[1] > kept[0] + 10


def test_the_size_of_the_store_can_change_after_training() -> None:
    mixer, x = bmojo(window_size=4, eidetic_size=2), tokens()
    other = bmojo(window_size=4, eidetic_size=7)
    before = mixer(x, return_state=True)
    mixer.set_eidetic_size(7)
    assert torch.equal(mixer(x).hidden, other(x).hidden)
    with pytest.raises(ValueError, match="another config"):
        mixer(x, before.state)
    mixer.set_eidetic_size(0)
    assert torch.equal(mixer(x).hidden, bmojo(window_size=4)(x).hidden)


def test_the_bytes_of_a_bounded_store_do_not_grow() -> None:
    mixer = bmojo(window_size=4, eidetic_size=5)
    with torch.no_grad():
        sizes = {mixer(tokens(n), return_state=True).state.num_bytes() for n in (1, 40, 90)}
    assert len(sizes) == 1


def test_a_store_without_bound_takes_what_passes_the_threshold() -> None:
    mixer = bmojo(window_size=4, eidetic_size=None, innovation_threshold=0.9)
    with torch.no_grad(), probe() as seen:
        state = mixer(tokens(90), return_state=True).state
    scores = seen["innovation"][0]
    for row in range(2):
        expected = [j for j in range(88 - 4 + 1) if float(scores[row, j]) > 0.9]
        assert [j for j in state.stored_positions()[row].tolist() if j >= 0] == expected
    assert state.num_bytes() <= mixer.state_num_bytes(90, 2, torch.float64)


def test_a_learned_predictor_is_trained_by_its_loss_alone() -> None:
    mixer, x = bmojo(window_size=4, eidetic_size=3, predictor="learned"), tokens()
    out = mixer(x)
    total, count = out.aux["prediction"]
    assert count.tolist() == [29, 29]
    (total / count).mean().backward()
    for name, parameter in mixer.named_parameters():
        assert (parameter.grad is None) == (name != "eidetic.predictor")


def test_the_memory_can_be_switched_off() -> None:
    mixer = bmojo(window_size=4, eidetic_size=3)
    window = peer(mixer, "sliding_window", window_size=4)
    mixer.memory_enabled = False
    assert_equal(mixer, window)


# ------------------------------------------------------------------ canonical systems, and what is refused


def test_a_nilpotent_system_remembers_its_last_inputs_to_the_bit() -> None:
    system = CanonicalSSM(4)
    u = torch.randn(3, 15, generator=torch.Generator().manual_seed(0))
    y, states = system(u)
    assert torch.equal(y[:, 4:], u[:, :-4])
    assert torch.equal(states[:, 9], u[:, 5:9])
    assert bool((torch.linalg.matrix_power(system.transition(), 4) == 0).all())


def test_a_companion_system_is_its_diagonal_one() -> None:
    modes = torch.tensor([0.9, -0.4, 0.3, 0.6 + 0.5j, 0.6 - 0.5j, -0.7], dtype=torch.complex128)
    system = CanonicalSSM.from_modes(modes)
    with torch.no_grad():
        system.readout.copy_(torch.linspace(-1, 1, 6))
        u = torch.randn(1, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        y, _ = system(u)
    powers = modes ** torch.arange(6)[:, None]  # the columns are eigenvectors
    write = torch.linalg.solve(powers, torch.eye(6, dtype=torch.complex128)[-1])
    z, expected = torch.zeros(6, dtype=torch.complex128), []
    for value in u[0]:
        expected.append((system.readout.to(z.dtype) @ powers @ z).real)
        z = modes * z + write * value
    assert_close("outputs", y[0], torch.stack(expected).detach(), 1e-8)
    impulse = system(torch.eye(1, 40, dtype=torch.float64))[1][0, 1:, -1].detach()  # of the newest state
    for t in range(6, 40):
        assert_close("impulse", impulse[t], (system.feedback.detach() * impulse[t - 6 : t]).sum(), 1e-8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window_size": -1}, "window_size"),
        ({"window_size": 0, "fading_window_size": 0}, "Set one of them"),
        ({"window_size": 4, "eidetic_size": -1}, "eidetic_size"),
        ({"window_size": 4, "eidetic_chunk_size": 0}, "eidetic_chunk_size"),
        ({"window_size": 4, "eidetic_rope": "relative"}, "eidetic_rope"),
        ({"window_size": 4, "predictor": "learnt"}, "Did you mean 'learned'"),
        ({"window_size": 4, "num_fading": 2, "eidetic_chunk_size": 3}, "as long as the window"),
        ({"window_size": 4, "zero_gate": True, "mixers": []}, "inner mixer to gate"),
        ({"window_size": 4, "mixers": [MAMBA, MAMBA]}, "one mixer"),
        ({"window_size": 4, "num_kv_heads": 2}, "num_kv_heads"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(**options)


def test_chunks_that_leave_a_hole_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="invisible for a while"):
        build(window_size=3, fading_window_size=3, eidetic_size=2, eidetic_chunk_size=5)
