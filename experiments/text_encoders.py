"""Does a text transformer that is trained with the network teach more than a frozen tower, for the same work?

    python experiments/text_encoders.py --out /tmp/experiments

The transformer of the LDM paper (section 4.3.1) against a frozen tower of the same size, with and without its
pooled vector, which the transformer has no like of. Nothing is downloaded, so the tower's weights are random:
it tells captions apart and knows nothing of them. A step with the transformer takes 1.136 times the work,
since gradients go through it (operations as `torch.utils.flop_counter` counts them): 704 steps for 800.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from lab.experiment import Experiment, Figure, Figures, run
from lab.oracle import judged
from lab.workshop import CONSTANT, Workshop

JOINT = "joint"
WORK = 1.136
"""Of a step with the joint transformer, in steps with the tower: 5.245 and 4.618 GFLOP per 16 pictures."""
MODELS = {
    "frozen": ("conditioning.openclip.pooled=false",),
    JOINT: (
        "conditioning={openclip: null, text_transformer: {width: 128, layers: 2, heads: 4, head_dim: 32, "
        "max_tokens: 24}}",
    ),
}
POOLED = "frozen, pooled"


def measure(workshop: Workshop, seed: int, setting: str) -> Mapping[int, Figures]:
    """Oracle, fidelity and held-out loss of one way to read captions."""
    steps = workshop.scale.steps
    if setting == JOINT:
        steps = round(steps / WORK)
    if setting == POOLED:
        model = workshop.base(seed)
    else:
        model = workshop.second_stage(f"text_{setting}", seed, (*CONSTANT, *MODELS[setting]), steps)
    out = workshop.folder / "text_encoders" / f"seed_{seed}_{setting.replace(', ', '_')}"
    found = judged(workshop, model, out, "--guidance", "2", "--seed", str(seed))
    loss = [r["validation/loss"] for r in workshop.records(model) if "validation/loss" in r][-1]
    return {steps: found | {"held-out loss": loss}}


EXPERIMENT = Experiment(
    name="text_encoders",
    question=__doc__,
    settings=(POOLED, *MODELS),
    measure=measure,
    axis="how captions are read",
    figures=(
        Figure("Prompts obeyed (share of pictures)", ("colour", "shape", "oracle"), joined=False),
        Figure("Frechet distance, random features", ("fd",), joined=False),
        Figure("Held-out loss", ("held-out loss",), joined=False),
    ),
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT))
