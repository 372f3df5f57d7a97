"""Between safetensors' names of dtypes and torch's, and between bytes and tensors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mmerge.workers.inputs import InputBlock

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
# Said of buffers that `view_tensor` shows. For good: filters that are put back again are not safe in threads.
warnings.filterwarnings("ignore", message="The given buffer is not writable")
NAMED_DTYPES: Mapping[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""The dtypes that a recipe may ask for."""


def to_tensor(data: bytes | memoryview, dtype: str) -> torch.Tensor:
    """Return the flat tensor that these bytes are; it owns its memory, whatever becomes of `data`."""
    if not len(data):
        return torch.empty(0, dtype=TORCH_DTYPES[dtype])
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(TORCH_DTYPES[dtype])


def view_tensor(data: bytes | memoryview, dtype: str) -> torch.Tensor:
    """Return the flat tensor over these bytes without a copy; it keeps them alive, and is only to be read from."""
    if not len(data):
        return to_tensor(data, dtype)
    raw = torch.frombuffer(data, dtype=torch.uint8)
    # A part of a larger request may begin anywhere; entries must not lie across their own size.
    return raw.view(TORCH_DTYPES[dtype]) if raw.data_ptr() % 8 == 0 else to_tensor(data, dtype)


def to_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor in C order, without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    return flat.view(torch.uint8).numpy().data.cast("B")


def to_float_tensors(block: InputBlock) -> list[torch.Tensor]:
    """Return the entries of a block of base and experts as flat float32 tensors that own their memory."""
    names = ("F32", "BF16", "F16")
    found = []
    for row, code in zip(block.rows, block.codes.tolist(), strict=True):
        dtype = TORCH_DTYPES[names[code]]
        values = torch.from_numpy(row[: block.num_entries * dtype.itemsize]).view(dtype)
        found.append(values.to(torch.float32, copy=True))
    return found


_NAN_BITS: Mapping[torch.dtype, tuple[torch.dtype, int]] = {
    torch.bfloat16: (torch.int16, 0x7FC0), torch.float16: (torch.int16, 0x7E00), torch.float32: (torch.int32, 0x7FC00000),
}  # fmt: skip


def with_one_nan(values: torch.Tensor) -> torch.Tensor:
    """Return `values` with every NaN as the quiet NaN without sign or payload: which one arises depends on the machine."""
    is_nan = values.isnan()
    if not bool(is_nan.any()):
        return values
    integers, bits = _NAN_BITS[values.dtype]
    return values.view(integers).masked_fill(is_nan, bits).view(values.dtype)
