"""Which implementation of an operation runs, and how a caller chooses.

Every operation has a `reference` (the definition: a plain loop) and a `torch` implementation that runs
anywhere. On CUDA the field's own kernels take over where they can be imported and where they cover the call.
They are marked *untested until a GPU record agrees* in the operation that calls them.
"""

import difflib
import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

logger = logging.getLogger(__name__)

# Backends per operation, slowest and most trusted first.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "attention": ("reference", "torch", "sdpa", "flash_attn"),
    "causal_conv": ("reference", "torch"),
    "decayed_attention": ("reference", "torch"),
    "decode_attention": ("reference", "torch"),
    "fast_weight_scan": ("reference", "torch", "triton"),
    "gated_rms_norm": ("reference", "torch"),
    "gated_slot_attention": ("reference", "torch", "fla"),
    "linear_attention": ("reference", "torch", "fla"),
    "linear_cross_entropy": ("reference", "torch"),
    "linear_divergence": ("reference", "torch"),
    "mlstm": ("reference", "torch"),
    "selective_scan": ("reference", "torch", "mamba_ssm"),
    "soft_cache_size": ("reference", "torch", "triton"),
    "taylor_attention": ("reference", "torch", "triton"),
    "titans": ("reference", "torch"),
    "ttt": ("reference", "torch"),
    "union_attention": ("reference", "torch", "triton"),
}
_EXTERNAL_MODULES = {
    "flash_attn": "flash_attn",
    "fla": "fla.ops.simple_gla",
    "mamba_ssm": "mamba_ssm.ops.selective_scan_interface",
    "triton": "triton",
}
# Whether Triton's kernels run on the CPU, in its interpreter; has to be set before Triton is imported.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_forced: list[str] = []
_logged: set[tuple[str, str]] = set()


@cache
def _imports(module: str) -> bool:
    """Whether `module` can really be imported: an installed but broken package must count as absent."""
    try:
        importlib.import_module(module)
    except (ImportError, RuntimeError):
        return False
    return True


def _usable(backend: str) -> bool:
    module = _EXTERNAL_MODULES.get(backend)
    if module is None:
        return True
    has_device = torch.cuda.is_available() or (backend == "triton" and TRITON_INTERPRETED)
    return has_device and _imports(module)


def _suggest(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}? " if near else ""


def available_backends(op: str) -> tuple[str, ...]:
    """Backends of one operation that this machine can run.

    Args:
        op: name of an operation, a key of `OPERATIONS`.

    Returns:
        Names, "reference" first. External kernels are listed only when they import and CUDA is available.

    Raises:
        ValueError: unknown operation.
    """
    if op not in OPERATIONS:
        known = tuple(OPERATIONS)
        raise ValueError(
            f"unknown operation {op!r}. {_suggest(op, known)}Known operations: {', '.join(known)}."
        )
    return tuple(name for name in OPERATIONS[op] if _usable(name))


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Prefer one backend for every kernel called inside the block.

    Calls that this backend does not cover choose for themselves. An explicit `backend=` argument wins over
    the block.

    Args:
        name: "auto", "reference", "torch", "sdpa", "flash_attn", "fla", "mamba_ssm" or "triton".

    Raises:
        ValueError: no operation has a backend of this name, or it cannot run on this machine.
    """
    known = tuple(dict.fromkeys(n for names in OPERATIONS.values() for n in names))
    if name != "auto" and name not in known:
        raise ValueError(
            f"unknown backend {name!r}. {_suggest(name, known)}Known backends: auto, {', '.join(known)}."
        )
    _require_usable(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def choose_backend(op: str, requested: str, eligible: tuple[str, ...]) -> str:
    """Resolve the backend of one call and log the first use of each choice at INFO.

    Args:
        op: name of the operation.
        requested: the caller's `backend=` argument.
        eligible: backends that can do this very call, the preferred one first. "reference" always can.

    Raises:
        ValueError: the operation has no such backend, or it cannot run on this machine, or not this call.
    """
    names = OPERATIONS[op]
    if requested != "auto":
        if requested not in names:
            raise ValueError(
                f"backend={requested!r} is not a backend of {op}. {_suggest(requested, names)}"
                f"Use one of: auto, {', '.join(names)}."
            )
        _require_usable(requested)
        if requested not in (*eligible, "reference"):
            raise ValueError(
                f"backend={requested!r} of {op} does not cover this call. Use one of: auto, reference, "
                f"{', '.join(eligible)}."
            )
        choice = requested
    elif _forced and _forced[-1] in (*eligible, "reference"):
        choice = _forced[-1]
    else:
        choice = next(name for name in eligible if _usable(name))
    if not torch.compiler.is_compiling() and (op, choice) not in _logged:
        _logged.add((op, choice))
        logger.info("%s runs on backend %r", op, choice)
    return choice


def _require_usable(name: str) -> None:
    if name != "auto" and not _usable(name):
        raise ValueError(
            f"backend {name!r} needs CUDA and the package {_EXTERNAL_MODULES[name].split('.')[0]!r}, which "
            "cannot be used "
            'here. Install it on a CUDA machine with pip install "memzoo[cuda]", or use backend="torch".'
        )
