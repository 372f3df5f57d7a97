"""The math library of this machine: it decides the last bits of decompositions and products."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from pathlib import Path

MATH_VARIABLES = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "OPENBLAS_CORETYPE")
"""Environment variables with which libraries choose their code by the processor."""


def describe_math_library(device: str) -> str:
    """Return what the last bits of decompositions and products of matrices depend on here.

    On the CPU that is the version of torch, its BLAS and LAPACK, and the instructions that they
    choose; on a GPU the versions of torch and CUDA and the kind of GPU. Where this process sees no
    GPU, it is `cuda` alone.
    """
    return _find_math_library(device)


@cache
def _find_math_library(device: str) -> str:
    import torch

    if device == "cuda":
        if not torch.cuda.is_available():
            return "cuda"
        return (
            f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}"
        )
    build = torch.__config__.show()
    library = re.search(r"BLAS_INFO=(\w+)", build)
    version = re.search(r"Math Kernel Library Version (\S+)", build)
    description = [
        f"torch {torch.__version__}",
        f"{library[1] if library else 'BLAS'} {version[1] if version else ''}".strip(),
        f"{platform.machine()} {_find_cpu_vendor()} {torch.backends.cpu.get_cpu_capability()}",
    ]
    description += [f"{name}={os.environ[name]}" for name in MATH_VARIABLES if name in os.environ]
    return ", ".join(description)


def _find_cpu_vendor() -> str:
    """Return the maker of the processor: libraries choose other code for each."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return platform.processor()
    vendor = re.search(r"^(?:vendor_id|CPU implementer)\s*:\s*(.+)$", text, re.MULTILINE)
    return vendor[1].strip() if vendor else platform.processor()
