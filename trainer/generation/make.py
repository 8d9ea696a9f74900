"""Pictures by the ten thousand: all ranks draw their parts, and threads write them meanwhile.

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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data_pipeline.storage.files import write_bytes
from data_pipeline.storage.urls import join
from trainer.config.run import Config
from trainer.console import progress_bar
from trainer.distributed import collectives
from trainer.distributed.acceleration import compile_regions
from trainer.distributed.process import configure_process
from trainer.generation.series import Series
from trainer.generation.store import GRID, SetStore
from trainer.metrics.pictures import MAX_SHEET, contact_sheet
from trainer.model import DiffusionModel, TrainedModel
from trainer.sample import draw

AHEAD = 2
"""Parts that are written while the next ones are drawn."""
MAX_ENCODERS = 8


def make_pictures(
    store: SetStore,
    series: Series,
    trained: TrainedModel,
    *,
    overwrite: bool = False,
    paste: Callable[[Tensor], Tensor] = lambda made: made,
    title: str = "sample",
) -> int:
    """Make what is missing of a set; how many pictures were there already. Collective.

    Args:
        store: where; it is begun here.
        trained: its configuration says how to sample.
        overwrite: whether another set in the folder may go.
        paste: gets uint8 [B, 3, H, W] on the CPU and gives what is stored of it.
        title: beside the progress bar.

    Raises:
        ConfigError: the folder holds another set.
        UserError, RetryableFault: what any rank met with storage, on all ranks.
    """
    whole = collectives.from_main_rank(lambda: store.begin(overwrite=overwrite))
    missing = [part for part in range(series.parts) if part not in whole]
    there = series.count - sum(len(series.rows(part)) for part in missing)
    ours = missing[collectives.rank() :: collectives.world_size()]
    with _progress(series, missing, ours, there, title) as told:
        collectives.on_every_rank(lambda: _make(store, series, trained, ours, paste, told))
    if missing:
        collectives.from_main_rank(lambda: _write_grid(store, series))
    return there


def accelerate(config: Config, model: DiffusionModel) -> None:
    """On a GPU: kernels and compiled blocks as in training; cuDNN chooses the same algorithms each time."""
    if next(model.network.parameters()).device.type != "cuda":
        return
    configure_process(replace(config.distributed, cudnn_benchmark=False))
    if config.distributed.compile:
        compile_regions(model.network)
        compile_regions(model.first_stage)


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


def _write_grid(store: SetStore, series: Series) -> None:
    shown = min(series.count, MAX_SHEET)
    pictures = [torch.tensor(each).permute(2, 0, 1) for each in store.first_pictures(shown)]
    titles = tuple(_title(series.item(row)) for row in range(shown))
    write_bytes(join(store.url, GRID), contact_sheet(pictures, titles))


def _title(item: dict[str, Any]) -> str:
    label = f"class {item['class_label']}" if "class_label" in item else ""
    return ", ".join(part for part in (item["prompt"], label) if part)


@contextmanager
def _progress(
    series: Series, missing: Sequence[int], ours: Sequence[int], there: int, title: str
) -> Iterator[Callable[[int], object]]:
    """A bar over the whole set on rank 0, which takes the others to be as quick as itself."""
    wanted = series.count - there
    of_ours = sum(len(series.rows(part)) for part in ours)
    done = 0
    with progress_bar(series.count, "image", title, initial=there, disable=collectives.rank() > 0) as bar:

        def told(count: int) -> None:
            nonlocal done
            done += count
            bar.update(there + wanted * done // of_ours - bar.n)

        yield told
