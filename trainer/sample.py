"""From captions and conditions to pictures: each a function of (seed, its index, what is asked, settings).

    request       N pictures: captions, conditions, what to start from; all with a first axis of N
    draw          one batch of them at any indices, on one device
    draw_all      a request batch by batch, as its pictures get ready
    generate      a request at once

Nothing is drawn from a generator with a state and nothing is shared within a batch, so any rank may draw any
of the pictures, in any batch, and again. (Batches of another size may round differently in the last bit.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.conditioning.build import TEXT
from trainer.conditioning.image_size import uncropped
from trainer.config.run import Config
from trainer.diffusion.denoiser import ClassifierFreeGuidance, Denoiser
from trainer.diffusion.editing import ReplacementInpainting
from trainer.diffusion.parameterization import Prediction
from trainer.diffusion.processes import Process, at_size, make_process
from trainer.diffusion.samplers import sample
from trainer.first_stage.base import FirstStage
from trainer.model import DiffusionModel
from trainer.pixels import to_bytes
from trainer.rng import Purpose, normal


@dataclass(frozen=True)
class ConditionedDenoiser:
    """A network with its prepared conditions, as samplers want it."""

    network: nn.Module
    schedule: Process
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

    def part(self, rows: slice) -> StartingPicture:
        """The start of some of the pictures."""
        mask = None if self.mask is None else self.mask[rows]
        return replace(self, pixels=self.pixels[rows], mask=mask)


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
    negative: tuple[str, ...] = ()
    """N captions of what guidance leads away from, instead of the null form of text; "" is the null form.
    Empty: the null form for all."""
    text_chunks: int = 1
    """Parts of a caption, each as long as a frozen text tower reads at a time, that the network is told."""

    def __len__(self) -> int:
        return len(self.captions)

    def part(self, rows: slice) -> Request:
        """Some of the pictures."""
        return replace(
            self,
            captions=self.captions[rows],
            conditions={name: value[rows] for name, value in self.conditions.items()},
            pixels=None if self.pixels is None else self.pixels[rows],
            start=None if self.start is None else self.start.part(rows),
            negative=self.negative[rows],
        )


@dataclass(frozen=True)
class _Start:
    """A StartingPicture as samplers want it."""

    latents: Tensor
    """[B, z, h, w]"""
    strength: float
    mask: Tensor | None
    """[B, 1, h, w]"""


def generate(
    config: Config,
    model: DiffusionModel,
    request: Request,
    *,
    seed: int,
    first_index: int = 0,
    batch_size: int = 16,
) -> Tensor:
    """Pictures uint8 [N, 3, H, W] of a request, on the network's device; see `draw_all`."""
    made = draw_all(config, model, request, seed=seed, first_index=first_index, batch_size=batch_size)
    return torch.cat([pictures for _, pictures in made])


def draw_all(
    config: Config,
    model: DiffusionModel,
    request: Request,
    *,
    seed: int,
    first_index: int = 0,
    batch_size: int = 16,
) -> Iterator[tuple[int, Tensor]]:
    """(row of the first, uint8 [B, 3, H, W]) of every batch of a request, in order, on the network's device.

    Args:
        config: `sampling` names sampler, steps, spacing, guidance; the rest describes the model.
        model: its network is in evaluation mode meanwhile.
        seed: the i-th picture starts from noise keyed by (seed, first_index + i).
        batch_size: pictures at a time.
    """
    device = next(model.network.parameters()).device
    with evaluating(model.network):
        for first in range(0, len(request), batch_size):
            part = request.part(slice(first, first + batch_size))
            indices = torch.arange(first, first + len(part), device=device) + first_index
            yield first, draw(config, model, part, indices, seed=seed)


@torch.no_grad()
def draw(config: Config, model: DiffusionModel, request: Request, indices: Tensor, *, seed: int) -> Tensor:
    """Pictures uint8 [B, 3, H, W] of a request of B, with int64 indices [B] on the network's device.

    The network must be in evaluation mode.
    """
    device = indices.device
    height, width = _size(config, request)
    factor = config.first_stage.downsampling
    shape = (config.first_stage.channels, height // factor, width // factor)
    conditions = dict(request.conditions)
    if config.conditioning.image_size is not None:
        conditions.setdefault("size", uncropped(len(request), height, width))

    def prepare(captions: tuple[str, ...]) -> dict[str, Tensor]:
        return model.conditioner.frozen.prepare(
            captions,
            {name: value.to(device) for name, value in conditions.items()},
            None if request.pixels is None else request.pixels.to(device),
            first_stage=model.first_stage,
            seed=seed,
            ordinals=indices,
            text_chunks=request.text_chunks,
        )

    inputs = away = prepare(request.captions)
    null = model.conditioner.null_masks(len(request), device)
    if any(request.negative):
        away = prepare(request.negative)
        empty = torch.tensor([not text for text in request.negative], device=device)
        null = {name: mask & empty if name in TEXT else mask for name, mask in null.items()}
    process = make_process(at_size(config.diffusion, height, width)).to(device)
    denoiser = _denoiser(config, model, process, inputs, away, null)
    known = None if request.start is None else _encode(request.start, model.first_stage, device, shape)
    latents = _latents(config, denoiser, seed, indices, shape, known)
    return to_bytes(model.first_stage.decode(latents))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Inside, the network is in evaluation mode."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def _size(config: Config, request: Request) -> tuple[int, int]:
    if request.size is not None:
        return request.size
    if request.start is not None:
        return request.start.pixels.shape[2], request.start.pixels.shape[3]
    return config.data.image_size, config.data.image_size


def _denoiser(
    config: Config,
    model: DiffusionModel,
    process: Process,
    inputs: dict[str, Tensor],
    away: dict[str, Tensor],
    null: dict[str, Tensor],
) -> Denoiser:
    """The network told of `inputs`, led away from `away` with the conditions of `null` [B] in null form."""
    sampling, prediction = config.sampling, config.diffusion.prediction
    network, conditioner = model.network, model.conditioner
    device = next(network.parameters()).device
    n = len(next(iter(null.values()))) if null else 0
    keep = conditioner.keep_masks(n, device)
    guided = any(condition.guided for condition in conditioner.conditions.values())
    if sampling.guidance_scale == 1.0 or not guided:  # nothing to drop: both branches would be equal
        return ConditionedDenoiser(network, process, prediction, inputs, keep)
    both = ConditionedDenoiser(
        network,
        process,
        prediction,
        {name: torch.cat([value, away[name]]) for name, value in inputs.items()},
        {name: torch.cat([keep[name], null[name]]) for name in keep},
    )
    return ClassifierFreeGuidance(both, sampling.guidance_scale, sampling.guidance_rescale)


def _encode(
    start: StartingPicture, first_stage: FirstStage, device: torch.device, shape: tuple[int, int, int]
) -> _Start:
    latents = first_stage.latents(start.pixels.to(device), None)
    mask = None
    if start.mask is not None:
        # A cell with one unknown pixel is unknown, or what is hidden would shine through at the edge.
        mask = F.adaptive_max_pool2d((start.mask != 0).float().to(device), shape[1:])
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
