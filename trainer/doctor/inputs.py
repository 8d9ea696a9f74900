"""The doctor on what a run reads: storage, shards and their samples, files of frozen networks."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

from data_pipeline.batch import FIRST, Tally, added
from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError, Failure, NotFound
from data_pipeline.loader import Dataset, Part, build_loader, check_layout, open_dataset
from data_pipeline.storage.files import exists, read_bytes, remove_file, write_bytes
from data_pipeline.storage.large import checksum_bytes
from data_pipeline.storage.listing import ListedFile, list_files, look_up
from data_pipeline.storage.retry import QUICK_TRIES
from data_pipeline.storage.urls import is_local, join, spelled_out
from data_pipeline.tools.inspection import look_at_head
from trainer.config.checks import check_networks as check_named
from trainer.config.models import RANDOM, TOWERS
from trainer.config.run import Config, ConfigError
from trainer.distributed import collectives
from trainer.distributed.env import DistributedEnv
from trainer.doctor.check import Check, on_every_rank
from trainer.evaluation.held_out import hold_out
from trainer.first_stage.build import WEIGHTS_FILE
from trainer.first_stage.perceptual import perceptual_source
from trainer.metrics.long_work import LongWork
from trainer.weights import WEIGHT_ENDINGS

_PROBE_BYTES = 16_000_000
_SHARDS_PER_RANK = 3
_MOST_SHARDS = 48
_LISTED_SHARDS = 1000
"""From which number on the names of a set are believed, and a few looked up instead of all listed."""
_LOOK_S = 5.0
"""Seconds after which no further batch is decoded."""
_AT_A_TIME = 16
"""Requests of a rank for shards that are looked at."""
_FEW = FIRST // 4
"""Samples of all ranks that are looked at before a verdict on their share counts as clear."""
_DOUBT = 1e-6
"""How likely it may be another one after more of them."""
T = TypeVar("T")


def check_storage(config: Config, env: DistributedEnv) -> list[Check]:
    """One object written to run_dir by one rank of each node; all of them read and compare rank 0's.
    Collective.

    A run_dir that each node has of its own takes every byte, and no checkpoint would ever be complete in it.
    """
    name, leads = "storage", env.local_rank == 0
    url, content = join(config.run_dir, f"doctor_probe_{env.rank}"), os.urandom(_PROBE_BYTES)
    first = collectives.broadcast_object((url, checksum_bytes(content), socket.gethostname()))
    began = time.perf_counter()

    def write() -> str:
        if leads:
            write_bytes(url, content)
        return f"{config.run_dir} writes {_PROBE_BYTES / 1e6 / (time.perf_counter() - began):.0f} MB/s"

    def read() -> str:
        if not leads:
            return ""
        probe, checksum, host = first
        began = time.perf_counter()
        try:
            returned = read_bytes(probe)
        except NotFound as error:
            raise DataError(
                f"{socket.gethostname()} does not see in {config.run_dir} what rank 0 ({host}) wrote there"
            ) from error
        if checksum_bytes(returned) != checksum:
            raise DataError(f"{probe} came back with other bytes than were written")
        return f", reads {_PROBE_BYTES / 1e6 / (time.perf_counter() - began):.0f} MB/s per node"

    remedy = "correct run_dir, its permissions or credentials, or the storage endpoint (AWS_ENDPOINT_URL)."
    shared = "name a run_dir that all nodes share: a folder that each of them mounts, or s3://BUCKET/PATH."
    written = on_every_rank(name, remedy, write, askers=env.num_nodes)
    seen = on_every_rank(name, shared, read, askers=env.num_nodes) if written.passed else None
    if leads:
        with contextlib.suppress(Failure):  # a folder that cannot be written to is told already
            remove_file(url, tries=QUICK_TRIES)
    if seen is None:
        return [written]
    return [dataclasses.replace(seen, detail=written.detail + seen.detail if seen.passed else seen.detail)]


def check_shards(config: Config, env: DistributedEnv) -> list[Check]:
    """A few shards, other ones on each rank: they are tars, their pictures decode.

    Which caption a sample has to have is its source's to say, and the loader's to judge (`check_samples`).
    Rank 0 chooses the shards, a bounded number however many ranks and shards there are. Collective.
    """
    remedy = "look at them with `ldm data inspect`, and correct data.shards."
    try:
        whole, chosen = collectives.from_main_rank(lambda: _choose(config, env.world_size))
    except Failure as error:
        return [Check("shards", False, str(error), remedy)]
    mine = chosen[env.rank :: env.world_size]

    def examine() -> str:
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            looks = list(pool.map(lambda shard: look_at_head(shard, config.data), mine))
        pictures = sum(look.pictures for look in looks)
        bad = [defect for look in looks for defect in look.defects]
        detail = f"{whole}; decoded {pictures} pictures"
        if looks and pictures == 0:
            raise DataError(f"{detail}; {bad[0] if bad else 'no picture found'}")
        if len(bad) > pictures:
            raise DataError(f"{detail}, {len(bad)} defects such as: {bad[0]}")
        return detail + (f", {len(bad)} defects" if bad else "")

    return [on_every_rank("shards", remedy, examine)]


def check_samples(config: Config, env: DistributedEnv) -> list[Check]:
    """The share of the first samples that training will serve, by its own loader. Collective."""
    name = "samples"
    remedy = "correct the shards, data.filter or data.captions, or raise data.max_rejected_share."
    ordered = config.data.order != "resampled"
    try:
        with closing(LongWork()) as work:
            dataset = collectives.worked_on_main_rank(
                lambda tell: open_dataset(config.data, progress=tell, at_once=True) if ordered else None,
                work.told,
            )
    except Failure as error:
        return [Check(name, False, str(error), "correct data.shards or what the sentence names.")]
    tally, mistake = Tally(), ""
    try:
        held_out = hold_out(config, dataset)
    except Failure as error:
        return [Check(name, False, str(error), "correct data.validation.")]
    try:
        tally = _first_samples(config, env, dataset)
    except Exception as error:  # noqa: BLE001 - whatever is wrong belongs in the table
        mistake = f"{type(error).__name__}: {error}"
    answers = collectives.all_gather_object((tally, mistake))
    mistakes = [told for _, told in answers if told]
    if mistakes:
        return [Check(name, False, mistakes[0], remedy)]
    total = added(tally for tally, _ in answers)
    try:
        total.check(config.data.max_rejected_share)
    except DataError:
        return [Check(name, False, total.sentence(), remedy)]
    measured = "" if held_out is None else f"; {len(held_out):,} held out are measured"
    return [Check(name, True, total.sentence() + measured, remedy)]


def check_networks(config: Config, env: DistributedEnv) -> list[Check]:
    """Each network whose weights the run reads is named, and a named file is there on rank 0, which reads it
    for all. Collective."""

    def examine() -> str:
        if not env.is_main:
            return ""
        check_named(config)
        found = list(_described(config))
        return ", ".join(found) or "none is read"

    remedy = "name weights that are there, or the word random where an untrained network is meant."
    return [on_every_rank("networks", remedy, examine)]


def _choose(config: Config, ranks: int) -> tuple[str, list[ListedFile]]:
    """(all shards in words, those to look at). A large set that is spelled out is not listed."""
    most = min(_SHARDS_PER_RANK * ranks, _MOST_SHARDS)
    patterns = [source.shards for source in config.data.sources] or [config.data.shards]
    named = [spelled_out(pattern) for pattern in patterns]
    if all(names is not None for names in named) and sum(map(len, filter(None, named))) > _LISTED_SHARDS:
        urls = [url for names in named for url in names or ()]
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            return f"{len(urls)} shards", list(pool.map(look_up, _spread(urls, most)))
    shards = [shard for pattern in patterns for shard in list_files(pattern)]
    size = sum(shard.size for shard in shards) / 1e9
    return f"{len(shards)} shards, {size:.2f} GB", _spread(shards, most)


def _spread(things: Sequence[T], most: int) -> list[T]:
    """At most so many of them, from all over."""
    count = min(len(things), most)
    return [things[i * len(things) // count] for i in range(count)]


def _first_samples(config: Config, env: DistributedEnv, dataset: Dataset | None) -> Tally:
    """This rank's part of the first thousand samples, or of all where there are fewer, or of as many as leave
    no doubt."""
    enough, batch, lanes = FIRST, config.global_batch_size, config.data.lanes
    if dataset is not None:
        order = check_layout(
            config.data,
            dataset,
            seed=config.seed,
            global_batch_size=batch,
        )
        # One sample of each lane is the smallest batch in the order of the run.
        batch = lanes = order.lanes
        if not dataset.unindexed:
            enough = min(FIRST, int(dataset.counts.sum()))
    data = dataclasses.replace(config.data, lanes=lanes, workers=0, prefetch=1, reject_file=None)
    began = time.monotonic()
    batches = build_loader(
        data,
        seed=config.seed,
        global_batch_size=batch,
        part=Part(env.rank, env.world_size),
        dataset=dataset,
    )
    with closing(batches):
        while batches.tally.seen * env.world_size < enough and time.monotonic() - began < _LOOK_S:
            if not len(next(batches)):
                break  # more ranks than lanes
            if batches.tally.seen * env.world_size >= _FEW and _is_clear(batches.tally, data):
                break
    return batches.tally


def _is_clear(tally: Tally, data: DataConfig) -> bool:
    """Whether the rejected share of all samples lies on the same side of the limit as that of these, but for
    a chance of `_DOUBT` (Hoeffding 1963). Never of a mixture: rare sources are to be met, too."""
    if data.sources or not tally.seen:
        return False
    margin = math.sqrt(math.log(1 / _DOUBT) / (2 * tally.seen))
    return abs(tally.lost / tally.seen - data.max_rejected_share) > margin


def _described(config: Config) -> Iterator[str]:
    """Network by network, what it is.

    Raises:
        ConfigError: a file that is named is not there.
    """
    if config.stage == "autoencoder":
        loss = config.autoencoder_loss
        if loss.perceptual_weight:
            source = perceptual_source(loss.perceptual_weights)
            yield (
                "perceptual network: random features, not LPIPS"
                if source == RANDOM
                else (f"LPIPS with {_present(source, 'autoencoder_loss.perceptual_weights')}")
            )
        return
    weights = config.first_stage.weights
    if config.first_stage.name != "identity" and weights is not None:
        url = weights if weights.endswith(".safetensors") else f"{weights.rstrip('/')}/{WEIGHTS_FILE}"
        yield f"first stage {_present(url, 'first_stage.weights')}"
    for name in TOWERS:
        tower = getattr(config.conditioning, name)
        if tower is not None and tower.pretrained == RANDOM:
            yield f"{name} {tower.model} with random weights"
        elif tower is not None:
            yield f"{name} {tower.model} {_present(tower.pretrained, f'conditioning.{name}.pretrained')}"


def _present(source: str, setting: str) -> str:
    """The source itself, where it is a file that exists or a tag of open_clip."""
    if (source.endswith(WEIGHT_ENDINGS) or not is_local(source)) and not exists(source):
        raise ConfigError(f"{setting}={source} is not there")
    return source
