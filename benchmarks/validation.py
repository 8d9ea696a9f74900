"""What measuring held-out samples costs beside training: the real pass and the real step, taking turns.

    python benchmarks/validation.py                      # the demo's UNet on pixels, half a minute
    python benchmarks/validation.py --config configs/sd/sd2_base_256.yaml data.shards=... run_dir=...

Both in one process; the first turn of each is thrown away. On a CPU it is processor time, which other
programs on the machine hardly change, with reading and decoding; on a GPU wall time. Printed are the pass in
training steps, and what `trainer/validation.py:cost` says of it in the log: three forward passes a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from trainer.assembly import build_run
from trainer.config.io import load_config
from trainer.distributed.env import DistributedEnv, initialise, shutdown
from trainer.reliability.watchdog import Watchdog
from trainer.run import Run
from trainer.validation import cost, validate

STEPS = 4
"""Of a turn."""

SMALL = [
    "data={image_size: 16, workers: 0, allow_enlarging: true}",
    "first_stage.name=identity",
    "unet={model_channels: 64, channel_multipliers: [1, 1], num_res_blocks: 1, attention_factors: [2], "
    "head_dim: 32}",
    "global_batch_size=16",
    "micro_batch_size=16",
    "distributed={engine: torch, precision: fp32, watchdog_s: 0}",
    "logging={wandb: disabled, progress_bar: false}",
]
"""The demo's UNet."""
MEASURED = ["data.validation.share=0.3", "validation={every: 300, samples: 64, timesteps: 4, raw: false}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="configuration; unset: a small one with shards of its own")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    args = parser.parse_args()
    env = initialise(DistributedEnv.detect(), timeout_s=600.0)
    with tempfile.TemporaryDirectory() as folder:
        settings = [*MEASURED, *args.overrides]
        if args.config is None:
            list(synthesize(f"{folder}/shards", SynthesisOptions(samples=400, samples_per_shard=200)))
            settings = [*SMALL, f"data.shards={folder}/shards/*.tar", f"run_dir={folder}/run", *settings]
        run = build_run(load_config(args.config, settings), env)
        try:
            measure(run, args.turns)
        finally:
            run.close()
    shutdown()


def measure(run: Run, turns: int) -> None:
    """Print the medians and ranges, in training steps."""
    batches = run.open_loader()
    device = run.env.device
    steps, passes, ratios = [], [], []

    def steps_of_a_turn() -> None:
        for _ in range(STEPS):
            run.stage.train_step(next(batches).to(device), run.state.step, 1e-4)

    for turn in range(turns + 1):
        one = timed(steps_of_a_turn, device) / STEPS
        whole = timed(lambda: validate(run, Watchdog(0)), device)
        if turn:
            steps.append(one)
            passes.append(whole)
            ratios.append(whole / one)
    batches.close()
    assert run.held_out is not None
    print(
        json.dumps(
            {
                "step_s": statistics.median(steps),
                "pass_s": statistics.median(passes),
                "pass_in_steps": [round(ratio, 2) for ratio in sorted(ratios)],
                "said": cost(run.config, len(run.held_out)),
            },
            indent=1,
        )
    )


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the processor, or of a GPU by the wall clock."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type != "cpu":
        torch.cuda.synchronize(device)
    began = clock()
    work()
    if device.type != "cpu":
        torch.cuda.synchronize(device)
    return clock() - began


if __name__ == "__main__":
    main()
