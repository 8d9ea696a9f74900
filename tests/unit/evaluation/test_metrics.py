"""Distances between feature sets: closed forms, and torch-fidelity's figures for the same features."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.evaluation import metrics
from trainer.evaluation.survey import FeatureMoments


def gaussian(count: int, width: int, seed: int, *, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) * scale + shift


def modes(per_mode: int, centres: list[float], seed: int, width: int = 8) -> Tensor:
    """Narrow clusters, far apart."""
    return torch.cat([gaussian(per_mode, width, seed + i, shift=c) for i, c in enumerate(centres)])


def fid(first: Tensor, second: Tensor, block: int = 37) -> float:
    parts = []
    for features in (first, second):
        moments = FeatureMoments(features.shape[1])
        for part in features.split(block):
            moments.add(part)
        parts += [moments.mean(), moments.covariance()]
    return metrics.frechet_distance(*parts)


def test_two_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    covariance = mixing @ mixing.T
    mean = torch.randn(6, generator=generator, dtype=torch.float64)
    zero = torch.zeros(6, dtype=torch.float64)
    # the same shape, moved and scaled: |m|^2 + (a - 1)^2 tr S
    moved = metrics.frechet_distance(zero, covariance, mean, 9.0 * covariance)
    assert moved == pytest.approx(float(mean.square().sum() + 4 * covariance.trace()), rel=1e-12)
    # covariances that commute: the sum over axes of (a - b)^2
    a, b = torch.arange(1.0, 7.0, dtype=torch.float64), torch.arange(6.0, 0.0, -1, dtype=torch.float64)
    axes = metrics.frechet_distance(zero, a.square().diag(), zero, b.square().diag())
    assert axes == pytest.approx(float((a - b).square().sum()), rel=1e-12)


def test_frechet_distance_with_fewer_pictures_than_dimensions() -> None:
    few = gaussian(20, 200, 1)
    assert fid(few, few) == pytest.approx(0.0, abs=1e-10)
    # Both covariances live in the span of 19 directions, where the distance has its ordinary form.
    basis = torch.linalg.qr((few - few.mean(dim=0)).double().T).Q[:, :19]
    other = (gaussian(400, 19, 2).double() @ basis.T).float()
    inside = fid((few.double() @ basis), (other.double() @ basis))
    outside = few.double().mean(dim=0) - basis @ (basis.T @ few.double().mean(dim=0))
    assert fid(few, other) == pytest.approx(inside + float(outside.square().sum()), rel=1e-6)


def test_identical_sets() -> None:
    x = gaussian(300, 16, 3)
    assert fid(x, x) == pytest.approx(0.0, abs=1e-10)
    assert metrics.precision_and_recall(x, x.clone()) == {
        "precision": 1.0, "recall": 1.0, "density": pytest.approx(1.0, abs=0.4), "coverage": 1.0,
    }  # fmt: skip
    assert metrics.monge_distance(x, x) == 0.0
    unit = torch.nn.functional.normalize(x, dim=1)
    assert metrics.clip_discrepancy(unit, unit) == pytest.approx(0.0, abs=1e-9)


def test_disjoint_sets() -> None:
    x, y = gaussian(200, 8, 4), gaussian(200, 8, 5, shift=100.0)
    assert metrics.precision_and_recall(x, y) == {
        "precision": 0.0, "recall": 0.0, "density": 0.0, "coverage": 0.0,
    }  # fmt: skip
    assert fid(x, y) == pytest.approx(8 * 100.0**2, rel=0.01)
    assert metrics.monge_distance(x, y) == pytest.approx(3 * 8 * 100.0**2, rel=0.05)


def test_dropped_modes_lower_recall_and_not_precision() -> None:
    real = modes(200, [0.0, 50.0, 100.0, 150.0], seed=10)
    every = metrics.precision_and_recall(modes(200, [0.0, 50.0, 100.0, 150.0], seed=30), real)
    half = metrics.precision_and_recall(modes(200, [0.0, 50.0], seed=30), real)
    assert half["precision"] == pytest.approx(every["precision"], abs=0.05)
    assert half["density"] == pytest.approx(every["density"], abs=0.1)
    assert half["recall"] == pytest.approx(every["recall"] / 2, abs=0.02)
    assert half["coverage"] == pytest.approx(every["coverage"] / 2, abs=0.02)
    invented = metrics.precision_and_recall(real, modes(200, [0.0, 50.0], seed=30))
    assert invented["precision"] < 0.5 < invented["recall"]


def test_duplicates_shrink_the_balls_of_the_made_set_alone() -> None:
    real = gaussian(200, 8, 6)
    few = gaussian(20, 8, 7)
    copied = few.repeat(10, 1)  # every radius of the made set is 0, whatever the rounding of distances
    once, often = metrics.precision_and_recall(few, real), metrics.precision_and_recall(copied, real)
    assert often["precision"] == pytest.approx(once["precision"])
    assert often["density"] == pytest.approx(once["density"])
    assert often["recall"] == 0.0 < once["recall"]
    # copies in both sets: radii of 0 still hold the vector itself
    assert metrics.precision_and_recall(copied, copied.flip(0))["recall"] == 1.0


def test_kernel_distance_is_unbiased_and_its_kernel_is_cubic() -> None:
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    # off the diagonal (0 / 2 + 1)^3 = 1 in both sets; across: 8 and 1 twice each
    expected = 1 + 1 - 2 * (8 + 8 + 1 + 1) / 4
    assert metrics.kernel_distance(x, y, 2).mean == pytest.approx(expected)
    same = [
        metrics.kernel_distance(gaussian(40, 4, 2 * seed), gaussian(40, 4, 2 * seed + 1), 40).mean
        for seed in range(60)
    ]
    assert abs(np.mean(same)) < 3 * np.std(same) / math.sqrt(len(same))


def test_inception_score_of_known_classes() -> None:
    certain = torch.eye(10).repeat(2000, 1) * 1e4  # ten classes, each certain: KL is log 10
    assert metrics.inception_score(certain).mean == pytest.approx(10.0, rel=0.01)
    assert metrics.inception_score(torch.zeros(50, 10)).mean == pytest.approx(1.0)


def test_clip_discrepancy_by_hand() -> None:
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    expected = 1000 * (2 - 2 * math.exp(-2 / 200))
    assert metrics.clip_discrepancy(x, y) == pytest.approx(expected, rel=1e-12)


def test_monge_distance_of_a_shift_and_of_unequal_sets() -> None:
    x = gaussian(64, 3, 8)
    shift = torch.tensor([1.0, -2.0, 0.5])
    # E (u . s)^2 = |s|^2 / D for uniform directions, so 3 D of it is 3 |s|^2
    assert metrics.monge_distance(x + shift, x) == pytest.approx(3 * float(shift.square().sum()), rel=0.1)
    many = gaussian(4000, 3, 9)
    assert metrics.monge_distance(gaussian(500, 3, 10), many) < 0.3


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = gaussian(150, 8, 11), gaussian(130, 8, 12, shift=0.3)
    whole = (metrics.precision_and_recall(x, y), metrics.clip_discrepancy(x, y))
    subsets = metrics.kernel_distance(x, y, 50)
    monkeypatch.setattr(metrics, "WHOLE_KERNEL", 0)
    assert metrics.kernel_distance(x, y, 50).mean == pytest.approx(subsets.mean, rel=1e-9)
    monkeypatch.setattr(metrics, "CHUNK", 7)
    assert metrics.precision_and_recall(x, y) == whole[0]
    assert metrics.clip_discrepancy(x, y) == pytest.approx(whole[1], rel=1e-12)


class TestAgainstTorchFidelity:
    """The same features through torch-fidelity's own functions (pip install torch-fidelity)."""

    made = gaussian(400, 48, 21, shift=0.2).abs()
    real = gaussian(500, 48, 22, scale=1.3).abs()

    def test_fid(self) -> None:
        theirs = pytest.importorskip("torch_fidelity.metric_fid", reason="pip install torch-fidelity")
        parts = [theirs.fid_features_to_statistics(f.double()) for f in (self.made, self.real)]
        expected = theirs.fid_statistics_to_metric(*parts, verbose=False)["frechet_inception_distance"]
        assert fid(self.made, self.real) == pytest.approx(expected, rel=1e-9)
        assert expected > 1

    def test_kid(self) -> None:
        theirs = pytest.importorskip("torch_fidelity.metric_kid", reason="pip install torch-fidelity")
        expected = theirs.kid_features_to_metric(
            self.made.double(), self.real.double(), kid_subset_size=100, verbose=False
        )
        found = metrics.kernel_distance(self.made, self.real, 100)
        assert found.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
        assert found.deviation == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9)

    def test_inception_score(self) -> None:
        theirs = pytest.importorskip("torch_fidelity.metric_isc", reason="pip install torch-fidelity")
        expected = theirs.isc_features_to_metric(self.made * 3)
        found = metrics.inception_score(self.made * 3)
        assert found.mean == pytest.approx(expected["inception_score_mean"], rel=1e-9)
        assert found.deviation == pytest.approx(expected["inception_score_std"], rel=1e-9)

    def test_precision_and_recall(self) -> None:
        theirs = pytest.importorskip("torch_fidelity.metric_prc", reason="pip install torch-fidelity")
        expected = theirs.prc_features_to_metric(self.made.double(), self.real.double(), verbose=False)
        found = metrics.precision_and_recall(self.made, self.real)
        assert found["precision"] == pytest.approx(expected["precision"], abs=1e-6)
        assert found["recall"] == pytest.approx(expected["recall"], abs=1e-6)
        assert 0 < found["recall"] < 1


def test_moments_do_not_depend_on_the_order_or_the_deal_of_blocks() -> None:
    blocks = [gaussian(n, 5, n, scale=10.0 ** (n % 7 - 3)) for n in range(1, 40)]
    together = FeatureMoments(5)
    for block in blocks:
        together.add(block)
    for world_size in (2, 3, 5):
        ranks = [FeatureMoments(5) for _ in range(world_size)]
        for i, block in reversed(list(enumerate(blocks))):
            ranks[i % world_size].add(block)
        for other in ranks[1:]:
            ranks[0].merge(other.tensors())
        assert torch.equal(ranks[0].mean(), together.mean())
        assert torch.equal(ranks[0].covariance(), together.covariance())
    everything = torch.cat(blocks).double().numpy()
    np.testing.assert_allclose(together.mean().numpy(), everything.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(together.covariance().numpy(), np.cov(everything, rowvar=False), rtol=1e-9)
