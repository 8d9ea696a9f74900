"""What a run costs until its first step is made, and before it can make one again after a fault.

    python benchmarks/start.py                               # this checkout, with the doctor and without
    python benchmarks/start.py --against ../other --ranks 2  # in turns with another one, and the ratio

`ldm train` with a network that takes no time, ZeRO-1 in bf16, one optimizer step, shards on a local disk:
what is left is imports, checks, process group and engine. Told are a processor's seconds of all processes,
which other work on the machine hardly moves, and the log's seconds from the start of rank 0.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from data_pipeline.tools.scenes.scene import SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize

ROOT = Path(__file__).resolve().parent.parent
RUN = """
steps: 1
global_batch_size: 8
micro_batch_size: 2
data: {image_size: 16, workers: 1}
first_stage: {name: identity, latent_channels: 3}
unet: {model_channels: 32, channel_multipliers: [1], num_res_blocks: 1, head_dim: 16, attention_factors: []}
sampling: {every: 0}
logging: {wandb: disabled, progress_bar: false}
"""
FIRST_STEP = re.compile(r"first step after ([\d.]+) s")


def start(tree: Path, folder: Path, ranks: int, doctor: bool) -> tuple[float, float]:
    """(a processor's seconds of all processes, seconds from the start of rank 0 to its first step)"""
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        settings = [f"run_dir={run_dir}", f"data.shards={folder}/shards/*.tar", f"distributed.ranks={ranks}"]
        settings.append(f"distributed.doctor={str(doctor).lower()}")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "trainer", "train", str(folder / "run.yaml"), *settings],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = FIRST_STEP.search(done.stdout + done.stderr)
    if done.returncode or told is None:
        raise SystemExit(f"{tree}: code {done.returncode}\n{done.stderr[-3000:]}")
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return processor, float(told.group(1))


def main() -> None:
    """Print a line per checkout, with the doctor and without."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="another checkout, measured in turns with this one")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    trees = {"here": ROOT} | ({"there": args.against.resolve()} if args.against else {})
    measured: dict[tuple[str, bool], list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "run.yaml").write_text(RUN)
        scene = SceneOptions(min_edge=24, max_edge=40)
        list(synthesize(str(folder / "shards"), SynthesisOptions(64, samples_per_shard=32, scene=scene)))
        for turn in range(args.repeats + 1):
            for key in ((tree, doctor) for doctor in (False, True) for tree in trees):
                found = start(trees[key[0]], folder, args.ranks, doctor=key[1])
                if turn:  # the first one warms the disk's cache, and writes bytecode
                    measured[key].append(found)
    for (tree, doctor), values in measured.items():
        processor, seconds = ([value[i] for value in values] for i in (0, 1))
        words = [
            f"{statistics.median(each):6.1f} ({min(each):.1f} - {max(each):.1f})"
            for each in (processor, seconds)
        ]
        print(
            f"{args.ranks} ranks, {'with' if doctor else 'without'} the doctor, {tree}: "
            f"a processor's seconds {words[0]}, to the first step {words[1]}"
        )


if __name__ == "__main__":
    main()
