"""Shards of synthesized JPEGs and random weights of the real structure, made once for all sections."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import torch
from safetensors.torch import save_file

from gpu_sections.processes import ROOT
from gpu_sections.recipe import (
    FIRST_STAGE_FILE,
    SHARDS,
    TOWER_FILE,
    Setup,
    fill,
    meta_conditioner,
    random_first_stage,
)
from trainer.first_stage.build import first_stage_tensors
from trainer.weights import write_weights


def prepare(setup: Setup) -> None:
    """512 to 640 px pictures drawn by all cores, while the weights are drawn on the device."""
    begun = time.perf_counter()
    samples, per_shard = (96, 24) if setup.small else (2048, 128)
    drawing = subprocess.Popen(
        [
            *(sys.executable, "-m", "trainer", "data", "synthesize", str(setup.work / SHARDS)),
            *("--samples", str(samples), "--samples-per-shard", str(per_shard), "--size", "512:640"),
            "--overwrite",  # the folder is kept, and may hold the other size's
            *("--workers", str(min(16, os.cpu_count() or 1))),
        ],
        cwd=ROOT,
    )
    try:
        _write_first_stage(setup)
        if not setup.small:
            _write_tower(setup)
        weights_s = time.perf_counter() - begun
        if drawing.wait():
            raise SystemExit("the shards could not be made")
    finally:
        drawing.kill()
    setup.report(
        weights_s=weights_s,
        seconds=time.perf_counter() - begun,
        samples=samples,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
    )


def _write_first_stage(setup: Setup) -> None:
    module = random_first_stage(setup.config(), setup.device, torch.float32)
    tensors, metadata = first_stage_tensors(module)
    cpu = {name: value.cpu().contiguous() for name, value in tensors.items()}
    write_weights(str(setup.work / FIRST_STAGE_FILE), cpu, metadata)


def _write_tower(setup: Setup) -> None:
    """In open_clip's names, drawn on the device: 340 million numbers take a CPU seconds."""
    tower = meta_conditioner(setup.config()).frozen.modules()["openclip"]
    tower.to_empty(device=setup.device)
    fill(tower, seed=2)
    weights = {name: value.cpu().contiguous() for name, value in tower.state_dict().items()}
    save_file(weights, str(setup.work / TOWER_FILE))
