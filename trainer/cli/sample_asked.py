"""What the arguments of `ldm sample` ask for, of small sets and of large ones alike."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import re
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from data_pipeline.errors import NotFound
from data_pipeline.tools.given import read_prompt
from data_pipeline.tools.prompts import prompts_of
from trainer.cli.conditions_from_files import SamplingInputs, sampling_inputs
from trainer.cli.wishes import MAX_CHUNKS, Wishes, reads_chunks
from trainer.conditioning.build import TEXT
from trainer.config.checks_diffusion import check_guidance, check_sampling, guidance_note
from trainer.config.run import Config, ConfigError
from trainer.config.training import SamplingConfig
from trainer.model import ModelFound, TrainedModel, find_model, load_model
from trainer.provenance import git_commit
from trainer.sample import Request

Precision: TypeAlias = Literal["fp32", "bf16"]
BATCH = 16
"""Pictures drawn at a time where nobody says."""
MAX_NOTES = 5
"""Prompts that are told to be too long, one by one."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A model whose weights are not read yet, and what it is to draw."""

    found: ModelFound
    inputs: SamplingInputs
    precision: Precision
    record: dict[str, Any]
    """Everything that the pictures are a function of; lists where they differ."""


def wishes_of(args: argparse.Namespace) -> Wishes:
    """Prompts and conditions; --prompts-file is read here."""
    return Wishes(
        prompts=tuple(_prompts(args)),
        negative_prompt=read_prompt(args.negative_prompt or "", "--negative-prompt"),
        prompt_chunks=args.prompt_chunks,
        class_labels=tuple(args.class_label),
        layout=args.layout,
        semantic_map=args.semantic_map,
        depth=args.depth,
        image=args.image,
        mask=args.mask,
        strength=args.strength,
        noise_level=args.noise_level,
        size=_pair(args.size, "--size"),
        original_size=_pair(args.original_size, "--original-size"),
        crop=_pair(args.crop, "--crop"),
        target_size=_pair(args.target_size, "--target-size"),
        per_prompt=args.per_prompt,
    )


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = [read_prompt(text, "--prompt") for text in args.prompt]
    if args.prompts_file is not None:
        try:
            listed = prompts_of(args.prompts_file)
        except NotFound as error:
            raise ConfigError(f"there is no prompts file {args.prompts_file}.") from error
        if not listed:
            raise ConfigError(f"the prompts file {args.prompts_file} holds no prompt; write one a line.")
        prompts += listed
    return prompts


def _pair(text: str | None, flag: str) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if match is None:
        raise ConfigError(f"{flag} {text} is not two numbers of pixels, the vertical one first: 512x768.")
    return int(match[1]), int(match[2])


def find_asked(args: argparse.Namespace) -> ModelFound:
    """The model without its weights, told to draw by the sampler that the arguments name.

    Raises:
        ConfigError: no such model, or a sampler that it cannot draw by.
    """
    found = find_model(
        args.source,
        profile=args.weights,
        step=args.checkpoint,
        first_stage_weights=args.first_stage,
        latent_scale=args.latent_scale,
    )
    return dataclasses.replace(found, config=with_choices(found.config, args))


def ask(args: argparse.Namespace, found: ModelFound, wishes: Wishes, device: torch.device) -> Asked:
    """What `find_asked` has found is to draw these on this device. Raises ConfigError where it cannot."""
    inputs = sampling_inputs(found.config, wishes)
    named: Precision | None = args.precision
    precision = named or (found.config.distributed.precision if device.type == "cuda" else "fp32")
    return Asked(found, inputs, precision, _record(args, wishes, inputs, found, device, precision))


def load_asked(args: argparse.Namespace, asked: Asked, device: torch.device) -> TrainedModel:
    """The weights that were found, with the configuration that was asked for."""
    found = asked.found
    trained = load_model(
        args.source,
        profile=args.weights if found.step is None else found.profile,
        step=found.step,
        first_stage_weights=args.first_stage,
        latent_scale=args.latent_scale,
        device=device,
        precision=asked.precision,
    )
    return dataclasses.replace(trained, config=found.config)


def with_choices(config: Config, args: argparse.Namespace) -> Config:
    """The configuration told to draw as the arguments say. Raises ConfigError where no sampler can."""
    chosen = {
        "sampler": args.sampler,
        "steps": args.steps,
        "spacing": args.spacing,
        "guidance_scale": args.guidance,
        "guidance_rescale": args.guidance_rescale,
        "eta": args.eta,
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    sampling: SamplingConfig = dataclasses.replace(config.sampling, **given)
    check_sampling(config.diffusion, sampling)
    config = dataclasses.replace(config, sampling=sampling)
    check_guidance(config, told=TEXT if args.negative_prompt else ())
    if args.negative_prompt and sampling.guidance_scale == 1.0:
        raise ConfigError("--negative-prompt needs guidance to lead away from it; give --guidance above 1.")
    return config


def _record(
    args: argparse.Namespace,
    wishes: Wishes,
    inputs: SamplingInputs,
    found: ModelFound,
    device: torch.device,
    precision: Precision,
) -> dict[str, Any]:
    config, request = found.config, inputs.request
    how = config.sampling
    given = {name: value for name, value in dataclasses.asdict(wishes).items() if value and name != "prompts"}
    if request.start is not None:  # also where nobody said it
        given["strength"] = request.start.strength
    if "noise_level" in request.conditions:
        given["noise_level"] = int(request.conditions["noise_level"][0])
    return {
        "source": args.source,
        "checkpoint": found.step,
        "profile": found.profile,
        "first_stage": config.first_stage.weights,
        "latent_scale": config.first_stage.latent_scale,
        "seed": args.seed,
        "first_index": args.first_index,
        "prompts": list(request.captions),
        **{name: list(value) if isinstance(value, tuple) else value for name, value in given.items()},
        "size": "x".join(map(str, request.size or ())),
        "files": inputs.checksums,
        "sampler": how.sampler,
        "steps": how.steps,
        "spacing": how.spacing,
        "eta": how.eta,
        "guidance": how.guidance_scale,
        "guidance_rescale": how.guidance_rescale,
        "precision": precision,
        "versions": {
            "ldm": importlib.metadata.version("latent-diffusion-trainer"),
            "commit": git_commit(Path(__file__).resolve().parent, mark_changes=True) or "unknown",
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
    }


def notes_on(trained: TrainedModel, request: Request) -> list[str]:
    """Sentences for people about what is to be drawn."""
    about = guidance_note(trained.config, told=TEXT if request.negative else ())
    return [*([about] if about else []), *_long_prompts(trained, request)]


def _long_prompts(trained: TrainedModel, request: Request) -> list[str]:
    """A sentence for each caption that is longer than the model reads; after a few, one for the rest."""
    notes = []
    in_chunks = reads_chunks(trained.config.conditioning)
    for caption in dict.fromkeys((*request.captions, *request.negative)):
        for condition in trained.model.conditioner.conditions.values():
            count, at_once = condition.text_tokens(caption)
            if count > at_once * request.text_chunks:
                remedy = "shorten it"
                chunks = -(-count // at_once)
                if in_chunks and chunks <= MAX_CHUNKS:
                    remedy += f", or give --prompt-chunks {chunks}"
                notes.append(
                    f"{caption[:60]!r} has {count} tokens and the model reads the first "
                    f"{at_once * request.text_chunks}; {remedy}."
                )
                break
    more = len(notes) - MAX_NOTES
    return notes if more <= 0 else [*notes[:MAX_NOTES], f"{more} more prompts are longer than that, too."]
