"""Conversations as tokens, with the tokens of the assistant marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .documents import check_characters
from .tokenizers import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ASSISTANT = "assistant"

# what other formats call the keys and the speakers
_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {"human": "user", "gpt": ASSISTANT}

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Conversation:
    """A tokenised conversation.

    Attributes:
        tokens: (L,) int64, what the chat template makes of it.
        is_reply: (L,) bool, True = written by the assistant, the end of its turn included.
    """

    tokens: np.ndarray
    is_reply: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


class ConversationEncoder:
    """Renders conversations with a chat template and tokenises them once.

    What the assistant says is found without knowledge of the template. Its turn number i is what

        render(messages[: i + 1])  has more than  render(messages[:i], add_generation_prompt=True)

    so these renderings have to be beginnings of one another and of the whole. White space between the token
    that ends the turn and the next turn is not part of it; a token that begins before the turn and ends in it
    is.

    Args:
        source: ``"bytes"``, a folder with a tokenizer, or a ``.gguf`` file.
        chat_template: a Jinja template, or a file with one that ends in ``.jinja``; None takes that of the
            tokenizer.

    Raises:
        ValueError: no tokenizer, no template, or no file there.
    """

    def __init__(self, source: str, chat_template: str | None = None) -> None:
        self.source = source
        self.tokenizer: PreTrainedTokenizerFast = load_tokenizer(source)
        if chat_template is not None:
            self.tokenizer.chat_template = _template(chat_template)
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer {source!r} has no chat template. Take the tokenizer of a chat model, or give "
                "a Jinja template in chat_template."
            )
        self._special = [
            number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special
        ]

    def encode(self, conversations: Sequence[tuple[str, Messages]]) -> list[Conversation]:
        """Tokens of each conversation.

        Args:
            conversations: place (for messages) and messages of each.

        Raises:
            ValueError: the template refuses a conversation or rewrites earlier turns; the message names it.
        """
        rendered = [self._rendered(messages, place) for place, messages in conversations]
        encodings = self.tokenizer.backend_tokenizer.encode_batch(
            [text for text, _ in rendered], add_special_tokens=False
        )
        return [
            self._conversation(text, turns, np.asarray(encoding.ids, dtype=np.int64), encoding.offsets)
            for (text, turns), encoding in zip(rendered, encodings, strict=True)
        ]

    def _rendered(self, messages: Messages, place: str) -> tuple[str, list[tuple[int, int]]]:
        """The whole text, and from where to where in it the assistant speaks."""
        whole = self._render(messages, place)
        turns = []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            if number == 0:
                raise ValueError(
                    f"{place}: the assistant speaks first, and a chat template writes nothing before the "
                    "first message. Begin the conversation with a message of the user or the system."
                )
            before = self._render(messages[:number], place, is_open=True)
            after = self._render(messages[: number + 1], place)
            if not (whole.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"{place}: the chat template of {self.source!r} writes the messages up to number "
                    f"{number + 1} differently when others follow, or when that one is still to come, so the "
                    "assistant's tokens cannot be told. Give a chat_template that leaves earlier turns as "
                    "they are, or leave this conversation out."
                )
            turns.append((len(before), len(after)))
        return whole, turns

    def _render(self, messages: Messages, place: str, *, is_open: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=is_open
            )
        except Exception as error:  # of the template's own, or whatever its expressions raise
            raise ValueError(
                f"{place}: the chat template of {self.source!r} refuses the first {len(messages)} messages: "
                f"{error}"
            ) from error
        assert isinstance(text, str)
        return text

    def _conversation(
        self, text: str, turns: list[tuple[int, int]], ids: np.ndarray, offsets: list[tuple[int, int]]
    ) -> Conversation:
        ends = np.array([end for _, end in offsets], dtype=np.int64)
        starts = np.array([start for start, _ in offsets], dtype=np.int64)
        is_special = np.isin(ids, self._special)
        is_reply = np.zeros(len(ids), dtype=bool)
        for first, last in turns:
            inside = (ends > first) & (starts < last)
            closing = ends[inside & is_special]
            if len(closing) and text[closing[-1] : last].isspace():
                inside &= ends <= closing[-1]
            is_reply |= inside
        return Conversation(ids, is_reply)


def messages_of(record: Mapping[str, Any], field: str, place: str) -> Messages:
    """The messages in a field of a record, as ``{role, content}``; ``{from, value}`` is understood as well.

    Args:
        place: where the record stands, for the message.

    Raises:
        ValueError: no list of such messages there.
    """
    if field not in record:
        raise ValueError(
            f"{place} has no field {field!r} (it has: {', '.join(sorted(record))}). "
            "Name the field that holds the messages in messages_field."
        )
    found = record[field]
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise ValueError(f"{place}: {field!r} must be a list of messages, got {found!r:.60}.")
    return [_message(item, f"{place}, message {number}") for number, item in enumerate(found, start=1)]


def _message(item: Any, place: str) -> dict[str, str]:
    for role_key, content_key in _KEYS:
        if isinstance(item, Mapping) and isinstance(item.get(role_key), str):
            role, content = str(item[role_key]), item.get(content_key)
            if isinstance(content, str):
                check_characters(content, place)
                return {"role": _ROLES.get(role, role), "content": content}
    raise ValueError(
        f"{place} must have the texts `role` and `content` (or `from` and `value`), got {item!r:.60}."
    )


def _template(given: str) -> str:
    if not given.endswith(".jinja"):
        return given
    if not Path(given).is_file():
        raise ValueError(f"there is no template {given!r} (looked in {Path.cwd()}). Check the path.")
    return Path(given).read_text(encoding="utf-8")
