"""What averaging costs: ours beside the master weights against diffusers' EMAModel, on one UNet.

    python benchmarks/ema.py                     # the demo's UNet on the CPU, under a minute
    python benchmarks/ema.py --config configs/sd/sd2_base_256.yaml --batch 8     # on a GPU

Same parameters, same process, arms take turns; the first turn is thrown away. The share of a step is that of
forward, backward and AdamW of the same UNet at the given batch, measured in the same run. On N ranks ours
costs 1/N of what is printed, EMAModel the whole on every rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import diffusers
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from trainer.config.io import load_config
from trainer.config.models import UNetConfig
from trainer.config.run import Config
from trainer.config.training import DistributedConfig, EMAConfig
from trainer.distributed.env import DistributedEnv, initialise, shutdown
from trainer.distributed.torch_engine import TorchEngine
from trainer.ema import EMA
from trainer.models.unet import UNet

SMALL = UNetConfig(model_channels=64, channel_multipliers=(1, 2, 2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="configuration whose UNet is used; unset: a small one")
    parser.add_argument("--batch", type=int, default=16, help="micro-batch of the step it is compared with")
    parser.add_argument("--size", type=int, default=32, help="latent height and width")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    env = initialise(DistributedEnv.detect(), timeout_s=600.0)
    shape = load_config(args.config).unet if args.config else SMALL
    config = Config(
        global_batch_size=1,
        micro_batch_size=1,
        distributed=DistributedConfig(
            engine="torch", precision="bf16" if env.device.type == "cuda" else "fp32"
        ),
    )
    unet = UNet(shape, in_channels=4, out_channels=4, context_dim=1024, vector_dim=None, num_classes=None)
    engine = TorchEngine(unet, config, env)
    arms = build_arms(engine)
    x = torch.randn(args.batch, 4, args.size, args.size, device=env.device, dtype=engine.compute_dtype)
    context = torch.randn(args.batch, 77, 1024, device=env.device, dtype=engine.compute_dtype)

    def step() -> None:
        timesteps = torch.zeros(args.batch, dtype=torch.int64, device=env.device)
        engine.backward(engine(x, timesteps, context=context).float().square().mean())
        engine.step(1e-4)

    times: dict[str, list[float]] = {name: [] for name in (*arms, "step")}
    for turn in range(args.turns + 1):
        for name, update in arms.items():
            times[name].append(timed(update, env.device))
        if turn < 4:
            times["step"].append(timed(step, env.device))
    report({name: values[1:] for name, values in times.items()}, engine, as_json=args.json)
    shutdown()


def build_arms(engine: TorchEngine) -> dict[str, Callable[[], object]]:
    """Our average of one profile and of three, and EMAModel with its foreach off and on."""
    fragments = engine.fragments()
    # EMAModel averages what requires a gradient; these share our master weights' memory.
    parameters = [nn.Parameter(fragment.master.view(fragment.shape)) for fragment in fragments]
    one = EMA(EMAConfig(decay=0.9999, warmup=False), fragments)
    three = EMA(EMAConfig(decay=0.9999, warmup=False, power_stds=(0.05, 0.1)), fragments)
    models = [EMAModel(parameters, decay=0.9999, foreach=foreach) for foreach in (False, True)]
    return {
        "ours": lambda: one.update(1000),
        "ours, 3 profiles": lambda: three.update(1000),
        "EMAModel": lambda: models[0].step(parameters),
        "EMAModel foreach": lambda: models[1].step(parameters),
    }


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def report(times: dict[str, list[float]], engine: TorchEngine, *, as_json: bool) -> None:
    """Medians, spread and share of a step."""
    step_s = statistics.median(times["step"])
    count = sum(fragment.master.numel() for fragment in engine.fragments())
    if as_json:
        print(json.dumps({"parameters": count, "device": str(engine.device), "seconds": times}))
        return
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    print(f"{versions}, {engine.device}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{count / 1e6:.1f} M parameters; forward, backward and AdamW take {step_s * 1e3:.1f} ms")
    for name, values in times.items():
        if name != "step":
            middle = statistics.median(values)
            spread = f"{min(values) * 1e3:.2f}-{max(values) * 1e3:.2f}"
            print(f"{name:18} {middle * 1e3:8.2f} ms  ({spread})  {middle / step_s:7.2%} of a step")


if __name__ == "__main__":
    main()
