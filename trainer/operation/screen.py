"""Where a run stands, on one screen for people."""

from __future__ import annotations

import time

from trainer.operation.standing import Standing, duration

_MOST_SLOW = 4


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
    return f"{found.ranks}{slow}" + (f"; found slow since the last start: {named}" if named else "")


def _ago(seconds: float | None) -> str | None:
    return None if seconds is None else f"{duration(seconds)} ago"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))
