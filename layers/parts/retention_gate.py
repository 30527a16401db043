"""Retention gates: how long a token is worth keeping, told once, when it is read (TRIM-KV, arXiv 2512.03324).

    g = logsigmoid(W2 act(W1 x + b1) + b)        log of the share beta that is left of the token after each
    step

`g` is at most 0 and float32 (float64 for float64 input); beta itself is never formed. The bias b begins high:
at first every token is kept for ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.autograd import without_autocast
from ..contract import check_choice, check_positive
from .state_space import Float32Parameters, is_number, undecayed
from .token_scores import TokenScore

# Dimensions: B batch, T tokens, H query heads, G key/value heads, D head width, M model width, R gate width

GATE_KINDS = ("mlp", "mlp3", "kv", "kv_swiglu")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
LOWEST_BIAS = 8.0
SLACK = 20.0  # at first the oldest token of a training text weighs exp(-1 / 20) of a young one


def automatic_bias(train_length: int) -> float:
    """max(8, ln(20 T)): over T tokens the gates begin within 5 % of keeping everything, and learn in few
    steps.
    """
    return max(LOWEST_BIAS, math.log(SLACK * train_length))


def check_gates(kind: str, activation: str, bias: float | str) -> None:
    """Raises ValueError unless kind and activation are known and `bias` is "auto" or a number."""
    check_choice("gate", kind, GATE_KINDS)
    check_choice("gate_activation", activation, ACTIVATIONS)
    if bias != "auto" and (isinstance(bias, str) or not is_number(bias) or not math.isfinite(bias)):
        raise ValueError(f'the bias of a gate must be a number or "auto", got {bias!r}.')


class RetentionGate(Float32Parameters, TokenScore):
    """One gate for all key/value heads of an attention layer.

    Its parameters and all it computes stay float32 in a model of half precision: near a bias of 18 bfloat16
    knows no step below 0.06, of a number whose distance from 0 is all that counts.

    Args:
        d_model: M, of the input of the attention layer (behind its norm).
        num_kv_heads: G.
        head_dim: D; of use for the kinds that read keys and values.
        width: R.
        activation: "silu", "gelu", "gelu_tanh" or "relu"; the one of the model's MLP.
        bias_init: first value of b; "auto" takes `automatic_bias(train_length)`, the paper takes 18.
        kind: "mlp" reads x; "mlp3" has a second hidden layer (arXiv 2605.09649); "kv" reads the rotated keys
            and the values of all heads instead of x; "kv_swiglu" does so with down(act(gate) * up).
        train_length: T of the texts the gates are to learn from.

    Raises:
        ValueError: an unknown kind or activation, a size below 1, or a bias that is no number.
    """

    def __init__(
        self,
        d_model: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        width: int = 512,
        activation: str = "silu",
        bias_init: float | str = "auto",
        kind: str = "mlp",
        train_length: int = 4096,
    ) -> None:
        super().__init__()
        check_gates(kind, activation, bias_init)
        self.kind, self.activation, self.width, self.train_length = kind, activation, width, train_length
        self.bias_init, self.num_kv_heads = bias_init, num_kv_heads
        self.reads = frozenset({"keys", "values"} if self.reads_keys else {"hidden"})
        check_positive(self, "width", "train_length", "num_kv_heads")
        size = 2 * num_kv_heads * head_dim if self.reads_keys else d_model
        is_gated = kind == "kv_swiglu"
        self.in_proj = nn.Linear(size, width, bias=not is_gated)
        self.up_proj = nn.Linear(size, width, bias=False) if is_gated else None
        self.hidden_proj = nn.Linear(width, width) if kind == "mlp3" else None
        self.out_proj = nn.Linear(width, num_kv_heads, bias=False)
        self.bias = undecayed(num_kv_heads)
        self.float32_parameters = tuple(name for name, _ in self.named_parameters())
        self.init_weights()

    @property
    def reads_keys(self) -> bool:
        """Whether keys and values are read instead of the hidden states."""
        return self.kind in ("kv", "kv_swiglu")

    @property
    def first_bias(self) -> float:
        """The value b begins with."""
        return automatic_bias(self.train_length) if isinstance(self.bias_init, str) else self.bias_init

    def init_weights(self) -> None:
        """Weights N(0, 0.02), biases 0, b as asked for."""
        for linear in self.projections():
            nn.init.normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.constant_(self.bias, self.first_bias)

    def projections(self) -> list[nn.Linear]:
        """Its linear maps, in order."""
        every = (self.in_proj, self.up_proj, self.hidden_proj, self.out_proj)
        return [linear for linear in every if linear is not None]

    def forward(self, x: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """Log-retentions (B, T, G).

        Args:
            x: (B, T, M).
            k, v: (B, T, G, D), keys behind the rotation; for the kinds that read them.

        Raises:
            ValueError: keys or values are missing.
        """
        if self.reads_keys:
            if k is None or v is None:
                raise ValueError(f"a gate of kind {self.kind!r} reads keys and values, got none.")
            x = torch.cat([k, v], -1).flatten(-2)  # (B, T, G 2 D), head after head
        act, wide = ACTIVATIONS[self.activation], torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device):
            x = x.to(wide)
            hidden = act(_linear(self.in_proj, x))  # (B, T, R)
            if self.up_proj is not None:
                hidden = hidden * _linear(self.up_proj, x)
            if self.hidden_proj is not None:
                hidden = act(_linear(self.hidden_proj, hidden))
            return F.logsigmoid(_linear(self.out_proj, hidden) + self.bias.to(wide))

    def score(
        self, x: Tensor, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None
    ) -> Tensor:
        """As in `TokenScore`: the g of each token, for which its age is still to be counted."""
        g: Tensor = self(x, k, v)
        return g

    def flops_per_token(self) -> int:
        """Matrix-product FLOPs of one token."""
        return sum(2 * linear.weight.numel() for linear in self.projections())

    def extra_repr(self) -> str:
        """What it does, for printing."""
        return f"kind={self.kind!r}, activation={self.activation!r}, bias_init={self.bias_init!r}"


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return F.linear(x, linear.weight.to(x.dtype), bias)
