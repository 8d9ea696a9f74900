"""The part of `ldm sample` that makes pictures by the ten thousand: over ranks, going on where it stopped."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import hashlib
import os
import re
import shutil
import time
from collections.abc import Sequence
from typing import Any

import torch

from data_pipeline.storage.urls import join, without_secrets
from data_pipeline.tools.picture_sets import GRID
from data_pipeline.tools.prompts import listed_prompts
from trainer.checkpoint.commands import find_checkpoint, fingerprint
from trainer.cli.sample_asked import BATCH, Asked, ask, find_asked, load_asked, notes_on, wishes_of
from trainer.cli.wishes import check_labels
from trainer.config.run import Config, ConfigError
from trainer.console import say
from trainer.distributed import collectives
from trainer.distributed.env import DistributedEnv
from trainer.distributed.shared_reads import read_together
from trainer.generation.series import Series, accelerate, make_pictures
from trainer.generation.store import BEGUN_BY, Form, SetStore, former_record
from trainer.launch.command import run_on_ranks
from trainer.model import ModelFound, TrainedModel
from trainer.reliability.job import is_restart, job_identity

MAX_COUNT = 10_000_000
"""Pictures of a set, whose names have seven digits."""
QUALITY = 95
"""Of JPEG, where nobody says."""
PROMPTS_LOOKED_AT = 1000
"""For being too long."""
_PAUSE_S = 1.0
"""Between looks for the beginning of a set."""


@dataclasses.dataclass(frozen=True)
class SeriesPlan:
    """What rank 0 has found out for all of them."""

    series: Series
    one: Asked
    """For one picture."""
    record: dict[str, Any]
    """What all of them are a function of."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `ldm sample` takes for large sets alone."""
    group = parser.add_argument_group(
        "sets of any size", "over ranks; the same command again goes on where it stopped"
    )
    group.add_argument(
        "--count",
        type=int,
        metavar="N",
        help="pictures; prompts and labels are taken in turn (default: one per prompt)",
    )
    group.add_argument(
        "--prompts-from",
        metavar="FILE|SHARDS",
        help="captions of .txt, .csv, .tsv, .jsonl, .parquet, of shards or of a folder of pictures",
    )
    group.add_argument("--format", choices=("png", "jpg"), default="png", help="(default: %(default)s)")
    group.add_argument("--quality", type=int, help=f"of JPEG (default: {QUALITY})")
    group.add_argument(
        "--tars",
        type=int,
        nargs="?",
        const=256,
        metavar="N",
        help="webdataset tars of N pictures each, in whole batches, with captions and metadata "
        "(without a number: %(const)s)",
    )
    group.add_argument(
        "--ranks", type=int, default=0, help="local processes (default: one per visible GPU, or one)"
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the blocks that repeat, as distributed.compile (default: as the run did, on a GPU)",
    )
    group.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="replay the network as a CUDA graph: for batches so small that launching kernels takes longer",
    )
    group.add_argument(
        "--share",
        metavar="K/N",
        help="only share K of N, from 0 on, beside machines that make the others and need nothing of each "
        "other (an indexed Job of Kubernetes; on Ray: python -m trainer.launch.ray_sample)",
    )


def is_series(args: argparse.Namespace) -> bool:
    """Whether a set of any size is asked for.

    Raises:
        ConfigError: options of one are given, but not what makes it one.
    """
    if args.count is not None or args.prompts_from is not None:
        return True
    for given, option in (
        (args.tars is not None, "--tars"),
        (args.format != "png", "--format"),
        (args.quality is not None, "--quality"),
        (args.ranks != 0, "--ranks"),
        (args.share is not None, "--share"),
        (args.compile is not None, "--compile"),
        (args.cuda_graphs, "--cuda-graphs"),
    ):
        if given:
            raise ConfigError(f"{option} belongs to sets of any size; give --count or --prompts-from, too.")
    return False


def run(args: argparse.Namespace) -> int:
    """Make the set, or what is missing of it, on all ranks."""
    check(args)
    return run_on_ranks(args.command_line, args.ranks, lambda env: make(args, env))


def make(args: argparse.Namespace, env: DistributedEnv) -> None:
    """The same on the ranks that there are, also for commands that measure the set. Collective.

    Raises:
        ConfigError: options that do not go together, or a folder that holds another set.
    """
    share = _share(args.share)
    plan = collectives.from_main_rank(lambda: _plan(args, env.device))
    store = _store(args, plan)
    with read_together(env.device):
        trained = collectives.on_every_rank(lambda: _load(args, plan, env.device))
    if env.is_main:
        _tell(plan, trained, env.world_size * share[1])
    there = make_pictures(
        store,
        plan.series,
        trained,
        overwrite=args.overwrite,
        share=share,
        paste=plan.one.inputs.paste,
    )
    if env.is_main:
        before = f", {there} of them from before" if there else ""
        which = "" if args.share is None else f"share {args.share} of "
        print(f"{which}{plan.series.count} pictures{before} in {store.pictures_url}, {join(store.url, GRID)}")


def check_set(args: argparse.Namespace, device: torch.device) -> None:
    """All that can be wrong before weights are read, for commands that have other work until then.

    On one rank.

    Raises:
        ConfigError: as `make`.
    """
    _store(args, _plan(args, device)).former(overwrite=args.overwrite)


def check_model(args: argparse.Namespace, device: torch.device) -> ModelFound:
    """The same without a look at the folder: the model that all is right with."""
    return _plan(copy.copy(args), device).one.found


def _store(args: argparse.Namespace, plan: SeriesPlan) -> SetStore:
    return SetStore(args.out, plan.record, Form(args.format, _quality(args), tars=args.tars is not None))


def _plan(args: argparse.Namespace, device: torch.device) -> SeriesPlan:
    out = args.out.rstrip("/") or args.out
    if _share(args.share)[0]:
        _await_beginning(out, args.share)
    former = former_record(out)
    if args.overwrite and is_restart() and (former or {}).get(BEGUN_BY) == job_identity():
        args.overwrite = False  # it was done when this command first ran
    _adopt(args, {} if args.overwrite else former or {})
    wishes = wishes_of(args)
    prompts = wishes.prompts
    if args.prompts_from is not None:
        prompts += _prompts_from(args.prompts_from, args.count)
    found = _accelerated(args, find_asked(args), device)
    labels = _labels(found.config, wishes.class_labels)
    one = ask(args, found, dataclasses.replace(wishes, prompts=prompts[:1], class_labels=labels[:1]), device)
    check_labels(found.config.conditioning, labels)
    series = Series(
        template=one.inputs.request,
        count=args.count if args.count is not None else len(prompts),
        prompts=prompts or ("",),
        labels=labels,
        seed=args.seed,
        first_index=args.first_index,
        batch_size=args.batch_size,
        batches_per_part=1 if args.tars is None else -(-args.tars // args.batch_size),
    )
    about = {name: value for name, value in one.record.items() if name != "prompts"}
    record = about | {
        "weights": fingerprint(args.source, found.step),
        "prompts_from": args.prompts_from,
        "num_prompts": len(prompts),
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "class_labels": list(labels),
        "count": series.count,
        "batch_size": series.batch_size,
        "part_size": series.part_size,
        "format": f"{args.format}{_quality(args) if args.format == 'jpg' else ''}",
        "tars": args.tars is not None,
        "compile": found.config.distributed.compile,
        **({"cuda_graphs": True} if args.cuda_graphs else {}),  # sets of earlier versions do not say it
    }
    return SeriesPlan(series, one, record)


def _accelerated(args: argparse.Namespace, found: ModelFound, device: torch.device) -> ModelFound:
    """The model with `distributed.compile` and `cuda_graphs` as they are to be here, for `accelerate`."""
    on_gpu = device.type == "cuda"
    if args.cuda_graphs and not on_gpu:
        raise ConfigError("--cuda-graphs needs a GPU, and there is none here; leave it out.")
    if args.compile and shutil.which(os.environ.get("CXX", "g++")) is None and not on_gpu:
        raise ConfigError(
            "--compile needs a C++ compiler (g++, or CXX) on a CPU; install one, or leave it out."
        )
    wanted = found.config.distributed.compile and on_gpu if args.compile is None else args.compile
    distributed = dataclasses.replace(found.config.distributed, compile=wanted, cuda_graphs=args.cuda_graphs)
    return dataclasses.replace(found, config=dataclasses.replace(found.config, distributed=distributed))


def _await_beginning(out: str, share: str) -> None:
    """Until share 0 has written what the set is: one checkpoint, and one clearing of the folder, for all."""
    told = False
    while former_record(out) is None:
        if not told:
            say(f"share {share} waits until share 0 has begun {out}")
            told = True
        time.sleep(_PAUSE_S)


@functools.lru_cache(1)
def _prompts_from(url: str, most: int | None) -> tuple[str, ...]:
    """Read once by a process that makes several sets of them."""
    return tuple(listed_prompts(url, most))


def _adopt(args: argparse.Namespace, former: dict[str, Any]) -> None:
    """A set that is continued keeps its checkpoint and batches, unless others are asked for."""
    step, of_run = former.get("checkpoint"), not args.source.endswith(".safetensors")
    same = without_secrets(str(former.get("source"))) == without_secrets(args.source)
    if of_run and args.checkpoint is None and isinstance(step, int) and same:
        try:
            find_checkpoint(args.source, step)
        except ConfigError as error:
            raise ConfigError(
                f"{args.out} holds pictures of step {step} of {args.source}, which is gone; give --overwrite "
                "to begin a new set, or another --out."
            ) from error
        args.checkpoint = step
    if args.batch_size is None:
        size = former.get("batch_size")
        args.batch_size = size if isinstance(size, int) and size > 0 else BATCH


def check(args: argparse.Namespace) -> None:
    """What can be wrong without a look at the model. Raises ConfigError."""
    _share(args.share)
    if args.share is not None and args.overwrite:
        raise ConfigError(
            "--overwrite would remove what other shares have made; remove the set first, or choose another "
            "--out."
        )
    if args.count is not None and not 1 <= args.count <= MAX_COUNT:
        raise ConfigError(f"--count {args.count} must lie in 1 .. {MAX_COUNT}.")
    if args.per_prompt != 1:
        raise ConfigError(
            "--per-prompt is for small sets; --count says how many pictures there are, for which prompts are "
            "taken in turn."
        )
    if args.prompts_from is not None and not args.prompts_from.strip():
        raise ConfigError("--prompts-from is empty (a variable that is not set?); name a file or shards.")
    if args.quality is not None and args.format != "jpg":
        raise ConfigError(f"--quality {args.quality} is of JPEG; give --format jpg, too.")
    if not 1 <= _quality(args) <= 100:
        raise ConfigError(f"--quality {args.quality} must lie in 1 .. 100.")
    if args.tars is not None and not 1 <= args.tars <= MAX_COUNT:
        raise ConfigError(f"--tars {args.tars} must be at least 1: pictures of each tar.")


def _share(text: str | None) -> tuple[int, int]:
    """(which, of how many) of --share. Raises ConfigError."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text or "0/1")
    which, shares = (int(found[1]), int(found[2])) if found else (0, 0)
    if which >= shares:
        raise ConfigError(f"--share {text} is none; write K/N with K from 0 to N - 1, such as 0/16.")
    return which, shares


def _quality(args: argparse.Namespace) -> int:
    return QUALITY if args.quality is None else int(args.quality)


def _labels(config: Config, given: Sequence[int]) -> tuple[int, ...]:
    """In turn; all classes where nobody says which."""
    section = config.conditioning.class_label
    return tuple(given) or (() if section is None else tuple(range(section.num_classes)))


def _load(args: argparse.Namespace, plan: SeriesPlan, device: torch.device) -> TrainedModel:
    trained = load_asked(args, plan.one, device)
    return dataclasses.replace(trained, model=accelerate(trained.config, trained.model))


def _tell(plan: SeriesPlan, trained: TrainedModel, ranks: int) -> None:
    """ranks: those of all shares."""
    how, series = trained.config.sampling, plan.series
    looked_at = min(series.count, len(series.prompts), PROMPTS_LOOKED_AT)
    for note in notes_on(trained, series.request(range(looked_at))):
        print(f"note: {note}")
    if any(series.prompts) and len(series.prompts) < series.count:
        print(f"note: {len(series.prompts)} prompts for {series.count} pictures; they are taken in turn.")
    if series.parts < ranks:
        print(
            f"note: {series.parts} parts of {series.part_size} pictures for {ranks} ranks; the rest "
            "have nothing to do: make --tars or --batch-size smaller."
        )
    print(
        f"{trained.description}: {series.count} pictures, {how.sampler}, {how.steps} steps, guidance "
        f"{how.guidance_scale}, {plan.one.precision}, {ranks} rank{'s' if ranks > 1 else ''}"
    )
