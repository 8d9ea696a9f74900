"""One training step (forward and backward) and sampling: our UNet against diffusers' UNet2DConditionModel.

    python benchmarks/step.py                          # reduced SD2 on the CPU, under two minutes
    python benchmarks/step.py --full --size 64         # the real SD2 UNet at 512 px, for a GPU
    python benchmarks/step.py --full --size 32 --batch 128 --compile

Same structure, same weights (carried over by our own export), same inputs, same process; the arms take
turns (ABAB) and the first turns are thrown away. Two numbers are printed per arm: wall-clock seconds, and
on a CPU processor seconds, which other programs on the machine disturb less. On a GPU all arms run under
bf16 autocast; the first arm of each library is its stock eager form. Memory is the peak that CUDA saw or,
on a CPU, the bytes that one forward pass keeps for backward. The optimizer is the same and left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from trainer.config.models import UNetConfig
from trainer.config.training import DiffusionConfig
from trainer.diffusion.denoiser import ClassifierFreeGuidance
from trainer.diffusion.parameterization import Prediction
from trainer.diffusion.samplers import sample
from trainer.diffusion.schedule import NoiseSchedule, make_schedule
from trainer.interop.diffusers_stage import scheduler_to_diffusers
from trainer.interop.diffusers_unet import unet_to_diffusers
from trainer.interop.links import export_tensors
from trainer.interop.unet_names import UNetSizes, unet_links

WARM_UP = 1
GUIDANCE_SCALE = 7.5


@dataclass
class Arm:
    """One thing that is timed."""

    name: str
    run: Callable[[], object]
    wall_s: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Inputs:
    """What both networks get."""

    x: Tensor
    timesteps: Tensor
    context: Tensor
    target: Tensor


def main() -> None:
    """Measure, print, and write JSON where asked."""
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    config = UNetConfig() if args.full else UNetConfig(model_channels=args.width, head_dim=32)
    sizes = UNetSizes(4, 4, 1024 if args.full else 256)
    ours, theirs = build(config, sizes, args)
    inputs = make_inputs(sizes, args)
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, {device_name(args.device)}")
    millions = sum(p.numel() for p in ours.parameters()) / 1e6
    print(f"{millions:.1f} M parameters, batch {args.batch}, latents {args.size} x {args.size}\n")
    networks: list[tuple[str, Callable[[Inputs], Tensor], nn.Module]] = [
        ("diffusers", lambda i: theirs(i.x, i.timesteps, encoder_hidden_states=i.context).sample, theirs),
        ("ours", lambda i: ours(i.x, i.timesteps, i.context), ours),
    ]
    if args.compile:
        their_graph, our_graph = torch.compile(theirs), torch.compile(ours)
        networks += [
            (
                "diffusers compiled",
                lambda i: their_graph(i.x, i.timesteps, encoder_hidden_states=i.context).sample,
                theirs,
            ),
            ("ours compiled", lambda i: our_graph(i.x, i.timesteps, i.context), ours),
        ]
    steps = [Arm(name, training_step(forward, network, inputs, args)) for name, forward, network in networks]
    take_turns(steps, args)
    memory = {name: memory_of(forward, network, inputs, args) for name, forward, network in networks}
    result = {"step": summarise(steps, memory, args.batch, "training step")}
    if args.sampler_steps:
        samplers = sampling_arms(networks, inputs, args)
        take_turns(samplers, args)
        result["sampling"] = summarise(samplers, {}, args.batch, f"sampling, DDIM {args.sampler_steps} steps")
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump({"arguments": vars(args), **result}, file, indent=2)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--full", action="store_true", help="the real SD2 UNet (866 M parameters)")
    parser.add_argument("--width", type=int, default=64, help="channels of the first level when reduced")
    parser.add_argument("--size", type=int, default=16, help="edge of the latents (512 px: 64)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=8, help="measured turns per arm")
    parser.add_argument("--sampler-steps", type=int, default=4, help="0: no sampling")
    parser.add_argument("--compile", action="store_true", help="also both networks under torch.compile")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--out", help="JSON file")
    return parser.parse_args()


def build(config: UNetConfig, sizes: UNetSizes, args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Ours and theirs with the same random weights."""
    torch.manual_seed(0)
    ours = sizes.build(config).to_empty(device=args.device)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    described = unet_to_diffusers(config, sizes, args.size)
    with torch.device(args.device):
        theirs = diffusers.UNet2DConditionModel(**{k: v for k, v in described.items() if k != "_class_name"})
    theirs.load_state_dict(
        export_tensors(unet_links(config, ours.state_dict(), "diffusers"), ours.state_dict())
    )
    if args.device != "cpu":
        ours.to(memory_format=torch.channels_last)
    return ours.train(), theirs.train()


def make_inputs(sizes: UNetSizes, args: argparse.Namespace) -> Inputs:
    torch.manual_seed(1)
    shape = (args.batch, 4, args.size, args.size)
    made = Inputs(
        x=torch.randn(shape),
        timesteps=torch.randint(0, 1000, (args.batch,)),
        context=torch.randn(args.batch, 77, sizes.context_dim or 0),
        target=torch.randn(shape),
    )
    return Inputs(*(value.to(args.device) for value in vars(made).values()))


def precision(args: argparse.Namespace) -> AbstractContextManager[Any]:
    return nullcontext() if args.device == "cpu" else torch.autocast("cuda", torch.bfloat16)


def training_step(
    forward: Callable[[Inputs], Tensor], network: nn.Module, inputs: Inputs, args: argparse.Namespace
) -> Callable[[], object]:
    def run() -> None:
        network.zero_grad(set_to_none=True)
        with precision(args):
            prediction = forward(inputs)
        torch.nn.functional.mse_loss(prediction.float(), inputs.target).backward()

    return run


def sampling_arms(
    networks: list[tuple[str, Callable[[Inputs], Tensor], nn.Module]],
    inputs: Inputs,
    args: argparse.Namespace,
) -> list[Arm]:
    """DDIM with classifier-free guidance: our sampler for our network, their scheduler for theirs."""
    config = DiffusionConfig()
    schedule = make_schedule(config).to(args.device)
    both = torch.cat([inputs.context, torch.zeros_like(inputs.context)])

    def batched(forward: Callable[[Inputs], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, timesteps: forward(Inputs(x, timesteps, both, x)).float()

    def with_ours(forward: Callable[[Inputs], Tensor]) -> Callable[[], object]:
        denoiser = ClassifierFreeGuidance(PlainDenoiser(schedule, "eps", batched(forward)), GUIDANCE_SCALE)
        return lambda: sample("ddim", denoiser, inputs.x, num_steps=args.sampler_steps)

    def with_theirs(forward: Callable[[Inputs], Tensor]) -> Callable[[], object]:
        settings = {k: v for k, v in scheduler_to_diffusers(config).items() if k != "_class_name"}
        scheduler = diffusers.DDIMScheduler(**settings)
        evaluate = batched(forward)

        def run() -> Tensor:
            scheduler.set_timesteps(args.sampler_steps, device=args.device)
            x = inputs.x
            for timestep in scheduler.timesteps:
                output = evaluate(torch.cat([x, x]), timestep.expand(2 * args.batch))
                conditional, unconditional = output.chunk(2)
                guided = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
                x = scheduler.step(guided, timestep, x).prev_sample
            return x

        return run

    def without_gradient(run: Callable[[], object]) -> Callable[[], object]:
        def quiet() -> None:
            with torch.no_grad(), precision(args):
                run()

        return quiet

    return [
        Arm(name, without_gradient(with_ours(forward) if "ours" in name else with_theirs(forward)))
        for name, forward, _ in networks
    ]


@dataclass(frozen=True)
class PlainDenoiser:
    """A function with the schedule that samplers ask for."""

    schedule: NoiseSchedule
    prediction: Prediction
    function: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.function(x, timesteps)


def take_turns(arms: list[Arm], args: argparse.Namespace) -> None:
    """A, B, A, B ...: whatever slows the machine down meets all arms alike."""
    for turn in range(WARM_UP + args.repeats):
        for arm in arms:
            wall, processor = time.perf_counter(), time.process_time()
            arm.run()
            if args.device != "cpu":
                torch.cuda.synchronize()
            if turn >= WARM_UP:
                arm.wall_s.append(time.perf_counter() - wall)
                arm.processor_s.append(time.process_time() - processor)


def memory_of(
    forward: Callable[[Inputs], Tensor], network: nn.Module, inputs: Inputs, args: argparse.Namespace
) -> float:
    """MiB: CUDA's peak of one step, or what the forward pass keeps for backward besides the weights."""
    if args.device != "cpu":
        network.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        training_step(forward, network, inputs, args)()
        return float(torch.cuda.max_memory_allocated()) / 2**20
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prediction = forward(inputs)
    total = sum(kept.values())
    del prediction
    return total / 2**20


def summarise(arms: list[Arm], memory: dict[str, float], batch: int, title: str) -> dict[str, Any]:
    """Print a table, and give it as a dictionary. Ratios above 1 mean faster than stock diffusers."""
    print(f"{title:34} wall s (quartiles)         ratio  processor ratio  images/s   MiB")
    base = arms[0]
    rows: dict[str, Any] = {}
    for arm in arms:
        low, middle, high = statistics.quantiles(arm.wall_s, n=4)
        ratio = statistics.median(b / a for a, b in zip(arm.wall_s, base.wall_s, strict=True))
        processor = statistics.median(b / a for a, b in zip(arm.processor_s, base.processor_s, strict=True))
        print(
            f"  {arm.name:32} {middle:8.4f} ({low:.4f} - {high:.4f})  {ratio:6.3f}  {processor:15.3f}  "
            f"{batch / middle:8.2f}  {memory.get(arm.name, float('nan')):7.1f}"
        )
        rows[arm.name] = {
            "wall_s": arm.wall_s,
            "processor_s": arm.processor_s,
            "ratio": ratio,
            "processor_ratio": processor,
            "memory_mib": memory.get(arm.name),
        }
    print()
    return rows


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device != "cpu" else f"CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
