"""A mixer made of mixers: it hands its context on, nests their states and merges their losses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..contract import LayerOutput, MixerConfig, SequenceContext, State, TokenMixer
from .kv_cache import empty_tokens

# Dimensions: B batch, T tokens, N sequences, M model width

_EXACTNESS = ("token", "segment", "question")  # from the finest to the coarsest place to cut a sequence


@dataclass(frozen=True, kw_only=True)
class CompositeConfig(MixerConfig):
    """Fields of every composite.

    Attributes:
        mixers: configs of the inner mixers, in order; at least two, all of width d_model.
    """

    mixers: tuple[MixerConfig, ...]

    _is_wrapper: ClassVar[bool] = False  # around one mixer, in place of several

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._is_wrapper and len(self.mixers) != 1:
            raise ValueError(
                f"a {self.type!r} mixer goes around one inner mixer, got {len(self.mixers)}. List one under "
                "mixers, such as a parallel or sequential one with several inside."
            )
        if not self._is_wrapper and len(self.mixers) < 2:
            raise ValueError(
                f"a {self.type!r} mixer needs at least two inner mixers, got {len(self.mixers)}. "
                "List them under mixers, or use the one mixer by itself."
            )
        for index, inner in enumerate(self.mixers):
            if not isinstance(inner, MixerConfig):
                raise ValueError(
                    f"mixers[{index}] must be a config, got {type(inner).__name__}. "
                    "Build the whole from plain data with memzoo.layers.mixer_config."
                )
            if inner.d_model != self.d_model:
                raise ValueError(
                    f"mixers[{index}] ({inner.type!r}) has d_model={inner.d_model}, the {self.type!r} mixer "
                    f"around it has {self.d_model}. Leave out the inner d_model to inherit it."
                )


@dataclass(kw_only=True)
class CompositeState(State):
    """What the inner mixers remember.

    Attributes:
        mixers: their states, in order.
    """

    mixers: tuple[State, ...]


class CompositeMixer(TokenMixer):
    """Base of composites; a subclass implements `compose`."""

    config: CompositeConfig

    def __init__(self, config: CompositeConfig, mixers: Sequence[TokenMixer]) -> None:
        super().__init__(config)
        if [inner.config for inner in mixers] != list(config.mixers):
            raise ValueError(
                f"the {config.type!r} config lists {[inner.type for inner in config.mixers]}, but the mixers "
                f"given are {[inner.config.type for inner in mixers]} or have other configs. "
                "Use memzoo.layers.build_mixer."
            )
        for index, inner in enumerate(mixers):
            if inner.owns_norm:
                raise ValueError(
                    f"mixers[{index}] ({inner.config.type!r}) normalises its own input and cannot share one "
                    "with others. Use it as the only mixer of a block."
                )
        self.mixers = nn.ModuleList(mixers)
        # properties of this instance, where a plain mixer has them on its class
        self.needs = frozenset[str]().union(*(inner.needs for inner in mixers))
        self.overridable = frozenset[str]().union(*(inner.overridable for inner in mixers))
        self.exact = max((inner.exact for inner in mixers), key=_EXACTNESS.index)
        self.data_dependent = any(inner.data_dependent for inner in mixers)

    @property
    def segment_size(self) -> int:
        """The least common multiple over the inner mixers."""
        return math.lcm(*(inner.segment_size for inner in self._inner()))

    def compose(self, x: Tensor, run: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The output for x (B, T, M); `run(i, y)` is the output of inner mixer i for y, each called once."""
        raise NotImplementedError

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> CompositeState:
        """Empty memories of all inner mixers."""
        states = tuple(inner.init_state(batch_size, device=device, dtype=dtype) for inner in self._inner())
        return CompositeState(num_tokens=empty_tokens(batch_size), mixers=states)

    def check_state(self, state: Any) -> None:
        """Raises unless every inner mixer can have returned its part of the state."""
        if not isinstance(state, CompositeState):
            super().check_state(state)
        state.check_usable()
        if len(state.mixers) != len(self.mixers):
            raise ValueError(
                f"the state holds {len(state.mixers)} inner states, the {self.config.type!r} mixer has "
                f"{len(self.mixers)} mixers. It is of another mixer."
            )
        for inner, part in zip(self._inner(), state.mixers, strict=True):
            inner.check_state(part)

    def mix(self, x: Tensor, ctx: SequenceContext, state: CompositeState | None) -> LayerOutput:
        """Runs the inner mixers on whole sequences."""
        return self._run(x, ctx, state, [inner.mix for inner in self._inner()])

    def mix_step(self, x: Tensor, ctx: SequenceContext, state: CompositeState) -> LayerOutput:
        """Runs the inner mixers on one token."""
        return self._run(x, ctx, state, [inner.mix_step for inner in self._inner()])

    def state_num_bytes(
        self, num_tokens: int, batch_size: int = 1, dtype: torch.dtype = torch.float32
    ) -> int:
        """The inner states and one counter."""
        inner = sum(inner.state_num_bytes(num_tokens, batch_size, dtype) for inner in self._inner())
        return inner + 8 * batch_size

    def flops_per_token(self, num_tokens: int) -> int:
        """Sum over the inner mixers."""
        return sum(inner.flops_per_token(num_tokens) for inner in self._inner())

    def _inner(self) -> list[TokenMixer]:
        return list(self.mixers)  # type: ignore[arg-type]  # a ModuleList forgets the type of its items

    def _run(
        self,
        x: Tensor,
        ctx: SequenceContext,
        state: CompositeState | None,
        calls: list[Callable[..., LayerOutput]],
    ) -> LayerOutput:
        outputs: dict[int, LayerOutput] = {}

        def run(index: int, y: Tensor) -> Tensor:
            own = ctx
            if ctx.overrides:  # each inner mixer is handed the sizes that it has
                known = self._inner()[index].overridable
                sizes = {name: size for name, size in ctx.overrides.items() if name in known}
                own = dataclasses.replace(ctx, overrides=sizes)
            outputs[index] = calls[index](y, own, None if state is None else state.mixers[index])
            return outputs[index].hidden

        merged = LayerOutput(self.compose(x, run))
        for index in sorted(outputs):
            out = outputs[index]
            merged.aux.update({f"{index}.{name}": value for name, value in out.aux.items()})
            merged.extras.update({f"{index}.{name}": value for name, value in out.extras.items()})
        if ctx.return_state:
            states: tuple[Any, ...] = tuple(outputs[index].state for index in range(len(calls)))
            merged.state = CompositeState(num_tokens=ctx.num_tokens_after, mixers=states)
        return merged
