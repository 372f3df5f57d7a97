"""Conversion between the dtype names of safetensors and torch, and between bytes and tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import torch
from typing_extensions import override

_NAMES: Mapping[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}


class _TorchDtypes(Mapping[str, "torch.dtype"]):
    """Looks up torch dtypes on access, so that importing this module does not import torch."""

    @override
    def __getitem__(self, name: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, _NAMES[name])
        return dtype

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(_NAMES)

    @override
    def __len__(self) -> int:
        return len(_NAMES)


class _SafetensorsDtypes(Mapping["torch.dtype", str]):
    @override
    def __getitem__(self, dtype: torch.dtype) -> str:
        return _SAFETENSORS_NAMES[str(dtype).removeprefix("torch.")]

    @override
    def __iter__(self) -> Iterator[torch.dtype]:
        return iter(TORCH_DTYPES.values())

    @override
    def __len__(self) -> int:
        return len(_NAMES)


_SAFETENSORS_NAMES = {torch_name: name for name, torch_name in _NAMES.items()}
TORCH_DTYPES: Mapping[str, torch.dtype] = _TorchDtypes()
SAFETENSORS_DTYPES: Mapping[torch.dtype, str] = _SafetensorsDtypes()
# torch warns where it views the read-only bytes of a store. The filter stays for the whole process,
# because restoring filters is not thread-safe.
warnings.filterwarnings("ignore", message="The given buffer is not writable")
NAMED_DTYPES: Mapping[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""The dtypes that a recipe may name."""


def to_tensor(data: bytes | memoryview, dtype: str) -> torch.Tensor:
    """Return these bytes as a flat tensor that owns its memory."""
    if not len(data):
        return torch.empty(0, dtype=TORCH_DTYPES[dtype])
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(TORCH_DTYPES[dtype])


def to_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor in C order, without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    return flat.view(torch.uint8).numpy().data.cast("B")


_NAN_BITS: Mapping[str, tuple[str, int]] = {
    "BF16": ("I16", 0x7FC0),
    "F16": ("I16", 0x7E00),
    "F32": ("I32", 0x7FC00000),
}


def with_one_nan(values: torch.Tensor) -> torch.Tensor:
    """Return `values` with every NaN replaced by the canonical quiet NaN.

    Sign and payload of a computed NaN depend on the machine; digests must not.
    """
    is_nan = values.isnan()
    if not bool(is_nan.any()):
        return values
    integers, bits = _NAN_BITS[SAFETENSORS_DTYPES[values.dtype]]
    return values.view(TORCH_DTYPES[integers]).masked_fill(is_nan, bits).view(values.dtype)
