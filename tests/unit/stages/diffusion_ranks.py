"""What the ranks of `test_any_ranks.py` run: a few steps of the second stage from real shards."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch

from data_pipeline.loader import Part, build_loader
from data_pipeline.moments.entry import Moments
from data_pipeline.moments.writer import MomentsWriter
from tests.integration.whole_parameters import whole_weights
from trainer.config.io import load_config
from trainer.distributed import collectives
from trainer.distributed.build import build_engine
from trainer.distributed.env import DistributedEnv
from trainer.first_stage.encode_once import EncodeOnce, moments_cache, open_cache
from trainer.metrics.timer import StepTimer
from trainer.model import build_model
from trainer.stages.diffusion import DiffusionStage

STEPS = 3


def train_cases(env: DistributedEnv, cases: list[list[str]]) -> list[dict[str, Any]]:
    """Each is a list of settings; what all ranks agree on, and on rank 0 the weights."""
    return [_train(env, settings) for settings in cases]


def _train(env: DistributedEnv, settings: list[str]) -> dict[str, Any]:
    config = load_config(None, settings)
    sharing = config.sharing(env.world_size)
    torch.manual_seed(0)
    model = build_model(config)
    once, moments = None, None
    if config.first_stage.cache is not None:
        cache = moments_cache(config.first_stage, model.first_stage)
        collectives.from_main_rank(lambda: open_cache(config.first_stage, cache))
        writer = MomentsWriter(cache, part_bytes=12_000)
        once = EncodeOnce(model.first_stage, cache, writer, sharing.rows)
        moments = Moments(config.first_stage.cache_variants, cache)
    engine = build_engine(model.network, config, env)
    parts = (config, {"unet": engine}, model.conditioner, model.first_stage, StepTimer(env.device), once)
    stage = DiffusionStage(*parts)
    found: dict[str, Any] = {"keys": [], "loss": [], "error": [], "grad_norm": [], "rows": []}
    batches = build_loader(
        config.data,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        part=Part(env.rank, env.world_size, sharing.together),
        moments=moments,
    )
    with closing(batches):
        for step in range(STEPS):
            batch = next(batches)
            metrics = stage.train_step(batch, step, 1e-3)
            for name in metrics:
                mean = collectives.reduce_sum(metrics[name].double()) / env.world_size
                found[name].append(mean.item())
            told = collectives.all_gather_object(batch.keys)
            found["keys"] += [key for keys in told for key in keys]
            found["rows"].append([len(keys) for keys in told])
    if once is not None:
        once.close()
        found["written"] = sum(collectives.all_gather_object(once.counts["written"]))
    weights = whole_weights(engine)
    found["weights"] = {name: value.flatten().tolist() for name, value in weights.items()}
    return found
