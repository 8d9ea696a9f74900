"""Kernels of convolutions stay channels-last from step to step: no copies, the same losses and state."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.config.models import UNetConfig
from trainer.config.run import Config
from trainer.config.training import DistributedConfig, EMAConfig
from trainer.distributed import adamw
from trainer.distributed.acceleration import is_channels_last
from trainer.distributed.build import build_engine
from trainer.distributed.engine import Engine
from trainer.distributed.env import DistributedEnv
from trainer.ema import EMA
from trainer.models.unet import UNet

SMALL = UNetConfig(
    model_channels=16,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_factors=(2,),
    head_dim=8,
    num_groups=4,
)
KERNELS = 20
"""Of 3 x 3 in this network."""
ACCUMULATION = 2


class Conversions(TorchDispatchMode):
    """Counts copies of kernels that a GPU would make: inside of convolutions, and as operations."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result, name = func(*args, **(kwargs or {})), str(func)
        if name == "aten.convolution.default":
            self.found["forward"] += is_channels_last(args[0]) and not is_channels_last(args[1])
        elif name == "aten.convolution_backward.default":
            self.found["backward"] += is_channels_last(args[1]) and not is_channels_last(args[2])
            # As cuDNN answers where the map is channels-last; what a CPU does is its own affair.
            if result[1] is not None:
                weight = result[1].contiguous(memory_format=torch.channels_last)
                result = (result[0], weight, *result[2:])
        elif name in ("aten.copy_.default", "aten.clone.default"):
            source, target = (args[1], args[0]) if "copy_" in name else (args[0], result)
            self.found["gradients"] += is_kernel(source) and source.stride() != target.stride()
        return result


class Operations(TorchDispatchMode):
    """Counts what is dispatched, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not str(func).startswith(("aten.slice", "aten.detach", "aten.view", "profiler")):
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def is_kernel(x: Tensor) -> bool:
    return tuple(x.shape[2:]) == (3, 3)


READ_BACK = "aten._local_scalar_dense.default"
"""What `.item()`, `float` and `if` of a tensor come to: the host waits for the device."""


def make_engine(env: DistributedEnv, frozen: str = "-", **distributed: Any) -> Engine:
    config = Config(
        global_batch_size=2 * ACCUMULATION,
        micro_batch_size=2,
        distributed=DistributedConfig(precision="bf16", **distributed),
    )
    torch.manual_seed(0)
    unet = UNet(SMALL, in_channels=4, out_channels=4, context_dim=6)
    for parameter in unet.parameters():  # zeroed outputs would hide everything behind them
        torch.nn.init.normal_(parameter, std=0.05)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    return build_engine(unet, config, env)


def micro_batch(engine: Engine, seed: int) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 8, 8, generator=drawn).bfloat16().contiguous(memory_format=torch.channels_last)
    context = torch.randn(2, 3, 6, generator=drawn).bfloat16()
    loss = (engine(x, torch.tensor([seed, 500]), context).float() - x.float()).square().mean()
    engine.backward(loss)
    return loss.detach()


def count(engine: Engine) -> Counter[str]:
    """Of the second micro-batch of a step, to whose gradients those of the first are added."""
    micro_batch(engine, 0)
    engine.step(1e-3)
    with Conversions() as conversions:
        micro_batch(engine, 1)
    engine.step(1e-3)
    return conversions.found


@pytest.mark.parametrize("frozen", ["-", "down_blocks"])
@pytest.mark.parametrize("engine", ["deepspeed", "torch"])
def test_no_kernel_is_converted_in_a_micro_batch(env: DistributedEnv, engine: str, frozen: str) -> None:
    before = count(make_engine(env, frozen, engine=engine, channels_last_kernels=False))
    assert before["forward"] == before["backward"] == KERNELS
    trained = KERNELS if frozen == "-" else KERNELS - 5
    assert before["gradients"] == trained
    kept = make_engine(env, frozen, engine=engine)
    for _ in range(2):  # also after the weights have been renewed
        assert count(kept).total() == 0
    kernels = [p for p in kept.module.parameters() if p.dim() == 4 and is_kernel(p)]
    assert len(kernels) == KERNELS
    assert all(is_channels_last(kernel) for kernel in kernels)


@pytest.mark.parametrize(
    "layout", [{}, {"engine": "torch"}, {"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 3}]
)
def test_losses_masters_and_moments_are_the_same(env: DistributedEnv, layout: dict[str, Any]) -> None:
    """Logical order in what is stored, the same bits in what is computed."""
    seen = []
    for kept in (False, True):
        engine = make_engine(env, channels_last_kernels=kept, **layout)
        losses = []
        for step in range(6):
            losses.append(float(micro_batch(engine, step)))
            engine.step(1e-2)
        state = {
            f.name: [f.master.clone(), *(m.clone() for m in f.moments.values())] for f in engine.fragments()
        }
        with engine.gathered() as module:
            weights = {name: p.detach().clone() for name, p in module.named_parameters()}
        seen.append((losses, state, weights))
    (losses, state, weights), (own_losses, own_state, own_weights) = seen
    assert own_losses == losses
    assert len(set(losses)) > 1
    for name, values in state.items():
        assert all(torch.equal(a, b) for a, b in zip(own_state[name], values, strict=True)), name
        assert torch.equal(own_weights[name], weights[name]), name


def test_a_step_and_the_averages_take_a_few_operations_for_all_parameters(env: DistributedEnv) -> None:
    """A GPU's optimizer is fused, and takes fewer yet."""
    engine = make_engine(env)
    assert len(list(engine.module.parameters())) == 196
    ema = EMA(EMAConfig(), engine.fragments())
    for micro in range(ACCUMULATION):
        micro_batch(engine, micro)
        with Operations() as step:
            engine.step(1e-3)
    assert step.found.total() < 40, step.found
    with Operations() as average:
        ema.update(1)
    assert average.found.total() == 1


@pytest.mark.parametrize(
    ("layout", "reads"),
    [
        ({}, 0),
        ({"engine": "fsdp"}, 0),
        ({"zero_stage": 2}, 3),
        ({"zero_stage": 3}, 1),
        ({"engine": "torch"}, 1),
    ],
)
def test_a_step_reads_no_more_from_the_device_than_its_engine_must(
    env: DistributedEnv, layout: dict[str, Any], reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the optimizer that a GPU has, and which torch has for CPUs as well."""
    build, gpu = adamw.build_adamw, torch.device("cuda")
    monkeypatch.setattr(adamw, "build_adamw", lambda groups, config, _: build(groups, config, gpu))
    engine = make_engine(env, **layout)
    for step in range(2):  # what the first one makes, it makes once
        with Operations() as found:
            for micro in range(ACCUMULATION):
                micro_batch(engine, step + micro)
                engine.step(1e-3)
    assert found.found["aten._fused_adamw_.default"] >= 1
    assert found.found[READ_BACK] == reads


def test_weights_follow_masters_that_were_written(env: DistributedEnv) -> None:
    """As after loading a checkpoint, or while an average is in the place of the weights."""
    engine = make_engine(env)
    for fragment in engine.fragments():
        fragment.master.copy_(torch.arange(fragment.master.numel()) % 251)
    engine.refresh()
    for name, parameter in engine.module.named_parameters():
        want = (torch.arange(parameter.numel()) % 251).view(parameter.shape)
        assert torch.equal(parameter.float(), want.float()), name
