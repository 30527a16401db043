"""The published methods by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..contract import suggest
from .dropping import h2o, key_norm, keydiff, pyramidkv, snapkv, streaming_llm, tova
from .keeping import (
    arkv,
    compresskv,
    d2o,
    elastic_cache,
    kvmerger,
    mikv,
    sentencekv,
    think,
    windowkv,
)
from .policy import EvictionPolicy
from .retention import retention

PRESETS: dict[str, Callable[..., EvictionPolicy]] = {
    "arkv": arkv,
    "compresskv": compresskv,
    "d2o": d2o,
    "elastic_cache": elastic_cache,
    "h2o": h2o,
    "key_norm": key_norm,
    "keydiff": keydiff,
    "kvmerger": kvmerger,
    "mikv": mikv,
    "pyramidkv": pyramidkv,
    "retention": retention,
    "sentencekv": sentencekv,
    "snapkv": snapkv,
    "streaming_llm": streaming_llm,
    "think": think,
    "tova": tova,
    "windowkv": windowkv,
}


def make_policy(values: Mapping[str, Any] | EvictionPolicy) -> EvictionPolicy:
    """A policy from plain data, `{"type": "tova", "budget": 256}`; a policy is returned as it is.

    Raises:
        ValueError: no or an unknown type, unknown (the nearest is suggested) or missing keys, or sizes out of
            range.
    """
    if isinstance(values, EvictionPolicy):
        return values
    if not isinstance(values, Mapping) or "type" not in values:
        raise ValueError(
            f"a policy must be a mapping with a type, got {values!r}. Write "
            '{"type": "streaming_llm", "budget": 256}.'
        )
    name = str(values["type"])
    if name not in PRESETS:
        raise ValueError(f"policy {name!r} is unknown. {suggest(name, PRESETS)}")
    known = inspect.signature(PRESETS[name]).parameters
    given = {key: value for key, value in values.items() if key != "type"}
    for key in given:
        if key not in known:
            raise ValueError(f"policy {name!r} has no {key!r}. {suggest(key, known)}")
    missing = [key for key, item in known.items() if item.default is item.empty and key not in given]
    if missing:
        raise ValueError(f"policy {name!r} needs {missing}. Add them.")
    return PRESETS[name](**given)
