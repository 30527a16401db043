"""One turn of a conversation as text, so that the turns of several calls make one rendering of the whole."""

from __future__ import annotations

from typing import Any

# stands for the reply of the model, whose tokens are in the state already
_REPLY = "memzoo-reply"


def first_turn(tokenizer: Any, content: str) -> str:
    """The user's first turn, with what the chat template puts before it (a system prompt) and after it.

    Raises:
        ValueError: the tokenizer has no chat template, or one that refuses the turn.
    """
    return _rendered(tokenizer, [{"role": "user", "content": content}], is_open=True)


def next_turn(tokenizer: Any, content: str) -> str:
    """What follows a reply: the end of the assistant's turn, then the user's next one.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        content: what the user says.

    Returns:
        the part of the template's rendering of (turn, reply, turn) that follows the reply. Where a template
        rewrites earlier turns (dates, thoughts that it leaves out) the whole rendering differs from what was
        read; the model then goes on from what it has read.

    Raises:
        ValueError: the tokenizer has no chat template, or one without turns of an assistant.
    """
    talk = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": _REPLY},
        {"role": "user", "content": content},
    ]
    whole = _rendered(tokenizer, talk, is_open=True)
    _, reply, rest = whole.partition(_REPLY)
    if not reply:
        raise ValueError("the chat template leaves earlier replies out. Leave --chat or --state out.")
    return rest


def _rendered(tokenizer: Any, talk: list[dict[str, str]], is_open: bool) -> str:
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template. Leave --chat out.")
    try:
        text: str = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=is_open)
    except Exception as error:  # of the template's own, or whatever its expressions raise
        raise ValueError(f"the chat template refuses the turn: {error}. Leave --chat out.") from error
    return text
