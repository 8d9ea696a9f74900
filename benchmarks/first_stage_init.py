"""Curves of a small KL-f4 autoencoder from Xavier-uniform and from PyTorch's default convolution weights.

    python benchmarks/first_stage_init.py --steps 400

Both networks see the same batches of 32 px scenes in the same order with the same noise, in turns. Printed
every 100 steps: PSNR of held-out 64 px scenes and the share whose object keeps its colour and shape.
"""

from __future__ import annotations

import argparse
import random
import statistics

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.tools.scenes.judge import EvaluationPrompt, judge
from data_pipeline.tools.scenes.scene import SceneOptions, make_scene, render
from trainer.config.io import load_config
from trainer.evaluation.reconstruction import psnr
from trainer.first_stage.autoencoders import AutoencoderKL
from trainer.pixels import to_bytes, to_unit_range

CONFIG = "configs/demo_first_stage.yaml"
HELD_OUT = 128
BATCH = 8
EDGE = 64


def main() -> None:
    """Train both and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    config = load_config(CONFIG)
    pixels, truth = scenes(1024 + HELD_OUT)
    networks = {}
    for name in ("xavier", "default"):
        torch.manual_seed(config.seed)
        networks[name] = AutoencoderKL(config.first_stage)
    for module in networks["default"].modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    optimizers = {
        name: torch.optim.Adam(net.parameters(), 2e-3, (0.9, 0.99)) for name, net in networks.items()
    }
    print("steps  weights   PSNR dB  colour  shape")
    for step in range(1, steps + 1):
        rows = torch.randint(0, 1024, (BATCH,))
        small = F.avg_pool2d(pixels[rows], 2)
        noise = torch.randn(BATCH, config.first_stage.latent_channels, 8, 8)
        for name, network in networks.items():
            outputs = network(small, noise)
            error = (outputs["reconstruction"] - small).square().sum() / BATCH
            (error + config.autoencoder_loss.kl_weight * outputs["kl"].mean()).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizers[name].step()
            optimizers[name].zero_grad()
        if step % 100 == 0:
            for name, network in networks.items():
                psnr, color, shape = quality(network, pixels[-HELD_OUT:], truth[-HELD_OUT:])
                print(f"{step:5d}  {name:8s}  {psnr:7.1f}  {color:6.2f}  {shape:5.2f}", flush=True)


def scenes(count: int) -> tuple[Tensor, list[EvaluationPrompt]]:
    """float32 [N, 3, 64, 64] in -1 .. 1, and what each shows."""
    options = SceneOptions(1, 1, EDGE, EDGE, 0.25, 0.4)
    drawn = [make_scene(options, random.Random(i)) for i in range(count)]
    pixels = torch.from_numpy(np.stack([render(scene)[0] for scene in drawn])).permute(0, 3, 1, 2)
    truth = [EvaluationPrompt("", s.main.color, s.main.shape, s.background) for s in drawn]
    return to_unit_range(pixels), truth


@torch.no_grad()
def quality(
    network: AutoencoderKL, pixels: Tensor, truth: list[EvaluationPrompt]
) -> tuple[float, float, float]:
    """PSNR in dB, share of right colours, share of right shapes."""
    made = to_bytes(network.decode(network.latents(pixels, None)))
    verdicts = [judge(picture, expected) for picture, expected in zip(made.numpy(), truth, strict=True)]
    return (
        float(psnr(pixels, to_unit_range(made)).mean()),
        statistics.fmean(verdict.color_correct for verdict in verdicts),
        statistics.fmean(verdict.shape_correct for verdict in verdicts),
    )


if __name__ == "__main__":
    main()
