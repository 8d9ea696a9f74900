"""Does a model trained at 32 px draw at 64 px, and does it need latents of unit variance for that?

    python experiments/sizes.py --out /tmp/experiments

Convolutional sampling (LDM paper, sections 4.3.2 and D.1). The first stage is hardly regularised (KL weight
1e-6), so its latents are as large as they like. One model per seed sees them brought to mean 0 and variance
1, another one sees them as they are. Both draw from semantic maps at the trained size and at twice that.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from lab.experiment import Experiment, Figure, Figures, run
from lab.maps import MAP_MODEL, draw_maps, map_agreement
from lab.workshop import CONSTANT, Workshop

RESCALED, AS_IS = "rescaled", "as it is"


def measure(workshop: Workshop, seed: int, setting: str) -> Mapping[int, Figures]:
    """Agreement with the maps of what one model draws at one size."""
    latents, _, size = setting.rpartition(" ")
    weak = workshop.first_stage("first_stage_weak_kl", ("autoencoder_loss.kl_weight=1e-6",))
    scale = () if latents == RESCALED else ("first_stage.latent_scale=1",)
    name = f"map_{latents.replace(' ', '_')}"
    first = (f"first_stage.weights={weak}", *scale)
    model = workshop.second_stage(name, seed, (*CONSTANT, *MAP_MODEL, *first))
    drawn = draw_maps(
        workshop, model, workshop.folder / "sizes" / f"seed_{seed}_{name}_{size}", int(size), seed
    )
    return {workshop.scale.steps: map_agreement(drawn)}


EXPERIMENT = Experiment(
    name="sizes",
    question=__doc__,
    settings=tuple(f"{latents} {size}" for latents in (RESCALED, AS_IS) for size in (32, 64)),
    measure=measure,
    axis="latents, and pixels of an edge",
    figures=(
        Figure("Share of pixels in the colour of their label", ("agreement",)),
        Figure("Overlap of the object with its map", ("iou",)),
    ),
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT))
