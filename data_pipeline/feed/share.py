"""One worker's share of every step: walks its lanes and fills arrays in shared memory.

A global batch is cut by lanes. Eight samples, four lanes, two ranks with two workers each: a lane gives two
samples per step, a worker has one lane.

    slot      0   1 | 2   3 | 4   5 | 6   7
    lane        0   |   1   |   2   |   3
    worker    0.0   |  0.1  |  1.0  |  1.1        (rank.worker)

On one rank with one worker the same worker would have all four lanes, on three ranks rank 0 would have two:
the slots keep their samples, and whoever joins the shares of all workers of all ranks, in order, has the same
global batch.

One row, from the inside out:

    fill            for lane: for each of its two rows  -> FilledShare, with the lanes' states after the step
                    (from the walk whose turn it is, where sources have weights: order/mixture.py)
      _fill_row     until one visit is served:  take the next, commit it
        _serve      visit -> reason against it?   -> Rejected: counted, and the lane moves on
                          -> bytes do not come?   -> set aside, the lane moves on
                          -> decode, crop, caption, conditions into the row   -> its caption
                             (or moments instead of pixels, where they were encoded before: moments.py)

A rejection moves the lane, never the row: each row is filled from the lane that owns it, so no other
lane's samples shift, and the states differ only in the lanes that met one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from data_pipeline.errors import DataError, ReadFailed, Rejected, Replaced
from data_pipeline.feed.editions import REINDEX
from data_pipeline.feed.lane_walk import LaneWalk, Walker
from data_pipeline.feed.learned import LearnedShards
from data_pipeline.feed.moments import MomentsReads
from data_pipeline.feed.read_ahead import Budget, Visit
from data_pipeline.feed.reads import MemberReads
from data_pipeline.feed.sample import Known, Reused, draw_crop, fill_sample
from data_pipeline.feed.task import ShareTask
from data_pipeline.feed.turn_walk import TurnWalk, TurnWalker
from data_pipeline.moments.entry import Label
from data_pipeline.order.turns import Turns
from data_pipeline.pictures.crops import Geometry
from data_pipeline.shards.removals import read_removals
from data_pipeline.shards.selection import make_selection
from data_pipeline.shards.sources import configs_of
from data_pipeline.shards.view import ShardViews
from data_pipeline.storage.cache import BlockCache
from data_pipeline.storage.ranges import Background, RangeReader

_THREADS = 16
"""Requests under way at a time; nearly all of a thread's time is waiting."""


@dataclass
class FilledShare:
    """What goes with the arrays of one step."""

    height: int
    width: int
    captions: list[str]
    keys: list[str]
    states: list[list[Any]]
    """JSON form of each lane's state once this share is consumed."""
    rejects: list[tuple[str, str, str, int]] = field(default_factory=list)
    """(reason, key, detail, ordinal) since the last share"""
    counts: dict[str, int] = field(default_factory=dict)
    """requests, bytes, retries, failures since the last share"""
    labels: list[Label | None] = field(default_factory=list)
    """Of each row that is to be encoded, under what it may be stored; empty without a cache of moments."""
    without_pixels: bool = False
    """Every row is in the cache of moments."""


class ShareStream:
    """Produces the shares of one worker, in step order, for ever."""

    def __init__(self, task: ShareTask) -> None:
        config = task.config
        self._task = task
        self._reader = RangeReader(
            timeout_s=config.request_timeout_s,
            tries=config.max_retries,
            patience_s=config.patience_s,
            probes=(*task.dataset.urls[:2], *task.dataset.urls[-2:], *task.dataset.index_urls[:1]),
        )
        self._background = Background(_THREADS)
        cache = BlockCache(config.cache_dir, config.cache_bytes) if config.cache_dir else None
        # A lane is in one shard of each source, and reads ahead in the next.
        capacity = 2 * len(task.lanes) * max(1, len(task.dataset.shares)) + 8
        self._configs = configs_of(config)
        removals = read_removals(config.removal_lists) if task.removals is None else task.removals
        selections = [make_selection(each, removals) for each in self._configs]
        encoded = task.moments.cache is not None
        views = ShardViews(
            task.dataset, selections, task.buckets, self._reader, capacity, with_identities=encoded
        )
        # A request's bytes are there twice while they are cut into members.
        range_bytes = min(config.read_ahead_bytes, config.buffer_bytes // (2 * _THREADS))
        reads = MemberReads(task.dataset, self._reader, self._background, cache, range_bytes)
        self._moments = MomentsReads(task, reads, capacity) if encoded else None
        self._learned: LearnedShards | None = None
        self._walker: Walker | TurnWalker
        if isinstance(task.order, Turns):
            self._learned = LearnedShards(task.dataset, self._reader, selections if encoded else ())
            self._walker = TurnWalker(task, views, reads, self._learned, self._moments)
        else:
            self._walker = Walker(task, views, reads, self._moments)
        self._labels: list[Label | None] = []
        self._step = task.step
        self._sent: Counter[str] = Counter()
        self._rejects: list[tuple[str, str, str, int]] = []
        self._walker.read_ahead()

    @property
    def budget(self) -> Budget:
        """What is held ahead of decoding."""
        return self._walker.budget

    def fill(self, buffer: memoryview) -> FilledShare:
        """Write the arrays of the next step to `buffer`. Raises DataError."""
        buckets = self._task.buckets
        bucket, turn = buckets.turn_of_step(self._step)
        height, width = buckets.shapes[bucket]
        out = self._task.layout(height, width).arrays(buffer)
        captions: list[str] = []
        keys: list[str] = []
        self._labels = []
        mixture, place, each = buckets.mixtures[bucket], buckets.walks_of(bucket), len(buckets.orders)
        first = turn * self._task.per_lane
        for i, lane in enumerate(self._task.lanes):
            walks = self._walker.walks[i * each : (i + 1) * each][place]
            for row in range(first, first + self._task.per_lane):
                walk = walks[mixture.source(lane, row)]
                caption, key = self._fill_row(walk, (height, width), out, len(keys))
                captions.append(caption)
                keys.append(key)
                self._walker.read_on()
        self._walker.read_ahead()
        self._step += 1
        if self._moments is not None:  # a row is one or the other, and nothing is left from earlier steps
            out["pixels"][out["found"]] = 0
            out["moments"][~out["found"]] = 0
        if self._learned is not None:
            while self._learned.differences:
                self._rejects.append(self._learned.differences.popleft())
        counts = self._counts()
        share = FilledShare(
            height=height,
            width=width,
            captions=captions,
            keys=keys,
            states=[walk.state.as_json() for walk in self._walker.walks],
            rejects=self._rejects,
            counts=dict(counts - self._sent),
            labels=self._labels,
            without_pixels=self._moments is not None and bool(out["found"].all()),
        )
        self._sent = counts
        self._rejects = []
        return share

    def _counts(self) -> Counter[str]:
        moments = self._moments.counts if self._moments is not None else Counter[str]()
        return self._reader.counts + moments

    def _fill_row(
        self, walk: LaneWalk | TurnWalk, target: tuple[int, int], out: dict[str, NDArray[Any]], row: int
    ) -> tuple[str, str]:
        for _ in range(walk.patience):
            visit = walk.next_visit()
            ordinal = walk.ordinal(visit)
            try:
                caption = self._serve(walk, visit, ordinal, target, out, row)
            except Rejected as error:
                self._done(walk, visit, ordinal)
                self._rejects.append((error.reason, self._key(visit), error.detail, ordinal))
                continue
            if caption is None:
                continue
            self._done(walk, visit, ordinal)
            out["ordinals"][row] = ordinal
            return caption, self._key(visit)
        raise self._all_rejected(walk)

    def _done(self, walk: LaneWalk | TurnWalk, visit: Visit, ordinal: int) -> None:
        """Commit a visit, and account for the rejected samples beside it."""
        walk.done(visit)
        for reason, key in visit.passed:
            name = self._task.dataset.sample_key(visit.shard, key)
            self._rejects.append((reason, name, "", ordinal))

    def _serve(
        self,
        walk: LaneWalk | TurnWalk,
        visit: Visit,
        ordinal: int,
        target: tuple[int, int],
        out: dict[str, NDArray[Any]],
        row: int,
    ) -> str | None:
        """Caption, or None when the visit was set aside."""
        if visit.reason is not None:
            raise Rejected(visit.reason)
        try:
            members, reused = self._load(visit)
        except Replaced as error:
            raise Rejected("shard_replaced", str(error)[:300]) from error
        except ReadFailed as error:
            walk.defer(visit)
            self._rejects.append(("set_aside", self._key(visit), str(error)[:300], ordinal))
            return None
        task = self._task
        config = self._configs[task.dataset.source_of[visit.shard]]
        place = draw_crop(config, visit.key, task.moments.variants, seed=task.order.seed, ordinal=ordinal)
        caption, geometry = fill_sample(
            config,
            members,
            Known(visit.late, visit.original, visit.beside),
            target=target,
            draws=(task.order.seed, ordinal, place),
            out=out,
            row=row,
            reused=reused,
        )
        if self._moments is not None:
            out["found"][row] = reused is not None
            self._labels.append(self._label(visit, members, geometry) if reused is None else None)
            self._moments.count("missed" if reused is None else "found")
        return caption

    def _load(self, visit: Visit) -> tuple[dict[str, bytes], Reused | None]:
        """Members and what stands for the picture among them. Raises ReadFailed, Replaced."""
        members = visit.load()
        if self._moments is None or visit.planned is None or visit.planned.place is None:
            return members, None
        reused = self._moments.take(visit.planned, visit.slot)
        return members | self._moments.unread(visit.planned, reused), reused

    def _label(self, visit: Visit, members: dict[str, bytes], geometry: Geometry) -> Label | None:
        if self._moments is None or visit.planned is None:
            return None
        return self._moments.label(visit.planned, members, geometry)

    def _key(self, visit: Visit) -> str:
        return self._task.dataset.sample_key(visit.shard, visit.key)

    def _all_rejected(self, walk: LaneWalk | TurnWalk) -> DataError:
        reasons = Counter(reason for reason, _, _, _ in self._rejects).most_common(3)
        listed = ", ".join(f"{reason} ({count})" for reason, count in reasons)
        remedy = (
            "loosen data.filter, correct the shards, or begin a new run (init_from) with fewer data.lanes, "
            "each of which has more samples"
        )
        if reasons and reasons[0][0] == "shard_replaced":
            remedy = (
                f"the shards changed after they were indexed: {REINDEX}, or where they have other numbers of "
                "samples begin a new one (init_from)"
            )
        if reasons and reasons[0][0] == "too_small":
            remedy = "lower data.image_size to what the pictures have, or set data.allow_enlarging=true"
        return DataError(f"Every sample of {walk} is rejected: {listed}; {remedy}.")

    def close(self) -> None:
        """Stop the threads."""
        if self._learned is not None:
            self._learned.close()
        self._reader.close()
        if self._moments is not None:
            self._moments.close()
        self._background.close()


class InlineShare:
    """What a WorkerProcess is, in this process (workers=0): reads ahead in threads, decodes when asked."""

    def __init__(self, task: ShareTask) -> None:
        self._stream = ShareStream(task)
        self._memory = memoryview(bytearray(task.layout().bytes))

    def take(self) -> tuple[FilledShare, memoryview, int]:
        """The next share, the memory that it lies in, and the number to release that with."""
        return self._stream.fill(self._memory), self._memory, 0

    def release(self, slot: int) -> None:
        """Nothing: the copy is made before the next `take`."""

    def close(self) -> None:
        """Stop reading ahead."""
        self._stream.close()
