"""Every compiled path against the method's own code, bit by bit, over dtypes, odd lengths and
special values.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from input_blocks import make_block

from mmerge.manifests.format.object_header import packed_bytes
from mmerge.workers.checkpoints.block_reader import InputBlock
from mmerge.workers.checkpoints.dtypes import (
    TORCH_DTYPES,
    to_bytes,
    with_one_nan,
)
from mmerge.workers.compiled.inner_products import sum_vector_products
from mmerge.workers.compiled.interface import (
    CompiledPass,
    MaskPass,
    PassRequest,
    find_compiled_pass,
)
from mmerge.workers.kernels import tiles as kernels
from mmerge.workers.kernels.magnitudes import first_non_finite
from mmerge.workers.methods import find_method, method_names
from mmerge.workers.methods.interface import Block, MergedBlock, Method, TensorFacts, num_columns
from mmerge.workers.reconstruction.bitmask import pack_mask
from mmerge.workers.statistics.exact_sums import exact_sum, to_sum

DTYPES = ("BF16", "F16", "F32")
SPECIAL = (
    0.0,
    -0.0,
    float("inf"),
    float("-inf"),
    float("nan"),
    1e-40,
    -1e-40,
    6e-8,
    65504.0,
    -65520.0,
    3e38,
    1.0,
    -1.0,
)

PARAMETERS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "mmer": [
        ({"reduction": "sum", "mask_scale": 0.75}, {}),
        ({"reduction": "mean"}, {"mask_scale": 0.6}),
    ],
    "ties": [
        ({"reduction": "mean", "scale": 1.0}, {}),
        ({"reduction": "sum", "scale": -0.3, "zero_sign": "positive"}, {"weight": 0.3}),
        ({"reduction": "max", "zero_sign": "majority"}, {"weight": -1.7}),
        ({"count": "exact", "scope": "tensor", "density": 0.37}, {"weight": 0.6}),
    ],
    "linear": [({"normalize": True}, {"weight": 0.7}), ({"normalize": False}, {"weight": -1.1})],
    "task_arithmetic": [
        ({"scale": 0.4}, {"weight": 1.0}),
        ({"scale": 1.0, "normalize": True}, {"weight": 0.3}),
    ],
    "dare_linear": [
        ({"density": 0.6}, {}),
        ({"density": 0.1, "rescale": "norm", "seed": 7}, {"weight": 0.3}),
    ],
    "dare_ties": [
        ({"density": 0.3}, {"weight": 0.3}),
        ({"rescale": "none", "reduction": "mean", "zero_sign": "majority"}, {}),
    ],
    "breadcrumbs": [
        ({"density": 0.4, "gamma": 0.05}, {}),
        ({"normalize": True, "density": 1.0}, {"weight": 0.4}),
    ],
    "breadcrumbs_ties": [
        ({"density": 0.7, "gamma": 0.2}, {"weight": 0.9}),
        ({"density": 0.01, "gamma": 0.0}, {}),
    ],
    "della_linear": [
        ({"density": 0.5}, {}),
        ({"density": 0.7, "epsilon": 0.0, "rescale": "norm"}, {}),
    ],
    "della": [
        ({"density": 0.4, "epsilon": 0.3}, {"weight": 0.3}),
        ({"rescale": "none", "zero_sign": "positive"}, {"density": 1.0}),
        ({"density": 0.6, "epsilon": 0.1}, {"epsilon": 0.35}),
    ],
    "tall_masks": [
        ({"mask_scale": 0.4}, {}),
        ({"multi_task": "ties", "zero_sign": "majority"}, {"mask_scale": 0.9}),
    ],
    "emr": [({}, {})],
    "consensus": [
        ({"agreement": 2, "scale": 0.7}, {}),
        ({"agreement": 1, "multi_task": "ties", "zero_sign": "positive"}, {"mask_scale": 0.2}),
        ({"agreement": 0}, {}),
    ],
    "sce": [
        ({"select_topk": 0.3}, {}),
        ({"select_topk": 1.0, "scale": 0.4}, {}),
        ({"select_topk": 0.001}, {}),
    ],
    "naive_mc": [({}, {})],
    "slerp": [({"t": 0.3}, {}), ({"t": 1.0}, {})],
}
"""Per method, numbers of the recipe and of each expert."""


def make_rows(dtypes: list[str], size: int, seed: int, *, special: bool) -> list[torch.Tensor]:
    """Random rows, near each other so that there are many ties; `special` strews zeros of both
    signs, NaN, Inf, subnormals.
    """
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(size, generator=generator) * 8).round() / 64
    rows = [base] + [
        base + (torch.randn(size, generator=generator) * 4).round() / 256 for _ in dtypes[1:]
    ]
    if special:
        for row in rows:
            places = torch.randint(0, size, (max(size // 3, 1),), generator=generator)
            chosen = torch.randint(0, len(SPECIAL), (len(places),), generator=generator)
            row[places] = torch.tensor(SPECIAL)[chosen]
    return [row.to(TORCH_DTYPES[dtype]) for row, dtype in zip(rows, dtypes, strict=True)]


def make_request(
    method: Method, parameters: Any, experts: list[Any], facts: TensorFacts, dtype: str
) -> PassRequest:
    return PassRequest(method, parameters, experts, facts, 0, dtype)


def make_reference(
    method: Method, rows: list[torch.Tensor], dtype: str, parameters: Any, experts: list[Any]
) -> tuple[Block, MergedBlock]:
    """What the method's own code makes of the whole tensor, its stages measured before."""
    trims = method.trimming(parameters, experts) is not None
    thresholds = (
        [(0.0, 0.015625, 0.0078125, 0.03125)[index % 4] for index in range(len(experts))]
        if trims
        else []
    )
    shape = tuple(rows[0].shape)
    columns = num_columns(shape)
    granularity = method.granularity(parameters, experts)
    shaped = {"entry": (-1,), "row": (-1, columns), "tensor": shape}[granularity]
    base, *values = (row.float().reshape(shaped) for row in rows)
    block = Block(
        base,
        values,
        thresholds,
        TORCH_DTYPES[dtype],
        name="weight",
        start=0,
        shape=shape,
        expert_names=tuple(f"expert{index}" for index in range(len(experts))),
    )
    for stage in method.stages(parameters, experts):
        measured = method.measure_block(block, parameters, experts, stage=stage.name)
        block = replace(
            block,
            measured={
                **block.measured,
                **{name: (exact_sum(found),) for name, found in measured.items()},
            },
        )
    return block, method.merge_block(block, parameters, experts)


def cut(block: InputBlock, start: int, stop: int) -> InputBlock:
    """Some entries of a block, as the reader would give them."""
    rows = [np.zeros_like(row) for row in block.rows]
    for target, row, raw in zip(rows, block.rows, block.raw, strict=True):
        width = len(raw) // block.num_entries
        target[: (stop - start) * width] = row[start * width : stop * width]
    return InputBlock(start, stop, rows, block.codes, block.raw)


def run_path(
    path: CompiledPass, block: InputBlock, width: int, num_masks: int, columns: int
) -> tuple[bytes, np.ndarray[Any, Any]] | None:
    """What a path makes of the tensor in two blocks, None where it declines."""
    step = columns if path.by_row else kernels.TILE_ENTRIES
    middle = block.num_entries // 2 // step * step
    pieces = [
        cut(block, *span)
        for span in ((0, middle), (middle, block.num_entries))
        if span[0] < span[1]
    ]
    if not path.prepare(lambda: iter(pieces)):
        return None
    masks = np.zeros((num_masks, packed_bytes(block.num_entries)), np.uint8)
    data = b""
    for piece in pieces:
        out = np.zeros(piece.num_entries * width, np.uint8)
        path.merge(piece, out, masks)
        data += out.tobytes()
    return data, masks


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(
        [(name, index) for name, found in PARAMETERS.items() for index in range(len(found))]
    ),
    st.lists(st.sampled_from(DTYPES), min_size=2, max_size=5),
    st.sampled_from(DTYPES),
    st.one_of(st.integers(1, 70), st.integers(2040, 2060), st.integers(4090, 6150)),
    st.sampled_from([None, 1, 3, 64, 2049]),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_a_path_gives_the_bytes_of_the_method(
    chosen: tuple[str, int],
    dtypes: list[str],
    dtype: str,
    size: int,
    columns: int | None,
    seed: int,
    special: bool,
) -> None:
    name, index = chosen
    method, numbers = find_method(name), PARAMETERS[name][index]
    dtypes = dtypes[: (method.max_experts or len(dtypes)) + 1]
    rows = make_rows(
        dtypes,
        size if columns is None else max(size // columns, 1) * columns,
        seed,
        special=special,
    )
    if columns is not None:
        rows = [row.reshape(-1, columns) for row in rows]
    parameters = method.parameters_model.model_validate(numbers[0])
    experts = [method.expert_parameters_model.model_validate(numbers[1]) for _ in rows[1:]]
    found_block, expected = make_reference(method, rows, dtype, parameters, experts)
    path = find_compiled_pass(make_request(method, parameters, experts, found_block.facts, dtype))
    assert path is not None
    width, num_masks = TORCH_DTYPES[dtype].itemsize, len(experts) if method.kind == "masks" else 0
    found = run_path(path, make_block(rows), width, num_masks, num_columns(rows[0].shape))
    if found is None:
        assert special, "only what is not finite may be declined"
        return
    out, masks = found
    assert out == bytes(to_bytes(with_one_nan(expected.values)))
    deltas = found_block.task_vectors()
    if not isinstance(path, MaskPass):
        return
    for row, mask in zip(masks, expected.masks, strict=True):
        assert row.tobytes() == bytes(to_bytes(pack_mask(mask)))
    n = len(deltas)
    assert path.statistics.kept.tolist() == [int((delta != 0).sum()) for delta in expected.trimmed]
    assert path.statistics.agreeing.tolist() == [
        int(((delta.sign() == expected.sign) & (expected.sign != 0)).sum())
        for delta in expected.trimmed
    ]
    assert path.statistics.masked.tolist() == [int(mask.sum()) for mask in expected.masks]
    votes = torch.stack(list(expected.masks)).sum(dim=0)
    assert path.statistics.consensus.tolist() == torch.bincount(votes, minlength=n + 1).tolist()
    assert path.statistics.overlaps.tolist() == [
        int((one & other).sum()) for one, other in itertools.combinations(expected.masks, 2)
    ]
    squares = [
        kernels.add_squares(0.0, values.float().numpy()) for values in [*deltas, expected.values]
    ]
    np.testing.assert_array_equal(path.statistics.squares, squares)


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("num_experts", [1, 2])
def test_sce_declines_finite_weights_whose_squares_overflow(
    num_experts: int, position: int
) -> None:
    rows = make_rows(["BF16"] * (num_experts + 1), 24, seed=3, special=False)
    for row in rows[1:]:
        row[position] = 3e38  # equal experts: their variance is finite
    method = find_method("sce")
    parameters = method.parameters_model.model_validate({})
    experts = [method.expert_parameters_model() for _ in rows[1:]]
    block, expected = make_reference(method, rows, "BF16", parameters, experts)
    assert expected.values.isnan().all()
    path = find_compiled_pass(make_request(method, parameters, experts, block.facts, "BF16"))
    assert path is not None
    assert run_path(path, make_block(rows), 2, 0, 24) is None


@pytest.mark.parametrize("num_experts", [1, 3, 7, 9])
def test_votes_of_any_number_of_experts_are_counted(num_experts: int) -> None:
    size = 2 * kernels.TILE_ENTRIES + 77
    rows = make_rows(["BF16"] * (num_experts + 1), size, seed=3, special=False)
    method = find_method("mmer")
    parameters = method.parameters_model.model_validate({"mask_scale": 0.3})
    experts = [method.expert_parameters_model() for _ in rows[1:]]
    block, expected = make_reference(method, rows, "BF16", parameters, experts)
    path = find_compiled_pass(make_request(method, parameters, experts, block.facts, "BF16"))
    assert isinstance(path, MaskPass)
    found = run_path(path, make_block(rows), 2, num_experts, size)
    assert found is not None
    assert found[0] == bytes(to_bytes(expected.values))
    votes = torch.stack(list(expected.masks)).sum(dim=0)
    assert (
        path.statistics.consensus.tolist()
        == torch.bincount(votes, minlength=num_experts + 1).tolist()
    )
    assert path.statistics.overlaps.tolist() == [
        int((one & other).sum()) for one, other in itertools.combinations(expected.masks, 2)
    ]


def test_ties_are_taken_by_position_where_both_counts_end_within_tiles() -> None:
    size = 5 * kernels.TILE_ENTRIES
    rows = [
        torch.zeros(size, dtype=torch.bfloat16),
        *(torch.ones(size, dtype=torch.bfloat16) for _ in range(2)),
    ]
    method = find_method("breadcrumbs")
    # Of equal magnitudes the first tenth ends in the first tile, the 45 % behind it in the third.
    parameters = method.parameters_model.model_validate({"density": 0.45, "gamma": 0.1})
    experts = [method.expert_parameters_model() for _ in rows[1:]]
    block, expected = make_reference(method, rows, "BF16", parameters, experts)
    path = find_compiled_pass(make_request(method, parameters, experts, block.facts, "BF16"))
    assert path is not None
    found = run_path(path, make_block(rows), 2, 0, size)
    assert found is not None
    assert found[0] == bytes(to_bytes(expected.values))
    assert int((expected.values != 0).sum()) == int(0.45 * size)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(
        [
            ("slerp", {"t": 0.3}),
            ("nuslerp", {"origin": "base"}),
            ("multislerp", {"origin": "zero"}),
            ("karcher", {}),
            ("model_stock", {}),
        ]
    ),
    st.lists(st.sampled_from(DTYPES), min_size=3, max_size=5),
    st.one_of(st.integers(1, 70), st.integers(2040, 4100)),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_a_compiled_stage_finds_the_sums_of_the_methods_own_quantities(
    chosen: tuple[str, dict[str, Any]], dtypes: list[str], size: int, seed: int, special: bool
) -> None:
    name, numbers = chosen
    method = find_method(name)
    rows = make_rows(dtypes[: (method.max_experts or len(dtypes)) + 1], size, seed, special=special)
    parameters = method.parameters_model.model_validate(numbers)
    experts = [method.expert_parameters_model() for _ in rows[1:]]
    expected, _ = make_reference(method, rows, "BF16", parameters, experts)
    (stage,) = method.stages(parameters, experts)
    vectors = stage.products
    assert vectors is not None
    found = sum_vector_products(
        vectors,
        [
            cut(make_block(rows), *span)
            for span in ((0, size // 2), (size // 2, size))
            if span[0] < span[1]
        ],
    )
    assert found.keys() == expected.measured.keys()
    for quantity, counts in found.items():
        np.testing.assert_equal(to_sum(counts), expected.measured[quantity][0])


def test_every_path_has_numbers_to_be_tried_with_and_belongs_to_a_method() -> None:
    compiled = {name for name in method_names() if find_method(name).compiled_pass}
    assert compiled == set(PARAMETERS)


def test_weights_that_cancel_take_the_method_itself() -> None:
    method = find_method("linear")
    experts = [
        method.expert_parameters_model.model_validate({"weight": weight}) for weight in (1.0, -1.0)
    ]
    facts = TensorFacts("weight", (3,), (), ("a", "b"), {})
    assert (
        find_compiled_pass(make_request(method, method.parameters_model(), experts, facts, "BF16"))
        is None
    )


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_value_is_widened_exactly_and_comes_back(dtype: str) -> None:
    words = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(words.view(np.int16)).view(TORCH_DTYPES[dtype])
    found = np.empty(1 << 16, np.float32)
    kernels.widen(words.view(np.uint8), kernels.CODES[dtype], 0, 1 << 16, found)
    is_nan = np.isnan(found)
    assert np.array_equal(is_nan, expected.isnan().numpy())
    assert np.array_equal(
        found[~is_nan].view(np.uint32), expected.float().numpy()[~is_nan].view(np.uint32)
    )
    back = np.empty(1 << 16, np.uint16)
    kernels.narrow(found, kernels.CODES[dtype], 1 << 16, back.view(np.uint8), 0)
    assert np.array_equal(back[~is_nan], words[~is_nan])
    assert len(set(back[is_nan].tolist())) == 1


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_any_float32_is_rounded_as_torch_rounds_it(dtype: str, seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 1 << 32, 4096, dtype=np.uint64).astype(np.uint32)
    bits[::3] &= 0xFFFFE000  # halves between float16 values
    bits[1::3] &= 0xFFFF8000  # halves between bfloat16 values
    bits[::2] = (bits[::2] & 0x87FFFFFF) | 0x30000000  # magnitudes at which float16 is subnormal
    values = bits.view(np.float32)
    expected = with_one_nan(torch.from_numpy(values).to(TORCH_DTYPES[dtype]))
    out = np.empty(4096 * TORCH_DTYPES[dtype].itemsize, np.uint8)
    kernels.narrow(values.copy(), kernels.CODES[dtype], 4096, out, 0)
    assert out.tobytes() == bytes(to_bytes(expected))


def test_the_sum_of_squares_is_the_sum_and_does_not_depend_on_where_a_block_ends() -> None:
    values = torch.randn(3 * 65536 + 77, generator=torch.Generator().manual_seed(2)).numpy()
    total = kernels.add_squares(0.0, values)
    assert total == pytest.approx(float(np.square(values, dtype=np.float64).sum()), rel=1e-12)
    assert kernels.add_squares(kernels.add_squares(0.0, values[:65536]), values[65536:]) == total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_value_that_is_not_finite_is_found(dtype: str, value: float) -> None:
    row = torch.zeros(5000).to(TORCH_DTYPES[dtype])
    block = make_block([row])
    assert first_non_finite(int(block.addresses[0]), int(block.codes[0]), 5000) == -1
    row[[4100, 4999]] = value
    found = make_block([row])
    assert first_non_finite(int(found.addresses[0]), int(block.codes[0]), 5000) == 4100
