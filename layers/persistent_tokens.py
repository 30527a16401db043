"""Learned tokens in front of every sequence, for the mixer inside: y = the last T outputs of m([p | x]).

The persistent memory of Titans (Behrouz et al., arXiv 2501.00663). A window inside sees them for good where
it has as many sinks.
State: that of the mixer inside, which has read p; an empty memory is therefore a learned one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .contract import LayerOutput, SequenceContext, TokenMixer, check_positive, tag_parameter
from .contract.context import build_context
from .parts.composite import CompositeConfig, CompositeMixer, CompositeState
from .parts.kv_cache import empty_tokens

# Dimensions: N sequences, T tokens, P persistent tokens, M model width


@dataclass(frozen=True, kw_only=True)
class PersistentTokensConfig(CompositeConfig):
    """Configuration of `PersistentTokens`; `mixers` holds the one mixer inside.

    Attributes:
        num_persistent: learned tokens that the mixer inside reads before each sequence.
    """

    type: str = "persistent_tokens"
    num_persistent: int = 4

    _is_wrapper: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_persistent")


class PersistentTokens(CompositeMixer):
    """Lets a mixer read learned tokens before each sequence. Sizes cannot be overridden per call."""

    config: PersistentTokensConfig

    def __init__(self, config: PersistentTokensConfig, mixers: Sequence[TokenMixer]) -> None:
        super().__init__(config, mixers)
        inner, count = mixers[0], config.num_persistent
        if inner.needs:
            raise ValueError(
                f"the mixer inside ({inner.config.type!r}) needs the streams {sorted(inner.needs)}, which "
                "persistent tokens do not have. Use a mixer that reads tokens alone."
            )
        if count % inner.segment_size:
            raise ValueError(
                f"num_persistent must be a multiple of the segment size {inner.segment_size} of the mixer "
                f"inside ({inner.config.type!r}), got {count}."
            )
        self.overridable = frozenset[str]()  # those tokens were read with the sizes of the config
        self.tokens = tag_parameter(nn.Parameter(torch.empty(count, config.d_model)), weight_decay=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Tokens N(0, 1), as long as normalised ones; the mixer inside initialises itself."""
        nn.init.normal_(self.tokens)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> CompositeState:
        """The state of the mixer inside after the learned tokens, with its gradient."""
        weight, inner = self.tokens, self._inner()[0]
        device, dtype = torch.device(device or weight.device), dtype or weight.dtype
        if device.type == "meta" or not batch_size:  # sizes alone are asked for
            read = inner.init_state(batch_size, device=device, dtype=dtype)
        else:
            ctx = build_context((batch_size, self.config.num_persistent), device, return_state=True)
            read = inner.mix(weight.to(device).expand(batch_size, -1, -1), ctx, None).state
        if dtype != weight.dtype:
            like = inner.init_state(batch_size, device="meta", dtype=dtype)
            read = pytree.tree_map(lambda x, other: None if x is None else x.to(other.dtype), read, like)
        return CompositeState(num_tokens=empty_tokens(batch_size), mixers=(read,))

    def compose(self, x: Tensor, run: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The output of the mixer inside."""
        return run(0, x)

    def state_num_bytes(
        self, num_tokens: int, batch_size: int = 1, dtype: torch.dtype = torch.float32
    ) -> int:
        """That of the mixer inside after P more tokens."""
        return super().state_num_bytes(self._after(num_tokens), batch_size, dtype)

    def flops_per_token(self, num_tokens: int) -> int:
        """That of the mixer inside after P more tokens."""
        return super().flops_per_token(self._after(num_tokens))

    def _after(self, num_tokens: int) -> int:
        return num_tokens + self.config.num_persistent

    def _positions(self, ctx: SequenceContext, in_front: int) -> Tensor:
        """Of tokens with `in_front` more before them, in a call that begins a dense batch."""
        if not in_front:
            return ctx.positions
        rows, length = ctx.positions.shape
        return torch.arange(length + in_front, device=ctx.positions.device).expand(rows, -1)

    def _run(
        self,
        x: Tensor,
        ctx: SequenceContext,
        state: CompositeState | None,
        calls: list[Callable[..., LayerOutput]],
    ) -> LayerOutput:
        count, in_front = self.config.num_persistent, 0
        if state is None and ctx.cu_seqlens is None:
            in_front = count
            x = torch.cat([self.tokens.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        elif state is None:
            state = self.init_state(ctx.batch_size, device=x.device, dtype=x.dtype)
        seen = count - in_front
        moved = dataclasses.replace(
            ctx,
            lengths=tuple(length + in_front for length in ctx.lengths),
            num_seen=ctx.num_seen + seen,
            uniform_num_seen=None if ctx.uniform_num_seen is None else ctx.uniform_num_seen + seen,
            positions=self._positions(ctx, in_front) + seen,
            input_shape=(x.shape[0], x.shape[1]),
            tables=ctx.tables.setdefault(("persistent_tokens", count), {}),
        )
        out = super()._run(x, moved, state, calls)
        if out.state is not None:
            out.state = CompositeState(num_tokens=ctx.num_tokens_after, mixers=out.state.mixers)
        if in_front:
            extras = {name: value[:, in_front:] for name, value in out.extras.items()}
            out = dataclasses.replace(out, hidden=out.hidden[:, in_front:], extras=extras)
        return out

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Memory as gate and memory as layer (Titans), at toy size."""
        memory = {"type": "titans", "max_lr": 0.02, "decay_init": 0.001, "qk_norm": "l2"}
        return (
            {
                "d_model": 8,
                "num_persistent": 2,
                "mixers": [
                    {
                        "type": "parallel",
                        "combine": "product",
                        "mixers": [
                            {"type": "sliding_window", "num_heads": 2, "window_size": 4, "num_sinks": 2},
                            {**memory, "num_heads": 2, "chunk_size": 3, "expansion": 2.0},
                        ],
                    }
                ],
            },
            {
                "d_model": 6,
                "num_persistent": 3,
                "mixers": [
                    {
                        "type": "sequential",
                        "mixers": [
                            {**memory, "num_heads": 1, "chunk_size": 4, "gates": "token", "expansion": 1.5},
                            {"type": "sliding_window", "num_heads": 1, "window_size": 5, "num_sinks": 3},
                        ],
                    }
                ],
            },
        )
