"""The union softmax by the definition: one query at a time, over the list of everything it may see.

o = sum_r sum_j exp(s q_r . k_rj) v_rj / sum_r sum_j exp(s q_r . k_rj)   visible slots j of memories r
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .types import SlotStream, UnionOutput

# Dimensions: K tiles, C queries of a tile, H query heads, G key/value heads, R query heads of each, D key
# width, E value width, J slots


def union_reference(streams: Sequence[SlotStream], scale: float) -> UnionOutput:
    """The definition of `memzoo.kernels.union_attention` on checked arguments."""
    num_tiles, num_queries = streams[0].q.shape[:2]
    outputs, lses = [], []
    for tile in range(num_tiles):
        for query in range(num_queries):
            found = [_visible(stream, tile, query, scale) for stream in streams]
            logits = torch.cat([logits for logits, _ in found], dim=-1)  # (G, R, J)
            values = torch.cat([values for _, values in found])  # (J, G, E)
            probs = logits.softmax(-1) if logits.shape[-1] else logits
            output = torch.einsum("grj,jge->gre", probs, values)
            outputs.append(output.flatten(0, 1))
            lses.append(logits.logsumexp(-1).flatten())
    q, v = streams[0].q, streams[0].v
    if not outputs:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        shape = (num_tiles, num_queries, q.shape[2])
        return UnionOutput(q.new_zeros(*shape, v.shape[-1]), q.new_zeros(shape, dtype=wide))
    tiles = (num_tiles, num_queries)
    return UnionOutput(
        torch.stack(outputs).unflatten(0, tiles).to(q.dtype), torch.stack(lses).unflatten(0, tiles)
    )


def _visible(stream: SlotStream, tile: int, query: int, scale: float) -> tuple[Tensor, Tensor]:
    """Logits (G, R, J) of the slots that a query sees, and their values (J, G, E)."""
    slots = []
    for slot in range(stream.num_slots):
        is_filled = stream.place is None or int(stream.place[tile, slot]) >= 0
        is_begun = stream.first is None or int(stream.first[tile, slot]) <= query
        is_left = stream.last is None or query <= int(stream.last[tile, slot])
        if is_filled and is_begun and is_left:
            slots.append(slot)
    if stream.place is None:
        keys, values = stream.k[tile, slots], stream.v[tile, slots]
    else:
        places = stream.place[tile, slots]
        keys, values = stream.k[places], stream.v[places]
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    grouped = stream.q[tile, query].unflatten(0, (keys.shape[1], -1)).to(wide)  # (G, R, D)
    return torch.einsum("grd,jgd->grj", grouped, keys.to(wide)) * scale, values.to(wide)
