"""Where a run stands: step, speed, loss, time left, checkpoint, faults, ranks, who holds its folder.

Reads the run folder alone, of a run that goes on or has ended, and changes nothing. A run that has not
written for long is said to be silent. Exit code 1 where somebody should look: silent, or gone without a word.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict

from trainer.operation.standing import Standing, duration, standing

EXAMPLE = "example: ldm status s3://bucket/run --json"
_MOST_SLOW = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and the output form."""
    parser.add_argument("source", metavar="RUN", help="run folder, a path or a URL")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")


def run(args: argparse.Namespace) -> int:
    """Print one screen or one JSON object."""
    found = standing(args.source)
    print(json.dumps(asdict(found)) if args.json else screen(found))
    return 1 if found.state in ("silent", "gone") else 0


def screen(found: Standing) -> str:
    """A dozen lines; what is not known is left out."""
    lines = [f"{found.run_dir}: {found.said}"]
    rows = {
        "step": _step(found),
        "loss": None if found.loss is None else f"{found.loss:.5g}" if _is_number(found.loss) else found.loss,
        "left": _left(found),
        "record": _ago(found.record_age_s),
        "checkpoint": _checkpoint(found),
        "starts": _starts(found),
        "ranks": _ranks(found),
        "holder": None if found.holder is None else f"{found.holder}, heard of {_ago(found.holder_age_s)}",
        "request": "a STOP file lies there: the run saves and leaves" if found.stop_requested else None,
    }
    lines += [f"  {name:<11} {text}" for name, text in rows.items() if text]
    return "\n".join(lines)


def _step(found: Standing) -> str | None:
    if found.step is None:
        return None
    text = f"{found.step:,}"
    if found.steps:
        text += f" of {found.steps:,} ({100 * found.step / found.steps:.1f} %)"
    if found.samples_seen is not None:
        text += f", {found.samples_seen:,} samples"
    if found.step_s is not None:
        text += f"; {found.step_s:.3g} s per step"
    if found.images_per_s is not None:
        text += f", {found.images_per_s:,.5g} images/s"
    return text


def _left(found: Standing) -> str | None:
    if found.eta_s is None:
        return None
    end = time.strftime("%F %H:%M UTC", time.gmtime(time.time() + found.eta_s))
    return f"{duration(found.eta_s)} at this speed, until {end}"


def _checkpoint(found: Standing) -> str | None:
    if found.checkpoint_step is None:
        return "none yet"
    return f"step {found.checkpoint_step:,}, {_ago(found.checkpoint_age_s)}"


def _starts(found: Standing) -> str | None:
    if not found.starts:
        return None
    text = f"{found.starts}, {found.bad_steps} bad step(s), {found.rewinds} rewind(s)"
    if found.faults is None:
        return text
    since = f" since step {found.events_since:,}" if found.events_since and found.events_since > 1 else ""
    lost = f"{found.failed_saves} failed save(s), {found.steps_again} step(s) made again"
    return f"{text};{since} {found.faults} fault(s), {lost}"


def _ranks(found: Standing) -> str | None:
    if found.ranks is None:
        return None
    slow = "" if found.slow_ranks is None else f", {found.slow_ranks} slow at the newest record"
    named = ", ".join(found.found_slow[:_MOST_SLOW]) + (", ..." if len(found.found_slow) > _MOST_SLOW else "")
    text = f"{found.ranks}{slow}" + (f"; found slow since the last start: {named}" if named else "")
    sick = "; ".join(found.found_sick[:_MOST_SLOW])
    return text + (f"; found sick since the last start: {sick}" if sick else "")


def _ago(seconds: float | None) -> str | None:
    return None if seconds is None else f"{duration(seconds)} ago"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))
