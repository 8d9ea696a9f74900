"""How soon does a recipe draw what it is asked for?

    python experiments/speedrun.py --out /tmp/speedrun
    python experiments/speedrun.py optimizer.name=muon --out /tmp/speedrun_muon --seeds 0 1 2

Trains the second stage of the demo by its own configuration, with the settings that are given, and finds the
first checkpoint that meets both targets: validation loss of the averaged weights, and share of 108 pictures
with the colour and the shape of their prompts. Prints steps, images and seconds until there. The first stage
is the demo's and trained before the clock starts; pictures are drawn after it has stopped. Seconds run from
the start of `ldm train`, so they include what it takes to begin.

--record FILE adds a line to a table of records, each with its targets. A recipe may change network, optimizer
and batch, but neither the data nor what the validation loss measures, nor where it starts.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lab.experiment import origin
from lab.oracle import accuracy, prompted
from lab.workshop import FULL, SECOND_STAGE, SMALL, Refused, Workshop

from trainer.config.io import load_config
from trainer.config.run import ConfigError

LOSS, ORACLE = 0.28, 0.6
"""Targets: at most, and at least."""
PICTURES, EVERY = 108, 100
"""Judged of each checkpoint, and steps between checkpoints."""
FIXED = ("diffusion", "data", "first_stage", "validation", "checkpoint", "sampling")
"""Sections that define the targets and how they are measured, and that a race sets by itself."""
OURS = {
    "seed": "which the race sets; name seeds with --seeds",
    "run_dir": "which the race sets; name a folder with --out",
    "init_from": "by which it starts trained; begin with random weights",
}
"""Settings that a recipe cannot have at all, and why."""


@dataclass(frozen=True)
class Record:
    """A line of the table."""

    recipe: str
    seed: int
    steps: int
    images: int
    seconds: float
    validation_loss: float
    oracle: float
    loss_target: float
    oracle_target: float
    small: bool
    """Of --small: other data, and checkpoints at other steps."""
    commit: str
    machine: str
    time: str


@dataclass(frozen=True)
class Reached:
    """A checkpoint with what the run has recorded of it."""

    step: int
    images: int
    seconds: float
    loss: float


def main(argv: Sequence[str] | None = None) -> int:
    """0, 1 where no checkpoint met the targets, 2 for a recipe that cannot be compared."""
    args = _parser().parse_args(argv)
    try:
        every = 2 if args.small else EVERY
        check(args.recipe)
        if args.record is not None:
            check_table(args.record)
        workshop = Workshop(args.out.resolve(), SMALL if args.small else FULL)
        records = [_race(workshop, seed, args.recipe, every, args) for seed in dict.fromkeys(args.seeds)]
    except (Refused, ConfigError) as problem:
        print(f"speedrun: {problem}", file=sys.stderr)
        return getattr(problem, "code", 2)
    found = [record for record in records if record is not None]
    if args.record is not None:
        add(args.record, found)
    return 0 if len(found) == len(records) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="*", metavar="a.b=c", help="settings for the second stage")
    parser.add_argument("--out", type=Path, required=True, help="folder of everything, one for each recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default: 0)")
    parser.add_argument("--loss", type=float, default=LOSS, help="target (default: %(default)s)")
    parser.add_argument("--oracle", type=float, default=ORACLE, help="target (default: %(default)s)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="add what was found to this table")
    parser.add_argument("--small", action="store_true", help="a few steps, to see that it works")
    return parser


def check(recipe: Sequence[str]) -> None:
    """Raise Refused for a recipe whose figures would not compare with the others'."""
    ours, theirs = load_config(str(SECOND_STAGE)), load_config(str(SECOND_STAGE), list(recipe))
    # By name too: a recipe comes last, so one that repeats the file's value undoes the race's own.
    named = {word.partition("=")[0].partition(".")[0].strip() for word in recipe}
    for name, why in OURS.items():
        if name in named:
            raise Refused(f"a recipe cannot have {name}, {why}.")
    for name in FIXED:
        if name in named or any(getattr(ours, name) != getattr(phase, name) for phase in theirs.apart()):
            raise Refused(
                f"a recipe that changes {name}, in a phase or from the start, does not compare with the "
                "records, whose targets depend on it; leave it as in configs/demo_text_to_image.yaml."
            )


def check_table(path: Path) -> None:
    """Raise Refused where the table has other columns than a record."""
    if path.exists() and path.read_text().partition("\n")[0].split(",") != _columns():
        raise Refused(f"{path} has other columns than records of today; name a new file with --record.")


def _columns() -> list[str]:
    return [field.name for field in fields(Record)]


def _race(
    workshop: Workshop, seed: int, recipe: Sequence[str], every: int, args: argparse.Namespace
) -> Record | None:
    config = load_config(str(SECOND_STAGE), list(recipe))
    steps = workshop.scale.steps if args.small else config.steps
    name = f"speedrun/seed_{seed}"
    run = workshop.folder / name
    if run.exists():
        raise Refused(f"{run} is there from a race before; name a new folder with --out, or remove it.")
    workshop.first_stage()
    measured = (f"validation.every={every}", f"checkpoint.every={every}", f"checkpoint.keep_last={steps}")
    begun = time.time()
    workshop.race(name, seed, steps, (*measured, *recipe))
    for reached in _candidates(workshop, run, begun, args.loss):
        oracle = _oracle(workshop, run, seed, reached.step)
        print(
            f"[speedrun] seed {seed}, step {reached.step}: {reached.seconds:.0f} s, validation loss "
            f"{reached.loss:.4f}, oracle {oracle:.3f}",
            flush=True,
        )
        if oracle >= args.oracle:
            print(f"reached after {reached.step} steps, {reached.images} images, {reached.seconds:.0f} s")
            return _record(recipe, seed, reached, oracle, args)
    print(
        f"[speedrun] seed {seed}: loss {args.loss} and oracle {args.oracle} were not reached in {steps} steps"
    )
    return None


def _candidates(workshop: Workshop, run: Path, begun: float, most: float) -> Iterable[Reached]:
    """Checkpoints whose loss is low enough, oldest first."""
    for record in workshop.records(run):
        if record.get("validation/loss", float("inf")) <= most:
            seconds = record["time"] - begun
            yield Reached(record["step"], record["samples_seen"], seconds, record["validation/loss"])


def _oracle(workshop: Workshop, run: Path, seed: int, step: int) -> float:
    out = workshop.folder / "speedrun" / f"pictures_{seed}_{step}"
    prompts = (*prompted(workshop.folder), "--count", str(PICTURES))
    words = ["sample", str(run), "--checkpoint", str(step), "--seed", "0", "--out", str(out), *prompts]
    workshop.command([*words, "--batch-size", "54"])
    return accuracy(out / "pictures")["oracle"]


def _record(
    recipe: Sequence[str], seed: int, reached: Reached, oracle: float, args: argparse.Namespace
) -> Record:
    return Record(
        recipe=" ".join(recipe) or "demo",
        seed=seed,
        steps=reached.step,
        images=reached.images,
        seconds=round(reached.seconds, 1),
        validation_loss=round(reached.loss, 4),
        oracle=round(oracle, 4),
        loss_target=args.loss,
        oracle_target=args.oracle,
        small=args.small,
        **origin(),
    )


def add(path: Path, records: Iterable[Record]) -> None:
    """Append to the table, which begins with its columns."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, _columns(), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(asdict(record) for record in records)


if __name__ == "__main__":
    sys.exit(main())
