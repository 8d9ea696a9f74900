"""What is wished of `ldm sample`, and which of it a model can be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config.models import ConditioningConfig
from trainer.config.run import ConfigError

MAX_CHUNKS = 64
"""Of a prompt, of which 4000 characters are kept as of a caption."""
MAX_PER_PROMPT = 10**6
"""Pictures for one prompt: more is a slip of the finger."""


@dataclass(frozen=True)
class Wishes:
    """What the user gave, as on the command line; files are paths or URLs."""

    prompts: tuple[str, ...] = ()
    """Captions."""
    negative_prompt: str = ""
    """What guidance leads away from; empty: from no text."""
    prompt_chunks: int = 1
    """Parts of a prompt that are read, each as long as the text tower reads at a time."""
    class_labels: tuple[int, ...] = ()
    """Class indices, -1 for no class."""
    layout: str | None = None
    """JSON: a list of [label, x0, y0, x1, y1], corners as shares of the picture."""
    semantic_map: str | None = None
    """Picture of label indices, 255 unlabelled."""
    depth: str | None = None
    """Grey picture of depths."""
    image: str | None = None
    """The picture to enlarge, to fill or to start from."""
    mask: str | None = None
    """White where the picture is to be made."""
    strength: float | None = None
    """Share of the sampler's steps that an existing picture goes through."""
    noise_level: int | None = None
    """Noise augmentation of a low-resolution picture."""
    size: tuple[int, int] | None = None
    """Height and width of the result in pixels."""
    original_size: tuple[int, int] | None = None
    """What a model with the size condition (SDXL) is told of the picture before it was cropped."""
    crop: tuple[int, int] | None = None
    """... of the corner of the crop, top and left."""
    target_size: tuple[int, int] | None = None
    """... of the size after it."""
    per_prompt: int = 1
    """Pictures for each prompt or label."""


def check_wishes(conditioning: ConditioningConfig, wishes: Wishes) -> None:
    """Raise ConfigError, with the flag, for what this model lacks or cannot use."""
    has_text = any(
        section is not None
        for section in (conditioning.openclip, conditioning.openclip_second, conditioning.text_transformer)
    )
    flags = (
        (has_text, wishes.prompts, "--prompt", "captions"),
        (conditioning.class_label, wishes.class_labels, "--class-label", "class labels"),
        (conditioning.layout, wishes.layout, "--layout", "layouts"),
        (conditioning.semantic_map, wishes.semantic_map, "--semantic-map", "semantic maps"),
        (conditioning.depth, wishes.depth, "--depth", "depth maps"),
    )
    for present, given, flag, what in flags:
        if present and not given:
            hint = "--prompt, --prompts-file or --prompts-from" if flag == "--prompt" else flag
            raise ConfigError(
                f"this model was trained with {what}, so there is nothing to draw; give {hint}."
            )
        if given and not present:
            raise ConfigError(f"this model was trained without {what}; leave out {flag}.")
    if wishes.negative_prompt and not has_text:
        raise ConfigError("this model was trained without captions; leave out --negative-prompt.")
    if not 1 <= wishes.prompt_chunks <= MAX_CHUNKS:
        raise ConfigError(f"--prompt-chunks {wishes.prompt_chunks} must lie in 1 .. {MAX_CHUNKS}.")
    if wishes.prompt_chunks > 1 and not reads_chunks(conditioning):
        raise ConfigError(
            "--prompt-chunks is for models that read captions by frozen OpenCLIP towers alone; leave it out."
        )
    told = (wishes.original_size, wishes.crop, wishes.target_size)
    if conditioning.image_size is None and any(pair is not None for pair in told):
        raise ConfigError(
            "this model was trained without the size condition (conditioning.image_size); leave out "
            "--original-size, --crop and --target-size."
        )
    _check_picture_wishes(conditioning, wishes)
    if not 1 <= wishes.per_prompt <= MAX_PER_PROMPT:
        raise ConfigError(f"--per-prompt {wishes.per_prompt} must lie in 1 .. {MAX_PER_PROMPT}.")


def reads_chunks(conditioning: ConditioningConfig) -> bool:
    """Whether captions may be read in several chunks: by frozen OpenCLIP towers alone."""
    return conditioning.openclip is not None and conditioning.text_transformer is None


def check_labels(conditioning: ConditioningConfig, labels: Sequence[int]) -> None:
    """Raise ConfigError for a class index that this model does not know."""
    section = conditioning.class_label
    for label in labels:
        if section is not None and not -1 <= label < section.num_classes:
            raise ConfigError(
                f"--class-label {label} must lie in 0 .. {section.num_classes - 1} "
                "(conditioning.class_label.num_classes), or be -1 for none."
            )


def _check_picture_wishes(conditioning: ConditioningConfig, wishes: Wishes) -> None:
    enlarges = conditioning.low_resolution is not None
    if enlarges and wishes.image is None:
        raise ConfigError("this model enlarges pictures; give the small one with --image.")
    if enlarges and (wishes.mask or wishes.size or wishes.strength is not None):
        raise ConfigError(
            "this model enlarges the picture of --image, which says everything; leave out --mask, --size and "
            "--strength."
        )
    if conditioning.masked_image is not None and (wishes.image is None or wishes.mask is None):
        raise ConfigError("this model fills holes in pictures; give --image and --mask.")
    if wishes.mask is not None and wishes.image is None:
        raise ConfigError("--mask needs the picture that it belongs to; give --image.")
    if wishes.strength is not None and wishes.image is None:
        raise ConfigError("--strength needs a picture to start from; give --image.")
    if wishes.strength is not None and not 0.0 < wishes.strength <= 1.0:
        raise ConfigError(f"--strength {wishes.strength:g} must lie above 0 and at most at 1.")
    if wishes.noise_level is not None:
        highest = conditioning.low_resolution.max_noise_level if conditioning.low_resolution else 0
        if not 0 <= wishes.noise_level < highest:
            raise ConfigError(
                f"--noise-level {wishes.noise_level} must lie below the model's max_noise_level {highest}; "
                "leave it out."
            )
