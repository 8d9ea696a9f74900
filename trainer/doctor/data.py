"""The doctor on data: storage that takes and gives back bytes, and shards that hold what they should."""

from __future__ import annotations

import dataclasses
import os
import time
from contextlib import closing

from data_pipeline.errors import DataError, Failure
from data_pipeline.loader import Dataset, build_loader, check_layout, open_dataset
from data_pipeline.storage.files import read_bytes, remove_file, write_bytes
from data_pipeline.storage.listing import list_files
from data_pipeline.storage.urls import join
from data_pipeline.tally import FIRST, Tally, added
from data_pipeline.tools.inspection import look_at_head
from trainer.config.run import Config
from trainer.distributed import collectives
from trainer.distributed.env import DistributedEnv
from trainer.doctor.check import Check, on_every_rank

_PROBE_BYTES = 16_000_000
_SHARDS_PER_RANK = 3
_LOOK_S = 5.0
"""Seconds after which no further batch is decoded."""


def check_storage(config: Config, env: DistributedEnv) -> list[Check]:
    """One object written to run_dir, read back, compared and removed, by one rank of each node."""

    def examine() -> str:
        if env.local_rank != 0:
            return ""
        url = join(config.run_dir, f"doctor_probe_{env.rank}")
        content = os.urandom(_PROBE_BYTES)
        started = time.perf_counter()
        write_bytes(url, content)
        written = time.perf_counter()
        returned = read_bytes(url)
        read = time.perf_counter()
        remove_file(url)
        if returned != content:
            raise DataError(f"{url} came back with other bytes than were written")
        rates = [_PROBE_BYTES / 1e6 / (b - a) for a, b in ((started, written), (written, read))]
        return f"{config.run_dir} writes {rates[0]:.0f} MB/s, reads {rates[1]:.0f} MB/s per node"

    remedy = "correct run_dir, its permissions or credentials, or the storage endpoint (AWS_ENDPOINT_URL)."
    return [on_every_rank("storage", remedy, examine)]


def check_shards(config: Config, env: DistributedEnv) -> list[Check]:
    """A few shards, other ones on each rank: they are tars, their pictures decode, captions are there."""
    sources = [source.shards for source in config.data.sources] or [config.data.shards]

    def examine() -> str:
        shards = [shard for source in sources for shard in list_files(source)]
        count = min(len(shards), _SHARDS_PER_RANK * env.world_size)
        chosen = [shards[i * len(shards) // count] for i in range(count)][env.rank :: env.world_size]
        looks = [look_at_head(shard, config.data) for shard in chosen]
        pictures = sum(look.pictures for look in looks)
        captions = sum(look.captions for look in looks)
        bad = [defect for look in looks for defect in look.defects]
        size = sum(shard.size for shard in shards) / 1e9
        detail = (
            f"{len(shards)} shards, {size:.2f} GB; decoded {pictures} pictures, {captions} with a caption"
        )
        if looks and pictures == 0:
            raise DataError(f"{detail}; {bad[0] if bad else 'no picture found'}")
        if len(bad) > pictures:
            raise DataError(f"{detail}, {len(bad)} defects such as: {bad[0]}")
        wants_captions = any(name == "txt" for name in config.data.captions) and config.data.require_caption
        if looks and wants_captions and captions == 0:
            raise DataError(f"{detail}: none of the samples looked at has a .txt member")
        return detail + (f", {len(bad)} defects" if bad else "")

    remedy = "look at them with `ldm data inspect`, and correct data.shards or data.captions."
    return [on_every_rank("shards", remedy, examine)]


def check_samples(config: Config, env: DistributedEnv) -> list[Check]:
    """The share of the first samples that training will serve, by its own loader. Collective."""
    name = "samples"
    remedy = "correct the shards, data.filter or data.captions, or raise data.max_rejected_share."
    indexed = config.data.order == "indexed"
    try:
        dataset = collectives.from_main_rank(lambda: open_dataset(config.data) if indexed else None)
    except Failure as error:
        return [Check(name, False, str(error), "correct data.shards or what the sentence names.")]
    tally, mistake = Tally(), ""
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
    return [Check(name, True, total.sentence(), remedy)]


def _first_samples(config: Config, env: DistributedEnv, dataset: Dataset | None) -> Tally:
    """This rank's part of the first thousand samples, or of all where there are fewer."""
    enough, batch, lanes = FIRST, config.global_batch_size, config.data.lanes
    if dataset is not None:
        order = check_layout(
            config.data,
            dataset,
            seed=config.seed,
            global_batch_size=batch,
            world_size=env.world_size,
        )
        # One sample of each lane is the smallest batch that all ranks can share.
        enough, batch, lanes = min(FIRST, order.total), order.lanes, order.lanes
    data = dataclasses.replace(config.data, lanes=lanes, workers=0, prefetch=1, reject_file=None)
    began = time.monotonic()
    batches = build_loader(
        data,
        seed=config.seed,
        global_batch_size=batch,
        rank=env.rank,
        world_size=env.world_size,
        dataset=dataset,
    )
    with closing(batches):
        while batches.tally.seen * env.world_size < enough and time.monotonic() - began < _LOOK_S:
            next(batches)
    return batches.tally
