"""What an experiment is, its command line, and the table that it fills.

    OUT/NAME.csv        a row per seed, setting and measure
    OUT/NAME.png        its plot: means over seeds, bars of one standard deviation
    OUT/NAME/           rows of each seed as they are found, pictures
    OUT/...             shards, first stages and runs, which experiments in one folder share

The same command again goes on where it was stopped: what has a row is not measured again, what is trained is
not trained again. Commands side by side in one folder wait for each other where they need the same model.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lab.workshop import FULL, SMALL, Refused, Scale, Workshop
from trainer.provenance import git_commit
from trainer.report.chart import Chart, Point, to_png

COLUMNS = (
    "experiment",
    "seed",
    "setting",
    "step",
    "measure",
    "value",
    "seconds",
    "commit",
    "machine",
    "time",
)
"""seconds: of the setting that the row belongs to, training included where nobody had trained its model."""

_PANEL = (620, 400)
"""Pixels of each figure of the plot."""
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Figure:
    """One panel of the plot: what is on its axes."""

    title: str
    measures: tuple[str, ...]
    by: str = "setting"
    """setting: a curve per measure over the settings; step: a curve per setting over optimizer steps."""
    settings: tuple[str, ...] = ()
    """Those that are drawn; empty: all."""
    joined: bool = True
    """By lines; where settings are kinds and no scale, there is nothing between them."""


@dataclass(frozen=True)
class Experiment:
    """One question, put to several seeds in several settings."""

    name: str
    question: str
    settings: tuple[str, ...]
    measure: Callable[[Workshop, int, str], Mapping[int, Figures]]
    """(workshop, seed, setting) -> {optimizer step: {measure: value}}."""
    figures: tuple[Figure, ...]
    axis: str
    """What the settings are."""
    small_settings: tuple[str, ...] = ()
    """Of --small; empty: all."""


def run(experiment: Experiment, argv: Sequence[str] | None = None) -> int:
    """The command: exit code 0, 2 for a folder that cannot be used, or that of a command that failed."""
    args = _parser(experiment).parse_args(argv)
    scale = SMALL if args.small else FULL
    try:
        _run(experiment, args.out.resolve(), scale, list(dict.fromkeys(args.seeds)))
    except Refused as problem:
        print(f"{experiment.name}: {problem}", file=sys.stderr)
        return problem.code
    return 0


def _parser(experiment: Experiment) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=experiment.question,
        epilog="Runs again, it goes on where it was stopped. What was found: docs/findings.md",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of everything; experiments share models in it"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--small", action="store_true", help="a few steps, to see that it works")
    return parser


def _run(experiment: Experiment, out: Path, scale: Scale, seeds: Sequence[int]) -> None:
    settings = (scale is SMALL and experiment.small_settings) or experiment.settings
    workshop = Workshop(out, scale)
    started = time.monotonic()
    for seed in seeds:
        ledger = Ledger(out / experiment.name / f"seed_{seed}.csv")
        for number, setting in enumerate(settings, 1):
            if setting in ledger.settings:
                continue
            place = f"[{experiment.name}] seed {seed}, {number} of {len(settings)}: {setting}"
            print(f"{place} ...", flush=True)
            begun = time.monotonic()
            found = experiment.measure(workshop, seed, setting)
            seconds = time.monotonic() - begun
            ledger.add(experiment.name, seed, setting, found, seconds)
            told = ", ".join(f"{name} {value:.4g}" for name, value in found[max(found)].items())
            print(f"{place}: {told} ({seconds:.0f} s, {time.monotonic() - started:.0f} s so far)", flush=True)
        rows = collect(out, experiment, settings)
        plot(out / f"{experiment.name}.png", experiment, settings, rows)
    print(f"{out / experiment.name}.csv, {out / experiment.name}.png")


class Ledger:
    """The rows of one seed, in a file that grows setting by setting; a setting is there wholly or not."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self.rows = list(csv.DictReader(path.open())) if path.exists() else []

    @property
    def settings(self) -> set[str]:
        """Those that are measured."""
        return {row["setting"] for row in self.rows}

    def add(
        self, experiment: str, seed: int, setting: str, found: Mapping[int, Figures], seconds: float
    ) -> None:
        """Write what was found, by optimizer step."""
        about = {"seconds": f"{seconds:.1f}", **origin()}
        self.rows += [
            {
                **{"experiment": experiment, "seed": str(seed), "setting": setting, "step": str(step)},
                **{"measure": measure, "value": f"{value:.6g}"},
                **about,
            }
            for step, figures in found.items()
            for measure, value in figures.items()
        ]
        write_table(self._path, self.rows)


def collect(out: Path, experiment: Experiment, settings: Sequence[str]) -> list[dict[str, str]]:
    """Write OUT/NAME.csv from the files of all seeds, and give its rows."""
    files = sorted(
        (out / experiment.name).glob("seed_*.csv"), key=lambda path: int(path.stem.removeprefix("seed_"))
    )
    rows = [row for path in files for row in csv.DictReader(path.open()) if row["setting"] in settings]
    write_table(out / f"{experiment.name}.csv", rows)
    return rows


def write_table(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """CSV, all of it or what was there before."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


def plot(
    path: Path, experiment: Experiment, settings: Sequence[str], rows: Sequence[Mapping[str, str]]
) -> None:
    """All panels of an experiment, from the rows of its table."""
    commits = ", ".join(sorted({row["commit"][:10] + row["commit"][40:] for row in rows}))
    seeds = sorted({int(row["seed"]) for row in rows})
    charts = []
    for figure in experiment.figures:
        if figure.by == "setting":
            axis, places = experiment.axis, [s for s in settings if s in (figure.settings or settings)]
            curves = {name: ("measure", name, "setting") for name in figure.measures}
        else:
            axis, places = "optimizer steps", sorted({row["step"] for row in rows}, key=int)
            curves = {name: ("setting", name, "step") for name in settings}
        charts.append(
            Chart(
                axis,
                figure.title,
                {
                    name: [
                        _mean(rows, figure, {key: value, along: place}, number)
                        for number, place in enumerate(places)
                    ]
                    for name, (key, value, along) in curves.items()
                },
                places,
                figure.joined,
            )
        )
    about = f"{experiment.name}: seeds {', '.join(map(str, seeds))}; bars: 1 standard deviation; {commits}"
    path.write_bytes(to_png(*charts, header=about, size=_PANEL))


def _mean(rows: Sequence[Mapping[str, str]], figure: Figure, where: Mapping[str, str], number: int) -> Point:
    """Mean and standard deviation over seeds, at a place by number; NaN where nothing was measured."""
    last: dict[str, float] = {}
    for row in rows:
        if row["measure"] in figure.measures and all(row[key] == value for key, value in where.items()):
            last[row["seed"]] = float(row["value"])
    values = list(last.values())
    mean = statistics.fmean(values) if values else math.nan
    return Point(number, mean, deviation=statistics.stdev(values) if len(values) > 1 else 0.0)


def origin() -> dict[str, str]:
    """Where a row comes from: commit, machine and time."""
    return {
        "commit": git_commit(Path(__file__).parent, mark_changes=True) or "unknown",
        "machine": _machine(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _machine() -> str:
    """Cores, their kind, and threads."""
    kind = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        kind = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), kind)
    return (
        f"{len(os.sched_getaffinity(0))} cores of {kind}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads"
    )
