"""Batches of samples held out from training, the same at any number of ranks.

`shards/held_out.py` has chosen the samples. They are cut into batches, by shape, and the last one is filled
up with samples that do not count there:

    size 4, 10 samples     0  a3 c9 f8 b2 | 1  d4 c7 e5 e6 | 2  f1 f9 (f1 f9)

Batch i holds the same samples whoever reads it, so that any rank may measure any of them, and all together
are measured alike by any number of ranks. Nothing is drawn by a run's seed: crops are central, nothing is
flipped, a caption is chosen by its sample's name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray

from data_pipeline.batch import Batch
from data_pipeline.errors import Rejected, Replaced
from data_pipeline.feed.reads import Contents, Extent, MemberReads
from data_pipeline.feed.sample import Known, draw_crop, fill_sample
from data_pipeline.feed.task import ShareLayout
from data_pipeline.shards.filters import Filter
from data_pipeline.shards.held_out import HeldOut
from data_pipeline.storage.cache import BlockCache
from data_pipeline.storage.ranges import Background, RangeReader

HELD_OUT_SEED = 0
"""Of every draw about a held-out sample: runs of other seeds are measured on the same numbers."""
_READERS = 16
_DECODERS = 2
_AHEAD = 3
"""Batches on their way while one is measured."""
_Reads = Mapping[tuple[int, str], Future[Contents]]


@dataclass(frozen=True)
class HeldOutBatch:
    """A batch, and which of its rows count."""

    batch: Batch
    samples: tuple[int, ...]
    """[B] place of each row in `HeldOut.samples`; -1 for rows that fill the batch up or could not be read."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Samples of the batch that cannot be used, by reason."""


def held_out_batches(held: HeldOut, batches: Sequence[tuple[int, ...]]) -> Generator[HeldOutBatch]:
    """These batches of `HeldOut.batches`, in order, read and decoded ahead; close it to stop early.

    Raises:
        ReadFailed, StorageOutage: storage does not answer; nothing is left out for that.
    """
    config = held.config
    reader = RangeReader(timeout_s=config.request_timeout_s, tries=config.max_retries, patience_s=0.0)
    background = Background(_READERS)
    cache = BlockCache(config.cache_dir, config.cache_bytes) if config.cache_dir else None
    reads = MemberReads(held.dataset, reader, background, cache, config.read_ahead_bytes)
    waiting: list[Future[HeldOutBatch]] = []
    rest = iter(batches)
    with ThreadPoolExecutor(_DECODERS) as pool:
        try:
            while True:
                while len(waiting) < _AHEAD and (rows := next(rest, None)) is not None:
                    futures = _start(reads, held, rows)
                    waiting.append(pool.submit(partial(_decode, held, rows, futures)))
                if not waiting:
                    return
                yield waiting.pop(0).result()
        finally:
            reader.close()
            background.close()
            pool.shutdown(wait=False, cancel_futures=True)


def _start(reads: MemberReads, held: HeldOut, rows: Sequence[int]) -> _Reads:
    wanted: dict[int, list[Extent]] = {}
    for sample in dict.fromkeys(rows):
        mine = held.samples[sample]
        extents = (Extent(start, stop, sample, extension) for extension, start, stop in mine.extents)
        wanted.setdefault(mine.shard, []).extend(extents)
    return reads.start(wanted, due=1.0)


def _decode(held: HeldOut, rows: Sequence[int], futures: _Reads) -> HeldOutBatch:
    shape = held.samples[rows[0]].shape
    layout = ShareLayout(held.config, len(rows), *shape)
    out = layout.arrays(memoryview(bytearray(layout.bytes)))
    captions, usable = [""] * len(rows), [-1] * len(rows)
    rejected: Counter[str] = Counter()
    for row, sample in enumerate(rows):
        if sample in rows[:row]:  # fills the batch up
            first = rows.index(sample)
            captions[row] = captions[first]
            for array in out.values():
                array[row] = array[first]
            continue
        try:
            captions[row] = _fill(held, sample, futures, out, row)
            usable[row] = sample
        except Rejected as error:
            rejected[error.reason] += 1
    out["ordinals"][:] = [held.samples[sample].ordinal for sample in rows]
    tensors = {name: torch.from_numpy(array) for name, array in out.items()}
    batch = Batch(
        pixels=tensors.pop("pixels").permute(0, 3, 1, 2),  # [B, 3, H, W], channels last in memory
        captions=tuple(captions),
        ordinals=tensors.pop("ordinals"),
        conditions=tensors,
        keys=tuple(held.samples[sample].key for sample in rows),
        slots=torch.arange(len(rows)),
        position={},
    )
    return HeldOutBatch(batch, tuple(usable), rejected)


def _fill(
    held: HeldOut,
    sample: int,
    futures: _Reads,
    out: dict[str, NDArray[Any]],
    row: int,
) -> str:
    """Decode one sample into a row; its caption. Raises Rejected."""
    mine = held.samples[sample]
    config = held.configs[held.dataset.source_of[mine.shard]]
    try:
        members = {e: futures[sample, e].result()[sample, e] for e, _, _ in mine.extents}
    except Replaced as error:
        raise Rejected("shard_replaced", str(error)[:300]) from error
    late = None
    if mine.late:
        whole = Filter(config.filter)
        late = whole.part([clause for clause in whole.clauses if clause.text in mine.late])
        late = late.given(mine.late_values)
    place = draw_crop(config, mine.key, 0, seed=HELD_OUT_SEED, ordinal=mine.ordinal)
    caption, _ = fill_sample(
        config,
        members,
        Known(late, mine.original, mine.beside),
        target=mine.shape,
        draws=(HELD_OUT_SEED, mine.ordinal, place),
        out=out,
        row=row,
    )
    return caption
