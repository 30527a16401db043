"""Other learned scores of tokens, beside `RetentionGate`: one number per token and key/value head, once.

All are modules with `score(x, q, k, v) -> (B, T, G)`, the higher the more worth keeping; each says in `reads`
which of these it looks at. A cache keeps the best of them. Scores are float32 (float64 for float64 input).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.autograd import without_autocast
from .norm import RMSNorm
from .state_space import Float32Parameters, undecayed

# Dimensions: B batch, T tokens, H query heads, G key/value heads, D head width, M model width, R rank

_SMOOTHNESS = 0.0025  # of Locret's second loss


class TokenScore(nn.Module):
    """Base of the scores.

    Class attributes:
        reads: of "hidden", "queries", "keys", "values" those that matter; others may be None.
        before_rotation: queries and keys are wanted as they are before rotary positions.
    """

    reads: frozenset[str] = frozenset({"hidden"})
    before_rotation: bool = False

    def score(
        self, x: Tensor, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None
    ) -> Tensor:
        """(B, T, G) from x (B, T, M), q (B, T, H, D), k and v (B, T, G, D)."""
        raise NotImplementedError


class LocretScore(TokenScore):
    """z = W2 silu(W1 [q, k, v]) on unrotated heads (Locret, arXiv 2410.01805).

    Args:
        num_heads, num_kv_heads, head_dim: H, G and D.
        width: of the hidden layer.
    """

    reads = frozenset({"queries", "keys", "values"})
    before_rotation = True

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, width: int = 1024) -> None:
        super().__init__()
        self.in_proj = nn.Linear((num_heads + 2 * num_kv_heads) * head_dim, width, bias=False)
        self.out_proj = nn.Linear(width, num_kv_heads, bias=False)

    def score(
        self, x: Tensor, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None
    ) -> Tensor:
        """As in `TokenScore`.

        Raises:
            ValueError: queries, keys or values are missing.
        """
        if q is None or k is None or v is None:
            raise ValueError("LocretScore reads queries, keys and values before the rotation, got not all.")
        read = torch.cat([part.flatten(-2) for part in (q, k, v)], -1)
        return _wide(self.out_proj(F.silu(self.in_proj(read))))


def locret_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Smooth absolute error, and 0.0025 times the mean squared difference of neighbours.

    Args:
        scores: (B, T, G).
        targets: (B, T, G), the largest attention that any later query of interest pays to the token.
    """
    fit = F.smooth_l1_loss(scores, targets)
    if scores.shape[1] < 2:
        return fit
    return fit + _SMOOTHNESS * F.mse_loss(scores[:, 1:], scores[:, :-1])


class FastKVzipScore(TokenScore):
    """Attention of each token to itself against learned sinks, of low rank (Fast KVzip, arXiv 2601.17668).

        a = norm(W_k x) . norm(W_q x + b_q) / sqrt(R) + b,   z_s = sink_s . norm(W_q x + b_q) / sqrt(R)
        score = mean over the query heads of a group of 1 / (1 + sum_s exp(z_s - a))

    Args:
        d_model: M.
        num_heads, num_kv_heads: H and G, H a multiple of G.
        rank: R.
        num_sinks: sinks of each key/value head.
    """

    def __init__(
        self, d_model: int, num_heads: int, num_kv_heads: int, rank: int = 16, num_sinks: int = 16
    ) -> None:
        super().__init__()
        self.num_kv_heads, self.rank = num_kv_heads, rank
        self.q_proj = nn.Linear(d_model, num_heads * rank)
        self.k_proj = nn.Linear(d_model, num_kv_heads * rank, bias=False)
        self.q_norm, self.k_norm = RMSNorm(rank, 1e-6), RMSNorm(rank, 1e-6)
        self.sinks = nn.Parameter(torch.randn(num_kv_heads, num_sinks, rank))
        self.bias = nn.Parameter(torch.zeros(num_kv_heads, num_heads // num_kv_heads))

    def score(
        self, x: Tensor, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None
    ) -> Tensor:
        """As in `TokenScore`; between 0 and 1."""
        shape = (self.num_kv_heads, -1, self.rank)
        queries = _wide(self.q_norm(self.q_proj(x).unflatten(-1, shape)))  # (B, T, G, H / G, R)
        keys = _wide(self.k_norm(self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.rank))))
        scale = self.rank**-0.5
        with without_autocast(x.device):
            own = (queries * keys[..., None, :]).sum(-1) * scale + self.bias.to(queries.dtype)
            away = torch.einsum("btghr,gsr->btghs", queries, self.sinks.to(queries.dtype)) * scale
            return torch.sigmoid(own - away.logsumexp(-1)).mean(-1)


class KVzapScore(TokenScore):
    """A linear map or a small MLP with GELU to the log of a score, for a threshold (KVzap, arXiv 2601.07891).

    Args:
        d_model: M.
        num_kv_heads: G.
        width: of a hidden layer; None for a linear map.
    """

    def __init__(self, d_model: int, num_kv_heads: int, width: int | None = None) -> None:
        super().__init__()
        self.in_proj = None if width is None else nn.Linear(d_model, width)
        self.out_proj = nn.Linear(d_model if width is None else width, num_kv_heads)

    def score(
        self, x: Tensor, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None
    ) -> Tensor:
        """As in `TokenScore`; a log, to be regressed on that of KVzip's scores."""
        return _wide(self.out_proj(x if self.in_proj is None else F.gelu(self.in_proj(x))))


class DMSScore(Float32Parameters, TokenScore):
    """The logit of leaving, w . norm(x) * scale - offset, negated (Dynamic Memory Sparsification, DMS, arXiv
    2506.05345).

    w begins at 0: at first nothing leaves.

    Args:
        d_model: M.
        num_kv_heads: G.
        scale, offset: of the logit. How large they are is not published; the defaults are our choice.
    """

    float32_parameters = ("weight",)

    def __init__(self, d_model: int, num_kv_heads: int, scale: float = 1.0, offset: float = 5.0) -> None:
        super().__init__()
        self.scale, self.offset = scale, offset
        self.norm = RMSNorm(d_model, 1e-6)
        self.weight = undecayed(num_kv_heads, d_model)
        nn.init.zeros_(self.weight)

    def logits(self, x: Tensor) -> Tensor:
        """(B, T, G): above 0 the token is to leave once it is outside the window. x is the raw residual."""
        normed = _wide(self.norm(x))
        with without_autocast(x.device):
            return F.linear(normed, self.weight.to(normed.dtype)) * self.scale - self.offset

    def score(
        self, x: Tensor, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None
    ) -> Tensor:
        """As in `TokenScore`; tokens below 0 leave."""
        return -self.logits(x)


def dms_decisions(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Whether tokens leave, drawn for training: 0 or 1, with the gradient of the share that would.

    Args:
        logits: (B, T, G), of `DMSScore.logits`.
        temperature: tau of sigmoid((logit + noise) / tau); the noise is the difference of two Gumbel draws.
        generator: of the noise.
    """
    drawn = torch.rand(logits.shape, generator=generator, dtype=torch.float64).to(logits.device)
    noise = torch.logit(drawn, eps=1e-12).to(logits.dtype)
    share = torch.sigmoid((logits + noise) / temperature)
    return (share > 0.5).to(share.dtype) + share - share.detach()


def dms_loss(decisions: Tensor, step: int, num_steps: int, final_ratio: float) -> Tensor:
    """max(0, target - mean decision): the target share to leave is 1 - 1 / CR, CR from 1 to `final_ratio`.

    The form of this loss is our choice; the compression ratio CR rises linearly as published.
    """
    ratio = 1 + (final_ratio - 1) * min(1.0, step / max(1, num_steps))
    return (1 - 1 / ratio - decisions.mean()).clamp(min=0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
