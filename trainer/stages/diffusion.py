"""The second stage: latents, conditions, noise, UNet, loss. One engine, any combination of conditions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.loader import HELD_OUT_SEED
from data_pipeline.tools.given import read_prompt
from trainer.conditioning.build import Conditioner
from trainer.config.run import Config
from trainer.diffusion.objective import (
    add_noise,
    draw_timesteps,
    falls,
    loss_per_sample,
    offset_noise,
    weigh_by_uncertainty,
)
from trainer.diffusion.processes import at_size, make_process
from trainer.distributed import collectives
from trainer.distributed.engine import Engine
from trainer.evaluation.held_out import Measure, Measured
from trainer.first_stage.base import FirstStage
from trainer.first_stage.encode_once import EncodeOnce
from trainer.first_stage.statistics import require_same_statistics
from trainer.metrics.timer import StepTimer
from trainer.model import ConditionedUNet, DiffusionModel
from trainer.pixels import to_unit_range
from trainer.rng import Purpose, normal, permutation, uniform
from trainer.sample import Request, evaluating, generate
from trainer.stages.stage import Preview, share_of_mean


class DiffusionStage:
    """Implements `Stage` for text, class, layout, image-to-image and unconditional training alike."""

    averaged = "unet"

    def __init__(
        self,
        config: Config,
        engines: dict[str, Engine],
        conditioner: Conditioner,
        first_stage: FirstStage,
        timer: StepTimer,
        encode_once: EncodeOnce | None = None,
    ) -> None:
        self.encode_once = encode_once
        self.engines = engines
        self._config = config
        self._engine = engines["unet"]
        self._conditioner = conditioner
        self._first_stage = first_stage
        self._timer = timer
        self._process = make_process(config.diffusion).to(self._engine.device)
        self._falls = falls(config.diffusion)
        self._sharing = config.sharing(collectives.world_size())

    def train_step(self, batch: Batch, step: int, learning_rate: float) -> dict[str, Tensor]:
        """One optimizer step over this rank's micro-batches (see `Stage`)."""
        config = self._config
        strata = None
        if config.diffusion.timesteps == "stratified":
            # Shuffled anew each step, or a lane's samples would always meet the same stratum of noise levels.
            strata = permutation(
                config.seed, step, Purpose.STRATUM, config.global_batch_size, self._engine.device
            )
        if self.encode_once is not None:
            with self._timer("encode"):
                batch = self.encode_once.complete(batch)
        micro_batches = batch.micro_batches(self._sharing.rows, self._sharing.micro_batches)
        learned = config.diffusion.learned_uncertainty
        total, total_error = torch.zeros((2,), device=self._engine.device).unbind()
        grad_norm = None
        for micro in micro_batches:
            with self._timer("encode"):
                latents, inputs = self._encode(micro, config.seed)
            with self._timer("unet"):
                slots = micro.slots if strata is None else strata[micro.slots]
                loss, error = self._loss(micro, latents, inputs, slots)
                self._engine.backward(loss)
            with self._timer("optimizer"):
                grad_norm = self._engine.step(learning_rate)
            total += loss.detach()
            if learned:
                total_error += error
        assert grad_norm is not None, "the engine did not step at the accumulation boundary"
        metrics = {"loss": total / len(micro_batches), "grad_norm": grad_norm}
        if learned:  # what other runs call their loss
            metrics["error"] = total_error / len(micro_batches)
        return metrics

    @torch.no_grad()
    def _encode(self, batch: Batch, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Frozen work: latents [B, z, h, w] and prepared conditions."""
        config = self._config
        factor = config.first_stage.downsampling
        height, width = batch.pixels.shape[2:]
        shape = (config.first_stage.channels, height // factor, width // factor)
        noise = normal(seed, batch.ordinals, Purpose.POSTERIOR, shape)
        if batch.cached is None:
            pixels = to_unit_range(batch.pixels)
            moments = self._first_stage.moments(pixels)
        else:  # complete: the conditions that need pixels are refused with a cache
            pixels, moments = None, batch.cached.values
        latents = self._first_stage.latents_of(moments, noise)
        inputs = self._conditioner.frozen.prepare(
            batch.captions,
            batch.conditions,
            pixels,
            first_stage=self._first_stage,
            seed=seed,
            ordinals=batch.ordinals,
        )
        return latents.float(), inputs

    def _loss(
        self, batch: Batch, latents: Tensor, inputs: dict[str, Tensor], slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Part in the mean loss, and without the learned uncertainty."""
        config, seed, ordinals = self._config, self._config.seed, batch.ordinals
        diffusion = at_size(config.diffusion, batch.pixels.shape[2], batch.pixels.shape[3])
        uniforms = uniform(seed, ordinals, Purpose.TIMESTEP, ())
        timesteps = draw_timesteps(diffusion, uniforms, slots, config.global_batch_size)
        noise = normal(seed, ordinals, Purpose.NOISE, tuple(latents.shape[1:]))
        if diffusion.offset_noise:
            shift = normal(seed, ordinals, Purpose.OFFSET_NOISE, (latents.shape[1],))
            noise = offset_noise(noise, shift, diffusion.offset_noise)
        noisy = add_noise(self._process, latents, noise, timesteps)
        drop = self._conditioner.drop_masks(seed, ordinals)
        output = self._engine(noisy, timesteps, inputs, drop)
        prediction, uncertainty = output if diffusion.learned_uncertainty else (output, None)
        losses = loss_per_sample(diffusion, self._process, prediction.float(), latents, noise, timesteps)
        error = share_of_mean(losses, batch.padding, self._sharing.gain)
        if uncertainty is None:
            return error, error.detach()
        weighed = weigh_by_uncertainty(losses, uncertainty)
        return share_of_mean(weighed, batch.padding, self._sharing.gain), error.detach()

    @contextmanager
    def measuring(self) -> Iterator[Measure]:
        """See `Stage`: the loss at levels of noise that are fixed per sample, and nothing is dropped."""
        with self._engine.gathered() as network, evaluating(network):
            assert isinstance(network, ConditionedUNet)
            yield partial(self._measure, network)

    @torch.no_grad()
    def _measure(self, network: ConditionedUNet, batch: Batch) -> Measured:
        """The loss of each sample over `validation.timesteps` levels, one drawn in each equal part of what
        training draws, and the loss in each part, from little to much noise.

        `error` and the parts are without the learned uncertainty.
        """
        config, ordinals = self._config, batch.ordinals
        levels = config.validation.timesteps
        latents, inputs = self._encode(batch, HELD_OUT_SEED)
        diffusion = at_size(config.diffusion, batch.pixels.shape[2], batch.pixels.shape[3])
        even = dataclasses.replace(diffusion, timesteps="stratified")
        uniforms = uniform(HELD_OUT_SEED, ordinals, Purpose.TIMESTEP, (levels,))
        shifts = normal(HELD_OUT_SEED, ordinals, Purpose.OFFSET_NOISE, (levels, latents.shape[1]))
        keep = self._conditioner.keep_masks(len(batch), latents.device)
        errors, losses = [], []
        for level in range(levels):
            slots = torch.full_like(ordinals, level)
            timesteps = draw_timesteps(even, uniforms[:, level], slots, levels)
            noise = normal(HELD_OUT_SEED, ordinals, Purpose.VALIDATION + level, tuple(latents.shape[1:]))
            if diffusion.offset_noise:
                noise = offset_noise(noise, shifts[:, level], diffusion.offset_noise)
            prediction = network(add_noise(self._process, latents, noise, timesteps), timesteps, inputs, keep)
            error = loss_per_sample(diffusion, self._process, prediction.float(), latents, noise, timesteps)
            errors.append(error.double())
            if network.uncertainty is not None:
                losses.append(weigh_by_uncertainty(error, network.uncertainty(timesteps)).double())
        figures = {"loss": torch.stack(losses or errors).mean(dim=0)}
        if losses:
            figures["error"] = torch.stack(errors).mean(dim=0)
        rising = errors[::-1] if self._falls else errors
        return Measured(figures | {f"bin_{level}": error for level, error in enumerate(rising)})

    @torch.no_grad()
    def preview(self, batch: Batch) -> Preview:
        """Pictures for the configured prompts, or the batch's captions, and the batch's other conditions."""
        config, sampling = self._config, self._config.sampling
        prompts = [read_prompt(prompt, "sampling.prompts") for prompt in sampling.prompts]
        if prompts and config.conditioning.text_only:
            n = sampling.num_previews
            request = Request(tuple(prompts[i % len(prompts)] for i in range(n)))
        else:
            (batch,) = batch.micro_batches(self._sharing.largest_share, 1)
            n = min(sampling.num_previews, len(batch))
            request = Request(
                tuple(prompts[i % len(prompts)] for i in range(n)) if prompts else batch.captions[:n],
                conditions={name: value[:n] for name, value in batch.conditions.items()},
                pixels=to_unit_range(batch.pixels[:n]),
                size=(batch.pixels.shape[2], batch.pixels.shape[3]),
            )
        with self._engine.gathered() as network:
            model = DiffusionModel(network, self._conditioner, self._first_stage)
            made = generate(config, model, request, seed=config.seed)
        return Preview(made.cpu(), request.captions, columns=min(n, 6))

    def finish(self, batches: Iterator[Batch]) -> None:
        """Nothing is measured after training."""

    def state(self) -> dict[str, Tensor]:
        """The latent statistics, so that exported weights know the scale they were trained at."""
        return {
            "latent_shift": self._first_stage.latent_shift.detach().cpu(),
            "latent_scale": self._first_stage.latent_scale.detach().cpu(),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Refuse to go on with another first stage: its latents would mean something else."""
        require_same_statistics(self._first_stage, state)
