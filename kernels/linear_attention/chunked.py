"""Linear attention in chunks: matmuls inside a chunk and one scan over the states between chunks.

With G_i the sum of log-decays in a chunk up to and including token i, S the state entering the chunk and A
its C x C
lower triangle (diagonal included):

    A_ij = (scale q_i . k_j) exp(G_i - G_j)        o_i = exp(G_i) (scale q_i) S + sum_j A_ij v_j
    S'   = exp(G_end) S + sum_j exp(G_end - G_j) k_j v_j^T

Every exponent is at most 0, and what lies above the diagonal is masked before the exponential.
"""

import torch
from torch import Tensor

from ..layout import ChunkLayout
from .types import LinearState

# Dimensions: B batch, T tokens, N sequences, H query heads, Hk key heads, HV value heads, G value heads per
# key head, R query heads per key head, K key width, V value width of a key head (grouped value heads lie side
# by side), X rows of heads, n chunks, C chunk length

_SCAN_BLOCK = 16


def linear_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    lengths: tuple[int, ...],
    *,
    is_packed: bool,
    normalize: bool,
    scale: float,
    eps: float,
    initial_state: LinearState | None,
    return_state: bool,
    chunk_size: int,
) -> tuple[Tensor, LinearState | None]:
    """Chunked form of `memzoo.kernels.linear_attention`; arguments are already checked."""
    dtype = q.dtype
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    batch_size, num_tokens, num_heads, _ = q.shape
    num_value_heads, num_key_heads = v.shape[2], k.shape[2]
    if g is not None and g.shape[2] != num_key_heads:
        repeats = num_value_heads // num_key_heads
        q, k = q.repeat_interleave(repeats, 2), k.repeat_interleave(repeats, 2)
        num_heads = num_key_heads = num_value_heads
    num_groups = num_value_heads // num_key_heads
    layout = ChunkLayout.make(lengths, max(1, min(chunk_size, max(lengths, default=1))))
    grid = _Grid(layout, is_packed, batch_size)

    q_grid = grid.rows(q.to(acc).unflatten(2, (num_key_heads, -1))) * scale  # (X, n, C, R, K)
    q_grid = q_grid.transpose(2, 3).flatten(2, 3)  # (X, n, R C, K)
    k_grid = grid.rows(k.to(acc))  # (X, n, C, K)
    v_grid = grid.rows(v.to(acc).unflatten(2, (num_key_heads, -1)).flatten(3))  # (X, n, C, V)
    g_grid = None if g is None else grid.rows(g.to(acc)).cumsum(-1)  # (X, n, C)
    num_repeats = num_heads // num_key_heads

    scores = q_grid @ k_grid.transpose(-1, -2)  # (X, n, R C, C)
    k_write, q_read, end = k_grid, q_grid, None
    if g_grid is None:
        causal = torch.ones(layout.chunk_size, layout.chunk_size, dtype=acc, device=q.device).tril()
        scores = (scores.unflatten(2, (num_repeats, -1)) * causal).flatten(2, 3)
    else:
        future = torch.ones(layout.chunk_size, layout.chunk_size, dtype=torch.bool, device=q.device).triu(1)
        decay = (
            (g_grid[..., :, None] - g_grid[..., None, :]).masked_fill(future, float("-inf")).exp()
        )  # (X, n, C, C)
        scores = (scores.unflatten(2, (num_repeats, -1)) * decay.unsqueeze(2)).flatten(2, 3)
        end = g_grid[..., -1]  # (X, n)
        k_write = k_grid * (end[..., None] - g_grid).exp()[..., None]
        q_read = q_grid * g_grid.exp()[:, :, None, :, None].expand(-1, -1, num_repeats, -1, -1).flatten(2, 3)
    output = scores @ v_grid  # (X, n, R C, V)

    memory = normalizer = None
    if initial_state is not None:
        memory = initial_state.memory.unflatten(1, (num_key_heads, num_groups))
        memory = memory.transpose(2, 3).flatten(3)  # (N, Hk, K, V)
        normalizer = initial_state.normalizer
    final_memory = final_normalizer = None
    if layout.total_chunks:
        writes = k_write.transpose(-1, -2) @ v_grid  # (X, n, K, V)
        entering, final_memory = grid.scan(writes, end, memory)
        output = output + q_read @ entering
    if normalize and layout.total_chunks:
        entering, final_normalizer = grid.scan(
            k_write.sum(2)[..., None], end, None if normalizer is None else normalizer[..., None]
        )
        weight = scores.sum(-1, keepdim=True) + q_read @ entering  # (X, n, R C, 1)
        output = torch.cat([output, weight], -1)
    result = grid.tokens(output.unflatten(2, (num_repeats, -1)))  # (L, Hk, R, V)
    if normalize and layout.total_chunks:
        result = result[..., :-1] / (result[..., -1:] + eps)
    out_heads = max(num_heads, num_value_heads)
    result = result.to(dtype).reshape(batch_size, num_tokens, out_heads, v.shape[3])
    if not return_state:
        return result, None
    if final_memory is None:
        final_memory = (
            memory
            if memory is not None
            else v_grid.new_zeros(len(lengths), num_key_heads, k.shape[3], num_groups * v.shape[3])
        )
    if normalize and final_normalizer is None:
        final_normalizer = (
            normalizer[..., None]
            if normalizer is not None
            else k_grid.new_zeros(len(lengths), num_key_heads, k.shape[3], 1)
        )
    final_memory = final_memory.unflatten(3, (num_groups, -1)).transpose(2, 3).flatten(1, 2)
    return result, LinearState(final_memory, None if final_normalizer is None else final_normalizer[..., 0])


class _Grid:
    """Tokens on a grid of chunks with heads in front, and the scan over the chunks of each sequence.

    Dense: X = B * Hk rows of n chunks, all sequences of one length. Packed: X = Hk rows that hold the chunks
        of all
    sequences one after the other.
    """

    def __init__(self, layout: ChunkLayout, is_packed: bool, batch_size: int):
        self.layout = layout
        self.is_packed = is_packed
        self.batch_size = 1 if is_packed else batch_size

    def rows(self, x: Tensor) -> Tensor:
        """(B, T, Hk, ...) -> (X, n, C, ...), empty slots 0."""
        chunks = self.layout.to_chunks(x.flatten(0, 1))  # (B n, C, Hk, ...)
        chunks = chunks.unflatten(0, (self.batch_size, -1) if self.batch_size else (0, 1))
        return chunks.movedim(3, 1).flatten(0, 1)

    def tokens(self, x: Tensor) -> Tensor:
        """(X, n, R, C, V) -> (L, Hk, R, V)."""
        chunks = x.unflatten(0, (self.batch_size, -1)).permute(0, 2, 4, 1, 3, 5)  # (B, n, C, Hk, R, V)
        return self.layout.from_chunks(chunks.flatten(0, 1))

    def scan(self, writes: Tensor, log_decay: Tensor | None, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """States S_{c+1} = exp(log_decay_c) S_c + writes_c along the chunks of each sequence.

        Args:
            writes: (X, n, K, V).
            log_decay: (X, n) or None for no decay.
            initial: (N, Hk, K, V) or None for zeros.

        Returns:
            The state entering each chunk (X, n, K, V) and the final state of each sequence (N, Hk, K, V).
        """
        if self.is_packed:
            return self._scan_packed(writes, log_decay, initial)
        first = (
            writes.new_zeros(writes.shape[0], 1, *writes.shape[2:])
            if initial is None
            else initial.flatten(0, 1)[:, None]
        )
        if log_decay is None:
            states = torch.cat([first, writes], 1).cumsum(1)
        else:
            states = _decayed_scan(writes, log_decay, first)
        return states[:, :-1], states[:, -1].unflatten(0, (self.batch_size, -1))

    def _scan_packed(
        self, writes: Tensor, log_decay: Tensor | None, initial: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # Step i takes the i-th chunk of every sequence that has one: sequences never meet in one sum.
        counts, starts = self.layout.num_chunks, self.layout.chunk_starts
        order = sorted(range(len(counts)), key=lambda n: -counts[n])
        index = torch.tensor(order, device=writes.device)
        inverse = torch.empty_like(index)
        inverse[index] = torch.arange(len(order), device=writes.device)
        shape = (len(counts), writes.shape[0], *writes.shape[2:])
        state = writes.new_zeros(shape) if initial is None else initial.index_select(0, index)
        by_step = [[starts[n] + i for n in order if counts[n] > i] for i in range(max(counts, default=0))]
        chunk_order = torch.tensor([c for step in by_step for c in step], device=writes.device)
        steps = writes.transpose(0, 1).index_select(0, chunk_order).split([len(step) for step in by_step])
        if log_decay is None:
            decays = None
        else:
            ordered = log_decay.exp().transpose(0, 1)[..., None, None].index_select(0, chunk_order)
            decays = ordered.split([len(step) for step in by_step])
        entering, done = [], []
        for i, write in enumerate(steps):
            if write.shape[0] < state.shape[0]:
                done.append(state[write.shape[0] :])
                state = state[: write.shape[0]]
            entering.append(state)
            state = (state if decays is None else state * decays[i]) + write
        final = torch.cat([state, *reversed(done)]).index_select(0, inverse)
        back = torch.empty_like(chunk_order)
        back[chunk_order] = torch.arange(len(chunk_order), device=writes.device)
        return torch.cat(entering).index_select(0, back).transpose(0, 1), final


def _decayed_scan(writes: Tensor, log_decay: Tensor, first: Tensor) -> Tensor:
    """States before each chunk and after the last, (X, n + 1, K, V), from first (X, 1, K, V)."""
    states = [first]
    for write, decay in zip(writes.unbind(1), log_decay.exp().unbind(1), strict=True):
        states.append(states[-1] * decay[:, None, None, None] + write[:, None])
    return torch.cat(states, 1)
