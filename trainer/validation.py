"""Held-out samples, measured while training goes on: chosen at the start, read and measured when it is due.

    data.validation     which samples are held out            data_pipeline/shards/split.py
    open_held_out       which of them are measured            data_pipeline/shards/held_out.py
    Stage.measuring     what is measured of a batch           trainer/stages
    measure_held_out    figures over all ranks                trainer/evaluation/held_out.py
    validate            with the averages and without, into records, log and checkpoints

Nothing of it moves the run: not its loader, not its weights, not a generator; what cannot be read or is not a
number is said, and training goes on.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

from trainer.config.checks_validation import PREFIX, RAW, RECONSTRUCTION_DISTANCES
from trainer.config.run import Config
from trainer.evaluation.held_out import Unmeasured, measure_held_out
from trainer.metrics.jsonl import MEASURED_BY
from trainer.reliability.watchdog import Watchdog
from trainer.run import Run

logger = logging.getLogger(__name__)


def validate(run: Run, watchdog: Watchdog) -> None:
    """Measure the held-out samples, if there are any, with averaged and with trained weights. Collective."""
    if run.held_out is None:
        return
    step, samples = run.state.step, run.state.samples_seen
    began = time.perf_counter()
    try:
        figures, rejected = _measure(run, partial(watchdog.beat, step, "validation"))
    except Unmeasured as error:
        if run.env.is_main:
            logger.warning("validation of step %d is left out: %s", step, error)
        run.sinks.event(step, samples, "validation left out", reason=str(error))
        return
    seconds = time.perf_counter() - began
    run.measured = (step, {f"{PREFIX}{name}": value for name, value in figures.items()})
    about = {MEASURED_BY: {"networks": run.networks}} if run.networks else {}
    run.sinks.log(step, samples, {**run.measured[1], f"{PREFIX}seconds": seconds}, about)
    odd = sorted(name for name, value in figures.items() if not math.isfinite(value))
    if odd and len(run.held_out) > 1:
        run.sinks.event(step, samples, "validation not finite", figures=odd)
    if run.env.is_main:
        _tell(step, figures, rejected, seconds)
        if odd:
            logger.warning("validation of step %d: not finite: %s; training goes on", step, ", ".join(odd))


def cost(config: Config, samples: int) -> str:
    """What one measurement takes, in forward passes and in training steps (of three passes per sample)."""
    passes = samples * (config.validation.timesteps if config.stage == "diffusion" else 1)
    weights = "the trained weights"
    if config.ema.decay:
        weights = "the averages and the trained weights" if config.validation.raw else "the averages"
        passes *= 2 if config.validation.raw else 1
    steps = passes / (3 * config.global_batch_size)
    share = 100 * steps / config.validation.every
    levels = f" at {config.validation.timesteps} noise levels" if config.stage == "diffusion" else ""
    return (
        f"{samples:,} held-out samples{levels} with {weights}, every {config.validation.every:,} steps: "
        f"{passes:,} forward passes, the work of about {steps:.3g} training steps ({share:.2g} %)"
    )


def _measure(run: Run, beat: Callable[[], None]) -> tuple[dict[str, float], Counter[str]]:
    """Figures of the averages, and as `raw_*` those of the trained weights (if they are kept apart)."""
    with run.averaged_weights():
        figures, rejected = _once(run, beat)
    if run.config.ema.decay and run.config.validation.raw:
        raw, _ = _once(run, beat)
        parts = ("samples", "bin_")
        figures |= {f"{RAW}{name}": value for name, value in raw.items() if not name.startswith(parts)}
    return figures, rejected


def _once(run: Run, beat: Callable[[], None]) -> tuple[dict[str, float], Counter[str]]:
    config = run.config
    assert run.held_out is not None
    quantised = config.stage == "autoencoder" and config.first_stage.name == "vq"
    with run.stage.measuring() as measure:
        return measure_held_out(
            run.held_out,
            measure,
            batch_size=config.micro_batch_size,
            device=run.env.device,
            codebook_size=config.first_stage.codebook_size if quantised else 0,
            distance=None if run.distance is None else run.distance(),
            beat=beat,
        )


def _tell(step: int, figures: dict[str, float], rejected: Counter[str], seconds: float) -> None:
    """One line: figures that have an error, and no parts of them; distances."""
    shown = [
        f"{name} {figures[name]:.4g} +- {figures[f'{name}_stderr']:.2g}"
        for name in figures
        if f"{name}_stderr" in figures and not name.startswith("bin_")
    ]
    shown += [f"{name} {figures[name]:.4g}" for name in RECONSTRUCTION_DISTANCES.values() if name in figures]
    lost = f" ({', '.join(f'{reason} {n}' for reason, n in rejected.items())} left out)" if rejected else ""
    logger.info(
        "validation of step %d: %s; %.0f samples%s in %.1f s",
        step,
        ", ".join(shown),
        figures["samples"],
        lost,
        seconds,
    )
