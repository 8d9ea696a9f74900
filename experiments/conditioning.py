"""Do pictures show what they were asked for, more than what others were asked for?

    python experiments/conditioning.py --out /tmp/experiments

Prompts, class labels, layouts, semantic maps, depths, small pictures and pictures with a hole, one model each
per seed; layouts take three times as many steps, the last three half as many. The same pictures are judged
twice: against their own condition, and against that of another picture ("shuffled"), which is what chance
gives. Enlarged pictures are compared with bicubic interpolation, and once more after the low frequencies of
what was given are put into them ("constrained").
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from lab.experiment import Experiment, Figure, Figures, run
from lab.maps import MAP_MODEL, draw_maps, map_agreement
from lab.oracle import PROMPTS, accuracy, prompted
from lab.tasks import TASKS, DrawnScene, draw_scenes, enlarged, read_all, shrunk, truth, with_low_frequencies
from lab.workshop import CONSTANT, Workshop
from numpy.typing import NDArray

from data_pipeline.tools.scenes.judge import EvaluationPrompt, evaluation_prompts
from data_pipeline.tools.scenes.scene import COLORS, SHAPES

CLASS_MODEL = ("conditioning={openclip: null, class_label: {num_classes: 18, width: 128}}",)
SHUFFLED = " shuffled"
LOW_FREQUENCIES, BICUBIC = "super-resolution constrained", "bicubic"
ASKED = ("text", "text shuffled", "class", "class shuffled")
PLACED = ("layout", "layout shuffled", "map", "map shuffled", "depth", "depth shuffled")
ENLARGED = (BICUBIC, "super-resolution", LOW_FREQUENCIES, "super-resolution shuffled")
FILLED = ("inpainting", "inpainting shuffled")
GUIDANCE = "3"
"""Of conditions that are dropped in training."""


def measure(workshop: Workshop, seed: int, setting: str) -> Mapping[int, Figures]:
    """What the oracle reads from the pictures of one kind of condition."""
    kind = setting.removesuffix(SHUFFLED)
    shift = 1 if setting.endswith(SHUFFLED) else 0
    folder = workshop.folder / "conditioning" / f"seed_{seed}_{kind.replace(' ', '_')}"
    if kind in TASKS or kind in ENLARGED:
        return _of_task(workshop, seed, kind, shift)
    if kind == "map":
        model = workshop.second_stage("map", seed, (*CONSTANT, *MAP_MODEL))
        return {workshop.scale.steps: map_agreement(draw_maps(workshop, model, folder, 32, seed), shift)}
    seeded = ("--guidance", GUIDANCE, "--seed", str(seed))
    if kind == "text":
        asked = evaluation_prompts(PROMPTS)
        pictures = workshop.draw(workshop.base(seed), folder, *prompted(workshop.folder), *seeded)
    else:
        asked = [EvaluationPrompt("", color, shape, "") for color in COLORS for shape in SHAPES]
        model = workshop.second_stage("class", seed, (*CONSTANT, *CLASS_MODEL))
        pictures = workshop.draw(model, folder, *seeded)
    return {
        workshop.scale.steps: accuracy(pictures, shuffled(asked, workshop.scale.pictures) if shift else asked)
    }


def _of_task(workshop: Workshop, seed: int, kind: str, shift: int) -> Mapping[int, Figures]:
    name = kind if kind in TASKS else "super-resolution"
    task = TASKS[name]
    steps = round(workshop.scale.steps * task.share)
    shards = (f"data.shards={workshop.shards(task.radius)}/*.tar",)
    model = workshop.second_stage(name.replace("-", "_"), seed, (*CONSTANT, *task.model, *shards), steps)
    guided = ("--guidance", GUIDANCE) if name == "layout" else ()
    folder = workshop.folder / "conditioning" / f"seed_{seed}_{name.replace('-', '_')}"
    drawn = draw_scenes(workshop, task, model, folder, "--seed", str(seed), *guided)
    if kind == BICUBIC:
        drawn = [replace(each, pictures=(enlarged(shrunk(truth(each.scene))),)) for each in drawn]
    if kind == LOW_FREQUENCIES:
        drawn = [replace(each, pictures=_constrained(each)) for each in drawn]
    return {steps: read_all(task, drawn, shift)}


def _constrained(drawn: DrawnScene) -> tuple[NDArray[np.uint8], ...]:
    small = shrunk(truth(drawn.scene))
    return tuple(with_low_frequencies(picture, small) for picture in drawn.pictures)


def shuffled(asked: list[EvaluationPrompt], count: int) -> list[EvaluationPrompt]:
    """For `count` pictures, asked for in turn: the prompts of others, drawn at random."""
    others = [asked[number % len(asked)] for number in range(count)]
    random.Random(0).shuffle(others)
    return others


EXPERIMENT = Experiment(
    name="conditioning",
    question=__doc__,
    settings=(*ASKED, *PLACED, *ENLARGED, *FILLED),
    measure=measure,
    axis="condition, and against what the pictures are judged",
    figures=(
        Figure("Text, class: share of pictures", ("colour", "shape", "oracle"), "setting", ASKED, False),
        Figure("Place: overlap of boxes, of pixels", ("box", "iou"), "setting", PLACED, False),
        Figure("Enlarged: PSNR, dB, at 32 and 8 px", ("psnr", "small psnr"), "setting", ENLARGED, False),
        Figure("Filled: share of pixels", ("untouched", "inside"), "setting", FILLED, False),
    ),
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT))
