"""What the C library does with memory that tensors on the CPU leave behind."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# options of mallopt(3) in glibc, and their defaults
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULTS = {_TRIM_THRESHOLD: 128 << 10, _MMAP_MAX: 65536}
_KEEP = {_TRIM_THRESHOLD: -1, _MMAP_MAX: 0}  # -1: never


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Inside, memory that is freed stays with the process for the next tensors.

    glibc hands every block above 32 MiB back to the system when it is freed, and the next tensor of that size
    pays for fresh pages: long sequences then take more time per token than short ones. The price of keeping
    them is a larger process. At the end the defaults of glibc hold again and what is free is handed back. It
    concerns the whole process; CUDA memory has an allocator of its own.

    Yields:
        whether it had an effect; False where the C library is not glibc.
    """
    library = ctypes.CDLL(None)
    if not (
        hasattr(library, "gnu_get_libc_version") and all(library.mallopt(*item) for item in _KEEP.items())
    ):
        yield False
        return
    try:
        yield True
    finally:
        for item in _DEFAULTS.items():
            library.mallopt(*item)
        library.malloc_trim(0)
