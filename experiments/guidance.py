"""Does guidance make pictures obey their prompts, at the price of variety?

    python experiments/guidance.py --out /tmp/experiments

One text-to-image model per seed draws the same prompts from the same noise at every scale.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from lab.experiment import Experiment, Figure, Figures, run
from lab.oracle import judged
from lab.workshop import Workshop


def measure(workshop: Workshop, seed: int, setting: str) -> Mapping[int, Figures]:
    """Oracle and fidelity of what one scale draws; 0 is the model without a prompt, 1 without guidance."""
    model = workshop.base(seed)
    out = workshop.folder / "guidance" / f"seed_{seed}_scale_{setting}"
    found = judged(workshop, model, out, "--guidance", setting, "--seed", str(seed))
    return {workshop.scale.steps: found}


EXPERIMENT = Experiment(
    name="guidance",
    question=__doc__,
    settings=("0", "1", "1.5", "2", "3", "5", "8"),
    small_settings=("1", "3"),
    measure=measure,
    axis="guidance scale",
    figures=(
        Figure("Prompts obeyed (share of pictures)", ("colour", "shape", "oracle")),
        Figure("Fidelity to the data against its variety", ("precision", "recall")),
        Figure("Frechet distance, random features", ("fd",)),
    ),
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT))
