"""Memory that is freed goes back to the system where a rank asks for that, gaps between what stays included."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import contextlib, sys
import numpy as np
from mmerge.workers.host_memory import resident_bytes, returned_at_once

for _ in range(2):  # from now on the C library takes as much from its heaps
    freed = np.ones(24 << 20, np.uint8)
    del freed
with returned_at_once() if sys.argv[1] == "returned" else contextlib.nullcontext():
    before, kept, freed = resident_bytes("VmRSS"), [], []
    for _ in range(8):
        freed.append(np.ones(8 << 20, np.uint8))
        kept.append(np.ones(64 << 10, np.uint8))
    freed.clear()
    print(resident_bytes("VmRSS") - before)
"""


def resident_after(how: str, **variables: str) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only this C library has such heaps")
def test_gaps_between_what_stays_go_back_to_the_system() -> None:
    assert resident_after("kept") > 24 << 20, "the C library returns them by itself: returned_at_once is no longer needed"
    assert resident_after("returned") < 8 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only this C library has such heaps")
def test_a_limit_in_the_environment_stays() -> None:
    assert resident_after("returned", MALLOC_MMAP_THRESHOLD_=str(32 << 20)) > 24 << 20


LARGE_SCRIPT = """
import torch
from mmerge.workers.host_memory import LARGE_PAGE_BYTES, empty_host, resident_bytes

sizes = [2 * LARGE_PAGE_BYTES + LARGE_PAGE_BYTES // 4] * 16  # the last large page of each would be filled to a quarter
empty_host((LARGE_PAGE_BYTES,), torch.uint8).fill_(1)
before = resident_bytes("VmRSS")
kept = [empty_host((size,), torch.uint8).fill_(1) for size in sizes]
print((resident_bytes("VmRSS") - before) / sum(sizes))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_a_last_large_page_that_is_hardly_filled_takes_no_memory() -> None:
    done = subprocess.run([sys.executable, "-c", LARGE_SCRIPT], capture_output=True, text=True, check=True)
    assert 0.95 < float(done.stdout) < 1.1, "resident beside held"
