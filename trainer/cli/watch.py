"""`ldm evaluate watch`: an evaluator beside a run, on a machine or in a process of its own.

OUT/metrics.jsonl              a line per measured checkpoint: eval/* against samples_seen
OUT/samples/step_000001000.png the first of its pictures
RUN/checkpoints/keep/          its mark on the best ones, which the run then does not remove
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Sequence

from data_pipeline.storage.urls import join
from trainer.cli import sample, sample_series
from trainer.cli.fidelity import Measuring, add_measuring_arguments, check, figures, stored
from trainer.config.run import ConfigError
from trainer.distributed import collectives
from trainer.distributed.env import DistributedEnv
from trainer.evaluation.fidelity import Comparison
from trainer.evaluation.statistics import SetStatistics
from trainer.evaluation.survey import pictures_to_measure
from trainer.evaluator.findings import FOLDER
from trainer.evaluator.lookout import Rule, Sighting
from trainer.evaluator.watch import Watcher, WatchOptions
from trainer.generation.store import former_record
from trainer.launch.command import run_on_ranks
from trainer.launch.rank import die_with_launcher

WATCH_EXAMPLE = (
    "example: ldm evaluate watch s3://bucket/run --reference val.safetensors "
    "--sample '--count 5000 --prompts-from prompts.txt --steps 25'"
)
_OURS = ("--out", "--overwrite", "--checkpoint", "--ranks", "--share", "--tars")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, which pictures, against what, and what is kept."""
    parser.add_argument("source", metavar="RUN", help="run folder; it may be empty yet")
    parser.add_argument("--reference", required=True, metavar="PICTURES", help="as of `fidelity`")
    parser.add_argument(
        "--sample", required=True, metavar="OPTIONS", help="of `ldm sample`, as one text; --count at least"
    )
    parser.add_argument("--out", help="folder or URL (default: RUN/evaluation)")
    parser.add_argument(
        "--rule",
        choices=typing.get_args(Rule),
        default="newest",
        help="newest: pass over what is older when the next one is due; all: catch up (default: %(default)s)",
    )
    parser.add_argument(
        "--every", type=int, default=1, metavar="STEPS", help="only multiples of it, and the run's last"
    )
    parser.add_argument("--no-snapshots", action="store_true", help="checkpoints alone")
    parser.add_argument(
        "--best",
        type=int,
        default=1,
        metavar="N",
        help="that the run keeps (default: %(default)s)",
    )
    parser.add_argument("--best-metric", metavar="FIGURE", help="such as fid (default: the first figure)")
    parser.add_argument("--keep-pictures", action="store_true", help="after they were measured, too")
    parser.add_argument(
        "--poll-s", type=float, default=60.0, metavar="SECONDS", help="between looks (default: %(default)s)"
    )
    parser.add_argument("--once", action="store_true", help="end when nothing is left to measure")
    parser.add_argument("--ranks", type=int, default=0, help="local processes (default: one per visible GPU)")
    add_measuring_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Watch until the last step of the run is measured, or found not to be measurable."""
    die_with_launcher()
    out = _checked(args)
    return run_on_ranks(args.command_line, args.ranks, lambda env: _watch(args, out, env))


def check_words(run_dir: str, words: Sequence[str]) -> None:
    """Raises ConfigError: what is wrong with a command that another process will give."""
    parser = argparse.ArgumentParser(prog="ldm evaluate watch")
    add_arguments(parser)
    args = parser.parse_args([run_dir, *words])
    args.command = "watch"
    _checked(args)


def _checked(args: argparse.Namespace) -> str:
    """Its folder; raises ConfigError for what can be wrong without a look at anything."""
    for place, what in ((args.source, "RUN"), (args.out, "--out")):
        if place is not None and not place.strip():
            raise ConfigError(f"{what} is empty (a variable that is not set?); name a folder.")
    out = args.out or join(args.source, FOLDER)
    args.out, args.save_reference = None, None
    check(args)
    _check(args)
    sample.check_series(_drawing(args, args.source, out))
    return out


def _watch(args: argparse.Namespace, out: str, env: DistributedEnv) -> None:
    real = stored(args.reference)
    measuring = Measuring(args, [real] if real else [], env.device)
    if args.best_metric is not None:
        measuring.check_figure(args.best_metric)
    real = real or measuring.statistics(pictures_to_measure(args.reference), reference=True)

    def draw(sighting: Sighting, folder: str) -> None:
        drawing = _drawing(args, sighting.url, folder)
        drawing.overwrite = collectives.from_main_rank(lambda: _in_other_batches(drawing, folder))
        sample_series.make(drawing, env)

    def measure(folder: str) -> Comparison | None:
        made = measuring.statistics(pictures_to_measure(folder))
        return collectives.from_main_rank(lambda: _figures(args, made, real, env))

    options = WatchOptions(
        run_dir=args.source,
        out=out,
        rule=args.rule,
        every=args.every,
        snapshots=not args.no_snapshots,
        best=args.best,
        best_metric=args.best_metric,
        keep_pictures=args.keep_pictures,
        poll_s=args.poll_s,
        once=args.once,
        measured_by={
            "networks": measuring.networks,
            "image_size": args.image_size,
            "fit": args.fit or "crop",
            "reference": real.record.pictures if real is not None else None,
            "reference_content": real.content() if real is not None else None,
            "sample": args.sample,
        },
        same_pictures=sample.same_pictures,
    )
    Watcher(options, draw, measure).run()


def _figures(
    args: argparse.Namespace, made: SetStatistics | None, real: SetStatistics | None, env: DistributedEnv
) -> Comparison:
    """On rank 0, which has the statistics."""
    assert made is not None
    assert real is not None
    return figures(args, made, real, env.device)


def _drawing(args: argparse.Namespace, source: str, folder: str) -> argparse.Namespace:
    """What `ldm sample` is to do for one checkpoint."""
    return sample.arguments(source, args.sample, ["--out", folder], _OURS, "ldm evaluate watch")


def _in_other_batches(drawing: argparse.Namespace, folder: str) -> bool:
    """Whether an earlier start has begun this set in batches of another size, whose parts are others."""
    begun = former_record(folder) if drawing.batch_size is not None else None
    return begun is not None and begun.get("batch_size") != drawing.batch_size


def _check(args: argparse.Namespace) -> None:
    for option, value, least in (("--every", args.every, 1), ("--best", args.best, 0)):
        if value < least:
            raise ConfigError(f"{option} {value} must be at least {least}.")
    if not 0.0 < args.poll_s < 1e6:
        raise ConfigError(f"--poll-s {args.poll_s:g} must lie above 0 and below a million seconds.")
    if args.source.endswith(".safetensors"):
        raise ConfigError(f"{args.source} is a file that does not change; name a run folder to watch.")
