"""The same networks and inputs in stock diffusers: eager, compiled, its encoder, its sampling loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from gpu_sections.networks import latent_shape, training_step
from gpu_sections.recipe import Setup, meta_conditioner, network_inputs, random_first_stage, random_network
from gpu_sections.timing import forget, in_turns, measure, profile_kinds
from trainer.config.run import Config
from trainer.diffusion.denoiser import ClassifierFreeGuidance
from trainer.diffusion.samplers import sample
from trainer.diffusion.schedule import make_schedule
from trainer.distributed.acceleration import GraphedForward, GraphedNetwork
from trainer.distributed.process import configure_process
from trainer.first_stage.base import FirstStage
from trainer.interop.diffusers_stage import first_stage_to_diffusers, scheduler_to_diffusers
from trainer.interop.diffusers_unet import unet_to_diffusers
from trainer.interop.first_stage_names import first_stage_links
from trainer.interop.links import export_tensors
from trainer.interop.unet_names import UNetSizes, unet_links
from trainer.model import ConditionedUNet
from trainer.sample import ConditionedDenoiser

GUIDANCE_SCALE = 7.5
SAMPLER_STEPS = 25


class StockUNet(nn.Module):
    """diffusers' UNet behind the arguments that ours takes."""

    def __init__(self, unet: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.unet = unet
        self._dtype = dtype

    def forward(
        self, noisy: Tensor, timesteps: Tensor, inputs: dict[str, Tensor], drop: dict[str, Tensor]
    ) -> Tensor:
        """Prediction [B, C, H, W]."""
        context, null = inputs["openclip.context"], inputs["openclip.null_context"]
        context = torch.where(drop["openclip"][:, None, None], null, context)
        prediction: Tensor = self.unet(noisy.to(self._dtype), timesteps, encoder_hidden_states=context).sample
        return prediction


def stock_unet(network: ConditionedUNet, config: Config, setup: Setup) -> StockUNet:
    """UNet2DConditionModel with our network's weights."""
    channels = config.first_stage.channels
    sizes = UNetSizes(channels, channels, meta_conditioner(config).context_dim)
    described = unet_to_diffusers(config.unet, sizes, latent_shape(config)[1])
    own = {name: value.contiguous() for name, value in network.unet.state_dict().items()}
    tensors = export_tensors(unet_links(config.unet, own, "diffusers"), own)
    return StockUNet(_stock("UNet2DConditionModel", described, tensors, setup), setup.dtype).train()


def stock_first_stage(first_stage: FirstStage, config: Config, setup: Setup) -> nn.Module:
    """AutoencoderKL with our first stage's weights."""
    scale = first_stage.latent_scale.tolist()
    groups = config.first_stage.num_groups or min(32, config.first_stage.base_channels // 4)
    described = first_stage_to_diffusers(
        config.first_stage, [0.0] * len(scale), scale, config.data.image_size, groups
    )
    own = first_stage.state_dict()
    tensors = export_tensors(first_stage_links(config.first_stage, own, "diffusers"), own)
    return _stock("AutoencoderKL", described, tensors, setup).requires_grad_(False).eval()


def _stock(name: str, described: dict[str, Any], tensors: dict[str, Tensor], setup: Setup) -> nn.Module:
    with torch.device("meta"):
        module: nn.Module = getattr(diffusers, name)(
            **{key: value for key, value in described.items() if not key.startswith("_")}
        )
    module.to_empty(device=setup.device).to(setup.dtype)
    module.load_state_dict({key: value.to(setup.device) for key, value in tensors.items()})
    return module


def eager(setup: Setup) -> None:
    """Training step at batch 16 and 32 of ours, eager and (at 16) by CUDA graphs, and of stock diffusers, in
    turns, and its kernels."""
    config = setup.config()
    configure_process(config.distributed)
    ours = random_network(config, setup.device, setup.dtype).train()
    theirs = stock_unet(ours, config, setup)
    for size in (16, 32):
        forget()
        batch = setup.batch(size)
        inputs = network_inputs(config, batch, setup.device, setup.dtype)
        if size == 16:
            with torch.no_grad():
                mine, stock = ours(**inputs).float(), theirs(**inputs).float()
            setup.report(difference=float((mine - stock).norm() / stock.norm()))
        arms = {"ours": training_step(ours, inputs), "diffusers": training_step(theirs, inputs)}
        if size == 16 and setup.device.type == "cuda":
            arms["graphs"] = training_step(ours, inputs, GraphedForward(ours))
        setup.report(
            **{f"batch_{size}": _rates(in_turns(arms, setup.device, repeats=setup.repeats // 2), batch)}
        )
        for network in (ours, theirs):
            network.zero_grad(set_to_none=True)
    inputs = network_inputs(config, setup.batch(16), setup.device, setup.dtype)
    setup.report(kernels=profile_kinds(training_step(theirs, inputs), setup.device))


def compiled(setup: Setup) -> None:
    """diffusers as its users tune it: channels-last, its repeated blocks or all of it under torch.compile."""
    config = setup.config()
    configure_process(config.distributed)
    ours = random_network(config, setup.device, setup.dtype).train()
    theirs = stock_unet(ours, config, setup).to(memory_format=torch.channels_last)
    batch = setup.batch(16)
    inputs = network_inputs(config, batch, setup.device, setup.dtype)
    arms = {"ours": training_step(ours, inputs), "channels_last": training_step(theirs, inputs)}
    setup.report(**_rates(in_turns(arms, setup.device, repeats=setup.repeats // 2), batch))
    backend = "eager" if setup.small else "inductor"
    torch._dynamo.config.recompile_limit = 64  # their four widths and two kinds of attention, fixed shapes
    regional = stock_unet(ours, config, setup).to(memory_format=torch.channels_last)
    regional.unet.compile_repeated_blocks(backend=backend, dynamic=False)  # type: ignore[operator]
    _add(setup, "regional", regional, inputs, batch)
    theirs.unet.compile(backend=backend, dynamic=False)
    _add(setup, "whole", theirs, inputs, batch)


def _add(setup: Setup, name: str, network: nn.Module, inputs: dict[str, Any], batch: int) -> None:
    times = measure(training_step(network, inputs), setup.device, repeats=setup.repeats)
    setup.report(**_rates({name: times}, batch))
    network.zero_grad(set_to_none=True)


def _rates(times: dict[str, dict[str, float]], batch: int) -> dict[str, dict[str, float]]:
    return {name: {**t, "images_per_s": 1e3 * batch / t["ms"]} for name, t in times.items()}


def encoder(setup: Setup) -> None:
    """The first stage's encoder of ours and of stock diffusers, in turns, at batch 16."""
    config = setup.config()
    configure_process(config.distributed)
    ours = random_first_stage(config, setup.device, setup.dtype)
    theirs = stock_first_stage(ours, config, setup)
    batch, edge = setup.batch(16), config.data.image_size
    pixels = torch.rand(batch, 3, edge, edge, device=setup.device) * 2 - 1
    noise = torch.randn(batch, *latent_shape(config), device=setup.device)

    @torch.no_grad()
    def mine() -> None:
        ours.latents(pixels, noise)

    @torch.no_grad()
    def stock() -> None:
        theirs.encode(pixels.to(setup.dtype)).latent_dist.sample()  # type: ignore[operator]

    setup.report(**_rates(in_turns({"ours": mine, "diffusers": stock}, setup.device, repeats=4), batch))


def sampling(setup: Setup) -> None:
    """Latents of 8 pictures by DPM-Solver++ with guidance: our sampler and network, the same with its network
    replayed as a CUDA graph (`ldm sample --cuda-graphs`), and diffusers' own."""
    config = setup.config()
    configure_process(config.distributed)
    ours = random_network(config, setup.device, setup.dtype).eval()
    theirs = stock_unet(ours, config, setup).eval()
    batch = setup.batch(8)
    steps = 4 if setup.small else SAMPLER_STEPS
    inputs = network_inputs(config, 2 * batch, setup.device, setup.dtype)
    start = inputs["noisy"][:batch]
    unconditional = {"openclip": torch.arange(2 * batch, device=setup.device) >= batch}
    schedule = make_schedule(config.diffusion).to(setup.device)
    conditions = (schedule, config.diffusion.prediction, inputs["inputs"], unconditional)
    described = scheduler_to_diffusers(config.diffusion)
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        {k: v for k, v in described.items() if not k.startswith("_")}, algorithm_type="dpmsolver++"
    )

    def mine(network: nn.Module) -> Callable[[], object]:
        guided = ClassifierFreeGuidance(ConditionedDenoiser(network, *conditions), GUIDANCE_SCALE)
        return lambda: sample("dpmpp_2m", guided, start, num_steps=steps)

    @torch.no_grad()
    def stock() -> None:
        scheduler.set_timesteps(steps, device=setup.device)
        x = start
        for timestep in scheduler.timesteps:
            both = theirs(torch.cat([x, x]), timestep.expand(2 * batch), inputs["inputs"], unconditional)
            conditional, null = both.float().chunk(2)
            x = scheduler.step(null + GUIDANCE_SCALE * (conditional - null), timestep, x).prev_sample

    arms = {"ours": mine(ours), "diffusers": stock}
    if setup.device.type == "cuda":
        arms["graphs"] = mine(GraphedNetwork(ours.requires_grad_(False)))
    setup.report(**_rates(in_turns(arms, setup.device, repeats=1), batch))
