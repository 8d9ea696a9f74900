"""One pass over a set of pictures, by one process or by all ranks: pictures in, statistics out."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.storage.files import exists
from data_pipeline.storage.urls import join, literal
from data_pipeline.tools.picture_sets import (
    PictureBlock,
    PictureSet,
    Prepare,
    ending_of,
    open_pictures,
    read_blocks,
)
from trainer.config.identity import SETTINGS
from trainer.config.run import ConfigError
from trainer.console import progress_bar
from trainer.distributed import collectives
from trainer.evaluation.features import FeatureNetwork, Fit, to_size
from trainer.evaluation.fidelity import check_metrics, figure_name
from trainer.evaluation.metrics import frechet_distance
from trainer.evaluation.statistics import NetworkRecord, Record, SetStatistics

Position = tuple[int, int]
SIZES_LISTED = 8
"""Sizes of pictures that a record names; what is rarer is counted together."""


@dataclass(frozen=True)
class SurveyOptions:
    """How a set is read."""

    moments: frozenset[str]
    """Outputs (`family.output`) whose mean and covariance are wanted."""
    kept: frozenset[str]
    """Outputs of which every picture's features are wanted."""
    image_size: int | None = None
    """Bring pictures to this edge first."""
    fit: Fit = "crop"
    block: int = 64
    """Pictures that go through the networks together."""
    threads: int = 4
    """That read and decode."""
    skip_broken: bool = False
    """Leave out pictures that cannot be used, and count them, instead of stopping at the first."""


@dataclass
class _Survey:
    """What one rank has seen."""

    moments: dict[str, FeatureMoments]
    features: dict[str, list[tuple[Position, Tensor]]]
    digests: list[tuple[Position, NDArray[np.int64]]] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    blank: int = 0

    def without_moments(self) -> _Survey:
        """All that ranks hand over as it is."""
        return replace(self, moments={})


def survey(
    pictures: PictureSet,
    networks: Mapping[str, FeatureNetwork],
    options: SurveyOptions,
    device: torch.device,
) -> SetStatistics | None:
    """Statistics of all pictures of a set, on rank 0; None on other ranks. Collective.

    They are the same at any number of ranks.

    Raises:
        DataError: pictures that cannot be used, a damaged tar, features that are not finite.
    """
    tally = collectives.on_every_rank(lambda: _tally(pictures, networks, options, device))
    for moments in tally.moments.values():
        collectives.fold_to_main(moments.tensors, moments.merge)
    gathered = collectives.gather_object(tally.without_moments())
    if gathered is None:
        return None
    return _together(pictures, networks, options, tally.moments, gathered)


def pictures_to_measure(url: str) -> PictureSet:
    """What is behind a URL, listed by rank 0 for all. Collective.

    Cheap beside a survey: a set that is not there is told before another one is read.

    Raises:
        ConfigError: the folder of a run, which holds the contact sheets of training.
        DataError: neither pictures nor tars, or both.
    """
    return collectives.from_main_rank(lambda: _opened(url))


def _opened(url: str) -> PictureSet:
    if literal(url) is not None and not url.endswith(".tar") and exists(join(url, SETTINGS)):
        raise ConfigError(
            f"{url} is a run, and holds previews at most; draw a set from it by `ldm sample {url} --count N "
            "--out SET` and measure that, or give `ldm evaluate fidelity` --sample '--count N', to draw it."
        )
    return open_pictures(url)


class FeatureMoments:
    """Count, mean and covariance of features that stream by, whatever the order of their parts.

        B pictures -> features [B, D] fp32 -> sums [D], products [D, D] fp64 -> added with compensation

    A block's own sums are the same wherever they are made. They are added up in two fp64 words (Knuth, TAOCP
    2, 4.2.2: what an addition rounds away is itself an fp64 number), about 106 bits, so any order of blocks,
    and any deal of them to ranks, rounds to the same fp64 statistics in the end.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        shapes = ((width,), (width, width))
        self._words = [
            (
                torch.zeros(s, dtype=torch.float64, device=device),
                torch.zeros(s, dtype=torch.float64, device=device),
            )
            for s in shapes
        ]

    def add(self, features: Tensor) -> None:
        """Take in one block, [B, D]."""
        block = features.double()
        self.count += len(block)
        for i, part in enumerate((block.sum(dim=0), block.T @ block)):
            high, low = self._words[i]
            total = high + part
            back = total - high
            # in place: a matrix of 2048 x 2048 is 32 MB, and each pass over it takes time
            low += part.sub_(back).add_(high.sub_(back.neg_().add_(total)))
            self._words[i] = total, low

    def tensors(self) -> list[Tensor]:
        """All of it as tensors on the CPU, for another process."""
        count = torch.tensor([self.count])
        return [count, *(word.cpu() for pair in self._words for word in pair)]

    def merge(self, tensors: Sequence[Tensor]) -> None:
        """Take in what another process has counted."""
        count, *words = tensors
        self.count += int(count)
        for i, pair in enumerate((words[:2], words[2:])):
            high, low = (word.to(self._words[i][0].device) for word in pair)
            self._words[i] = _plus(self._words[i], (high, low))

    def mean(self) -> Tensor:
        """[D] fp64, on the CPU."""
        return self._sums(0) / self.count

    def covariance(self) -> Tensor:
        """[D, D] fp64 on the CPU, of n - 1 degrees of freedom; zeros for a single picture."""
        sums, products = self._sums(0), self._sums(1)
        centred = products - torch.outer(sums, sums / self.count)
        return (centred + centred.T) / (2 * max(1, self.count - 1))

    def _sums(self, which: int) -> Tensor:
        high, low = self._words[which]
        return (high + low).cpu()


class ReconstructionDistance:
    """Frechet distance of pictures from their reconstructions (R-FID, LDM Table 8)."""

    def __init__(self, networks: Mapping[str, FeatureNetwork], device: torch.device) -> None:
        """`networks` by family; each gives `pool`, or is refused with a ConfigError."""
        check_metrics(["fid"], {family: tuple(network.widths) for family, network in networks.items()})
        self._networks = {family: each for family, each in networks.items() if "pool" in each.widths}
        self._moments = {
            family: tuple(FeatureMoments(network.widths["pool"], device) for _ in range(2))
            for family, network in self._networks.items()
        }

    @torch.no_grad()
    def see(self, pictures: Tensor, made: Tensor) -> None:
        """Take in a batch, uint8 [B, 3, H, W], and what became of it."""
        with _exact_convolutions():
            for family, network in self._networks.items():
                for moments, batch in zip(self._moments[family], (pictures, made), strict=True):
                    rows = batch.permute(0, 2, 3, 1).cpu().numpy()
                    prepared = [network.prepare(picture) for picture in rows]
                    moments.add(network(prepared, [""] * len(prepared))["pool"])

    def over_ranks(self) -> dict[str, float]:
        """`figures` of what all ranks have seen, on every rank. Collective, once."""
        for pair in self._moments.values():
            for moments in pair:
                collectives.fold_to_main(moments.tensors, moments.merge)
        return collectives.from_main_rank(self.figures)

    def figures(self) -> dict[str, float]:
        """`rfid` by Inception, `rfd_FAMILY` by others; NaN of fewer than two pictures, or of no numbers."""
        return {
            f"r{figure_name('fid', family)}": _distance(made, real)
            for family, (real, made) in self._moments.items()
        }


def _tally(
    pictures: PictureSet, networks: Mapping[str, FeatureNetwork], options: SurveyOptions, device: torch.device
) -> _Survey:
    widths = {f"{f}.{output}": width for f, n in networks.items() for output, width in n.widths.items()}
    tally = _Survey(
        moments={name: FeatureMoments(widths[name], device) for name in sorted(options.moments)},
        features={name: [] for name in sorted(options.kept)},
    )
    blocks = read_blocks(
        pictures,
        _preparation(networks, options),
        block=options.block,
        captions=any(name.endswith(".score") for name in options.moments),
        rank=collectives.rank(),
        world_size=collectives.world_size(),
        threads=options.threads,
    )
    whole = None if pictures.tars else -(-len(pictures.files) // collectives.world_size())
    with (
        contextlib.closing(blocks),  # type: ignore[type-var]
        _exact_convolutions(),
        torch.no_grad(),
        progress_bar(whole, "picture", pictures.url[-30:], disable=collectives.rank() > 0) as bar,
    ):
        for block in blocks:
            _take(block, networks, options, tally)
            bar.update(len(block.names) + len(block.broken))
    return tally


def _preparation(networks: Mapping[str, FeatureNetwork], options: SurveyOptions) -> Prepare:
    def prepare(picture: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        if options.image_size is not None:
            picture = to_size(picture, options.image_size, options.fit)
        return {family: network.prepare(picture) for family, network in networks.items()}

    return prepare


def _take(
    block: PictureBlock, networks: Mapping[str, FeatureNetwork], options: SurveyOptions, tally: _Survey
) -> None:
    if block.broken and not options.skip_broken:
        name, reason = block.broken[0]
        raise DataError(
            f"{name} cannot be measured ({reason}); mend it, or leave such pictures out with --skip-broken."
        )
    tally.broken.update(reason.partition(":")[0] for _, reason in block.broken)
    tally.formats.update(block.formats)
    tally.sizes.update(block.sizes)
    tally.blank += block.blank
    tally.digests.append((block.position, block.digests))
    if not block.names:
        return
    for family, network in networks.items():
        outputs = network([each[family] for each in block.prepared], block.captions)
        for output, features in outputs.items():
            name = f"{family}.{output}"
            finite = torch.isfinite(features).all(dim=1)
            if not bool(finite.all()):
                which = (
                    block.names[int(finite.logical_not().nonzero()[0])]
                    if output != "score"
                    else block.names[0]
                )
                raise DataError(f"{network.name} gives NaN or infinity for {which}; check the weights.")
            if name in tally.moments:
                tally.moments[name].add(features)
            if name in tally.features:
                tally.features[name].append((block.position, features.float().cpu()))


def _together(
    pictures: PictureSet,
    networks: Mapping[str, FeatureNetwork],
    options: SurveyOptions,
    moments: Mapping[str, FeatureMoments],
    tallies: list[_Survey],
) -> SetStatistics:
    digests = _in_order([pair for t in tallies for pair in t.digests])
    count = sum(len(each) for each in digests)
    url = pictures.url
    broken = sum((t.broken for t in tallies), Counter[str]())
    for ending, unread in sorted(Counter(map(ending_of, pictures.unread)).items()):
        broken[f"of .{ending}, which is not read"] = unread
    if count == 0:
        raise DataError(f"none of the pictures in {url} can be measured ({dict(broken)}).")
    known = np.concatenate(digests)
    features = {
        name: torch.cat(_in_order([pair for t in tallies for pair in t.features[name]]))
        for name in sorted(options.kept)
        if any(t.features[name] for t in tallies)
    }
    record = Record(
        source=url,
        pictures=count,
        networks={f: NetworkRecord(n.name, n.digest, n.sees, dict(n.details)) for f, n in networks.items()},
        image_size=options.image_size,
        fit=options.fit,
        formats=dict(sorted(sum((t.formats for t in tallies), Counter[str]()).items())),
        sizes=_listed(sum((t.sizes for t in tallies), Counter[tuple[int, int]]())),
        duplicates=count - len(np.unique(known)),
        blank=sum(t.blank for t in tallies),
        broken=dict(sorted(broken.items())),
    )
    seen = {name: each for name, each in moments.items() if each.count}
    return SetStatistics(
        record=record,
        counts={name: each.count for name, each in seen.items()},
        means={name: each.mean() for name, each in seen.items()},
        covariances={name: each.covariance() for name, each in seen.items()},
        features=features,
        digests=torch.from_numpy(known),
    )


def _listed(sizes: Counter[tuple[int, int]]) -> dict[str, int]:
    """The most frequent ones by name, the larger first where two are equally frequent."""
    ordered = sorted(sizes.items(), key=lambda item: (item[1], item[0]), reverse=True)
    rest = sum(count for _, count in ordered[SIZES_LISTED:])
    listed = {f"{width}x{height}": count for (width, height), count in ordered[:SIZES_LISTED]}
    return listed | ({"others": rest} if rest else {})


def _in_order(pairs: list[tuple[Position, Any]]) -> list[Any]:
    return [value for _, value in sorted(pairs, key=lambda pair: pair[0])]


def _distance(made: FeatureMoments, real: FeatureMoments) -> float:
    if min(made.count, real.count) < 2:
        return math.nan
    parts = (made.mean(), made.covariance(), real.mean(), real.covariance())
    return frechet_distance(*parts) if all(bool(torch.isfinite(part).all()) for part in parts) else math.nan


@contextlib.contextmanager
def _exact_convolutions() -> Iterator[None]:
    """fp32 as fp32, and the same algorithm each time: TF32 moves features by a thousandth."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _plus(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of two numbers of two words each, as one whose low word is what its high word lacks."""
    high = first[0] + second[0]
    back = high - first[0]
    lost = (first[0] - (high - back)) + (second[0] - back)
    low = lost + (first[1] + second[1])
    total = high + low
    return total, low - (total - high)
