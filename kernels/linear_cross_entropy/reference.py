"""Losses of a linear head by the definition, position by position.

cross-entropy:  mean over labelled n of  log sum_v exp(z_nv) - z_n,target(n),   z_n = W h_n
divergence:     mean over n of  sum_v p_nv (log p_nv - log q_nv),   q_n = softmax(W h_n), p_n the teacher's
reversed:       mean over n of  sum_v q_nv (log q_nv - log p_nv)

Logits have the dtype of the product, as those of a plain model do; what follows is float32 or float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Dimensions: N positions, V vocabulary, M model width


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
) -> Tensor:
    """The definition of `memzoo.kernels.linear_cross_entropy` on checked arguments."""
    acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    # empty sums keep the result in the graph where no position is labelled
    total = hidden[:0].sum(dtype=acc) + weight[:0].sum(dtype=acc)
    labels = targets.tolist()
    for n, label in enumerate(labels):
        if label != ignore_index:
            scores = F.linear(hidden[n], weight).to(acc)  # (V,)
            total = total + scores.logsumexp(0) - scores[label]
    return total / max(1, sum(label != ignore_index for label in labels))


def linear_divergence_reference(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, reverse: bool
) -> Tensor:
    """The definition of `memzoo.kernels.linear_divergence` on checked arguments."""
    acc = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    width = min(weight.shape[0], teacher_weight.shape[0])
    total = hidden[:0].sum(dtype=acc) + weight[:0].sum(dtype=acc)
    for n in range(hidden.shape[0]):
        log_q = F.linear(hidden[n], weight[:width]).to(acc).log_softmax(0)  # (V,)
        teacher = F.linear(teacher_hidden[n].detach(), teacher_weight[:width].detach())
        log_p = teacher.to(acc).log_softmax(0)
        first, second = (log_q, log_p) if reverse else (log_p, log_q)
        total = total + (first.exp() * (first - second)).sum()
    return total / max(1, hidden.shape[0])
