"""Cost of counter-based random numbers: beside torch.randn, and as a share of a training step.

    python benchmarks/rng.py configs/demo_text_to_image.yaml
    python benchmarks/rng.py configs/sd/sd2_base_256.yaml --device cuda --compile

The step is forward and backward of the configuration's UNet on one micro-batch: no first stage, no text
tower, no optimizer, so the share printed is above that in a real run. The draws are all that one
micro-batch needs: timesteps, noise, posterior sample, one prompt drop.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from trainer.config.io import load_config
from trainer.config.run import Config
from trainer.models.unet import UNet
from trainer.rng import Purpose, normal, uniform


def seconds(work: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    """Median wall time of each piece of work, the pieces taking turns (A B A B) so that drift hits all."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for index in range(rounds + 2):  # two rounds of warm-up
        for name, run in work.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            if index >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def training_pass(config: Config, device: str, shape: tuple[int, ...]) -> Callable[[], object]:
    """Forward and backward of the UNet on one micro-batch of random inputs."""
    openclip = config.conditioning.openclip
    context_dim = (openclip.width or 1024) if openclip else None
    bf16 = config.distributed.precision == "bf16" and device == "cuda"
    dtype = torch.bfloat16 if bf16 else torch.float32
    channels = config.first_stage.channels
    unet = UNet(
        config.unet,
        in_channels=channels,
        out_channels=channels,
        context_dim=context_dim,
        vector_dim=None,
        num_classes=None,
    ).to(device, dtype)
    batch = config.micro_batch_size
    x = torch.randn(batch, *shape, device=device, dtype=dtype)
    timesteps = torch.randint(config.diffusion.num_timesteps, (batch,), device=device)
    context = None
    if context_dim is not None:
        context = torch.randn(batch, 77, context_dim, device=device, dtype=dtype)

    def run() -> None:
        unet.zero_grad(set_to_none=True)
        unet(x, timesteps, context=context).float().square().mean().backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", help="YAML of a diffusion run")
    parser.add_argument("overrides", nargs="*", help="a.b=c")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="torch.compile the draws")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    device, batch = arguments.device, config.micro_batch_size
    side = config.data.image_size // config.first_stage.downsampling
    shape = (config.first_stage.channels, side, side)
    ordinals = torch.arange(batch, device=device) + 2**33
    gaussian, flat = normal, uniform
    if arguments.compile:
        gaussian, flat = torch.compile(normal), torch.compile(uniform)

    def draws() -> None:
        flat(0, ordinals, Purpose.TIMESTEP, ())
        flat(0, ordinals, Purpose.DROP, ())
        gaussian(0, ordinals, Purpose.POSTERIOR, shape)
        gaussian(0, ordinals, Purpose.NOISE, shape)

    result = seconds(
        {
            "draws of one micro-batch": draws,
            "one normal": lambda: gaussian(0, ordinals, Purpose.NOISE, shape),
            "torch.randn of that shape": lambda: torch.randn(batch, *shape, device=device),
            "UNet forward and backward": training_pass(config, device, shape),
        },
        device,
        arguments.rounds,
    )
    print(f"{device}, micro-batch {batch} of {shape}, {torch.get_num_threads()} threads")
    for name, value in result.items():
        print(f"{name:28s} {value * 1e3:10.3f} ms")
    share = result["draws of one micro-batch"] / result["UNet forward and backward"]
    print(f"draws / (forward + backward) {share:10.2%}")


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
