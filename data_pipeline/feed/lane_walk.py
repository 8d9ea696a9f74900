"""The lane walk: the raw samples of a worker's lanes, in order, their bytes already on the way.

A lane is an endless row of samples; `order/lanes.py` says which one stands at each (epoch, offset). Here an
offset becomes a `Visit`: the sample's key, a reason against it or its bytes. Nested, from the step down:

    ShareStream.fill                 a step: per_lane usable samples of every lane      (share.py)
      LaneWalk.next_visit            the lane's next raw sample, usable or not; the only place that waits
        LaneWalk.plan_next           hands the next windows to the background
          Walker.plan                in a thread: windows -> visits, reads begun
            Order.visits             offset -> shard and row                            (arithmetic)
            ShardViews.get           row -> key, reason against it, place of its bytes  (the shard's index)
          Unread.begin               what there is room for                             (read_ahead.py)
            MemberReads.start        places -> few range requests                       (reads.py)

Four marks move along a lane and never pass one another:

    epoch 0                                                                   epoch 1
    |. . . d . . . . .|x|= = = = = = = = = = =|- - - - - - - - - -|           |
           |          |  |                     |                   |
           set aside  |  _visits: the first    _plans: a thread    _cursor: nothing
                      |  are being read        still makes them    is planned from here on
                      state: all before it is served, rejected or set aside; x is with the caller

`state` is all that a checkpoint keeps of a lane. What was read ahead of it is read again after a restart;
nothing else is lost, and nothing depends on how far ahead the reading was.

Four lanes, a global batch of four, so one sample per lane and step. The filter rejects C4, and A3 cannot
be read at its first visit:

    lane 0  C2 C1 C0 C3      lane 1  C5 C4 A0 A1      lane 2  A3 A2 A5 A4      lane 3  B0 B2 B1 B3

    step | rank 0           | rank 1           | state of each lane after it: epoch, offset, set aside
       0 | C2      C5       | A2      B0       | [0, 1]   [0, 1]   [0, 2, [0]]   [0, 1]
       1 | C1      A0       | A5      B2       | [0, 2]   [0, 3]   [0, 3, [0]]   [0, 2]
       2 | C0      A1       | A4      B1       | [0, 3]   [0, 4]   [0, 4, [0]]   [0, 3]
       3 | C3      C2       | A3      B3       | [0, 4]   [1, 1]   [0, 4]        [0, 4]

Step 0: lane 2 meets A3, sets its offset aside and serves A2 in the same step. Step 1: lane 1 passes over
C4. No other lane notices either. Step 3: lane 1 is one sample ahead and enters epoch 1 alone; lane 2
would, but first tries again what it had set aside. Failing twice, A3 would be counted `unreadable`.

With aspect buckets, or sources with weights, there is one `LaneWalk` per lane and order of these
(`Buckets.walks`), each with a state of its own. The orders of buckets count accepted samples alone; what the
index rejects is told with its neighbour (`Visit.passed`).
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from functools import partial
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import Rejected
from data_pipeline.feed.moments import MomentsReads
from data_pipeline.feed.read_ahead import MIN_PLAN, ReadAhead, Visit
from data_pipeline.feed.reads import Extent, MemberReads
from data_pipeline.feed.task import ShareTask
from data_pipeline.order.lanes import Order
from data_pipeline.order.position import LaneState
from data_pipeline.shards.view import ShardViews

_MIN_REJECTED_RUN = 1000
PlannedVisits = tuple[list[Visit], list[int]]
"""Visits of a lane in order, and how many of them are of each window."""


class LaneWalk:
    """One lane's samples of one order, without end.

    Take `next_visit`, then tell what became of it with `done` or `defer`, before the next is taken.
    """

    def __init__(self, lane: int, number: int, state: LaneState, walker: Walker) -> None:
        """`number`: of the order among those of `Buckets`."""
        order = walker.buckets.orders[number]
        assert isinstance(order, Order)
        self.lane = lane
        self.bucket, self.source, self.share = walker.buckets.walks[number]
        self.state = state
        self.order = order
        self.patience = max(_MIN_REJECTED_RUN, 2 * self.order.lane_size(lane))
        """Rejections in a row with which the lane counts as hopeless."""
        self._walker = walker
        self._cursor = (state.epoch, state.offset)  # next raw offset to plan
        self._plans: deque[tuple[int, Future[PlannedVisits]]] = deque()
        self.unread = walker.unread_of(self.share)
        self._visits: deque[Visit] = deque()
        self._planned = 0

    def __str__(self) -> str:
        of = "" if self.order.source is None else f" of source {self.source}"
        return f"lane {self.lane}{of} ({self.order.lane_size(self.lane)} per epoch)"

    def ordinal(self, visit: Visit) -> int:
        """Identity of the visit among all of the run."""
        return self.order.ordinal(visit.epoch, self.lane, visit.offset)

    def ready(self) -> int:
        """Visits ahead, planned ones included."""
        return len(self._visits) + sum(n for n, _ in self._plans)

    def plan_next(self) -> int:
        """Start planning and reading the next windows; returns how many samples they hold."""
        epoch, offset = self._cursor
        if offset >= self.order.at(epoch).lane_size(self.lane):
            epoch, offset = epoch + 1, 0
        order = self.order.at(epoch)
        # Windows are planned whole, since their permutation is: a lane that resumes inside one plans it all
        # and drops what lies before `offset`.
        first, stop = order.window_of(self.lane, offset)
        least = MIN_PLAN * self.share
        while stop - offset < least and stop < order.lane_size(self.lane):
            stop = order.window_of(self.lane, stop)[1]
        # Reading begins as soon as the plan is made, but not before what comes before it.
        alone = not self._plans and not self.unread
        task = partial(self._walker.plan, self, epoch, first, stop, offset, float(self._planned), alone)
        # Below every read, which begin at 0: reads cannot be ordered by urgency before they are known.
        # Among plans, the lane that has planned least comes first.
        urgency = -1.0 + self._planned * 1e-9
        self._plans.append((stop - offset, self._walker.background.submit(urgency, task)))
        self._cursor = (epoch, stop)
        self._planned += stop - offset
        return stop - offset

    def next_visit(self) -> Visit:
        """The next sample in order; call `done` or `defer` with it afterwards. Raises DataError."""
        while not self._visits:
            if not self._plans:
                self.plan_next()
            self._take_in()
        visit = self._visits[0]
        # The lane is about to leave an epoch: not before what it set aside has had its second try.
        if visit.epoch > self.state.epoch and self.state.deferred:
            return self._walker.revisit(self, self.state.epoch, self.state.deferred[0])
        self._visits.popleft()
        self.unread.take(visit)
        return visit

    def read_on(self, enough: float) -> bool:
        """Begin to read more of what is planned; returns whether there was room for any."""
        while self._plans and self._plans[0][1].done():
            self._take_in()
        return self.unread.begin(enough)

    def _take_in(self) -> None:
        visits, windows = self._plans.popleft()[1].result()
        self._visits.extend(visits)
        self.unread.add(visits, windows)

    def done(self, visit: Visit) -> None:
        """The visit was served or rejected: commit it."""
        if self._is_second(visit):
            self.state.deferred.remove(visit.offset)
            return
        self.state.epoch, self.state.offset = visit.epoch, visit.offset + 1

    def defer(self, visit: Visit) -> None:
        """Set the visit aside until the end of the epoch. Raises Rejected the second time."""
        if self._is_second(visit):
            raise Rejected("unreadable")
        self.done(visit)
        self.state.deferred.append(visit.offset)

    def _is_second(self, visit: Visit) -> bool:
        # Only what was set aside lies behind the state.
        return visit.epoch == self.state.epoch and visit.offset < self.state.offset


class Walker(ReadAhead[LaneWalk]):
    """All lanes of one worker, with the index views, the reads and the read-ahead budget they share."""

    def __init__(
        self,
        task: ShareTask,
        views: ShardViews,
        reads: MemberReads,
        moments: MomentsReads | None = None,
    ) -> None:
        super().__init__(task, moments)
        self.buckets = task.buckets
        self.background = reads.background
        self._skip_ordinals = task.skip_ordinals
        self._views = views
        self._reads = reads
        self._set_out(task, partial(LaneWalk, walker=self))

    def plan(
        self, walk: LaneWalk, epoch: int, first: int, stop: int, skip_to: int, due: float, alone: bool
    ) -> PlannedVisits:
        """Visits of the whole windows [first, stop) from `skip_to` on.

        `due` is the number of samples that the lane had planned before; `alone`: all of these are under way,
        so that reading may begin.
        """
        shards, rows = walk.order.visits(epoch, walk.lane, first, stop)
        visits = self._visits(walk, epoch, skip_to, shards[skip_to - first :], rows[skip_to - first :], due)
        windows, offset, order = [], skip_to, walk.order.at(epoch)
        while offset < stop:
            end = min(stop, order.window_of(walk.lane, offset)[1])
            windows.append(end - offset)
            offset = end
        if alone:
            unread = self.unread_of(walk.share)
            unread.add(visits, windows)
            unread.begin(self.enough * walk.share)
        return visits, windows

    def revisit(self, walk: LaneWalk, epoch: int, offset: int) -> Visit:
        """One visit that was set aside."""
        first, stop = walk.order.at(epoch).window_of(walk.lane, offset)
        shards, rows = walk.order.visits(epoch, walk.lane, first, stop)
        at = slice(offset - first, offset - first + 1)
        (visit,) = self._visits(walk, epoch, offset, shards[at], rows[at], due=0.0)
        if visit.reason is None:
            unread = self.unread_of(walk.share)
            unread.add([visit], [1])
            unread.take(visit)
        return visit

    def _visits(
        self,
        walk: LaneWalk,
        epoch: int,
        offset: int,
        shards: NDArray[np.int64],
        places: NDArray[np.int64],
        due: float,
    ) -> list[Visit]:
        """Visits of consecutive offsets from `offset` on."""
        ordinal = walk.order.ordinal(epoch, walk.lane, offset)
        visits = []
        # Shard by shard: a window may lie in more of them than views, or tables of moments, are kept.
        for slot in np.argsort(shards, kind="stable").tolist():
            shard = int(shards[slot])
            view = self._views.get(shard)
            row = view.row(walk.bucket, int(places[slot]))
            reason = view.reason(row)
            if reason is None and ordinal + slot in self._skip_ordinals:
                reason = "skipped"
            visit = Visit(
                epoch,
                offset + slot,
                shard,
                view.key(row),
                reason,
                slot=slot,
                late=view.late_filter(row),
                original=view.original(row),
                beside=view.captions(row),
                passed=[(view.reason(other) or "", view.key(other)) for other in view.passed(row)],
                due=due,
            )
            visits.append(visit)
            if reason is not None:
                continue
            planned = None
            if self._moments is not None:
                target = self.buckets.shapes[walk.bucket]
                planned = self._moments.plan(shard, view, row, target, ordinal + slot)
            visit.want(view, row, planned)
        return sorted(visits, key=attrgetter("slot"))

    def _start(self, visits: list[Visit], near: int) -> None:
        by_slot = {visit.slot: visit for visit in visits}
        wanted: dict[int, list[Extent]] = {}
        for visit in visits:
            if visit.wanted:
                wanted.setdefault(visit.shard, []).extend(visit.wanted)
        for (slot, extension), future in self._reads.start(wanted, visits[0].due, near).items():
            by_slot[slot].members[extension] = future
