"""Settings of the C library's heap, which stop it from growing with the length of a build.

A CPU engine allocates and frees a few tensors of 1 to 200 MiB for every prompt: rows of logits over
the whole vocabulary. glibc maps large blocks outside its heap and releases them at once. But each
freed block raises the size that counts as large, up to 32 MiB. Smaller tensors, in as many sizes as
there are lengths of prompts, then go to the heap. Blocks that live longer lie between them, so the
heap never stops growing. glibc does not change a size that was set by hand.

Arrow's buffers use the same heap, because Arrow's own allocator keeps freed memory.

A mapped block has new pages every time, with a page fault per 4 KiB, which is slower than the heap.
Pages of 2 MiB, which torch requests if it is told to, are faster.
"""

from __future__ import annotations

import ctypes
import os

import pyarrow as pa

MMAP_THRESHOLD = 1 << 20
"""Bytes from which a block is mapped apart."""

# Constants of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_USERS_OWN = ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def use_huge_pages() -> None:
    """Makes torch request pages of 2 MiB for its large CPU tensors. It has an effect only before
    torch makes its first tensor.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def map_large_blocks() -> None:
    """Fixes the size from which this process maps blocks outside the heap, unless the user has
    tuned glibc or the C library is another one.
    """
    if any(name in os.environ for name in _USERS_OWN):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        # glibc raises it together with the other: bytes that may stay free at the heap's end.
        mallopt(_M_TRIM_THRESHOLD, 2 * MMAP_THRESHOLD)
        if "ARROW_DEFAULT_MEMORY_POOL" not in os.environ:
            pa.set_memory_pool(pa.system_memory_pool())


def give_back() -> None:
    """Releases free pages inside the heap. By default glibc releases only those at its end."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
