"""Gradient parity: a tiny twin through the configured engine against one process in plain fp32."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.config.run import Config
from trainer.distributed import collectives
from trainer.distributed.build import build_engine
from trainer.distributed.engine import Engine
from trainer.distributed.env import DistributedEnv
from trainer.doctor.check import Check

_MICRO_BATCH = 2
_STEPS = 2
# A gradient that skipped a reduction, or was counted twice, is off by tens of percent; rounding of
# bf16 averages out in `bias` and stays below a few percent in `distance`.
_TOLERANCES = {"fp32": (2e-3, 1e-3), "bf16": (5e-2, 1e-2)}


class Twin(nn.Module):
    """Convolution, group norm and a linear layer that is used once or twice in a forward pass.

    Widths are odd on purpose: the parts that ranks own then cut through parameters.
    """

    def __init__(self, uses: int) -> None:
        super().__init__()
        self._uses = uses
        self.conv_in = nn.Conv2d(3, 20, 3, padding=1)
        self.norm = nn.GroupNorm(5, 20)
        self.linear = nn.Linear(20, 20)
        self.conv_out = nn.Conv2d(20, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 3, H, W]."""
        h = nn.functional.silu(self.norm(self.conv_in(x)))
        for _ in range(self._uses):
            # [B, C, H, W] -> [B, H, W, C] and back
            h = h + nn.functional.silu(self.linear(h.movedim(1, -1))).movedim(-1, 1)
        out: Tensor = self.conv_out(h)
        return out


@dataclass(frozen=True)
class Parity:
    """How far the engine's gradient lies from the reference, over all ranks and steps."""

    distance: float
    """L2 norm of the difference over that of the reference; the worst step."""
    bias: float
    """|<gradient, reference> / <reference, reference> - 1|; the worst step."""
    norm_error: float
    """Relative error of the reported global gradient norm; the worst step."""


def check_gradients(config: Config, env: DistributedEnv) -> list[Check]:
    """One row for a plain twin and one for a twin that uses a module twice. Collective."""
    distance, bias = _TOLERANCES[config.distributed.precision]
    d = config.distributed
    name = f"{d.engine}, ZeRO {d.zero_stage}" if d.engine == "deepspeed" else d.engine
    setting = (
        f"{name}, {d.precision}, {env.world_size} ranks, accumulation "
        f"{_twin_accumulation(config, env)}{', compiled' if d.compile else ''}"
    )
    checks = []
    for name, uses in (("gradients", 1), ("gradients, module used twice", 2)):
        parity = gradient_parity(config, env, uses=uses)
        passed = parity.distance < distance and max(parity.bias, parity.norm_error) < bias
        detail = (
            f"off by {parity.distance:.1e}, bias {parity.bias:.1e}, norm {parity.norm_error:.1e} ({setting})"
        )
        remedy = (
            "this combination computes wrong gradients: change distributed.engine, zero_stage, "
            "overlap_communication or compile, or install the versions of constraints.txt."
        )
        checks.append(Check(name, passed, detail, remedy))
    return checks


def gradient_parity(config: Config, env: DistributedEnv, *, uses: int) -> Parity:
    """Compare on two optimizer steps with rate 0, so that stale buffers show. Collective.

    The gradient is read back from AdamW's first moment, m <- beta1 m + (1 - beta1) g, of the fragments
    that each rank owns: it has then gone through everything that a real step goes through.
    """
    accumulation = _twin_accumulation(config, env)
    twin_config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, lanes=0),
        micro_batch_size=_MICRO_BATCH,
        global_batch_size=_MICRO_BATCH * accumulation * env.world_size,
        optimizer=dataclasses.replace(config.optimizer, name="adamw", max_grad_norm=0.0, weight_decay=0.0),
    )
    # The trainer's own generators are keyed by progress; still, leave torch's as they were.
    with torch.random.fork_rng(devices=[env.device] if env.device.type == "cuda" else []):
        torch.manual_seed(0)
        reference, network = Twin(uses), Twin(uses)
        network.load_state_dict(reference.state_dict())
        shape = (_STEPS, twin_config.global_batch_size, 3, 8, 8)
        inputs, targets = torch.randn(shape).to(env.device), torch.randn(shape).to(env.device)
    reference.to(env.device)
    engine = build_engine(network, twin_config, env)
    dtype = torch.bfloat16 if config.distributed.precision == "bf16" else torch.float32
    beta1 = config.optimizer.betas[0]
    before = [torch.zeros_like(fragment.master) for fragment in engine.fragments()]
    worst = Parity(0.0, 0.0, 0.0)
    for step in range(_STEPS):
        gradients = _reference_gradients(reference, inputs[step], targets[step])
        norm = _engine_step(engine, inputs[step], targets[step], env, accumulation, dtype)
        sums = torch.zeros(3, dtype=torch.float64, device=env.device)
        for fragment, old in zip(engine.fragments(), before, strict=True):
            moment = fragment.moments["exp_avg"]
            found = (moment - beta1 * old).double() / (1 - beta1)
            wanted = gradients[fragment.name][fragment.start :][: found.numel()].double()
            sums += torch.stack([(found - wanted).square().sum(), (found * wanted).sum(), wanted @ wanted])
            old.copy_(moment)
        difference, product, square = collectives.reduce_sum(sums).tolist()
        wanted_norm = square**0.5
        worst = Parity(
            max(worst.distance, (difference / square) ** 0.5),
            max(worst.bias, abs(product / square - 1)),
            max(worst.norm_error, abs(norm / wanted_norm - 1)),
        )
    return worst


def _twin_accumulation(config: Config, env: DistributedEnv) -> int:
    # More than a few micro-batches show nothing new, and would take long on many ranks.
    return min(4, config.accumulation(env.world_size))


def _reference_gradients(network: Twin, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Gradients of the mean loss over the global batch, flattened, by parameter name."""
    network.zero_grad()
    nn.functional.mse_loss(network(inputs), targets).backward()
    return {n: p.grad.flatten() for n, p in network.named_parameters() if p.grad is not None}


def _engine_step(
    engine: Engine,
    inputs: Tensor,
    targets: Tensor,
    env: DistributedEnv,
    accumulation: int,
    dtype: torch.dtype,
) -> float:
    """This rank's micro-batches through the engine; returns the global gradient norm."""
    norm = None
    first = env.rank * accumulation
    for micro in range(first, first + accumulation):
        part = slice(micro * _MICRO_BATCH, (micro + 1) * _MICRO_BATCH)
        loss = nn.functional.mse_loss(engine(inputs[part].to(dtype)).float(), targets[part])
        engine.backward(loss)
        norm = engine.step(0.0)
    assert norm is not None, "the engine did not step at the accumulation boundary"
    return float(norm)
