"""Loader positions: one raw offset per lane; small, JSON-able and free of the world size.

Every batch carries the states of its own rank's lanes, as they are once it is consumed. A checkpoint joins
those of all ranks into one list by lane, which any other division of the lanes can be cut from:

    2 ranks, 4 lanes     {"first": 0, "states": [[0, 5], [0, 4]]}  {"first": 2, "states": [[0, 4], [1, 0]]}
    merge_positions      {"first": 0, "states": [[0, 5], [0, 4], [0, 4], [1, 0]]}
    4 ranks              lane 0, lane 1, lane 2, lane 3

Lanes that take turns at shards (`turns.py`) have the turn where the others have the epoch, and beside it
where in the shard their window begins, so that no rank has to know what came before.

With B buckets a lane has B states, side by side, and the position says which samples were accepted: an offset
counts them alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from data_pipeline.errors import DataError
from data_pipeline.order.buckets import Buckets
from data_pipeline.order.lanes import Order
from data_pipeline.order.turns import Turns

logger = logging.getLogger(__name__)

Position: TypeAlias = dict[str, Any] | Sequence[dict[str, Any]] | None
"""That of all ranks, whole or in parts; None: the beginning."""

_FORMAT = 1
_TURNS = "turns"


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
    fingerprint: str,
    buckets: Buckets,
    step: int,
    first: int,
    states: Sequence[list[Any]],
) -> dict[str, Any]:
    """Position after `step` steps of the lanes from `first` on, each with one state per bucket."""
    more: dict[str, Any] = {"walk": _TURNS} if isinstance(order, Turns) else {}
    if buckets.accepted_only:
        more |= {"accepted": buckets.digest, "totals": [order.total for order in buckets.orders]}
    return {
        "format": _FORMAT,
        "data": fingerprint,
        "seed": order.seed,
        "lanes": order.lanes,
        "window": order.window,
        "buckets": [list(shape) for shape in buckets.shapes],
        **more,
        "step": step,
        "first": first,
        "states": [list(s) for s in states],
    }


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
        assert part["first"] * len(head["buckets"]) == len(states), "positions of all ranks"
        states += part["states"]
    assert len(states) == head["lanes"] * len(head["buckets"]), (len(states), head["lanes"])
    return {**head, "states": states}


def takes_turns(position: Position) -> bool | None:
    """Whether a position is one of lanes that take turns at shards; None without one, or of no order."""
    if not position:
        return None
    head = _head(position)
    return None if head.get("order") == "resampled" else head.get("walk") == _TURNS


def window_of(position: Position) -> int | None:
    """The shuffle window that a position was made with."""
    return int(_head(position)["window"]) if position else None


def _head(position: dict[str, Any] | Sequence[dict[str, Any]]) -> dict[str, Any]:
    return position if isinstance(position, dict) else position[0]


def unpack(
    position: Position,
    order: Order | Turns,
    fingerprint: str,
    buckets: Buckets,
) -> tuple[int, list[LaneState]]:
    """Steps done and the state of every lane and bucket (lane-major).

    Raises DataError when the position belongs to another order.
    """
    if not position:
        return 0, [LaneState() for _ in range(order.lanes * len(buckets.shapes))]
    if isinstance(position, dict) and position.get("order") == "resampled":
        raise DataError(
            "The checkpoint stopped in data.order=resampled; keep it, or start a new run with init_from."
        )
    whole = position if isinstance(position, dict) else merge_positions(position)
    if len(whole["states"]) != whole["lanes"] * len(whole["buckets"]):
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
    if whole["data"] != fingerprint:
        raise DataError(
            "The checkpoint stopped in another set of shards; restore data.shards (and the index), or start "
            "a new run with init_from."
        )
    if whole["buckets"] != [list(shape) for shape in buckets.shapes]:
        raise DataError(
            f"The checkpoint stopped with pictures of {whole['buckets']} (height, width), this run has "
            f"{[list(s) for s in buckets.shapes]}; restore data.image_size, the bucket settings and "
            "data.filter."
        )
    states = [_state(*parts) for parts in whole["states"]]
    if buckets.accepted_only and whole.get("accepted") != buckets.digest:
        assert isinstance(order, Order), "buckets need an index"
        states = _rescaled(states, whole.get("totals", [order.total] * len(buckets.orders)), buckets)
    return int(whole["step"]), states


def _state(
    epoch: int, offset: int, deferred: Sequence[int] = (), mark: Sequence[Any] | None = None
) -> LaneState:
    return LaneState(epoch, offset, list(deferred), None if mark is None else Mark(*mark))


def _rescaled(states: Sequence[LaneState], totals: Sequence[int], buckets: Buckets) -> list[LaneState]:
    """States in orders over other samples than before, of `totals` samples: the same share of the epoch."""
    logger.warning(
        "other samples are accepted than when the checkpoint was written (a filter that changed, or an "
        "older version's buckets): each bucket goes on at the same share of its epoch, where a few samples "
        "come twice or not at all"
    )
    scaled = []
    for i, state in enumerate(states):
        order, before = buckets.orders[i % len(totals)], max(1, totals[i % len(totals)])
        size = order.lane_size(i // len(totals))
        scaled.append(LaneState(state.epoch, min(size, state.offset * order.total // before)))
    return scaled
