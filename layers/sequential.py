"""Mixers one after the other, without residual or norm between them: y = m_1(m_0(x)).

State: the states of the inner mixers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .contract import TokenMixer
from .parts.composite import CompositeConfig, CompositeMixer


@dataclass(frozen=True, kw_only=True)
class SequentialConfig(CompositeConfig):
    """Configuration of `Sequential`; `mixers` run in the order given."""

    type: str = "sequential"


class Sequential(CompositeMixer):
    """Feeds the output of each mixer to the next."""

    config: SequentialConfig

    def __init__(self, config: SequentialConfig, mixers: Sequence[TokenMixer]) -> None:
        super().__init__(config, mixers)
        self.init_weights()

    def init_weights(self) -> None:
        """Nothing of its own; the inner mixers initialise themselves."""

    def compose(self, x: Tensor, run: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The output of the last mixer."""
        for index in range(len(self.mixers)):
            x = run(index, x)
        return x

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """A convolution before linear attention, as in BASED; three mixers."""
        return (
            {
                "d_model": 16,
                "mixers": [
                    {"type": "base_conv", "conv_size": 3},
                    {"type": "linear_attention", "num_heads": 2, "feature_dim": 3, "chunk_size": 5},
                ],
            },
            {
                "d_model": 24,
                "mixers": [
                    {"type": "base_conv", "variant": "zoology", "conv_size": 2},
                    {"type": "sliding_window", "num_heads": 2, "window_size": 4},
                    {"type": "linear_attention", "num_heads": 3, "feature_map": "hedgehog", "chunk_size": 3},
                ],
            },
        )
