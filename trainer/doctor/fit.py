"""`ldm doctor --fit` on one rank: whether a micro-batch of this size trains on the device at hand.

Networks, engines, averages and the memory that checkpoints are copied to are those of a run. What no byte of
memory depends on is made up: pictures and conditions are zeros, and frozen networks, whose files may be
gigabytes behind a slow link, have random weights. An error says more than any count: the try is a few real
optimizer steps, in a process that nothing else of the device's memory depends on.
"""

from __future__ import annotations

import dataclasses
import json
import resource
from pathlib import Path

import torch

from data_pipeline.loader import blank_batch
from trainer.config.models import RANDOM, TOWERS
from trainer.config.run import Config
from trainer.distributed.env import DistributedEnv, initialise, shutdown
from trainer.distributed.process import configure_process
from trainer.doctor.machine import available_host_bytes
from trainer.ema import EMA
from trainer.exit_codes import ExitCode
from trainer.first_stage.build import build_first_stage, first_stage_tensors
from trainer.metrics.timer import StartTimer, StepTimer
from trainer.stages.build import build_stage
from trainer.weights import write_weights

STEPS = 2
"""The second has all that the first one left: moments, gradients that wait, captured graphs."""
PASSES = 2
_SIGNS = (
    *("out of memory", "OUT_OF_MEMORY", "ALLOC_FAILED", "allocate memory", "bad_alloc"),
    *("could not create a primitive", "Resource temporarily unavailable"),
)
"""Of memory, in the words of what raises RuntimeError: CUDA, cuBLAS, NCCL, torch, oneDNN, threads."""


def as_tried(config: Config, micro_batch: int, ranks: int, folder: Path) -> Config:
    """The run with this micro-batch, `PASSES` a step, and nothing that would be read from anywhere."""
    towers = {name: getattr(config.conditioning, name) for name in TOWERS}
    random = {n: dataclasses.replace(t, pretrained=RANDOM) for n, t in towers.items() if t is not None}
    first_stage = config.first_stage
    if config.stage == "diffusion" and first_stage.name != "identity":
        first_stage = dataclasses.replace(
            first_stage, weights=str(folder / "first_stage.safetensors"), latent_scale=1.0, cache=None
        )
    return dataclasses.replace(
        config,
        micro_batch_size=micro_batch,
        global_batch_size=micro_batch * PASSES * ranks,
        init_from=None,
        phases=(),
        data=dataclasses.replace(config.data, lanes=0),
        first_stage=first_stage,
        conditioning=dataclasses.replace(config.conditioning, **random),
        autoencoder_loss=dataclasses.replace(config.autoencoder_loss, discriminator_start=0),
    )


def write_first_stage(config: Config, folder: Path) -> None:
    """The file that `as_tried` names: a first stage of the run's shape that has learned nothing."""
    if config.stage == "diffusion" and config.first_stage.name != "identity":
        plain = dataclasses.replace(config.first_stage, latent_scale=1.0)
        tensors, metadata = first_stage_tensors(build_first_stage(plain))
        write_weights(str(folder / "first_stage.safetensors"), tensors, metadata)


def try_micro_batch(config: Config, memory_bytes: int, report: Path) -> ExitCode:
    """Train a few steps as this rank of all; FATAL where memory ends it. `report` has the figures.

    memory_bytes: what a rank may take of the device (a GPU's allocator, a CPU process's data); 0: what is
        there, on a CPU in equal parts for the ranks.

    Raises:
        ConfigError: the configuration cannot be trained on this machine, whatever the memory.
    """
    env = DistributedEnv.detect()
    told = {"limit": _limit(env, memory_bytes), "device": _name(env), "full": False, "peak": 0}
    try:
        configure_process(config.distributed)
        env = initialise(env, config.distributed.timeout_s)
        _train(config, env)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not is_of_memory(str(error)):
            raise
        told["full"] = True
    told["peak"] = _peak(env)
    report.write_text(json.dumps(told))
    if told["full"]:
        return ExitCode.FATAL  # without a word to peers, who may wait for this rank: the launcher ends them
    shutdown()
    return ExitCode.DONE


def is_of_memory(words: str) -> bool:
    """Whether what a library said when it failed is of memory."""
    return any(sign in words for sign in _SIGNS)


def _train(config: Config, env: DistributedEnv) -> None:
    torch.manual_seed(config.seed)
    stage = build_stage(config, env, StepTimer(env.device), StartTimer(), None).stage
    ema = EMA(config.ema, stage.engines[stage.averaged].fragments())
    batch = blank_batch(config.data, config.micro_batch_size * PASSES, "a word").to(env.device)
    for step in range(STEPS):
        stage.train_step(batch, step, config.optimizer.learning_rate)["loss"].item()
        ema.update(step + 1)


def _limit(env: DistributedEnv, memory_bytes: int) -> int:
    """Hold this process to its memory; how much that is."""
    if env.device.type == "cuda":
        total = torch.cuda.get_device_properties(env.device).total_memory
        if 0 < memory_bytes < total:
            torch.cuda.set_per_process_memory_fraction(memory_bytes / total, env.device)
            return memory_bytes
        return int(total)
    limit = memory_bytes or available_host_bytes() // env.local_world_size
    # A machine that runs out of memory ends whatever process it likes; one that is refused some ends itself.
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    return limit


def _peak(env: DistributedEnv) -> int:
    """Bytes that tensors took at most; on a CPU, that the process had in memory."""
    if env.device.type == "cuda":
        return torch.cuda.max_memory_allocated(env.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _name(env: DistributedEnv) -> str:
    return torch.cuda.get_device_name(env.device) if env.device.type == "cuda" else "cpu"
