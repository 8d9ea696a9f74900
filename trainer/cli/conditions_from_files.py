"""What `ldm sample` is asked for: prompts, labels, and boxes, maps and pictures from files, as a request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from data_pipeline.errors import NotFound
from data_pipeline.storage.files import read_bytes, read_text
from data_pipeline.tools.given import GivenMap, GivenPicture, order_boxes, read_map, read_picture
from trainer.cli.wishes import Wishes, check_labels, check_wishes
from trainer.conditioning.low_resolution import SAMPLING_NOISE_LEVEL
from trainer.conditioning.spatial import UNLABELLED
from trainer.config.models import ConditioningConfig
from trainer.config.run import Config, ConfigError
from trainer.pixels import to_unit_range
from trainer.sample import Request, StartingPicture

IMAGE_TO_IMAGE_STRENGTH = 0.75
"""Where nobody says: enough to change the picture, little enough to keep its composition."""

Files: TypeAlias = "Mapping[str, GivenPicture | GivenMap]"
"""What was read, by the field of Wishes that named it."""


@dataclass(frozen=True)
class SamplingInputs:
    """What `trainer.sample.generate` is asked for, and what to make of its pictures."""

    request: Request
    """N pictures."""
    titles: tuple[str, ...]
    """N descriptions for people."""
    known: tuple[Tensor, Tensor] | None
    """uint8 picture [3, H, W] and bool mask [1, H, W] of an inpainting: outside the mask it stays."""
    checksums: dict[str, str]
    """SHA-256 of every file that was read, by the field of Wishes."""

    def paste(self, made: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] with the known pixels put back, since decoding changes them a little."""
        if self.known is None:
            return made
        picture, mask = self.known
        return torch.where(mask, made, picture)


def sampling_inputs(config: Config, wishes: Wishes) -> SamplingInputs:
    """Read the files, as training reads those of shards, and shape them for this model.

    Raises:
        ConfigError, DataError: something is missing, has no meaning for this model, or cannot be read.
    """
    check_wishes(config.conditioning, wishes)
    captions, labels = _rows(wishes)
    check_labels(config.conditioning, labels or ())
    n = len(captions)
    files = _read_files(wishes, config.data.max_image_pixels)
    checksums = {name: file.sha256 for name, file in files.items()}
    conditions: dict[str, Tensor] = {}
    if labels is not None:
        conditions["class_label"] = torch.tensor(labels)
    if wishes.layout is not None:
        limit = config.conditioning.layout.max_boxes if config.conditioning.layout else 0
        layout = read_layout(wishes.layout, limit)
        _check_boxes(config.conditioning, layout, wishes.layout)
        conditions["layout"] = _repeat(layout, n)
        checksums["layout"] = hashlib.sha256(read_bytes(wishes.layout)).hexdigest()
    if config.conditioning.low_resolution is not None:
        factor = config.conditioning.low_resolution.factor
        low = _pixels(files, "image", None)
        size = (low.shape[1] * factor, low.shape[2] * factor)
        conditions["low_resolution"] = _repeat(low, n)
        levels = config.conditioning.low_resolution.max_noise_level
        if levels:
            default = min(SAMPLING_NOISE_LEVEL, levels - 1)
            level = default if wishes.noise_level is None else wishes.noise_level
            conditions["noise_level"] = torch.full((n,), level)
    else:
        size = _size(config, wishes.size, files)
    _check_map(config.conditioning, files)
    conditions |= {name: _repeat(value, n) for name, value in _maps(files, size).items()}
    pixels, start, known = _picture(config, wishes, files, size, n)
    if pixels is not None and known is not None:
        conditions["mask"] = _repeat(known[1][0], n)
    sizes = _told_sizes(config.conditioning, wishes, size)
    if sizes is not None:
        conditions["size"] = _repeat(sizes, n)
    negative = (wishes.negative_prompt,) * n if wishes.negative_prompt else ()
    titles = tuple(_title(captions[i], labels[i] if labels else None) for i in range(n))
    request = Request(captions, conditions, pixels, size, start, negative, wishes.prompt_chunks)
    return SamplingInputs(request, titles, known, checksums)


def _check_boxes(conditioning: ConditioningConfig, layout: Tensor, url: str) -> None:
    section = conditioning.layout
    highest = int(layout[:, 0].max())
    if section is not None and highest >= section.num_labels:
        raise ConfigError(
            f"{url} has the label {highest}; this model knows 0 .. {section.num_labels - 1} "
            "(conditioning.layout.num_labels)."
        )


def _check_map(conditioning: ConditioningConfig, files: Files) -> None:
    section, given = conditioning.semantic_map, files.get("semantic_map")
    if section is None or not isinstance(given, GivenMap):
        return
    unknown = given.values[(given.values >= section.num_labels) & (given.values != UNLABELLED)]
    if unknown.size:
        raise ConfigError(
            f"{given.url} has the label {int(unknown[0])}; this model knows 0 .. {section.num_labels - 1} "
            f"(conditioning.semantic_map.num_labels), and {UNLABELLED} for none."
        )


def _told_sizes(conditioning: ConditioningConfig, wishes: Wishes, size: tuple[int, int]) -> Tensor | None:
    """The field `size` [6] that the user asks for: original, corner of the crop, target."""
    if conditioning.image_size is None:
        return None
    return torch.tensor(
        [*(wishes.original_size or size), *(wishes.crop or (0, 0)), *(wishes.target_size or size)]
    )


def read_layout(url: str, max_boxes: int) -> Tensor:
    """float32 [boxes, 5]: label, x0, y0, x1, y1, as the field `layout` of the shards' json is read.

    Raises:
        ConfigError: not such a list, or no box of it can be seen.
    """
    try:
        found = json.loads(read_text(url))
    except NotFound as error:
        raise ConfigError(f"there is no layout file {url}.") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{url} is not JSON: {error}.") from error
    rows = found.get("layout") if isinstance(found, dict) else found
    if not isinstance(rows, list) or not rows or not all(_is_box(row) for row in rows):
        raise ConfigError(
            f"{url} must hold a list of [label, x0, y0, x1, y1] with a whole label and corners between 0 and "
            "1, x0 < x1 and y0 < y1."
        )
    if len(rows) > max_boxes:
        raise ConfigError(f"{url} has {len(rows)} boxes and the model knows {max_boxes}; leave some out.")
    boxes = order_boxes(rows)
    if not boxes:
        raise ConfigError(f"all boxes of {url} are thinner than training keeps them; make one larger.")
    return torch.tensor(boxes, dtype=torch.float32)


def _is_box(row: Any) -> bool:
    if not isinstance(row, list) or len(row) != 5:
        return False
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e9 for v in row):
        return False
    label, x0, y0, x1, y1 = row
    return label >= 0 and label == int(label) and 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1


def _rows(wishes: Wishes) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """N captions and N labels: prompt by prompt, a single one goes with all of the others."""
    prompts: Sequence[str] = wishes.prompts or ("",)
    labels: Sequence[int] = wishes.class_labels
    n = max(len(prompts), len(labels))
    for given, flag in ((prompts, "--prompt"), (labels, "--class-label")):
        if len(given) not in (0, 1, n):
            raise ConfigError(
                f"{flag} is given {len(given)} times for {n} pictures; give it once, or {n} times."
            )
    captions = tuple(prompts[i % len(prompts)] for i in range(n) for _ in range(wishes.per_prompt))
    if not labels:
        return captions, None
    return captions, tuple(labels[i % len(labels)] for i in range(n) for _ in range(wishes.per_prompt))


def _read_files(wishes: Wishes, max_pixels: int) -> dict[str, GivenPicture | GivenMap]:
    found: dict[str, GivenPicture | GivenMap] = {}
    for name in ("image", "mask", "semantic_map", "depth"):
        url = getattr(wishes, name)
        if url is None:
            continue
        try:
            if name in ("image", "mask"):
                found[name] = read_picture(url, max_pixels)
            else:
                found[name] = read_map(url, max_pixels, labels=name == "semantic_map")
        except NotFound as error:
            raise ConfigError(f"there is no picture {url}; check --{name.replace('_', '-')}.") from error
    return found


def _pixels(files: Files, name: str, size: tuple[int, int] | None) -> Tensor:
    """uint8 [3, H, W], whole or cropped to a size."""
    picture = files[name]
    assert isinstance(picture, GivenPicture)
    pixels = picture.pixels if size is None else picture.cropped(size)
    return torch.tensor(pixels).permute(2, 0, 1).contiguous()


def _maps(files: Files, size: tuple[int, int]) -> dict[str, Tensor]:
    """Labels uint8 [H, W] and depths float32 [1, H, W], in the ranges in which the loader gives them."""
    made = {}
    for name in ("semantic_map", "depth"):
        given = files.get(name)
        if isinstance(given, GivenMap):
            values = torch.tensor(given.cropped(size))
            made[name] = values if name == "semantic_map" else (2.0 * values - 1.0).unsqueeze(0)
    return made


def _picture(
    config: Config, wishes: Wishes, files: Files, size: tuple[int, int], n: int
) -> tuple[Tensor | None, StartingPicture | None, tuple[Tensor, Tensor] | None]:
    """Pixels for a model with mask channels, or a start for any other; and what inpainting keeps."""
    if "image" not in files or config.conditioning.low_resolution is not None:
        return None, None, None
    picture = _pixels(files, "image", size)
    pixels = _repeat(to_unit_range(picture), n)
    if "mask" not in files:
        return None, StartingPicture(pixels, wishes.strength or IMAGE_TO_IMAGE_STRENGTH), None
    mask = _mask(files, size)
    strength = wishes.strength or 1.0
    if config.conditioning.masked_image is None:
        return None, StartingPicture(pixels, strength, _repeat(mask, n)), (picture, mask)
    start = StartingPicture(pixels, strength) if strength < 1.0 else None
    return pixels, start, (picture, mask)


def _mask(files: Files, size: tuple[int, int]) -> Tensor:
    """bool [1, H, W], True where the picture is to be made."""
    picture, given = files["image"], files["mask"]
    assert isinstance(given, GivenPicture)
    if given.size != size and not _same_shape(given.size, picture.size):
        raise ConfigError(
            f"{given.url} is {given.size[1]} x {given.size[0]} pixels and {picture.url} "
            f"{picture.size[1]} x {picture.size[0]}, so the mask would not lie on the picture; give them the "
            "same shape."
        )
    mask = torch.tensor(given.brightness().cropped(size) >= 128).unsqueeze(0)
    if not mask.any():
        raise ConfigError(f"{given.url} is black everywhere: nothing is to be made; paint the hole white.")
    if mask.all() and given.transparent:
        raise ConfigError(
            f"{given.url} is white everywhere, since transparent parts count as white: nothing is kept; "
            "fill what is to stay with black."
        )
    return mask


def _same_shape(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether one is the other enlarged or shrunk, up to the rounding of its edges to whole pixels."""
    small, large = sorted((first, second))
    return abs(small[0] * large[1] - small[1] * large[0]) <= max(large)


def _size(config: Config, wanted: tuple[int, int] | None, files: Files) -> tuple[int, int]:
    """--size, or the size of the first given file cut to whole latent cells, or the training size."""
    factor, edge = config.first_stage.downsampling, config.data.image_size
    if wanted is not None:
        if min(wanted) < factor or wanted[0] % factor or wanted[1] % factor:
            raise ConfigError(
                f"--size {wanted[0]}x{wanted[1]} must be multiples of {factor}, the first stage's "
                "downsampling factor."
            )
        if wanted[0] * wanted[1] > config.data.max_image_pixels:
            raise ConfigError(
                f"--size {wanted[0]}x{wanted[1]} has more pixels than the run's data.max_image_pixels "
                f"{config.data.max_image_pixels}; choose a smaller one."
            )
        return wanted
    if not files:
        return edge, edge
    name, file = next(iter(files.items()))
    size = (file.size[0] // factor * factor, file.size[1] // factor * factor)
    if min(size) == 0:
        raise ConfigError(f"the {name.replace('_', ' ')} is smaller than one latent cell of {factor} pixels.")
    return size


def _repeat(value: Tensor, n: int) -> Tensor:
    return value.unsqueeze(0).expand(n, *value.shape)


def _title(caption: str, label: int | None) -> str:
    return ", ".join(part for part in (caption, "" if label is None else f"class {label}") if part)
