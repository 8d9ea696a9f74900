"""The walk over shards that nobody has indexed: a lane reads one shard after the other, window by window.

`lane_walk.py` plans by indexes: it knows the windows before their bytes. Here a window is known when it has
been read, and the next one begins where it ends, so a lane has one plan at a time; the lanes have theirs
together:

    ShareStream.fill                 a step: per_lane usable samples of every lane      (share.py)
      TurnWalk.next_visit            the lane's next sample, usable or not; the only place that waits
        TurnWalker.plan              in a thread: the lane's next windows -> visits, their bytes in memory
          Turns.shard                turn -> shard                                      (order/turns.py)
          LearnedShards.open         shard -> its windows                               (learned.py)
          TarPieces.next             bytes -> samples and their index                   (shards/pieces.py)
          ShardViews.of              index -> reasons against samples                   (shards/view.py)

`state` is (turn, visits of it that are done, `Mark`): the mark says at which byte the window of the last
visit begins and how many samples of the shard come before it. So whoever goes on from there, on any rank,
reads one window again and knows the rest. What a shard holds, and how many, matters to its own lane alone.

Where data.buffer_bytes has no room for a window (`read_ahead.py`), its headers and small members are read,
and its pictures when their turn comes. Of a window that is planned from the index of an earlier visit nothing
is read before that, and of what the cache of moments has neither then. The order is the same: a window's.

A shard that is no tar, has members that cannot be joined on the way, is not there, was replaced under the
lane's feet or does not answer while others do is left with one visit that says so (`shard/*` in the reject
file), and the lane takes its next turn.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

import numpy as np

from data_pipeline.errors import DataError, Gone, NotATar, ReadFailed, Rejected, Replaced
from data_pipeline.feed.lane_walk import PlannedVisits
from data_pipeline.feed.learned import LearnedShards, Pieces
from data_pipeline.feed.moments import MomentsReads
from data_pipeline.feed.read_ahead import MIN_PLAN, ReadAhead, Visit
from data_pipeline.feed.reads import Contents, Extent, MemberReads
from data_pipeline.feed.task import ShareTask
from data_pipeline.order.position import LaneState, Mark
from data_pipeline.order.turns import MAX_SAMPLES, Turns
from data_pipeline.shards.beside import JsonCheck
from data_pipeline.shards.pieces import HEADERS, IndexedPieces, TarPiece
from data_pipeline.shards.view import REST, ShardViews
from data_pipeline.storage.editions import Edition

logger = logging.getLogger(__name__)

_MAX_EMPTY = 1000
"""Shards without a sample that a lane passes in a row, or two epochs of all."""
_MAX_TOLD = 20
_LEAST_CHUNK = 65_536
_ROUGHLY = 1.1
"""What windows differ by."""
_DROP = 1_000_000
_SMALL = 4096
"""Members that are kept of a window without room: texts, which no request is to be made for."""
_HOPELESS = 20_000
"""Rejections in a row that a lane may have: two of img2dataset's shards."""


class TurnWalk:
    """One lane's samples, without end; used as `LaneWalk` is."""

    def __init__(self, lane: int, number: int, state: LaneState, walker: TurnWalker) -> None:
        """`number`: of the order among those of `Buckets`."""
        turns = walker.buckets.orders[number]
        assert isinstance(turns, Turns)
        self.turns = turns
        self.bucket, self.source, self.share = walker.buckets.walks[number]
        self.lane = lane
        self.state = state
        self.patience = _HOPELESS
        self.turn, self.mark, self.skip_to = state.epoch, state.mark, state.offset
        """Where the next plan begins: the turn, its window, and the visits of it that are done."""
        if self.mark is not None and self.mark.first < 0:
            self.next_turn()
        self.pieces: Pieces | None = None
        self.check: JsonCheck | None = None
        self.indexed: Future[bool] | None = None
        """Whether the index of the shard is there, if this is a question."""
        self.planned = 0
        self.sample_bytes = walker.sample_bytes
        """Mean of the last window."""
        self.beyond = 0
        """Bytes that are held and belong to no visit yet."""
        self.unread = walker.unread_of(self.share)
        self._walker = walker
        self._plan: Future[PlannedVisits] | None = None
        self._visits: deque[Visit] = deque()

    def __str__(self) -> str:
        of = "" if self.turns.source is None else f" of source {self.source}"
        return f"the shards of lane {self.lane}{of}"

    @property
    def first(self) -> int:
        """Samples of the shard before the window that the next plan begins with."""
        if self.pieces is not None:
            return self.pieces.first
        return self.mark.first if self.mark is not None else 0

    def next_turn(self) -> None:
        """Begin the next plan with another shard."""
        self.turn, self.mark, self.skip_to = self.turn + 1, None, 0
        self.pieces, self.check, self.indexed = None, None, None

    def ready(self) -> int:
        """Visits ahead; enough while a plan is on its way, for the next one begins where it ends."""
        self._take_in_made()
        return len(self._visits) if self._plan is None else sys.maxsize

    def read_on(self, enough: float) -> bool:
        """Begin to read what was jumped over; returns whether there was room for any."""
        self._take_in_made()
        return self.unread.begin(enough)

    def _take_in_made(self) -> None:
        if self._plan is not None and self._plan.done():
            self._take_in()

    def _take_in(self) -> None:
        assert self._plan is not None
        visits, windows = self._plan.result()
        self._visits.extend(visits)
        self.unread.add(visits, windows)
        self._plan = None

    def plan_next(self) -> None:
        """Start reading the next windows."""
        assert self._plan is None
        # The lane that has planned least comes first.
        task = partial(self._walker.plan, self, needy=len(self._visits) < self._walker.few)
        self._plan = self._walker.background.submit(float(self.planned), task)

    def next_visit(self) -> Visit:
        """The next sample in order; call `done` or `defer` with it afterwards. Raises DataError."""
        while not self._visits:
            if self._plan is None:
                self.plan_next()
            self._take_in()
        visit = self._visits.popleft()
        self.unread.take(visit)
        return visit

    def ordinal(self, visit: Visit) -> int:
        """Identity of the visit among all of the run."""
        return self.turns.ordinal(visit.epoch, self.lane, visit.offset)

    def done(self, visit: Visit) -> None:
        """The visit was served or rejected: commit it."""
        self.state.epoch, self.state.offset, self.state.mark = visit.epoch, visit.offset + 1, visit.mark

    def defer(self, visit: Visit) -> None:
        """Bytes are there with the visit, or there is none: nothing to be set aside."""
        raise Rejected("unreadable")


def _take_over(piece: TarPiece, visits: Sequence[Visit], largest: int) -> None:
    """Give visits what of theirs is in memory, which then is there once, and not in the window as well.

    largest: bytes of a member above which it is read later
    """
    contents: dict[int, Contents] = {visit.slot: {} for visit in visits}
    pairs = [(extent, visit) for visit in visits for extent in visit.wanted]
    dropped = 0
    for extent, visit in sorted(pairs, key=lambda pair: pair[0]):
        if extent.stop - extent.start <= largest and piece.holds(extent.start, extent.stop):
            contents[visit.slot][extent.slot, extent.extension] = piece.read(extent.start, extent.stop)
            visit.wanted.remove(extent)
        if extent.start - dropped > _DROP:
            piece.drop(dropped := extent.start)
    for visit in visits:
        visit.hold(contents[visit.slot], early=largest > _SMALL)


class TurnWalker(ReadAhead[TurnWalk]):
    """All lanes of one worker, with the reads, the views and the memory that they share."""

    def __init__(
        self,
        task: ShareTask,
        views: ShardViews,
        reads: MemberReads,
        shards: LearnedShards,
        moments: MomentsReads | None,
    ) -> None:
        super().__init__(task, moments)
        self.buckets = task.buckets
        self.background = reads.background
        self._config = task.config
        self._dataset = task.dataset
        self._skip_ordinals = task.skip_ordinals
        self._views, self._reads, self._shards = views, reads, shards
        self.sample_bytes = task.dataset.mean_bytes
        self._removing = any(each.removals for each in views.selections)
        self._least = max(MIN_PLAN, task.per_lane)
        self.few = 2 * task.per_lane
        self._left_out: dict[int, str] = {}
        self._told: set[str] = set()
        self._noting = threading.Lock()
        self._set_out(task, partial(TurnWalk, walker=self))

    def _start(self, visits: list[Visit], near: int) -> None:
        """Begin to read what is not in memory of visits of one window."""
        by_slot = {visit.slot: visit for visit in visits}
        wanted: dict[tuple[int, Edition], list[Extent]] = {}
        for visit in visits:
            assert visit.mark is not None
            met = visit.shard, Edition(visit.mark.size, visit.mark.version)
            wanted.setdefault(met, []).extend(visit.wanted)
        found = self._reads.start_from(wanted, visits[0].due, self._reads.read_met, near)
        for (slot, extension), future in found.items():
            by_slot[slot].members[extension] = future

    def plan(self, walk: TurnWalk, *, needy: bool) -> PlannedVisits:
        """The lane's next visits, window by window; none where there is no room and it is not `needy`."""
        visits: list[Visit] = []
        windows: list[int] = []
        least = self._least * walk.share if walk.planned else 1  # somebody waits for the first
        empty = 0
        while len(visits) < least:
            if empty > max(_MAX_EMPTY, 2 * walk.turns.shards):
                raise DataError("The shards hold no samples; check data.shards with `ldm data inspect`.")
            turn, shard = walk.turn, walk.turns.shard(walk.lane, walk.turn)
            try:
                size = walk.turns.window_size(walk.lane, walk.first)
                by_index = isinstance(walk.pieces, IndexedPieces)
                room = 0 if by_index else self._room(walk, size)
                if not (room or by_index) and (visits or not needy):
                    self._hold(walk, 0, [])
                    break
                some = self._window(walk, turn, shard, size, room)
                if some is None:
                    assert walk.pieces is not None
                    ordinal = walk.turns.ordinal(turn, walk.lane, walk.first)
                    self._shards.learn(shard, walk.pieces, walk.indexed, ordinal)
                    walk.next_turn()
                    empty += 1
                    continue
                empty = 0
                windows.append(len(some))
                visits += some
                continue
            except (NotATar, Gone) as error:
                left = self._left(walk, shard, "bad_shard", error)
            except Replaced as error:
                left = self._left(walk, shard, "shard_replaced", error)
            except ReadFailed as error:
                left = self._left(walk, shard, "unreadable", error)
            windows.append(1)
            visits.append(left)
        walk.planned += len(visits)
        return visits, windows

    def _window(self, walk: TurnWalk, turn: int, shard: int, size: int, room: int) -> list[Visit] | None:
        """Visits of the next window, which has a `room`; None at the end of the shard."""
        visits: list[Visit] | None = None
        chunk = self._chunk(size)
        try:
            if walk.pieces is None:
                first_bytes = min(chunk, max(HEADERS, room - HEADERS))
                walk.pieces, walk.indexed = self._shards.open(shard, walk.mark, first_bytes)
                walk.check = self._check_of(shard, walk.pieces)
            piece = walk.pieces.next(size, chunk, max(0, room - HEADERS))
            if piece is None:
                return None
            if walk.check is not None:
                walk.check(piece.index)
            visits = self._visits(walk, turn, shard, piece)
            _take_over(piece, visits, sys.maxsize if room else _SMALL)
            walk.pieces.release(everything=not room)
            return visits
        finally:
            self._hold(walk, room, visits or [])

    def _check_of(self, shard: int, pieces: Pieces) -> JsonCheck | None:
        """What makes sure that no window lacks what the parquet has; None where an index of an earlier
        version has seen to it, which does not tell which parquet that was.
        """
        reader, noted = self._reads.reader, pieces.beside if isinstance(pieces, IndexedPieces) else ""
        if isinstance(pieces, IndexedPieces) and not noted:
            return None
        columns = self._views.selections[self._dataset.source_of[shard]].columns
        return JsonCheck(
            self._dataset.urls[shard],
            columns,
            self._removing,
            reader.read_if_there,
            self._tell,
            noted,
            reader.edition_if_there,
        )

    def _tell(self, what: str) -> None:
        """Say it once, until it is clear that there are many."""
        with self._noting:
            if what in self._told or len(self._told) >= _MAX_TOLD:
                return
            self._told.add(what)
            told = len(self._told)
        logger.warning("%s%s", what, " (further ones are not told)" if told == _MAX_TOLD else "")

    def _room(self, walk: TurnWalk, samples: int) -> int:
        """Bytes that the next window may hold, which are held from now on; 0: it has to do with headers."""
        self.budget.give(walk.beyond)
        walk.beyond = 0
        held = walk.pieces.held_bytes if walk.pieces is not None else 0
        room = max(held, int(samples * walk.sample_bytes * _ROUGHLY)) + HEADERS
        return room if self.budget.take_window(room, walk.unread.part / 2) else 0

    def _hold(self, walk: TurnWalk, room: int, visits: Sequence[Visit]) -> None:
        """Count what a window holds instead of the room that it was given."""
        walk.beyond = walk.pieces.held_bytes if walk.pieces is not None else 0
        for visit in visits:
            if visit.reason is None and not visit.wanted and visit.place is None:
                visit.budget = self.budget
        held = sum(v.early if v.budget is None else v.num_bytes for v in visits)
        self.budget.give(room)
        self.budget.take(held + walk.beyond, anyway=True)

    def _chunk(self, samples: int) -> int:
        """Bytes to ask for at a time: a window of usual samples."""
        usual = int(samples * self._dataset.mean_bytes * _ROUGHLY)
        return min(self._config.read_ahead_bytes, max(_LEAST_CHUNK, usual))

    def _visits(self, walk: TurnWalk, turn: int, shard: int, piece: TarPiece) -> list[Visit]:
        view = self._views.of(piece.index, int(self._dataset.source_of[shard]))
        if piece.first + len(view.keys) > MAX_SAMPLES:
            raise DataError(
                f"{self._dataset.urls[shard]} has more than {MAX_SAMPLES:,} samples; cut it into several."
            )
        mark = Mark(piece.first, piece.byte, piece.index.size, piece.index.version)
        edition, target = Edition(mark.size, mark.version), self.buckets.shapes[walk.bucket]
        rows = walk.turns.shuffled(walk.lane, turn, piece.first, len(view.keys)).tolist()
        visits = []
        for slot, row in enumerate(rows):
            offset = piece.first + slot
            if offset < walk.skip_to:
                continue
            visit = Visit(
                turn,
                offset,
                shard,
                view.key(row),
                view.reason(row),
                slot=slot,
                late=view.late_filter(row),
                original=view.original(row),
                beside=view.captions(row),
                mark=mark,
                due=float(walk.planned),
            )
            ordinal, planned = walk.ordinal(visit), None
            if visit.reason is None and ordinal in self._skip_ordinals:
                visit.reason = "skipped"
            if visit.reason is None:
                if self._moments is not None:
                    planned = self._moments.plan(shard, view, row, target, ordinal, edition)
                visit.want(view, row, planned)
            visits.append(visit)
        walk.sample_bytes = float(piece.index.sizes.sum(dtype=np.int64)) / len(view.keys)
        return visits

    def _left(self, walk: TurnWalk, shard: int, reason: str, why: Exception) -> Visit:
        """The visit that stands for what is left of a shard, of which the lane takes leave.

        Raises NotATar where there are too many `bad_shard`.
        """
        offset = max(walk.first, walk.skip_to)
        with self._noting:
            self._left_out[shard] = reason
            told, bad = len(self._left_out), sum(r == "bad_shard" for r in self._left_out.values())
        if told <= _MAX_TOLD:
            logger.warning("left out: %s%s", why, " (further ones are not told)" if told == _MAX_TOLD else "")
        if reason == "bad_shard" and bad > self._config.max_bad_shards * len(self._dataset.urls):
            raise NotATar(
                f"{why} {bad} of the {len(self._dataset.urls)} shards cannot be used so far; correct them, "
                "or raise data.max_bad_shards."
            ) from why
        visit = Visit(walk.turn, offset, shard, REST, reason, mark=Mark(-1, 0, 0, ""))
        walk.next_turn()
        return visit
