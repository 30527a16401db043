"""Memory tasks in plain English, hidden in a bundled book: what a pretrained model recalls.

A context is a stretch of a novel with a few sentences between its own, and a question at its end whose answer
is given word for word, so that a model is scored by its predictions of the answer's tokens and never has to
generate::

    ... his harpoon. The secret code of the lighthouse is 4821. And then ...

    Question: What is the secret code of the lighthouse?
    Answer: The secret code of the lighthouse is 4821

Any tokenizer will do. Source: the needle and variable tracking tasks of RULER (Hsieh et al. 2024), with a
book in the place of essays.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...layers.contract import check_positive
from .tasks import Setting
from .tasks.base import check_counts, check_depth, check_pool, config_from
from .texts import load_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PLACES = (
    "lighthouse", "harbor", "library", "orchard", "bakery", "castle", "museum", "stable", "windmill",
    "chapel", "theater", "garden", "prison", "hospital", "market", "fortress", "tavern", "monastery",
    "warehouse", "brewery", "observatory", "cemetery", "palace", "school", "tower", "factory",
    "pharmacy", "embassy", "gallery", "granary", "foundry", "aquarium",
)  # fmt: skip
NAMES = (
    "Anna", "Brian", "Carla", "David", "Elena", "Frank", "Greta", "Henry", "Irene", "James", "Karen", "Louis",
    "Maria", "Nathan", "Olivia", "Peter", "Rachel", "Simon", "Teresa", "Victor", "Wendy", "Albert", "Bianca",
    "Conrad", "Daisy", "Edgar", "Felix", "Gloria", "Hannah", "Igor", "Julia", "Kevin",
)  # fmt: skip
_MAX_DIGITS = 12
_SAMPLE_WORDS = 128
_TITLES = ("Mr.", "Mrs.", "Dr.", "St.")  # which end no sentence
_SENTENCE_END = re.compile(r"[.!?][\"')\u2019\u201d]*$")


@dataclass(frozen=True)
class TextExamples:
    """Contexts with their answers.

    Attributes:
        ids: tokens of each context, (L,) int64; not all of the same length.
        answers: for each context the spans ``(first, end)`` of its answers in ``ids``.
        evidence: for each answer the position of the first token that states it.
    """

    ids: list[Tensor]
    answers: list[list[tuple[int, int]]]
    evidence: list[list[int]]


@dataclass(frozen=True)
class Story:
    """What is hidden and asked in one context.

    Attributes:
        sentences: what is hidden, in the order of reading.
        question: what stands behind the book, up to the first answer.
        answers: what has to be predicted, in order.
        sources: for each answer the sentence that states it.
        joints: what stands between one answer and the next; commas unless given.
    """

    sentences: list[str]
    question: str
    answers: list[str]
    sources: list[int]
    joints: list[str] = field(default_factory=list)

    def told(self) -> Iterator[tuple[str, str]]:
        """For each answer what stands before it, behind the question or the answer before, and itself."""
        joints = self.joints or [","] * (len(self.answers) - 1)
        yield from zip([" ", *(f"{joint} " for joint in joints)], self.answers, strict=True)


@dataclass(frozen=True, kw_only=True)
class TextTask(ABC):
    """Settings that all tasks in English share.

    Args:
        seq_len: tokens of a context, question and answer included; it is filled but for a few tokens.
        text: name of the bundled text in which the sentences hide; its first document.
        num_digits: digits of the numbers that have to be recalled.
        depth: share of the book's part, from .. to, in which the sentences hide.
    """

    seq_len: int = 512
    text: str = "moby_dick"
    num_digits: int = 4
    depth: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_positive(self, "seq_len", "num_digits")
        if self.num_digits > _MAX_DIGITS:
            raise ValueError(f"num_digits must be at most {_MAX_DIGITS}, got {self.num_digits}.")
        object.__setattr__(self, "depth", check_depth(self.depth))
        book_words(self.text)
        self._check()

    @abstractmethod
    def story(self, rng: np.random.Generator) -> Story:
        """Draw what one context hides and asks."""

    def examples(
        self, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, num_examples: int
    ) -> TextExamples:
        """Draw contexts; nothing but ``rng`` decides which.

        Raises:
            ValueError: ``seq_len`` leaves no room for what is hidden and asked.
        """
        made = [self._example(tokenizer, rng) for _ in range(num_examples)]
        return TextExamples(*(list(part) for part in zip(*made, strict=True)))

    @abstractmethod
    def _check(self) -> None:
        """Refuse settings that do not fit one another."""

    def _numbers(self, rng: np.random.Generator, num: int) -> list[str]:
        """Different numbers of ``num_digits`` digits."""
        low = 10 ** (self.num_digits - 1)
        check_pool(num, 9 * low, "numbers", "num_digits")
        found: dict[int, None] = {}
        while len(found) < num:
            found.setdefault(int(rng.integers(low, 10 * low)))
        return [str(number) for number in found]

    def _example(
        self, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator
    ) -> tuple[Tensor, list[tuple[int, int]], list[int]]:
        story = self.story(rng)
        depths = np.sort(rng.uniform(*self.depth, size=len(story.sentences)))
        words = book_words(self.text)
        encode = tokenizer.backend_tokenizer.encode
        asked = "".join(f"{joint}{answer}" for joint, answer in story.told())
        own = len(encode(f"{' '.join(story.sentences)}\n\n{story.question}{asked}").ids)
        budget = self.seq_len - own
        start = int(rng.integers(max(len(words) - self.seq_len, 1)))  # a word has at least one token
        stretch = words[start : start + self.seq_len]
        ends = _token_ends(tokenizer, stretch, budget)
        if budget > ends[-1]:
            raise ValueError(
                f"the text {self.text!r} has {ends[-1]} tokens, a context of {self.seq_len} needs more. "
                "Use a shorter context, or a longer text."
            )
        while budget >= 0:
            num_words = int(np.searchsorted(ends, budget, side="right"))
            context, marked = _compose(stretch[:num_words], ends[:num_words], story, depths)
            encoding = encode(context)
            excess = len(encoding.ids) - self.seq_len
            if excess <= 0:
                break
            budget -= excess
        else:
            raise ValueError(
                f"what is hidden and asked takes about {own} tokens, got seq_len={self.seq_len}. "
                "Use a longer context, or hide less."
            )
        spans = [_token_span(encoding.offsets, first, end) for first, end in marked]
        num_answers = len(story.answers)
        evidence = [first for first, _ in spans[num_answers:]]
        return torch.tensor(encoding.ids, dtype=torch.int64), spans[:num_answers], evidence


@dataclass(frozen=True, kw_only=True)
class NeedleTextTask(TextTask):
    """Secret codes of places, hidden in a book; the codes of one place are asked for, in their order, or one
    of each of several places.

    Args:
        num_values: codes of a place that is asked for, every one in a sentence of its own; several for one
            place only.
        num_asked: places that are asked for, one after another.
        num_distractors: places with a code that is not asked for.

    Raises:
        ValueError: sizes that do not fit one another, or an unknown text.
    """

    num_values: int = 1
    num_asked: int = 1
    num_distractors: int = 0

    def _check(self) -> None:
        check_positive(self, "num_values", "num_asked")
        check_counts(self, "num_distractors")
        if self.num_values > 1 and self.num_asked > 1:
            raise ValueError(
                f"several codes are asked of one place only, got num_values={self.num_values} and "
                f"num_asked={self.num_asked}. Set one of them to 1."
            )
        if self.num_asked + self.num_distractors > len(PLACES):
            raise ValueError(
                f"num_distractors must be at most {len(PLACES) - self.num_asked}, got "
                f"{self.num_distractors}. There are no more places with a code."
            )
        num_codes = self.num_values * self.num_asked + self.num_distractors
        check_pool(num_codes, 9 * 10 ** (self.num_digits - 1), "codes", "num_digits")

    def story(self, rng: np.random.Generator) -> Story:
        num_places = self.num_asked + self.num_distractors
        places = [PLACES[number] for number in rng.choice(len(PLACES), num_places, replace=False)]
        num_answers = self.num_values * self.num_asked
        codes = self._numbers(rng, num_answers + self.num_distractors)
        owners = places[:1] * self.num_values + places[1:]
        one = "One secret code" if self.num_values > 1 else "The secret code"
        order = rng.permutation(len(codes))
        sentences = [f"{one} of the {owners[number]} is {codes[number]}." for number in order]
        sources = [place for place, number in enumerate(order) if number < num_answers]
        if self.num_asked > 1:  # not in the order of reading, which would be a text to copy
            sources = [sources[number] for number in rng.permutation(num_answers)]
        answers = [codes[order[place]] for place in sources]
        asked = [owners[order[place]] for place in sources]
        if self.num_asked == 1:
            what = (
                f"secret codes of the {asked[0]}" if self.num_values > 1 else f"secret code of the {asked[0]}"
            )
            verb = "are" if self.num_values > 1 else "is"
            return Story(
                sentences, f"Question: What {verb} the {what}?\nAnswer: The {what} {verb}", answers, sources
            )
        listed = f"{', '.join(f'the {name}' for name in asked[:-1])} and the {asked[-1]}"
        told = [f"The secret code of the {name} is" for name in asked]
        question = f"Question: What are the secret codes of {listed}?\nAnswer: {told[0]}"
        return Story(sentences, question, answers, sources, [f". {text}" for text in told[1:]])


@dataclass(frozen=True, kw_only=True)
class VariableTrackingTextTask(TextTask):
    """Locker numbers that people share with one another; the number of the last one of a chain is asked for.

    Args:
        num_chains: chains of people; only the first one's last person is asked for.
        num_hops: people of a chain who share the number of the one before.

    Raises:
        ValueError: sizes that do not fit one another, or an unknown text.
    """

    num_chains: int = 1
    num_hops: int = 1

    def _check(self) -> None:
        check_positive(self, "num_chains")
        check_counts(self, "num_hops")
        num_people = self.num_chains * (self.num_hops + 1)
        if num_people > len(NAMES):
            raise ValueError(
                f"{self.num_chains} chains of {self.num_hops} hops need {num_people} people, there are "
                f"{len(NAMES)}. Use fewer chains or hops."
            )
        check_pool(self.num_chains, 9 * 10 ** (self.num_digits - 1), "numbers", "num_digits")

    def story(self, rng: np.random.Generator) -> Story:
        length = self.num_hops + 1
        drawn = rng.choice(len(NAMES), self.num_chains * length, replace=False)
        people = [NAMES[number] for number in drawn]
        numbers = self._numbers(rng, self.num_chains)
        chain_of_place = rng.permutation(np.repeat(np.arange(self.num_chains), length))
        told = [0] * self.num_chains
        sentences, source = [], 0
        for place, chain in enumerate(chain_of_place):
            person = people[chain * length + told[chain]]
            if told[chain] == 0:
                sentences.append(f"The locker number of {person} is {numbers[chain]}.")
                source = place if chain == 0 else source
            else:
                before = people[chain * length + told[chain] - 1]
                sentences.append(f"{person} has the same locker number as {before}.")
            told[chain] += 1
        last = people[length - 1]
        question = f"Question: What is the locker number of {last}?\nAnswer: The locker number of {last} is"
        return Story(sentences, question, [numbers[0]], [source])


TEXT_TASKS: dict[str, type[TextTask]] = {
    "needle_text": NeedleTextTask,
    "variable_tracking_text": VariableTrackingTextTask,
}


def draw_text_task(
    config: TextTask, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, num_examples: int
) -> tuple[list[Tensor], list[list[tuple[int, int]]]]:
    """Draw contexts; `TextTask.examples` tells where the evidence stands as well.

    Args:
        config: the task.
        tokenizer: any tokenizer that `load_tokenizer` gives.
        rng: the only source of chance.
        num_examples: contexts.

    Returns:
        the tokens of each context, (L,) int64, and for each the spans ``(first, end)`` of its answers.

    Raises:
        ValueError: the context is too short for what is hidden and asked.
    """
    drawn = config.examples(tokenizer, rng, num_examples)
    return drawn.ids, drawn.answers


def make_text_task(settings: Mapping[str, Setting], *, seq_len: int) -> TextTask:
    """A task in English from ``{type: ..., ...}``; errors as in `make_task`."""
    return config_from(settings, seq_len=seq_len, types=TEXT_TASKS)


@lru_cache(maxsize=4)
def book_words(text: str) -> tuple[str, ...]:
    """The words of the first document of a bundled text, line ends left out."""
    return tuple(load_text(text)[0].text.split())


def _token_ends(tokenizer: PreTrainedTokenizerFast, words: Sequence[str], budget: int) -> np.ndarray:
    """Tokens up to the end of each word, for as many words as ``budget`` tokens need, or for all."""
    num_words = _SAMPLE_WORDS
    while True:
        part = words[:num_words]
        offsets = tokenizer.backend_tokenizer.encode(" ".join(part), add_special_tokens=False).offsets
        characters = np.cumsum([len(word) + 1 for word in part]) - 1  # where each word ends
        ends: np.ndarray = np.searchsorted([first for first, _ in offsets], characters)
        if ends[-1] > budget or num_words >= len(words):
            return ends
        num_words = max(2 * num_words, int(1.1 * num_words * budget / max(int(ends[-1]), 1)))


def _compose(
    words: Sequence[str], ends: np.ndarray, story: Story, depths: np.ndarray
) -> tuple[str, list[tuple[int, int]]]:
    """Put the sentences of a story between those of the book, and the question behind it.

    Args:
        words: stretch of the book.
        ends: tokens of the book up to the end of each word.
        story: what is hidden and asked.
        depths: where each sentence goes, as ascending shares of the stretch.

    Returns:
        the context, and the characters of each answer, then of each statement of it.
    """
    ended = (number + 1 for number, word in enumerate(words) if _ends_sentence(word))
    borders = [0, *ended]
    tokens_before = np.concatenate([[0], ends])[borders]
    total = int(ends[-1]) if len(ends) else 0
    context, statements, done = "", [], 0
    for sentence, depth in zip(story.sentences, depths, strict=True):
        border = borders[int(np.abs(tokens_before - depth * total).argmin())]
        context += "".join(f"{word} " for word in words[done:border])
        statements.append(len(context))
        context += f"{sentence} "
        done = border
    context += "".join(f"{word} " for word in words[done:])
    context = f"{context.rstrip()}\n\n{story.question}"
    marked: list[tuple[int, int]] = []
    for joint, answer in story.told():
        context += joint
        marked.append((len(context), len(context) + len(answer)))
        context += answer
    for answer, source in zip(story.answers, story.sources, strict=True):
        first = statements[source] + story.sentences[source].index(answer)
        marked.append((first, first + len(answer)))
    return context, marked


def _ends_sentence(word: str) -> bool:
    return bool(_SENTENCE_END.search(word)) and not word.endswith(_TITLES)


def _token_span(offsets: Sequence[tuple[int, int]], first: int, end: int) -> tuple[int, int]:
    """The tokens that hold the characters ``first .. end - 1``."""
    inside = [
        place for place, (start, stop) in enumerate(offsets) if start < end and stop > first and start < stop
    ]
    return inside[0], inside[-1] + 1
