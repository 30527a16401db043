"""States as values: selection, donation marks, files that are whole, damaged or foreign."""

import random
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file

from memzoo.layers import State, build_mixer, host_field

PARALLEL = {
    "type": "parallel",
    "d_model": 8,
    "mixers": [
        {"type": "sliding_window", "num_heads": 2, "window_size": 3},
        {"type": "linear_attention", "num_heads": 2},
    ],
}


@dataclass(kw_only=True)
class CountingState(State):
    stored: torch.Tensor = host_field()
    value: torch.Tensor | None = None


def counting(rows: int = 3) -> CountingState:
    counts = torch.arange(rows)
    return CountingState(num_tokens=counts, stored=counts * 2, value=torch.arange(rows * 2.0).view(rows, 2))


@pytest.fixture
def nested() -> State:
    torch.manual_seed(0)
    mixer = build_mixer(PARALLEL)
    with torch.no_grad():
        return mixer(torch.randn(2, 5, 8), return_state=True).state


def tensors(state: State) -> dict[str, torch.Tensor]:
    return dict(state.named_tensors())


def test_select_keeps_repeats_and_reorders_rows():
    state = counting()
    assert state.select([2, 0, 2]).num_tokens.tolist() == [2, 0, 2]
    assert state.select(torch.tensor([True, False, True])).value.tolist() == [[0, 1], [4, 5]]
    assert state.select([]).batch_size == 0


@pytest.mark.parametrize(
    "rows, message",
    [
        ([3], "rows \\[3\\] asked from a state of batch size 3"),
        ([-1], "0 to 2"),
        ([True, False], "shape \\(3,\\)"),
    ],
)
def test_select_refuses_rows_that_do_not_exist(rows, message):
    with pytest.raises(ValueError, match=message):
        counting().select(torch.tensor(rows))


def test_map_can_leave_counters_alone():
    state = counting().map(torch.zeros_like, include_host=False)
    assert state.num_tokens.tolist() == [0, 1, 2]
    assert state.stored.tolist() == [0, 2, 4]
    assert state.value.abs().sum() == 0


def test_counters_stay_on_the_cpu():
    moved = counting().to("meta")
    assert moved.value.device.type == "meta"
    assert moved.num_tokens.device.type == moved.stored.device.type == "cpu"


def test_num_bytes_counts_every_tensor(nested):
    assert nested.num_bytes() == sum(t.numel() * t.element_size() for t in tensors(nested).values())
    assert counting().num_bytes() == 3 * (8 + 8 + 2 * 4)


def test_a_poisoned_state_refuses_to_be_read_also_inside(nested):
    inner = nested.mixers[0]
    nested.poison()
    for state in (nested, inner):
        with pytest.raises(ValueError, match="given away with donate=True"):
            state.clone()


def test_a_missing_tensor_survives_saving(tmp_path):
    state = CountingState(
        num_tokens=torch.ones(1, dtype=torch.int64), stored=torch.zeros(1, dtype=torch.int64)
    )
    state.save(tmp_path / "state.safetensors")
    again = State.load(tmp_path / "state.safetensors")
    assert isinstance(again, CountingState)
    assert again.value is None
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]  # no temporary file is left


def test_two_state_types_of_one_name_are_refused():
    with pytest.raises(ValueError, match="'CountingState' exists already"):
        type("CountingState", (State,), {"__module__": "elsewhere", "__annotations__": {}})


def test_a_file_that_is_no_state_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="state format None"):
        State.load(path)
    path.write_bytes(b"not a state")
    with pytest.raises(ValueError, match="not a readable state file"):
        State.load(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"memzoo_state_version": "99"}, "state format '99'"),
        ({"memzoo_state": '{"type": "Unheard", "fields": {}}'}, "known types are"),
        ({"memzoo_state": '{"type": "CountingState", "fields": {"colour": "tensor"}}'}, "damaged"),
        ({"memzoo_state": '{"type": "CountingState", "fields": []}'}, "damaged"),
        ({"memzoo_state": "{"}, "damaged"),
    ],
)
def test_metadata_of_another_kind_is_refused(tmp_path, change, message):
    path = tmp_path / "state.safetensors"
    counting().save(path)
    metadata = {
        "memzoo_state_version": "1",
        "memzoo_state": '{"type": "CountingState", "fields": {"num_tokens": "tensor"}}',
    }
    save_file(load_file(path), path, metadata | change)
    with pytest.raises(ValueError, match=message):
        State.load(path)


def test_tensors_that_belong_to_no_field_are_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    fields = '{"num_tokens": "tensor", "stored": "tensor", "value": null}'
    metadata = {
        "memzoo_state_version": "1",
        "memzoo_state": f'{{"type": "CountingState", "fields": {fields}}}',
    }
    whole = {"num_tokens": torch.zeros(1, dtype=torch.int64), "stored": torch.zeros(1, dtype=torch.int64)}
    save_file(whole, path, metadata)
    assert State.load(path).batch_size == 1
    save_file(whole | {"left_over": torch.zeros(1)}, path, metadata)
    with pytest.raises(ValueError, match=r"belong to no field: \['left_over'\]"):
        State.load(path)


def test_rows_begin_anew_and_others_keep_their_bits():
    state, empty = counting(), counting().map(lambda tensor: tensor * 0 - 1)
    begun = state.restart(torch.tensor([False, True, False]), empty)
    assert begun.num_tokens.tolist() == [0, -1, 2]
    assert begun.stored.tolist() == [0, -1, 4]
    assert begun.value.tolist() == [[0, 1], [-1, -1], [4, 5]]
    assert state.restart(torch.zeros(3, dtype=torch.bool), empty) is state
    assert state.restart(torch.ones(3, dtype=torch.bool), empty).value.tolist() == [[-1, -1]] * 3


def test_restart_pads_slots_and_keeps_dtypes_and_gradients():
    old = CountingState(num_tokens=torch.ones(2), stored=torch.ones(2), value=torch.ones(2, 3).bfloat16())
    learned = torch.full((2, 1), 5.0, requires_grad=True)
    empty = CountingState(num_tokens=torch.zeros(2), stored=torch.zeros(2), value=learned)
    begun = old.restart(torch.tensor([True, False]), empty)
    assert begun.value.tolist() == [[5, 0, 0], [1, 1, 1]]
    assert begun.value.dtype == torch.bfloat16
    begun.value.sum().backward()
    assert learned.grad.tolist() == [[1], [0]]


def test_restart_refuses_what_does_not_fit(nested):
    rows = torch.tensor([True, False])
    other = build_mixer({"type": "sliding_window", "d_model": 8, "num_heads": 2, "window_size": 3})
    for wrong_rows, empty, message in [
        (torch.tensor([True]), nested, r"has 2 rows; .* torch.bool \(1,\)"),
        (torch.tensor([1, 0]), nested, "a boolean for each"),
        (rows, nested.select([0]), "and 1 rows"),
        (rows, other.init_state(2), "cannot begin anew as a WindowCache"),
    ]:
        with pytest.raises(ValueError, match=message):
            nested.restart(wrong_rows, empty)
    with pytest.raises(ValueError, match="value of the CountingState is another thing"):
        counting(2).restart(rows, CountingState(num_tokens=torch.zeros(2), stored=torch.zeros(2)))


def test_plain_data_holds_a_whole_state(nested):
    plain = nested.to_plain()
    again = State.from_plain(plain)
    assert tensors(again).keys() == tensors(nested).keys()
    assert all(torch.equal(tensors(again)[name], tensor) for name, tensor in nested.named_tensors())
    plain["tensors"]["num_tokens"].zero_()
    assert nested.num_tokens.tolist() == [5, 5], "the copy is independent"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has format 2, this version reads 1"),
        ({"tensors": {}}, "damaged: 'num_tokens'"),
        ({"state": {"type": "Unheard", "fields": {}}}, "known types are"),
        ({"state": {"type": "CountingState", "fields": {"num_tokens": "tensor"}}}, "damaged"),
    ],
)
def test_damaged_plain_data_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        State.from_plain(counting().to_plain() | change)
    extra = counting().to_plain()
    extra["tensors"]["left_over"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"belong to no field: \['left_over'\]"):
        State.from_plain(extra)


@pytest.mark.parametrize("seed", range(5))
def test_damaged_files_give_a_clean_error_or_the_right_shapes(nested, tmp_path, seed):
    path = tmp_path / "state.safetensors"
    nested.save(path)
    whole = path.read_bytes()
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in nested.named_tensors()}
    dice = random.Random(seed)
    refused = 0
    for index in range(100):
        damaged = bytearray(whole)
        if index % 4 == 0:
            del damaged[dice.randrange(len(damaged)) :]
        else:  # most bits in the header, where they matter
            place = dice.randrange(
                len(damaged) if index % 4 == 1 else 8 + int.from_bytes(whole[:8], "little")
            )
            damaged[place] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        try:
            state = State.load(path)
        except ValueError:
            refused += 1
            continue
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in state.named_tensors()} == expected
    assert refused > 25
