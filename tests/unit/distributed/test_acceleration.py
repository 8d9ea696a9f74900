"""Compiled regions: the same results, a form per width and no more; graphs: the same losses, bit for bit."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from trainer.config.checks import check
from trainer.config.io import load_config
from trainer.config.models import UNetConfig
from trainer.config.run import Config, ConfigError
from trainer.config.training import DistributedConfig
from trainer.distributed.acceleration import GraphedForward, compile_regions
from trainer.distributed.env import DistributedEnv
from trainer.distributed.torch_engine import TorchEngine
from trainer.models.unet import UNet

SMALL = UNetConfig(
    model_channels=16,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_factors=(1, 2),
    head_dim=8,
    num_groups=4,
)


def small_unet() -> UNet:
    torch.manual_seed(0)
    unet = UNet(SMALL, in_channels=4, out_channels=4, context_dim=6)
    for parameter in unet.parameters():  # zeroed outputs would hide everything behind them
        torch.nn.init.normal_(parameter, std=0.1)
    return unet


def inputs(batch: int, size: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(batch + size)
    x = torch.randn(batch, 4, size, size, generator=generator).to(device)
    context = torch.randn(batch, 3, 6, generator=generator).to(device)
    return x, torch.arange(batch, device=device) * 10, context


def gradients(unet: UNet, args: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    loss = unet(*args).square().mean()
    return [loss, *torch.autograd.grad(loss, list(unet.parameters()))]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_regions_compute_the_same_and_are_compiled_once_per_form() -> None:
    plain, compiled = small_unet(), small_unet()
    torch._dynamo.reset()
    assert compile_regions(compiled) == 15  # 8 residual blocks and 7 transformers
    counters = torch._dynamo.utils.counters
    counters.clear()
    for args in (inputs(2, 8), inputs(2, 8), inputs(2, 4), inputs(2, 8), inputs(2, 4)):
        torch.testing.assert_close(gradients(compiled, args), gradients(plain, args), rtol=1e-4, atol=1e-6)
    # Residual blocks: 16->16, 16->32, 32->32, and on the way up 64->32, 48->32, 48->16, 32->16; transformers
    # of 16 and 32 channels. Each at the two sizes that came, which the second round found compiled.
    assert counters["stats"]["unique_graphs"] == 2 * (7 + 2)
    assert not counters["graph_break"]


def test_regions_beyond_torchs_default_are_compiled_all_the_same() -> None:
    """Eight variants per piece of code is torch's limit; a UNet with buckets has more."""
    torch._dynamo.reset()
    unet = small_unet()
    compile_regions(unet)
    counter = CompileCounterWithBackend("eager")
    for block in unet.modules():
        if block._compiled_call_impl is not None:
            block.compile(dynamic=False, backend=counter)
    with torch.no_grad():
        for size in (4, 6, 8, 10, 12):
            unet(*inputs(1, size))
    assert counter.frame_count == 5 * (7 + 2)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("distributed.precision=fp32", "precision=fp32"),
        ("distributed.zero_stage=3", "zero_stage=3"),
        ("unet.dropout=0.1", "unet.dropout"),
        ("unet.activation_checkpointing=true", "activation_checkpointing"),
    ],
)
def test_graphs_refuse_what_they_cannot_carry(setting: str, named: str) -> None:
    with pytest.raises(ConfigError, match=r"distributed\.cuda_graphs .*" + named):
        check(load_config(None, ["distributed.cuda_graphs=true", setting]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_change_no_bit_of_losses_and_weights() -> None:
    results = []
    for graphs in (False, True):
        config = Config(
            global_batch_size=4,
            micro_batch_size=2,
            distributed=DistributedConfig(engine="torch", precision="bf16", cuda_graphs=graphs),
        )
        engine = TorchEngine(small_unet(), config, DistributedEnv.detect({}))
        assert isinstance(engine._forward, GraphedForward) == graphs
        losses = []
        for step in range(6):
            args = inputs(2, (8, 4)[step // 2 % 2], "cuda")
            loss = engine(*args).float().square().mean()
            engine.backward(loss)
            engine.step(1e-3)
            losses.append(loss.detach().clone())
        results.append([*losses, *(p.detach().clone() for p in engine.module.parameters())])
    for plain, graphed in zip(*results, strict=True):
        assert torch.equal(plain, graphed)
