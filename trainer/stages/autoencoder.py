"""The first stage: reconstruct, regularise, and from a certain step on fool a discriminator. Two engines."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from trainer.config.run import Config
from trainer.distributed import collectives
from trainer.distributed.engine import Engine
from trainer.evaluation.held_out import Measure, Measured
from trainer.evaluation.reconstruction import WINDOW_EDGE, distance_name, psnr, ssim
from trainer.first_stage import losses
from trainer.first_stage.base import FirstStage
from trainer.first_stage.perceptual import PerceptualDistance
from trainer.first_stage.statistics import (
    IDLE_TENSOR,
    checkpoint_statistics,
    measure_latent_statistics,
    restore_statistics,
)
from trainer.metrics.timer import StepTimer
from trainer.pixels import to_bytes, to_unit_range
from trainer.rng import Purpose, normal, uniform
from trainer.sample import evaluating
from trainer.stages.stage import Preview

PREVIEW_COLUMNS = 8
ENTRIES = "quantize.embedding.weight"
"""The codebook, [K, z], among the parameters of a quantised first stage."""
STATISTICS_BATCHES = 32
"""Batches per rank over which the latent statistics are measured at the end."""


class AutoencoderStage:
    """Implements `Stage` for every first stage that can be trained."""

    averaged = "autoencoder"

    def __init__(
        self,
        config: Config,
        engines: dict[str, Engine],
        perceptual: PerceptualDistance | None,
        timer: StepTimer,
    ) -> None:
        """`perceptual` lies on the engines' device; None where its weight is 0."""
        assert (perceptual is None) == (config.autoencoder_loss.perceptual_weight == 0)
        assert ("discriminator" in engines) == (config.autoencoder_loss.discriminator_weight > 0)
        self.engines = engines
        self._config = config
        self._loss = config.autoencoder_loss
        self._autoencoder = engines["autoencoder"]
        self._discriminator = engines.get("discriminator")
        self._perceptual = perceptual
        every = self._loss.revive_codes_every
        self._revival = CodebookRevival(self._autoencoder, every, config.seed) if every else None
        self._timer = timer
        channels_last = config.distributed.channels_last
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._reduction: Literal["sum", "mean"] = "sum" if self.module.gaussian else "mean"
        self._sharing = config.sharing(collectives.world_size())
        self._constant_logvar = torch.tensor(self._loss.logvar_init, device=self._autoencoder.device)

    @property
    def module(self) -> FirstStage:
        """The autoencoder inside its engine."""
        module = self._autoencoder.module
        assert isinstance(module, FirstStage)
        return module

    def train_step(self, batch: Batch, step: int, learning_rate: float) -> dict[str, Tensor]:
        """One generator step, then one discriminator step on the same reconstructions (see `Stage`).

        The start of the discriminator is counted in generator steps, which the generator's own engine
        knows: neither the discriminator's steps nor a restart shift it.
        """
        self.module.statistics_measured = False  # what an earlier end of the run measured is of other weights
        made = self._autoencoder.optimizer_steps  # lies on the device: read once
        adversary = self._discriminator if made >= self._loss.discriminator_start else None
        micro_batches = batch.micro_batches(self._sharing.rows, self._sharing.micro_batches)
        totals: dict[str, Tensor] = {}
        counts: Tensor | None = None  # the ranks add them up, those without samples as well
        norms: dict[str, Tensor | None] = {}
        candidates: list[tuple[Tensor, Tensor]] = []
        revives = self._revival is not None and self._revival.is_due(made)
        for micro in micro_batches:
            assert micro.padding in (0, len(micro)), "micro-batches are whole"
            share = 0.0 if micro.padding else self._sharing.gain
            pixels = to_unit_range(micro.pixels).contiguous(memory_format=self._memory_format)
            with self._timer("autoencoder"):
                metrics, reconstruction, outputs = self._generator_backward(micro, pixels, adversary, share)
            with self._timer("optimizer"):
                norms["grad_norm"] = self._autoencoder.step(learning_rate)
            if adversary is not None:
                with self._timer("discriminator"):
                    metrics |= self._discriminator_backward(adversary, pixels, reconstruction, share)
                with self._timer("optimizer"):
                    norms["discriminator_grad_norm"] = adversary.step(learning_rate)
            for name, value in metrics.items():
                part = _weighted(value, share)
                totals[name] = totals[name] + part if name in totals else part
            indices = outputs.get("indices")
            if indices is not None:
                if counts is None:
                    counts = indices.new_zeros(self._config.first_stage.codebook_size)
                if micro.padding:
                    continue
                if revives and self._revival is not None:
                    candidates.append(self._revival.candidates(outputs["encoded"], micro.ordinals))
                flat = indices.flatten()  # not bincount, which waits for the device
                counts.scatter_add_(0, flat, torch.ones_like(flat))
        means = {name: value / len(micro_batches) for name, value in totals.items()}
        for name, norm in norms.items():
            assert norm is not None, f"no {name}: the engine did not step at the accumulation boundary"
            means[name] = norm
        if counts is not None:
            counts = collectives.reduce_sum(counts)
            usage = losses.codebook_usage(counts)
            if self._revival is not None:
                means["codebook_revived"] = self._revival.after_step(counts, candidates if revives else None)
            means |= dict(zip(("codebook_usage", "codebook_perplexity"), usage, strict=True))
        return means

    def _generator_backward(
        self, batch: Batch, pixels: Tensor, adversary: Engine | None, share: float
    ) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """Metrics, detached reconstruction, and of the look-ups (vq) "indices" and "encoded".

        Every loss on the picture is differentiated by the reconstruction first, and the autoencoder
        receives the weighted sum of those gradients. So perceptual network and discriminator are
        walked once although the adaptive weight needs their gradients apart, and neither collects
        gradients of its own.
        """
        outputs = self._autoencoder(pixels, self._posterior_noise(batch))
        reconstruction = outputs["reconstruction"].float()
        logvar = outputs.get("logvar", self._constant_logvar)
        leaf = reconstruction.detach().requires_grad_()
        error = losses.reconstruction_error(pixels, leaf, self._loss.reconstruction)
        perceptual = error.new_zeros(len(batch))
        if self._perceptual is not None:
            perceptual = self._perceptual(pixels, leaf)
        weighted = self._loss.perceptual_weight * perceptual
        nll = losses.negative_log_likelihood(error, weighted, logvar.detach(), reduction=self._reduction)
        (gradient,) = torch.autograd.grad(nll, leaf)
        metrics = {"reconstruction": error.mean(), "perceptual": perceptual.mean(), "nll": nll}
        added = torch.zeros((), device=pixels.device)
        if adversary is not None:
            fooling = losses.generator_loss(adversary.module(leaf))
            (push,) = torch.autograd.grad(fooling, leaf)
            weight = torch.ones_like(added)
            if self._loss.adaptive_weight:
                weight = losses.adaptive_weight(outputs["features"], gradient, push)
            gradient = gradient + self._loss.discriminator_weight * weight * push
            added = self._loss.discriminator_weight * weight * fooling.detach()
            metrics |= {"generator": fooling, "adaptive_weight": weight}
        # The same value as nll, but its only gradient is that by a learned log variance.
        value = losses.negative_log_likelihood(
            error.detach(), weighted.detach(), logvar, reduction=self._reduction
        )
        carrier = (reconstruction * gradient).sum()
        regulariser, terms = self._regulariser(outputs)
        loss = value + regulariser + added + carrier - carrier.detach()
        self._autoencoder.backward(_weighted(loss, share))
        metrics |= {"loss": loss, **terms}
        if self._loss.learned_logvar:
            metrics["logvar"] = logvar
        return (
            {name: metric.detach() for name, metric in metrics.items()},
            leaf.detach(),
            {name: outputs[name] for name in ("indices", "encoded") if name in outputs},
        )

    def _regulariser(self, outputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """What keeps the latents in bounds, and its parts for the log."""
        if "kl" in outputs:
            kl = outputs["kl"].mean()
            return self._loss.kl_weight * kl, {"kl": kl}
        if "codebook" not in outputs:
            return outputs["reconstruction"].new_zeros(()), {}
        codebook, commitment = outputs["codebook"], outputs["commitment"]
        beta = self._loss.commitment_beta
        paper = self._loss.beta_weighs == "commitment"
        weighted = codebook + beta * commitment if paper else beta * codebook + commitment
        return self._loss.codebook_weight * weighted, {"codebook": codebook, "commitment": commitment}

    def _discriminator_backward(
        self, adversary: Engine, pixels: Tensor, reconstruction: Tensor, share: float
    ) -> dict[str, Tensor]:
        logits = adversary(torch.cat([pixels, reconstruction]), parts=2)
        real, fake = logits.chunk(2)
        loss = losses.discriminator_loss(real, fake, self._loss.discriminator_loss)
        adversary.backward(_weighted(loss, share))
        return {
            "discriminator": loss.detach(),
            "logits_real": real.detach().mean(),
            "logits_fake": fake.detach().mean(),
        }

    def _posterior_noise(self, batch: Batch) -> Tensor | None:
        """Standard normal [B, z, h, w], keyed by the samples; None where the posterior is a point."""
        first_stage = self._config.first_stage
        if not self.module.gaussian:
            return None
        height, width = (edge // first_stage.downsampling for edge in batch.pixels.shape[2:])
        shape = (first_stage.latent_channels, height, width)
        return normal(self._config.seed, batch.ordinals, Purpose.POSTERIOR, shape)

    @contextmanager
    def measuring(self) -> Iterator[Measure]:
        """See `Stage`: how well held-out pictures are given back, through the latents' mode."""
        with self._autoencoder.gathered() as module, evaluating(module):
            assert isinstance(module, FirstStage)
            yield partial(self._measure, module)

    @torch.no_grad()
    def _measure(self, module: FirstStage, batch: Batch) -> Measured:
        pixels = to_unit_range(batch.pixels).contiguous(memory_format=self._memory_format)
        outputs = module.training_outputs(pixels, None)
        reconstruction = outputs["reconstruction"].float()
        error = losses.reconstruction_error(pixels, reconstruction, self._loss.reconstruction)
        figures = {"reconstruction": error.flatten(1).mean(dim=1)}
        stored = to_bytes(reconstruction)
        made = to_unit_range(stored)
        figures["psnr"] = psnr(pixels, made)
        if min(pixels.shape[2:]) >= WINDOW_EDGE:
            figures["ssim"] = ssim(pixels, made)
        if self._perceptual is not None:
            figures[distance_name(self._perceptual)] = self._perceptual(pixels, made)
        if "kl" in outputs:
            figures["kl"] = outputs["kl"]
        codes = outputs.get("indices")
        codes = None if codes is None else codes.reshape(len(batch), -1)
        return Measured(figures, codes, (batch.pixels, stored))

    @torch.no_grad()
    def preview(self, batch: Batch) -> Preview:
        """Originals of this rank, and under each row of them their reconstructions."""
        (batch,) = batch.micro_batches(self._sharing.largest_share, 1)  # equally many passes on all ranks
        count = min(self._config.sampling.num_previews, len(batch))
        columns = min(count, PREVIEW_COLUMNS)
        count -= count % columns
        originals = batch.pixels[:count]
        made = []
        with self._autoencoder.gathered() as module, evaluating(module):
            assert isinstance(module, FirstStage)
            for part in to_unit_range(originals).split(self._config.micro_batch_size):
                made.append(to_bytes(module.decode(module.latents(part, None))))
        rows = zip(originals.split(columns), torch.cat(made).split(columns), strict=True)
        pixels = torch.cat([picture for row in rows for picture in row]).cpu()
        starts = range(0, count, columns)
        captions = [batch.captions[i : i + columns] + ("reconstruction",) * columns for i in starts]
        return Preview(pixels, tuple(itertools.chain.from_iterable(captions)), columns)

    def finish(self, batches: Iterator[Batch]) -> None:
        """Measure shift and scale of the latents over all ranks, for the second stage. Collective."""
        with self._autoencoder.gathered() as module, evaluating(module):
            assert isinstance(module, FirstStage)
            statistics = measure_latent_statistics(
                module,
                self._pictures(module, itertools.islice(batches, STATISTICS_BATCHES)),
                collectives.reduce_sum,
                per_channel=self._loss.latent_statistics == "channel",
            )
            module.set_latent_statistics(*statistics)

    def _pictures(self, module: FirstStage, batches: Iterator[Batch]) -> Iterator[Tensor]:
        """Micro-batches in -1 .. 1. Padding is encoded, too: other ranks gather weights for theirs."""
        for batch in batches:
            for micro in batch.micro_batches(self._sharing.rows, self._sharing.micro_batches):
                pixels = to_unit_range(micro.pixels.to(self._autoencoder.device))
                if micro.padding:
                    module.encode(pixels)
                else:
                    yield pixels

    def state(self) -> dict[str, Tensor]:
        """The latent statistics, or that they were not measured; for how long codes were idle."""
        idle = {} if self._revival is None else {IDLE_TENSOR: self._revival.idle.cpu()}
        return checkpoint_statistics(self.module) | idle

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        restore_statistics(self.module, state)
        if self._revival is not None and IDLE_TENSOR in state:
            self._revival.idle = state[IDLE_TENSOR].to(self._autoencoder.device)


def _weighted(value: Tensor, share: float) -> Tensor:
    """A micro-batch's part in a mean over the global batch: with share 0 it is there for the other ranks."""
    return value if share == 1.0 else value * share


class CodebookRevival:
    """Moves dead entries of a codebook, which no look-up chooses any more, to where encoder outputs are.

    An entry moves only when it is chosen, so one that starts far from all outputs, or is left behind by
    them, never comes back. Every n optimizer steps the entries that nothing chose meanwhile take the place of
    outputs of that step, one drawn from each sample, in the order of the samples: the same at any number of
    ranks. Collective.
    """

    def __init__(self, engine: Engine, every: int, seed: int) -> None:
        """`every`: steps between revivals, and without a look-up after which an entry counts as dead."""
        self._engine, self._every, self._seed = engine, every, seed
        shape = engine.parameter_shapes[ENTRIES]
        self._shape = (shape[0], shape[1])
        self.idle = torch.zeros(shape[0], device=engine.device)

    def is_due(self, made: int) -> bool:
        """Whether the next optimizer step, after so many, is one that revives."""
        return (made + 1) % self._every == 0

    def candidates(self, latents: Tensor, ordinals: Tensor) -> tuple[Tensor, Tensor]:
        """One encoder output of each sample: ordinals int64 [B] and points float32 [B, z].

        latents: encoder outputs before quantisation, [B, z, h, w].
        """
        points = latents.detach().float().flatten(2)  # [B, z, h * w]
        place = uniform(self._seed, ordinals, Purpose.REVIVAL, ()) * points.shape[2]
        place = place.long().clamp(max=points.shape[2] - 1)
        return ordinals, points.gather(2, place.view(-1, 1, 1).expand(-1, points.shape[1], 1)).squeeze(2)

    @torch.no_grad()
    def after_step(self, counts: Tensor, candidates: Sequence[tuple[Tensor, Tensor]] | None) -> Tensor:
        """Take the step's look-ups into account, and revive where candidates are given; how many, 0-d.

        Args:
            counts: look-ups of each entry [K], over all ranks.
            candidates: this rank's, of every micro-batch; None where no revival is due.
        """
        self.idle = torch.where(counts > 0, 0.0, self.idle + 1.0)
        revived = torch.zeros((), device=self._engine.device)
        if candidates is None:
            return revived
        dead = (self.idle >= self._every).nonzero().flatten().cpu()
        own = [(ordinals.cpu(), points.cpu()) for ordinals, points in candidates]
        pairs = [pair for share in collectives.all_gather_object(own) for pair in share]
        ordinals, points = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        order = ordinals.argsort(stable=True)[: len(dead)]
        dead = dead[: len(order)]
        if not len(dead):
            return revived
        self._move(dead, points[order])
        self.idle[dead.to(self.idle.device)] = 0.0
        return revived + len(dead)

    def _move(self, dead: Tensor, points: Tensor) -> None:
        """Write points [n, z] over the entries `dead` [n] that this rank owns, and forget their moments."""
        size, width = self._shape
        chosen = torch.zeros(size, dtype=torch.bool)
        chosen[dead] = True
        wanted = torch.zeros(size, width)
        wanted[dead] = points
        mask, values = chosen.unsqueeze(1).expand(size, width).flatten(), wanted.flatten()
        for fragment in self._engine.fragments():
            if fragment.name != ENTRIES:
                continue
            part = slice(fragment.start, fragment.start + fragment.master.numel())
            here = mask[part].to(fragment.master.device)
            fragment.master.copy_(torch.where(here, values[part].to(fragment.master), fragment.master))
            for moment in fragment.moments.values():
                moment.masked_fill_(here, 0.0)
        self._engine.refresh(moments=True)
