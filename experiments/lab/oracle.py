"""What pictures show, read from their pixels, against what was asked for."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.tools.scenes.judge import EvaluationPrompt, evaluation_prompts, judge
from lab.workshop import Workshop

PROMPTS = 54
"""Every colour, shape and background once."""


def prompted(folder: Path) -> tuple[str, str]:
    """Options of `ldm sample` for the prompts that pictures are asked for in turn."""
    path = folder / "prompts.txt"
    if not path.exists():
        path.write_text("".join(f"{prompt.prompt}\n" for prompt in evaluation_prompts(PROMPTS)))
    return "--prompts-from", str(path)


def judged(workshop: Workshop, source: Path, out: Path, *options: str) -> dict[str, float]:
    """Oracle and fidelity of what a model draws for the prompts, with these options of `ldm sample`."""
    pictures = workshop.draw(source, out, *prompted(workshop.folder), *options)
    return accuracy(pictures) | workshop.fidelity(pictures)


def accuracy(pictures: Path, asked: Sequence[EvaluationPrompt] | None = None) -> dict[str, float]:
    """Shares of pictures with the colour, the shape, and both that their prompts name.

    Args:
        pictures: folder of `ldm sample`.
        asked: prompts, taken in turn; unset: those of `prompted`.
    """
    asked = asked or evaluation_prompts(PROMPTS)
    verdicts = [
        judge(pixels_of(path).transpose(2, 0, 1), asked[number % len(asked)])
        for number, path in enumerate(sorted(pictures.iterdir()))
    ]
    return {
        "colour": statistics.fmean(v.color_correct for v in verdicts),
        "shape": statistics.fmean(v.shape_correct for v in verdicts),
        "oracle": statistics.fmean(v.color_correct and v.shape_correct for v in verdicts),
    }


def pixels_of(path: Path) -> NDArray[np.uint8]:
    """[H, W, 3]."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))
