"""What the ranks of test_autoencoder_engines.py run: a tiny autoencoder, two steps."""

from __future__ import annotations

import torch

from data_pipeline.batch import Batch
from data_pipeline.order.lanes import Part, lanes_of
from tests.integration.whole_parameters import whole_weights
from trainer.config.models import FirstStageConfig
from trainer.config.run import Config
from trainer.config.training import AutoencoderLossConfig, DistributedConfig, OptimizerConfig
from trainer.distributed import collectives
from trainer.distributed.build import build_engine
from trainer.distributed.env import DistributedEnv
from trainer.first_stage.perceptual import build_perceptual
from trainer.metrics.timer import StepTimer
from trainer.model import build_autoencoder
from trainer.stages.autoencoder import AutoencoderStage
from trainer.weights import write_weights

GLOBAL_BATCH = 8
STEPS = 2


def make_config(engine: str, zero_stage: int, name: str) -> Config:
    return Config(
        stage="autoencoder",
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=2,
        first_stage=FirstStageConfig(
            name=name,
            base_channels=8,
            channel_multipliers=(1, 2),
            num_res_blocks=1,
            latent_channels=3,
            codebook_size=16,
        ),
        autoencoder_loss=AutoencoderLossConfig(
            # With L1 a rounding error flips the sign of a gradient now and then; L2 is smooth.
            reconstruction="l2",
            perceptual_weight=0.1,
            perceptual_weights="random",
            revive_codes_every=2 if name == "vq" else 0,
            learned_logvar=True,
            discriminator_start=1,
            discriminator_channels=8,
            discriminator_layers=2,
        ),
        # A large eps keeps Adam from turning the sign of a rounding error into a whole step.
        optimizer=OptimizerConfig(learning_rate=1e-3, betas=(0.5, 0.9), eps=1e-2, weight_decay=0.0),
        distributed=DistributedConfig(
            engine=engine, zero_stage=zero_stage, precision="fp32", channels_last=False
        ),
    )


def rank_batch(step: int, rank: int, world_size: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    coarse = torch.randint(0, 256, (GLOBAL_BATCH, 3, 8, 8), generator=generator, dtype=torch.uint8)
    ordinals = torch.arange(GLOBAL_BATCH) + step * GLOBAL_BATCH
    own = lanes_of(Part(rank, world_size, together=2), GLOBAL_BATCH, GLOBAL_BATCH)
    mine = slice(own.start, own.stop)
    return Batch(
        pixels=coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)[mine],
        captions=("",) * len(own),
        conditions={},
        keys=("",) * len(own),
        ordinals=ordinals[mine],
        slots=torch.arange(GLOBAL_BATCH)[mine],
        position={},
    )


def train_autoencoder(env: DistributedEnv, engine_name: str, zero_stage: int, name: str, output: str) -> None:
    """Train, and write everything whole into the file `output`."""
    config = make_config(engine_name, zero_stage, name)
    networks = build_autoencoder(config)
    engines = {key: build_engine(network, config, env) for key, network in networks.items()}
    perceptual = build_perceptual(config.autoencoder_loss, env.device)
    stage = AutoencoderStage(config, engines, perceptual, StepTimer(env.device))
    for step in range(STEPS):
        metrics = stage.train_step(rank_batch(step, env.rank, env.world_size), step, 1e-3)
    stage.finish(rank_batch(step, env.rank, env.world_size) for step in range(2))
    shown = stage.preview(rank_batch(0, env.rank, env.world_size))
    assert shown.captions[-1] == "reconstruction"
    tensors = {
        f"{key}.{parameter}": value.clone()
        for key, engine in stage.engines.items()
        for parameter, value in whole_weights(engine).items()
    }
    tensors |= stage.state()
    tensors |= {
        metric: collectives.reduce_sum(metrics[metric].float()) / env.world_size
        for metric in ("loss", "kl" if name == "kl" else "codebook", "adaptive_weight", "discriminator")
    }
    tensors |= {metric: metrics[metric].float() for metric in ("grad_norm", "discriminator_grad_norm")}
    if name == "vq":
        tensors["codebook_usage"] = metrics["codebook_usage"]
        tensors["codebook_revived"] = metrics["codebook_revived"]
        assert metrics["codebook_revived"] > 0
    if env.is_main:
        write_weights(output, tensors, {})
