"""DeepSpeed and FSDP behind the engine protocol, on one rank: corners that parity does not visit."""

from __future__ import annotations

import math
import subprocess
from typing import Any, Literal

import deepspeed
import pytest
import torch
from torch import Tensor, nn

from tests.integration.whole_parameters import whole_weights
from trainer.config.run import Config
from trainer.config.training import DistributedConfig, OptimizerConfig
from trainer.distributed import adamw
from trainer.distributed.build import build_engine
from trainer.distributed.engine import Engine
from trainer.distributed.env import DistributedEnv
from trainer.first_stage.networks import ResidualBlock

ENGINES = [*(("deepspeed", stage) for stage in (0, 1, 2, 3)), ("fsdp", 1)]
LAYOUTS = [(*engine, precision) for engine in ENGINES for precision in ("fp32", "bf16")]


def make_engine(
    env: DistributedEnv,
    engine: str,
    stage: int,
    precision: str,
    accumulation: int = 1,
    optimizer: Literal["adamw", "adafactor"] = "adamw",
) -> Engine:
    config = Config(
        global_batch_size=2 * accumulation,
        micro_batch_size=2,
        optimizer=OptimizerConfig(max_grad_norm=1.0, name=optimizer),
        distributed=DistributedConfig(engine=engine, zero_stage=stage, precision=precision),  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    return build_engine(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), config, env)


def forward(engine: Engine) -> Tensor:
    output: Tensor = engine(torch.ones(2, 3, dtype=engine.compute_dtype))
    return output.float()


def masters(engine: Engine) -> list[Tensor]:
    return [fragment.master.clone() for fragment in engine.fragments()]


def state(engine: Engine) -> list[Tensor]:
    """Masters, and what the optimizer keeps beside them."""
    moments = [moment.clone() for fragment in engine.fragments() for moment in fragment.moments.values()]
    return [*masters(engine), *moments, *(value.clone() for value in engine.whole_state.values())]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize(("name", "stage", "precision"), LAYOUTS)
def test_corners(
    env: DistributedEnv, name: str, stage: int, precision: str, optimizer: Literal["adamw", "adafactor"]
) -> None:
    engine = make_engine(env, name, stage, precision, optimizer=optimizer)
    starts_from_fp32_weights(engine)
    skips_bad_gradients(engine)
    survives_extra_gradients(engine)
    refreshes(engine)
    counts_steps(engine)


def starts_from_fp32_weights(engine: Engine) -> None:
    """bf16 rounds the compute weights, not the masters."""
    torch.manual_seed(0)
    assert torch.equal(engine.fragments()[0].master, nn.Linear(3, 4).weight.detach().flatten())


def skips_bad_gradients(engine: Engine) -> None:
    """Nothing is updated, the norm says so, and the next step is as if nothing had been."""
    before = state(engine)
    engine.backward(forward(engine).mean() * float("nan"))
    norm = engine.step(0.1)
    assert norm is not None
    assert not torch.isfinite(norm)
    assert engine.optimizer_steps == 0
    assert all(torch.equal(a, b) for a, b in zip(before, state(engine), strict=True))
    engine.backward(forward(engine).square().mean())
    norm = engine.step(0.1)
    assert norm is not None
    assert torch.isfinite(norm)
    assert engine.optimizer_steps == 1
    assert not any(torch.equal(a, b) for a, b in zip(before, state(engine), strict=True))


def survives_extra_gradients(engine: Engine) -> None:
    """torch.autograd.grad before backward (adaptive weights) changes neither gradient nor bookkeeping."""
    norms = []
    for extra in (False, True):
        output = forward(engine)
        loss = output.square().mean()
        if extra:
            gradient = torch.autograd.grad(loss, engine.module[2].weight, retain_graph=True)[0]
            assert gradient.shape == (2, 4)
        engine.backward(loss)
        norm = engine.step(0.0)  # no update: both see the same weights
        assert norm is not None
        norms.append(float(norm))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def refreshes(engine: Engine) -> None:
    """The compute weights follow the masters, also small ones that ZeRO-3 keeps whole."""
    held = masters(engine)
    for fragment in engine.fragments():
        fragment.master.zero_()
    engine.refresh()
    with torch.no_grad(), engine.gathered() as module:
        assert all((parameter == 0).all() for parameter in module.parameters())
        assert (module(torch.ones(2, 3, dtype=engine.compute_dtype)) == 0).all()
    for fragment, value in zip(engine.fragments(), held, strict=True):
        fragment.master.copy_(value)
    engine.refresh(moments=True)
    full = whole_weights(engine)
    assert {name: tuple(value.shape) for name, value in full.items()} == engine.parameter_shapes
    with torch.no_grad():
        assert (forward(engine) != 0).any()


def counts_steps(engine: Engine) -> None:
    """Set and read; the next step counts on from there."""
    engine.optimizer_steps = 7
    engine.backward(forward(engine).square().mean())
    engine.step(0.1)
    assert engine.optimizer_steps == 8


@pytest.mark.parametrize("name", ["deepspeed", "fsdp"])
def test_two_engines_take_turns(env: DistributedEnv, name: str) -> None:
    first, second = make_engine(env, name, 1, "fp32"), make_engine(env, name, 1, "fp32", accumulation=2)
    for _ in range(2):
        first.backward(forward(first).square().mean())
        assert first.step(0.1) is not None
        second.backward(forward(second).square().mean())
        assert second.step(0.1) is None
        second.backward(forward(second).square().mean())
        assert second.step(0.1) is not None
    # The same data twice, averaged, is the data once.
    for a, b in zip(masters(first), masters(second), strict=True):
        assert torch.allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("name", ["deepspeed", "fsdp"])
def test_the_step_on_the_device_is_the_step_on_the_host(
    env: DistributedEnv, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Clipped steps, one with a NaN, one after it: the same weights and norms with and without a fused AdamW.

    GPUs have one by default, which clips and skips by itself; it exists on CPUs, too.
    """
    results = []
    for on_device in (False, True):
        with monkeypatch.context() as patch:
            make = adamw.build_adamw

            def fused(*args: Any, make: Any = make) -> torch.optim.AdamW:
                optimizer: torch.optim.AdamW = make(*args)
                group = optimizer.param_groups[0]
                options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
                return torch.optim.AdamW(group["params"], **options, fused=True)

            if on_device:
                patch.setattr(adamw, "build_adamw", fused)
            engine = make_engine(env, name, 1, "bf16", accumulation=2)
        assert engine._optimizer.defaults["fused"] == (on_device or None)  # type: ignore[attr-defined]
        norms = []
        for scale in (1.0, 100.0, float("nan"), 1.0):
            for _ in range(2):
                engine.backward(scale * forward(engine).square().mean())
                norm = engine.step(0.05)
            assert norm is not None
            norms.append(float(norm))
        assert engine.optimizer_steps == 3
        results.append((norms, masters(engine)))
    (plain_norms, plain), (norms, fused_masters) = results
    assert not math.isfinite(plain_norms[2])
    assert not math.isfinite(norms[2])
    assert [norms[i] for i in (0, 1, 3)] == pytest.approx([plain_norms[i] for i in (0, 1, 3)], rel=1e-6)
    for a, b in zip(plain, fused_masters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_loss_goes_through_an_engine_by_its_inputs(env: DistributedEnv) -> None:
    """As a generator's through the discriminator: that one's weights and gradients are left alone."""
    engine = make_engine(env, "fsdp", 1, "fp32", accumulation=2)
    before = masters(engine)
    leaf = torch.ones(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(engine.module(leaf).sum(), leaf)
    assert gradient.any()
    norms = []
    for through in (False, True):
        for _ in range(2):
            if through:
                torch.autograd.grad(engine.module(leaf).sum(), leaf)
            engine.backward(forward(engine).square().mean())
            norm = engine.step(0.0)
        assert norm is not None
        norms.append(float(norm))
    assert norms[0] == norms[1]
    assert all(torch.equal(a, b) for a, b in zip(before, masters(engine), strict=True))


def test_training_goes_on_after_a_preview_that_broke(env: DistributedEnv) -> None:
    """In the middle of a forward, as for want of memory; an unbroken engine makes the same steps."""
    results = []
    for breaks in (False, True):
        engine = make_engine(env, "fsdp", 1, "fp32")
        if breaks:
            handle = engine.module[1].register_forward_hook(lambda *_: 1 / 0)  # type: ignore[index]
            with pytest.raises(ZeroDivisionError), engine.gathered() as module, torch.no_grad():
                module(torch.ones(2, 3))
            handle.remove()
            # Otherwise a GPU's next gather would not wait for the update of what it gathers.
            assert engine.module._get_fsdp_state()._state_ctx.iter_forward_root is None  # type: ignore
        for _ in range(2):
            engine.backward(forward(engine).square().mean())
            engine.step(0.1)
        results.append(masters(engine))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_part_of_the_network_may_run_before_the_network(env: DistributedEnv) -> None:
    """Validation of a first stage calls its encoder alone; training goes on with the whole afterwards."""
    config = Config(
        global_batch_size=2,
        micro_batch_size=2,
        distributed=DistributedConfig(engine="fsdp", precision="bf16"),
    )
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 1), ResidualBlock(8, 8, groups=4))
    engine = build_engine(network, config, env)
    x = torch.ones(1, 8, 4, 4, dtype=torch.bfloat16)
    with engine.gathered() as module, torch.no_grad():
        alone = module[1](x)  # type: ignore[index]
    assert alone.dtype == torch.bfloat16
    engine.backward(engine(torch.ones(2, 3, 4, 4, dtype=torch.bfloat16)).float().square().mean())
    assert float(engine.step(0.1)) > 0  # type: ignore[arg-type]
    with engine.gathered() as module, torch.no_grad():
        assert not torch.equal(alone, module[1](x))  # type: ignore[index]


def test_no_compiler_is_called_to_make_one(env: DistributedEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's first look at its table of operations compiles a test program on every rank."""
    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
    started: list[Any] = []

    def refuse(_: object, words: Any, *args: Any, **named: Any) -> None:
        started.append(words)
        raise OSError("no processes here")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    make_engine(env, "deepspeed", 1, "bf16")
    assert started == []
