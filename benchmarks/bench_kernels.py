"""Measure compiled paths on one core: input bytes per second, beside a memory copy."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from mmerge.manifests.format.object_header import packed_bytes
from mmerge.workers.checkpoints.block_reader import InputBlock
from mmerge.workers.compiled.interface import PassRequest, find_compiled_pass
from mmerge.workers.kernels.magnitudes import first_non_finite
from mmerge.workers.kernels.tiles import CODES
from mmerge.workers.methods import find_method, method_names
from mmerge.workers.methods.interface import Block, TensorFacts
from mmerge.workers.statistics.magnitude_histograms import MagnitudeCounter

ROWS, COLUMNS, NUM_EXPERTS = 256, 2048, 3
"""A block: 2¹⁹ entries of base and three experts, 4 MB of bfloat16."""
REPEAT = 15
REFERENCE_REPEAT = 3


def make_rows() -> list[torch.Tensor]:
    """Return a base and experts near it, bfloat16."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn((ROWS, COLUMNS), generator=generator) * 0.02
    tuned = [
        base + 5e-4 * torch.randn((ROWS, COLUMNS), generator=generator) for _ in range(NUM_EXPERTS)
    ]
    return [row.to(torch.bfloat16) for row in (base, *tuned)]


def make_block(rows: list[torch.Tensor]) -> InputBlock:
    """Return them as a reader would."""
    array = np.stack([row.view(torch.uint8).reshape(-1).numpy() for row in rows])
    codes = np.full(len(rows), CODES["BF16"], np.int64)
    return InputBlock(0, ROWS * COLUMNS, list(array), codes, tuple(row.data for row in array))


def fastest(run: Any, repeat: int = REPEAT) -> float:
    """Return the seconds of the fastest of several calls, the first left out."""
    run()
    best = float("inf")
    for _ in range(repeat):
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best


def main() -> None:
    """Print GB/s of input per path, and how many times sooner than the method's own code."""
    torch.set_num_threads(1)
    rows = make_rows()
    block = make_block(rows)
    inputs = np.stack(block.rows)
    num_bytes = inputs.nbytes
    target = np.empty_like(inputs)

    def show(name: str, seconds: float, reference: float | None = None) -> None:
        ratio = f"   {reference / seconds:6.1f} x the method's own code" if reference else ""
        print(f"{name:<34} {num_bytes / seconds / 1e9:7.2f} GB/s{ratio}", flush=True)

    show("memcpy", fastest(lambda: np.copyto(target, inputs)))
    counter = MagnitudeCounter(NUM_EXPERTS)
    show("scan: magnitudes", fastest(lambda: counter.add(block)))
    show(
        "scan: non-finite check",
        fastest(
            lambda: [
                first_non_finite(address, 1, block.num_entries)
                for address in block.addresses.tolist()
            ]
        ),
    )
    for name in method_names():
        if name == "slerp":
            continue  # it needs the sums of its stage, and runs the kernel of `linear`
        if find_method(name).compiled_pass:
            show_path(name, rows, block, show)


def show_path(name: str, rows: list[torch.Tensor], block: InputBlock, show: Any) -> None:
    """Measure one path against its method, both on one block in memory."""
    method = find_method(name)
    parameters = method.parameters_model.model_validate({})
    experts = [method.expert_parameters_model.model_validate({}) for _ in range(NUM_EXPERTS)]
    names = tuple(f"expert{index}" for index in range(NUM_EXPERTS))
    thresholds = [1e-4] * NUM_EXPERTS if method.trimming(parameters, experts) else []
    facts = TensorFacts("weight", (ROWS, COLUMNS), thresholds, names, {})
    path = find_compiled_pass(PassRequest(method, parameters, experts, facts, 0, "BF16"))
    assert path is not None
    out = np.empty(block.num_entries * 2, np.uint8)
    masks = np.zeros(
        (NUM_EXPERTS if method.kind == "masks" else 0, packed_bytes(block.num_entries)), np.uint8
    )

    def run_path() -> None:
        assert path is not None
        path.prepare(lambda: iter([block]))
        path.merge(block, out, masks)

    def run_method() -> None:
        base, *values = (row.float() for row in rows)
        block = Block(
            base,
            values,
            thresholds,
            torch.bfloat16,
            name="weight",
            start=0,
            shape=(ROWS, COLUMNS),
            expert_names=names,
        )
        method.merge_block(block, parameters, experts)

    show(name, fastest(run_path), fastest(run_method, REFERENCE_REPEAT))


if __name__ == "__main__":
    main()
