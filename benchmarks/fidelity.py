"""Fidelity figures: ours against torch-fidelity's functions on the same features, and a pass over pictures.

    python benchmarks/fidelity.py                    # about five minutes on two cores
    python benchmarks/fidelity.py --pictures 2000 --count 5000

Features are [count, 2048] float32 whose spectrum falls by four orders of magnitude, about as Inception's
does. Each figure is computed once by either; torch-fidelity computes KID, precision and recall in float32,
ours are in float64. The pass reads PNGs of 256 px with the random network, whose cost is small: what is left
is decoding, resizing and sums.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.tools.picture_sets import open_pictures
from trainer.evaluation import metrics
from trainer.evaluation.features import FeatureNetwork
from trainer.evaluation.networks import FeatureOptions, build_networks
from trainer.evaluation.survey import FeatureMoments, SurveyOptions, survey

WIDTH = 2048
BLOCK = 64


def features(count: int, seed: int) -> Tensor:
    """Rows of Gaussians whose deviations fall."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=generator) * torch.logspace(0, -2, WIDTH) + 0.4


def moments_of(rows: Tensor) -> FeatureMoments:
    """Streamed by blocks, as a survey does."""
    found = FeatureMoments(WIDTH)
    for block in rows.split(BLOCK):
        found.add(block)
    return found


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    began = time.monotonic()
    result = action()
    return time.monotonic() - began, result


def _surveyed(folder: str, options: SurveyOptions, networks: Mapping[str, FeatureNetwork]) -> Any:
    return survey(open_pictures(folder), networks, options, torch.device("cpu"))


def distances(count: int) -> None:
    """Seconds and values of each figure by both."""
    from torch_fidelity import metric_fid, metric_kid, metric_prc

    made, real = features(count, 1), features(count, 2) * 1.1
    seconds, ours = timed(lambda: [moments_of(rows) for rows in (made, real)])
    theirs_s, theirs = timed(lambda: [metric_fid.fid_features_to_statistics(rows) for rows in (made, real)])
    rate = f"{2 * count / seconds:.0f} pictures/s"
    print(f"| means and covariances | {seconds:.1f} s ({rate}) | {theirs_s:.1f} s |")
    rows: list[tuple[str, Callable[[], Any], Callable[[], Any]]] = [
        (
            "FID",
            lambda: metrics.frechet_distance(*(part() for m in ours for part in (m.mean, m.covariance))),
            lambda: metric_fid.fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"],
        ),
        (
            "KID",
            lambda: metrics.kernel_distance(made, real, metrics.KID_SUBSET_SIZE).mean,
            lambda: metric_kid.kid_features_to_metric(made, real, verbose=False)[
                "kernel_inception_distance_mean"
            ],
        ),
        (
            "precision (ours also density, coverage)",
            lambda: metrics.precision_and_recall(made, real)["precision"],
            lambda: metric_prc.prc_features_to_metric(made, real, verbose=False)["precision"],
        ),
        ("MIND", lambda: metrics.monge_distance(made, real), lambda: None),
    ]
    for name, mine, other in rows:
        (a, value), (b, expected) = timed(mine), timed(other)
        shown = "not there" if expected is None else f"{b:.1f} s: {expected:.7g}"
        print(f"| {name} | {a:.1f} s: {value:.7g} | {shown} |", flush=True)


def one_pass(count: int) -> None:
    """Pictures per second of a survey."""
    network = build_networks(FeatureOptions(("random",)), torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            coarse = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC).save(
                Path(folder) / f"{i:06d}.png"
            )
        for threads in (1, 2):
            options = SurveyOptions(
                frozenset({"random.pool", "random.spatial"}), frozenset({"random.pool"}), threads=threads
            )
            seconds, _ = timed(partial(_surveyed, folder, options, network))
            print(f"| a pass over PNGs of 256 px, {threads} threads | {count / seconds:.0f} pictures/s | - |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000, help="rows of features per set")
    parser.add_argument("--pictures", type=int, default=500, help="of the pass")
    arguments = parser.parse_args()
    print("| | ours | torch-fidelity |\n| --- | --- | --- |")
    distances(arguments.count)
    one_pass(arguments.pictures)
