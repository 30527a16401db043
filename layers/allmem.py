"""AllMem: attention over a window with sinks, beside a memory whose weights learn while it reads.

    y = window(x) + c * memory(x)          c one coefficient per channel, 0 at first

arXiv 2602.13680; no code is published. The window is `sliding_window` with the weights of a trained attention
layer, the memory `fast_weight_memory`; `parallel` adds them. With c = 0 a converted model is its teacher with
a window, and the teacher itself while a sequence fits the window.
A token sees the memory of earlier chunks and the window: with a window shorter than a chunk, tokens in
between are seen by neither.
State: those of the two. Constant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .contract.config import ConfigT
from .fast_weight_memory import FastWeightMemory, FastWeightMemoryConfig
from .parallel import Parallel, ParallelConfig
from .parts.attention_base import HeadsConfig, check_window
from .parts.fast_net import FastNetConfig
from .sliding_window import SlidingWindowAttention, SlidingWindowConfig


@dataclass(frozen=True, kw_only=True)
class AllMemConfig(HeadsConfig, FastNetConfig):
    """Configuration of `AllMem`: heads of the attention as in `HeadsConfig`, the net as in `FastNetConfig`.

    Attributes:
        window_size: tokens of the window, the own one included.
        num_sinks: first tokens of the sequence that stay visible.
        mem_heads: heads of the memory (default: `num_kv_heads`).
        mem_dim: width of all of them, a multiple of mem_heads.
        conv_size: taps of the convolution in the memory; 0 for none.
        gate: output gate of the memory, "head", "channel" or "none".
    """

    type: str = "allmem"
    window_size: int
    num_sinks: int = 0
    mem_heads: int | None = None
    mem_dim: int = 512
    conv_size: int = 4
    gate: str = "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window_size, self.num_sinks)
        if self.mem_heads is None:
            object.__setattr__(self, "mem_heads", self.kv_heads)
        self.parts()  # raises what is wrong with either

    def parts(self) -> tuple[SlidingWindowConfig, FastWeightMemoryConfig]:
        """The configs of the window and of the memory."""
        memory = {"num_heads": self.mem_heads}
        return _part(SlidingWindowConfig, self, {}), _part(FastWeightMemoryConfig, self, memory)


class AllMem(Parallel):
    """Window and memory under one coefficient per channel.

    `overrides` of a call may replace `window_size`, `num_sinks` and `chunk_size` while no state is given or
    asked for. Probes: those of `parallel` and of the memory.
    """

    def __init__(self, config: AllMemConfig) -> None:
        window, memory = config.parts()
        both = ParallelConfig(d_model=config.d_model, combine="channel", mixers=(window, memory))
        super().__init__(both, [SlidingWindowAttention(window), FastWeightMemory(memory)])
        self.config = config  # type: ignore[assignment]  # one flat config in place of three

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """As published at toy size; grouped heads, sinks, and another net."""
        return (
            {
                "d_model": 12,
                "num_heads": 2,
                "window_size": 5,
                "mem_dim": 8,
                "chunk_size": 4,
                "lr_init": 0.1,
            },
            {
                "d_model": 18,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 4,
                "window_size": 6,
                "num_sinks": 2,
                "mem_heads": 3,
                "mem_dim": 9,
                "net": "linear",
                "momentum": False,
                "conv_size": 0,
                "gate": "none",
                "chunk_size": 7,
                "lr_init": 0.1,
            },
        )


def _part(kind: type[ConfigT], whole: AllMemConfig, own: Mapping[str, Any]) -> ConfigT:
    """A config with the fields that it has in common with the whole one."""
    names = {item.name for item in dataclasses.fields(kind)} - {"type"}
    shared = {name: value for name, value in whole.to_dict().items() if name in names}
    return kind(**{**shared, **own})
