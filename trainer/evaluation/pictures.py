"""The pictures of shards for a measurement: each at most once, and no more than are asked for.

The loader itself never ends: lanes that are through with an epoch begin the next while others still have
samples of this one, and its batches are always full. A measurement wants neither repeats nor a full batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from contextlib import closing

from torch import Tensor

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.loader import build_loader, open_dataset
from trainer.console import progress_bar


def pictures_once(
    data: DataConfig, samples: int, *, batch_size: int, seed: int, purpose: str
) -> Generator[Tensor]:
    """uint8 [B, 3, H, W] each, B at most `batch_size`: `samples` pictures in all, or all that there are.

    With aspect buckets or sources with weights, whose epochs end apart, and without an index
    (data.order=resampled) some may repeat.

    Args:
        data: the shards and how they are read; captions, conditions and loader processes are left out.
        seed: of order and crops.
        purpose: what they are for, beside the progress bar and in errors.

    Raises:
        DataError: no shards, or none of their samples can be used.
    """
    data = dataclasses.replace(
        data,
        lanes=0,
        sources=tuple(
            dataclasses.replace(source, captions=None, caption_weights=None, conditions=None)
            for source in data.sources
        ),
        captions=("txt",),
        caption_weights=(),
        require_caption=False,
        conditions=(),
        workers=0,
        reject_file=None,
    )
    dataset, first_epoch = None, None
    if data.order == "indexed":
        dataset = open_dataset(data)
        total = int(dataset.counts.sum())
        # Ordinals of later epochs are larger.
        first_epoch = None if data.buckets or dataset.shares else total
        samples = min(samples, total)
    where = data.shards or ", ".join(source.shards for source in data.sources)
    if samples == 0:
        raise DataError(f"{where} hold no picture for {purpose}.")
    batches = build_loader(data, seed=seed, global_batch_size=batch_size, dataset=dataset)
    with closing(batches), progress_bar(samples, "image", purpose) as bar:
        given = 0  # a bar that is switched off does not count
        while given < samples:
            batch = next(batches)
            pixels = batch.pixels
            if first_epoch is not None:
                pixels = pixels[batch.ordinals < first_epoch]
                if len(pixels) == 0:  # every lane is through
                    break
            pixels = pixels[: samples - given]
            yield pixels
            given += len(pixels)
            bar.update(len(pixels))
