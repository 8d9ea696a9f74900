"""Where a run stands, from what lies in its folder: whose it is, how fast it is, what happened to it.

Reads a few small files, at any URL, and changes nothing. Times of day are compared across machines: where
clocks differ, so do the ages.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data_pipeline.errors import NotFound, UserError
from data_pipeline.storage.files import exists, modified_at
from data_pipeline.storage.urls import is_local, join, local_path
from trainer.checkpoint.catalogue import checkpoints_url, folder_name, is_committed, steps_found
from trainer.checkpoint.manifest import MANIFEST_NAME
from trainer.config.identity import stored_settings
from trainer.metrics.jsonl import SEND_EVERY_S, read_records
from trainer.reliability.healing import read_journal
from trainer.reliability.job import is_gone
from trainer.reliability.lease import EXPIRY_S, Tenure, holder, written_at
from trainer.reliability.requests import stop_url

State = Literal["starting", "running", "silent", "gone", "left", "stopped", "done"]
"""starting: held, nothing logged yet. silent: held, and nothing heard for long. gone: its process ended
without a word. left: it ended to be started again. stopped: a person asked for it. done: the last step."""

READ_BYTES = 4_000_000
"""Of the newest records: thousands of them."""
_SILENT_INTERVALS = 3
_SILENT_S = 120.0
_RECENT = 50
_STARTS = ("settings changed", "resume", "resume changed", "phase")
"""Events of a start that has made no step yet; a phase begins as a start does, without one."""
_LEFT = ("preempted", "storage outage")


@dataclass(frozen=True)
class Standing:
    """What is known of a run; None where nothing says it."""

    run_dir: str
    state: State
    said: str
    """The state in words."""
    step: int | None = None
    """Optimizer steps made, by the newest record."""
    steps: int | None = None
    """Of the whole run."""
    samples_seen: int | None = None
    loss: float | str | None = None
    """Of the newest record; a text where it is not finite."""
    step_s: float | None = None
    """Seconds per step over the last records of this start, or of this phase where that has none yet; saves
    and previews included."""
    images_per_s: float | None = None
    eta_s: float | None = None
    """Seconds to the last step at this speed; None where the run does not go on."""
    record_age_s: float | None = None
    """Since the newest record."""
    checkpoint_step: int | None = None
    """Of the newest committed checkpoint."""
    checkpoint_age_s: float | None = None
    starts: int = 0
    """Of all jobs in this folder."""
    faults: int | None = None
    """Starts after an end that nobody asked for, since `events_since`."""
    steps_again: int | None = None
    """Steps made a second time after restarts and rewinds, since `events_since`; a restart's from the last
    step that was logged."""
    failed_saves: int | None = None
    """Since `events_since`."""
    bad_steps: int = 0
    """Steps whose loss or gradient was bad, in the run's life."""
    rewinds: int = 0
    """How many of them it went back for."""
    events_since: int | None = None
    """Step of the oldest record that was read."""
    ranks: int | None = None
    slow_ranks: int | None = None
    """At the newest record."""
    found_slow: tuple[str, ...] = ()
    """Ranks that became slow since the last start, in words."""
    found_sick: tuple[str, ...] = ()
    """GPUs with a sign of a sick machine since the last start, in words."""
    holder: str | None = None
    """Who holds the folder, or did."""
    holder_age_s: float | None = None
    """Since it was heard of."""
    stop_requested: bool = False
    """Whether a STOP file lies there."""


def standing(run_dir: str) -> Standing:
    """Look at a run folder.

    Raises:
        UserError: there is no run in it, or it cannot be read.
    """
    if is_local(run_dir) and os.path.isfile(local_path(run_dir)):
        raise UserError(f"there is no run in {run_dir}, which is a file; name the run_dir of one.")
    tenure = holder(run_dir)
    settings = stored_settings(run_dir)
    records = read_records(run_dir, READ_BYTES)
    checkpoint = _checkpoint(run_dir)
    if tenure is None and settings is None and not records and checkpoint is None:
        raise UserError(f"there is no run in {run_dir}; name the run_dir of one, a folder or a URL.")
    incidents = read_journal(run_dir)
    now = time.time()
    speed = _speed(records)
    steps = _integer((settings or {}).get("steps"))
    step = speed.step if speed.step is not None else None if checkpoint is None else checkpoint[0]
    age = None if tenure is None else max(0.0, now - written_at(run_dir))
    state, said = _state(tenure, age, _Heard(run_dir, settings or {}, records, checkpoint, speed, now))
    left = None
    if None not in (steps, step, speed.step_s) and state in ("running", "starting", "silent"):
        left = max(0, steps - step) * speed.step_s  # type: ignore[operator]
    return Standing(
        run_dir=run_dir,
        state=state,
        said=said,
        step=step,
        steps=steps,
        samples_seen=speed.samples_seen,
        loss=speed.loss,
        step_s=speed.step_s,
        images_per_s=speed.images_per_s,
        eta_s=left,
        record_age_s=None if speed.time is None else max(0.0, now - speed.time),
        checkpoint_step=None if checkpoint is None else checkpoint[0],
        checkpoint_age_s=None if checkpoint is None else max(0.0, now - checkpoint[1]),
        starts=0 if tenure is None else tenure.token,
        bad_steps=len(incidents),
        rewinds=sum(incident.get("action", "rewound") == "rewound" for incident in incidents),
        holder=None if tenure is None else tenure.described,
        holder_age_s=age,
        stop_requested=exists(stop_url(run_dir)),
        **_history(records),
    )


@dataclass(frozen=True)
class _Speed:
    """What the newest records of losses say."""

    step: int | None = None
    samples_seen: int | None = None
    loss: float | str | None = None
    time: float | None = None
    step_s: float | None = None
    images_per_s: float | None = None


@dataclass(frozen=True)
class _Heard:
    """What a verdict on the state needs."""

    run_dir: str
    settings: Mapping[str, Any]
    records: Sequence[dict[str, Any]]
    checkpoint: tuple[int, float] | None
    speed: _Speed
    now: float

    @property
    def is_done(self) -> bool:
        return self.checkpoint is not None and self.checkpoint[0] >= int(
            self.settings.get("steps") or 1 << 62
        )

    @property
    def is_starting(self) -> bool:
        """Whether this start has logged nothing but that it goes on."""
        return not self.records or self.records[-1].get("event") in _STARTS

    @property
    def last_event(self) -> str:
        events = [record["event"] for record in self.records if "event" in record]
        return str(events[-1]) if events else ""

    @property
    def silence_s(self) -> float | None:
        """Seconds since the newest record, where more than a few log intervals passed; None otherwise."""
        newest = max((float(record.get("time", 0)) for record in self.records), default=0.0)
        if not newest or self.is_starting or self.speed.step_s is None:
            return None  # the first steps may take their time: kernels are compiled, data is indexed
        logging = self.settings.get("logging")
        every = _integer(logging.get("every") if isinstance(logging, dict) else None) or 10
        expected = _SILENT_INTERVALS * every * self.speed.step_s + _SILENT_S
        expected += 0.0 if is_local(self.run_dir) else 2 * SEND_EVERY_S
        quiet = self.now - newest
        return quiet if quiet > expected else None


def _state(tenure: Tenure | None, age: float | None, heard: _Heard) -> tuple[State, str]:
    if tenure is None:
        if heard.is_done:
            return "done", "ended: the last step is made and saved"
        return "gone", "nobody holds the folder, and nothing says how the run ended"
    assert age is not None
    if tenure.released:
        when = f"{duration(age)} ago"
        if heard.last_event == "stopped":
            return "stopped", f"ended {when}: a person stopped it; the same command goes on"
        if heard.is_done:
            return "done", f"ended {when}: the last step is made and saved"
        why = heard.last_event if heard.last_event in _LEFT else "a fault or a mistake, which its log tells"
        return "left", f"ended {when} ({why}); the same command goes on"
    if is_gone(tenure.process):
        return "gone", f"its process is gone without a word, last heard of {duration(age)} ago"
    if age > EXPIRY_S:
        return (
            "silent",
            f"silent: nothing was heard of it for {duration(age)}, and it did not say that it ended",
        )
    quiet = heard.silence_s
    if quiet is not None:
        return "silent", f"silent: rank 0 lives, and no record was written for {duration(quiet)}"
    if heard.is_starting:
        return "starting", "starting: no record of this start yet"
    return "running", "running"


def _speed(records: Sequence[dict[str, Any]]) -> _Speed:
    logged = [record for record in records if "loss" in record]
    if not logged:
        return _Speed()
    last = logged[-1]
    own, phase = _since(records, _STARTS), _since(records, ("phase",))  # which has a speed of its own
    rates = [r for r in own if _has_rates(r)] or [r for r in phase if _has_rates(r)]
    rates = rates[-_RECENT:]
    return _Speed(
        step=last["step"],
        samples_seen=_integer(last.get("samples_seen")),
        loss=last["loss"],
        time=last.get("time"),
        step_s=sum(r["step_s"] for r in rates) / len(rates) if rates else None,
        images_per_s=sum(r["images_per_s"] for r in rates) / len(rates) if rates else None,
    )


def _since(records: Sequence[dict[str, Any]], events: Sequence[str]) -> Sequence[dict[str, Any]]:
    """From the newest of such events on; all, where there is none."""
    found = [at for at, record in enumerate(records) if record.get("event") in events]
    return records[found[-1] :] if found else records


def _has_rates(record: dict[str, Any]) -> bool:
    """Whether it is one of a log interval; details of an event may bear the same names."""
    return "images_per_s" in record and "event" not in record


def _history(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fields of Standing that follow from events."""
    if not records:
        return {}
    faults = again = failed = 0
    reached: int | None = None
    asked = False
    slow: dict[int, str] = {}
    sick: dict[int, str] = {}
    for record in records:
        event, step = record.get("event"), record["step"]
        if event == "resume":
            # An end that nobody asked for loses steps, unless the run was over and got more of them.
            faults += not asked and reached not in (None, step)
            asked, slow, sick = False, {}, {}
        elif event == "slow rank":
            slow[record["rank"]] = f"rank {record['rank']} ({record['host']})"
        elif event == "sick gpu":
            sick[record["rank"]] = f"rank {record['rank']} ({record['host']}): {record['what']}"
        asked = asked or event in ("stopped", *_LEFT)
        failed += event == "save failed"
        faults += event == "storage outage"  # saved in time, and a fault nevertheless
        if "back_to" in record:  # a rewind; those of earlier versions do not say it
            again += record["reached"] - record["back_to"]
            reached = record["back_to"]
        if event is None or event == "resume":
            again += max(0, (reached or 0) - step)
            reached = step
    last: dict[str, Any] = next((record for record in reversed(records) if "loss" in record), {})
    rates = last.get("images_per_s"), last.get("images_per_s_per_rank")
    sizes = [record["world_size"] for record in records if "world_size" in record]
    return {
        "faults": faults,
        "steps_again": again,
        "failed_saves": failed,
        "events_since": records[0]["step"],
        "ranks": round(rates[0] / rates[1]) if rates[0] and rates[1] else sizes[-1] if sizes else None,
        "slow_ranks": _integer(last.get("slow_ranks")),
        "found_slow": tuple(slow.values()),
        "found_sick": tuple(sick.values()),
    }


def _checkpoint(run_dir: str) -> tuple[int, float] | None:
    """(step, when it was committed) of the newest committed checkpoint."""
    folder = checkpoints_url(run_dir)
    for step in steps_found(folder):
        if is_committed(folder, step):
            try:
                return step, modified_at(join(folder, folder_name(step), MANIFEST_NAME))
            except NotFound:
                continue  # it was retired while we looked
    return None


def _integer(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) else None


def duration(seconds: float) -> str:
    """In words, to two units.

    >>> duration(7325)
    '2 h 2 min'
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"
