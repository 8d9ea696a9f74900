"""The DeepSpeed dictionary, derived from our configuration; needs neither torch nor DeepSpeed."""

from __future__ import annotations

from typing import Any

from trainer.config.run import Config


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given.

    Everything that decides numerics is written out, because DeepSpeed's defaults change between
    releases (gradient_clipping went from 0 to 1.0 in June 2026). The optimizer is not named here:
    the engine passes its own as a client optimizer, and the rate with every step.

    Raises:
        ConfigError: more ranks than the global batch has samples for.
    """
    sharing = config.sharing(world_size)
    distributed = config.distributed
    bf16 = distributed.precision == "bf16"
    stage = distributed.zero_stage
    # DeepSpeed accumulates in the compute precision at stage 0, in fp32 wherever it can.
    accumulation = "bf16" if bf16 and stage == 0 else "fp32"
    sent = accumulation if stage == 0 else distributed.reduce_precision
    return {
        "train_batch_size": sharing.computed,  # padding included; it must be the product
        "train_micro_batch_size_per_gpu": sharing.rows,
        "gradient_accumulation_steps": sharing.micro_batches,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": accumulation},
        "communication_data_type": sent,
        "prescale_gradients": False,
        "zero_optimization": _zero_optimization(config),
        "zero_allow_untested_optimizer": config.optimizer.name != "adamw",  # ours is tested, not known to it
        "wall_clock_breakdown": False,
        # Its meter of throughput would wait for the device before every forward and after every step.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "steps_per_print": None,
    }


def _zero_optimization(config: Config) -> dict[str, Any]:
    distributed = config.distributed
    zero: dict[str, Any] = {
        "stage": distributed.zero_stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": distributed.reduce_bucket_elements,
        "allgather_partitions": True,
        "allgather_bucket_size": distributed.reduce_bucket_elements,
        "overlap_comm": distributed.overlap_communication,
        # Reordered partitions would break the rule that fragments follow parameter order.
        "round_robin_gradients": False,
        # A network whose loss did not reach a parameter still gets its weight decay.
        "ignore_unused_parameters": True,
    }
    if distributed.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": distributed.reduce_bucket_elements,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            # Adafactor steps once over everything, where the others go by parts.
            "sub_group_size": 10**15 if config.optimizer.name == "adafactor" else 1_000_000_000,
        }
    return zero
