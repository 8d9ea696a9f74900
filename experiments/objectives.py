"""Which objective reaches the same quality in the fewest steps?

    python experiments/objectives.py --out /tmp/experiments

Plain eps, eps with min-SNR weights, v, v with zero terminal SNR, and a rectified flow with logit-normal
times, on the same network, data, rate and number of steps. Their losses are different quantities, so they are
judged by what they draw: the oracle and the Frechet distance of the averaged weights at several steps.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from lab.experiment import Experiment, Figure, Figures, run
from lab.oracle import judged
from lab.workshop import CONSTANT, Workshop

_DISCRETE = "diffusion.zero_terminal_snr=false"
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "eps": ("diffusion.prediction=eps", _DISCRETE),
    "eps, min-SNR": ("diffusion.prediction=eps", _DISCRETE, "diffusion.min_snr_gamma=5"),
    "v": ("diffusion.prediction=v", _DISCRETE),
    "v, zero SNR": (),
    "flow": (
        *("diffusion.process=flow", "diffusion.prediction=velocity", _DISCRETE),
        *("diffusion.density=logit_normal", "sampling.sampler=euler"),
    ),
}
"""Differences from the demo, which predicts v at zero terminal SNR. DDIM is Euler's method, too: all of them
are drawn by first-order steps along the same ordinary differential equation."""
MEASURED = 4
"""Checkpoints at equal distances."""
GUIDANCE = "2"


def measure(workshop: Workshop, seed: int, setting: str) -> Mapping[int, Figures]:
    """Oracle and fidelity of one objective at each of its checkpoints."""
    every = max(1, workshop.scale.steps // MEASURED)
    kept = (f"checkpoint.every={every}", f"checkpoint.keep_last={2 * MEASURED}")
    name = f"objective_{setting.replace(', ', '_').replace(' ', '_')}"
    model = workshop.second_stage(name, seed, (*CONSTANT, *kept, *OBJECTIVES[setting]))
    found = {}
    for step in range(every, workshop.scale.steps + 1, every):
        out = workshop.folder / "objectives" / f"seed_{seed}_{name}_{step}"
        chosen = ("--guidance", GUIDANCE, "--seed", str(seed), "--checkpoint", str(step))
        found[step] = judged(workshop, model, out, *chosen)
    return found


EXPERIMENT = Experiment(
    name="objectives",
    question=__doc__,
    settings=tuple(OBJECTIVES),
    small_settings=("eps", "flow"),
    measure=measure,
    axis="objective",
    figures=(
        Figure("Prompts obeyed: colour and shape (share of pictures)", ("oracle",), by="step"),
        Figure("Frechet distance, random features", ("fd",), by="step"),
        Figure("Recall", ("recall",), by="step"),
    ),
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT))
