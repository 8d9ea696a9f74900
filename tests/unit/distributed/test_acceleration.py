"""Compiled regions: the same results, a form per width and no more; graphs: the same losses, bit for bit."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from trainer.config.checks import check
from trainer.config.io import load_config
from trainer.config.models import UNetConfig
from trainer.config.run import Config, ConfigError
from trainer.config.training import DistributedConfig
from trainer.distributed.acceleration import GraphedForward, compile_regions
from trainer.distributed.build import build_engine
from trainer.distributed.engine import Engine
from trainer.distributed.env import DistributedEnv
from trainer.distributed.torch_engine import TorchEngine
from trainer.models.layers import ResBlock
from trainer.models.unet import UNet

SMALL = UNetConfig(
    model_channels=16,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_factors=(1, 2),
    head_dim=8,
    num_groups=4,
)


def one_level() -> UNet:
    return small_unet(replace(SMALL, channel_multipliers=(1,), attention_factors=(1,)))


def small_unet(config: UNetConfig = SMALL) -> UNet:
    torch.manual_seed(0)
    unet = UNet(config, in_channels=4, out_channels=4, context_dim=6)
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
def test_compiled_regions_compute_the_same() -> None:
    """By torch's compiler, in a network of few forms, since its C++ takes its time for each."""
    torch._dynamo.reset()
    plain, compiled = one_level(), one_level()
    assert compile_regions(compiled) == 9  # 5 residual blocks and 4 transformers
    counters = torch._dynamo.utils.counters
    counters.clear()
    args = inputs(2, 4)
    torch.testing.assert_close(gradients(compiled, args), gradients(plain, args), rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 3  # residual blocks 16->16, 32->16, and the transformer
    assert not counters["graph_break"]


def test_regions_are_compiled_once_per_form() -> None:
    plain, compiled = small_unet(), small_unet()
    torch._dynamo.reset()
    assert compile_regions(compiled) == 15  # 8 residual blocks and 7 transformers
    counter = CompileCounterWithBackend("aot_eager")
    compiled_by(counter, compiled)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for args in (inputs(2, 8), inputs(2, 8), inputs(2, 4), inputs(2, 8), inputs(2, 4)):
        torch.testing.assert_close(gradients(compiled, args), gradients(plain, args), rtol=1e-4, atol=1e-6)
    # Residual blocks: 16->16, 16->32, 32->32, and on the way up 64->32, 48->32, 48->16, 32->16; transformers
    # of 16 and 32 channels. Each at the two sizes that came, which the second round found compiled.
    assert counters["stats"]["unique_graphs"] == counter.frame_count == 2 * (7 + 2)
    assert not counters["graph_break"]


def compiled_by(backend: CompileCounterWithBackend, network: nn.Module) -> None:
    """Compile the regions again, by a backend that counts and runs what it is given as it is."""
    for block in network.modules():
        if block._compiled_call_impl is not None:
            block.compile(dynamic=False, backend=backend)


def test_regions_beyond_torchs_limit_are_compiled_all_the_same() -> None:
    """Eight forms of a piece of code is torch's limit; SD2's buckets make 70, and again without gradients."""
    torch._dynamo.reset()
    block = ResBlock(2, 2, 2, groups=1)
    assert compile_regions(block) == 1
    counter = CompileCounterWithBackend("eager")
    compiled_by(counter, block)
    with torch.no_grad():
        for width in range(1, 71):
            block(torch.zeros(1, 2, 1, width), torch.zeros(1, 2))
    assert counter.frame_count == 70


def test_an_engine_compiles_once_per_shape_over_accumulation_buckets_and_resume(env: DistributedEnv) -> None:
    """Whatever is compiled again has another shape, and a run that goes on compiles nothing it had."""
    torch._dynamo.reset()
    torch._dynamo.utils.clear_compilation_metrics()
    counter = CompileCounterWithBackend("eager")
    run = compiled_run(env, counter)
    shapes = [(8, 4), (4, 8), (8, 4), (4, 8)]
    counts = []
    for size in shapes:
        take_step(run, size)
        counts.append(counter.frame_count)
    assert counts == [9, 18, 18, 18]

    resumed = compiled_run(env, counter)
    for mine, stored in zip(resumed.fragments(), run.fragments(), strict=True):
        mine.master.copy_(stored.master)
        for name, moment in mine.moments.items():
            moment.copy_(stored.moments[name])
    resumed.refresh(moments=True)
    resumed.optimizer_steps = run.optimizer_steps
    assert [take_step(resumed, size) for size in shapes] == [take_step(run, size) for size in shapes]
    assert counter.frame_count == 18

    reasons = [m.recompile_reason for m in torch._dynamo.utils.get_compilation_metrics()]
    again = [reason for reason in reasons if reason]
    assert len(again) == 18 - 2, "but for the first form of each kind"
    assert all("tensor 'x' size mismatch" in reason for reason in again), again


def compiled_run(env: DistributedEnv, counter: CompileCounterWithBackend) -> Engine:
    distributed = DistributedConfig(precision="bf16", compile=True)
    config = Config(global_batch_size=4, micro_batch_size=2, distributed=distributed)
    engine = build_engine(small_unet(), config, env)
    compiled_by(counter, engine.module)
    return engine


def take_step(engine: Engine, size: tuple[int, int]) -> list[float]:
    """Losses of a step of two micro-batches of one bucket."""
    losses = []
    for micro in range(2):
        drawn = torch.Generator().manual_seed(micro)
        x = torch.randn(2, 4, *size, generator=drawn).bfloat16().contiguous(memory_format=torch.channels_last)
        context = torch.randn(2, 3, 6, generator=drawn).bfloat16()
        loss = engine(x, torch.tensor([micro, 500]), context).float().square().mean()
        engine.backward(loss)
        engine.step(1e-3)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("distributed.precision=fp32", "precision=fp32"),
        ("distributed.zero_stage=0", "zero_stage=0"),
        ("distributed.zero_stage=3", "zero_stage=3"),
        ("unet.dropout=0.1", "unet.dropout"),
        ("conditioning.layout.dropout=0.1", "layout.dropout"),
        ("unet.activation_checkpointing=true", "activation_checkpointing"),
    ],
)
def test_graphs_refuse_what_they_cannot_carry(setting: str, named: str) -> None:
    with pytest.raises(ConfigError, match=r"distributed\.cuda_graphs .*" + named):
        check(load_config(None, ["distributed.cuda_graphs=true", setting]))


def test_graphs_are_refused_without_a_gpu(env: DistributedEnv) -> None:
    config = Config(distributed=DistributedConfig(cuda_graphs=True))
    with pytest.raises(ConfigError, match="cuda_graphs needs a GPU"):
        build_engine(nn.Linear(1, 1), config, env)


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
