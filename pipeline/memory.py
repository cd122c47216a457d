"""The C library's heap under an engine in this process, kept from growing with the length of a
build.

A CPU engine allocates and frees a few tensors of 1 to 200 MiB for every prompt: rows of logits over
the whole vocabulary. glibc maps large blocks apart from its heap and gives them back at once, but
each one that is freed raises the size that counts as large, up to 32 MiB. From then on smaller
tensors, as many sizes as there are lengths of prompts, go to the heap, where what is kept for
longer soon lies between them: it never stops growing. A size set by hand stays as it is.

Arrow's buffers go the same way, since the allocator it comes with keeps what it has had.

A block that is mapped apart is new to the kernel every time, a fault for each page of 4 KiB, which
costs more than the heap did; pages of 2 MiB, which torch asks for where it is told to, make it cost
less.
"""

from __future__ import annotations

import ctypes
import os

import pyarrow as pa

MMAP_THRESHOLD = 1 << 20
"""Bytes from which a block is mapped apart."""

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_USERS_OWN = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def use_huge_pages() -> None:
    """Has torch ask for pages of 2 MiB under its large CPU tensors. Counts only before torch
    makes its first tensor.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def map_large_blocks() -> None:
    """Fixes the size from which this process maps blocks apart, unless the user has tuned glibc
    or this is another C library.
    """
    if any(name in os.environ for name in _USERS_OWN):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        # Raised along with the other: what may stay free at the heap's end.
        mallopt(_M_TRIM_THRESHOLD, 2 * MMAP_THRESHOLD)
        if "ARROW_DEFAULT_MEMORY_POOL" not in os.environ:
            pa.set_memory_pool(pa.system_memory_pool())


def give_back() -> None:
    """Gives the kernel the pages that are free inside the heap, too: left alone, glibc gives
    back only what is at its end.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
