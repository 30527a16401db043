"""A linear state-space system in canonical form, to learn from (B'MOJO, arXiv 2407.06324, section 3.1).

    z_{t+1} = A z_t + b u_t,   y_t = c . z_t + d u_t,   A has ones above its diagonal and last row a, b = e_n

With a = 0 the system is nilpotent: z_t is the last n inputs, verbatim, and then they are gone. That is what
a window of attention reads from. With roots of l^n - sum_k a_k l^k inside the unit disc it fades: an input is
there for ever, less and less. Its modes l_k are those of a diagonal system such as Mamba's. B'MOJO has both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Dimensions: B batch, T tokens, n states


class CanonicalSSM(nn.Module):
    """A single-input, single-output system of order n, run step by step.

    Args:
        order: n.
        mode: "nilpotent", a = 0; or "companion", the last row is what `feedback` says.
        feedback: (n,) a_0 .. a_{n-1}, for "companion".

    Attributes:
        readout: (n,) c, at first the oldest state alone: y_t = u_{t-n} in a nilpotent system.
        skip: d, at first 0.

    Raises:
        ValueError: an order below 1, an unknown mode, or a feedback that does not fit them.
    """

    def __init__(self, order: int, mode: str = "nilpotent", feedback: Tensor | None = None) -> None:
        super().__init__()
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}.")
        if mode not in ("nilpotent", "companion"):
            raise ValueError(f"mode must be 'nilpotent' or 'companion', got {mode!r}.")
        if (feedback is not None) != (mode == "companion"):
            raise ValueError(f"mode {mode!r} {'needs' if feedback is None else 'takes no'} feedback.")
        if feedback is not None and tuple(feedback.shape) != (order,):
            raise ValueError(f"feedback must have shape ({order},), got {tuple(feedback.shape)}.")
        self.order = order
        dtype = torch.get_default_dtype() if feedback is None else feedback.dtype
        self.feedback = nn.Parameter(
            torch.zeros(order, dtype=dtype) if feedback is None else feedback.clone()
        )
        self.feedback.requires_grad_(mode == "companion")
        self.readout = nn.Parameter(torch.zeros(order, dtype=dtype).index_fill(0, torch.tensor(0), 1))
        self.skip = nn.Parameter(torch.zeros((), dtype=dtype))

    @classmethod
    def from_modes(cls, modes: Tensor) -> CanonicalSSM:
        """The companion system whose eigenvalues are `modes` (n,), complex ones in conjugate pairs.

        Raises:
            ValueError: modes whose polynomial is not real.
        """
        polynomial = torch.ones(1, dtype=torch.promote_types(modes.dtype, torch.complex64))
        for mode in modes.to(polynomial.dtype):  # of the product (l - mode), the lowest power first
            zero = polynomial.new_zeros(1)
            polynomial = torch.cat([zero, polynomial]) - mode * torch.cat([polynomial, zero])
        if float(polynomial.imag.abs().max()) > 1e-6:
            raise ValueError(f"complex modes must come in conjugate pairs, got {modes.tolist()}.")
        return cls(len(modes), "companion", -polynomial.real[:-1])

    def transition(self) -> Tensor:
        """A (n, n)."""
        shift = torch.diag(self.feedback.new_ones(self.order - 1), 1)
        return torch.cat([shift[:-1], self.feedback[None]])

    def forward(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs the system over inputs u (B, T) from a state z (B, n), zeros if None.

        Returns:
            y (B, T), and the states z_0 .. z_T (B, T + 1, n).
        """
        z = u.new_zeros(u.shape[0], self.order) if state is None else state
        states, outputs = [z], []
        for u_t in u.unbind(1):
            outputs.append(z @ self.readout + self.skip * u_t)
            newest = z @ self.feedback + u_t
            z = torch.cat([z[:, 1:], newest[:, None]], dim=1)
            states.append(z)
        return torch.stack(outputs, 1) if outputs else u, torch.stack(states, 1)
