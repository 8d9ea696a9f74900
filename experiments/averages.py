"""Do averaged weights draw better pictures, and is an average of any width known afterwards?

    python experiments/averages.py --out /tmp/experiments

One model per seed trains at a constant rate and stores snapshots of two power-function averages, from which
`ldm ema` makes every other width. A second training of the same seed, whose weights are the same, keeps each
width while it trains: what was made afterwards is compared with that.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from lab.experiment import Experiment, Figure, Figures, run
from lab.oracle import judged
from lab.workshop import CONSTANT, Workshop
from safetensors.numpy import load_file

WIDTHS = ("0.02", "0.05", "0.08", "0.12", "0.17", "0.22", "0.27")
"""Relative: deviation of the average's profile, as a share of all steps."""
RAW = "raw"


def measure(workshop: Workshop, seed: int, setting: str) -> Mapping[int, Figures]:
    """Fidelity and oracle of the raw weights, or of one width from snapshots and kept in training."""
    base = workshop.base(seed)
    folder = workshop.folder / "averages" / f"seed_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = ("--guidance", "2", "--seed", str(seed))
    if setting == RAW:
        found = judged(workshop, base, folder / RAW, *drawn, "--weights", "weights")
        return {workshop.scale.steps: found}
    widths = f"ema.power_stds=[{', '.join(WIDTHS)}]"
    direct = workshop.second_stage("averages_kept", seed, (*CONSTANT, widths))
    kept, raw = folder / f"kept_{setting}.safetensors", folder / "raw.safetensors"
    made = folder / f"made_{setting}.safetensors"
    workshop.command(["ema", str(base), str(made), "--std", setting])
    workshop.command(["export", str(direct), str(kept), "--weights", f"power_{setting}"])
    workshop.command(["export", str(base), str(raw), "--weights", "weights"])
    found = judged(workshop, made, folder / f"made_{setting}", *drawn)
    kept_found = judged(workshop, kept, folder / f"kept_{setting}", *drawn)
    return {
        workshop.scale.steps: found
        | {f"kept {name}": value for name, value in kept_found.items()}
        | {"weights apart": distance(made, kept) / max(distance(raw, kept), 1e-12)}
    }


def distance(first: Path, second: Path) -> float:
    """Euclidean distance of the numbers of two files with the same tensors."""
    ours, theirs = load_file(first), load_file(second)
    return float(sum(((ours[name] - theirs[name]) ** 2).sum() for name in ours)) ** 0.5


EXPERIMENT = Experiment(
    name="averages",
    question=__doc__,
    settings=(RAW, *WIDTHS),
    small_settings=(RAW, "0.12"),
    measure=measure,
    axis="relative width of the average (raw: none)",
    figures=(
        Figure("Frechet distance, random features", ("fd", "kept fd")),
        Figure("Prompts obeyed (share of pictures)", ("oracle", "kept oracle")),
        Figure("Made afterwards to kept, over raw to kept", ("weights apart",)),
    ),
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT))
