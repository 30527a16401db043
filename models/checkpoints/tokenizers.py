"""Byte-level BPE tokenizers out of the metadata of a GGUF file, offline.

A GGUF file lists tokens, merges, token types and special ids, and names its way of splitting text
(`tokenizer.ggml.pre`). The splitting rule itself is not in the file; it is looked up here, and an unknown
name is refused rather than guessed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import CheckpointError
from .files import StrPath
from .gguf_files import GGUFFile, open_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CONTROL, _USER_DEFINED = 3, 4

# one digit at a time, then GPT-2's rule: SmolLM and StarCoder
_DIGITS_THEN_BYTES = ("smollm", "starcoder", "refact", "command-r")
_PLAIN_BYTES = ("gpt-2", "gpt2", "default")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REGEX = {
    "qwen2": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
    "llama-bpe": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
}


def tokenizer_from_gguf(path: StrPath) -> PreTrainedTokenizerFast:
    """Builds the tokenizer that a GGUF file describes.

    Args:
        path: the file.

    Returns:
        A fast tokenizer with special ids and chat template; `save_pretrained(folder)` writes `tokenizer.json`
        and its config.

    Raises:
        CheckpointError: no tokenizer in the file, not byte-level BPE, an unknown splitting rule, or damaged
            lists.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    file = open_gguf(path)
    kind = file.get("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise CheckpointError(
            f"{file.path} holds a tokenizer of kind {kind!r}; byte-level BPE (gpt2) is read."
        )
    tokens, merges = _strings(file, "tokenizer.ggml.tokens"), _strings(file, "tokenizer.ggml.merges")
    types = file.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    if len(types) != len(tokens) or not all(type(item) is int for item in types):
        raise CheckpointError(
            f"{file.path}: {len(tokens)} tokens, but {len(types)} token types. The file is damaged; "
            "fetch it again."
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError(
            f"{file.path}: a token occurs twice in its list. The file is damaged; fetch it again."
        )
    pairs = []
    for merge in merges:
        first, blank, second = merge.partition(" ")
        if not (blank and first in vocab and second in vocab and first + second in vocab):
            raise CheckpointError(
                f"{file.path}: the merge {merge!r} is not one of two known tokens. The file is damaged; "
                "fetch it again."
            )
        pairs.append((first, second))

    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs, fuse_unk=False))
    backend.pre_tokenizer = _pre_tokenizer(file)
    backend.decoder = decoders.ByteLevel()
    for special, wanted in ((True, _CONTROL), (False, _USER_DEFINED)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, kind in zip(tokens, types, strict=True)
            if kind == wanted
        ]
        if added:
            (backend.add_special_tokens if special else backend.add_tokens)(added)
    if backend.get_vocab_size() != len(tokens):
        raise CheckpointError(
            f"{file.path}: special tokens are not in the vocabulary. The file is damaged; fetch it again."
        )

    options: dict[str, Any] = {
        f"{name}_token": _token(file, tokens, key)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: token for name, token in options.items() if token is not None},
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=file.get(f"{file.architecture}.context_length", int, 2**31),
        clean_up_tokenization_spaces=False,
        # the fast backend reads these two and prepends or appends the token itself
        add_bos_token=file.get("tokenizer.ggml.add_bos_token", bool, False),
        add_eos_token=file.get("tokenizer.ggml.add_eos_token", bool, False),
    )
    template = file.get("tokenizer.chat_template", str, None)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _pre_tokenizer(file: GGUFFile) -> Any:
    from tokenizers import Regex, pre_tokenizers

    name = file.get("tokenizer.ggml.pre", str, "default")
    if name in _PLAIN_BYTES:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _DIGITS_THEN_BYTES:
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if name in _REGEX:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_REGEX[name]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    known = ", ".join((*_DIGITS_THEN_BYTES, *_PLAIN_BYTES, *_REGEX))
    raise CheckpointError(
        f"{file.path} splits text by the rule {name!r}; known rules are {known}. "
        "Use the tokenizer of the Hugging Face folder."
    )


def _strings(file: GGUFFile, key: str) -> list[str]:
    values = file.get(key, list)
    if not all(isinstance(value, str) for value in values):
        raise CheckpointError(
            f"{file.path}: {key} is no list of strings. The file is damaged; fetch it again."
        )
    return values


def _token(file: GGUFFile, tokens: list[str], key: str) -> str | None:
    index = file.get(f"tokenizer.ggml.{key}_token_id", int, None)
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise CheckpointError(
            f"{file.path}: the {key} token has the id {index}, but there are {len(tokens)} tokens."
        )
    return tokens[index]
