"""Parts of a model switched off for a while, to see what they are worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch

from ...layers.contract import LayerOutput, TokenMixer
from ...layers.parallel import Parallel
from ..decoder import MemoryLM

_MEMORYLESS = ("attention", "forgetting_attention", "sliding_window")


@contextmanager
def memory_off(model: MemoryLM, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Leaves the memory out of every mixer that has one.

    Args:
        model: comes back as it was.
        layers: blocks to look at; None takes all.

    Mixers with a memory beside a window (lolcats, parallel) go on with the window; retention gates
    (gated_attention) are ignored; the output of mixers that are nothing but a memory becomes 0, inside
    parallel ones as well; attention and windows are left alone.

    Raises:
        ValueError: none of these mixers has a memory.
    """
    chosen = range(len(model.blocks)) if layers is None else layers
    mixers = [memory for index in chosen for memory in _memories(model.blocks[index].mixer)]
    if not mixers:
        raise ValueError(
            "no mixer of this model has a memory branch that can be switched off. "
            "Use mixers that have one, such as lolcats."
        )
    with ExitStack() as stack:
        for mixer in mixers:
            stack.enter_context(_without_memory(mixer))
        yield


@contextmanager
def other_mixers(model: MemoryLM, source: MemoryLM, layers: Sequence[int]) -> Iterator[None]:
    """Puts the mixers of `source` into some blocks of `model`; both models come back as they were."""
    kept = {index: model.blocks[index].mixer for index in layers}
    for index in layers:
        model.blocks[index].mixer = source.blocks[index].mixer
    try:
        yield
    finally:
        for index, mixer in kept.items():
            model.blocks[index].mixer = mixer


def _memories(mixer: TokenMixer) -> list[TokenMixer]:
    """The mixer if it has a memory; of a parallel one those inside that have."""
    if isinstance(mixer, Parallel):
        return [memory for inner in mixer.mixers for memory in _memories(cast(TokenMixer, inner))]
    has_memory = mixer.config.type not in _MEMORYLESS and getattr(mixer, "memory_enabled", True)
    return [mixer] if has_memory else []


@contextmanager
def _without_memory(mixer: TokenMixer) -> Iterator[None]:
    if hasattr(mixer, "memory_enabled"):
        mixer.memory_enabled = False  # type: ignore[assignment]  # a switch of the mixers that have it
        try:
            yield
        finally:
            mixer.memory_enabled = True  # type: ignore[assignment]
        return

    def silent(call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> LayerOutput:
            out: LayerOutput = call(*args, **kwargs)
            return dataclasses.replace(out, hidden=torch.zeros_like(out.hidden))

        return run

    # on the instance, over the methods of its class
    names = ("mix", "mix_step")
    for name in names:
        mixer.__dict__[name] = silent(getattr(mixer, name))
    try:
        yield
    finally:
        for name in names:
            del mixer.__dict__[name]
