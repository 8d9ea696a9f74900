"""Adafactor on one rank: torch's steps, steps that are left out, and nothing that waits on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.numerics.parity_ranks import TorchsAdafactor
from trainer.config.io import load_config
from trainer.config.run import Config, ConfigError
from trainer.config.training import DistributedConfig, OptimizerConfig
from trainer.distributed.adamw import clip_and_step
from trainer.distributed.deepspeed_config import deepspeed_config
from trainer.distributed.env import DistributedEnv
from trainer.distributed.torch_engine import TorchEngine
from trainer.planning.memory import plan
from trainer.telling import layer_norms

RATE = 1e-2


class Network(nn.Module):
    """Kernels, matrices wide and tall, vectors, one row, and what no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.point = nn.Conv2d(6, 5, 1)
        self.norm = nn.GroupNorm(1, 5)
        self.wide = nn.Linear(5, 17)
        self.tall = nn.Linear(17, 4)
        self.row = nn.Linear(4, 1, bias=False)
        self.unreached = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 1]"""
        h = self.norm(self.point(self.conv(x).tanh())).mean(dim=(2, 3))
        made: Tensor = self.row(self.tall(self.wide(h).tanh()).tanh())
        return made


def make_engine(**settings: Any) -> TorchEngine:
    optimizer = OptimizerConfig(name="adafactor", learning_rate=RATE, **{"max_grad_norm": 0.0, **settings})
    distributed = DistributedConfig(engine="torch", precision="fp32")
    config = Config(global_batch_size=2, micro_batch_size=2, optimizer=optimizer, distributed=distributed)
    torch.manual_seed(0)
    return TorchEngine(Network(), config, DistributedEnv.detect({}))


def loss_of(network: Any, step: int, scale: float = 1.0) -> Tensor:
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step))
    loss: Tensor = scale * (network(x) - x.mean()).square().mean()
    return loss


@pytest.mark.parametrize(
    ("ours", "theirs", "scale"),
    [
        ({}, {}, 1.0),
        ({"weight_decay": 0.3, "beta2_decay": -0.5}, {"weight_decay": 0.3, "beta2_decay": -0.5}, 1.0),
        ({"adafactor_eps": (1e-16, 0.3), "update_clip": 1.5}, {"eps": (1e-16, 0.3), "d": 1.5}, 1e-4),
        ({}, {}, 1e-4),  # gradients below the first eps
    ],
)
def test_twenty_steps_are_torchs(ours: dict[str, Any], theirs: dict[str, Any], scale: float) -> None:
    engine = make_engine(**{"weight_decay": 0.0, **ours})
    torch.manual_seed(0)
    network = Network()
    optimizer = TorchsAdafactor(list(network.parameters()), lr=RATE, **theirs)
    for step in range(20):
        engine.backward(loss_of(engine, step, scale))
        engine.step(RATE)
        optimizer.zero_grad()
        loss_of(network, step, scale).backward()
        for parameter in network.unreached.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for (name, expected), actual in zip(network.named_parameters(), engine.module.parameters(), strict=True):
        error = (actual - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, (name, error)  # twenty sums, in another order for each number of threads
    assert engine.optimizer_steps == 20


def test_a_step_that_is_left_out_leaves_everything_as_it_is() -> None:
    """Also where the device alone knows of it, as under ZeRO-1 and fsdp."""
    engine = make_engine()
    optimizer = engine._optimizer
    engine.backward(loss_of(engine, 0))
    engine.step(RATE)
    masters = [parameter.detach() for parameter in engine.module.parameters()]
    before = [value.clone() for value in (*masters, *engine.whole_state.values())]
    for bad in (float("nan"), float("inf")):
        engine.backward(loss_of(engine, 1))
        for parameter in engine.module.parameters():
            parameter.grad = torch.full_like(parameter, bad)
        assert clip_and_step(optimizer, torch.tensor(bad), 1.0)
        optimizer.zero_grad()
    after = [*masters, *engine.whole_state.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert engine.optimizer_steps == 1


def test_nothing_is_read_on_the_host() -> None:
    class Reads(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.found += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
            return func(*args, **(kwargs or {}))

    engine = make_engine()
    loss_of(engine.module, 0).backward()
    for parameter in engine.module.get_submodule("unreached").parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Reads() as reads:
        clip_and_step(engine._optimizer, torch.tensor(3.0), 1.0)
        assert not reads.found
        assert torch.tensor(1.0).item()
        assert reads.found == 1


def test_memory_has_no_moments() -> None:
    """4 bytes a parameter of masters in the place of 12, and a third of a checkpoint without averages."""
    adamw, adafactor = (
        plan(load_config(None, [f"optimizer.name={name}", "ema.decay=0"]), 8, 8)
        for name in ("adamw", "adafactor")
    )
    assert adafactor.optimizer == pytest.approx(4 * adafactor.trained_parameters / 8)
    assert adamw.optimizer == pytest.approx(3 * adafactor.optimizer)
    assert adafactor.checkpoint_bytes < 0.4 * adamw.checkpoint_bytes
    engine = make_engine()
    elements = sum(value.numel() for value in engine.whole_state.values())
    assert (
        elements == (6 + 27) + (5 + 6) + (17 + 5) + (4 + 17) + (1 + 4) + (2 + 2) + 6 + 5 + 2 * 5 + 17 + 4 + 2
    )


def test_layers_have_norms_of_weights_alone() -> None:
    assert set(layer_norms({"network": make_engine()})) == {
        f"layers/{name}/weight" for name in ("conv", "point", "norm", "wide", "tall", "row", "unreached")
    }


def test_settings_of_adafactor_are_refused_elsewhere() -> None:
    for setting in ("beta2_decay=-0.5", "adafactor_eps=[1e-9,1e-3]", "update_clip=2"):
        with pytest.raises(
            ConfigError, match=r"has no effect with optimizer.name=adamw; leave it at .*, or set"
        ):
            load_config(None, [f"optimizer.{setting}"])
        load_config(None, [f"optimizer.{setting}", "optimizer.name=adafactor"])


def test_settings_of_others_are_refused_with_adafactor() -> None:
    for setting in ("betas=[0.5,0.9]", "eps=0.1", "momentum=0.5"):
        with pytest.raises(ConfigError, match=r"has no effect with optimizer.name=adafactor; leave it at"):
            load_config(None, [f"optimizer.{setting}", "optimizer.name=adafactor"])
        load_config(None, [f"optimizer.{setting}", "optimizer.name=muon"])


def test_under_zero_3_a_step_is_one_whatever_the_size() -> None:
    config = load_config(None, ["optimizer.name=adafactor", "distributed.zero_stage=3"])
    assert deepspeed_config(config, 1)["zero_optimization"]["sub_group_size"] > 10**12
