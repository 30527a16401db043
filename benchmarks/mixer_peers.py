"""What `mixers.py` times beside the layers of this project."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Dimensions: B batch, T tokens, M model width


class Projections(nn.Module):
    """The linear maps of a layer without what lies between them: no layer with these weights can be faster.

    Args:
        layer: maps x (B, T, M) with its first linear layers, and what those give with one that ends at M.
    """

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        maps = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        self.into = nn.ModuleList(m for m in maps if m.in_features == width and m is not maps[-1])
        self.out = maps[-1]

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, M) to (B, T, M)."""
        inner = torch.cat([module(x) for module in self.into], -1)
        return self.out(inner[..., : self.out.in_features])


class _Peer(nn.Module):
    """A layer of transformers: called with (B, T, M) it returns (B, T, M)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        return out[0] if isinstance(out, tuple) else out


def _mamba(width: int, head_dim: int) -> nn.Module:
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    config = module.MambaConfig(hidden_size=width, num_hidden_layers=1, vocab_size=8)
    return _Peer(module.MambaMixer(config, layer_idx=0))


def _mamba2(width: int, head_dim: int) -> nn.Module:
    module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    config = module.Mamba2Config(
        hidden_size=width,
        num_heads=2 * width // head_dim,
        head_dim=head_dim,
        n_groups=1,
        num_hidden_layers=1,
        vocab_size=8,
    )
    return _Peer(module.Mamba2Mixer(config, layer_idx=0))


def _gated_delta_net(width: int, head_dim: int) -> nn.Module:
    module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    # its own function, also where flash-linear-attention is installed, which needs a GPU
    vars(module)["torch_chunk_gated_delta_rule"] = inspect.unwrap(module.torch_chunk_gated_delta_rule)
    heads = width // head_dim
    config = module.Qwen3NextConfig(
        hidden_size=width,
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=head_dim * 3 // 4,  # the paper's sizes, which are those of `gated_delta_net`
        linear_value_head_dim=head_dim * 3 // 2,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=8,
    )
    return _Peer(module.Qwen3NextGatedDeltaNet(config, layer_idx=0))


class _PlainFunction(nn.Module):
    """Projections around a plain function of flash-linear-attention."""

    def __init__(self, width: int, head_dim: int, key_dim: int, value_dim: int, *, is_delta: bool) -> None:
        super().__init__()
        self.num_heads, self.is_delta = width // head_dim, is_delta
        self.widths = [self.num_heads * size for size in (key_dim, key_dim, value_dim)]
        self.in_proj = nn.Linear(width, sum(self.widths) + 2 * self.num_heads * is_delta, bias=False)
        self.o_proj = nn.Linear(self.widths[2], width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, *gates = self.in_proj(x).split(self.widths + [self.num_heads] * (2 * self.is_delta), dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in (q, k, v))
        if self.is_delta:
            function = importlib.import_module("fla.ops.gated_delta_rule.naive").naive_chunk_gated_delta_rule
            g, beta = -F.softplus(gates[0].float()), gates[1].sigmoid()
            out, _ = function(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, g, beta)
        else:
            out = importlib.import_module("fla.ops.linear_attn.naive").naive_chunk_linear_attn(q, k, v)
        return self.o_proj(out.to(x.dtype).flatten(-2))


def _plain_linear(width: int, head_dim: int) -> nn.Module:
    importlib.import_module("fla.ops.linear_attn.naive")
    return _PlainFunction(width, head_dim, head_dim, head_dim, is_delta=False)


def _plain_delta(width: int, head_dim: int) -> nn.Module:
    importlib.import_module("fla.ops.gated_delta_rule.naive")
    return _PlainFunction(width, head_dim, head_dim * 3 // 4, head_dim * 3 // 2, is_delta=True)


PEERS: dict[str, Callable[[int, int], nn.Module]] = {
    "transformers Mamba": _mamba,
    "transformers Mamba-2": _mamba2,
    "transformers Gated DeltaNet": _gated_delta_net,
    "fla plain linear attention": _plain_linear,
    "fla plain gated delta rule": _plain_delta,
}
