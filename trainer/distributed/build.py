"""From configuration to an engine around a network."""

from __future__ import annotations

from torch import nn

from trainer.config.run import Config, ConfigError
from trainer.distributed.engine import Engine
from trainer.distributed.env import DistributedEnv


def build_engine(module: nn.Module, config: Config, env: DistributedEnv) -> Engine:
    """The engine named by `distributed.engine` around `module`, which it moves to the device.

    Every parameter with requires_grad is trained. Rank 0's initial weights count. The process
    group must be initialised.

    Raises:
        ConfigError: distributed.cuda_graphs without a GPU.
    """
    if config.distributed.cuda_graphs and env.device.type != "cuda":
        raise ConfigError("distributed.cuda_graphs needs a GPU, and this rank has none; leave it out.")
    if config.distributed.engine == "torch":
        from trainer.distributed.torch_engine import TorchEngine

        return TorchEngine(module, config, env)
    if config.distributed.engine == "fsdp":
        from trainer.distributed.fsdp_engine import FSDPEngine

        return FSDPEngine(module, config, env)
    # Importing DeepSpeed takes seconds: only runs that train with it pay for it.
    from trainer.distributed.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(module, config, env)
