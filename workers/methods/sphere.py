"""Interpolation on spheres as linear combinations: every coefficient follows from the inner
products of the tensors.

The functions take Gram matrices, float64 [..., n, n], and give coefficients, float64 [..., n];
leading dimensions are independent problems (one per row of a matrix, say). So a tensor needs two
passes of sums, and its size does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from mmerge.workers.methods.interface import ProductVectors, Stage

GRAM = "gram"
"""The stage in which inner products are summed."""
COLINEAR_COSINE = 0.9995
"""Above this |cosine| slerp interpolates linearly, as the common implementation does."""
_MIN_NORM = 1e-8


def gram(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the inner products of vectors along their last dimension, float64 [..., n, n]."""
    stacked = [vector.to(torch.float64) for vector in vectors]
    rows = [
        torch.stack([(row * column).sum(dim=-1) for column in stacked], dim=-1) for row in stacked
    ]
    return torch.stack(rows, dim=-2)


def gram_stage(*, first: int = 1, from_base: bool = False) -> Stage:
    """Return the stage that sums the products of inputs from `first` on, less the base if asked."""
    return Stage(GRAM, "sums", "tensor", ProductVectors(first, from_base))


def measure_products(vectors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the entrywise products whose sums over a tensor are its Gram matrix, by "row.column"
    with row ≤ column.
    """
    count = len(vectors)
    return {
        f"{row}.{column}": vectors[row] * vectors[column]
        for row in range(count)
        for column in range(row, count)
    }


def read_gram(measured: Mapping[str, Sequence[float]], *, count: int) -> torch.Tensor:
    """Return the Gram matrix, float64 [count, count], from the sums of `measure_products`."""
    rows = [
        [measured[f"{min(row, column)}.{max(row, column)}"][0] for column in range(count)]
        for row in range(count)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def combine(coefficients: torch.Tensor, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return Σ cᵢ·vᵢ, float32, for coefficients [..., n] and n vectors [..., length]; summed in the
    order given.
    """
    total = torch.zeros_like(vectors[0])
    for index, vector in enumerate(vectors):
        total += coefficients[..., index].unsqueeze(-1).to(torch.float32) * vector
    return total


def norms_of(products: torch.Tensor) -> torch.Tensor:
    """Return the norms of the vectors of a Gram matrix, [..., n]."""
    return products.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()


def slerp_pair(measured: Mapping[str, Sequence[float]], *, t: float) -> tuple[float, float]:
    """Return the two coefficients of spherical interpolation from the first vector (t = 0) to the
    second (t = 1).

    Nearly colinear vectors, and vectors of norm 0, are interpolated linearly. Shoemake 1985;
    thresholds as in mergekit.

    Args:
        measured: the sums of `measure_products`, float64. NaN where a vector holds NaN or Inf, as
            are the coefficients then.
    """
    first, product, second = (measured[name][0] for name in ("0.0", "0.1", "1.1"))
    if math.isnan(first + product + second):
        return math.nan, math.nan
    norms = [math.sqrt(max(square, 0.0)) for square in (first, second)]
    scales = [norm if norm > _MIN_NORM else 1.0 for norm in norms]
    cosine = max(-1.0, min(product / (scales[0] * scales[1]), 1.0))
    if abs(cosine) > COLINEAR_COSINE:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin(angle * (1 - t)) / math.sin(angle), math.sin(angle * t) / math.sin(angle)


def nuslerp_coefficients(products: torch.Tensor, *, t: float) -> torch.Tensor:
    """Return the two coefficients of slerp with a fallback for exactly colinear vectors only
    (mergekit's NuSLERP).
    """
    norms = norms_of(products).clamp(min=1e-7)
    angle = torch.arccos((products[..., 0, 1] / (norms[..., 0] * norms[..., 1])).clamp(-1, 1))
    sine = torch.sin(angle)
    curved = torch.stack(
        [torch.sin(angle * (1 - t)), torch.sin(angle * t)], dim=-1
    ) / sine.unsqueeze(-1)
    straight = torch.tensor([1 - t, t], dtype=products.dtype, device=products.device).expand_as(
        curved
    )
    return torch.where((sine.abs() < 1e-8).unsqueeze(-1), straight, curved)


def multislerp_coefficients(
    products: torch.Tensor, *, weights: Sequence[float], normalize: bool
) -> torch.Tensor | None:
    """Return the coefficients of barycentric interpolation on the sphere, in the tangent space at
    the weighted mean.

    mergekit's Multi-SLERP. None where the weighted mean of the directions vanishes, so that there
    is no tangent space.
    """
    weight = torch.tensor(weights, dtype=products.dtype, device=products.device)
    if normalize:
        weight = weight / weight.sum()
    norms = norms_of(products)
    unit = 1 / (norms + _MIN_NORM)
    cosines = products * unit.unsqueeze(-1) * unit.unsqueeze(-2)
    mean_norm = ((cosines @ weight) @ weight).clamp(min=0).sqrt()
    if float(mean_norm) < _MIN_NORM:
        return None
    mean = weight / mean_norm
    # In coefficients of the unit vectors: tangent = Σ wᵢ(uᵢ − (uᵢ·mean)·mean).
    tangent = weight - (weight * (cosines @ mean)).sum() * mean
    angle = ((cosines @ tangent) @ tangent).clamp(min=0).sqrt() + _MIN_NORM
    result = mean * torch.cos(angle) + tangent * (torch.sin(angle) / angle)
    return result * unit * (norms * weight).sum()


def karcher_coefficients(
    products: torch.Tensor, *, max_iterations: int, tolerance: float
) -> torch.Tensor:
    """Return the coefficients of the Karcher mean of the directions times the mean norm; all
    vectors weigh the same.

    Riemannian gradient descent on the unit sphere: mean ← exp(mean, mean of the logarithms), until
    the step is shorter than `tolerance` (radians). Vectors of norm up to `tolerance` have no
    direction; they count in the mean norm only.
    """
    norms = norms_of(products)
    valid = norms > tolerance
    count = int(valid.sum())
    if not count:
        return torch.zeros_like(norms)
    unit = torch.where(valid, 1 / norms.clamp(min=1e-300), torch.zeros_like(norms))
    cosines = products * unit.unsqueeze(-1) * unit.unsqueeze(-2)
    share = valid.to(products.dtype) / count
    length = float(((cosines @ share) @ share).clamp(min=0).sqrt())
    if length < tolerance:
        mean = torch.zeros_like(share)
        mean[int(valid.nonzero()[0])] = 1
    else:
        mean = share / length
    for _ in range(max_iterations):
        dots = (cosines @ mean).clamp(-1, 1)
        angles = torch.arccos(dots)
        moved = valid & (angles >= tolerance)
        factors = torch.where(moved, share * angles / torch.sin(angles), torch.zeros_like(angles))
        factors = torch.nan_to_num(factors, nan=0.0, posinf=0.0)
        tangent = factors - (factors * dots).sum() * mean
        step = ((cosines @ tangent) @ tangent).clamp(min=0).sqrt()
        if float(step) < tolerance:
            break
        mean = torch.cos(step) * mean + torch.sin(step) / step * tangent
        mean = mean / ((cosines @ mean) @ mean).clamp(min=0).sqrt()
    return mean * unit * norms.mean()


def model_stock_ratio(products: torch.Tensor) -> torch.Tensor:
    """Return t of Model Stock, [...]: how far to go from the base to the mean of the experts.

    t = n·cosθ / (1 + (n−1)·cosθ) with cosθ the mean of the pairwise cosines of the task vectors,
    whose inner products are given. Model Stock (arXiv 2403.19522), equation 5; the mean over pairs
    is mergekit's reading for n > 2.
    """
    count = products.shape[-1]
    norms = norms_of(products)
    cosines = []
    for row in range(count):
        for column in range(row + 1, count):
            product = (norms[..., row] * norms[..., column]).clamp(min=1e-6)
            cosines.append((products[..., row, column] / product).clamp(-1, 1))
    cosine = torch.stack(cosines).mean(dim=0)
    return count * cosine / (1 + (count - 1) * cosine)
