"""How far should the first stage compress (LDM paper, section 4.1 and figure 6)?

    python experiments/compression.py --out /tmp/experiments

The same UNet on pixels (f = 1) and on the latents of KL and VQ first stages with f = 2, 4, 8 and 16, each
with as many steps as the same work allows: 70, 259, 800, 1673 and 2300. A step costs its cells in the UNet
and as much as 28 cells for the rest (encoder, text tower, optimizer), which is how the demo's steps split at
f = 4. Codebooks have 1024 entries, of which dead ones move to encoder outputs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from lab.experiment import Experiment, Figure, Figures, run
from lab.oracle import judged
from lab.workshop import CONSTANT, Workshop

EDGE = 32
KL = ("1", "2", "4", "8", "16")
VQ = ("2 vq", "4 vq", "8 vq", "16 vq")
LATENTS = {2: ("[1, 2]", 2), 4: ("[1, 2, 4]", 3), 8: ("[1, 2, 4, 4]", 4), 16: ("[1, 2, 4, 4, 4]", 8)}
"""f -> multipliers of the first stage's levels, and channels of the latent, those of published LDMs."""
REST = 28
"""Work of a step beside the UNet, in cells of a latent."""


def measure(workshop: Workshop, seed: int, setting: str) -> Mapping[int, Figures]:
    """What the first stage keeps and what the second one draws, at one factor."""
    number, _, codebook = setting.partition(" ")
    factor = int(number)
    steps = max(2, round(workshop.scale.steps * _work(4) / _work(factor)))
    found: dict[str, float] = {}
    if factor == 1:
        structure = ("first_stage.name=identity", "first_stage.weights=null")
    else:
        levels, channels = LATENTS[factor]
        kind = "name: vq, codebook_size: 1024, " if codebook else ""
        revival = ("autoencoder_loss.revive_codes_every=20",) if codebook else ()
        shape = f"first_stage={{{kind}channel_multipliers: {levels}, latent_channels: {channels}}}"
        weights = workshop.first_stage(f"first_stage_f{factor}{codebook}", (shape, *revival))
        found = workshop.reconstruction(weights)
        structure = (shape, f"first_stage.weights={weights}")
    model = workshop.second_stage(f"compression_f{factor}{codebook}", seed, (*CONSTANT, *structure), steps)
    out = workshop.folder / "compression" / f"seed_{seed}_f{factor}{codebook}"
    return {steps: judged(workshop, model, out, "--guidance", "2", "--seed", str(seed)) | found}


def _work(factor: int) -> int:
    return (EDGE // factor) ** 2 + REST


EXPERIMENT = Experiment(
    name="compression",
    question=__doc__,
    settings=(*KL, *VQ),
    small_settings=("1", "8", "8 vq"),
    measure=measure,
    axis="downsampling factor f",
    figures=(
        Figure("KL: Frechet distance, random features", ("fd", "reconstruction fd"), settings=KL),
        Figure("KL: prompts obeyed (share of pictures)", ("colour", "shape", "oracle"), settings=KL),
        Figure("KL: PSNR of the first stage, dB", ("psnr",), settings=KL[1:]),
        Figure("VQ: Frechet distance, random features", ("fd", "reconstruction fd"), settings=VQ),
        Figure("VQ: prompts obeyed (share of pictures)", ("colour", "shape", "oracle"), settings=VQ),
        Figure("VQ: PSNR of the first stage, dB", ("psnr",), settings=VQ),
    ),
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT))
