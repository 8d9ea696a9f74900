"""Distances between two sets of features, and scores of one, as their papers and usual programs define them.

Features are [n, D] in float32 or float64; everything is computed in float64 on their device, in chunks, so
that memory grows with n and not with its square. "Made" is the set to be judged, "real" the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FEWEST = 2
"""Pictures without which nothing here is defined."""
SEED = 2020
"""torch-fidelity's, so that random splits and subsets are the same."""
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
SCORE_SPLITS = 10
PRECISION_NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5
CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
MIND_PROJECTIONS = 1000
WHOLE_KERNEL = 1 << 26
"""Numbers in a kernel matrix that is computed once for all subsets (half a gigabyte)."""
CHUNK = 2048
"""Rows of a matrix of distances that are in memory at a time."""
_SAME = 1e-12
"""Squared distance, relative to the squared norms, below which two vectors are one and differ by rounding."""


@dataclass(frozen=True)
class Spread:
    """A mean over random subsets or splits, and the standard deviation between them."""

    mean: float
    deviation: float


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Squared 2-Wasserstein distance of two Gaussians: FID (Heusel et al. 2017) of Inception's features.

        |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

    The last trace is the sum of the singular values of F1^T F2, where S = F F^T. That stays exact where there
    are fewer pictures than dimensions: the root of the singular product would turn rounding of 1e-16 into
    1e-8 in every one of the empty directions.
    """
    mean, other_mean = mean.double(), other_mean.double()
    covariance, other_covariance = covariance.double(), other_covariance.double()
    product = _factor(covariance).T @ _factor(other_covariance)
    shared = torch.linalg.svdvals(product).sum() if product.numel() else product.new_zeros(())
    traces = covariance.trace() + other_covariance.trace()
    return max(0.0, float((mean - other_mean).square().sum() + traces - 2 * shared))


def _factor(covariance: Tensor) -> Tensor:
    """F [D, rank] with F F^T = S; directions that hold nothing but rounding are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    least = float(values.abs().max()) * len(values) * torch.finfo(torch.float64).eps
    kept = values > least
    return vectors[:, kept] * values[kept].sqrt()


def kernel_distance(made: Tensor, real: Tensor, subset_size: int) -> Spread:
    """KID (Binkowski et al. 2018): unbiased squared MMD under (x y / D + 1)^3, over random subsets.

    The subsets are those of torch-fidelity for the same features in the same order.
    """
    generator = np.random.RandomState(SEED)
    subsets = [
        tuple(_chosen(generator, len(each), subset_size, each.device) for each in (made, real))
        for _ in range(KID_SUBSETS)
    ]
    ours, theirs = [x for x, _ in subsets], [y for _, y in subsets]
    within = _kernel_sums(made, made, ours, ours) + _kernel_sums(real, real, theirs, theirs)
    across = _kernel_sums(made, real, ours, theirs)
    found = within / (subset_size * (subset_size - 1)) - 2 * across / (subset_size * subset_size)
    return Spread(float(found.mean()), float(found.std(correction=0)))


def _chosen(
    generator: np.random.RandomState,
    count: int,
    size: int,
    device: torch.device,
) -> Tensor:
    return torch.from_numpy(generator.choice(count, size, replace=False)).to(device)


def _kernel_sums(x: Tensor, y: Tensor, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """Sums of the kernel over each subset, [subsets] fp64; within one set, without its diagonal.

    Of small sets, the kernel between all is cheaper than that of each subset anew.
    """
    if len(x) * len(y) <= WHOLE_KERNEL:
        kernel = _cubic(x.double(), y.double())
        chosen = [_indicators(parts, len(each), x.device) for parts, each in ((rows, x), (columns, y))]
        sums = ((chosen[0] @ kernel) * chosen[1]).sum(dim=1)
        return sums - chosen[0] @ kernel.diagonal() if x is y else sums
    found = []
    for i, j in zip(rows, columns, strict=True):
        part = _cubic(x[i].double(), y[j].double())
        found.append(part.sum() - part.diagonal().sum() if x is y else part.sum())
    return torch.stack(found)


def _indicators(parts: Sequence[Tensor], count: int, device: torch.device) -> Tensor:
    """[subsets, count], 1 where a vector belongs to a subset."""
    found = torch.zeros(len(parts), count, dtype=torch.float64, device=device)
    for row, part in zip(found, parts, strict=True):
        row[part] = 1.0
    return found


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    base = (x @ y.T).div_(x.shape[1]).add_(1.0)
    return base * base * base


def inception_score(logits: Tensor) -> Spread:
    """Inception Score (Salimans et al. 2016): exp of the mean KL from p(class | picture) to p(class).

    Mean and deviation over ten splits of the shuffled set, the splits of torch-fidelity.

    Args:
        logits: [n, classes]; torch-fidelity's are those without the bias.
    """
    order = np.random.RandomState(SEED).permutation(len(logits))
    shuffled = logits[torch.from_numpy(order).to(logits.device)]
    splits = min(SCORE_SPLITS, len(logits))
    scores = []
    for i in range(splits):
        part = shuffled[i * len(logits) // splits : (i + 1) * len(logits) // splits].double()
        log_p = part.log_softmax(dim=1)
        p = log_p.exp()
        # a class that no picture of the split has adds 0, not 0 * inf
        log_q = p.mean(dim=0).clamp_min(torch.finfo(torch.float64).tiny).log()
        scores.append(math.exp(float((p * (log_p - log_q)).sum(dim=1).mean())))
    return Spread(float(np.mean(scores)), float(np.std(scores)))


def precision_and_recall(made: Tensor, real: Tensor) -> dict[str, float]:
    """Shares of one set inside the balls of the other.

    Improved precision and recall (Kynkaanniemi et al. 2019): balls to the third neighbour; density and
    coverage (Naeem et al. 2020): to the fifth. Balls are closed. Where there are no more pictures than
    neighbours, the farthest one counts.
    """
    made_radius = _radii(made, PRECISION_NEIGHBOURS)
    real_radius = _radii(real, PRECISION_NEIGHBOURS)
    wide_radius = _radii(real, DENSITY_NEIGHBOURS)
    neighbours = min(DENSITY_NEIGHBOURS, len(real) - 1)
    inside_real = inside_balls = 0
    nearest = torch.full((len(real),), math.inf, dtype=torch.float64, device=real.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, distances in _distances(made, real):
        inside_real += int((distances <= real_radius).any(dim=1).sum())
        inside_balls += int((distances <= wide_radius).sum())
        nearest = torch.minimum(nearest, distances.amin(dim=0))
        recalled |= (distances <= made_radius[rows, None]).any(dim=0)
    return {
        "precision": inside_real / len(made),
        "recall": float(recalled.double().mean()),
        "density": inside_balls / (neighbours * len(made)),
        "coverage": float((nearest <= wide_radius).double().mean()),
    }


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Squared distance to the k-th nearest other vector, [n]."""
    k = min(neighbours, len(features) - 1) + 1  # the nearest is the vector itself
    found = [distances.kthvalue(k, dim=1).values for _, distances in _distances(features, features)]
    return torch.cat(found)


def _distances(first: Tensor, second: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances of chunks of rows, [chunk, n2]; exactly 0 between vectors that are the same."""
    second = second.double()
    norms = second.square().sum(dim=1)
    for start in range(0, len(first), CHUNK):
        rows = slice(start, min(start + CHUNK, len(first)))
        x = first[rows].double()
        sums = x.square().sum(dim=1, keepdim=True) + norms
        distances = sums - 2 * (x @ second.T)
        yield rows, torch.where(distances <= _SAME * sums, 0.0, distances)


def clip_discrepancy(made: Tensor, real: Tensor) -> float:
    """CMMD (Jayasumana et al. 2024): 1000 times the squared MMD of unit vectors, Gaussian kernel of width 10.

    The biased estimate, as theirs: 0 for identical sets.
    """
    within = _kernel_mean(made, made) + _kernel_mean(real, real)
    return CMMD_SCALE * max(0.0, within - 2 * _kernel_mean(made, real))


def _kernel_mean(first: Tensor, second: Tensor) -> float:
    total = sum(
        float(torch.exp(-distances / (2 * CMMD_SIGMA**2)).sum()) for _, distances in _distances(first, second)
    )
    return total / (len(first) * len(second))


def monge_distance(made: Tensor, real: Tensor) -> float:
    """MIND (Berthet et al. 2026): 3 D times the squared 2-Wasserstein distance, mean of 1000 projections.

    Of the larger set, as many vectors as the smaller one has are drawn; directions and draws are seeded.
    """
    generator = torch.Generator().manual_seed(SEED)
    count, width = min(len(made), len(real)), made.shape[1]
    x, y = (
        (
            f if len(f) == count else f[torch.randperm(len(f), generator=generator)[:count].to(f.device)]
        ).double()
        for f in (made, real)
    )
    directions = torch.randn(width, MIND_PROJECTIONS, generator=generator, dtype=torch.float64).to(x.device)
    directions /= directions.norm(dim=0)
    total = 0.0
    for part in directions.split(100, dim=1):
        gaps = (x @ part).sort(dim=0).values - (y @ part).sort(dim=0).values
        total += float(gaps.square().mean(dim=0).sum())
    return 3 * width * total / MIND_PROJECTIONS
