"""One measurement of the held-out samples: every rank measures some batches, all ranks get the same figures.

A figure is a number per sample. Batches hold the same samples at any number of ranks and are dealt out in
rounds; the numbers of all samples are gathered, put in the order of the samples and summed there, in float64:

    batches    0  1  2 | 3  4  5 | 6 (0  1)    3 ranks, 3 rounds
    rank 0     0         3         6
    rank 1        1         4        (0)       what is in parentheses does not count: all ranks make equally
    rank 2           2         5     (1)       many forward passes, as engines that gather weights need it

So the number of ranks enters nowhere. Whether all ranks could read is agreed upon before anybody computes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.errors import Failure, ReadFailed
from data_pipeline.loader import Dataset, HeldOut, HeldOutBatch, held_out_batches, open_held_out
from trainer.config.run import Config
from trainer.distributed import collectives
from trainer.first_stage.losses import codebook_usage
from trainer.metrics.long_work import LongWork


class Unmeasured(Failure):
    """The held-out samples could not be read on some rank; no figure is of a part of them."""


@dataclass(frozen=True)
class Measured:
    """What a stage finds on one batch."""

    figures: dict[str, Tensor]
    """[B] each, by name."""
    codes: Tensor | None = None
    """int64 [B, positions]: entries of a codebook that the samples look up."""
    pictures: tuple[Tensor, Tensor] | None = None
    """uint8 [B, 3, H, W] both: what a first stage was given, and what it made of it."""


class Distance(Protocol):
    """A distance of two sets of pictures, over all ranks."""

    def see(self, pictures: Tensor, made: Tensor) -> None:
        """Take in some of both, uint8 [B, 3, H, W]."""
        ...

    def over_ranks(self) -> dict[str, float]:
        """Figures by name, the same on every rank. Collective, once."""
        ...


class Measure(Protocol):
    """Measures a batch with the weights as they are."""

    def __call__(self, batch: Batch) -> Measured:
        """The batch lies on the device; nothing is drawn but by its ordinals."""
        ...


@dataclass
class _Found:
    """Of this rank."""

    samples: list[int] = field(default_factory=list)
    rows: list[list[float]] = field(default_factory=list)
    """Per sample: its figures."""
    names: tuple[str, ...] = ()
    codes: Counter[int] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)

    def add(self, made: HeldOutBatch, measured: Measured) -> list[int]:
        """Rows that are samples; the others fill a batch up."""
        self.names = tuple(measured.figures)
        values = torch.stack(list(measured.figures.values()), dim=1).double().cpu().tolist()  # [B, figures]
        kept = [row for row, sample in enumerate(made.samples) if sample >= 0]
        self.samples += [made.samples[row] for row in kept]
        self.rows += [values[row] for row in kept]
        self.rejected += made.rejected
        if measured.codes is not None and kept:
            used, counts = measured.codes[kept].unique(return_counts=True)
            self.codes.update(dict(zip(used.tolist(), counts.tolist(), strict=True)))
        return kept


def hold_out(
    config: Config, dataset: Dataset | None, alive: Callable[[], object] = lambda: None
) -> HeldOut | None:
    """The samples that a run measures, chosen by rank 0; None where it measures none. Collective.

    dataset: the training shards; None in resampled order.
    alive: called while rank 0 indexes data.validation.shards, whenever it gets on.

    Raises:
        DataError: on all ranks, there are none, or what is named cannot be used.
    """
    if not config.validation.every:
        return None

    def choose(tell: collectives.Told) -> HeldOut:
        return open_held_out(
            config.data,
            config.validation.samples,
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            dataset=dataset,
            progress=tell,
        )

    with closing(LongWork(alive)) as work:
        return collectives.worked_on_main_rank(choose, work.told)


def measure_held_out(
    held: HeldOut,
    measure: Measure,
    *,
    batch_size: int,
    device: torch.device,
    codebook_size: int = 0,
    distance: Distance | None = None,
    beat: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], Counter[str]]:
    """Weighted means over the samples with standard errors, and which samples cannot be used. Collective.

    Returns:
        NAME and NAME_stderr for each figure; codebook_usage and codebook_perplexity where there is a
        codebook; what `distance` gives; "samples" measured. The same on every rank.

    Raises:
        Unmeasured: on all ranks, a sample cannot be read for now.
    """
    batches = held.batches(batch_size)
    rank, ranks = collectives.rank(), collectives.world_size()
    rounds = -(-len(batches) // ranks)
    turns = [first * ranks + rank for first in range(rounds)]
    found = _Found()
    with closing(held_out_batches(held, [batches[turn % len(batches)] for turn in turns])) as made:
        for turn in turns:
            beat()
            batch = _agreed_next(made)
            measured = measure(batch.batch.to(device))
            if turn < len(batches):
                kept = found.add(batch, measured)
                if distance is not None and measured.pictures is not None and kept:
                    distance.see(*(pictures[kept] for pictures in measured.pictures))
    beat()
    everywhere: list[_Found] = collectives.all_gather_object(found)
    rejected = sum((each.rejected for each in everywhere), start=Counter[str]())
    figures = _figures(held, everywhere)
    if codebook_size:
        counts = torch.zeros(codebook_size, dtype=torch.int64)
        for entry, count in sum((each.codes for each in everywhere), start=Counter[int]()).items():
            counts[entry] = count
        usage, perplexity = codebook_usage(counts)
        figures |= {"codebook_usage": float(usage), "codebook_perplexity": float(perplexity)}
    if distance is not None:
        figures |= distance.over_ranks()
        beat()
    return figures, rejected


def _agreed_next(made: Iterator[HeldOutBatch]) -> HeldOutBatch:
    """The next batch of this rank, if all ranks have theirs. Collective."""
    batch, problem = None, ""
    try:
        batch = next(made)
    except (Failure, ReadFailed) as error:
        problem = str(error)
    if collectives.any_rank(bool(problem)):
        told = next(filter(None, collectives.all_gather_object(problem)))
        raise Unmeasured(told)
    assert batch is not None
    return batch


def _figures(held: HeldOut, everywhere: list[_Found]) -> dict[str, float]:
    names = next((each.names for each in everywhere if each.samples), ())
    pairs = sorted(
        (pair for each in everywhere for pair in zip(each.samples, each.rows, strict=True)),
        key=lambda pair: pair[0],
    )
    weights = np.asarray([held.samples[sample].weight for sample, _ in pairs], np.float64)
    values = np.asarray([row for _, row in pairs], np.float64).reshape(len(pairs), len(names))
    figures = {"samples": float(len(pairs))}
    for name, column in zip(names, values.T, strict=True):
        figures |= dict(zip((name, f"{name}_stderr"), weighted_mean(column, weights), strict=True))
    return figures


def weighted_mean(values: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[float, float]:
    """Mean of [n] values and its standard error; NaN where one value is, or where there are too few.

    The error is that of a ratio of sums, sqrt(n / (n - 1) sum w^2 (x - m)^2) / sum w (Cochran 1977, section
    6.4); with equal weights it is the deviation over sqrt(n).

    >>> weighted_mean(np.array([1.0, 3.0]), np.ones(2))
    (2.0, 1.0)
    >>> weighted_mean(np.array([1.0, 3.0]), np.array([3.0, 1.0]))[0]
    1.5
    """
    n, total = len(values), float(weights.sum())
    if n == 0:
        return math.nan, math.nan
    mean = float((weights * values).sum()) / total
    if n == 1:
        return mean, math.nan
    spread = float(np.square(weights * (values - mean)).sum()) * n / (n - 1)
    return mean, math.sqrt(spread) / total
