"""Make, look at and index shards."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.config import RANGE, DataConfig, HeldOutConfig
from data_pipeline.errors import DataError
from trainer.config.io import load_config
from trainer.console import progress_bar, say

if TYPE_CHECKING:
    from tqdm import tqdm

EXAMPLE = "example: ldm data synthesize s3://bucket/shards --samples 1000"

_SHEET = "contact_sheet.png"
_MAPS = "also write <key>.seg.png and <key>.depth.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command per task; each sets `func(args) -> int`."""
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_synthesize(subparsers)
    _add_inspect(subparsers)
    _add_index(subparsers)
    _add_trace(subparsers)
    _add_explain(subparsers)
    _add_purge(subparsers)


def run(args: argparse.Namespace) -> int:
    """Hand over to the sub-command."""
    return int(args.func(args))


def _parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], name: str, about: str, example: str
) -> argparse.ArgumentParser:
    return subparsers.add_parser(
        name,
        help=about,
        description=about,
        epilog=f"example: {example}",
    )


def _take_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="changes to the configuration")


def _add_synthesize(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _parser(
        subparsers,
        "synthesize",
        "Write img2dataset-layout shards of procedurally drawn, captioned scenes with ground truth.",
        "ldm data synthesize s3://scenes/train --samples 20000 --seed 1 --size 160:320 --objects 1:3",
    )
    parser.add_argument("url", help="folder to write to, any URL")
    parser.add_argument("--samples", type=int, required=True, help="rows in total")
    parser.add_argument("--seed", type=int, default=0, help="everything is a function of it")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="rows per tar (at most 10000)")
    parser.add_argument("--size", default="160:320", metavar="A[:B]", help="range of the edges in pixels")
    objects = parser.add_mutually_exclusive_group()
    objects.add_argument("--objects", default="1:3", metavar="A[:B]", help="range of the number of objects")
    objects.add_argument(
        "--max-objects", type=int, metavar="N", help="most objects per scene (same as --objects 1:N)"
    )
    parser.add_argument(
        "--radius",
        default="0.12:0.34",
        metavar="A[:B]",
        help="range of object radii as a share of the shorter edge",
    )
    parser.add_argument("--failed-share", type=float, default=0.02, help="share of rows without a picture")
    parser.add_argument("--quality", type=int, default=92, help="JPEG quality")
    parser.add_argument("--maps", action="store_true", help=_MAPS)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--overwrite", action="store_true", help="replace other shards that are there")
    parser.set_defaults(func=_synthesize)


def _synthesize(args: argparse.Namespace) -> int:
    from data_pipeline.tools.scenes.scene import SceneOptions
    from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize

    _at_least(args.workers, 0, "--workers")
    objects = (
        _whole_range(args.objects, "--objects") if args.max_objects is None else (1, int(args.max_objects))
    )
    size, radius = _whole_range(args.size, "--size"), _range(args.radius, "--radius")
    scene = SceneOptions(
        min_objects=objects[0],
        max_objects=objects[1],
        min_edge=size[0],
        max_edge=size[1],
        min_radius=radius[0],
        max_radius=radius[1],
    )
    options = SynthesisOptions(
        samples=args.samples,
        seed=args.seed,
        samples_per_shard=args.samples_per_shard,
        failed_share=args.failed_share,
        jpeg_quality=args.quality,
        maps=args.maps,
        scene=scene,
    )
    rows = successes = size_bytes = 0
    with progress_bar(args.samples, "rows", "synthesize") as bar:
        for report in synthesize(args.url, options, workers=args.workers, overwrite=args.overwrite):
            rows += report.rows
            successes += report.successes
            size_bytes += report.bytes
            bar.update(report.rows)
    say(f"{options.shards} shards, {successes} samples of {rows} rows, {size_bytes:,} bytes in {args.url}")
    return 0


def _add_inspect(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _parser(
        subparsers,
        "inspect",
        "Print counts, sizes, caption statistics and bad members of shards; write a contact sheet.",
        "ldm data inspect 's3://laion/{00000..00009}.tar' --sheet sheet.png",
    )
    parser.add_argument("url", help="shards, with braces or wildcards, or their folder")
    parser.add_argument("--sheet", default=_SHEET, help="file or folder of the contact sheet")
    parser.add_argument("--pictures", type=int, default=36, help="pictures on the contact sheet")
    parser.add_argument("--decode", type=int, default=50, help="pictures decoded per shard")
    parser.add_argument(
        "--removal-list",
        action="append",
        default=[],
        help="a list of data.removal_lists: how many samples it has, and which entries match none",
    )
    parser.add_argument(
        "--held-out",
        type=_share,
        metavar="SHARE",
        help="how many samples data.validation.share=SHARE holds out",
    )
    parser.add_argument(
        "--picture",
        action="append",
        metavar="EXTENSION",
        help="the member that is the picture, as in data.picture; of several, the first that a sample has",
    )
    parser.set_defaults(func=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    from data_pipeline.storage.files import write_bytes
    from data_pipeline.storage.urls import is_local, join, local_path
    from data_pipeline.tools.inspection import contact_sheet, inspect_shards

    _at_least(args.decode, 0, "--decode")
    _at_least(args.pictures, 0, "--pictures")
    sheet = args.sheet or _SHEET
    if sheet.endswith("/") or (is_local(sheet) and Path(local_path(sheet)).is_dir()):
        sheet = join(sheet, _SHEET)
    with progress_bar(None, "shards", "inspect") as bar:
        found = inspect_shards(
            args.url,
            removal_lists=args.removal_list,
            held_out_share=args.held_out,
            picture=args.picture or DataConfig().picture,
            decode_per_shard=args.decode,
            pictures=args.pictures,
            progress=_updater(bar),
        )
    for line in found.lines():
        say(line)
    write_bytes(sheet, contact_sheet(found.pictures))
    say(f"contact sheet     {sheet}")
    return 0


def _add_index(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _parser(
        subparsers,
        "index",
        "Read the tar headers once and write the index that training needs; only what is new or changed.",
        "ldm data index 's3://laion/{00000..18699}.tar' --workers 32",
    )
    parser.add_argument("url", help="shards, with braces or wildcards, or their folder")
    parser.add_argument("--index", help="folder of the index; default: _index beside the shards")
    parser.add_argument("--workers", type=int, default=4, help="processes")
    parser.set_defaults(func=_index)


def _index(args: argparse.Namespace) -> int:
    from data_pipeline.shards.build_index import build_index
    from data_pipeline.shards.opening import index_folder
    from data_pipeline.storage.listing import list_files
    from data_pipeline.storage.urls import name_of

    _at_least(args.workers, 0, "--workers")
    shards = list_files(args.url)
    folder = index_folder(DataConfig(index=args.index), shards[0].url)
    with progress_bar(len(shards), "shards", "index") as bar:
        report = build_index(
            shards,
            folder,
            workers=args.workers,
            progress=_updater(bar),
            announce=lambda estimate: say(f"estimate          {estimate.sentence()}"),
            restore=True,
        )
    rows = report.rows.values()
    say(f"shards            {len(report.rows)} ({report.read} read now)")
    say(f"samples           {sum(r.samples for r in rows):,}")
    say(f"rows without tar  {sum(r.missing_rows for r in rows):,}")
    say(f"index             {folder}")
    for row in rows:
        for problem in row.problems:
            say(f"problem           {name_of(row.shard)}: {problem}")
    for row in report.failed.values():
        say(f"failed            {row.problems[0]}")
    return 1 if report.failed else 0


def _add_trace(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _parser(
        subparsers,
        "trace",
        "Run the real loader and print one JSON line per step with its keys in global order.",
        "ldm data trace configs/sd/sd2_base_256.yaml data.shards='s3://bucket/laion/*.tar' --steps 0:9",
    )
    _take_config(parser)
    parser.add_argument("--steps", default="0:10", metavar="A:B", help="steps A to B - 1")
    parser.add_argument("--ranks", type=int, default=1, help="ranks to run, one after another in each step")
    parser.add_argument("--workers", type=int, help="loader processes per rank; default: data.workers")

    def run(args: argparse.Namespace) -> int:
        from data_pipeline.tools.trace import trace

        whole = load_config(args.config, args.overrides)
        if args.workers is not None:
            _at_least(args.workers, 0, "--workers")
            whole = replace(whole, data=replace(whole.data, workers=args.workers))
        _at_least(args.ranks, 1, "--ranks")
        first, stop = _range(args.steps, "--steps")
        if not (first.is_integer() and stop.is_integer() and 0 <= first < stop):
            raise DataError(f"--steps is {args.steps!r}; write A:B with whole numbers, e.g. 0:10 for 0 to 9.")
        steps = range(int(first), int(stop))
        while steps:
            phase, config = whole.phase(steps.start), whole.at(steps.start)
            stop = phase.stop if phase.stop < whole.steps else steps.stop  # the last phase has no end here
            inside = range(steps.start - phase.first, min(stop, steps.stop) - phase.first)
            walked = trace(
                config.data,
                config.seed,
                config.global_batch_size,
                steps=inside,
                ranks=args.ranks,
                first_epoch=phase.first_epoch,
            )
            for step, keys in walked:
                say(json.dumps({"step": phase.first + step, "keys": keys}))
            steps = range(min(stop, steps.stop), steps.stop)
        return 0

    parser.set_defaults(func=run)


def _add_explain(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _parser(
        subparsers,
        "explain",
        "Say which samples a step is made from, from the order and the index alone.",
        "ldm data explain configs/sd/sd2_base_256.yaml data.shards='s3://bucket/laion/*.tar' --step 1200",
    )
    _take_config(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--step", type=int, help="optimizer step, from 0")
    which.add_argument(
        "--validation", action="store_true", help="the held-out samples that are measured, instead of a step"
    )
    parser.add_argument(
        "--rejects",
        action="append",
        default=[],
        metavar="FILE",
        help="what the run rejected after reading it, of all ranks; default: data.reject_file, if it is here",
    )

    def run(args: argparse.Namespace) -> int:
        from data_pipeline.tools.trace import explain_step, explain_validation

        whole = load_config(args.config, args.overrides)
        phase, config = whole.phase(args.step or 0), whole.at(args.step or 0)
        of_run = config.data, config.seed, config.global_batch_size
        if args.validation:
            for record in explain_validation(*of_run, config.validation.samples):
                say(json.dumps(record))
            return 0
        assumed: list[str] = []
        explained = explain_step(
            *of_run, args.step - phase.first, rejects=args.rejects, first_epoch=phase.first_epoch
        )
        for record in explained:
            assumed = record["assumes"]
            say(json.dumps({**record, "step": args.step}))
        sys.stderr.write(f"exact if: {'; '.join(assumed)}.\n")
        return 0

    parser.set_defaults(func=run)


def _add_purge(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _parser(
        subparsers,
        "purge",
        "Take what data.removal_lists names out of the cache of a run's first stage (first_stage.cache).",
        "ldm data purge run.yaml first_stage.cache=s3://bucket/cache data.removal_lists=[opt_out.csv]",
    )
    _take_config(parser)
    parser.set_defaults(func=_purge)


def _purge(args: argparse.Namespace) -> int:
    from data_pipeline.tools.purge import purge

    config = load_config(args.config, args.overrides)
    cache, lists = config.first_stage.cache, config.data.removal_lists
    if cache is None or not lists:
        missing = "first_stage.cache" if cache is None else "data.removal_lists"
        raise DataError(
            f"{missing} is not set, so nothing can be purged; name the cache and the lists, e.g. "
            "first_stage.cache=s3://bucket/cache data.removal_lists=[opt_out.csv]."
        )
    with progress_bar(None, "parts", "purge") as bar:
        found = purge(cache, lists, progress=_updater(bar))
    say(f"parts             {found.parts:,} ({found.rewritten:,} written anew)")
    say(f"entries           {found.entries:,} ({found.removed:,} removed)")
    if found.unknown:
        say(f"without a table   {found.unknown:,} (removed: nothing says what they held)")
    if found.unfinished:
        say(f"unfinished        {found.unfinished:,} (younger than an hour; run this again later)")
    return 1 if found.unfinished else 0


def _share(text: str) -> float:
    """A number that data.validation.share may be."""
    allowed = next(f for f in fields(HeldOutConfig) if f.name == "share").metadata[RANGE]
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if share not in allowed:
        raise argparse.ArgumentTypeError(f"{text} is no share; it must be {allowed}")
    return share


def _range(text: str, flag: str) -> tuple[float, float]:
    first, _, last = text.partition(":")
    try:
        values = float(first), float(last or first)
    except ValueError:
        values = math.nan, math.nan
    if not all(map(math.isfinite, values)):
        raise DataError(f"{flag} is {text!r}; write A or A:B, e.g. 1:3.")
    return values


def _whole_range(text: str, flag: str) -> tuple[int, int]:
    first, last = _range(text, flag)
    if not (first.is_integer() and last.is_integer()):
        raise DataError(f"{flag} is {text!r}; write whole numbers, A or A:B, e.g. 1:3.")
    return int(first), int(last)


def _at_least(value: int, least: int, flag: str) -> None:
    if value < least:
        raise DataError(f"{flag} is {value}; it must be at least {least}.")


def _updater(bar: tqdm[Any]) -> Callable[[int, int], None]:
    def update(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)  # which decides when it is time to show it

    return update
