"""The base class of every token mixer: all ways of giving tokens become one internal form.

A mixer implements `init_weights`, `init_state` and `mix`; `mix_step` only when one token deserves its own
path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .config import MixerConfig
from .context import SequenceContext, build_context
from .state import State

# Dimensions: B batch rows, T tokens, N sequences (= rows of the state), L tokens in packed form, M width


@dataclass
class LayerOutput:
    """What a mixer returns.

    Attributes:
        hidden: (B, T, M), or (B, M) from `step`.
        state: the state after the last token, when asked for.
        aux: losses of the layer, name -> (sum, count), each (N,).
        extras: tensors that a whole-model loss needs, (B, T, ...) each, with gradient, when asked for.
    """

    hidden: Tensor
    state: Any = None  # a State of the mixer's own type
    aux: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)


class TokenMixer(nn.Module):
    """Maps (B, T, M) to (B, T, M) and carries a state; see docs/contract.md for what it promises.

    Class attributes a mixer may set:
        exact: where a sequence may be cut: "token" (anywhere), "segment" (at multiples of `segment_size`),
            "question" (not inside a run of role 0).
        needs: names of per-token integer streams that must be given.
        overridable: sizes that a call may replace (of `context.OVERRIDES`); any other override is refused.
        data_dependent: what the tokens are, not only how many, decides the size of the state or the work of a
            step; the declared bytes and FLOPs are then upper bounds.
        owns_norm: the block hands over the raw residual and does not normalise for this mixer.
    """

    # a composite mixer sets these on the instance, from the mixers inside
    exact: Literal["token", "segment", "question"] = "token"
    needs: frozenset[str] = frozenset()
    overridable: frozenset[str] = frozenset()
    data_dependent: bool = False
    owns_norm: ClassVar[bool] = False

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.config = config
        self.d_model = config.d_model
        # what an empty state looks like, filled by the first check of a state
        self._state_type: type[State] | None = None
        self._state_layout: tuple[Any, ...] | None = None
        self._compare_slots = False

    # ------------------------------------------------------------------ what a mixer implements

    def init_weights(self) -> None:
        """Initialises every parameter of this mixer; all initialisation is visible here."""
        raise NotImplementedError

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """An empty memory of `batch_size` sequences; `dtype` is that of the activations."""
        raise NotImplementedError

    def mix(self, x: Tensor, ctx: SequenceContext, state: Any) -> LayerOutput:
        """Mixes tokens in internal form.

        Args:
            x: (B, T, M) dense or (1, L, M) packed, see `SequenceContext`. At least one sequence.
            state: the incoming state, or None for an empty memory.

        Returns:
            hidden of the shape of x; the new state when `ctx.return_state`; extras when `ctx.return_extras`.
        """
        raise NotImplementedError

    def mix_step(self, x: Tensor, ctx: SequenceContext, state: Any) -> LayerOutput:
        """Like `mix` for one token (N, 1, M) of every sequence; `state` is never None."""
        return self.mix(x, ctx, state)

    def state_num_bytes(
        self, num_tokens: int, batch_size: int = 1, dtype: torch.dtype = torch.float32
    ) -> int:
        """Bytes of the state after `num_tokens` tokens; the default serves every state of constant size."""
        return self.init_state(batch_size, device="meta", dtype=dtype).num_bytes()

    def flops_per_token(self, num_tokens: int) -> int:
        """Matrix-product FLOPs (2 per multiply-add) of one `step` after `num_tokens` tokens."""
        raise NotImplementedError

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Two small configs of unequal sizes (fields without `type`), used by the contract tests."""
        raise NotImplementedError

    # ------------------------------------------------------------------ what the base class gives

    @property
    def span(self) -> int:
        """The longest window, chunk or kernel of this mixer; tests read over four times as many tokens."""
        return config_span(self.config)

    @property
    def segment_size(self) -> int:
        """Tokens between two places where a sequence may be cut, for `exact = "segment"`."""
        return 1

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        streams: Mapping[str, Tensor] | None = None,
        overrides: Mapping[str, int] | None = None,
        return_state: bool = False,
        return_extras: bool = False,
    ) -> LayerOutput:
        """Mixes a batch of sequences.

        Args:
            x: (B, T, M). T may be 0.
            state: what an earlier call returned for the same sequences; None is an empty memory.
            mask: (B, T) bool, True = real token, any pattern. Padding neither writes, decays nor counts; its
                output is 0.
            cu_seqlens: (N + 1,) boundaries of N sequences packed in one row (B = 1).
            max_seqlen: accepted for callers of the field's kernels and ignored (it follows from
                `cu_seqlens`).
            streams: per-token integers (B, T) such as roles or segments.
            overrides: sizes to use in this call only, of those that the mixer lists in `overridable`.
            return_state: also return the state after the last token.
            return_extras: also return what whole-model losses need.

        Raises:
            ValueError: shapes, state, mask and boundaries do not fit each other, x and the weights differ in
                dtype while autocast is off, or a needed stream is missing.
        """
        self._check_input(x, 3, "(B, T, d_model)")
        self._check_streams(streams)
        self._check_overrides(overrides)
        ctx = build_context(
            (x.shape[0], x.shape[1]),
            x.device,
            num_seen=self._tokens_seen(state),
            mask=mask,
            cu_seqlens=cu_seqlens,
            streams=streams,
            overrides=overrides,
            return_state=return_state,
            return_extras=return_extras,
        )
        if ctx.batch_size == 0:
            return self._no_sequences(x, ctx, state)
        out = self._checked(self.mix(ctx.pack(x), ctx, state))
        extras = {name: ctx.unpack(value) for name, value in out.extras.items()}
        return LayerOutput(ctx.unpack(out.hidden), out.state, out.aux, extras)

    def step(
        self, x_t: Tensor, state: Any, *, streams: Mapping[str, Tensor] | None = None, donate: bool = False
    ) -> LayerOutput:
        """Reads one token of every sequence; same numbers as `forward` on it.

        Args:
            x_t: (N, M).
            state: the state so far (`init_state` for an empty memory).
            streams: per-token integers (N,).
            donate: allow the memory of `state` to be reused (no gradient is recorded then); `state` cannot be
                used afterwards.
        """
        self._check_input(x_t, 2, "(N, d_model)")
        self._check_streams(streams)
        if state is None:
            raise ValueError("step needs a state, got None. Start with mixer.init_state(batch_size).")
        ctx = build_context(
            (x_t.shape[0], 1),
            x_t.device,
            num_seen=self._tokens_seen(state),
            streams={name: stream[:, None] for name, stream in (streams or {}).items()},
            return_state=True,
            in_place=donate,
        )
        if ctx.batch_size == 0:
            out = self._no_sequences(x_t[:, None], ctx, state)
        else:
            out = self._checked(self.mix_step(x_t[:, None], ctx, state))
        if donate:
            state.poison()
        return LayerOutput(out.hidden.squeeze(1), out.state, out.aux, out.extras)

    def check_state(self, state: Any) -> None:
        """Raises unless a state can be one that this mixer returned.

        Only its type and sizes are looked at: of two mixers with states of equal layout, each takes the
        state of the other.

        Raises:
            TypeError: no state, or one of another type of mixer.
            ValueError: a donated state, or one with tensors of other sizes.
        """
        if not isinstance(state, State):
            raise TypeError(
                f"state must be what {type(self).__name__} returned (a State), got {type(state).__name__}. "
                "Use state=None or mixer.init_state(batch_size) for an empty memory."
            )
        state.check_usable()
        if torch.compiler.is_compiling():
            return
        if self._state_type is None:
            self._state_type = type(self.init_state(1, device="meta"))
            self._compare_slots = self._has_constant_size()
        if type(state) is not self._state_type:
            raise TypeError(
                f"{type(self).__name__} needs a {self._state_type.__name__}, got a {type(state).__name__}: "
                "the state is of another mixer. Use state=None or mixer.init_state(batch_size) for an empty "
                "memory."
            )
        for name, tensor in state.named_tensors():
            if tensor.dim() < 1 or tensor.shape[0] != state.batch_size:
                raise ValueError(
                    f"the state has {state.batch_size} rows, but {name} has the shape {tuple(tensor.shape)}: "
                    "it was put together from several batches. Use state.select(rows) to keep some rows."
                )
        given = _layout_of(state)
        if given != self._layout():
            wrong = _difference(given, self._layout(fresh=True), compare_slots=self._compare_slots)
            if wrong is not None:
                raise ValueError(
                    f"the state is of a {type(self).__name__} with another config: {wrong}. Use state=None "
                    "or mixer.init_state(batch_size) for an empty memory."
                )

    def reset_parameters(self) -> None:
        """Initialises this mixer and those inside it, for instance after the meta device."""
        for module in self.modules():
            if isinstance(module, TokenMixer):
                module.init_weights()

    def extra_repr(self) -> str:
        return ", ".join(
            f"{k}={v!r}" for k, v in self.config.to_dict().items() if not isinstance(v, (dict, list))
        )

    def _checked(self, out: LayerOutput) -> LayerOutput:
        if not isinstance(out, LayerOutput):
            raise TypeError(
                f"mix of {type(self).__name__} must return LayerOutput(hidden, state), "
                f"got {type(out).__name__}."
            )
        return out

    def _no_sequences(self, x: Tensor, ctx: SequenceContext, state: Any) -> LayerOutput:
        """The answer to a batch without rows, which no mixer has to think of."""
        if state is None:
            state = self.init_state(0, device=x.device, dtype=x.dtype)
        return LayerOutput(torch.zeros_like(x), state.clone() if ctx.return_state else None)

    def _check_input(self, x: Tensor, rank: int, shape: str) -> None:
        if x.dim() != rank or x.shape[-1] != self.d_model:
            raise ValueError(
                f"{type(self).__name__} expects {shape} with d_model={self.d_model}, got {tuple(x.shape)}. "
                "Reshape the input or build the mixer with its width."
            )
        fixed = getattr(self, "float32_parameters", ())  # whatever the dtype of the others
        weight = next((p for name, p in self.named_parameters() if name not in fixed), None)
        if weight is not None and weight.dtype != x.dtype and not torch.compiler.is_compiling():
            self._check_dtype(x)

    def _check_dtype(self, x: Tensor) -> None:
        """Names both dtypes where torch would stop at the first product."""
        # parameters that stay in float32 whatever the others are say nothing
        fixed = {
            id(module.get_parameter(name))
            for module in self.modules()
            for name in getattr(module, "float32_parameters", ())
        }
        dtypes = {parameter.dtype for parameter in self.parameters() if id(parameter) not in fixed}
        # wrapped projections have several dtypes; quantised ones know themselves what they take
        if x.dtype in dtypes or not all(dtype.is_floating_point for dtype in dtypes):
            return
        # autocast aligns all floating dtypes but float64
        is_castable = x.is_floating_point() and torch.float64 not in {x.dtype, *dtypes}
        if is_castable and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            return
        names = " and ".join(sorted(map(str, dtypes)))
        raise ValueError(
            f"the input of {type(self).__name__} is {x.dtype}, its weights are {names}. "
            "Convert one of them: x.to(dtype), mixer.to(dtype)."
        )

    def _check_streams(self, streams: Mapping[str, Tensor] | None) -> None:
        missing = self.needs - set(streams or {})
        if missing:
            raise ValueError(
                f"{type(self).__name__} needs the per-token streams {sorted(missing)}, got "
                f"{sorted(streams or {})}. "
                "Pass streams={name: integers of shape (B, T)}."
            )

    def _check_overrides(self, overrides: Mapping[str, int] | None) -> None:
        for name in overrides or ():
            if name not in self.overridable:
                known = (
                    f"It takes {', '.join(sorted(self.overridable))}."
                    if self.overridable
                    else "It takes none."
                )
                raise ValueError(
                    f"{type(self).__name__} has no size {name!r} that a call may override. {known}"
                )

    def _tokens_seen(self, state: Any) -> Tensor | None:
        if state is None:
            return None
        self.check_state(state)
        tokens: Tensor = state.num_tokens
        return tokens

    def _layout(self, *, fresh: bool = False) -> tuple[Any, ...]:
        """The layout of an empty state, remembered between calls."""
        if fresh or self._state_layout is None:
            self._state_layout = _layout_of(self.init_state(1, device="meta"))
        return self._state_layout

    def _has_constant_size(self) -> bool:
        """Whether every state of this mixer has the slots of an empty one."""
        if self.data_dependent:
            return False
        return self.state_num_bytes(0) == self.state_num_bytes(1) == self.state_num_bytes(2**20)


def _layout_of(state: State) -> tuple[Any, ...]:
    """(name, number of slots or None, sizes behind them) of every tensor of a state."""
    return tuple(
        (name, tensor.shape[1] if tensor.dim() > 1 else None, tuple(tensor.shape[2:]))
        for name, tensor in state.named_tensors()
    )


def _difference(given: tuple[Any, ...], expected: tuple[Any, ...], *, compare_slots: bool) -> str | None:
    """What a state has that it should not, in words; None where nothing differs."""
    given_names, expected_names = [entry[0] for entry in given], [entry[0] for entry in expected]
    if given_names != expected_names:
        return f"it holds {', '.join(given_names)}, expected {', '.join(expected_names)}"
    for (name, slots, sizes), (_, expected_slots, expected_sizes) in zip(given, expected, strict=True):
        if sizes != expected_sizes or (slots is None) != (expected_slots is None):
            return f"{name} has {sizes} behind its slots, expected {expected_sizes}"
        if compare_slots and slots != expected_slots:
            return f"{name} has {slots} slots, expected {expected_slots}"
    return None


def config_span(config: MixerConfig) -> int:
    """The largest window, chunk, block or kernel size named in a config, inner mixers included."""
    sizes = [1]
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, int) and item.name.endswith(
            ("window_size", "chunk_size", "block_size", "conv_size", "segment_size")
        ):
            sizes.append(value)
        for inner in value if isinstance(value, tuple) else ():
            if isinstance(inner, MixerConfig):
                sizes.append(config_span(inner))
    return max(sizes)


def tag_parameter(
    parameter: nn.Parameter, *, weight_decay: bool = True, lr_scale: float = 1.0
) -> nn.Parameter:
    """Marks a parameter for the optimiser: no weight decay (norms, gates, decays), or a rate of its own.

    The tags are read by the training floor; they are plain attributes and survive deepcopy.
    """
    parameter._no_weight_decay = not weight_decay  # type: ignore[attr-defined]
    parameter._lr_scale = lr_scale  # type: ignore[attr-defined]
    return parameter
