"""Loader positions: one raw offset per lane; small, JSON-able and free of the world size.

Every batch carries the states of its own rank's lanes, as they are once it is consumed. A checkpoint joins
those of all ranks into one list by lane, which any other division of the lanes can be cut from:

    2 ranks, 4 lanes     {"first": 0, "states": [[0, 5], [0, 4]]}  {"first": 2, "states": [[0, 4], [1, 0]]}
    merge_positions      {"first": 0, "states": [[0, 5], [0, 4], [0, 4], [1, 0]]}
    4 ranks              lane 0, lane 1, lane 2, lane 3

Lanes that take turns at shards (`turns.py`) have the turn where the others have the epoch, and beside it
where in the shard their window begins, so that no rank has to know what came before.

With B buckets a lane has B states, side by side, and the position says which samples were accepted: an offset
counts them alone. Of sources that are mixed by weights each has states of its own, so that weights may change
and sources may join: `data` then has a fingerprint for each, `walks` is (bucket, source) of each of a lane's
states, and `windows` are theirs.

`shards` counts those of each source, so that a set to which some were added is known again: epochs that lanes
are in end as they began, and the next ones have all. `grown` remembers from which epoch on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

from data_pipeline.errors import DataError
from data_pipeline.order.buckets import Buckets
from data_pipeline.order.lanes import Order
from data_pipeline.order.shard_set import Earlier, Fingerprint, KeptShard, ShardSet
from data_pipeline.order.turns import Turns

logger = logging.getLogger(__name__)

Position: TypeAlias = dict[str, Any] | Sequence[dict[str, Any]] | None
"""That of all ranks, whole or in parts; None: the beginning."""

_FORMAT = 1
_TURNS = "turns"
_BEGINS = "begins"


class Mark(NamedTuple):
    """A window of a shard: from here on a lane goes on without what lies before."""

    first: int
    """Samples of the shard before it; -1: there is nothing left of the shard."""
    byte: int
    """Where the header of its first member lies."""
    size: int
    version: str
    """Size of the shard, and ETag or modification time."""


@dataclass
class LaneState:
    """Where one lane is: everything before `offset` of `epoch` is done, except what is set aside."""

    epoch: int = 0
    offset: int = 0
    deferred: list[int] = field(default_factory=list)
    """Raw offsets whose shard could not be read; visited again at the end of the epoch."""
    mark: Mark | None = None
    """Where the window that holds the last visit begins; of lanes that take turns at shards, whose `epoch` is
    the number of the turn."""

    def as_json(self) -> list[Any]:
        """[epoch, offset], with `deferred` or with `deferred` and `mark` where there are any."""
        if self.mark is not None:
            return [self.epoch, self.offset, list(self.deferred), list(self.mark)]
        return [self.epoch, self.offset, list(self.deferred)] if self.deferred else [self.epoch, self.offset]

    def copy(self) -> LaneState:
        """Independent copy."""
        return LaneState(self.epoch, self.offset, list(self.deferred), self.mark)


def pack(
    order: Order | Turns,
    shards: ShardSet,
    buckets: Buckets,
    step: int,
    first: int,
    states: Sequence[list[Any]],
) -> dict[str, Any]:
    """Position after `step` steps of the lanes from `first` on, each with one state per walk."""
    more: dict[str, Any] = {"walk": _TURNS} if isinstance(order, Turns) else {}
    if buckets.accepted_only:
        digests = buckets.digests
        more |= {"accepted": list(digests) if buckets.mixed else digests[0], "totals": buckets.totals}
    if buckets.mixed:
        more["walks"] = [list(walk[:2]) for walk in buckets.mixed]
        more["windows"] = [each.window for each in buckets.orders]
    if shards.grown:
        more["grown"] = [[list(part) for part in earlier] for earlier in shards.grown]
    if shards.kept:
        more["kept"] = [list(kept) for kept in shards.kept]
    fingerprint = shards.fingerprint
    return {
        "format": _FORMAT,
        "data": fingerprint if isinstance(fingerprint, str) else list(fingerprint),
        "shards": list(shards.shards),
        "seed": order.seed,
        "lanes": order.lanes,
        "window": order.window,
        "buckets": [list(shape) for shape in buckets.shapes],
        **more,
        "step": step,
        "first": first,
        "states": [list(s) for s in states],
    }


def beginning(epoch: int) -> dict[str, Any] | None:
    """Position of a run that begins with this epoch."""
    return {_BEGINS: epoch} if epoch else None


def first_epoch_of(position: Position) -> int | None:
    """The epoch with which a run begins; None where it goes on."""
    if not position:
        return 0
    return int(position[_BEGINS]) if isinstance(position, dict) and _BEGINS in position else None


def merge_positions(positions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the positions of all ranks, in any order, into one that `build_loader` takes at any world size."""
    assert positions
    if positions[0].get("order") == "resampled":
        return dict(positions[0])
    parts = sorted(positions, key=lambda p: p["first"])  # ranks without a lane stand behind the last one
    head = parts[0]
    states: list[Any] = []
    for part in parts:
        same = all(part[k] == head[k] for k in head if k not in ("first", "states"))
        assert same, "positions of one loader"
        assert part["first"] * _num_walks(head) == len(states), "positions of all ranks"
        states += part["states"]
    assert len(states) == head["lanes"] * _num_walks(head), (len(states), head["lanes"])
    return {**head, "states": states}


def _num_walks(position: dict[str, Any]) -> int:
    """States of each lane."""
    return len(position.get("walks", position["buckets"]))


def later(
    states: Sequence[LaneState],
    buckets: Buckets,
    *,
    steps: tuple[int, int],
    per_lane: int,
    served: float = 1.0,
) -> list[LaneState]:
    """About where every lane is some steps later: exact where all is served, and sources have no weights.

    states: lane-major, at the first of the two `steps`
    per_lane: samples of a lane in a global batch
    served: the share of samples that is served, where offsets count the others, too
    """
    before, after = (buckets.turns(step) for step in steps)
    rate = per_lane if buckets.accepted_only else per_lane / served
    moved = []
    for i, state in enumerate(states):
        lane, number = divmod(i, len(buckets.orders))
        walk, order = buckets.walks[number], buckets.orders[number]
        assert isinstance(order, Order), "who knows how much lies in between has an index"
        share = walk.share / buckets.weights[walk.bucket]  # of the source in its bucket
        offset = state.offset + round((after[walk.bucket] - before[walk.bucket]) * rate * share)
        epoch = state.epoch
        while epoch < order.first_epoch and offset >= (size := order.at(epoch).lane_size(lane)):
            epoch, offset = epoch + 1, offset - size
        if epoch >= order.first_epoch:
            epochs, offset = divmod(offset, order.lane_size(lane))
            epoch += epochs
        moved.append(LaneState(epoch, offset))
    return moved


def takes_turns(position: Position) -> bool | None:
    """Whether a position is one of lanes that take turns at shards; None without one, or of no order."""
    if not position:
        return None
    head = _head(position)
    return None if head.get("order") == "resampled" else head.get("walk") == _TURNS


def shards_of(position: Position) -> ShardSet | None:
    """The shards that a position was made with; None where it does not tell how many there were."""
    if not position or "shards" not in (head := _head(position)):
        return None
    data = head["data"]
    return ShardSet(
        data if isinstance(data, str) else tuple(data),
        tuple(head["shards"]),
        tuple(Earlier(tuple(shards), tuple(until)) for shards, until in head.get("grown", ())),
        tuple(KeptShard(*kept) for kept in head.get("kept", ())),
    )


def lanes_and_window(position: Position) -> tuple[int, int] | None:
    """Those that a position was made with; None without one, or of no order."""
    if not position or "lanes" not in (head := _head(position)):
        return None
    return int(head["lanes"]), int(head["window"])


def last_epochs(position: Position, buckets: Buckets) -> tuple[int, ...]:
    """The latest epoch that a lane is in, of each source with a weight, or of all.

    buckets: those that the position was made with
    """
    assert position
    whole = position if isinstance(position, dict) else merge_positions(position)
    epochs = [0] * (1 + max(walk.source for walk in buckets.walks))
    for source, epoch in _epochs(whole, buckets):
        epochs[source] = max(epochs[source], epoch)
    return tuple(epochs)


def earliest_epoch(part: dict[str, Any], buckets: Buckets) -> int | None:
    """That which one of the lanes of a part of a position is in; None where it has no lanes.

    buckets: those that the position was made with
    """
    return min((epoch for _, epoch in _epochs(part, buckets)), default=None)


def _epochs(part: dict[str, Any], buckets: Buckets) -> Iterator[tuple[int, int]]:
    """Source, and epoch in it, of each state of a position."""
    for number, (epoch, *_) in enumerate(part["states"]):
        lane, place = divmod(number, len(buckets.orders))
        each = buckets.orders[place]
        in_epoch = each.epoch(part["first"] + lane, epoch) if isinstance(each, Turns) else epoch
        yield buckets.walks[place].source, in_epoch


def with_windows(position: Position, buckets: Buckets) -> Buckets:
    """Walks of sources with weights as they were: a window that changed in an epoch would lose samples."""
    if not position or not buckets.mixed or "windows" not in (head := _head(position)):
        return buckets
    known = dict(zip(map(tuple, head["walks"]), head["windows"], strict=True))
    pairs = zip(buckets.mixed, buckets.orders, strict=True)
    orders = tuple(replace(order, window=known.get(walk[:2], order.window)) for walk, order in pairs)
    return replace(buckets, orders=orders)


def _head(position: dict[str, Any] | Sequence[dict[str, Any]]) -> dict[str, Any]:
    return position if isinstance(position, dict) else position[0]


def unpack(
    position: Position,
    order: Order | Turns,
    fingerprint: Fingerprint,
    buckets: Buckets,
    first_epoch: int = 0,
) -> tuple[int, list[LaneState]]:
    """Steps done and the state of every lane and walk (lane-major); without a position, those of a beginning.

    Raises DataError when the position belongs to another order.
    """
    if not position:
        return 0, [LaneState(first_epoch) for _ in range(order.lanes * len(buckets.orders))]
    if isinstance(position, dict) and position.get("order") == "resampled":
        raise DataError(
            "The checkpoint stopped in data.order=resampled; keep it, or start a new run with init_from."
        )
    whole = position if isinstance(position, dict) else merge_positions(position)
    if len(whole["states"]) != whole["lanes"] * _num_walks(whole):
        raise DataError("The stored data position is that of one rank only; merge those of all ranks.")
    remedies = {
        "lanes": ("data.lanes", order.lanes),
        "window": ("data.shuffle_window", order.window),
        "seed": ("seed", order.seed),
    }
    for name, (key, now) in remedies.items():
        if whole[name] != now:
            raise DataError(
                f"The checkpoint stopped in an order with {name} {whole[name]}, this run has {now}; set "
                f"{key}={whole[name]} to go on where it was."
            )
    _check_shards(whole["data"], fingerprint)
    if whole["buckets"] != [list(shape) for shape in buckets.shapes]:
        raise DataError(
            f"The checkpoint stopped with pictures of {whole['buckets']} (height, width), this run has "
            f"{[list(s) for s in buckets.shapes]}; restore data.image_size, the bucket settings and "
            "data.filter."
        )
    states = [_state(*parts) for parts in whole["states"]]
    walks = [tuple(walk) for walk in whole.get("walks", [[b, 0] for b in range(len(buckets.shapes))])]
    if buckets.mixed:
        states = _of_walks(states, walks, buckets)
    if buckets.accepted_only:
        assert isinstance(order, Order), "buckets need an index"
        totals = dict(zip(walks, whole.get("totals", [order.total] * len(walks)), strict=True))
        states = _rescaled(states, _digests(whole), totals, buckets)
    return int(whole["step"]), states


def _digests(position: dict[str, Any]) -> list[str]:
    """Of what was accepted of each source."""
    accepted = position.get("accepted", "")
    return accepted if isinstance(accepted, list) else [accepted]


def _check_shards(was: str | list[str], now: Fingerprint) -> None:
    """Raises DataError where the shards of the checkpoint are not those of the run, or its first sources."""
    if isinstance(was, str) != isinstance(now, str):
        before, after = ("without", "with") if isinstance(was, str) else ("with", "without")
        raise DataError(
            f"The checkpoint stopped in a set {before} weights of its sources, this run is one {after}; "
            "restore data.sources, or start a new run with init_from."
        )
    if was != now if isinstance(was, str) else tuple(was) != now[: len(was)]:
        raise DataError(
            "The checkpoint stopped in another set of shards; restore data.shards (and the index), or start "
            "a new run with init_from (shards may only be added, with names behind those of their source)."
        )


def _of_walks(
    states: Sequence[LaneState], walks: Sequence[tuple[int, ...]], buckets: Buckets
) -> list[LaneState]:
    """States of the walks that there are now, lane-major; those of sources that joined begin."""
    found = []
    for first in range(0, len(states), len(walks)):
        lane = dict(zip(walks, states[first : first + len(walks)], strict=True))
        found += [lane.get(walk[:2], LaneState()) for walk in buckets.mixed]
    return found


def _state(
    epoch: int, offset: int, deferred: Sequence[int] = (), mark: Sequence[Any] | None = None
) -> LaneState:
    return LaneState(epoch, offset, list(deferred), None if mark is None else Mark(*mark))


def _rescaled(
    states: Sequence[LaneState],
    digests: Sequence[str],
    totals: Mapping[tuple[int, ...], int],
    buckets: Buckets,
) -> list[LaneState]:
    """States in orders over other samples than before: the same share of the epoch.

    digests: what was accepted of each source before. totals: samples of each walk before
    """
    changed = {source for source, was in enumerate(digests) if was != buckets.digests[source]}
    if changed:
        logger.warning(
            "other samples are accepted than when the checkpoint was written (a filter that changed, or an "
            "older version's buckets): each bucket goes on at the same share of its epoch, where a few "
            "samples come twice or not at all"
        )
    scaled = []
    for i, state in enumerate(states):
        number = i % len(buckets.orders)
        order, walk = buckets.orders[number], buckets.walks[number]
        if walk.source in changed:
            assert isinstance(order, Order), "buckets need an index"
            offset = state.offset * order.total // max(1, totals.get(walk[:2], 0))
            state = LaneState(state.epoch, min(order.lane_size(i // len(buckets.orders)), offset))
        scaled.append(state)
    return scaled
