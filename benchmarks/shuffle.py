"""How well a batch is mixed where neighbours are alike: ours, webdataset's buffer and a perfect shuffle.

    python benchmarks/shuffle.py
    python benchmarks/shuffle.py --batch 256 --run 100

Pure order code: nothing is read. The set is like LAION's tables, in which pictures of one web site stand side
by side: shards of 10,000 samples in runs of 20 of one domain, domains by Zipf's law over 3 million. Counted
are the shards and domains in a global batch, and the domains in 16 batches in a row, which tell whether one
batch resembles the next; and the samples that all processes hold for it, with their bytes at 50 KB each.

webdataset: 64 ranks with two workers, each with its own `shuffle(N)` over shards of its own, long after it is
full; a rank's part of a batch comes from one worker, as its DataLoader deals them. Perfect: uniform over all.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset as wds
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_pipeline.order.draws import mix_array
from data_pipeline.order.lanes import Order
from data_pipeline.order.turns import Turns

SHARDS, SAMPLES, DOMAINS = 200_000, 10_000, 3_000_000
RANKS, WORKERS = 64, 2
BATCHES, BYTES = 16, 50_000
DEEP = 4_096
"""Samples of a lane or worker that are passed before counting begins."""
TURNOVERS = 10
"""The least of a worker's buffer, in its sizes: it begins with the newest, and keeps some for long."""
Batches = list[tuple[NDArray[np.int64], NDArray[np.int64]]]
"""(shards, rows) of each batch."""


def domains_of(shards: NDArray[np.int64], rows: NDArray[np.int64], run: int) -> NDArray[np.int64]:
    """Domain of each sample; runs begin elsewhere in each shard."""
    phase = mix_array(shards.astype(np.uint64)) % np.uint64(run)
    number = (rows.astype(np.uint64) + phase) // np.uint64(run)
    hashed = mix_array(mix_array(shards.astype(np.uint64) + np.uint64(SHARDS)) ^ number)
    return np.floor(DOMAINS ** (hashed.astype(np.float64) / 2.0**64)).astype(np.int64)


def indexed(batch: int, window: int) -> Batches:
    """Ours with an index: a lane for each sample of a batch."""
    order = Order(np.full(SHARDS, SAMPLES), 1, batch, window)
    found = [np.zeros((BATCHES, batch), np.int64) for _ in range(2)]
    for lane in range(batch):
        first, stop = order.window_of(lane, DEEP)[0], DEEP
        while stop < DEEP + BATCHES:
            stop = order.window_of(lane, stop)[1]
        for out, values in zip(found, order.visits(0, lane, first, stop), strict=True):
            out[:, lane] = values[DEEP - first : DEEP - first + BATCHES]
    return list(zip(*found, strict=True))


def streamed(batch: int, window: int) -> Batches:
    """Ours without an index: lanes take turns at shards."""
    turns = Turns(SHARDS, 1, batch, window)
    shards = np.asarray([turns.shard(lane, 0) for lane in range(batch)])
    rows = np.zeros((BATCHES, batch), np.int64)
    for lane in range(batch):
        first, begin, served = 0, 0, list[int]()
        while first < DEEP + BATCHES:
            size = turns.window_size(lane, first)
            if first + size > DEEP:
                begin = begin if served else first
                served += (first + turns.shuffled(lane, 0, first, size)).tolist()
            first += size
        rows[:, lane] = served[DEEP - begin : DEEP - begin + BATCHES]
    return [(shards, row) for row in rows]


def buffered(buffer: int, draws: int, seed: int) -> NDArray[np.int64]:
    """What webdataset's shuffle(buffer) makes of the stream 0, 1, 2, ..., once it is as it stays."""
    # Not where shards meet, which few batches see: all workers come there together.
    passed = TURNOVERS * buffer // SAMPLES * SAMPLES + DEEP
    drawn = wds.filters.shuffle(buffer, rng=random.Random(seed))(itertools.count())
    return np.fromiter(itertools.islice(drawn, passed, passed + draws), np.int64, draws)


def webdataset(batch: int, buffer: int) -> Batches:
    """A buffer for each worker, over shards in an order of its own."""
    order = np.random.default_rng(1).permutation(SHARDS)
    each = batch // RANKS
    streams = []
    for worker in range(RANKS * WORKERS):
        served = buffered(buffer, each * BATCHES, worker)
        streams.append((order[worker + RANKS * WORKERS * (served // SAMPLES)], served % SAMPLES))
    batches = []
    for step in range(BATCHES):
        some = slice(step // WORKERS * each, (step // WORKERS + 1) * each)
        parts = [streams[rank * WORKERS + step % WORKERS] for rank in range(RANKS)]
        batches.append(
            (
                np.concatenate([shards[some] for shards, _ in parts]),
                np.concatenate([rows[some] for _, rows in parts]),
            )
        )
    return batches


def perfect(batch: int, _: int) -> Batches:
    """Uniform over all."""
    random = np.random.default_rng(2)
    size = (BATCHES, batch)
    return list(zip(random.integers(SHARDS, size=size), random.integers(SAMPLES, size=size), strict=True))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--run", type=int, default=20, help="samples of one domain side by side")
    args = parser.parse_args()
    rows: list[tuple[str, Callable[[int, int], Batches], int, int]] = [
        *((f"indexed, window {w}", indexed, w, args.batch * w) for w in (1, 4, 16, 64, 256)),
        *((f"streamed, window {w}", streamed, w, args.batch * w) for w in (16, 256)),
        *((f"webdataset, shuffle({n})", webdataset, n, RANKS * WORKERS * n) for n in (100, 1000, 10_000)),
        ("perfect", perfect, 0, SHARDS * SAMPLES),
    ]
    print(f"| order | samples held | GB | shards in a batch | domains in a batch | in {BATCHES} batches |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, arm, size, held in rows:
        batches = arm(args.batch, size)
        shards = np.mean([len(np.unique(each)) for each, _ in batches])
        found = [domains_of(each, places, args.run) for each, places in batches]
        domains, all_of = np.mean([len(np.unique(each)) for each in found]), len(np.unique(found))
        print(
            f"| {name} | {held:,} | {held * BYTES / 1e9:.1f} | {shards:,.0f} | {domains:,.0f} | {all_of:,} |"
        )


if __name__ == "__main__":
    main()
