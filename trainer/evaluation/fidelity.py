"""Which figure comes from which features, and the figures of one set of pictures against another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import DataError
from trainer.config.run import ConfigError
from trainer.evaluation import metrics
from trainer.evaluation.statistics import UNKNOWN, Record, SetStatistics, check_comparable

LOSSY = "jpeg"


@dataclass(frozen=True)
class Need:
    """What a metric is computed from."""

    output: str
    """Of a feature network."""
    kept: bool = False
    """Every picture's features, not only mean and covariance."""
    alone: bool = False
    """Of the pictures alone, without a reference."""


METRICS = {
    "fid": Need("pool"),
    "kid": Need("pool", kept=True),
    "is": Need("logits", kept=True, alone=True),
    "precision": Need("pool", kept=True),
    "recall": Need("pool", kept=True),
    "density": Need("pool", kept=True),
    "coverage": Need("pool", kept=True),
    "mind": Need("pool", kept=True),
    "sfid": Need("spatial"),
    "cmmd": Need("embedding", kept=True),
    "clip_score": Need("score", alone=True),
}
_NEIGHBOURHOODS = ("precision", "recall", "density", "coverage")
CLIP_SCORE = "clip.score"
"""The one output that pictures without a caption do not have."""
_GENERAL = {"fid": "fd", "kid": "kd", "sfid": "sfd"}
"""Names of distances whose I stands for Inception."""


@dataclass
class Comparison:
    """Figures by name, and what to know before quoting them."""

    figures: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def figure_name(metric: str, family: str) -> str:
    """fid of Inception; fd_dinov2, kd_random, ... of other features."""
    if family == "inception" or metric in ("cmmd", "clip_score"):
        return metric
    return f"{_GENERAL.get(metric, metric)}_{family}"


def figure_names(wanted: Sequence[str] | None, widths: Mapping[str, Iterable[str]]) -> list[str]:
    """What a comparison by these metrics and features is to give, without deviations. See `check_metrics`."""
    return [
        figure_name(metric, family)
        for family, outputs in widths.items()
        for metric, need in METRICS.items()
        if (wanted is None or metric in wanted) and need.output in outputs
    ]


def check_metrics(wanted: Sequence[str] | None, widths: Mapping[str, Iterable[str]]) -> None:
    """Refuse metrics that do not exist, or that none of the features give.

    Args:
        wanted: None for all that there are.
        widths: outputs by family.

    Raises:
        ConfigError: says which, and what it needs.
    """
    offered = {output for outputs in widths.values() for output in outputs}
    owners = {"pool": "inception", "logits": "inception", "spatial": "inception", "embedding": "clip"}
    for metric in wanted or ():
        if metric not in METRICS:
            raise ConfigError(f"there is no metric {metric!r}; choose from {', '.join(METRICS)}.")
        if METRICS[metric].output not in offered:
            family = owners.get(METRICS[metric].output, "clip")
            raise ConfigError(
                f"{metric} needs --features {family}; add it, or leave {metric} out of --metrics."
            )


def outputs_needed(
    wanted: Sequence[str] | None, widths: Mapping[str, Iterable[str]], *, reference: bool
) -> tuple[frozenset[str], frozenset[str]]:
    """(`family.output` by their moments, those of every picture) that a set's statistics must have.

    Args:
        reference: what only the pictures that are judged need is left out.
    """
    moments: set[str] = set()
    kept: set[str] = set()
    for metric, need in METRICS.items():
        if (wanted is not None and metric not in wanted) or (reference and need.alone):
            continue
        for family, outputs in widths.items():
            if need.output in outputs:
                (kept if need.kept else moments).add(f"{family}.{need.output}")
    return frozenset(moments), frozenset(kept)


def compare(
    made: SetStatistics,
    real: SetStatistics,
    families: Sequence[str],
    wanted: Sequence[str] | None,
    device: torch.device,
) -> Comparison:
    """The figures of `made` against `real`.

    Args:
        wanted: metrics; None for all for which both sets hold what is needed.

    Raises:
        ConfigError: the sets do not compare, or one holds too little for a metric that was asked for.
        DataError: a set of fewer than two pictures.
    """
    check_comparable(made.record, real.record, dict.fromkeys(families))
    for each in (made, real):
        if 0 < each.record.pictures < metrics.FEWEST:  # a .npz does not say how many
            raise DataError(
                f"{each.record.source} holds {each.record.pictures} picture(s); it takes at least 2."
            )
    found = Comparison()
    given: set[str] = set()
    for family in families:
        source = _FeaturePair(made, real, family, device)
        for metric, need in METRICS.items():
            if wanted is not None and metric not in wanted:
                continue
            missing = source.missing(need)
            if missing is None:
                found.figures |= _figures(metric, family, source)
                given.add(metric)
            elif wanted is not None and source.offers(need):
                raise ConfigError(
                    f"{missing} has no features for {metric}; make it anew with --metrics {metric}."
                )
    if not found.figures and wanted is None:
        raise ConfigError(
            f"{made.record.source} and {real.record.source} have no features for any metric in common."
        )
    for metric in wanted or ():
        if metric not in given:
            why = "captions beside its pictures" if metric == "clip_score" else f"features for {metric}"
            raise ConfigError(
                f"{made.record.source} has no {why}; measure a set that has, or leave {metric} out."
            )
    found.notes += list(_notes(made, real, found.figures))
    return found


@dataclass(frozen=True)
class _FeaturePair:
    """The features of one family in both sets."""

    made: SetStatistics
    real: SetStatistics
    family: str
    device: torch.device

    def offers(self, need: Need) -> bool:
        name = f"{self.family}.{need.output}"
        return any(name in each.means or name in each.features for each in self._sides(need))

    def missing(self, need: Need) -> str | None:
        """The set that has not what a metric needs."""
        name = f"{self.family}.{need.output}"
        for each in self._sides(need):
            if name not in (each.features if need.kept else each.means):
                return each.record.source
        return None

    def _sides(self, need: Need) -> Sequence[SetStatistics]:
        return (self.made,) if need.alone else (self.made, self.real)

    def features(self, output: str) -> tuple[Tensor, Tensor]:
        name = f"{self.family}.{output}"
        return self.made.features[name].to(self.device), self.real.features[name].to(self.device)

    @cached_property
    def neighbourhoods(self) -> dict[str, float]:
        """Four figures that are computed together."""
        return metrics.precision_and_recall(*self.features("pool"))


def _figures(metric: str, family: str, source: _FeaturePair) -> dict[str, float]:
    name = figure_name(metric, family)
    if metric in _NEIGHBOURHOODS:
        return {name: source.neighbourhoods[metric]}
    return {name + ending: value for ending, value in _COMPUTED[metric](source).items()}


def _gaussians(output: str) -> Callable[[_FeaturePair], dict[str, float]]:
    def distance(source: _FeaturePair) -> dict[str, float]:
        name = f"{source.family}.{output}"
        sets = (source.made, source.real)
        # On the CPU, where they are: seconds, and LAPACK's digits whatever the device.
        return {
            "": metrics.frechet_distance(*(part[name] for s in sets for part in (s.means, s.covariances)))
        }

    return distance


def _kernel(source: _FeaturePair) -> dict[str, float]:
    made, real = source.features("pool")
    spread = metrics.kernel_distance(made, real, min(metrics.KID_SUBSET_SIZE, len(made), len(real)))
    return {"": spread.mean, "_deviation": spread.deviation}


def _score(source: _FeaturePair) -> dict[str, float]:
    spread = metrics.inception_score(source.made.features[f"{source.family}.logits"].to(source.device))
    return {"": spread.mean, "_deviation": spread.deviation}


def _cosine(source: _FeaturePair) -> dict[str, float]:
    name = f"{source.family}.score"
    variance, count = float(source.made.covariances[name]), source.made.counts[name]
    return {"": float(source.made.means[name]), "_error": math.sqrt(max(0.0, variance) / count)}


_COMPUTED: dict[str, Callable[[_FeaturePair], dict[str, float]]] = {
    "fid": _gaussians("pool"),
    "sfid": _gaussians("spatial"),
    "kid": _kernel,
    "is": _score,
    "mind": lambda source: {"": metrics.monge_distance(*source.features("pool"))},
    "cmmd": lambda source: {"": metrics.clip_discrepancy(*source.features("embedding"))},
    "clip_score": _cosine,
}


def _notes(made: SetStatistics, real: SetStatistics, figures: Mapping[str, float]) -> Iterable[str]:
    for each in (made, real):
        yield from _notes_on(each)
    for name in sorted(made.means.keys() & real.means.keys()):
        width = len(made.means[name])
        few = [each.record for each in (made, real) if 0 < each.record.pictures <= width]
        if width > 1 and few:
            yield (
                f"{few[0].source} holds {few[0].pictures} pictures, not more than the {width} dimensions of "
                f"{name}: its Frechet distance is far too high, and compares only with those of as many"
            )
    scored = made.counts.get(CLIP_SCORE, 0)
    if "clip_score" in figures and scored < made.record.pictures:
        yield (
            f"the CLIP score is of {scored} of the {made.record.pictures} pictures of {made.record.source}; "
            "the others have no caption"
        )
    smallest = min(each.record.pictures or metrics.KID_SUBSET_SIZE for each in (made, real))
    if smallest < metrics.KID_SUBSET_SIZE and any(name.split("_")[0] in ("kid", "kd") for name in figures):
        usual = metrics.KID_SUBSET_SIZE
        yield f"the subsets of the kernel distance have {smallest} pictures instead of {usual}"
    shared = len(np.intersect1d(made.digests.numpy(), real.digests.numpy()))
    if shared:
        yield f"{shared} different pictures of {made.record.source} are in {real.record.source} as well"
    shares = [each.record.formats.get(LOSSY, 0) / max(1, each.record.pictures) for each in (made, real)]
    if real.record.formats and abs(shares[0] - shares[1]) > 0.5:
        yield "one set is JPEG and the other is not: compression alone moves these figures"
    sizes = [_only_size(each.record) for each in (made, real)]
    if None not in sizes and sizes[0] != sizes[1]:
        yield (
            f"{made.record.source} is of {sizes[0]} and {real.record.source} of {sizes[1]}, so they reach "
            "the networks by different resizing; --image-size brings both to one size first"
        )
    if made.record.image_size != real.record.image_size and real.record.pictures:
        yield (
            f"the sets were brought to different sizes first ({_size(made.record)}; {_size(real.record)}): "
            "make sure that both end at the size of the model"
        )


def _notes_on(each: SetStatistics) -> Iterable[str]:
    record = each.record
    if record.image_size is None and len(record.sizes) > 1:
        yield (
            f"the pictures of {record.source} are of several sizes ({', '.join(list(record.sizes)[:3])}, "
            "...), each squashed to the networks' squares by itself; --image-size brings them to one first"
        )
    if record.duplicates:
        yield f"{record.duplicates} of the {record.pictures} pictures of {record.source} equal an earlier one"
    if record.blank:
        yield (
            f"{record.blank} pictures of {record.source} are of a single colour, which is what NaN becomes "
            "when it is stored as a picture"
        )
    if record.broken:
        why = ", ".join(f"{count} {reason}" for reason, count in record.broken.items())
        yield f"pictures of {record.source} were left out: {why}"
    for family, network in record.networks.items():
        if UNKNOWN in (network.sha256, network.sees):
            yield f"{record.source} does not say which network and resizing its {family} features come from"
        elif family == "random":
            yield f"the features of {record.source} are those of {network.name}"


def _only_size(record: Record) -> str | None:
    """That of all pictures as the networks' own resizing meets them."""
    if record.image_size is not None:
        return f"{record.image_size}x{record.image_size}"
    return next(iter(record.sizes)) if len(record.sizes) == 1 else None


def _size(record: Record) -> str:
    return "as they are" if record.image_size is None else f"{record.image_size}, {record.fit}"
