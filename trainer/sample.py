"""From captions and conditions to pictures. A picture depends on (seed, its index), never on its batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.conditioning.image_size import uncropped
from trainer.config.run import Config
from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.editing import ReplacementInpainting
from trainer.diffusion.guidance import ClassifierFreeGuidance
from trainer.diffusion.parameterization import Prediction
from trainer.diffusion.sampling import sample
from trainer.diffusion.schedule import NoiseSchedule, make_schedule
from trainer.first_stage.base import FirstStage
from trainer.model import DiffusionModel
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
class Request:
    """N pictures to draw."""

    captions: tuple[str, ...]
    """N captions, empty for models without text."""
    conditions: dict[str, Tensor] = field(default_factory=dict)
    """Task fields by name, first axis N (docs/conditioning.md)."""
    pixels: Tensor | None = None
    """[N, 3, H, W] in [-1, 1], for conditions that derive from a picture."""
    size: tuple[int, int] | None = None
    """Height and width of the result in pixels; unset: those of `start`, or of training."""
    start: StartingPicture | None = None
    """A picture to start from instead of pure noise."""


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
    model: DiffusionModel,
    request: Request,
    *,
    seed: int,
    first_index: int = 0,
    batch_size: int = 16,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Pictures uint8 [N, 3, H, W] of a request, on the network's device.

    Args:
        config: `sampling` names sampler, steps, spacing, guidance; the rest describes the model.
        model: its network is put into evaluation mode meanwhile.
        seed: picture i starts from noise keyed by (seed, first_index + i).
        batch_size: pictures at a time.
        progress: called with the number of pictures done.
    """
    network, first_stage = model.network, model.first_stage
    device = next(network.parameters()).device
    captions, pixels, start = request.captions, request.pixels, request.start
    height, width = _size(config, request)
    conditions = dict(request.conditions)
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
        inputs = model.conditioner.frozen.prepare(
            captions[part],
            {name: value[part].to(device) for name, value in conditions.items()},
            None if pixels is None else pixels[part].to(device),
            first_stage=first_stage,
            seed=seed,
            ordinals=ordinals,
        )
        denoiser = _denoiser(config, model, schedule, inputs, len(ordinals))
        known = None if start is None else _encode(start, first_stage, part, device, shape)
        latents = _latents(config, denoiser, seed, ordinals, shape, known)
        decoded = first_stage.decode(latents)
        pictures.append(to_bytes(decoded))
        if progress is not None:
            progress(part.stop)
    network.train(was_training)
    return torch.cat(pictures)


def _size(config: Config, request: Request) -> tuple[int, int]:
    if request.size is not None:
        return request.size
    if request.start is not None:
        return request.start.pixels.shape[2], request.start.pixels.shape[3]
    return config.data.image_size, config.data.image_size


def _denoiser(
    config: Config, model: DiffusionModel, schedule: NoiseSchedule, inputs: dict[str, Tensor], n: int
) -> Denoiser:
    sampling, prediction = config.sampling, config.diffusion.prediction
    network, conditioner = model.network, model.conditioner
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
