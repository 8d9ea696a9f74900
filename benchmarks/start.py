"""What a run costs until its first step is made, and before it can make one again after a fault.

    python benchmarks/start.py                               # this checkout, with the doctor and without
    python benchmarks/start.py --against ../other --ranks 2  # in turns with another one, and the ratio

`ldm train` with a network that takes no time, ZeRO-1 in bf16, one optimizer step, shards on a local disk:
what is left is imports, checks, process group and engine. Told are a processor's seconds of all processes,
which other work on the machine hardly moves, and the seconds from the start of rank 0 to its first step.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from index_scale import ROOT, start

from data_pipeline.tools.scenes.scene import SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize

SETTINGS = (
    "distributed={engine: deepspeed, zero_stage: 1, precision: bf16}",
    "global_batch_size=8",
    "micro_batch_size=2",
)


def measure(tree: Path, shards: str, ranks: int, doctor: bool) -> tuple[float, float]:
    """(a processor's seconds of all processes, seconds from the start of rank 0 to its first step)"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = sum(start(shards, ranks, doctor, *SETTINGS, tree=tree).values())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, seconds


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
    measured: dict[tuple[bool, str], list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        scene = SceneOptions(min_edge=40, max_edge=48)
        list(synthesize(folder, SynthesisOptions(64, samples_per_shard=32, scene=scene)))
        for turn in range(args.repeats + 1):
            for key in ((doctor, tree) for doctor in (False, True) for tree in trees):
                found = measure(trees[key[1]], f"{folder}/*.tar", args.ranks, key[0])
                if turn:  # the first one warms the disk's cache, and writes bytecode
                    measured[key].append(found)
    for index, what in enumerate(("a processor's seconds", "seconds to the first step")):
        for doctor in (False, True):
            medians = []
            for tree in trees:
                values = [found[index] for found in measured[doctor, tree]]
                medians.append(statistics.median(values))
                words = f"{medians[-1]:6.1f} ({min(values):.1f} - {max(values):.1f})"
                how = f"{args.ranks} ranks, {'with' if doctor else 'without'} the doctor, {tree}"
                print(f"{how}: {what} {words}")
            if len(medians) == 2:
                print(f"    here over there {medians[0] / medians[1]:.2f}")


if __name__ == "__main__":
    main()
