"""Decayed attention by the definition: one query at a time, over all keys up to its own.

s_ti = scale q_t . k_i + (t - i) g_i,   or   scale q_t . k_i + sum_{j=i+1..t} g_j,   or the product times
exp((t - i) g_i)
"""

import torch
from torch import Tensor

from .types import DecayPrefix

# Dimensions: B batch, T tokens, N sequences, J keys, H query heads, G query heads per key head, D key
# width, E value width


def decayed_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    lengths: tuple[int, ...],
    *,
    form: str,
    prefix: DecayPrefix | None,
    scale: float,
) -> Tensor:
    """The definition of `memzoo.kernels.decayed_attention` on checked arguments."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    num_kv_heads = k.shape[2]
    rows = [x.flatten(0, 1).split(list(lengths)) for x in (q, k, v, log_decay)]
    outputs = []
    for n, (queries, keys, values, decays) in enumerate(zip(*rows, strict=True)):
        seen = 0
        if prefix is not None:
            seen = int(prefix.num_seen[n])
            first = prefix.k.shape[1] - seen
            past = (prefix.k[n, first:], prefix.v[n, first:], prefix.log_decay[n, first:])
            keys, values, decays = (
                torch.cat([a, b]) for a, b in zip(past, (keys, values, decays), strict=True)
            )
        for t in range(len(queries)):
            place = seen + t
            g = decays[: place + 1].T  # (Hkv, J), or (H, J) for "sum"
            if form == "sum":
                own = torch.zeros_like(g[:, :1])
                bias = torch.cat([g[:, 1:].flip(1).cumsum(1).flip(1), own], 1)  # (H, J)
            else:
                age = torch.arange(place, -1, -1, device=g.device, dtype=acc)
                bias = age * g  # (Hkv, J)
            bias = bias.unflatten(0, (num_kv_heads, -1))  # (Hkv, 1 or G, J)
            grouped = queries[t].to(acc).unflatten(0, (num_kv_heads, -1))  # (Hkv, G, D)
            logits = torch.einsum("hgd,jhd->hgj", grouped, keys[: place + 1].to(acc)) * scale
            logits = logits * bias.exp() if form == "scaled" else logits + bias
            read = torch.einsum("hgj,jhe->hge", logits.softmax(-1), values[: place + 1].to(acc))
            outputs.append(read.flatten(0, 1))
    if not outputs:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    return torch.stack(outputs).to(q.dtype).reshape(*q.shape[:3], -1)
