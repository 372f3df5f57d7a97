"""The Triton kernel gives the bits of the plain torch reference: on a GPU, and without one in
Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mmerge.workers.reconstruction.masked_weights import can_use_numba, can_use_triton

SCRIPT = Path(__file__).resolve().parent.parent.parent / "triton_script.py"
NUM_CASES = 7 * 3 * 9 * 2

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def compare(device: str, **environment: str) -> int:
    """Run the comparison in a process of its own: whether Triton interprets is decided when it is
    imported.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), device],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@needs_triton
def test_the_interpreted_kernel_equals_the_reference_for_all_dtypes_and_odd_shapes() -> None:
    assert compare("cpu", TRITON_INTERPRET="1") == NUM_CASES


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_kernel_on_a_gpu_equals_the_reference_for_all_dtypes_and_odd_shapes() -> None:
    assert compare("cuda") == NUM_CASES


def test_tensors_of_the_cpu_go_to_the_compiled_loop_and_not_to_triton() -> None:
    values = torch.zeros(2, 8)
    assert can_use_numba(values, values, values)
    assert not can_use_triton(values, values, values)


@pytest.mark.gpu
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_of_a_gpu_go_to_triton() -> None:
    values = torch.zeros(2, 8, device="cuda")
    assert can_use_triton(values, values, values)
    assert not can_use_triton(values, values.T, values)
