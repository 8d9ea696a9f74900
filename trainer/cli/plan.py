"""Say what a run will need on so many GPUs: memory per rank, seconds per step, data, checkpoints, days.

Everything that can be counted is counted on the meta device; the rest is a model with few terms, whose
formulas and residuals are in docs/planning.md. Of a run with phases, each is planned by itself. Exit code 1
where one does not fit the GPU's memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence

from trainer.config.io import load_config
from trainer.config.run import Config
from trainer.planning.machine import GPUS, machine
from trainer.planning.plan import Feed, RunPlan, describe, make_plan

EXAMPLE = "example: ldm plan configs/sd/sd2_base_512.yaml --gpus 512 --gpu a100-80 micro_batch_size=4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and overrides, the machine, and what the data is like."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that win over the file")
    parser.add_argument("--gpus", type=int, required=True, help="how many")
    parser.add_argument("--gpu", required=True, metavar="GPU", help=f"which: {', '.join(GPUS)}")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N")
    parser.add_argument(
        "--network", type=float, default=0.0, metavar="GBIT_S", help="of a node (default: usual for the GPU)"
    )
    parser.add_argument(
        "--launch-us", type=float, default=20.0, metavar="US", help="the processor's time for one launch"
    )
    parser.add_argument("--sample-kb", type=float, default=100.0, metavar="KB", help="of a sample in a shard")
    parser.add_argument("--shard-samples", type=int, default=10_000, metavar="N", help="samples of a shard")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")


def run(args: argparse.Namespace) -> int:
    """Print one screen or one JSON object."""
    config = load_config(args.config, args.overrides)
    place = machine(
        args.gpu,
        args.gpus,
        gpus_per_node=args.gpus_per_node,
        network_gbit_s=args.network,
        launch_us=args.launch_us,
    )
    feed = Feed(1e3 * args.sample_kb, args.shard_samples)
    planned = [make_plan(phase, place, feed) for phase in config.apart()]
    if args.json:
        figures = [{**each.figures(), "steps": each.config.steps} for each in planned]
        print(json.dumps({"phases": figures} if config.phases else planned[0].figures()))
    else:
        print("\n\n".join(_of_phases(config, planned)))
    return 0 if all(each.device_bytes <= each.limit_bytes for each in planned) else 1


def _of_phases(config: Config, planned: Sequence[RunPlan]) -> Iterator[str]:
    """A screen for each phase, and what they take together."""
    if not config.phases:
        yield describe(planned[0])
        return
    for first, each in zip(config.phase_starts, planned, strict=True):
        size, batch = each.config.data.image_size, each.config.global_batch_size
        yield f"from step {first:,}: {size} px, {batch:,} samples a step\n{describe(each)}"
    hours = [each.hours for each in planned if each.hours is not None]
    if len(hours) == len(planned):
        together = f"{sum(hours) / 24:.2f} days for {config.steps:,} steps"
        yield f"all phases   {together}, {sum(hours) * planned[0].machine.gpus:,.0f} GPU-hours"
