"""The first-stage configurations carry the paper's structures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.config.io import load_config
from trainer.model import build_autoencoder

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "first_stage"
# name: (f, z, codebook or None, batch, discriminator_start, parameters of the autoencoder in millions)
ZOO = {
    "kl_f4": (4, 3, None, 10, 50_001, 55.31),
    "kl_f8": (8, 4, None, 4, 50_001, 83.65),
    "kl_f16": (16, 16, None, 6, 50_001, 69.61),
    "kl_f32": (32, 64, None, 6, 50_001, 103.88),
    "vq_f4": (4, 3, 8192, 8, 0, 55.32),
    "vq_f4_noattn": (4, 3, 8192, 8, 11, 53.22),
    "vq_f8": (8, 4, 16_384, 10, 1, 67.72),
    "vq_f8_n256": (8, 4, 256, 10, 250_001, 67.65),
    "vq_f16": (16, 8, 16_384, 14, 250_001, 69.59),
}


def test_every_file_is_listed_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(ZOO)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_structure_and_recipe(name: str) -> None:
    factor, z, codebook, batch, start, millions = ZOO[name]
    path = FOLDER / f"{name}.yaml"
    first_line = path.read_text().splitlines()[0]
    assert first_line.startswith(f"# ldm train configs/first_stage/{name}.yaml ")
    config = load_config(str(path), ["data.shards=s3://bucket/{00000..01000}.tar"])
    stage, loss = config.first_stage, config.autoencoder_loss
    assert (stage.downsampling, stage.channels) == (factor, z)
    assert stage.name == ("kl" if codebook is None else "vq")
    assert codebook is None or stage.codebook_size == codebook
    assert loss.beta_weighs == ("commitment" if codebook is None else "codebook")  # taming's default
    assert (config.global_batch_size, loss.discriminator_start) == (batch, start)
    assert config.optimizer.learning_rate == pytest.approx(4.5e-6 * batch)
    with torch.device("meta"):
        networks = build_autoencoder(config)
    size = sum(p.numel() for p in networks["autoencoder"].parameters())
    assert size / 1e6 == pytest.approx(millions, abs=0.006)
