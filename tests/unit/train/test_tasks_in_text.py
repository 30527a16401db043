"""Tasks in English: a reader with a regular expression answers them, whatever the tokenizer."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from memzoo.train.data.tasks import split_rng
from memzoo.train.data.text_tasks import (
    NAMES,
    PLACES,
    TEXT_TASKS,
    TextExamples,
    TextTask,
    book_words,
    draw_text_task,
    make_text_task,
)
from memzoo.train.data.tokenizers import byte_tokenizer

CASES: list[dict[str, Any]] = [
    {"type": "needle_text"},
    {"type": "needle_text", "num_distractors": 4, "text": "emma"},
    {"type": "needle_text", "num_values": 3, "num_distractors": 2, "num_digits": 6},
    {"type": "needle_text", "num_asked": 3, "num_distractors": 1, "num_digits": 2},
    {"type": "variable_tracking_text", "num_hops": 0},
    {"type": "variable_tracking_text", "num_chains": 3, "num_hops": 3},
]


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(value) for value in case.values())


def word_tokenizer() -> Any:
    """Of another kind: whole words and single digits, spaces lost, and a token in front of each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {
        word
        for text in ("moby_dick", "emma")
        for word in re.findall(r"\w+|[^\w\s]+", " ".join(book_words(text)))
    }
    words |= {
        *PLACES,
        *NAMES,
        *"0123456789",
        *[
            "The",
            "One",
            "secret",
            "code",
            "codes",
            "of",
            "the",
            "is",
            "are",
            "has",
            "same",
            "locker",
            "number",
            "as",
        ],
    }
    words |= {*["Question", "Answer", "What", ".", ":", "?", ","]}
    vocabulary = {word: number for number, word in enumerate(["<start>", "<unknown>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", vocabulary["<start>"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module", params=["bytes", "words"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return byte_tokenizer() if request.param == "bytes" else word_tokenizer()


def draw(
    settings: dict[str, Any], tokenizer: Any, num_examples: int, *, seq_len: int = 900, seed: int = 0
) -> tuple[TextTask, TextExamples]:
    task = make_text_task(settings, seq_len=seq_len)
    return task, task.examples(tokenizer, split_rng(seed, "evaluate", seq_len, 0), num_examples)


def read(settings: dict[str, Any], text: str) -> list[str]:
    """The answers, from the words before the question alone."""
    book, question = text.rsplit("Question", 1)
    if settings["type"] == "needle_text":
        asked = re.search(r"codes? of (.+?) ?\?", question)
        assert asked
        return [
            code
            for place in re.findall(r"the (\w+)", asked[1])
            for code in re.findall(rf"secret code of the {place} is ([\d ]+\d)", book)
        ]
    known: dict[str, str] = {}
    for owner, number, other, before in re.findall(
        r"The locker number of (\w+) is ([\d ]+\d)|(\w+) has the same locker number as (\w+)", book
    ):
        known[owner or other] = number or known[before]
    person = re.search(r"number of (\w+)", question)
    assert person
    return [known[person[1]]]


@pytest.mark.parametrize("settings", CASES, ids=name_of)
def test_the_text_determines_the_answers(settings: dict[str, Any], tokenizer: Any) -> None:
    task, drawn = draw(settings, tokenizer, 12)
    for ids, spans in zip(drawn.ids, drawn.answers, strict=True):
        text = tokenizer.decode(ids[: spans[0][0]])
        expected = [answer.replace(" ", "") for answer in read(settings, text)]
        found = [tokenizer.decode(ids[first:end]).replace(" ", "") for first, end in spans]
        assert found == expected
        assert all(len(answer) == task.num_digits for answer in found)
        assert spans[-1][1] == len(ids), "the answer ends the context"


@pytest.mark.parametrize("settings", CASES, ids=name_of)
def test_the_evidence_is_where_the_answer_is_stated(settings: dict[str, Any], tokenizer: Any) -> None:
    _, drawn = draw(settings, tokenizer, 12)
    for ids, spans, evidence in zip(drawn.ids, drawn.answers, drawn.evidence, strict=True):
        assert "num_asked" in settings or evidence == sorted(evidence)
        for (first, end), source in zip(spans, evidence, strict=True):
            assert source < first
            assert torch.equal(ids[source : source + end - first], ids[first:end])


def test_a_context_is_filled_and_never_too_long(tokenizer: Any) -> None:
    for seq_len in (200, 333, 2000):
        _, drawn = draw(CASES[0], tokenizer, 10, seq_len=seq_len)
        lengths = [len(ids) for ids in drawn.ids]
        assert max(lengths) <= seq_len
        assert min(lengths) > seq_len - 40


def test_sentences_lie_at_the_depth_asked_for() -> None:
    tokenizer = byte_tokenizer()
    _, drawn = draw({"type": "needle_text", "depth": [0.4, 0.6]}, tokenizer, 30, seq_len=6000)
    depths = [evidence[0] / 6000 for evidence in drawn.evidence]
    assert min(depths) > 0.33
    assert max(depths) < 0.67
    _, anywhere = draw({"type": "needle_text"}, tokenizer, 120, seq_len=3000)
    quarters = torch.histc(torch.tensor([place[0] / 3000 for place in anywhere.evidence]), 4, 0, 1) / 120
    assert bool(((quarters - 0.25).abs() < 0.15).all()), quarters


def test_sentences_stand_between_sentences() -> None:
    tokenizer = byte_tokenizer()
    _, drawn = draw({"type": "needle_text"}, tokenizer, 20, seq_len=3000)
    for ids in drawn.ids:
        before, hidden, _ = tokenizer.decode(ids).partition("The secret code")
        assert hidden
        assert re.search(r"(^|[.!?][\"')\u2019\u201d]*) ?$", before), before[-30:]
        assert not before.endswith("Mr. ")


def test_a_seed_gives_the_same_bits_and_another_does_not(tokenizer: Any) -> None:
    task = make_text_task(CASES[1], seq_len=500)
    first, spans = draw_text_task(task, tokenizer, split_rng(1, "evaluate", 500, 0), 3)
    again, same_spans = draw_text_task(task, tokenizer, split_rng(1, "evaluate", 500, 0), 3)
    assert spans == same_spans
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    others, _ = draw_text_task(task, tokenizer, split_rng(2, "evaluate", 500, 0), 3)
    assert not any(torch.equal(one, other) for one, other in zip(first, others, strict=True))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(
    "settings, seq_len, message",
    [
        ({"type": "needle"}, 500, r"task type 'needle' is unknown. Did you mean 'needle_text'"),
        ({"type": "needle_text", "num_value": 2}, 500, "Did you mean 'num_values'"),
        ({"type": "needle_text", "text": "moby"}, 500, "did you mean 'moby_dick'"),
        ({"type": "needle_text", "num_distractors": 32}, 500, "num_distractors must be at most 31, got 32"),
        ({"type": "needle_text", "num_digits": 13}, 500, "num_digits must be at most 12"),
        ({"type": "needle_text", "num_values": 10, "num_digits": 1}, 500, "10 different codes are needed"),
        ({"type": "variable_tracking_text", "num_hops": 40}, 500, "need 41 people, there are 32"),
        ({"type": "needle_text"}, 60, r"what is hidden and asked takes about \d+ tokens, got seq_len=60"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], seq_len: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_text_task(settings, seq_len=seq_len).examples(byte_tokenizer(), split_rng(0, "test", 0, 0), 1)


def test_a_book_that_does_not_fill_the_context_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memzoo.train.data.text_tasks.book_words", lambda text: ("word",) * 100)
    with pytest.raises(ValueError, match="the text 'moby_dick' has 499 tokens, a context of 900 needs more"):
        draw(CASES[0], byte_tokenizer(), 1, seq_len=900)
    draw(CASES[0], byte_tokenizer(), 1, seq_len=500)


def test_every_task_has_a_case() -> None:
    assert {case["type"] for case in CASES} == set(TEXT_TASKS)
