"""Do pictures show what they were asked for, more than what others were asked for?

    python experiments/conditioning.py --out /tmp/experiments

Prompts, class labels and semantic maps, one model each per seed. The same pictures are judged twice: against
their own condition, and against that of another picture ("shuffled"), which is what chance gives.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping

from lab.experiment import Experiment, Figure, Figures, run
from lab.maps import MAP_MODEL, draw_maps, map_agreement
from lab.oracle import PROMPTS, accuracy, prompted
from lab.workshop import CONSTANT, Workshop

from data_pipeline.tools.scenes.judge import EvaluationPrompt, evaluation_prompts
from data_pipeline.tools.scenes.scene import COLORS, SHAPES

CLASS_MODEL = ("conditioning={openclip: null, class_label: {num_classes: 18, width: 128}}",)
SHUFFLED = " shuffled"
KINDS = ("text", "text shuffled", "class", "class shuffled", "map", "map shuffled")
GUIDANCE = "3"


def measure(workshop: Workshop, seed: int, setting: str) -> Mapping[int, Figures]:
    """What the oracle reads from the pictures of one kind of condition."""
    kind = setting.removesuffix(SHUFFLED)
    shift = 1 if setting.endswith(SHUFFLED) else 0
    folder = workshop.folder / "conditioning" / f"seed_{seed}_{kind.replace(' ', '_')}"
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


def shuffled(asked: list[EvaluationPrompt], count: int) -> list[EvaluationPrompt]:
    """For `count` pictures, asked for in turn: the prompts of others, drawn at random."""
    others = [asked[number % len(asked)] for number in range(count)]
    random.Random(0).shuffle(others)
    return others


EXPERIMENT = Experiment(
    name="conditioning",
    question=__doc__,
    settings=KINDS,
    measure=measure,
    axis="condition, and against what the pictures are judged",
    figures=(
        Figure(
            "Text and class: share of pictures", ("colour", "shape", "oracle"), "setting", KINDS[:4], False
        ),
        Figure(
            "Map: share of pixels, overlap of the object", ("agreement", "iou"), "setting", KINDS[4:], False
        ),
    ),
)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT))
