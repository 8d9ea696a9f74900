"""The doctor on data: storage that takes and gives back bytes, and shards that hold what they should."""

from __future__ import annotations

import io
import os
import tarfile
import time
from dataclasses import dataclass

from data_pipeline.errors import DataError, Rejected
from data_pipeline.pictures.decoding import decode
from data_pipeline.shards.tars import IMAGE_EXTENSIONS, split_name
from data_pipeline.storage.files import read_bytes, read_range, remove_file, write_bytes
from data_pipeline.storage.listing import ListedFile, list_files
from data_pipeline.storage.urls import join
from trainer.config.run import Config
from trainer.distributed.env import DistributedEnv
from trainer.doctor.check import Check, on_every_rank

_PROBE_BYTES = 16_000_000
_HEAD_BYTES = 4_000_000
_SAMPLES_PER_SHARD = 8
_SHARDS_PER_RANK = 3


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
        looks = [_look_into(shard, config) for shard in chosen]
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


@dataclass(frozen=True)
class _Look:
    pictures: int
    captions: int
    defects: list[str]


def _look_into(shard: ListedFile, config: Config) -> _Look:
    """The first samples of a shard, from its first megabytes."""
    head = read_range(shard.url, 0, min(shard.size, _HEAD_BYTES))
    pictures, captions, defects = 0, 0, []
    keys: set[str] = set()
    target = (config.data.image_size, config.data.image_size)
    try:
        with tarfile.open(fileobj=io.BytesIO(head), mode="r:") as tar:
            for member in tar:
                stream = tar.extractfile(member)
                if stream is None or member.offset_data + member.size > len(head):
                    continue
                key, extension = split_name(member.name)
                keys.add(key)
                if len(keys) > _SAMPLES_PER_SHARD:
                    break
                captions += extension == "txt" and member.size > 0
                if extension not in IMAGE_EXTENSIONS:
                    continue
                try:
                    decode(stream.read(), target=target, max_pixels=config.data.max_image_pixels)
                    pictures += 1
                except Rejected as rejected:
                    defects.append(f"{shard.url} {member.name}: {rejected}")
    except tarfile.TarError as error:
        # The head ends inside a member; that is a defect only if nothing came before it.
        if pictures == 0:
            defects.append(f"{shard.url} is not a tar archive ({error})")
    return _Look(pictures, captions, defects)
