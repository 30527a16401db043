"""Several mixers side by side on the same input, added up or multiplied.

    sum        y = m_0(x) + m_1(x) + ...
    gated      y = sum_i sigmoid(w_i . x + b_i) m_i(x)     one gate per token and mixer, 1/2 at first
    channel    y = m_0(x) + sum_{i > 0} c_i * m_i(x)       one coefficient per channel, 0 at first
    product    y = n_0(m_0(x)) prod_{i > 0} sigmoid(n_i(m_i(x)))    n_i RMS norms with learned weights

`product` lets memories gate the first mixer, channel by channel (memory as gate, arXiv 2501.00663).
`channel` adds memories to a trained mixer without changing it at first.
State: the states of the inner mixers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .contract import TokenMixer, check_choice, is_probing, record, tag_parameter
from .parts.composite import CompositeConfig, CompositeMixer
from .parts.norm import RMSNorm

# Dimensions: B batch, T tokens, I inner mixers, M model width


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(CompositeConfig):
    """Configuration of `Parallel`.

    Attributes:
        combine: "sum", "gated", "channel" or "product".
    """

    type: str = "parallel"
    combine: str = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("combine", self.combine, ("sum", "gated", "channel", "product"))


class Parallel(CompositeMixer):
    """Adds, or multiplies, the outputs of mixers that read the same input.

    Probes: `window_share`, the length of the first output over the sum of the lengths of all, weighted as
    they are added; `coefficient`, the sizes of the coefficients; of a product `memory_gate`, its sigmoids.
    """

    config: ParallelConfig

    def __init__(self, config: ParallelConfig, mixers: Sequence[TokenMixer]) -> None:
        super().__init__(config, mixers)
        self.gate_proj: nn.Linear | None = None
        self.coefficient: nn.Parameter | None = None
        self.norms: nn.ModuleList | None = None
        if config.combine == "gated":
            self.gate_proj = nn.Linear(config.d_model, len(mixers))
            for parameter in self.gate_proj.parameters():
                tag_parameter(parameter, weight_decay=False)
        elif config.combine == "channel":
            coefficient = nn.Parameter(torch.empty(len(mixers) - 1, config.d_model))
            self.coefficient = tag_parameter(coefficient, weight_decay=False)
        elif config.combine == "product":
            self.norms = nn.ModuleList(RMSNorm(config.d_model) for _ in mixers)
        self.init_weights()

    def init_weights(self) -> None:
        """Gates at 1/2, coefficients at 0, norms at 1; the inner mixers initialise themselves."""
        if self.gate_proj is not None:
            nn.init.zeros_(self.gate_proj.weight)
            nn.init.zeros_(self.gate_proj.bias)
        if self.coefficient is not None:
            nn.init.zeros_(self.coefficient)
        for norm in self.norms or ():
            assert isinstance(norm, RMSNorm)
            norm.reset_parameters()

    def compose(self, x: Tensor, run: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The sum of all outputs, weighted as configured, or their product."""
        outputs = [run(index, x) for index in range(len(self.mixers))]
        if self.norms is not None:
            first, *gates = (norm(output) for norm, output in zip(self.norms, outputs, strict=True))
            for gate in gates:
                record("memory_gate", gate.sigmoid())
                first = first * gate.sigmoid()
            return first
        if self.gate_proj is not None:
            gates = self.gate_proj(x).sigmoid().unbind(-1)  # I of (B, T)
            outputs = [gate[..., None] * output for gate, output in zip(gates, outputs, strict=True)]
        if self.coefficient is not None:
            record("coefficient", self.coefficient.abs())
            added = zip(self.coefficient.to(x.dtype), outputs[1:], strict=True)
            outputs = [outputs[0], *(coefficient * output for coefficient, output in added)]
        if is_probing():
            first, *rest = (torch.linalg.vector_norm(output.detach().float(), dim=-1) for output in outputs)
            record("window_share", first / sum(rest, first).clamp(min=1e-12))  # (B, T)
        return sum(outputs[1:], outputs[0])

    def flops_per_token(self, num_tokens: int) -> int:
        """The inner mixers and the gate."""
        gate = 0 if self.gate_proj is None else 2 * self.gate_proj.weight.numel()
        return super().flops_per_token(num_tokens) + gate

    @classmethod
    def small_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Two mixers with gates; three mixers with channel coefficients."""
        return (
            {
                "d_model": 24,
                "combine": "gated",
                "mixers": [
                    {"type": "sliding_window", "num_heads": 2, "window_size": 5},
                    {"type": "based", "num_heads": 3, "feature_dim": 3, "chunk_size": 4},
                ],
            },
            {
                "d_model": 16,
                "combine": "channel",
                "mixers": [
                    {"type": "linear_attention", "num_heads": 2, "chunk_size": 6},
                    {"type": "base_conv", "conv_size": 4},
                    {"type": "sliding_window", "num_heads": 1, "window_size": 3, "num_sinks": 2},
                ],
            },
        )
