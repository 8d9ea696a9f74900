"""The root of a run's configuration, and the checks that need more than one section."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from data_pipeline.config import DataConfig, number
from data_pipeline.errors import UserError
from trainer.config.models import ConditioningConfig, FirstStageConfig, UNetConfig
from trainer.config.sharing import Sharing
from trainer.config.training import (
    AutoencoderLossConfig,
    CheckpointConfig,
    DiffusionConfig,
    DistributedConfig,
    EMAConfig,
    HealingConfig,
    LoggingConfig,
    LoRAConfig,
    OptimizerConfig,
    SamplingConfig,
    ValidationConfig,
)

_EPOCHS_OF_A_PHASE = 2**14
"""Many times what a phase walks (turns at shards, without an index); beyond, orders come a second time."""


class ConfigError(UserError):
    """A user's mistake in a configuration: one sentence with the key and the remedy."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError where the condition does not hold."""
    if not condition:
        raise ConfigError(message)


def option_words(option: str, text: str) -> list[str]:
    """The words of an option whose value is a command line, as a shell reads it.

    Raises:
        ConfigError: a quotation mark that is not closed.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text} cannot be read ({error}); correct its quotes.") from error


@dataclass(frozen=True)
class PhaseConfig:
    """What is another from a step of a run on; what is unset stays as it was before."""

    from_step: int = number(0, least=1, most=10**12)
    """Optimizer steps made before it."""
    image_size: int | None = number(None, least=1, most=2**16)
    """data.image_size."""
    global_batch_size: int | None = number(None, least=1, most=10**9)
    """global_batch_size."""
    micro_batch_size: int | None = number(None, least=1, most=10**7)
    """micro_batch_size."""
    learning_rate: float | None = number(None, above=0, most=10)
    """optimizer.learning_rate, the peak of a schedule that goes on."""


class Phase(NamedTuple):
    """A stretch of a run with one size of pictures, one batch and one rate."""

    number: int
    """0 is what the run begins with."""
    first: int
    """Steps made before it."""
    stop: int
    """Steps made after its last one."""

    @property
    def first_epoch(self) -> int:
        """Where the data begin: each phase has epochs of its own, and so an order and draws of its own."""
        return self.number * _EPOCHS_OF_A_PHASE


@dataclass(frozen=True)
class Config:
    """Everything about one run."""

    stage: Literal["diffusion", "autoencoder"] = "diffusion"
    """What is trained: the UNet on latents, or the first stage itself."""
    run_dir: str = "runs/default"
    """Folder or URL of checkpoints, logs and samples; running again with the same one resumes."""
    steps: int = number(1_000_000, least=1, most=10**12)
    """Optimizer steps of the whole run."""
    global_batch_size: int = number(2048, least=1, most=10**9)
    """Samples per optimizer step, over all ranks."""
    micro_batch_size: int = number(8, least=1, most=10**7)
    """The most samples per rank and forward pass; how many passes, and of how many, is derived."""
    seed: int = number(0, least=-(2**63), most=2**63 - 1)
    """Seeds the initial weights, the order of samples and every random draw."""
    init_from: str | None = None
    """Start from these weights (an exported file or a run folder) instead of random ones."""
    trainable: tuple[str, ...] = ()
    """Patterns of parameter names, or modules, that are trained, such as unet.*.attn2.*; the rest is
    frozen: no gradients, no optimizer state, no averages. Empty: everything is trained."""
    lora: LoRAConfig | None = None
    """Train low-rank adapters on layers of the UNet, and nothing else; needs init_from."""
    phases: tuple[PhaseConfig, ...] = ()
    """Later stretches of the run, by rising from_step: 256 px, then 512, then 1024, with their batches."""
    resume_changed: tuple[str, ...] = ()
    """Settings or sections that may differ from what the run was trained with when it resumes, such as
    diffusion.prediction; without the word, a run that resumes as something else is refused."""
    data: DataConfig = field(default_factory=DataConfig)
    """Shards and what is read from them."""
    first_stage: FirstStageConfig = field(default_factory=FirstStageConfig)
    """Autoencoder between pixels and latents."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    """Denoiser."""
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    """What the denoiser is told."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """Noise schedule and objective of the second stage."""
    autoencoder_loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    """Objective of the first stage."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW, Muon or Adafactor, and the schedule."""
    ema: EMAConfig = field(default_factory=EMAConfig)
    """Averages of the weights."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Ranks, ZeRO, precision."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save."""
    healing: HealingConfig = field(default_factory=HealingConfig)
    """NaN and spike policy."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Measurements on held-out samples."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Console, JSONL, W&B."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Preview pictures."""

    def phase(self, step: int) -> Phase:
        """The phase that makes the step after `step` steps; after the last one, the last phase."""
        _, *later = self.phase_starts
        number = sum(first <= step for first in later)
        return Phase(number, self.phase_starts[number], (*later, self.steps)[number])

    def at(self, step: int) -> Config:
        """The settings of the phase that makes the step after `step` steps, in their places."""
        config = self
        for phase in self.phases[: self.phase(step).number]:
            size, rate = phase.image_size, phase.learning_rate
            config = replace(
                config,
                data=config.data if size is None else replace(config.data, image_size=size),
                optimizer=config.optimizer if rate is None else replace(config.optimizer, learning_rate=rate),
                global_batch_size=phase.global_batch_size or config.global_batch_size,
                micro_batch_size=phase.micro_batch_size or config.micro_batch_size,
            )
        return config

    @property
    def phase_starts(self) -> tuple[int, ...]:
        """Steps made before each phase that the run reaches, 0 first."""
        return (0, *(phase.from_step for phase in self.phases if phase.from_step < self.steps))

    def apart(self) -> tuple[Config, ...]:
        """Each phase that the run reaches as a run of its own, with as many steps."""
        found = [(self.phase(first), self.at(first)) for first in self.phase_starts]
        return tuple(replace(each, steps=phase.stop - phase.first, phases=()) for phase, each in found)

    def samples_after(self, step: int) -> int:
        """Samples that `step` steps consume."""
        each = zip(self.phase_starts, self.apart(), strict=True)
        return sum(min(max(0, step - first), c.steps) * c.global_batch_size for first, c in each)

    @property
    def freezes(self) -> bool:
        """Whether some of the network stays what `init_from` gave."""
        return bool(self.trainable) or self.lora is not None

    @property
    def _whole_samples(self) -> int:
        return self.micro_batch_size if self.stage == "autoencoder" else 1

    @property
    def most_ranks(self) -> int:
        """More would never have a sample."""
        return self.global_batch_size // self._whole_samples

    def sharing(self, ranks: int) -> Sharing:
        """How the global batch is shared among so many ranks: any number that it has samples for.

        A first stage keeps its micro-batches whole, since statistics are taken over each (batch
        normalisation, the adaptive weight): the same at any number of ranks. A lane is not cut either.

        Raises:
            ConfigError: some ranks would never have a sample.
        """
        whole = self._whole_samples
        if not 1 <= ranks <= self.most_ranks:
            why = f", whose micro-batches of {whole} stay whole in a first stage" if whole > 1 else ""
            raise ConfigError(
                f"{ranks} ranks cannot share global_batch_size={self.global_batch_size}{why}; use 1 to "
                f"{self.most_ranks} ranks, or {'lower micro_batch_size' if whole > 1 else 'raise it'}."
            )
        per_lane, rest = divmod(self.global_batch_size, self.data.lanes or self.global_batch_size)
        together = (
            math.lcm(whole, per_lane) if not rest else whole
        )  # a wrong number is the data set's to refuse
        return Sharing(self.global_batch_size, ranks, self.micro_batch_size, together)

    def accumulation(self, ranks: int) -> int:
        """Micro-batches per optimizer step on each of so many ranks; raises as `sharing`."""
        return self.sharing(ranks).micro_batches

    def shard_size(self, world_size: int, ranks_per_node: int) -> int:
        """Ranks over which fsdp cuts the state: as configured, or those of the fullest node.

        Where such groups do not come out even over nodes that are not equally full, all ranks are one.
        """
        asked = self.distributed.shard_ranks
        if asked and world_size % asked:
            divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
            raise ConfigError(
                f"distributed.shard_ranks={asked} does not divide {world_size} ranks; set it to 0, or to one "
                f"of {', '.join(map(str, divisors[:20]))}."
            )
        return asked or (ranks_per_node if world_size % ranks_per_node == 0 else world_size)
