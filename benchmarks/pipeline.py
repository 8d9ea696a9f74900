"""Pictures from prompts: `ldm sample` against diffusers' StableDiffusionPipeline with the same weights.

    python benchmarks/pipeline.py                    # reduced SD2 at 128 px on the CPU, some minutes
    python benchmarks/pipeline.py --pictures 8 --steps 50 --repeats 5

Tokens, text tower, guided UNet and decoder on both sides, fp32, one process, equal noise; the pipeline is the
one that `ldm export --layout diffusers` writes. The arms take turns, the first turn is thrown away, and what
they draw must be the same to a level of 8 bits. Weights are random: the time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from trainer.__main__ import main as ldm
from trainer.config.io import config_to_dict, load_config
from trainer.first_stage.build import build_first_stage, first_stage_tensors
from trainer.model import build_model, load_model
from trainer.rng import Purpose, normal
from trainer.sample import Request, generate
from trainer.weights import write_weights

EDGE, SEED, GUIDANCE_SCALE = 128, 3, 7.5
SETTINGS = (
    f"data.image_size={EDGE}",
    "first_stage={base_channels: 32, channel_multipliers: [1, 2, 4, 4], num_res_blocks: 2}",
    "unet={model_channels: 64, channel_multipliers: [1, 2, 4, 4], num_res_blocks: 2}",
    "unet={attention_factors: [1, 2, 4], head_dim: 32}",
    "conditioning.openclip={model: ViT-B-32, pretrained: random, width: 256, layers: 6, heads: 4}",
)
"""SD2's structure, a fifth as wide; latents of 16 x 16."""


def main() -> None:
    """Print images per second of both, and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=4, help="of one batch")
    parser.add_argument("--steps", type=int, default=25, help="10 or more: ours spaces fewer otherwise")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    prompts = [f"a red circle on a blue field, number {i}" for i in range(args.pictures)]
    sampling = f"sampling={{sampler: ddim, steps: {args.steps}, guidance_scale: {GUIDANCE_SCALE}}}"
    with tempfile.TemporaryDirectory() as folder:
        source = write_run(Path(folder), sampling)
        pipeline_folder = f"{folder}/pipeline"
        if ldm(["export", source, pipeline_folder, "--layout", "diffusers"]):
            raise SystemExit("the export failed")
        trained = load_model(source, device=torch.device("cpu"))
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = normal(SEED, torch.arange(args.pictures), Purpose.INITIAL, (4, EDGE // 8, EDGE // 8))

    def ours() -> Tensor:
        return generate(trained.config, trained.model, Request(tuple(prompts)), seed=SEED)

    def theirs() -> Tensor:
        drawn = pipeline(
            prompts, num_inference_steps=args.steps, guidance_scale=GUIDANCE_SCALE, latents=noise.clone(),
            output_type="np", height=EDGE, width=EDGE,
        ).images  # fmt: skip
        return torch.from_numpy(np.asarray(drawn)).permute(0, 3, 1, 2) * 255

    seconds: dict[str, list[float]] = {"ldm sample": [], "diffusers": []}
    for _ in range(args.repeats + 1):
        pictures = []
        for name, arm in (("ldm sample", ours), ("diffusers", theirs)):
            begun = time.perf_counter()
            pictures.append(arm())
            seconds[name].append(time.perf_counter() - begun)
        apart = float((pictures[0].float() - pictures[1]).abs().max())
        assert apart <= 1, f"the arms draw other pictures: {apart} levels apart"
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, load {os.getloadavg()[0]:.1f}")
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    for name, values in seconds.items():
        turns = " ".join(f"{value:.2f}" for value in values[1:])
        print(f"{name:12} {args.pictures / medians[name]:8.3f} images/s   seconds a batch: {turns}")
    print(f"ratio {medians['diffusers'] / medians['ldm sample']:.2f}")


def write_run(folder: Path, sampling: str) -> str:
    """An exported run of random weights, with its first stage; its path."""
    weights = str(folder / "first_stage.safetensors")
    config = load_config(None, [*SETTINGS, sampling, f"first_stage.weights={weights}"])
    torch.manual_seed(0)
    stage = build_first_stage(config.first_stage)
    stage.set_latent_statistics(torch.zeros(4), torch.ones(4))
    write_weights(weights, *first_stage_tensors(stage))
    network: nn.Module = build_model(config).network
    for parameter in network.parameters():
        if not parameter.any():  # what training begins with at zero
            nn.init.normal_(parameter, std=0.02)
    source = str(folder / "run.safetensors")
    about = {"config": json.dumps(config_to_dict(config)), "network": "unet", "profile": "decay"}
    write_weights(source, network.state_dict(), about)
    return source


if __name__ == "__main__":
    main()
