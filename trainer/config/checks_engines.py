"""Refuses optimizers, engines and ways of computing that do not go together, or do nothing. Torch-free."""

from __future__ import annotations

from trainer.config.run import Config, require
from trainer.config.training import DistributedConfig, OptimizerConfig


def check_optimizer(config: Config) -> None:
    """Raise ConfigError for settings that this optimizer, or its engine, does not have."""
    distributed = config.distributed
    if config.optimizer.conditioner_learning_rate is not None:
        require(
            config.stage == "diffusion",
            "optimizer.conditioner_learning_rate is for conditioners, which stage=autoencoder does not have; "
            "remove it.",
        )
        require(
            config.optimizer.name == "adamw",
            f"optimizer.name={config.optimizer.name} has one rate for everything; remove "
            "optimizer.conditioner_learning_rate, or set optimizer.name=adamw.",
        )
    require(
        config.optimizer.name != "muon" or distributed.engine != "deepspeed" or distributed.zero_stage < 3,
        "optimizer.name=muon needs whole matrices, which distributed.zero_stage=3 takes apart one by one; "
        "set distributed.zero_stage to 2 or lower, or optimizer.name=adamw or adafactor.",
    )
    usual = OptimizerConfig()
    of = {"betas": ("adamw", "muon"), "eps": ("adamw", "muon"), "momentum": ("muon",)}
    of |= dict.fromkeys(("beta2_decay", "adafactor_eps", "update_clip"), ("adafactor",))
    for setting, names in of.items():
        common = getattr(usual, setting)
        require(
            config.optimizer.name in names or getattr(config.optimizer, setting) == common,
            f"optimizer.{setting} has no effect with optimizer.name={config.optimizer.name}; leave it at "
            f"{common}, or set optimizer.name={' or '.join(names)}.",
        )


def check_communication(d: DistributedConfig) -> None:
    """Raise ConfigError for what the engine would take without a word and without effect, or nobody tried."""
    if d.engine == "fsdp":
        _check_fsdp(d)
        return
    require(
        not d.shard_ranks,
        f"distributed.shard_ranks has no effect with distributed.engine={d.engine}; remove it, or set "
        "engine=fsdp.",
    )
    whole = d.engine == "torch" or d.zero_stage == 0
    engine = f"distributed.engine={d.engine}"
    if d.engine == "deepspeed":
        engine = f"distributed.zero_stage={d.zero_stage}"
    require(
        not (whole and d.overlap_communication),
        f"distributed.overlap_communication has no effect with {engine}, which sends gradients after "
        "backward; remove it, or train with engine=deepspeed and zero_stage=1.",
    )
    require(
        not (d.cuda_graphs and d.overlap_communication),
        "distributed.overlap_communication has no effect with distributed.cuda_graphs, whose gradients all "
        "arrive at once; leave one of them out.",
    )
    scatters = d.engine == "deepspeed" and d.zero_stage == 1 and d.precision == "bf16"
    require(
        not (scatters and d.compile and d.overlap_communication),
        "distributed.overlap_communication was not tried with distributed.compile at zero_stage=1 in bf16; "
        "leave one of them out.",
    )
    buckets = DistributedConfig().reduce_bucket_elements
    require(
        d.engine != "deepspeed" or not whole or d.reduce_bucket_elements == buckets,
        f"distributed.reduce_bucket_elements has no effect with {engine}, where DeepSpeed's buckets have a "
        "fixed size; remove it, or set zero_stage to 1 or higher.",
    )
    require(
        d.reduce_precision == "fp32" or (d.precision == "bf16" and d.engine != "torch"),
        "distributed.reduce_precision=bf16 has no effect with "
        f"{engine if d.engine == 'torch' else 'distributed.precision=fp32'}, which sends gradients in fp32; "
        "remove it.",
    )


def check_graphs(config: Config) -> None:
    """Raise ConfigError for what CUDA graphs cannot carry."""
    if not config.distributed.cuda_graphs:
        return
    layout = config.conditioning.layout
    obstacles = {
        "stage=autoencoder": config.stage == "autoencoder",
        # The gradients of a graph lie where the next replay writes; engines that add up elsewhere than in
        # `grad` take them away at once. At zero_stage=0 a sum in place would grow from what was overwritten.
        "distributed.precision=fp32": config.distributed.precision == "fp32",
        "distributed.zero_stage=0": config.distributed.engine == "deepspeed"
        and config.distributed.zero_stage == 0,
        "distributed.zero_stage=3": config.distributed.zero_stage == 3,
        "diffusion.learned_uncertainty": config.diffusion.learned_uncertainty,  # a second output
        "unet.activation_checkpointing": config.unet.activation_checkpointing,
        "unet.dropout": config.unet.dropout > 0,
        "conditioning.layout.dropout": layout is not None and layout.dropout > 0,
        "lora.dropout": config.lora is not None and config.lora.dropout > 0,
    }
    present = [name for name, there in obstacles.items() if there]
    require(
        not present,
        f"distributed.cuda_graphs does not go together with {' and '.join(present)}; leave one of them out.",
    )


def _check_fsdp(d: DistributedConfig) -> None:
    default = DistributedConfig()
    without_effect = {
        f"distributed.zero_stage={d.zero_stage}": d.zero_stage != default.zero_stage,
        "distributed.reduce_bucket_elements": d.reduce_bucket_elements != default.reduce_bucket_elements,
        "distributed.overlap_communication": d.overlap_communication,
        "distributed.reduce_precision=bf16 at precision=fp32": (d.precision, d.reduce_precision)
        == ("fp32", "bf16"),
    }
    present = [name for name, there in without_effect.items() if there]
    require(
        not present,
        f"{' and '.join(present)} has no effect with distributed.engine=fsdp, which cuts everything, sends "
        "block by block and always while backward goes on; remove it.",
    )
    untried = [name for name in ("compile", "cuda_graphs") if getattr(d, name)]
    require(
        not untried,
        f"distributed.{' and distributed.'.join(untried)} was not tried with distributed.engine=fsdp; remove "
        "it, or set engine=deepspeed.",
    )
