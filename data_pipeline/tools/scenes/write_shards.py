"""Writes img2dataset-layout shards of procedurally drawn, captioned scenes."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.errors import DataError, NotFound
from data_pipeline.order.draws import fold
from data_pipeline.storage.files import list_names, read_bytes, remove_file, remove_names, write_bytes
from data_pipeline.storage.urls import join
from data_pipeline.tools.scenes.scene import Scene, SceneOptions, describe, ground_truth, make_scene, render

RECORD = "synthesis.json"
"""Beside the shards: what they were made from."""
_OURS = re.compile(r"(\d{5}|[1-9]\d{5,})(\.tar|\.parquet|_stats\.json)")


@dataclass(frozen=True)
class SynthesisOptions:
    """What `synthesize` writes. Raises DataError for what cannot be."""

    samples: int
    """Rows in total, failed ones included."""
    seed: int = 0
    """Everything is a function of the seed and the sample's number."""
    samples_per_shard: int = 1000
    """Rows per shard (at most 10000, the keys have four digits)."""
    failed_share: float = 0.02
    """Share of rows that are in the parquet as failed downloads, without tar members; below 1."""
    jpeg_quality: int = 92
    """1 to 100."""
    maps: bool = False
    """Also write <key>.seg.png and <key>.depth.png."""
    scene: SceneOptions = field(default_factory=SceneOptions)
    """What is drawn."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise DataError(f"--samples is {self.samples}; at least 1 is needed.")
        if not 1 <= self.samples_per_shard <= 10_000:
            raise DataError(f"--samples-per-shard is {self.samples_per_shard}; it must be 1 to 10000.")
        if not 0 <= self.failed_share < 1:
            raise DataError(f"--failed-share is {self.failed_share}; it must be at least 0 and below 1.")
        if not 1 <= self.jpeg_quality <= 100:
            raise DataError(f"--quality is {self.jpeg_quality}; it must be 1 to 100.")

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.samples // self.samples_per_shard)


@dataclass(frozen=True)
class ShardReport:
    """What one written shard holds."""

    shard: int
    rows: int
    successes: int
    bytes: int


def synthesize(
    url: str, options: SynthesisOptions, *, workers: int = 1, overwrite: bool = False
) -> Iterator[ShardReport]:
    """Write all shards to the folder `url`, yielding a report as each is complete.

    Files: 00000.tar, 00000.parquet, 00000_stats.json, and what they were made from as synthesis.json. Equal
    options give equal bytes, with any number of workers, so the same again goes on where it was interrupted.

    overwrite: remove files of these names that were made from something else, or nobody knows from what.

    Raises:
        DataError: the folder holds other shards, or cannot be written.
    """
    _make_room(url, options, overwrite=overwrite)
    tasks = [(url, options, shard) for shard in range(options.shards)]
    if workers <= 1:
        for task in tasks:  # not `map`, in which a StopIteration would look like the end
            yield _write_shard(task)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_write_shard, tasks)


def _make_room(url: str, options: SynthesisOptions, *, overwrite: bool) -> None:
    """See that a folder holds no shards but those of these options, and record them before the first."""
    record, place = json.dumps(asdict(options), indent=1).encode(), join(url, RECORD)
    try:
        former = read_bytes(place)
    except NotFound:
        former = None
    if former == record:
        return
    there = list_names(url)
    ours = [name for name in there if _OURS.fullmatch(name)]
    others = [name for name in there if name.endswith(".tar") and name not in ours]
    if others:
        raise DataError(f"{url} holds shards of another kind ({others[0]}); choose another folder.")
    if ours and not overwrite:
        raise DataError(
            f"{url} holds other shards ({ours[0]}) than those of this command; choose another folder, "
            "or give --overwrite to replace them."
        )
    remove_file(place)  # first, and written last: it must not vouch for what is left if this is interrupted
    remove_names(url, ours, keep_folder=True)
    write_bytes(place, record)


def _write_shard(task: tuple[str, SynthesisOptions, int]) -> ShardReport:
    url, options, shard = task
    first = shard * options.samples_per_shard
    rows = min(options.samples_per_shard, options.samples - first)
    table: list[dict[str, Any]] = []
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(rows):
            key = f"{shard:05d}{i:04d}"
            row, members = draw_sample(options, first + i, key)
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                info.mtime = 1_700_000_000  # fixed: equal seeds give equal bytes
                tar.addfile(info, io.BytesIO(content))
            table.append(row)
    successes = sum(row["status"] == "success" for row in table)
    name = join(url, f"{shard:05d}")
    write_bytes(f"{name}.parquet", _parquet(table))
    stats = {
        "count": rows,
        "successes": successes,
        "failed_to_download": rows - successes,
        "failed_to_resize": 0,
        "duration": 0.0,
        "start_time": 1_700_000_000.0,
        "end_time": 1_700_000_000.0,
        "status_dict": {"success": successes, "HTTP Error 404: Not Found": rows - successes},
    }
    write_bytes(f"{name}_stats.json", json.dumps(stats, indent=1).encode())
    # the tar last: a shard that is there is complete
    write_bytes(f"{name}.tar", buffer.getvalue())
    return ShardReport(shard, rows, successes, buffer.tell())


def draw_sample(options: SynthesisOptions, number: int, key: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Parquet row and tar members (by extension; empty for a failed row) of sample `number`."""
    rng = random.Random(fold(options.seed, number))
    scene = make_scene(options.scene, rng)
    captions = describe(scene, rng)
    row = {
        "key": key,
        "url": f"https://scenes.invalid/{options.seed}/{number}.jpg",
        "caption": rng.choice(captions),
        **_laion_columns(rng, scene),
    }
    if rng.random() < options.failed_share:
        row |= {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found"}
        row |= {"width": None, "height": None, "sha256": None}
        return row, {}
    pixels, semantic, depth = render(scene)
    jpeg = _encode(pixels, "JPEG", quality=options.jpeg_quality)
    row["sha256"] = hashlib.sha256(jpeg).hexdigest()
    truth = {**row, "all_captions": captions, **ground_truth(scene)}
    members = {
        "jpg": jpeg,
        "json": json.dumps(truth).encode(),
        "txt": str(row["caption"]).encode(),
    }
    if options.maps:
        members["seg.png"] = _encode(semantic, "PNG")
        members["depth.png"] = _encode(depth, "PNG")
    return row, members


def _laion_columns(rng: random.Random, scene: Scene) -> dict[str, Any]:
    """The metadata columns of LAION sets, with plausible, independent values."""
    return {
        "similarity": round(rng.uniform(0.28, 0.42), 5),
        "punsafe": round(rng.betavariate(0.4, 6.0), 6),
        "pwatermark": round(rng.betavariate(0.8, 2.5), 6),
        # a few missing values, as in the real sets
        "aesthetic": None if rng.random() < 0.01 else round(rng.gauss(5.1, 0.6), 5),
        "LANGUAGE": rng.choice(["en", "en", "en", "de", "fr"]),
        "LICENSE": "?",
        "NSFW": rng.choices(["UNLIKELY", "UNSURE", "NSFW"], [0.93, 0.05, 0.02])[0],
        "status": "success",
        "error_message": None,
        "width": scene.width,
        "height": scene.height,
        "original_width": scene.width,
        "original_height": scene.height,
        "exif": "{}",
        "sha256": None,
    }


def _encode(pixels: NDArray[np.uint8], kind: str, **options: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = {"similarity", "punsafe", "pwatermark", "aesthetic"}
    integers = {"width", "height", "original_width", "original_height"}
    schema = pa.schema(
        [(n, pa.float64() if n in numbers else pa.int64() if n in integers else pa.string()) for n in rows[0]]
    )
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), out)
    return out.getvalue()
