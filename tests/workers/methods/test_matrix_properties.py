"""What must hold of the slerp family, the whole-matrix methods and Neuron-Fusion, whatever the
numbers are.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmerge.workers.methods import neurons
from mmerge.workers.methods.adamms import choose_alpha, interpolate
from mmerge.workers.methods.arcee_fusion import fuse, importance_of, importance_threshold
from mmerge.workers.methods.iso_c import iso_c_merge
from mmerge.workers.methods.nearswap import nearswap
from mmerge.workers.methods.spectral import truncate
from mmerge.workers.methods.sphere import (
    combine,
    gram,
    karcher_coefficients,
    model_stock_ratio,
    multislerp_coefficients,
    nuslerp_coefficients,
    slerp_pair,
)
from mmerge.workers.methods.swudi import adaptive_filter, exponential_filter, spectral_merge
from mmerge.workers.methods.tsv import tsv_merge
from mmerge.workers.methods.wudi import (
    descend,
    optmerge_full_merge,
    optmerge_lora_merge,
    wudi_merge,
)
from mmerge.workers.runtime.cores import one_thread

MatrixMerge = Callable[[Sequence[torch.Tensor]], torch.Tensor]
few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10_000)


def slerp_coefficients(products: torch.Tensor, *, t: float) -> torch.Tensor:
    known = {
        f"{one}.{other}": (float(products[one, other]),) for one, other in ((0, 0), (0, 1), (1, 1))
    }
    return torch.tensor(slerp_pair(known, t=t), dtype=torch.float64)


def vectors(seed: int, count: int, length: int = 30) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, generator=generator) for _ in range(count)]


def matrices(seed: int, count: int, out: int = 7, width: int = 9) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.05 * torch.randn(out, width, generator=generator) for _ in range(count)]


def swudi(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    return spectral_merge(
        deltas,
        start="sum",
        keep=exponential_filter(time=300.0, rank_ratio=0.65),
        min_eigenvalue=1e-8,
    )


def aswudi(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    keep = adaptive_filter(rule="participation_sqrt", shape=deltas[0].shape)
    return spectral_merge(deltas, start="mean", keep=keep, min_eigenvalue=1e-8)


def wudi(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    return wudi_merge(deltas, learning_rate=1e-5, iterations=20)


def optmerge_full(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    return optmerge_full_merge(
        deltas, rank=max(1, 7 // len(deltas)), learning_rate=1e-5, iterations=20
    )


def optmerge_lora(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    return optmerge_lora_merge(
        deltas, rank=max(1, 7 // len(deltas)), learning_rate=1e-4, momentum=0.9, iterations=20
    )


EVERY = [tsv_merge, iso_c_merge, swudi, aswudi, wudi, optmerge_full, optmerge_lora]
# Adam takes the same step whatever the gradient's size, so the methods that use it scale with
# nothing.
LINEAR_IN_SCALE = [tsv_merge, iso_c_merge, swudi, aswudi]
every_merge = pytest.mark.parametrize("merge", EVERY, ids=[merge.__name__ for merge in EVERY])


def close(one: torch.Tensor, other: torch.Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(one, other, rtol=1e-3, atol=atol)


@every_merge
@few
@given(seed=seeds, count=st.integers(2, 4))
def test_the_order_of_the_experts_does_not_matter(
    merge: MatrixMerge, seed: int, count: int
) -> None:
    deltas = matrices(seed, count)
    close(merge(deltas[::-1]), merge(deltas))


@every_merge
@few
@given(seed=seeds, count=st.integers(1, 3))
def test_permuted_rows_give_the_merge_with_permuted_rows(
    merge: MatrixMerge, seed: int, count: int
) -> None:
    deltas = matrices(seed, count)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    close(merge([delta[order] for delta in deltas]), merge(deltas)[order])


@every_merge
def test_zero_task_vectors_give_zero(merge: MatrixMerge) -> None:
    assert torch.equal(merge([torch.zeros(7, 9)] * 3), torch.zeros(7, 9))


@every_merge
@few
@given(seed=seeds)
def test_an_expert_that_changed_nothing_brings_no_nan(merge: MatrixMerge, seed: int) -> None:
    assert torch.isfinite(merge([*matrices(seed, 2), torch.zeros(7, 9)])).all()


@pytest.mark.parametrize(
    "merge", LINEAR_IN_SCALE, ids=[merge.__name__ for merge in LINEAR_IN_SCALE]
)
@few
@given(seed=seeds, scale=st.floats(0.1, 10))
def test_scaled_task_vectors_give_the_scaled_merge(
    merge: MatrixMerge, seed: int, scale: float
) -> None:
    deltas = matrices(seed, 3)
    close(merge([scale * delta for delta in deltas]), scale * merge(deltas), atol=1e-4 * scale)


@pytest.mark.parametrize("merge", [tsv_merge, swudi, wudi, aswudi])
@few
@given(seed=seeds)
def test_one_expert_keeps_its_task_vector(merge: MatrixMerge, seed: int) -> None:
    (delta,) = matrices(seed, 1)
    close(merge([delta]), delta)


@few
@given(seed=seeds, count=st.integers(2, 3))
def test_tsv_of_identical_experts_is_their_leading_part(seed: int, count: int) -> None:
    (delta,) = matrices(seed, 1)
    close(tsv_merge([delta] * count), truncate(delta, rank=7 // count))


@few
@given(seed=seeds)
def test_iso_c_has_a_flat_spectrum_of_the_same_sum(seed: int) -> None:
    deltas = matrices(seed, 3)
    spectrum = torch.linalg.svdvals(iso_c_merge(deltas))
    close(
        spectrum, torch.full((7,), float(torch.linalg.svdvals(sum(deltas[1:], deltas[0])).mean()))
    )


@few
@given(seed=seeds)
def test_wudi_goes_down_the_loss_of_the_naive_sum(seed: int) -> None:
    deltas = [20 * delta for delta in matrices(seed, 3)]

    def loss(merged: torch.Tensor) -> float:
        return sum(
            float(((merged - delta) @ delta.T).square().sum() / delta.square().sum())
            for delta in deltas
        )

    start = deltas[0] + deltas[1] + deltas[2]
    assert loss(wudi_merge(deltas, learning_rate=1e-3, iterations=50)) < loss(start)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_descent_is_that_of_torch_bit_by_bit(optimizer: Literal["adam", "sgd"]) -> None:
    start, d, root = (
        matrices(1, 1)[0],
        matrices(2, 1)[0],
        torch.randn(9, 9, generator=torch.Generator().manual_seed(3)),
    )
    c = root @ root.T
    with one_thread():
        found = descend(
            start, (c, d), optimizer=optimizer, learning_rate=1e-3, momentum=0.9, iterations=30
        )
        parameter = torch.nn.Parameter(start.clone())
        stepper: torch.optim.Optimizer = torch.optim.Adam([parameter], lr=1e-3)
        if optimizer == "sgd":
            stepper = torch.optim.SGD([parameter], lr=1e-3, momentum=0.9)
        for _ in range(30):
            parameter.grad = 2 * (parameter.detach() @ c - d)
            stepper.step()
    assert torch.equal(found, parameter.detach())


MEASURE = """
import sys, threading, time, torch
from mmerge.workers.methods import find_method
from mmerge.workers.methods.interface import Block

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

torch.set_num_threads(1)
method, shape, num_experts = find_method(sys.argv[1]), (900, 1000), 3
torch.linalg.svd(torch.randn(30, 20)), torch.linalg.eigh(torch.eye(20))
few_steps = {"iterations": 3} if sys.argv[1] in ("wudi", "optmerge") else {}
numbers = method.parameters_model(**few_steps)
base = torch.randn(shape)
experts = [base + 0.01 * torch.randn(shape) for _ in range(num_experts)]
block = Block(base, experts, (), torch.float32, "model.layers.0.mlp.up_proj.weight", 0, shape)
before, peak, done = resident(), [0], threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], resident())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
method.merge_block(block, numbers, [method.expert_parameters_model()] * num_experts)
done.set()
watcher.join()
print(peak[0] - before, method.working_bytes(base.numel(), num_experts=num_experts, shape=shape))
"""


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="reads the resident size from /proc"
)
@pytest.mark.parametrize("method", ["tsv", "optmerge", "swudi"])
def test_a_matrix_takes_no_more_memory_than_its_method_says(method: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, method],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    used, bound = map(int, done.stdout.split())
    assert bound / 8 < used <= bound


@few
@given(seed=seeds, t=st.floats(0, 1))
def test_slerp_goes_from_one_to_the_other_and_keeps_equal_norms(seed: int, t: float) -> None:
    one, other = (vector / vector.norm() for vector in vectors(seed, 2))
    products = gram([one, other])
    for coefficients in (slerp_coefficients(products, t=t), nuslerp_coefficients(products, t=t)):
        close(combine(coefficients, [one, other]).norm(), torch.tensor(1.0))
    close(combine(slerp_coefficients(products, t=0), [one, other]), one)
    close(combine(slerp_coefficients(products, t=1), [one, other]), other)
    swapped = combine(slerp_coefficients(gram([other, one]), t=1 - t), [other, one])
    close(swapped, combine(slerp_coefficients(products, t=t), [one, other]))


def test_slerp_of_a_zero_vector_or_of_equal_ones_is_linear() -> None:
    zero, one = torch.zeros(4), torch.tensor([1.0, 2.0, 3.0, 4.0])
    close(combine(slerp_coefficients(gram([one, one]), t=0.3), [one, one]), one)
    assert torch.isfinite(slerp_coefficients(gram([zero, zero]), t=0.3)).all()
    assert torch.isfinite(nuslerp_coefficients(gram([zero, one]), t=0.3)).all()


@few
@given(seed=seeds, count=st.integers(2, 5))
def test_means_on_the_sphere_depend_on_no_order_and_keep_what_is_equal(
    seed: int, count: int
) -> None:
    found = vectors(seed, count)

    def karcher(given_vectors: list[torch.Tensor]) -> torch.Tensor:
        return combine(
            karcher_coefficients(gram(given_vectors), max_iterations=30, tolerance=1e-7),
            given_vectors,
        )

    def multislerp(given_vectors: list[torch.Tensor]) -> torch.Tensor:
        coefficients = multislerp_coefficients(
            gram(given_vectors), weights=[1.0] * len(given_vectors), normalize=True
        )
        assert coefficients is not None
        return combine(coefficients, given_vectors)

    for mean in (karcher, multislerp):
        close(mean(found[::-1]), mean(found), atol=1e-4)
        close(mean([found[0]] * count), found[0])
        close(mean([3 * vector for vector in found]), 3 * mean(found), atol=1e-4)


@few
@given(seed=seeds)
def test_the_karcher_mean_of_two_is_the_middle_of_their_arc(seed: int) -> None:
    one, other = (vector / vector.norm() for vector in vectors(seed, 2))
    middle = combine(slerp_coefficients(gram([one, other]), t=0.5), [one, other])
    close(
        combine(
            karcher_coefficients(gram([one, other]), max_iterations=50, tolerance=1e-9),
            [one, other],
        ),
        middle,
    )


def test_opposite_directions_have_no_mean_on_the_sphere() -> None:
    (one,) = vectors(1, 1)
    assert multislerp_coefficients(gram([one, -one]), weights=[1.0, 1.0], normalize=True) is None


@few
@given(seed=seeds, count=st.integers(2, 5))
def test_model_stock_takes_equal_experts_whole_and_does_not_mind_scale(
    seed: int, count: int
) -> None:
    deltas = vectors(seed, count)
    close(model_stock_ratio(gram([deltas[0]] * count)), torch.tensor(1.0, dtype=torch.float64))
    close(model_stock_ratio(gram([7 * delta for delta in deltas])), model_stock_ratio(gram(deltas)))
    assert float(model_stock_ratio(gram([torch.zeros(5)] * count))) == 0.0


@few
@given(seed=seeds, t=st.floats(1e-4, 1))
def test_nearswap_is_the_naive_loop(seed: int, t: float) -> None:
    base, expert = vectors(seed, 2)
    expert[3] = base[3]
    naive = [
        b + min(1.0, t / abs(b - e)) * (e - b) if b != e else b
        for b, e in zip(base.tolist(), expert.tolist(), strict=True)
    ]
    close(nearswap(base, expert, t=t), torch.tensor(naive))


@few
@given(seed=seeds)
def test_arcee_fusion_takes_the_outliers_and_nothing_else(seed: int) -> None:
    base, delta = matrices(seed, 2)
    expert = base + delta
    importance = importance_of(base, expert)
    flat = sorted(importance.flatten().tolist())
    last = len(flat) - 1
    first, median, third = flat[int(0.25 * last)], flat[int(0.5 * last)], flat[int(0.75 * last)]
    assert importance_threshold(importance) == pytest.approx(
        median + 1.5 * (third - first), rel=1e-6
    )
    taken = importance >= importance_threshold(importance)
    assert torch.equal(fuse(base, expert), torch.where(taken, expert, base))


def test_interpolation_ends_at_both_experts() -> None:
    one, other = vectors(5, 2)
    assert torch.equal(interpolate(one, other, alpha=0.0), one)
    assert torch.equal(interpolate(one, other, alpha=1.0), other)


@few
@given(st.permutations(range(6)))
def test_the_chosen_alpha_does_not_depend_on_the_order_of_questions_or_on_case(
    order: list[int],
) -> None:
    answers = {
        0.0: ["a", "b", "c", "d", "e", "f"],
        0.1: ["A", "x", "y", "d", "e", "f"],
        0.2: ["a", "X", "y", "d", "E", "z"],
    }
    choice = choose_alpha(
        {alpha: [found[place] for place in order] for alpha, found in answers.items()}
    )
    assert (choice.differences, choice.best, choice.alpha) == ((2, 1), (0.2,), 0.2)


@pytest.mark.parametrize("answers", [{0.0: ["a"]}, {0.0: ["a"], 0.1: []}, {0.0: [], 0.1: []}])
def test_answers_that_cannot_be_compared_are_refused(answers: dict[float, list[str]]) -> None:
    with pytest.raises(ValueError, match="alpha"):
        choose_alpha(answers)


SHAPES = {
    "mlp.gate_proj": (6, 4),
    "mlp.up_proj": (6, 4),
    "mlp.down_proj": (4, 6),
    "self_attn.v_proj": (2, 4),
    "self_attn.o_proj": (4, 4),
}


@few
@given(seed=seeds, suppress=st.floats(0, 1), keep_ratio=st.floats(0.05, 1))
def test_a_restored_norm_is_that_of_the_whole_change(
    seed: int, suppress: float, keep_ratio: float
) -> None:
    (delta,) = matrices(seed, 1)
    squares = delta.double().square().sum(dim=1)
    kept = squares >= neurons.keep_threshold(squares, keep_ratio=keep_ratio)
    factor = neurons.restoring_factor(squares, kept, suppress=suppress)
    changed = delta.double() * torch.where(kept, factor, suppress).unsqueeze(-1)
    assert float(changed.norm()) == pytest.approx(float(delta.double().norm()), rel=1e-6)


@few
@given(seed=seeds)
def test_scores_of_neurons_are_those_of_the_naive_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    deltas = {
        f"layers.0.{name}.weight": torch.randn(shape, generator=generator)
        for name, shape in SHAPES.items()
    }
    shapes = {name: delta.shape for name, delta in deltas.items()}
    groups = (
        neurons.feed_forward_group(shapes),
        neurons.attention_group(shapes, head_dim=1, with_query_key=False),
    )
    for group in groups:
        assert group is not None
        measured = {
            part.name: neurons.measure_part(deltas[part.name], deltas[part.name], axis=part.axis)
            for part in group.parts
        }
        scores = neurons.score_neurons(group, measured, score="l2")
        for neuron in range(group.num_neurons):
            total = 0.0
            for part in group.parts:
                for place, owner in enumerate(part.neurons.tolist()):
                    if owner == neuron:
                        row = (
                            deltas[part.name][place]
                            if part.axis == 0
                            else deltas[part.name][:, place]
                        )
                        total += sum(float(value) ** 2 for value in row)
            assert float(scores[neuron]) == pytest.approx(math.sqrt(total), rel=1e-9)
        assert torch.equal(
            neurons.score_neurons(group, measured, score="relative"),
            torch.ones(group.num_neurons, dtype=torch.float64),
        )


def test_grouped_queries_share_the_value_row_of_their_head() -> None:
    shapes = {
        "layers.0.self_attn.v_proj.weight": (4, 8),
        "layers.0.self_attn.o_proj.weight": (8, 8),
        "layers.0.self_attn.q_proj.weight": (8, 8),
        "layers.0.self_attn.k_proj.weight": (4, 8),
    }
    group = neurons.attention_group(shapes, head_dim=2, with_query_key=True)
    assert group is not None
    owners = {part.name.split(".")[-2]: part.neurons.tolist() for part in group.parts}
    # Heads 0 and 1 of the query use key-value head 0, heads 2 and 3 use head 1; each head has two
    # entries.
    assert owners["o_proj"] == owners["q_proj"] == [0, 1, 0, 1, 2, 3, 2, 3]
    assert owners["v_proj"] == owners["k_proj"] == [0, 1, 2, 3]
