"""What the ranks of the gradient parity test run: a few steps under many engines, everything gathered."""

from __future__ import annotations

import dataclasses
import gc
from collections import OrderedDict
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.order.lanes import Part, lanes_of
from tests.integration.whole_parameters import gather_full, whole_weights
from trainer.config.models import UNetConfig
from trainer.config.run import Config
from trainer.config.training import DistributedConfig, LoRAConfig, OptimizerConfig
from trainer.distributed.build import build_engine
from trainer.distributed.engine import Engine
from trainer.distributed.env import DistributedEnv
from trainer.distributed.fsdp_engine import FSDPEngine
from trainer.distributed.lora import add_adapters
from trainer.models.unet import UNet
from trainer.stages.stage import share_of_mean

GLOBAL_BATCH = 16
STEPS = 3
LEARNING_RATE = 1e-2
OPTIMIZER = OptimizerConfig(learning_rate=LEARNING_RATE, weight_decay=0.1, max_grad_norm=0.3)


class TwiceUsed(nn.Module):
    """Convolution, normalisation, a block that runs twice in a step, and a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 1))
        self.frozen = nn.Conv2d(8, 8, 1).requires_grad_(False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] -> {"logits": [B, 5]}"""
        h = self.norm(self.conv_in(x))
        h = h + self.block(h)
        h = h + self.block(self.frozen(h))
        return {"logits": self.head(h.mean(dim=(2, 3)))}


def make_network() -> TwiceUsed:
    """The same initial weights everywhere."""
    torch.manual_seed(7)
    return TwiceUsed()


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    """([16, 3, 6, 6], [16, 5]) of one step."""
    generator = torch.Generator().manual_seed(100 + step)
    return (
        torch.randn(GLOBAL_BATCH, 3, 6, 6, generator=generator),
        torch.randn(GLOBAL_BATCH, 5, generator=generator),
    )


def losses_of(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """[B], large enough for the gradient clip to bite."""
    return ((outputs["logits"].float() - targets) ** 2).sum(dim=1)


class TorchsMuon:
    """torch's own Muon for the hidden matrices, its AdamW for the rest."""

    def __init__(self, network: nn.Module) -> None:
        settings = {"lr": LEARNING_RATE, "weight_decay": 0.1}
        self._matrices = [
            network.block[0].weight,  # type: ignore[index]
            network.block[2].weight,  # type: ignore[index]
            network.head.weight,
        ]
        # It takes two dimensions only: the same memory, seen as [out, in x kernel].
        self._flat = [nn.Parameter(p.detach().view(len(p), -1)) for p in self._matrices]  # type: ignore
        rest = [
            p for p in network.parameters() if p.requires_grad and all(p is not m for m in self._matrices)
        ]
        self._muon = torch.optim.Muon(self._flat, adjust_lr_fn="match_rms_adamw", momentum=0.95, **settings)
        self._adamw = torch.optim.AdamW(rest, foreach=False, **settings)

    def zero_grad(self) -> None:
        for parameter in (*self._matrices, *self._flat):
            parameter.grad = None  # type: ignore[union-attr]
        self._adamw.zero_grad()

    def step(self) -> None:
        for parameter, flat in zip(self._matrices, self._flat, strict=True):
            flat.grad = parameter.grad.view(flat.shape)  # type: ignore[union-attr, operator]
        self._muon.step()
        self._adamw.step()


class TorchsAdafactor:
    """torch's own, given the kernels of convolutions as [out, in x kernel]."""

    def __init__(self, parameters: list[nn.Parameter], **settings: Any) -> None:
        self._parameters = parameters
        # The same memory.
        self._flat = [
            nn.Parameter(p.detach().view(len(p), -1) if p.dim() > 1 else p.detach()) for p in parameters
        ]
        self._adafactor = torch.optim.Adafactor(self._flat, **settings)

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def step(self) -> None:
        for parameter, flat in zip(self._parameters, self._flat, strict=True):
            assert parameter.grad is not None
            flat.grad = parameter.grad.view(flat.shape)
        self._adafactor.step()


def reference(optimizer_name: str = "adamw") -> dict[str, Any]:
    """One process, fp32, no engine: the truth."""
    network = make_network()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.1, foreach=False)
    if optimizer_name == "muon":
        optimizer = TorchsMuon(network)
    if optimizer_name == "adafactor":
        optimizer = TorchsAdafactor(trained, lr=LEARNING_RATE, weight_decay=0.1)
    norms, first_moment = [], {}
    for step in range(STEPS):
        x, targets = global_batch(step)
        optimizer.zero_grad()
        losses_of(network(x), targets).mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(trained, OPTIMIZER.max_grad_norm)))
        if step == 0:
            first_moment = {n: 0.1 * p.grad for n, p in network.named_parameters() if p.grad is not None}
        optimizer.step()
    weights = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    return {"norms": norms, "first_moment": _lists(first_moment), "weights": _lists(weights)}


def run_cases(env: DistributedEnv, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same steps under each engine; what rank 0 gathered (other ranks: only their norms)."""
    return [run_case(env, **case) for case in cases]


def run_case(
    env: DistributedEnv,
    *,
    engine: str,
    zero_stage: int,
    accumulation: int,
    precision: str,
    compile: bool,
    optimizer: str = "adamw",
    overlap: bool = False,
    reduce_precision: str = "fp32",
    shard_ranks: int = 0,
) -> dict[str, Any]:
    """One engine around a new network."""
    micro_batch = -(-GLOBAL_BATCH // (env.world_size * accumulation))
    config = Config(
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=micro_batch,
        optimizer=dataclasses.replace(OPTIMIZER, name=optimizer),  # type: ignore[arg-type]
        distributed=DistributedConfig(
            engine=engine,
            zero_stage=zero_stage,
            precision=precision,
            compile=compile,
            overlap_communication=overlap,
            reduce_precision=reduce_precision,
            shard_ranks=shard_ranks,
            reduce_bucket_elements=500,  # several buckets even here
        ),
    )
    sharing = config.sharing(env.world_size)
    own = lanes_of(Part(env.rank, env.world_size), GLOBAL_BATCH, GLOBAL_BATCH)
    built = build_engine(make_network(), config, env)
    if isinstance(built, FSDPEngine) and built._replicas > 1:
        waits = [group._get_backend(env.device).options._timeout for group in built._mesh.get_all_groups()]
        assert waits == [timedelta(seconds=config.distributed.timeout_s)] * 2
    norms, first_moment = [], {}
    for step in range(STEPS):
        x, targets = global_batch(step)
        for micro in range(accumulation):
            first = micro * sharing.rows
            part = [own[row] for row in range(first, min(first + sharing.rows, len(own)))]
            padding = sharing.rows - len(part)
            part += [own[0]] * padding
            losses = losses_of(built(x[part].to(built.compute_dtype)), targets[part])
            built.backward(share_of_mean(losses, padding, sharing.gain))
            norm = built.step(LEARNING_RATE)
            assert (norm is None) == (micro + 1 < accumulation)
        norms.append(float(norm))
        if step == 0 and built.moments:
            first_moment = _gather_moment(built)
    assert built.optimizer_steps == STEPS
    return {"norms": norms, "first_moment": first_moment, "weights": _lists(whole_weights(built))}


def _tiny_unet(activation_checkpointing: bool = False) -> UNet:
    """The same on every rank."""
    torch.manual_seed(0)
    sizes = UNetConfig(
        model_channels=16,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_factors=(1, 2),
        head_dim=8,
        num_groups=4,
        activation_checkpointing=activation_checkpointing,
    )
    unet = UNet(sizes, in_channels=4, out_channels=4, context_dim=8)
    for parameter in unet.parameters():  # zeroed outputs would hide everything behind them
        nn.init.normal_(parameter, std=0.05)
    return unet


def train_unet(env: DistributedEnv, engine: str, activation_checkpointing: bool) -> list[float]:
    """Losses and norms of three steps of a UNet, whose blocks FSDP sends one by one."""
    unet = _tiny_unet(activation_checkpointing)
    config = Config(
        global_batch_size=4 * env.world_size,
        micro_batch_size=2,
        distributed=DistributedConfig(engine=engine, precision="fp32"),
    )
    built = build_engine(unet, config, env)
    found = []
    for step in range(STEPS):
        for micro in range(2):
            drawn = torch.Generator().manual_seed(100 * step + 10 * micro + env.rank)
            x, context = (torch.randn(shape, generator=drawn) for shape in ((2, 4, 8, 8), (2, 3, 8)))
            loss = (built(x, torch.tensor([step, 500]), context) - x).square().mean()
            built.backward(loss)
            norm = built.step(1e-3)
            found.append(float(loss.detach()))
        assert norm is not None
        found.append(float(norm))
    return found


def train_adapters(env: DistributedEnv, cases: list[tuple[str, int, str]]) -> list[list[float]]:
    """Losses and norms of three steps of adapters under each engine, ZeRO stage and precision."""
    return [_train_adapters(env, *case) for case in cases]


def _train_adapters(env: DistributedEnv, engine: str, zero_stage: int, precision: str) -> list[float]:
    network = nn.Module()
    network.unet = _tiny_unet()
    add_adapters(network, LoRAConfig(rank=3, alpha=6.0))
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:  # zero hides A
            nn.init.normal_(parameter, std=0.1)
    config = Config(
        global_batch_size=8,
        micro_batch_size=8 // (2 * env.world_size),
        distributed=DistributedConfig(engine=engine, zero_stage=zero_stage, precision=precision),
    )
    network.forward = network.unet.forward
    built = build_engine(network, config, env)
    assert all(".lora_" in name for name in built.parameter_shapes)
    rows = config.micro_batch_size
    found = []
    for step in range(STEPS):
        drawn = torch.Generator().manual_seed(step)
        x, context = (torch.randn(shape, generator=drawn) for shape in ((8, 4, 8, 8), (8, 3, 8)))
        total = torch.zeros(())
        for micro in range(2):
            first = (2 * env.rank + micro) * rows
            own = x[first : first + rows].to(built.compute_dtype)
            told = context[first : first + rows].to(built.compute_dtype)
            loss = (built(own, torch.full((rows,), 500), told).float() - own).square().mean()
            built.backward(loss)
            norm = built.step(1e-2)
            total += loss.detach() / (2 * env.world_size)
        assert norm is not None
        if env.world_size > 1:
            torch.distributed.all_reduce(total)
        found += [float(total), float(norm)]
    return found


def close_engines(env: DistributedEnv, cases: list[tuple[str, int, str]]) -> list[list[int]]:
    """Bytes of tensors that are left after each of three engines, one after another, of each case."""
    return [[_bytes_left(env, *case) for _ in range(3)] for case in cases]


def _bytes_left(env: DistributedEnv, engine: str, zero_stage: int, precision: str) -> int:
    config = Config(
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=GLOBAL_BATCH,
        distributed=DistributedConfig(engine=engine, zero_stage=zero_stage, precision=precision),  # type: ignore[arg-type]
    )
    network = nn.Sequential(nn.Linear(3, 500), nn.SiLU(), nn.Linear(500, 500), nn.Linear(500, 5))
    built = build_engine(network, config, env)
    built.backward(built(torch.randn(GLOBAL_BATCH, 3).to(built.compute_dtype)).float().square().mean())
    built.step(LEARNING_RATE)
    built.close()
    del built, network
    gc.collect()
    storages = [each.untyped_storage() for each in gc.get_objects() if isinstance(each, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


CONDITIONER_RATE = 1e-3


def two_rates_network() -> nn.Sequential:
    """A network with a conditioner between other parameters, by the names of a run's."""
    torch.manual_seed(5)
    parts = {"unet": nn.Linear(5, 7), "conditions": nn.Linear(7, 6), "uncertainty": nn.Linear(6, 3)}
    return nn.Sequential(OrderedDict(parts))


def train_two_rates(env: DistributedEnv, cases: list[tuple[str, int, str]]) -> list[dict[str, list[float]]]:
    """Weights after three steps under each engine, ZeRO stage and precision."""
    found = []
    for engine, stage, precision in cases:
        config = Config(
            global_batch_size=4,
            micro_batch_size=4 // env.world_size,
            optimizer=dataclasses.replace(OPTIMIZER, conditioner_learning_rate=CONDITIONER_RATE),
            distributed=DistributedConfig(
                engine=engine,  # type: ignore[arg-type]
                zero_stage=stage,  # type: ignore[arg-type]
                precision=precision,  # type: ignore[arg-type]
                reduce_bucket_elements=20,
            ),
        )
        built = build_engine(two_rates_network(), config, env)
        rows = config.micro_batch_size
        for step in range(STEPS):
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
            own = x[env.rank * rows : (env.rank + 1) * rows].to(built.compute_dtype)
            built.backward(built(own).float().square().sum(1).mean())
            built.step(LEARNING_RATE)
        found.append(_lists(whole_weights(built)))
    return found


def _gather_moment(engine: Engine) -> dict[str, list[float]]:
    moments = [dataclasses.replace(f, master=f.moments["exp_avg"]) for f in engine.fragments()]
    return _lists(dict(gather_full(engine.parameter_shapes, moments, engine.device)))


def _lists(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: value.flatten().tolist() for name, value in tensors.items()}
