"""Synthetic tasks: a plain reader answers every question from the tokens; draws follow the seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from memzoo.train.data.mqar import IGNORE_INDEX
from memzoo.train.data.tasks import SPLITS, TASKS, Task, draw, make_task, split_rng

Answers = dict[int, int]  # position -> the token that belongs there


# ------------------------------------------------------------------ readers, one per task, on plain lists


def read_needle(task: Any, tokens: list[int]) -> Answers:
    keys, values = task.vocabulary["keys"], task.vocabulary["values"]
    first_ask = tokens.index(1)
    stated: dict[int, list[int]] = {}
    for token, following in zip(tokens[:first_ask], tokens[1:first_ask], strict=False):
        if token in keys:
            assert following in values
            stated.setdefault(token, []).append(following)
    answers = {}
    for position in range(first_ask, len(tokens)):
        if tokens[position] == 1:
            key = position + 1
            answers |= {key + number: value for number, value in enumerate(stated[tokens[key]])}
    return answers


def read_variables(task: Any, tokens: list[int]) -> Answers:
    values = task.vocabulary["values"]
    known: dict[int, int] = {}
    answers = {}
    for position, token in enumerate(tokens):
        if token == 2:
            source = tokens[position + 1]
            assert tokens[position - 1] not in known, "a variable is set once"
            known[tokens[position - 1]] = source if source in values else known[source]
        elif token == 1:
            answers[position + 1] = known[tokens[position + 1]]
    return answers


def read_pairs(task: Any, tokens: list[int]) -> Answers:
    key_len, value_len = task.key_len, task.value_len
    ask = tokens.index(1)
    known: dict[tuple[int, ...], list[int]] = {}
    for position, token in enumerate(tokens[:ask]):
        if token == 2:
            key = tuple(tokens[position - key_len : position])
            known[key] = tokens[position + 1 : position + 1 + value_len]
            assert tokens[position + 1 + value_len] == 3
    asked = tuple(tokens[ask + 1 : ask + 1 + key_len])
    colon = ask + 1 + key_len
    assert tokens[colon] == 2
    return {colon + number: value for number, value in enumerate(known[asked])}


def read_documents(task: Any, tokens: list[int]) -> Answers:
    keys = task.vocabulary["keys"]
    known: dict[tuple[int, ...], int] = {}
    name: tuple[int, ...] = ()
    ask = tokens.index(1)
    for position, token in enumerate(tokens[:ask]):
        if token == 2:
            name = tuple(tokens[position + 1 : position + 1 + task.id_len])
        elif token in keys:
            fact = (token,) if task.unique_keys else (*name, token)
            assert fact not in known, "a fact is stated once"
            known[fact] = tokens[position + 1]
    return {len(tokens) - 1: known[tuple(tokens[ask + 1 :])]}


def read_copy(task: Any, tokens: list[int]) -> Answers:
    values = task.vocabulary["values"]
    seen = [token for token in tokens if token in values]
    marks = [position for position, token in enumerate(tokens) if token == 1]
    return dict(zip(marks, seen, strict=False))


def read_mqar(task: Any, tokens: list[int]) -> Answers:
    context = 2 * (task.num_kv_pairs + task.num_updates)
    known = dict(zip(tokens[0:context:2], tokens[1:context:2], strict=True))
    return {
        position: known[token]
        for position, token in enumerate(tokens)
        if position >= context and token in known
    }


READERS: dict[str, Callable[[Any, list[int]], Answers]] = {
    "associative_retrieval": read_pairs,
    "copying": read_copy,
    "mqar": read_mqar,
    "multi_document_recall": read_documents,
    "needle": read_needle,
    "variable_tracking": read_variables,
}

CASES = [
    (96, {"type": "associative_retrieval"}),
    (96, {"type": "associative_retrieval", "num_updates": 6, "num_pairs": 8, "noise_vocab": 5}),
    (128, {"type": "associative_retrieval", "num_updates": 7}),
    (96, {"type": "associative_retrieval", "key_len": 2, "value_len": 3, "key_vocab": 5, "segment_len": 8}),
    (64, {"type": "copying"}),
    (33, {"type": "copying", "selective": False, "noise_vocab": 3}),
    (64, {"type": "mqar", "num_kv_pairs": 5}),
    (64, {"type": "mqar", "num_kv_pairs": 5, "num_updates": 3}),
    (100, {"type": "multi_document_recall"}),
    (100, {"type": "multi_document_recall", "unique_keys": True, "key_vocab": 40, "document_len": 6}),
    (99, {"type": "multi_document_recall", "id_len": 2, "id_vocab": 4, "num_facts": 4, "noise_vocab": 0}),
    (64, {"type": "needle"}),
    (64, {"type": "needle", "num_distractors": 9}),
    (64, {"type": "needle", "num_values": 3, "num_distractors": 2}),
    (96, {"type": "needle", "num_values": 2, "num_queries": 4, "num_distractors": 3, "noise_vocab": 0}),
    (96, {"type": "needle", "segment_len": 12, "num_queries": 2, "depth": [0.25, 0.75]}),
    (64, {"type": "variable_tracking"}),
    (64, {"type": "variable_tracking", "num_chains": 4, "num_hops": 3, "num_queries": 3}),
    (32, {"type": "variable_tracking", "num_chains": 5, "num_hops": 0}),
]


def name_of(case: Any) -> str | None:
    if isinstance(case, dict):
        return "-".join(str(value) for value in case.values())
    return None


def examples(seq_len: int, settings: dict[str, Any], num_examples: int, seed: int = 0) -> tuple[Task, Any]:
    task = make_task(settings, seq_len=seq_len)
    return task, task.examples(split_rng(seed, "train", 0, 0), num_examples)


def test_every_task_has_a_reader_and_a_case() -> None:
    assert set(TASKS) == set(READERS) == {settings["type"] for _, settings in CASES}


@pytest.mark.parametrize("seq_len, settings", CASES, ids=name_of)
def test_the_tokens_determine_the_answers(seq_len: int, settings: dict[str, Any]) -> None:
    task, drawn = examples(seq_len, settings, 60)
    assert drawn.inputs.shape == drawn.labels.shape == drawn.evidence.shape == (60, seq_len)
    assert 0 <= int(drawn.inputs.min()) <= int(drawn.inputs.max()) < task.vocab_size
    reader = READERS[settings["type"]]
    for tokens, labels in zip(drawn.inputs.tolist(), drawn.labels.tolist(), strict=True):
        asked = {place: label for place, label in enumerate(labels) if label != IGNORE_INDEX}
        assert asked
        assert reader(task, tokens) == asked
        place = max(asked)
        assert reader(task, tokens[: place + 1])[place] == asked[place], "later tokens are not needed"
        place = min(asked)
        assert reader(task, tokens[: place + 1])[place] == asked[place], "later tokens are not needed"


@pytest.mark.parametrize("seq_len, settings", CASES, ids=name_of)
def test_the_evidence_lies_before_the_question_and_holds_the_answer(
    seq_len: int, settings: dict[str, Any]
) -> None:
    _, drawn = examples(seq_len, settings, 60)
    asked = drawn.labels != IGNORE_INDEX
    assert torch.equal(drawn.evidence >= 0, asked)
    row, position = asked.nonzero(as_tuple=True)
    evidence = drawn.evidence[row, position]
    assert bool((evidence < position).all())
    assert torch.equal(drawn.inputs[row, evidence], drawn.labels[row, position])


@pytest.mark.parametrize("seq_len, settings", CASES, ids=name_of)
def test_without_the_evidence_the_answer_is_a_guess(seq_len: int, settings: dict[str, Any]) -> None:
    """Every value is equally likely, so the best constant answer is right as often as `chance` says."""
    task, drawn = examples(seq_len, settings, 1500, seed=1)
    answers = drawn.labels[drawn.labels != IGNORE_INDEX]
    values = task.vocabulary["values"]
    assert task.chance == 1 / len(values)
    counts = torch.bincount(answers, minlength=task.vocab_size).double()
    assert int(counts[values.start : values.stop].sum()) == len(answers), "an answer is a value"
    if len(values) > 64:  # too many for the number of draws; halves must be equally likely then
        counts = torch.stack([half.sum() for half in counts[values.start : values.stop].chunk(2)])
        expected = len(answers) / 2
    else:
        counts = counts[values.start : values.stop]
        expected = len(answers) * task.chance
    assert float((counts - expected).abs().max()) < 5 * expected**0.5


@pytest.mark.parametrize("seq_len, settings", CASES, ids=name_of)
def test_a_seed_gives_the_same_bits_and_other_numbers_give_others(
    seq_len: int, settings: dict[str, Any]
) -> None:
    task = make_task(settings, seq_len=seq_len)
    torch.manual_seed(0)
    first, labels = draw(task, split_rng(3, "train", 2, 5), 9)
    torch.manual_seed(1)
    again, same_labels = draw(task, split_rng(3, "train", 2, 5), 9)
    assert torch.equal(first, again)
    assert torch.equal(labels, same_labels)
    others = [(4, "train", 2, 5), (3, "train", 1, 5), (3, "train", 2, 6)]
    others += [(3, split, 2, 5) for split in SPLITS[1:]]
    for numbers in others:
        assert not torch.equal(first, draw(task, split_rng(*numbers), 9)[0]), numbers


def test_needles_are_spread_over_the_text() -> None:
    _, drawn = examples(256, {"type": "needle"}, 2000)
    depths = drawn.evidence[:, -1].double() / 256
    quarters = torch.histc(depths, bins=4, min=0, max=1) / 2000
    assert bool(((quarters - 0.25).abs() < 0.05).all()), quarters


@pytest.mark.parametrize("depth", [(0.0, 0.25), (0.5, 0.75), (0.9, 1.0)])
def test_needles_lie_at_the_depth_asked_for(depth: tuple[float, float]) -> None:
    settings = {"type": "needle", "depth": list(depth), "num_distractors": 6, "num_values": 2}
    task, drawn = examples(400, settings, 200)
    start = drawn.evidence[drawn.evidence >= 0].double() - 1  # the key stands before its value
    assert depth[0] * 400 <= float(start.min())
    assert float(start.max()) < depth[1] * 400
    keys = task.vocabulary["keys"]
    is_key = (drawn.inputs[:, :-4] >= keys.start) & (drawn.inputs[:, :-4] < keys.stop)
    assert bool((is_key.sum(1) == 8).all())
    places = is_key.nonzero()[:, 1].double() / 400
    assert float(places.min()) < 0.1, "distractors lie anywhere"
    assert float(places.max()) > 0.85


def test_needles_do_not_cross_segments_and_the_question_has_its_own() -> None:
    task, drawn = examples(77, {"type": "needle", "segment_len": 7, "num_distractors": 5}, 300)
    keys = task.vocabulary["keys"]
    places = ((drawn.inputs >= keys.start) & (drawn.inputs < keys.stop)).nonzero()[:, 1]
    stated = places[places != 76]
    assert len(stated) == 300 * 6
    assert bool((stated % 7 < 6).all())
    assert int(stated.max()) < 70


def test_selective_copying_scatters_and_plain_copying_does_not() -> None:
    _, scattered = examples(128, {"type": "copying"}, 500)
    depths = scattered.evidence[scattered.evidence >= 0].double() / 120
    quarters = torch.histc(depths, bins=4, min=0, max=1) / len(depths)
    assert bool(((quarters - 0.25).abs() < 0.03).all())
    _, together = examples(128, {"type": "copying", "selective": False}, 5)
    assert together.evidence[0, -8:].tolist() == list(range(8))


def test_a_longer_text_holds_more_pairs_and_documents() -> None:
    pairs = {length: make_task({"type": "associative_retrieval"}, seq_len=length) for length in (64, 128)}
    counts = {
        length: int((examples(length, {"type": "associative_retrieval"}, 1)[1].inputs == 3).sum())
        for length in pairs
    }
    assert counts == {64: 15, 128: 31}
    documents = [make_task({"type": "multi_document_recall"}, seq_len=length) for length in (63, 123)]
    assert [task.num_documents for task in documents] == [5, 10]  # type: ignore[attr-defined]


def test_updates_are_asked_for_and_the_later_value_counts() -> None:
    settings = {"type": "associative_retrieval", "num_updates": 8, "num_pairs": 8}
    task, drawn = examples(96, settings, 200)
    asked = drawn.inputs[:, -2:-1]  # (N, 1)
    stated = (drawn.inputs[:, :-4] == asked).sum(1)
    assert bool((stated == 2).all())
    first = (drawn.inputs[:, :-4] == asked).to(torch.uint8).argmax(1)
    first_value = drawn.inputs[torch.arange(200), first + 2]
    assert bool((first_value != drawn.labels[:, -1]).all()), "an update always changes the value"
    assert task.min_seq_len == 4 * 17


def test_hops_are_needed() -> None:
    """The value never stands beside the variable that is asked for, unless there is no hop."""
    _, drawn = examples(64, {"type": "variable_tracking", "num_hops": 2}, 100)
    for tokens, evidence in zip(drawn.inputs.tolist(), drawn.evidence[:, -1].tolist(), strict=True):
        assert tokens[evidence - 2] != tokens[-1]


@pytest.mark.parametrize(
    "seq_len, settings, message",
    [
        (3, {"type": "needle"}, "needs at least 4 tokens, got 3"),
        (64, {"type": "needle", "num_queries": 0}, "num_queries must be an integer of at least 1, got 0"),
        (64, {"type": "needle", "num_queries": True}, "num_queries must be an integer"),
        (64, {"type": "needle", "noise_vocab": -1}, "noise_vocab must be an integer of at least 0"),
        (64, {"type": "needle", "num_distractors": 32}, "33 different keys are needed, but there are 32"),
        (64, {"type": "needle", "depth": [0.5, 0.2]}, "depth must be a pair"),
        (64, {"type": "needle", "depth": 0.5}, "depth must be a pair"),
        (64, {"type": "needle", "depth": [0.99, 1]}, "0 of them at depth"),
        (64, {"type": "needle", "segment_len": 7}, "must be a multiple of segment_len=7, got 64"),
        (64, {"type": "needle", "segment_len": 1}, "segment_len must hold"),
        (64, {"type": "variable_tracking", "num_queries": 3}, "3 different chains are needed"),
        (64, {"type": "variable_tracking", "num_hops": 20}, "42 different variables are needed"),
        (20, {"type": "variable_tracking", "num_hops": 3}, "needs at least 26 tokens"),
        (62, {"type": "associative_retrieval"}, "multiple of the segment length 4, got 62"),
        (64, {"type": "associative_retrieval", "segment_len": 3}, "segment_len must be at least 4"),
        (64, {"type": "associative_retrieval", "key_vocab": 3}, "15 different keys are needed"),
        (64, {"type": "associative_retrieval", "num_updates": 8}, "needs at least 68 tokens"),
        (64, {"type": "associative_retrieval", "num_pairs": 2, "num_updates": 3}, "at most the number"),
        (64, {"type": "associative_retrieval", "num_updates": 1, "value_vocab": 1}, "at least two values"),
        (64, {"type": "multi_document_recall", "document_len": 5}, "document_len must be at least 6"),
        (99, {"type": "multi_document_recall", "id_vocab": 3}, "8 different names are needed"),
        (64, {"type": "multi_document_recall", "unique_keys": True}, "10 different keys are needed"),
        (64, {"type": "multi_document_recall", "unique_keys": 1}, "unique_keys must be true or false"),
        (15, {"type": "copying"}, "needs at least 16 tokens"),
        (63, {"type": "mqar"}, "input_seq_len must be even"),
        (64, {"type": "mqar", "power_a": "much"}, "power_a must be a number"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(seq_len: int, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(settings, seq_len=seq_len)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"task type 'nedle' is unknown. Did you mean 'needle'"):
        make_task({"type": "nedle"}, seq_len=64)
    with pytest.raises(ValueError, match=r"no setting 'num_distractor'. Did you mean 'num_distractors'"):
        make_task({"type": "needle", "num_distractor": 1}, seq_len=64)
    with pytest.raises(ValueError, match="a task is a mapping with a type"):
        make_task({"num_queries": 1}, seq_len=64)
    with pytest.raises(ValueError, match="Give the lengths beside the task"):
        make_task({"type": "needle", "seq_len": 9}, seq_len=64)


def test_configs_are_values() -> None:
    for config in TASKS.values():
        task = config()
        assert task == config()
        assert hash(task) == hash(config())
        with pytest.raises(dataclasses.FrozenInstanceError):
            task.seq_len = 5  # type: ignore[misc]
