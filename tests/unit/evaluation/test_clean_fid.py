"""What clean-fid 0.1.35 makes of the same pictures and the same features: resizing, FID and KID.

Its networks would have to be downloaded; here our small random one stands for them in both programs.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from trainer.__main__ import main
from trainer.evaluation import metrics
from trainer.evaluation.features import to_size_unrounded
from trainer.evaluation.networks import RANDOM_EDGE, RandomFeatures
from trainer.evaluation.survey import FeatureMoments

fid = pytest.importorskip("cleanfid.fid", reason="pip install clean-fid==0.1.35")
resize = pytest.importorskip("cleanfid.resize", reason="pip install clean-fid==0.1.35")

CPU = torch.device("cpu")


def picture(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """Noise over hard edges, which bicubic overshoots."""
    generator = np.random.default_rng(seed)
    made = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    made[: height // 2, : width // 3] = 0
    made[height // 2 :, width // 2 :] = 255
    return made


@pytest.mark.parametrize("edge", [299, 64])
@pytest.mark.parametrize("size", [(512, 512), (299, 299), (97, 41), (30, 700), (8, 8)])
def test_resizing_is_theirs_bit_for_bit(size: tuple[int, int], edge: int) -> None:
    given = picture(sum(size), *size)
    expected = resize.make_resizer("PIL", False, "bicubic", (edge, edge))(given)
    found = to_size_unrounded(given, edge)
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found.transpose(1, 2, 0), expected)


def test_figures_of_folders_are_theirs(tmp_path: Path) -> None:
    """PNG, JPEG and grey pictures of several sizes, more of them than the features have dimensions."""
    for name, first in (("made", 0), ("real", 500)):
        (tmp_path / name).mkdir()
        for i in range(90):
            image = Image.fromarray(picture(first + i, 50 + (7 * i) % 60, 40 + (11 * i) % 70))
            if name == "made":  # darker, so that the distances are far above what rounding leaves of them
                image = image.point(lambda value: value // 2)
                image = image.convert("L") if i % 5 == 0 else image
            image.save(tmp_path / name / f"{i}.{'jpg' if i % 3 == 0 else 'png'}")

    network = RandomFeatures(CPU)

    def pool(batch: Tensor) -> Tensor:
        return network([each.numpy() for each in batch], ("",) * len(batch))["pool"]

    options = {"model": pool, "num_workers": 0, "batch_size": 1, "device": CPU, "verbose": False}
    options["custom_fn_resize"] = resize.make_resizer("PIL", False, "bicubic", (RANDOM_EDGE, RANDOM_EDGE))
    made, real = (
        fid.get_folder_features(str(tmp_path / name), **options).astype(np.float64)
        for name in ("made", "real")
    )
    assert made.shape == real.shape == (90, 64)

    out = tmp_path / "figures.json"
    command = ["evaluate", "fidelity", str(tmp_path / "made"), "--reference", str(tmp_path / "real")]
    assert main([*command, "--features", "random", "--metrics", "fid,kid", "--out", str(out)]) == 0
    ours = json.loads(out.read_text())["figures"]
    assert ours["fd_random"] == pytest.approx(fid.fid_from_feats(made, real), rel=1e-6)
    # Subsets of as many pictures as there are: whatever is drawn is the whole set.
    assert ours["kd_random"] == pytest.approx(fid.kernel_distance(real, made, num_subsets=3), rel=1e-6)
    assert min(ours["fd_random"], ours["kd_random"]) > 0.01


def test_distances_between_the_same_features_are_theirs() -> None:
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(400, 48, generator=generator).abs()
    real = (1.3 * torch.randn(500, 48, generator=generator) + 0.2).abs()
    parts = []
    for features in (made, real):
        moments = FeatureMoments(48)
        for block in features.split(37):
            moments.add(block)
        parts += [moments.mean(), moments.covariance()]
    x, y = (features.double().numpy() for features in (made, real))
    expected = fid.fid_from_feats(x, y)
    assert metrics.frechet_distance(*parts) == pytest.approx(expected, rel=1e-6)
    assert expected > 1

    # Theirs draws from NumPy's global generator, of its second set first: seeded like ours, the same subsets.
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(metrics.SEED)  # noqa: NPY002
    drawn = fid.kernel_distance(y, x, num_subsets=metrics.KID_SUBSETS, max_subset_size=100)
    np.random.set_state(state)  # noqa: NPY002
    assert metrics.kernel_distance(made, real, 100).mean == pytest.approx(drawn, rel=1e-9)
