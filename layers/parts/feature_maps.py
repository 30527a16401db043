"""Feature maps phi of linear attention: phi(q) . phi(k) stands in for exp(q . k / sqrt(d)).

A map turns heads (..., H, D) into features (..., H, K). Maps with weights are made once for queries and
once for keys. Features are computed in float32 (float64 for float64 input) and returned in the dtype of x.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.autograd import without_autocast
from ...kernels.taylor_attention import num_features, taylor_features
from ..contract import check_choice, suggest, tag_parameter

# Dimensions: H heads, D width of a raw head (d in formulas), K features, F width of a projection, G group

FEATURE_FLOOR = 1e-12  # keeps softmax features, and with them the normaliser, above zero (the LoLCATs code)


class FeatureMap(nn.Module):
    """Base of all maps: (..., H, D) -> (..., H, out_dim).

    Attributes:
        head_dim: D.
        out_dim: number of features K.
        is_positive: whether phi(q) . phi(k) can never be negative, so that a normaliser makes sense.
        scales_inside: whether the map contains the 1 / sqrt(d) of attention already.
    """

    is_positive: ClassVar[bool] = True
    scales_inside: ClassVar[bool] = False

    def __init__(self, head_dim: int, out_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.out_dim = out_dim

    @property
    def scale(self) -> float:
        """Factor on phi(q) when attending: 1 for maps that scale inside, else out_dim ** -0.5."""
        return 1.0 if self.scales_inside else self.out_dim**-0.5

    def init_weights(self) -> None:
        """Initialises the weights, if the map has any."""

    def num_flops(self, num_heads: int) -> int:
        """Matrix-product FLOPs of mapping `num_heads` heads of one token."""
        shared = sum(weight.numel() for weight in self.parameters() if weight.dim() == 2)
        per_head = sum(weight.numel() for weight in self.parameters() if weight.dim() == 3)
        return 2 * (num_heads * shared + per_head)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (..., H, D) to features (..., H, K)."""
        if x.shape[-1] != self.head_dim:
            raise ValueError(
                f"{type(self).__name__} was made for heads of width {self.head_dim}, got {tuple(x.shape)}. "
                "Build it with the width of the projected queries and keys."
            )
        wide = x if x.dtype == torch.float64 else x.float()
        with without_autocast(x.device):
            return self._features(wide).to(x.dtype)

    def _features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"head_dim={self.head_dim}, out_dim={self.out_dim}"


class DPFP(FeatureMap):
    """[r * roll(r, 1) | ... | r * roll(r, nu)] with r = [relu(x) | relu(-x)] (arXiv 2102.11174).

    K = 2 d nu. As in the paper; a public implementation negates the second half of r instead.
    """

    def __init__(self, head_dim: int, nu: int = 2) -> None:
        if not 1 <= nu < 2 * head_dim:
            raise ValueError(f"nu must lie between 1 and {2 * head_dim - 1} (2 head_dim - 1), got {nu}.")
        super().__init__(head_dim, 2 * head_dim * nu)
        self.nu = nu

    def _features(self, x: Tensor) -> Tensor:
        r = F.relu(torch.cat([x, -x], dim=-1))
        return torch.cat([r * r.roll(shift, dims=-1) for shift in range(1, self.nu + 1)], dim=-1)


class Elu1(FeatureMap):
    """elu(x) + 1 (Katharopoulos et al., arXiv 2006.16236). K = d."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, head_dim)

    def _features(self, x: Tensor) -> Tensor:
        return F.relu(x) + x.clamp(max=0).exp()  # in this form it never rounds to 0


class Hadamard(FeatureMap):
    """(W_1 x) * (W_2 x), K = feature_dim. May be negative, so it takes no normaliser."""

    is_positive = False

    def __init__(self, head_dim: int, feature_dim: int | None = None) -> None:
        super().__init__(head_dim, feature_dim or head_dim)
        self.left = nn.Linear(head_dim, self.out_dim, bias=False)
        self.right = nn.Linear(head_dim, self.out_dim, bias=False)

    def init_weights(self) -> None:
        """Glorot."""
        nn.init.xavier_uniform_(self.left.weight)
        nn.init.xavier_uniform_(self.right.weight)

    def _features(self, x: Tensor) -> Tensor:
        return _linear(x, self.left) * _linear(x, self.right)


class Hedgehog(FeatureMap):
    """One softmax over all of [y | -y], y = 2 (W x + b), as in flash-linear-attention. K = 2 d.

    One projection serves all heads. `HedgehogLolcats` is another map under the same name in the field.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, 2 * head_dim)
        self.proj = nn.Linear(head_dim, head_dim)
        tag_parameter(self.proj.bias, weight_decay=False)

    def init_weights(self) -> None:
        """Identity projection, no bias."""
        nn.init.zeros_(self.proj.weight)  # not eye_, which brings the compiler along on the meta device
        with torch.no_grad():
            self.proj.weight.diagonal().fill_(1)
        nn.init.zeros_(self.proj.bias)

    def _features(self, x: Tensor) -> Tensor:
        y = 2 * _linear(x, self.proj)
        return torch.cat([y, -y], dim=-1).softmax(dim=-1)


class HedgehogLolcats(FeatureMap):
    """[softmax(x W_h) | softmax(-x W_h)], weights per head, features at least 1e-12 (arXiv 2410.10254).

    K = 2 feature_dim. Input with fewer heads than the map (grouped keys) is mapped by each head of its group:
    (..., Hkv, D) -> (..., H, K).
    """

    def __init__(self, head_dim: int, num_heads: int, feature_dim: int | None = None) -> None:
        super().__init__(head_dim, 2 * (feature_dim or head_dim))
        self.num_heads = num_heads
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, self.out_dim // 2))  # W_h

    def init_weights(self) -> None:
        """Near the identity, so that similar queries and keys share features before any training."""
        nn.init.normal_(self.weight, std=0.02)
        with torch.no_grad():
            self.weight.diagonal(dim1=1, dim2=2).add_(1)

    def _features(self, x: Tensor) -> Tensor:
        if self.num_heads % x.shape[-2]:
            raise ValueError(
                f"the map has {self.num_heads} heads, which {x.shape[-2]} key heads do not divide. "
                "Build it with the number of query heads."
            )
        weight = self.weight.to(x.dtype).unflatten(0, (x.shape[-2], -1))  # (Hkv, G, D, F)
        y = torch.einsum("...hd,hgdf->...hgf", x, weight).flatten(-3, -2)
        return torch.cat([y.softmax(dim=-1), (-y).softmax(dim=-1)], dim=-1).clamp(min=FEATURE_FLOOR)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{super().extra_repr()}, num_heads={self.num_heads}"


class Identity(FeatureMap):
    """No map, K = d. May be negative, so it takes no normaliser."""

    is_positive = False

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, head_dim)

    def _features(self, x: Tensor) -> Tensor:
        return x


class L2Norm(FeatureMap):
    """x / sqrt(|x|^2 + 1e-6), K = d; zero stays zero. May be negative, so it takes no normaliser."""

    is_positive = False

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, head_dim)

    def _features(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class Rebased(FeatureMap):
    """Squares and products of y = LayerNorm(x) gamma + beta: (y_q . y_k)^2 / d (arXiv 2402.10644).

    K = d (d + 1) / 2: [y_i^2 / sqrt(d) | y_i y_j sqrt(2 / d), i < j].
    """

    scales_inside = True

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, head_dim * (head_dim + 1) // 2)
        self.gamma = tag_parameter(nn.Parameter(torch.ones(head_dim)), weight_decay=False)
        self.beta = tag_parameter(nn.Parameter(torch.zeros(head_dim)), weight_decay=False)

    def init_weights(self) -> None:
        """Affine part: ones and zeros."""
        nn.init.ones_(self.gamma)
        nn.init.zeros_(self.beta)

    def _features(self, x: Tensor) -> Tensor:
        d = self.head_dim
        y = F.layer_norm(x, (d,), self.gamma.to(x.dtype), self.beta.to(x.dtype), eps=1e-5)
        return torch.cat([y.square() / math.sqrt(d), _pairs(y) * math.sqrt(2 / d)], dim=-1)


class Relu(FeatureMap):
    """max(x, 0), K = d."""

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, head_dim)

    def _features(self, x: Tensor) -> Tensor:
        return F.relu(x)


class T2R(FeatureMap):
    """relu(W x + b), K = feature_dim (Kasai et al., arXiv 2103.13076)."""

    def __init__(self, head_dim: int, feature_dim: int | None = None) -> None:
        super().__init__(head_dim, feature_dim or head_dim)
        self.proj = nn.Linear(head_dim, self.out_dim)
        tag_parameter(self.proj.bias, weight_decay=False)

    def init_weights(self) -> None:
        """Glorot, no bias."""
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def _features(self, x: Tensor) -> Tensor:
        return F.relu(_linear(x, self.proj))


class Taylor(FeatureMap):
    """Taylor expansion of exp: phi(q) . phi(k) = 1 + u + u^2 / 2, u = q . k / sqrt(d) (arXiv 2402.18668).

    K = 1 + d + d^2: [1 | x / d^(1/4) | x_m x_n / sqrt(2 d), row-major], the layout of the paper's code.
    """

    scales_inside = True

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, num_features(head_dim, "expanded"))

    def _features(self, x: Tensor) -> Tensor:
        return taylor_features(x, "expanded")


class TaylorCompact(FeatureMap):
    """`Taylor` with each product once: the same inner product with half the state.

    K = 1 + d + d (d + 1) / 2: [1 | x / d^(1/4) | x_i^2 / sqrt(2 d) | x_i x_j / sqrt(d), i < j, row by row].
    """

    scales_inside = True

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, num_features(head_dim, "compact"))

    def _features(self, x: Tensor) -> Tensor:
        return taylor_features(x, "compact")


_MAPS: dict[str, type[FeatureMap]] = {
    "dpfp": DPFP,
    "elu1": Elu1,
    "hadamard": Hadamard,
    "hedgehog": Hedgehog,
    "hedgehog_lolcats": HedgehogLolcats,
    "identity": Identity,
    "l2_norm": L2Norm,
    "rebased": Rebased,
    "relu": Relu,
    "t2r": T2R,
    "taylor": Taylor,
    "taylor_compact": TaylorCompact,
}
_OPTIONS = {
    "dpfp": {"nu"},
    "hadamard": {"feature_dim"},
    "hedgehog_lolcats": {"feature_dim", "num_heads"},
    "t2r": {"feature_dim"},
}


def list_feature_maps() -> list[str]:
    """Names of all feature maps, sorted."""
    return sorted(_MAPS)


def make_feature_map(
    name: str,
    head_dim: int,
    *,
    feature_dim: int | None = None,
    num_heads: int | None = None,
    nu: int | None = None,
) -> FeatureMap:
    """Builds a feature map.

    Args:
        name: one of `list_feature_maps()`.
        head_dim: width of the heads that are mapped.
        feature_dim: width of the learned projection (t2r, hadamard, hedgehog_lolcats), default head_dim.
        num_heads: heads with weights of their own, needed by hedgehog_lolcats.
        nu: number of shifts of dpfp, default 2.

    Raises:
        ValueError: unknown name, a size below 1, an option the map does not have, or a missing `num_heads`.
    """
    check_choice("feature map", name, _MAPS)
    given = {"feature_dim": feature_dim, "num_heads": num_heads, "nu": nu}
    options = {key: value for key, value in given.items() if value is not None}
    for key, value in {"head_dim": head_dim, **options}.items():
        if value < 1:
            raise ValueError(f"{key} of a feature map must be at least 1, got {value}.")
    known = _OPTIONS.get(name, set())
    for key in options:
        if key not in known:
            advice = suggest(key, known) if known else "Leave it out."
            raise ValueError(f"feature map {name!r} has no option {key!r}. {advice}")
    if name == "hedgehog_lolcats" and num_heads is None:
        raise ValueError("feature map 'hedgehog_lolcats' has weights per head and needs num_heads.")
    feature_map = _MAPS[name](head_dim, **options)
    feature_map.init_weights()
    return feature_map


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


def _pairs(x: Tensor) -> Tensor:
    """x_i x_j for i < j, row by row: (..., D) -> (..., D (D - 1) / 2)."""
    first, second = torch.triu_indices(x.shape[-1], x.shape[-1], offset=1, device=x.device)
    return x[..., first] * x[..., second]
