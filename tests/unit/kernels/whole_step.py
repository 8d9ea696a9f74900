"""Run as a process of its own with TRITON_INTERPRET=1: what one optimizer step of `ldm train` dispatches.

Real parts throughout, small ones: SD2's recipe with the first stage, the text tower, the UNet, DeepSpeed's
ZeRO-1 in bf16, AdamW and the averages. Two things are a GPU's: the fused kernels, which the interpreter runs
on tensors of the CPU, and the fused AdamW, which torch has for CPUs as well. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipeline.batch import Batch
from trainer.config.io import load_config
from trainer.config.run import Config
from trainer.distributed import adamw
from trainer.distributed.env import DistributedEnv, initialise, shutdown
from trainer.ema import EMA
from trainer.first_stage.build import build_first_stage, first_stage_tensors
from trainer.kernels.language import INTERPRETED
from trainer.metrics.timer import StartTimer, StepTimer
from trainer.stages.build import build_stage
from trainer.stages.diffusion import DiffusionStage
from trainer.weights import write_weights

ROOT = Path(__file__).resolve().parents[3]
ROWS, MICRO_BATCHES = 2, 2
HEIGHT, WIDTH = 24, 16
"""In pixels: 3 : 2 on every level, as no kernel is, no head and no matrix of scores."""
LATENT_CHANNELS = 4
"""Latents and their noise are drawn channels-first, and turned once as they enter the UNet."""
SMALL = (
    "data.image_size=16",
    "unet={model_channels: 16, channel_multipliers: [1, 2], num_res_blocks: 1, attention_factors: [2], "
    "head_dim: 8, num_groups: 4}",
    "first_stage.base_channels=8",
    "first_stage.channel_multipliers=[1,2]",
    "first_stage.num_res_blocks=1",
    "conditioning.openclip={model: ViT-B-32, pretrained: random, width: 32, layers: 2, heads: 2, "
    "context_length: 8}",
    f"global_batch_size={ROWS * MICRO_BATCHES}",
    f"micro_batch_size={ROWS}",
)


class LayoutWatch(TorchDispatchMode):
    """Notes feature maps that do not lie channels-last, and copies from one layout into another."""

    def __init__(self, is_map: Callable[[object], TypeGuard[Tensor]]) -> None:
        super().__init__()
        self._is_map = is_map
        self.maps = 0
        """Feature maps met, however they lie."""
        self.channels_first: list[str] = []
        self.layout_copies: list[str] = []

    def look(self, name: str, args: Sequence[Any], result: Any, *, where: str = "") -> None:
        """At one operation."""
        for value in filter(self._is_map, tree_leaves(result)):
            self.maps += 1
            # Slices of a channels-last map are no maps in memory, and neither contiguous nor channels-last.
            if value.is_contiguous() and not lies_channels_last(value):
                self.channels_first.append(f"{where}{name} {tuple(value.shape)}")
        if "clone" in name or "_to_copy" in name or "copy_" in name:
            source = args[1] if "copy_" in name else args[0]
            if self._is_map(source) and lies_channels_last(source) != lies_channels_last(result):
                self.layout_copies.append(f"{where}{name} {tuple(source.shape)}")


class Seen(LayoutWatch):
    """What is dispatched in each phase of a step, too."""

    def __init__(self) -> None:
        super().__init__(is_feature_map)
        self.phase = "rest"
        self.found: dict[str, Counter[str]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result, name = func(*args, **(kwargs or {})), str(func)
        self.found.setdefault(self.phase, Counter())[name] += 1
        self.look(name, args, result, where=f"{self.phase} ")
        return result


class Phases(StepTimer):
    """Tells the mode which phase begins, as it tells the log."""

    def __init__(self, seen: Seen) -> None:
        super().__init__(torch.device("cpu"))
        self._seen = seen

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """See StepTimer."""
        before, self._seen.phase = self._seen.phase, phase
        with super().__call__(phase):
            yield
        self._seen.phase = before


def is_feature_map(value: object) -> TypeGuard[Tensor]:
    return (
        isinstance(value, Tensor)
        and value.dim() == 4
        and value.shape[0] == ROWS
        and value.shape[1] > LATENT_CHANNELS
        and value.shape[2] * WIDTH == value.shape[3] * HEIGHT
    )


def lies_channels_last(value: Tensor) -> bool:
    return value.is_contiguous(memory_format=torch.channels_last)


def make_batch() -> Batch:
    drawn = torch.Generator().manual_seed(0)
    rows = ROWS * MICRO_BATCHES
    pixels = torch.randint(0, 256, (rows, HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=drawn)
    captions = tuple(f"a picture of number {i // 2}" for i in range(rows))  # some repeat
    return Batch(
        pixels.permute(0, 3, 1, 2), captions, {}, captions, torch.arange(rows) + 7, torch.arange(rows), {}
    )


def count(config: Config, env: DistributedEnv) -> dict[str, Any]:
    """Of the second step: what is made once has been made."""
    torch.manual_seed(0)
    seen = Seen()
    stage = build_stage(config, env, Phases(seen), StartTimer(), None).stage
    assert isinstance(stage, DiffusionStage)
    engine = stage.engines["unet"]
    for fragment in engine.fragments():  # zeroed outputs would hide everything behind them
        fragment.master.add_(0.01)
    engine.refresh()
    ema = EMA(config.ema, engine.fragments())
    losses: list[Tensor] = []
    for step in range(2):
        batch = make_batch().to(env.device)
        if step == 0:
            losses.append(stage.train_step(batch, step, 1e-3)["loss"])
            ema.update(step + 1)
            continue
        with seen:
            losses.append(stage.train_step(batch, step, 1e-3)["loss"])
            seen.phase = "average"
            ema.update(step + 1)
    return {
        "losses": [float(loss) for loss in losses],
        "maps": seen.maps,
        "channels_first": seen.channels_first,
        "layout_copies": seen.layout_copies,
        "found": seen.found,
    }


def main(folder: Path) -> None:
    assert INTERPRETED
    torch.set_num_threads(1)
    config = load_config(str(ROOT / "configs/sd/sd2_base_512.yaml"), SMALL)
    weights = str(folder / "first_stage.safetensors")
    torch.manual_seed(1)
    write_weights(weights, *first_stage_tensors(build_first_stage(config.first_stage)))
    config = load_config(
        str(ROOT / "configs/sd/sd2_base_512.yaml"), [*SMALL, f"first_stage.weights={weights}"]
    )
    build, gpu = adamw.build_adamw, torch.device("cuda")
    adamw.build_adamw = lambda groups, settings, device: build(groups, settings, gpu)
    env = DistributedEnv.detect({})
    initialise(env, timeout_s=60.0)
    print(json.dumps(count(config, env)))
    shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
