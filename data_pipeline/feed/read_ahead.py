"""data.buffer_bytes as a bound: what a worker has read, or asked for, ahead of decoding.

Bytes are counted, not estimated. Whatever is read ahead is taken from one `Budget` before it is asked for,
and given back when its sample is about to be decoded. A lane shuffles windows, and neighbours in a window lie
side by side in the shard, so a window is read whole where there is room:

    held    |= = = lane 0 = = =|= lane 1 =|= = lane 2 = =|                 |           |
            0                                                    7/8 of the limit    limit

Lanes begin their windows at different steps, so that together they hold about half of all. Where a window
has no room, a lane that runs short gets some of its samples one by one, as its part of the limit has room for
them; the last eighth is kept for that. Where there is no room for one sample, it is read when its turn has
come. So no more is held than the limit and the sample that is about to be decoded, at any number of lanes.
"""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from data_pipeline.feed.moments import MomentsReads, PlannedMoments
from data_pipeline.feed.reads import GAP, Contents, Extent
from data_pipeline.feed.task import ShareTask
from data_pipeline.moments.catalogue import EntryPlace
from data_pipeline.order.position import LaneState, Mark
from data_pipeline.shards.filters import Filter
from data_pipeline.shards.view import ShardView

MIN_PLAN = 64
"""Raw samples planned at a time at least: a plan costs a thread's attention whatever its length."""
_STEPS_AHEAD = 8
"""Steps for which every lane has reads under way at least, memory permitting."""
_WHOLE = 7 / 8
"""Share of the limit that whole windows may fill."""
_LARGE = 4
"""A window of more than so many times a lane's part of the limit is not read whole."""
_NEAR = 4096
"""Gap that members may have which are read in one request, but not with their window: a few headers."""


class Budget:
    """Bytes that are held ahead by all threads of a worker."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.most = 0
        """The most that was held at a time."""
        self._lock = threading.Lock()

    def take(self, size: int, *, anyway: bool = False) -> bool:
        """Whether there is room for so many bytes; if so, or `anyway`, they are held from now on."""
        return self._take(size, self.limit, anyway)

    def take_window(self, size: int, part: float) -> bool:
        """The same for a whole window of a lane whose part of the limit this is."""
        return size <= _LARGE * part and self._take(size, _WHOLE * self.limit, False)

    def _take(self, size: int, limit: float, anyway: bool) -> bool:
        with self._lock:
            if self.held + size > limit and not anyway:
                return False
            self.held += size
            self.most = max(self.most, self.held)
            return True

    def give(self, size: int) -> None:
        """So many bytes are held no longer."""
        with self._lock:
            self.held -= size


@dataclass
class Visit:
    """One raw sample of a lane on its way."""

    epoch: int
    offset: int
    shard: int
    """Distinct shard."""
    key: str
    reason: str | None
    """Why it is rejected without being read."""
    members: dict[str, Future[Contents]] = field(default_factory=dict)
    slot: int = 0
    """Place in its plan."""
    late: Filter | None = None
    """Clauses that its json must still satisfy."""
    original: tuple[int, int] | None = None
    """Height and width before the picture was stored, where its json says so."""
    beside: dict[str, Any] = field(default_factory=dict)
    """Captions that lie beside the tar, by column."""
    passed: list[tuple[str, str]] = field(default_factory=list)
    """(reason, key) of rejected samples beside it that no order counts."""
    planned: PlannedMoments | None = None
    """What the cache of moments has for it, or may get from it."""
    mark: Mark | None = None
    """Of a lane that takes turns at shards: where its window begins."""
    due: float = 0.0
    """Samples that its lane serves before its plan."""
    wanted: list[Extent] = field(default_factory=list)
    """Members that are to be read."""
    num_bytes: int = 0
    """What it holds in memory once it has been asked for, without `early`."""
    early: int = 0
    """What came with its window before the rest is asked for, and counts since then."""
    budget: Budget | None = None
    """What it counts in while it is held, from when it was asked for."""

    def want(self, view: ShardView, row: int, planned: PlannedMoments | None) -> None:
        """Note where its members lie in the shard, but those that `planned` has in the cache of moments."""
        self.planned = planned
        without = planned.unread if planned is not None else ()
        if self.place is not None:
            self.num_bytes += self.place.size
        places = zip(view.offsets[:, row].tolist(), view.sizes[:, row].tolist(), strict=True)
        for extension, (start, size) in zip(view.members, places, strict=True):
            if start >= 0 and extension not in without:
                self.wanted.append(Extent(start, start + size, self.slot, extension))
                self.num_bytes += size

    @property
    def place(self) -> EntryPlace | None:
        """Where the cache of moments has it."""
        return self.planned.place if self.planned is not None else None

    def hold(self, contents: Contents, *, early: bool) -> None:
        """Some of its members are there already; `early`: they count before the others are asked for."""
        if early and (self.wanted or self.place is not None):
            self.early = sum(len(content) for content in contents.values())
            self.num_bytes -= self.early
        there: Future[Contents] = Future()
        there.set_result(contents)
        self.members = {extension: there for _, extension in contents}

    def load(self) -> dict[str, bytes]:
        """Member contents by extension; waits for them. Raises ReadFailed."""
        try:
            # pop: all samples of a range share its future, which must not keep those that are decoded
            return {e: future.result().pop((self.slot, e)) for e, future in self.members.items()}
        finally:
            if self.budget is not None:
                self.budget.give(self.num_bytes + self.early)
                self.budget = None


@dataclass
class _WaitingVisits:
    """Visits of a window that are not asked for."""

    visits: deque[Visit]
    whole: bool
    """Whether they are all of its visits."""
    num_bytes: int
    """Kept: a lane that waits for room asks at every step."""


class Unread:
    """What a lane has planned and not yet asked for, window by window, and how much it has ahead."""

    def __init__(self, budget: Budget, part: float, start: Callable[[list[Visit], int], object]) -> None:
        """`part`: bytes of the budget that are this lane's. `start`: asks for visits of one plan, members
        that are so near in one request."""
        self.part = part
        self.ahead = 0
        """Visits that are asked for and not taken."""
        self._held = 0
        self._budget, self._start = budget, start
        self._windows: deque[_WaitingVisits] = deque()

    def __bool__(self) -> bool:
        return bool(self._windows)

    def add(self, visits: Sequence[Visit], windows: Sequence[int]) -> None:
        """The next visits, in windows of so many; those that were asked for count as ahead."""
        first = 0
        for size in windows:
            some = [visit for visit in visits[first : first + size] if visit.reason is None]
            rest = deque(visit for visit in some if visit.budget is None)
            if rest:
                total = sum(visit.num_bytes for visit in rest)
                self._windows.append(_WaitingVisits(rest, len(rest) == len(some), total))
            for visit in some:
                if visit.budget is not None:
                    self._count(visit)
            first += size

    def begin(self, enough: float) -> bool:
        """Ask for windows, or for some visits where these have no room, until `enough` are ahead.

        Returns whether anything was asked for.
        """
        before = self.ahead
        while self._windows and self.ahead < enough:
            window = self._windows[0]
            if self._budget.take_window(window.num_bytes, self.part):
                self._ask(list(window.visits), GAP if window.whole else _NEAR)
            elif self._held > self.part / 2 or not (some := self._affordable(window.visits)):
                break
            else:
                self._ask(some, _NEAR)
        return self.ahead > before

    def _affordable(self, window: deque[Visit]) -> list[Visit]:
        """The next visits, as many as half of the lane's part has room for, at least one."""
        some, size = [window[0]], window[0].num_bytes
        for visit in itertools.islice(window, 1, None):
            if size + visit.num_bytes > self.part / 2:
                break
            some.append(visit)
            size += visit.num_bytes
        return some if self._budget.take(size) else []

    def take(self, visit: Visit) -> None:
        """A visit is about to be decoded: if it was not asked for, it is now, whatever is held."""
        if visit.reason is not None:
            return
        if visit.budget is None:
            assert self._windows[0].visits[0] is visit
            self._budget.take(visit.num_bytes, anyway=True)
            self._ask([visit], _NEAR)
        self.ahead -= 1
        self._held -= visit.num_bytes

    def _ask(self, some: list[Visit], near: int) -> None:
        window = self._windows[0]
        window.whole = False
        for visit in some:
            window.visits.popleft()
            window.num_bytes -= visit.num_bytes
            visit.budget = self._budget
            self._count(visit)
        if not window.visits:
            self._windows.popleft()
        self._start(some, near)

    def _count(self, visit: Visit) -> None:
        self.ahead += 1
        self._held += visit.num_bytes


class AheadWalk(Protocol):
    """One lane's walk of one order, as `ReadAhead` sees it."""

    share: float
    unread: Unread

    def ready(self) -> int:
        """Visits that are planned."""

    def plan_next(self) -> object:
        """Start planning further ones."""

    def read_on(self, enough: float) -> bool:
        """Begin to read until `enough` are ahead, of plans that are made; returns whether any were begun."""


W = TypeVar("W", bound=AheadWalk)


class ReadAhead(ABC, Generic[W]):
    """All lanes of one worker, with the budget that they share."""

    def __init__(self, task: ShareTask, moments: MomentsReads | None) -> None:
        self._moments = moments
        self.budget = Budget(task.config.buffer_bytes)
        self.enough = max(MIN_PLAN, _STEPS_AHEAD * task.per_lane)
        """Visits that the walks of a lane have ahead, all together, before no more are planned."""
        self.walks: list[W] = []
        """Lane-major, as `ShareTask.states`."""
        self._lanes = max(1, len(task.lanes))
        self._short: deque[W] = deque()

    def _set_out(self, task: ShareTask, begin: Callable[[int, int, LaneState], W]) -> None:
        """Make the walks, by lane, number of the order and state."""
        pairs = itertools.product(task.lanes, range(len(task.buckets.orders)))
        for (lane, number), state in zip(pairs, task.states, strict=True):
            self.walks.append(begin(lane, number, state.copy()))

    def unread_of(self, share: float) -> Unread:
        """What a walk with this share of its lane has not asked for, with its part of the budget."""
        return Unread(self.budget, self.budget.limit * share / self._lanes, self._begin)

    def _begin(self, visits: list[Visit], near: int) -> None:
        """Begin to read visits of one plan, as `Unread` asks for them."""
        self._start(visits, near)
        if self._moments is not None:
            planned = {visit.slot: visit.planned for visit in visits if visit.planned is not None}
            self._moments.start(planned, visits[0].due)

    @abstractmethod
    def _start(self, visits: list[Visit], near: int) -> None:
        """The same from their shards."""

    def read_ahead(self) -> None:
        """Plan and read further windows, the most urgent lanes first, while the budget lasts."""
        for _, i in sorted((walk.ready(), i) for i, walk in enumerate(self.walks)):
            walk = self.walks[i]
            if walk.ready() < max(1.0, self.enough * walk.share):
                walk.plan_next()
        self._short.clear()
        for _, i in sorted((walk.unread.ahead / walk.share, i) for i, walk in enumerate(self.walks)):
            walk = self.walks[i]
            if not walk.read_on(self.enough * walk.share) and walk.unread and not walk.unread.ahead:
                self._short.append(walk)

    def read_on(self) -> None:
        """A sample was decoded: lanes that have none ahead, for want of room, may have some by now."""
        while self._short and self._short[0].read_on(1.0):
            self._short.popleft()
