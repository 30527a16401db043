"""Selective scan by mamba_ssm, on CUDA."""

import torch
from torch import Tensor

# Dimensions: B batch, T tokens, D channels, N state per channel, G groups of channels

_MAX_STATE = 256


def can_run_mamba_ssm(x: Tensor, A: Tensor, has_state: bool, is_packed: bool) -> bool:
    """Whether the kernel of mamba_ssm covers these tensors: it takes neither states nor packed rows."""
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and not has_state
        and not is_packed
        and x.shape[1] > 0
        and A.shape[1] <= _MAX_STATE
    )


def selective_scan_mamba_ssm(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    *,
    delta_softplus: bool,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Selective scan, channels first there. Untested until a GPU record agrees with the reference."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    write, read = (t.float() if t.dim() == 2 else t.permute(0, 2, 3, 1).contiguous() for t in (B, C))
    result = selective_scan_fn(
        x.transpose(1, 2).contiguous(),  # (B, D, T)
        delta.to(x.dtype).transpose(1, 2).contiguous(),
        A.float(),
        write,  # (B, G, N, T)
        read,
        D=None if D is None else D.float(),
        z=None if z is None else z.transpose(1, 2).contiguous(),
        delta_bias=None if delta_bias is None else delta_bias.float(),
        delta_softplus=delta_softplus,
        return_last_state=return_state,
    )
    y, state = result if return_state else (result, None)
    return y.transpose(1, 2), None if state is None else state.float()
