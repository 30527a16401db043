"""The way to and from the field's own kernels, with stand-ins that do the same on the CPU.

What a stand-in cannot show, the kernels themselves, is left to the check on a GPU.
"""

import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from memzoo.kernels import (
    KVPrefix,
    LinearState,
    SlotState,
    attention,
    gated_slot_attention,
    linear_attention,
    selective_scan,
)
from memzoo.kernels.attention.external import attention_flash_attn, can_run_flash_attn
from memzoo.kernels.gated_slot_attention.external import gated_slot_attention_fla
from memzoo.kernels.linear_attention.external import can_run_fla, linear_attention_fla
from memzoo.kernels.selective_scan.external import can_run_mamba_ssm, selective_scan_mamba_ssm
from memzoo.testing import assert_close


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, window_size: tuple[int, int]
) -> Tensor:
    """(B, T, H, D) against (B, S, Hkv, D), aligned at the end: what flash-attn documents."""
    assert causal
    distance = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
    visible = distance >= 0
    if window_size != (-1, -1):
        assert window_size[1] == 0
        visible &= distance <= window_size[0]
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * softmax_scale
    return torch.einsum("bhij,bjhe->bihe", logits.masked_fill(~visible, -torch.inf).softmax(-1), v)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: object,
) -> Tensor:
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    starts = [x.tolist() for x in (cu_seqlens_q, cu_seqlens_k)]
    assert starts[0][-1] == len(q)
    assert starts[1][-1] == len(k)
    outputs = []
    for n in range(len(cu_seqlens_q) - 1):
        (q0, q1), (k0, k1) = ((s[n], s[n + 1]) for s in starts)
        assert q1 - q0 <= max_seqlen_q
        assert k1 - k0 <= max_seqlen_k
        outputs.append(flash_attn_func(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], **options)[0])
    return torch.cat(outputs)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def heads(rows: int, num_tokens: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, num_tokens, n, 4, generator=generator, dtype=torch.float64) for n in (4, 2, 2)]


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize("window_size", [None, 3])
@pytest.mark.parametrize("seen", [None, [5, 5], [2, 5], [0, 0]])
@pytest.mark.parametrize("lengths", [None, (4, 0, 7)])
def test_flash_attn_gets_the_right_keys(
    window_size: int | None, seen: list[int] | None, lengths: tuple[int, ...] | None
) -> None:
    is_packed = lengths is not None
    q, k, v = heads(1 if is_packed else 2, 11)
    counts = (11, 11) if lengths is None else lengths
    cu_seqlens = torch.tensor([0, *counts]).cumsum(0) if is_packed else None
    prefix = None
    if seen is not None:
        seen = [*seen, 3] if is_packed else seen
        _, past_k, past_v = heads(len(counts), 6, seed=1)
        prefix = KVPrefix(past_k, past_v, torch.tensor(seen))
    output = attention_flash_attn(
        q, k, v, counts, window_size=window_size, prefix=prefix, is_packed=is_packed, scale=0.4
    )
    expected = attention(
        q, k, v, window_size=window_size, prefix=prefix, cu_seqlens=cu_seqlens, scale=0.4, backend="reference"
    ).output
    assert_close("output", output, expected, 1e-12)


def stand_in(rule: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """One of flash-linear-attention's chunked functions, by its documented arguments."""

    def kernel(
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        initial_state: Tensor | None,
        output_final_state: bool,
        cu_seqlens: Tensor | None,
        **given: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        assert q.shape[2] == k.shape[2] == v.shape[2]
        assert q.dtype == k.dtype == v.dtype
        output, state = linear_attention(
            q,
            k,
            v,
            **given,
            rule=rule,
            scale=scale,
            initial_state=None if initial_state is None else LinearState(initial_state),
            return_state=output_final_state,
            cu_seqlens=cu_seqlens,
            backend="reference",
        )
        return output, None if state is None else state.memory

    return kernel


# Each: module, function, rule, rank of the log-decay (0 for none).
FLA = [
    ("simple_gla", "chunk_simple_gla", "additive", 0),
    ("simple_gla", "chunk_simple_gla", "additive", 3),
    ("gla", "chunk_gla", "additive", 4),
    ("delta_rule", "chunk_delta_rule", "delta", 0),
    ("gated_delta_rule", "chunk_gated_delta_rule", "delta", 3),
    ("kda", "chunk_kda", "delta", 4),
]


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_beta", [False, True])
@pytest.mark.parametrize(("module_name", "name", "rule", "rank"), FLA)
def test_fla_gets_the_whole_call(
    monkeypatch: pytest.MonkeyPatch,
    module_name: str,
    name: str,
    rule: str,
    rank: int,
    with_beta: bool,
    packed: bool,
    with_state: bool,
) -> None:
    module = types.ModuleType(f"fla.ops.{module_name}")
    setattr(module, name, stand_in(rule))
    for parent in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, f"fla.ops.{module_name}", module)
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1 if packed else 2, 9, 2, 4, generator=generator) for _ in range(2))
    v = torch.randn(*q.shape[:2], 4, 3, generator=generator)
    g = {3: -torch.rand(*q.shape[:3], generator=generator), 4: -torch.rand(q.shape, generator=generator)}
    beta = torch.rand(v.shape[:3], generator=generator) if with_beta else None
    state = LinearState(torch.randn(2, 4, 4, 3, generator=generator)) if with_state else None
    cu_seqlens = torch.tensor([0, 5, 9]) if packed else None
    options = {"rule": rule, "scale": 0.3, "initial_state": state, "cu_seqlens": cu_seqlens}
    output, final = linear_attention_fla(q, k, v, g.get(rank), beta, return_state=True, **options)
    expected, expected_final = linear_attention(
        q, k, v, g=g.get(rank), beta=beta, return_state=True, backend="torch", **options
    )
    assert_close("output", output, expected, 1e-5)
    assert_close("memory", final.memory, expected_final.memory, 1e-5)
    without, nothing = linear_attention_fla(q, k, v, g.get(rank), beta, return_state=False, **options)
    assert torch.equal(without, output)
    assert nothing is None


def chunk_gsa(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor,
    scale: float,
    initial_state: tuple[Tensor, Tensor] | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    output, state = gated_slot_attention(
        q,
        k,
        v,
        g,
        slots=s,
        scale=scale,
        initial_state=None if initial_state is None else SlotState(*initial_state),
        return_state=output_final_state,
        cu_seqlens=cu_seqlens,
        backend="reference",
    )
    return output, None if state is None else tuple(state)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_fla_gets_the_slots(monkeypatch: pytest.MonkeyPatch, packed: bool, with_state: bool) -> None:
    module = types.ModuleType("fla.ops.gsa")
    module.chunk_gsa = chunk_gsa
    for parent in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, "fla.ops.gsa", module)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1 if packed else 2, 9, 2, n, generator=generator) for n in (4, 4, 3))
    g = -torch.rand(*q.shape[:3], 5, generator=generator)
    slots = torch.rand(g.shape, generator=generator)
    shapes = ((2, 2, 4, 5), (2, 2, 5, 3))
    state = SlotState(*(torch.randn(s, generator=generator) for s in shapes)) if with_state else None
    cu_seqlens = torch.tensor([0, 5, 9]) if packed else None
    options = {"scale": 0.3, "initial_state": state, "cu_seqlens": cu_seqlens, "return_state": True}
    output, final = gated_slot_attention_fla(q, k, v, slots, g, **options)
    expected, expected_final = gated_slot_attention(q, k, v, g, slots=slots, backend="torch", **options)
    assert_close("output", output, expected, 1e-5)
    for name in ("keys", "values"):
        assert_close(name, getattr(final, name), getattr(expected_final, name), 1e-5)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """(B, D, T) and (B, G, N, T): what mamba_ssm documents."""
    y, state = selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        *(x if x.dim() == 2 else x.permute(0, 3, 1, 2) for x in (B, C)),
        D=D,
        z=None if z is None else z.transpose(1, 2),
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        return_state=True,
        backend="reference",
    )
    return (y.transpose(1, 2), state) if return_last_state else y.transpose(1, 2)


@pytest.mark.parametrize("is_constant", [False, True])
def test_mamba_ssm_gets_the_whole_call(monkeypatch: pytest.MonkeyPatch, is_constant: bool) -> None:
    module = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = selective_scan_fn
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", module)
    generator = torch.Generator().manual_seed(3)
    x, delta, z = (torch.randn(2, 7, 4, generator=generator) for _ in range(3))
    B, C = (torch.randn(2, 7, 2, 3, generator=generator) for _ in range(2))
    A = -torch.rand(4, 3, generator=generator)
    B = torch.randn(4, 3, generator=generator) if is_constant else B
    D, bias = (torch.randn(4, generator=generator) for _ in range(2))
    for skip, gate in ((D, z), (None, None)):
        y, state = selective_scan_mamba_ssm(
            x, delta, A, B, C, skip, gate, bias, delta_softplus=True, return_state=True
        )
        options = {"D": skip, "z": gate, "delta_bias": bias, "delta_softplus": True}
        expected, expected_state = selective_scan(x, delta, A, B, C, **options, return_state=True)
        assert_close("y", y, expected, 1e-5)
        assert_close("state", state, expected_state, 1e-5)
        without, nothing = selective_scan_mamba_ssm(
            x, delta, A, B, C, skip, gate, bias, delta_softplus=True, return_state=False
        )
        assert torch.equal(without, y)
        assert nothing is None


def test_none_takes_tensors_of_the_cpu() -> None:
    q, _, v = (x.bfloat16() for x in heads(1, 4))
    assert not can_run_flash_attn(q, v)
    assert not can_run_fla(q, q, q, normalize=False)
    assert not can_run_mamba_ssm(q[..., 0], torch.zeros(4, 3), has_state=False, is_packed=False)


class OnCuda(torch.Tensor):
    """A tensor that says it is on CUDA."""

    is_cuda = True


def test_each_takes_what_it_covers() -> None:
    q, k, v = (x.bfloat16().as_subclass(OnCuda) for x in heads(1, 4))
    assert can_run_flash_attn(q, v)
    assert not can_run_flash_attn(q.float(), v.float())
    assert not can_run_flash_attn(q, v[..., :3])
    assert not can_run_flash_attn(q[:, :0], v[:, :0])
    assert can_run_fla(k, k, v, normalize=False)
    assert not can_run_fla(k, k, v, normalize=True)
    assert not can_run_fla(q, k, v, normalize=False)
    assert not can_run_fla(k.float(), k.float(), v.float(), normalize=False)
    x, A = torch.zeros(1, 4, 3).as_subclass(OnCuda), torch.zeros(3, 2)
    assert can_run_mamba_ssm(x, A, has_state=False, is_packed=False)
    assert not can_run_mamba_ssm(x, A, has_state=True, is_packed=False)
    assert not can_run_mamba_ssm(x, A, has_state=False, is_packed=True)
    assert not can_run_mamba_ssm(x.double(), A, has_state=False, is_packed=False)
    assert not can_run_mamba_ssm(x[:, :0], A, has_state=False, is_packed=False)
    assert not can_run_mamba_ssm(x, torch.zeros(3, 300), has_state=False, is_packed=False)
