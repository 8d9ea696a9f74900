"""Pictures by the ten thousand: which a set consists of, and how all ranks make it.

Picture i is a function of (seed, first_index + i, its prompt, its label), and of nothing else but settings
and weights. Its last bit also depends on the size of the batch that it is drawn in, so all batches are
equally large and begin at multiples of their size; the last one is filled up with pictures that are thrown
away.

    count 10, batches of 4, parts of 8     0 1 2 3 | 4 5 6 7 || 8 9 (10 11)

A part is what is written and counted as a whole. Ranks take parts: whichever of them makes one, alone or for
the second time after a kill, makes the same bytes. Threads write while the device draws:

    draw(batch) -> host          the device goes on with the next batch
                   encode        threads, PNG or JPEG
                   put           threads, when a part's pictures are encoded: files, then the part's record

A few parts are under way at a time, so memory does not grow with the set.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data_pipeline.storage.files import write_bytes
from data_pipeline.storage.urls import join
from data_pipeline.tools.picture_sets import GRID
from trainer.config.run import Config
from trainer.console import progress_bar
from trainer.distributed import collectives
from trainer.distributed.acceleration import GraphedNetwork, compile_regions
from trainer.distributed.process import configure_process
from trainer.generation.store import SetStore
from trainer.metrics.pictures import MAX_SHEET, contact_sheet
from trainer.model import DiffusionModel, TrainedModel
from trainer.sample import Request, StartingPicture, draw

AHEAD = 2
"""Parts that are written while the next ones are drawn."""
MAX_ENCODERS = 8


@dataclass(frozen=True)
class Series:
    """A set of pictures to be made."""

    template: Request
    """Of one picture: all that the pictures share. Caption and class label are replaced."""
    count: int
    """Pictures, at least 1."""
    prompts: tuple[str, ...] = ("",)
    """Taken in turn, from the first again where there are fewer of them than pictures."""
    labels: tuple[int, ...] = ()
    """Class indices, in turn, too; empty for models without classes."""
    seed: int = 0
    first_index: int = 0
    """Index of the first picture, from which its noise is drawn."""
    batch_size: int = 16
    """Pictures that are drawn together."""
    batches_per_part: int = 1

    @property
    def part_size(self) -> int:
        """Pictures of a part; the last one may have fewer."""
        return self.batch_size * self.batches_per_part

    @property
    def parts(self) -> int:
        """How many there are."""
        return -(-self.count // self.part_size)

    def rows(self, part: int) -> range:
        """Places in the set of a part's pictures."""
        return range(part * self.part_size, min(self.count, (part + 1) * self.part_size))

    def batches(self, part: int) -> Iterator[range]:
        """Places of each batch of a part, all of one size: those from `count` on are not wanted."""
        rows = self.rows(part)
        for first in range(rows.start, rows.stop, self.batch_size):
            yield range(first, first + self.batch_size)

    def caption(self, row: int) -> str:
        """What a picture is to show; empty without text."""
        return self.prompts[row % len(self.prompts)]

    def item(self, row: int) -> dict[str, Any]:
        """Of a picture what it does not share with the others, JSON-able."""
        label = {"class_label": self.labels[row % len(self.labels)]} if self.labels else {}
        return {"prompt": self.caption(row), "index": self.first_index + row, **label}

    def request(self, rows: Sequence[int]) -> Request:
        """What `trainer.sample.draw` is asked for; its indices are `first_index` + rows."""
        n, one = len(rows), self.template
        conditions = {name: _repeat(value, n) for name, value in one.conditions.items()}
        if self.labels:
            conditions["class_label"] = torch.tensor([self.labels[row % len(self.labels)] for row in rows])
        return replace(
            one,
            captions=tuple(map(self.caption, rows)),
            conditions=conditions,
            pixels=None if one.pixels is None else _repeat(one.pixels, n),
            start=None if one.start is None else _repeated_start(one.start, n),
            negative=one.negative * n,
        )


def make_pictures(
    store: SetStore,
    series: Series,
    trained: TrainedModel,
    *,
    overwrite: bool = False,
    share: tuple[int, int] = (0, 1),
    paste: Callable[[Tensor], Tensor] = lambda made: made,
    title: str = "sample",
) -> int:
    """Make what is missing of a set, or of a share of it; how many pictures of that were there already.

    Collective.

    Args:
        store: where; it is begun here.
        trained: its configuration says how to sample.
        overwrite: whether another set in the folder may go.
        share: (k, n) for every n-th part from part k on, beside others that make the rest; where k is not 0,
            the set must have begun.
        paste: gets uint8 [B, 3, H, W] on the CPU and gives what is stored of it.
        title: beside the progress bar.

    Raises:
        ConfigError: the folder holds another set.
        UserError, RetryableFault: what any rank met with storage, on all ranks.
    """
    whole = collectives.from_main_rank(lambda: store.begin(overwrite=overwrite))
    wanted = range(share[0], series.parts, share[1])
    missing = [part for part in wanted if part not in whole]
    count, left = (sum(len(series.rows(part)) for part in parts) for parts in (wanted, missing))
    ours = missing[collectives.rank() :: collectives.world_size()]
    of_ours = sum(len(series.rows(part)) for part in ours)
    with _progress(count, left, of_ours, title) as told:
        collectives.on_every_rank(lambda: _make(store, series, trained, ours, paste, told))
    collectives.from_main_rank(lambda: _finish(store, series, made=bool(missing), alone=share[1] == 1))
    return count - left


def accelerate(config: Config, model: DiffusionModel) -> DiffusionModel:
    """The model with blocks compiled and network replayed as `distributed` says.

    On a GPU kernels are as in training, and cuDNN chooses the same algorithms each time.
    """
    if next(model.network.parameters()).device.type == "cuda":
        configure_process(replace(config.distributed, cudnn_benchmark=False))
    if config.distributed.compile:
        compile_regions(model.network)
        compile_regions(model.first_stage)
    if config.distributed.cuda_graphs:
        return replace(model, network=GraphedNetwork(model.network))
    return model


def _make(
    store: SetStore,
    series: Series,
    trained: TrainedModel,
    parts: Sequence[int],
    paste: Callable[[Tensor], Tensor],
    told: Callable[[int], object],
) -> None:
    model, config = trained.model, trained.config
    device = next(model.network.parameters()).device
    under_way: deque[tuple[int, Future[None]]] = deque()
    encoders = ThreadPoolExecutor(min(MAX_ENCODERS, len(os.sched_getaffinity(0))), "encode")
    writers = ThreadPoolExecutor(AHEAD, "write")

    def finish_one() -> None:
        count, written = under_way.popleft()
        written.result()
        told(count)

    try:
        for part in parts:
            encoded: list[Future[bytes]] = []
            for batch in series.batches(part):
                indices = torch.tensor(batch, device=device) + series.first_index
                made = draw(config, model, series.request(batch), indices, seed=series.seed)
                arrays = paste(made.cpu()).permute(0, 2, 3, 1).contiguous().numpy()
                encoded += [
                    encoders.submit(store.encode, array, series.item(row))
                    for row, array in zip(batch, arrays, strict=True)
                    if row < series.count
                ]
            rows = series.rows(part)
            under_way.append((len(rows), writers.submit(_put, store, series, part, encoded)))
            while len(under_way) > AHEAD or (under_way and under_way[0][1].done()):
                finish_one()
        while under_way:
            finish_one()
    finally:
        writers.shutdown(cancel_futures=True)
        encoders.shutdown(cancel_futures=True)


def _put(store: SetStore, series: Series, part: int, encoded: Sequence[Future[bytes]]) -> None:
    rows = series.rows(part)
    store.put(part, rows, [series.item(row) for row in rows], [each.result() for each in encoded])


def _finish(store: SetStore, series: Series, *, made: bool, alone: bool) -> None:
    """Write the grid of a whole set: of several shares the last one that ends does.

    made: whether this start has made any part; one that has not may follow a kill just before this.
    """
    if (made or not store.has_grid()) and (alone or store.is_whole(series.parts)):
        _write_grid(store, series)


def _write_grid(store: SetStore, series: Series) -> None:
    shown = min(series.count, MAX_SHEET)
    pictures = [torch.tensor(each).permute(2, 0, 1) for each in store.first_pictures(shown)]
    titles = tuple(_title(series.item(row)) for row in range(shown))
    write_bytes(join(store.url, GRID), contact_sheet(pictures, titles))


def _title(item: dict[str, Any]) -> str:
    label = f"class {item['class_label']}" if "class_label" in item else ""
    return ", ".join(part for part in (item["prompt"], label) if part)


@contextmanager
def _progress(count: int, left: int, of_ours: int, title: str) -> Iterator[Callable[[int], object]]:
    """A bar over `count` pictures on rank 0, which takes the others to be as quick as itself.

    left: of them to be made, by all ranks. of_ours: by this one.
    """
    there, done = count - left, 0
    with progress_bar(count, "image", title, initial=there, disable=collectives.rank() > 0) as bar:

        def told(count: int) -> None:
            nonlocal done
            done += count
            bar.update(there + left * done // of_ours - bar.n)

        yield told


def _repeated_start(start: StartingPicture, n: int) -> StartingPicture:
    mask = None if start.mask is None else _repeat(start.mask, n)
    return replace(start, pixels=_repeat(start.pixels, n), mask=mask)


def _repeat(value: Tensor, n: int) -> Tensor:
    """[1, ...] -> [n, ...], without copying."""
    return value.expand(n, *value.shape[1:])
