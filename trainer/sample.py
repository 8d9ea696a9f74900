"""From captions and conditions to pictures. A picture depends on (seed, its index), never on its batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.conditioning.build import Conditioner
from trainer.conditioning.image_size import uncropped
from trainer.config.run import Config
from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.editing import ReplacementInpainting
from trainer.diffusion.guidance import ClassifierFreeGuidance
from trainer.diffusion.parameterization import Prediction
from trainer.diffusion.sampling import sample
from trainer.diffusion.schedule import NoiseSchedule, make_schedule
from trainer.first_stage.base import FirstStage
from trainer.pixels import to_bytes
from trainer.rng import Purpose, normal


@dataclass(frozen=True)
class ConditionedDenoiser:
    """A network with its prepared conditions, as samplers want it."""

    network: nn.Module
    schedule: NoiseSchedule
    prediction: Prediction
    inputs: dict[str, Tensor]
    """First axis B, or 2 B under guidance."""
    drop: dict[str, Tensor]
    """bool [B] or [2 B] per condition: which rows take the null form."""

    def __call__(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Prediction, float32, of the shape of x."""
        prediction: Tensor = self.network(x, timesteps, self.inputs, self.drop)
        return prediction.float()


@dataclass(frozen=True)
class StartingPicture:
    """An existing picture: image-to-image (SDEdit), or inpainting with a model that has no mask channels."""

    pixels: Tensor
    """[N, 3, H, W] in [-1, 1]"""
    strength: float = 1.0
    """Share of the steps that it goes through, above 0; 1 leaves almost nothing of it."""
    mask: Tensor | None = None
    """[N, 1, H, W], not zero where the picture is to be made; None: everywhere."""


@dataclass(frozen=True)
class _Start:
    """A StartingPicture as samplers want it, for one part of the batch."""

    latents: Tensor
    """[B, z, h, w]"""
    strength: float
    mask: Tensor | None
    """[B, 1, h, w]"""


@torch.no_grad()
def generate(
    config: Config,
    network: nn.Module,
    conditioner: Conditioner,
    first_stage: FirstStage,
    captions: Sequence[str],
    *,
    seed: int,
    first_index: int = 0,
    conditions: dict[str, Tensor] | None = None,
    pixels: Tensor | None = None,
    size: tuple[int, int] | None = None,
    start: StartingPicture | None = None,
    batch_size: int = 16,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Pictures uint8 [N, 3, H, W] for N captions, on the network's device.

    Args:
        config: `sampling` names sampler, steps, spacing, guidance; the rest describes the model.
        network: called as (x, timesteps, inputs, drop); put into evaluation mode meanwhile.
        seed: picture i starts from noise keyed by (seed, first_index + i).
        conditions: task fields by name, first axis N.
        pixels: [N, 3, H, W] in [-1, 1], for conditions that derive from a picture.
        size: (height, width) in pixels; default: that of `start`, or the training size.
        start: a picture to start from instead of pure noise.
        batch_size: pictures at a time.
        progress: called with the number of pictures done.
    """
    device = next(network.parameters()).device
    if size is None and start is not None:
        size = (start.pixels.shape[2], start.pixels.shape[3])
    height, width = size or (config.data.image_size, config.data.image_size)
    conditions = dict(conditions or {})
    if config.conditioning.image_size is not None:
        conditions.setdefault("size", uncropped(len(captions), height, width))
    factor = config.first_stage.downsampling
    shape = (config.first_stage.channels, height // factor, width // factor)
    schedule = make_schedule(config.diffusion).to(device)
    was_training = network.training
    network.eval()
    pictures = []
    for first in range(0, len(captions), batch_size):
        part = slice(first, min(first + batch_size, len(captions)))
        ordinals = torch.arange(part.start, part.stop, device=device) + first_index
        inputs = conditioner.frozen.prepare(
            captions[part],
            {name: value[part].to(device) for name, value in conditions.items()},
            None if pixels is None else pixels[part].to(device),
            first_stage=first_stage,
            seed=seed,
            ordinals=ordinals,
        )
        denoiser = _denoiser(config, network, conditioner, schedule, inputs, len(ordinals))
        known = None if start is None else _encode(start, first_stage, part, device, shape)
        latents = _latents(config, denoiser, seed, ordinals, shape, known)
        decoded = first_stage.decode(latents)
        pictures.append(to_bytes(decoded))
        if progress is not None:
            progress(part.stop)
    network.train(was_training)
    return torch.cat(pictures)


def _denoiser(
    config: Config,
    network: nn.Module,
    conditioner: Conditioner,
    schedule: NoiseSchedule,
    inputs: dict[str, Tensor],
    n: int,
) -> Denoiser:
    sampling, prediction = config.sampling, config.diffusion.prediction
    device = next(network.parameters()).device
    keep = conditioner.keep_masks(n, device)
    guided = any(condition.guided for condition in conditioner.conditions.values())
    if sampling.guidance_scale == 1.0 or not guided:  # nothing to drop: both branches would be equal
        return ConditionedDenoiser(network, schedule, prediction, inputs, keep)
    null = conditioner.null_masks(n, device)
    both = ConditionedDenoiser(
        network,
        schedule,
        prediction,
        {name: torch.cat([value, value]) for name, value in inputs.items()},
        {name: torch.cat([keep[name], null[name]]) for name in keep},
    )
    return ClassifierFreeGuidance(both, sampling.guidance_scale, sampling.guidance_rescale)


def _encode(
    start: StartingPicture,
    first_stage: FirstStage,
    part: slice,
    device: torch.device,
    shape: tuple[int, int, int],
) -> _Start:
    latents = first_stage.latents(start.pixels[part].to(device), None)
    mask = None
    if start.mask is not None:
        # A cell with one unknown pixel is unknown, or what is hidden would shine through at the edge.
        mask = F.adaptive_max_pool2d((start.mask[part] != 0).float().to(device), shape[1:])
    return _Start(latents, start.strength, mask)


def _latents(
    config: Config,
    denoiser: Denoiser,
    seed: int,
    ordinals: Tensor,
    shape: tuple[int, int, int],
    known: _Start | None,
) -> Tensor:
    sampling = config.sampling
    start_noise = normal(seed, ordinals, Purpose.INITIAL, shape)
    latents, strength = None, 1.0
    if known is not None:
        if known.mask is not None:
            denoiser = ReplacementInpainting(denoiser, known.latents, known.mask, start_noise)
        if known.mask is None or known.strength < 1.0:  # a whole hole starts from noise alone
            latents, strength = known.latents, known.strength
    return sample(
        sampling.sampler,
        denoiser,
        start_noise,
        num_steps=sampling.steps,
        spacing=sampling.spacing,
        eta=sampling.eta,
        noise=lambda index: normal(seed, ordinals, Purpose.SAMPLER + index, shape),
        latents=latents,
        strength=strength,
    )
