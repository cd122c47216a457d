"""The C library's heap under an engine: large blocks stay out of it however many of them were
freed before.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")

# How many more blocks are mapped apart once 8 MiB are held, after 24 MiB were freed, which raises
# the threshold.
_MAPPED = """
import ctypes

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd",
                "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.mallinfo2.restype = Info
{call}
libc.free(libc.malloc(24 << 20))
before = libc.mallinfo2().hblks
block = libc.malloc(8 << 20)
print(libc.mallinfo2().hblks - before)
"""
_CALL = "from logitcask.pipeline.memory import map_large_blocks; map_large_blocks()"


@pytest.mark.parametrize(
    ("call", "environment", "mapped"),
    [
        ("", {}, 0),
        (_CALL, {}, 1),
        (_CALL, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=16777216"}, 0),
        (_CALL, {"MALLOC_MMAP_THRESHOLD_": "16777216"}, 0),
    ],
    ids=["left alone", "fixed", "tunables", "variable"],
)
def test_large_blocks_stay_out_of_the_heap(
    call: str, environment: dict[str, str], mapped: int
) -> None:
    unset = {"GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD"}
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", _MAPPED.format(call=call)],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == mapped
