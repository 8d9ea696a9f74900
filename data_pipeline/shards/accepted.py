"""What the index accepts of each shard, by aspect: what the orders of buckets are made from.

A manifest tells how many samples a shard has, but not how many of them a filter keeps. So the indexes of all
shards are read once, at the first start with these settings, and the counts stored beside the manifest:

    accepted-1f0c9a77d2e35b04.npz     aspects  [U, ASPECTS]   accepted samples of each shard by aspect
                                      reasons  JSON           how many of all shards are not, by reason

The name is a digest of all that decides (filter, sizes, the checksums of the indexes), so a file is either
right or not looked at. Where the folder cannot be written to, the next start reads the indexes again.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError, Failure, NotFound
from data_pipeline.order.buckets import ASPECTS, aspect_of
from data_pipeline.shards.index import VERSION
from data_pipeline.shards.manifest import ManifestRow, decode_listed
from data_pipeline.shards.selection import make_selection, target_shapes
from data_pipeline.storage.files import read_bytes, write_bytes
from data_pipeline.storage.urls import join, parent

logger = logging.getLogger(__name__)

_FORMAT = 1
_MANY = 2000
"""From so many shards on, processes of their own decode the indexes: threads decode one at a time."""
_CHUNK = 32
_READERS = 16


@dataclass(frozen=True)
class Accepted:
    """Samples that filter, sizes and index leave over; removal lists are not asked."""

    aspects: NDArray[np.int64]
    """[U, ASPECTS] of each distinct shard, by class of aspect."""
    reasons: dict[str, int]
    """Samples of all shards that are not, by reason."""

    def sentence(self) -> str:
        """How many of how many, and why the others are not."""
        kept = int(self.aspects.sum())
        listed = sorted(self.reasons.items(), key=lambda item: -item[1])
        others = "".join(f", {reason} ({count:,})" for reason, count in listed)
        return f"{kept:,} of {kept + sum(self.reasons.values()):,} samples are accepted{others}"


def count_accepted(
    config: DataConfig,
    rows: Sequence[ManifestRow],
    index_urls: Sequence[str],
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Accepted:
    """Count, or read what a start before this one has counted. Raises DataError for a damaged index.

    progress: called with the shards that are counted and their number, again and again
    """
    if not any(row.aspects for row in rows):
        raise DataError("data.buckets needs picture sizes in the index; run `ldm data index` again.")
    url = join(parent(index_urls[0]), f"accepted-{_digest(config, rows)}.npz")
    found = _stored(url, len(rows))
    if found is None:
        logger.info("counting what the filter accepts of %d shards, once for these settings", len(rows))
        wanted = [(index, row.checksum) for index, row in zip(index_urls, rows, strict=True)]
        found = _counted(config, wanted, progress)
        try:
            write_bytes(url, _encoded(found))
        except Failure as error:
            logger.warning("what the filter accepts is counted again at every start: %s", error)
    logger.info("buckets: %s", found.sentence())
    return found


def _digest(config: DataConfig, rows: Sequence[ManifestRow]) -> str:
    # By repr: `make_selection` reads these, and no other settings, where it decides by the index.
    selection = make_selection(config, removals=())
    settings = (
        config.filter.strip(),
        target_shapes(config),
        config.allow_enlarging,
        config.max_member_bytes,
        config.max_image_pixels,
        selection.members,
        selection.wants_text,
        *([selection.held_out_share] if selection.held_out_share else []),
    )
    digest = hashlib.sha256(json.dumps([_FORMAT, VERSION, ASPECTS, repr(settings)]).encode())
    for row in rows:
        digest.update(row.checksum.encode())
    return digest.hexdigest()[:16]


def _encoded(found: Accepted) -> bytes:
    out, reasons = io.BytesIO(), json.dumps(found.reasons).encode()
    np.savez_compressed(
        out,
        allow_pickle=False,
        aspects=found.aspects.astype(np.uint32),
        reasons=np.frombuffer(reasons, np.uint8),
    )
    return out.getvalue()


def _stored(url: str, shards: int) -> Accepted | None:
    try:
        with np.load(io.BytesIO(read_bytes(url)), allow_pickle=False) as arrays:
            aspects = arrays["aspects"].astype(np.int64)
            reasons = json.loads(arrays["reasons"].tobytes())
    except NotFound:
        return None
    except Exception as error:  # noqa: BLE001 - numpy and zipfile raise many types for damaged files
        logger.warning("%s is not readable (%s); counting again", url, error)
        return None
    return Accepted(aspects, reasons) if aspects.shape == (shards, ASPECTS) else None


def _counted(
    config: DataConfig, wanted: Sequence[tuple[str, str]], progress: Callable[[int, int], object]
) -> Accepted:
    pool: Executor
    if len(wanted) > _MANY:
        pool = ProcessPoolExecutor(min(_READERS, os.cpu_count() or 1), mp_context=get_context("spawn"))
    else:
        pool = ThreadPoolExecutor(_READERS)
    chunks = [wanted[i : i + _CHUNK] for i in range(0, len(wanted), _CHUNK)]
    parts: list[Accepted] = []
    with pool:
        for part in pool.map(partial(_count_some, config), chunks):
            parts.append(part)
            progress(min(len(wanted), _CHUNK * len(parts)), len(wanted))
    reasons = sum((Counter(part.reasons) for part in parts), Counter())
    return Accepted(np.concatenate([part.aspects for part in parts]), dict(reasons))


def _count_some(config: DataConfig, wanted: Sequence[tuple[str, str]]) -> Accepted:
    selection = make_selection(config, removals=())
    counts = []
    reasons: Counter[str] = Counter()
    for url, checksum in wanted:
        data = read_bytes(url, timeout_s=config.request_timeout_s, tries=config.max_retries)
        index = decode_listed(data, url, checksum)
        index.choose_picture(selection.picture)
        decided = selection.decide(index)
        counts.append(np.bincount(aspect_of(*index.picture_sizes())[decided.accepted], minlength=ASPECTS))
        reasons += decided.counted()
    return Accepted(np.stack(counts), dict(reasons))
