"""The text of a conversion: a data module of `memzoo train`, with the sizes of a stage."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ...layers.contract import suggest
from ..command_line import DATA_TYPES
from ..data.batches import BatchSource
from ..data.documents import check_text_file, names
from ..data.texts import load_text

# given by the stage, the source or the recipe
_OWN = ("tokenizer", "seq_len", "batch_size", "seed")
_NEEDED = frozenset(_OWN)
_UNREAD = ("contiguous", "num_workers", "max_val_windows", "max_val_rows")
DEFAULT_DATA = {"type": "text", "texts": ["state_of_the_union"]}
_DIGESTED = 4096  # batches
_WORDS = {
    str: "a text",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    type(None): "null",
    Sequence[str]: "a list of texts",
}
# Pretrained models have read their texts one after another, without resets.
_DEFAULTS: dict[str, dict[str, Any]] = {"text": {"reset_at_documents": False, "append_eos": False}}


def check_data(data: Mapping[str, Any]) -> None:
    """Refuses data that cannot be read, before any work.

    Args:
        data: `type` (text unless given) and arguments of that data module; not its tokenizer and sizes.

    Raises:
        ValueError: an unknown type or key (the nearest is named), a value of another kind than the data
            module takes, a text or file that is not there, or no text at all.
    """
    known = inspect.signature(_data_class(data)).parameters
    for key in data:
        if key in _OWN:
            raise ValueError(f"data: {key} is set by the stages and the source. Leave it out.")
        if key != "type" and key not in known:
            raise ValueError(f"data: unknown key {key!r}. {suggest(str(key), set(known) - _NEEDED)}")
    for key in _UNREAD:
        if data.get(key):
            raise ValueError(
                f"data: {key} has no effect: a conversion begins every window with an empty memory, reads in "
                "its own process and validates on no text. Leave it out."
            )
    _arguments(data)
    for name in names(data.get("texts", ())):
        load_text(name)
    for file in names(data.get("files", ())):
        check_text_file(file)
    if not any(data.get(name) for name in ("texts", "files", "dataset", "task")):
        raise ValueError(
            "data: no text to train on. Name a bundled text in texts, or give files or a dataset."
        )


def read_batches(
    data: Mapping[str, Any], *, tokenizer: str, seq_len: int, batch_size: int, seed: int
) -> BatchSource:
    """All training batches of one size.

    Raises:
        ValueError: too little text, or data that can be read only once from start to end.
    """
    module = _data_class(data)(
        **_arguments(data), tokenizer=tokenizer, seq_len=seq_len, batch_size=batch_size, seed=seed
    )
    module.setup()
    found = module.train_dataloader().dataset
    if not isinstance(found, BatchSource):
        raise ValueError(
            "a conversion reads its text several times, which streamed data cannot offer. "
            "Leave streaming out, or save a part of it as a file."
        )
    return found


def batches_digest(batches: BatchSource) -> str:
    """SHA-256 of what is read, in hexadecimal; of more than 4,096 batches, of as many spread evenly."""
    digest = hashlib.sha256(str(batches.num_batches).encode())
    count = min(batches.num_batches, _DIGESTED)
    for number in range(count):
        batch = batches.batch(0, number * batches.num_batches // count)
        for part in (batch.input_ids, batch.labels, batch.cu_seqlens, batch.mask):
            digest.update(b"none" if part is None else part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _data_class(data: Mapping[str, Any]) -> Any:
    kind = data.get("type", "text")
    usable = {}
    for name, target in DATA_TYPES.items():
        module, _, attribute = target.partition(":")
        found = getattr(importlib.import_module(module), attribute)
        if set(inspect.signature(found).parameters) >= _NEEDED:
            usable[name] = found
    if not isinstance(kind, str) or kind not in usable:
        raise ValueError(f"data type {kind!r} has no text for a conversion. {suggest(str(kind), usable)}")
    return usable[kind]


def _arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the data module wants them: nested settings as their dataclasses."""
    hints = get_type_hints(_data_class(data).__init__)
    given = {**_DEFAULTS.get(data.get("type", "text"), {}), **data}
    given.pop("type", None)
    for name, value in given.items():
        if name in hints:
            given[name] = _typed(value, hints[name], name)
    return given


def _typed(value: Any, hint: Any, where: str) -> Any:
    """A value as a signature wants it; raises ValueError for one of another kind."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            known = get_type_hints(option)
            for key in value:
                if key not in known:
                    raise ValueError(f"data: unknown key {key!r} in {where}. {suggest(str(key), known)}")
            made: Any = option
            try:
                return made(
                    **{key: _typed(item, known[key], f"{where}.{key}") for key, item in value.items()}
                )
            except TypeError as error:  # a key that it needs
                raise ValueError(f"data: {where}: {error}.") from None
        if _is_of(value, option):
            return value
    wanted = " or ".join(
        ", ".join(map(str, get_args(option)))
        if get_origin(option) is Literal
        else _WORDS.get(option, "a mapping")
        for option in options
    )
    raise ValueError(f"data: {where} must be {wanted}, got {value!r}. Correct it, or leave it out.")


def _is_of(value: Any, option: Any) -> bool:
    if get_origin(option) is Sequence:
        return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
    if get_origin(option) is Mapping:
        return isinstance(value, Mapping)
    if get_origin(option) is Literal:
        return value in get_args(option)
    if option is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is option  # truth values are no integers
