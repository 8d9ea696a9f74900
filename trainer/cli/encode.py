"""Fill first_stage.cache ahead of training, on any machine: the run's samples in its order, without the UNet.

Several of these share the work as ranks of a run would, each its part of every batch (a SLURM array:
slurm/encode.sh; on Ray: python -m trainer.launch.ray --encoders N). What is in the cache is passed over, so
the same command again goes on; a run that trains meanwhile takes what is there and encodes the rest itself.
SIGTERM and SIGUSR1 have what is encoded stored first.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import Counter
from contextlib import closing

import torch

from data_pipeline.batch import Batch
from data_pipeline.errors import DataError, Failure
from data_pipeline.loader import (
    Loader,
    Part,
    Position,
    build_loader,
    check_layout,
    open_dataset,
    position_near,
)
from data_pipeline.moments.entry import Moments
from data_pipeline.moments.writer import MomentsWriter
from data_pipeline.storage.urls import join
from trainer.checkpoint.catalogue import open_checkpoint
from trainer.checkpoint.export import read_state
from trainer.checkpoint.manifest import BadManifest
from trainer.config.checks import check_networks
from trainer.config.io import load_config
from trainer.config.run import Config, ConfigError
from trainer.console import say
from trainer.distributed.env import choose_device
from trainer.distributed.process import configure_process
from trainer.exit_codes import StopRequest
from trainer.first_stage.build import load_first_stage, place_first_stage
from trainer.first_stage.encode_once import EncodeOnce, moments_cache, open_cache
from trainer.launch.observe import latest_record, newest_checkpoint
from trainer.launch.rank import die_with_launcher
from trainer.reliability.preemption import Preemption

EXAMPLE = (
    "example: ldm encode configs/sd/sd2_base_512.yaml data.shards='s3://bucket/laion/*.tar' "
    "first_stage.weights=s3://bucket/kl_f8.safetensors conditioning.openclip.pretrained=laion2b_s32b_b79k "
    "first_stage.cache=s3://bucket/cache"
)
_LOOK_S = 10.0
"""Between looks at where the run is."""
_PAUSE_S = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, overrides, and which part of the work."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that win over the file")
    parser.add_argument("--rank", type=int, default=0, help="which of --ranks this is, from 0")
    parser.add_argument("--ranks", type=int, default=1, help="how many of these share the work")
    parser.add_argument("--steps", type=int, help="steps of the run from its first on; default: one epoch")
    parser.add_argument(
        "--ahead",
        type=int,
        metavar="STEPS",
        help="keep in front of the run in run_dir, by so many steps at most: wait when further, skip what it "
        "has passed, end with it or after an epoch (default: walk the epoch wherever the run is)",
    )


def run(args: argparse.Namespace) -> int:
    """Encode; 0 when everything is in the cache, 1 when some of it could not be stored, 75 when stopped."""
    die_with_launcher()
    config = load_config(args.config, args.overrides)
    _check(config, args)
    with torch.no_grad(), Preemption() as asked:
        pool = _Pace(config, args.ahead, asked)
        encoder = _CacheFiller(config, Part(args.rank, args.ranks), pool)
        with closing(encoder.once):
            encoder.walk(pool, args.steps)
    say(f"samples           {encoder.counts['served']:,} ({encoder.counts['rejected']:,} rejected)")
    written = encoder.once.counts
    say(f"in the cache      {encoder.counts['cache_found']:,} before, {written['written']:,} stored now")
    say(f"parts             {written['parts']:,}, {written['bytes']:,} bytes")
    left = encoder.counts["cache_missed"] - encoder.counts["again"] - written["written"]
    if left:
        say(f"not stored        {left:,} (twice in a batch, no room, or as the log says)")
    if asked.request is not StopRequest.NONE:
        return asked.request.exit_code
    return 1 if written["failed"] else 0


def _check(config: Config, args: argparse.Namespace) -> None:
    if config.first_stage.cache is None:
        raise ConfigError(
            "first_stage.cache is not set, so there is nothing to fill; name a folder or URL, e.g. "
            "first_stage.cache=s3://bucket/cache."
        )
    if config.phases:
        raise ConfigError(
            "this fills a cache for one size of pictures, and phases have several; name one by "
            "data.image_size=... and phases=[]."
        )
    if not 0 <= args.rank < args.ranks:
        raise DataError(f"--rank {args.rank} is none of --ranks {args.ranks}; ranks count from 0.")
    for option, value in (("--steps", args.steps), ("--ahead", args.ahead)):
        if value is not None and value < 1:
            raise DataError(f"{option} {value} is nothing to encode; it must be at least 1.")
    config.sharing(args.ranks)
    check_networks(config)


class _Pace:
    """Where the run is that trains meanwhile, and what the encoder does about it.

        behind the run          goes on in the middle of what it may be ahead: nearer to the run, both would
                                encode the same, as a part is found only once it is committed
        0 .. ahead steps ahead  goes on
        further ahead           waits

    The past is in the cache by then, or not needed before the next epoch. Without an index nobody knows where
    the middle is: behind the run it goes on at the newest checkpoint, or where it is, past what is cached.
    Without `ahead` it looks at no run.
    """

    def __init__(self, config: Config, ahead: int | None, asked: Preemption) -> None:
        self._config, self._ahead, self._asked = config, ahead, asked
        self.at_checkpoints = False
        """Whether no positions are known but those of checkpoints."""
        self._run, self._saved, self._next = 0, 0, 0.0
        self._told: int | None = None

    @property
    def is_over(self) -> bool:
        """Whether somebody wants the encoder to end."""
        return self._asked.request is not StopRequest.NONE

    def bounds(self, epoch: int | None, steps: int | None) -> tuple[int, int | None]:
        """First step to encode, and past the last; None where the end of the epoch has to show.

        epoch: steps of one, None where nobody knows
        """
        if self._ahead is None:
            return 0, steps or epoch
        self._look()
        last = min(self._config.steps, steps or self._config.steps)
        return self._run, last if epoch is None else min(self._run + epoch, last)

    def place(self, step: int) -> int:
        """The step to encode instead of this one, or this one, once it is near enough to the run."""
        while self._ahead is not None and not self.is_over:
            self._look()
            target = max(step, self._saved) if self.at_checkpoints else self._run + self._ahead // 2
            if self._run > step and target > step:
                say(f"step {step:,}: the run is at step {self._run:,}; going on at step {target:,}")
                return target
            if step < self._run + self._ahead:
                break
            if self._told != step:
                self._told = step
                say(f"step {step:,}: waiting, as the run is at step {self._run:,} of {self._config.run_dir}")
            time.sleep(_PAUSE_S)
        return step

    def known(self) -> Position:
        """The position of the newest checkpoint of the run that is looked at."""
        newest = newest_checkpoint(self._config.run_dir) if self._ahead is not None else None
        if newest is None:
            return None
        try:
            state = read_state(open_checkpoint(newest[1]))
        except (Failure, BadManifest):  # removed meanwhile, or storage is away: then less exactly
            self._saved = 0
            return None
        position: Position = state["state"]["train"]["position"]
        return position

    def _look(self) -> None:
        if time.monotonic() < self._next:
            return
        record, newest = latest_record(self._config.run_dir), newest_checkpoint(self._config.run_dir)
        # After a rewind, or where the newest records were lost, the two say different things: the run will
        # pass both.
        self._saved = 0 if newest is None else newest[0]
        self._run = max(0 if record is None else record["step"], self._saved)
        self._next = time.monotonic() + _LOOK_S


class _CacheFiller:
    """One rank's share of the samples through the first stage; close `once` to commit what was encoded."""

    def __init__(self, config: Config, part: Part, pace: _Pace) -> None:
        self._config, self._part = config, part
        self.counts: Counter[str] = Counter()
        """served, rejected, cache_found, cache_missed; again: missed, but another visit's to encode."""
        configure_process(config.distributed)
        self._device = choose_device()
        dataset = open_dataset(config.data, at_once=True)
        self._dataset = dataclasses.replace(dataset, record_in=join(config.run_dir, "index"))
        seed, size = config.seed, config.global_batch_size
        position = pace.known()
        order = check_layout(config.data, dataset, seed=seed, global_batch_size=size, position=position)
        self._epoch = dataset.epoch_steps(order, size)
        pace.at_checkpoints = self._epoch is None
        self._once = not (dataset.shares or config.data.buckets)
        first_stage = load_first_stage(config.first_stage, self._device)
        place_first_stage(first_stage, config.distributed, self._device)
        cache = moments_cache(config.first_stage, first_stage)
        room = open_cache(config.first_stage, cache)
        writer = MomentsWriter(cache, allowance=None if room is None else room // part.ranks, patient=True)
        self.once = EncodeOnce(first_stage, cache, writer, config.micro_batch_size)
        self._moments = Moments(config.first_stage.cache_variants, cache)

    def walk(self, pace: _Pace, steps: int | None) -> None:
        """Encode from where the pace says to the last step."""
        step, last = pace.bounds(self._epoch, steps)
        within = self._dataset.epoch_ordinals if self._once and (step, last) == (0, self._epoch) else None
        while (last is None or step < last) and not pace.is_over:
            loader, step = self._loader(step, pace)
            with closing(loader):
                try:
                    step = self._steps(loader, step, last, pace, within)
                    if last is None:
                        break
                finally:
                    tally = loader.tally
                    self.counts.update(served=tally.served, rejected=tally.rejected.total())
                    self.counts.update(loader.counts)

    def _steps(self, loader: Loader, step: int, last: int | None, pace: _Pace, within: int | None) -> int:
        """The step to go on at, with another loader unless it is the last one.

        within: ordinals from which on samples come again; another part may have one of them under way.
        """
        while (loader.epoch == 0 if last is None else step < last) and not pace.is_over:
            place = pace.place(step)
            if place > step:
                return place
            if pace.is_over:
                break
            batch = next(loader)
            self.once.complete((batch if within is None else self._first(batch, within)).to(self._device))
            if step % 100 == 0:
                counts = self.counts + Counter(loader.counts)
                done = f"{counts['cache_found']:,} found, {counts['cache_missed']:,} encoded"
                say(f"step {step:,}{'' if last is None else f' of {last:,}'}: {done}")
            step += 1
        return step

    def _first(self, batch: Batch, within: int) -> Batch:
        """With nothing to encode in rows whose ordinal is not below `within`."""
        assert batch.cached is not None
        found, again = batch.cached.found, batch.ordinals >= within
        self.counts["again"] += int((again & ~found).sum())
        labels = (None if late else label for late, label in zip(again, batch.cached.labels, strict=True))
        cached = dataclasses.replace(batch.cached, found=found | again, labels=tuple(labels))
        return dataclasses.replace(batch, cached=cached)

    def _loader(self, step: int, pace: _Pace) -> tuple[Loader, int]:
        """From a step on, or the next before it that is known, which is returned too."""
        config, served = self._config, self.counts["served"]
        position = None
        if step:
            position = position_near(
                config.data,
                self._dataset,
                seed=config.seed,
                global_batch_size=config.global_batch_size,
                step=step,
                known=pace.known(),
                served=served / (served + self.counts["rejected"]) if served else 1.0,
            )
        loader = build_loader(
            config.data,
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            part=self._part,
            position=position,
            dataset=self._dataset,
            moments=self._moments,
        )
        assert isinstance(loader, Loader), "a resampled order has no cache"
        return loader, position["step"] if isinstance(position, dict) else 0
