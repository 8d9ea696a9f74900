"""Goodput under failures: measured on this machine with a seeded trace, and modelled for 64-1024 GPUs.

    python benchmarks/goodput.py measure --minutes 6 --out goodput.json
    python benchmarks/goodput.py model

`measure` trains the demo's UNet (on 16 x 16 pixels, so that no first stage is needed) with `ldm train`
on two local ranks, hurts it at times drawn from an exponential distribution, and divides the time that
the finished steps take undisturbed by the time that passed. `model` evaluates a formula and measures
nothing; the two are never mixed, except that `measure` also prints what the formula says for its own
parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.tools.scenes.scene import SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from trainer.config.io import config_to_dict, load_config
from trainer.launch.observe import LocalRun
from trainer.metrics.jsonl import read_records
from trainer.planning.machine import RESTART_S, ettr, mttf_s

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("SIGKILL of one rank", "SIGKILL of all ranks", "SIGSTOP of one rank")
WEIGHTS = (0.6, 0.2, 0.2)


@dataclass
class Recovery:
    """One failure, in seconds from the signal on, and what it cost."""

    kind: str
    step: int
    detect_s: float = 0.0
    """Until every rank was gone and new ones had been spawned."""
    import_s: float = 0.0
    """From there until a new rank spoke: Python, torch, our modules."""
    build_s: float = 0.0
    """From there until the loop: process group, engine, checkpoint, loader."""
    first_step_s: float = 0.0
    """From there until one new optimizer step was made."""
    lost_steps: int = 0
    """Steps made again."""

    @property
    def restart_s(self) -> float:
        """From the spawning of new ranks to the first new optimizer step."""
        return self.import_s + self.build_s + self.first_step_s


class Patient:
    """A run that can be hurt."""

    def __init__(self, folder: Path, every: int, engine: list[str]) -> None:
        self.out = folder / "out"
        shards = folder / "shards"
        options = SynthesisOptions(
            samples=512, samples_per_shard=128, scene=SceneOptions(min_edge=24, max_edge=40)
        )
        list(synthesize(str(shards), options))
        demo = yaml.safe_load((ROOT / "configs" / "demo_text_to_image.yaml").read_text())
        demo |= {
            "run_dir": str(self.out),
            "steps": 1_000_000,
            "first_stage": {"name": "identity", "latent_channels": 3},
        }
        demo["data"] |= {"shards": f"{shards}/*.tar", "image_size": 16}
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(demo))
        self.overrides = [
            *(f"checkpoint.every={every}", "sampling.every=0", "logging.every=1", "logging.wandb=disabled"),
            *("logging.progress_bar=false", "distributed.max_restarts=1000", *engine),
        ]
        self.config = load_config(str(path), self.overrides)
        self.log = folder / "console.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainer", "train", str(path), *self.overrides],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
            )
        self.run = LocalRun(self.process.pid)

    def step(self) -> int:
        """Optimizer steps made; -1 before the loop runs."""
        pulse = self.run.pulse(0)
        return -1 if pulse is None or pulse.phase == "start" else pulse.step

    def until(self, condition: Callable[[], bool], limit_s: float = 300.0) -> float:
        """The monotonic time at which a condition first held."""
        limit = time.monotonic() + limit_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > limit:
                raise SystemExit(f"the run ended or hangs:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.002)
        return time.monotonic()

    def hurt(self, kind: str, draw: random.Random) -> Recovery:
        """Inflict one failure and follow the recovery to the first new step."""
        old = self.run.ranks()
        recovery = Recovery(kind, self.step())
        number = signal.SIGSTOP if "SIGSTOP" in kind else signal.SIGKILL
        victims = list(old) if "all" in kind else [draw.choice(sorted(old))]
        struck = time.monotonic()
        for rank in victims:
            os.kill(old[rank], number)
        gone = self.until(lambda: self._replaced(old))
        spoke = self.until(lambda: self.run.pulse(0) is not None)
        looping = self.until(lambda: self.step() >= 0)
        resumed = self.step()
        stepped = self.until(lambda: self.step() > resumed)
        recovery.detect_s, recovery.import_s = gone - struck, spoke - gone
        recovery.build_s, recovery.first_step_s = looping - spoke, stepped - looping
        recovery.lost_steps = max(0, recovery.step - resumed)
        return recovery

    def _replaced(self, old: dict[int, int]) -> bool:
        ranks = self.run.ranks()
        return len(ranks) == len(old) and not set(ranks.values()) & set(old.values())

    def records(self) -> list[dict[str, Any]]:
        """Logged steps, in the order in which they were made."""
        return [record for record in read_records(str(self.out)) if "loss" in record]

    def stop(self) -> None:
        """End it; nothing needs to be saved."""
        self.process.kill()
        self.process.wait()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train through a seeded failure trace."""
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="goodput-") as folder:
        patient = Patient(Path(folder), arguments.every, arguments.override)
        try:
            patient.until(lambda: patient.step() >= 5, limit_s=900)
            begun, first = time.monotonic(), patient.step()
            end = begun + 60 * arguments.minutes
            recoveries = []
            while True:
                strike = time.monotonic() + draw.expovariate(1 / arguments.mttf)
                if strike > end:
                    break
                patient.until(lambda at=strike: time.monotonic() >= at)  # type: ignore[misc]
                recoveries.append(patient.hurt(draw.choices(KINDS, WEIGHTS)[0], draw))
                report(recoveries[-1])
            patient.until(lambda: time.monotonic() >= end)
            made, elapsed = patient.step() - first, time.monotonic() - begun
            records = patient.records()
        finally:
            patient.stop()
    return summary(arguments, recoveries, records, made, elapsed, patient)


def summary(
    arguments: argparse.Namespace,
    recoveries: list[Recovery],
    records: list[dict[str, Any]],
    made: int,
    elapsed: float,
    patient: Patient,
) -> dict[str, Any]:
    """Goodput, the parameters that the formula needs, and what the formula says."""
    step_s = statistics.median(record["step_s"] for record in records if "step_s" in record)
    result: dict[str, Any] = {
        "what": "measured on this machine",
        "steps_made": made,
        "elapsed_s": elapsed,
        "undisturbed_step_s": step_s,
        "goodput": made * step_s / elapsed,
        "failures": [asdict(recovery) for recovery in recoveries],
        "config": config_to_dict(patient.config),
    }
    if recoveries:
        mean = {
            name: statistics.mean(getattr(recovery, name) for recovery in recoveries)
            for name in ("detect_s", "restart_s", "lost_steps")
        }
        mttf = elapsed / len(recoveries)
        interval = arguments.every * step_s
        result |= {"mean": mean, "mttf_s": mttf}
        result["formula_for_the_same_parameters"] = ettr(
            interval, mean["detect_s"], mean["restart_s"], 0.0, mttf
        )
    return result


def report(recovery: Recovery) -> None:
    """One line per failure, as it happens."""
    print(
        f"{recovery.kind:22} at step {recovery.step:5}: noticed {recovery.detect_s:5.2f} s, restarted in "
        f"{recovery.restart_s:5.2f} s (import {recovery.import_s:.2f}, build and restore "
        f"{recovery.build_s:.2f}, first step {recovery.first_step_s:.2f}), {recovery.lost_steps} steps lost",
        flush=True,
    )


def model(arguments: argparse.Namespace) -> dict[str, Any]:
    """The closed form at scale, for our settings and for hourly blocking checkpoints."""
    settings = {
        "this trainer": {
            "interval_s": arguments.interval,
            "detect_s": arguments.detect,
            "restart_s": arguments.restart,
            "stall_s": arguments.stall,
        },
        # Kokolis et al.: five-minute writes every hour, 5-20 minutes to restart; ten minutes until a
        # collective times out.
        "hourly blocking saves": {"interval_s": 3600, "detect_s": 600, "restart_s": 1200, "stall_s": 300},
    }
    rows = []
    print("closed form 1 - (I/2 + D + R) / MTTF - S / I; nothing here is measured at this scale")
    for gpus in (64, 128, 256, 512, 1024):
        mttf = mttf_s(gpus)
        row = {name: ettr(**values, mttf_s=mttf) for name, values in settings.items()}
        rows.append({"gpus": gpus, "mttf_h": mttf / 3600, **row})
        shown = "  ".join(f"{name} {100 * value:5.1f} %" for name, value in row.items())
        print(f"{gpus:5} GPUs, MTTF {mttf / 3600:6.1f} h:  {shown}")
    return {"what": "closed form, not measured", "settings": settings, "rows": rows}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure", help="seeded failure trace on this machine")
    measuring.set_defaults(action=measure)
    measuring.add_argument("--minutes", type=float, default=6.0, help="length of the trace")
    measuring.add_argument("--mttf", type=float, default=60.0, help="mean seconds between failures")
    measuring.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    measuring.add_argument("--seed", type=int, default=0)
    measuring.add_argument("override", nargs="*", help="settings, e.g. distributed.engine=torch")
    modelling = commands.add_parser("model", help="closed form for 64-1024 GPUs")
    modelling.set_defaults(action=model)
    modelling.add_argument("--interval", type=float, default=600.0, help="seconds between checkpoints")
    modelling.add_argument("--detect", type=float, default=15.0, help="distributed.watchdog_s")
    modelling.add_argument(
        "--restart", type=float, default=RESTART_S, help="assumed: scheduler, import, NCCL, load"
    )
    modelling.add_argument("--stall", type=float, default=0.5, help="seconds that a save blocks training")
    for command in (measuring, modelling):
        command.add_argument("--out", type=Path, help="also write the result as JSON")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run is not left behind
    result = arguments.action(arguments)
    if "goodput" in result:
        print(f"goodput {100 * result['goodput']:.1f} % measured over {result['elapsed_s']:.0f} s")
        if "mean" in result:
            said = 100 * result["formula_for_the_same_parameters"]
            print(f"the formula says {said:.1f} % for the parameters of this trace: {result['mean']}")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
