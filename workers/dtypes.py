"""Between safetensors' names of dtypes and torch's, and between bytes and tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
SAFETENSORS_DTYPES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
NAMED_DTYPES: Mapping[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""The dtypes that a recipe may ask for."""


def to_tensor(data: bytes | memoryview, dtype: str) -> torch.Tensor:
    """Return the flat tensor that these bytes are; it owns its memory, whatever becomes of `data`."""
    if not len(data):
        return torch.empty(0, dtype=TORCH_DTYPES[dtype])
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(TORCH_DTYPES[dtype])


def to_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor in C order, without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    return flat.view(torch.uint8).numpy().data.cast("B")
