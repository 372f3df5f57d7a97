"""Quantised checkpoints: scaled float8 is understood, every other layout is refused by its name.

Quantised weights mean nothing without the tensors beside them. A merge that read the stored
numbers alone would write garbage, so nothing that looks quantised passes unless it is understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.checkpoints.formed_sources import BlockScaledSource, make_formed_spec
from mmerge.workers.checkpoints.sources import TensorSource

CONFIG_KEYS = ("quantization_config", "compression_config")
SCALED_FP8_METHODS = ("fp8", "fbgemm_fp8")
"""Values of `quant_method` whose weights are float8 with one scale per tensor, row or block.

`fp8`: DeepSeek, Qwen and Mistral releases (transformers' FineGrainedFP8Config, vLLM's AutoFP8).
`fbgemm_fp8`: Llama 3.1 405B FP8 (one scale per row).
"""
METHOD_NAMES: Mapping[str, str] = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "eetq": "EETQ",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "quanto": "Quanto",
    "quark": "Quark",
    "spqr": "SpQR",
    "vptq": "VPTQ",
}
"""Usual spelling of the methods that are refused; others are named as the configuration does."""
REMEDY = (
    "Give the checkpoint from before quantisation, or dequantise it first (transformers:"
    " from_pretrained, model.dequantize(), save_pretrained)"
)

_TELLTALES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), method)
    for pattern, method in (
        (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
        (r"\.(absmax|nested_absmax|quant_map|nested_quant_map|SCB|weight_format)$", "bitsandbytes"),
        (r"\.quant_state(\.|$)", "bitsandbytes"),
        (r"\.weight_(packed|zero_point|global_scale|shape|g_idx)$", "compressed-tensors"),
        (r"\.weight_scale_2$", "NVFP4 (ModelOpt)"),
        (r"\.(W_q|W_q\.\w+)$", "HQQ"),
        (r"\._(data|scale|shift)$", "Quanto"),
        (r"(:_data|_weight_qdata|\.qdata)$", "torchao"),
        (r"_blocks$", "MXFP4"),
        (r"\.codebooks$", "AQLM"),
    )
)
"""Ends of tensor names by which a layout is known where the configuration does not say it."""
_PARTNERS = {"MXFP4": "_scales", "AQLM": ".codes"}
"""Ends of the names that must be there as well, where a telltale alone could be a parameter."""
_WEIGHT_SCALE = re.compile(r"(_scale_inv|weight_scales?|_proj_scales?|\.qscales?)$")
"""Ends of the names of weight scales. Parameters named `logit_scale`, `layer_scale` are none."""
_ACTIVATION_SCALE = re.compile(r"\.((input|activation|output)_scale|[qkv]_scale)$")
"""Scales of activations and of the key-value cache: without effect on the weights."""
_STRAY_SCALE = re.compile(r"\.(scales?|scale_inv|\w*scale_\w+)$")
_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")


@dataclass(frozen=True)
class ScaleGrid:
    """How the scales of a float8 tensor lie over it."""

    block: tuple[int, int]
    """Rows and columns that share a scale."""
    matrix_rows: int
    """Rows after which the blocks begin anew: those of one matrix in a stack of matrices."""


def has_quantization(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration, or a part of it, says that the weights are quantised."""
    return next(_iterate_settings(config), None) is not None


def describe_quantization(config: Mapping[str, Any]) -> str:
    """Return the method by which a configuration says that weights are quantised; empty if none."""
    setting = next(_iterate_settings(config), None)
    return _method_of(setting) if setting is not None else ""


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that says nothing of quantisation, in none of its parts."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in CONFIG_KEYS
    }


def dequantise(
    tensors: Mapping[str, TensorSource], config: Mapping[str, Any], *, where: str
) -> dict[str, TensorSource]:
    """Return the tensors of a checkpoint as weights: scaled float8 formed, its scales left out.

    Args:
        tensors: all tensors of the files, by name.
        config: the checkpoint's config.json.
        where: owner and URI, at the beginning of errors.

    Raises:
        CheckpointError: the weights are quantised in a way that is not read. The error names the
            method and the remedy.
    """
    settings = list(_iterate_settings(config))
    for setting in settings:
        method = _method_of(setting)
        if method not in SCALED_FP8_METHODS:
            raise CheckpointError(
                f"{where}: its weights are quantised with {METHOD_NAMES.get(method, method)}"
                f" (quantization_config in config.json), which is not read. {REMEDY}. Where the"
                " files hold plain weights, remove quantization_config from config.json"
            )
    _refuse_telltales(tensors, where=where)
    block = next((size for setting in settings if (size := _block_size(setting, where))), None)
    formed: dict[str, TensorSource] = {}
    consumed: set[str] = set()
    for name, source in tensors.items():
        scale_name = _find_scale(name, tensors)
        if scale_name is not None:
            scales = tensors[scale_name]
            formed[name] = _form(source, scales, block, where=where)
            consumed.add(scale_name)
        elif settings and source.spec.dtype in _FLOAT8 and len(source.spec.shape) > 1:
            raise CheckpointError(
                f"{where}: {name} is {source.spec.dtype} and has no {name}_scale_inv or"
                f" {name}_scale beside it, though config.json says that it is quantised. Fetch the"
                " checkpoint again"
            )
    result: dict[str, TensorSource] = {}
    for name, source in tensors.items():
        if name in consumed or (formed and _ACTIVATION_SCALE.search(name)):
            continue
        if _WEIGHT_SCALE.search(name) or (_STRAY_SCALE.search(name) and _beside(name, formed)):
            raise CheckpointError(
                f"{where}: {name} is a scale of quantised weights, but there are no float8 weights"
                f" that it fits: an unknown method of quantisation. {REMEDY}"
            )
        result[name] = formed.get(name, source)
    return result


def find_grid(
    shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None
) -> ScaleGrid | None:
    """Return how scales of a shape lie over weights of a shape, None where they do not fit.

    Args:
        shape: of the weights, [..., rows, columns].
        scales: one for all, one per row ([..., rows] or [..., rows, 1]), or one per block.
        block: `weight_block_size` of the configuration. Blocks at the lower and right edge may be
            smaller (DeepSeek's kernels). Without it, blocks are those that divide the weights
            evenly into powers of two: any other size would be a guess.
    """
    *stack, rows, columns = shape
    num_rows = prod(shape[:-1])
    if prod(scales) == 1:
        return ScaleGrid((max(num_rows, 1), max(columns, 1)), max(num_rows, 1))
    if tuple(scales) in (tuple(shape[:-1]), (*shape[:-1], 1)):
        return ScaleGrid((1, columns), num_rows)
    if len(scales) != len(shape) or list(scales[:-2]) != stack:
        return None
    grid = (scales[-2], scales[-1])
    if block is not None and grid == (-(-rows // block[0]), -(-columns // block[1])):
        return ScaleGrid(block, rows)
    if block is None and grid[0] and grid[1] and not rows % grid[0] and not columns % grid[1]:
        sizes = (rows // grid[0], columns // grid[1])
        if all(
            count == 1 or _is_power_of_two(size) for size, count in zip(sizes, grid, strict=True)
        ):
            return ScaleGrid(sizes, rows)
    return None


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def _iterate_settings(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the quantisation settings of a configuration and of its parts."""
    for key, value in config.items():
        if not isinstance(value, dict):
            continue
        if key in CONFIG_KEYS:
            yield value
        else:
            yield from _iterate_settings(value)


def _method_of(setting: Mapping[str, Any]) -> str:
    method = setting.get("quant_method")
    if isinstance(method, str) and method:
        return method.lower()
    if setting.get("load_in_4bit") or setting.get("load_in_8bit"):
        return "bitsandbytes"  # written by versions that had no quant_method yet
    return "an unnamed method"


def _block_size(setting: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    size = setting.get("weight_block_size")
    if size is None:
        return None
    is_pair = isinstance(size, list) and len(size) == 2
    if not is_pair or not all(type(side) is int and side > 0 for side in size):
        raise CheckpointError(
            f"{where}: weight_block_size {size!r} in quantization_config is no pair of sizes. Fetch"
            " the checkpoint again"
        )
    return (size[0], size[1])


def _refuse_telltales(tensors: Mapping[str, TensorSource], *, where: str) -> None:
    for name in tensors:
        for pattern, method in _TELLTALES:
            partner = _PARTNERS.get(method)
            if not pattern.search(name):
                continue
            if partner and pattern.sub(partner, name) not in tensors:
                continue
            raise CheckpointError(
                f"{where}: its weights are quantised with {method}: it has {name}. That is not"
                f" read. {REMEDY}"
            )


def _find_scale(name: str, tensors: Mapping[str, TensorSource]) -> str | None:
    """Return the name of a float8 tensor's scales, None where it has none or is not float8."""
    if tensors[name].spec.dtype not in _FLOAT8:
        return None
    for suffix in ("_scale_inv", "_scale"):
        if name + suffix in tensors:
            return name + suffix
    return None


def _beside(name: str, formed: Mapping[str, TensorSource]) -> bool:
    """Return whether a tensor belongs to a module whose weight is scaled float8."""
    return name.rpartition(".")[0] + ".weight" in formed


def _form(
    weights: TensorSource, scales: TensorSource, block: tuple[int, int] | None, *, where: str
) -> BlockScaledSource:
    spec, name = weights.spec, weights.spec.name
    if scales.spec.dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{where}: {scales.spec.name} has dtype {scales.spec.dtype}; scales are read as"
            f" {', '.join(_SCALE_DTYPES)}. {REMEDY}"
        )
    grid = find_grid(spec.shape, scales.spec.shape, block) if len(spec.shape) > 1 else None
    if grid is None:
        sizes = f"weight_block_size {list(block)}" if block else "no weight_block_size"
        raise CheckpointError(
            f"{where}: {name} has shape {spec.shape}, its scales {scales.spec.name} have"
            f" {scales.spec.shape}: with {sizes} in quantization_config they do not fit. {REMEDY}"
        )
    return BlockScaledSource(
        weights.uri,
        weights.file,
        make_formed_spec(spec),
        weights=weights,
        scales=scales,
        block=grid.block,
        matrix_rows=grid.matrix_rows,
    )
