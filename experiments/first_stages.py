"""What do the perceptual and the adversarial part buy, and how many codes of a codebook are used?

    python experiments/first_stages.py --out /tmp/experiments

The demo's first stage with the squared error alone, with a perceptual distance, and with a discriminator as
well: PSNR against the Frechet distance of reconstructions. Then with codebooks of several sizes in the place
of the KL term, of which dead entries stay dead, or move to encoder outputs every 20 steps.

The perceptual network is random (nothing is downloaded), so that part is not LPIPS: what it buys here says
nothing about what LPIPS buys, and the Frechet distance is by random features as well.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from lab.experiment import Experiment, Figure, Figures, run
from lab.workshop import Workshop

PARTS = {
    "pixels": ("autoencoder_loss.perceptual_weight=0", "autoencoder_loss.discriminator_weight=0"),
    "+ perceptual": ("autoencoder_loss.discriminator_weight=0",),
    "+ adversarial": (),
}
CODES = ("16", "64", "256", "1024")
REVIVED = "1024 revived"
CODEBOOKS = (*CODES, REVIVED)


def measure(workshop: Workshop, seed: int, setting: str) -> Mapping[int, Figures]:
    """Reconstruction of one first stage; of one with a codebook, how many of its entries are chosen, too."""
    steps = workshop.scale.first_stage_steps
    name = f"first_stage_{setting.replace('+ ', 'with_').replace(' ', '_')}_{seed}"
    if setting in PARTS:
        weights = workshop.first_stage(name, (f"seed={seed}", *PARTS[setting]))
        return {steps: workshop.reconstruction(weights)}
    size, _, revived = setting.partition(" ")
    held_out = ("data.validation.share=0.02", f"validation.every={steps}", "validation.samples=64")
    revival = ("autoencoder_loss.revive_codes_every=20",) if revived else ()
    codebook = (f"first_stage={{name: vq, codebook_size: {size}}}", *revival)
    weights = workshop.first_stage(name, (f"seed={seed}", *held_out, *codebook))
    last = [r for r in workshop.records(workshop.folder / name) if "validation/codebook_usage" in r][-1]
    used = {"codes used": last["validation/codebook_usage"] * int(size)}
    return {steps: workshop.reconstruction(weights) | used | {"share used": used["codes used"] / int(size)}}


EXPERIMENT = Experiment(
    name="first_stages",
    question=__doc__,
    settings=(*PARTS, *CODEBOOKS),
    small_settings=("pixels", "64"),
    measure=measure,
    axis="parts of the loss, or entries of the codebook",
    figures=(
        Figure("PSNR, dB", ("psnr",), settings=tuple(PARTS)),
        Figure("Frechet distance of reconstructions", ("reconstruction fd",), settings=tuple(PARTS)),
        Figure("PSNR by entries of the codebook, dB", ("psnr",), settings=CODEBOOKS),
        Figure("Share of the entries that is chosen", ("share used",), settings=CODEBOOKS),
    ),
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT))
