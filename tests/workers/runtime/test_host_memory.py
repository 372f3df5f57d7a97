"""Freed memory returns to the system on request, gaps between live blocks included."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mmerge.workers.runtime.host_memory import REGION_BYTES, SharedPages

_LARGE_ROWS = 9  # of a megabyte each: more than what is shared

SCRIPT = """
import contextlib, sys
import numpy as np
from mmerge.workers.runtime.host_memory import resident_bytes, returned_at_once

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
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")
    } | variables
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only this C library has such heaps")
def test_gaps_between_what_stays_go_back_to_the_system() -> None:
    assert resident_after("kept") > 24 << 20, (
        "the C library returns them by itself: returned_at_once is no longer needed"
    )
    assert resident_after("returned") < 8 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only this C library has such heaps")
def test_a_limit_in_the_environment_stays() -> None:
    assert resident_after("returned", MALLOC_MMAP_THRESHOLD_=str(32 << 20)) > 24 << 20


LARGE_SCRIPT = """
import torch
from mmerge.workers.runtime.host_memory import LARGE_PAGE_BYTES, empty_host, resident_bytes

# The last large page of each size would be filled to a quarter.
sizes = [2 * LARGE_PAGE_BYTES + LARGE_PAGE_BYTES // 4] * 16
empty_host((LARGE_PAGE_BYTES,), torch.uint8).fill_(1)
before = resident_bytes("VmRSS")
kept = [empty_host((size,), torch.uint8).fill_(1) for size in sizes]
print((resident_bytes("VmRSS") - before) / sum(sizes))
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="resident memory is read from /proc"
)
def test_a_last_large_page_that_is_hardly_filled_takes_no_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LARGE_SCRIPT], capture_output=True, text=True, check=True
    )
    assert 0.95 < float(done.stdout) < 1.1, "resident beside held"


SHARED_SCRIPT = """
import torch
from mmerge.workers.runtime.host_memory import REGION_BYTES, SharedPages, resident_bytes

pages = SharedPages()
pages.empty((1,), torch.uint8).fill_(1)
before = resident_bytes("VmRSS")
# 105 MB in tensors that are smaller than a page.
kept = [pages.empty((500, 701), torch.uint8).fill_(1) for _ in range(300)]
kept.append(pages.empty((6 << 20,), torch.uint8).fill_(1))
held = sum(tensor.nbytes for tensor in kept)
found = resident_bytes("VmRSS") - before
kept.clear()
left = resident_bytes("VmRSS") - before
print(found / held, left / REGION_BYTES)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="resident memory is read from /proc"
)
def test_shared_pages_take_the_memory_that_is_held_and_go_back_with_the_last_of_a_region() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHARED_SCRIPT], capture_output=True, text=True, check=True
    )
    found, left = map(float, done.stdout.split())
    assert 0.95 < found < 1.1, "resident beside held"
    assert left < 1.05, "only the region that is being filled may stay"


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no large pages")
def test_tensors_in_shared_pages_have_their_own_bytes() -> None:
    pages = SharedPages()
    shapes = [(3, 5), (7,), (), (0, 4), (64, 64), (_LARGE_ROWS, 1 << 20)]

    def fill(number: int) -> list[torch.Tensor]:
        return [
            pages.empty(shape, dtype).fill_(number)
            for shape in shapes
            for dtype in (torch.uint8, torch.bfloat16, torch.float32)
        ]

    with ThreadPoolExecutor(4) as pool:
        filled = list(pool.map(fill, range(8)))
    for number, tensors in enumerate(filled):
        for tensor, shape in zip(
            tensors, [shape for shape in shapes for _ in range(3)], strict=True
        ):
            assert tensor.shape == shape
            assert bool((tensor == number).all())
            assert tensor.data_ptr() % 64 == 0
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, (
                "copies and files of a tensor hold its own bytes alone"
            )
    near = sorted(tensor.data_ptr() for tensors in filled for tensor in tensors[:6])
    assert near[-1] - near[0] <= REGION_BYTES, "small tensors lie together"
