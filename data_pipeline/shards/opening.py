"""Finding the shards of a configuration and their indexes; small sets are indexed on the way."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeAlias

import numpy as np

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import DataError, Failure, NoIndex, NoShards, NotATar, NotFound
from data_pipeline.order.buckets import ASPECTS
from data_pipeline.shards.accepted import Accepted, count_accepted
from data_pipeline.shards.beside import promised_by_stats, stats_of
from data_pipeline.shards.build_index import build_index, is_current
from data_pipeline.shards.dataset import Dataset
from data_pipeline.shards.filter_columns import check_captions, check_columns
from data_pipeline.shards.filters import Filter
from data_pipeline.shards.grouping import IMAGE_EXTENSIONS, group
from data_pipeline.shards.manifest import ManifestRow, has_many, index_name, merge_parts, read_parts
from data_pipeline.shards.selection import picture_members
from data_pipeline.shards.sources import configs_of, shares_of, sources_of
from data_pipeline.shards.tars import scan
from data_pipeline.storage.files import read_bytes, read_range
from data_pipeline.storage.listing import ListedFile, list_files, look_up, spans
from data_pipeline.storage.urls import (
    distinguishing_depth,
    join,
    parent,
    spelled_out,
)

logger = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[str, int, int], object]
"""Called with what is done, for how many shards, of how many; again about once a second, news or not."""

_TRIED = 8
_NOTED = 8
"""Shards whose `_stats.json` is read for an estimate of the samples of all."""
_HEAD_BYTES = 1_000_000
_SMALL = 2000
"""Up to this many shards are listed and checked at every start, and indexed on first use."""


def index_folder(config: DataConfig, first_shard: str) -> str:
    """Where the index of a source lies."""
    return config.index or join(parent(first_shard), "_index")


def untold(what: str, done: int, total: int) -> None:
    """Progress that nobody wants to hear of."""


def open_dataset(config: DataConfig, *, progress: Progress = untold, at_once: bool = False) -> Dataset:
    """Find the shards and their index; small sets are checked and indexed on first use, which may take hours.

    at_once: large sets without a whole index are opened by their names alone, as all are with
        data.order=streamed.

    Raises DataError: no shards, more that are not tars than data.max_bad_shards allows, a large set without
    an index, or a filter that is wrong or names columns that no shard has.
    """
    if at_once and config.order == "streamed":
        return _listed(config, "data.order=streamed uses none.")
    try:
        return _indexed(config, progress)
    except NoIndex as error:
        if not at_once or config.buckets:
            raise
        logger.warning(
            "starting at once, without an index: %s Shards are read in turn and learned as they are met; "
            "filters reject only what has been read.",
            error,
        )
        return _listed(config, str(error))


def _indexed(config: DataConfig, progress: Progress) -> Dataset:
    configs = configs_of(config)
    for each in configs:
        Filter(each.filter)  # refused before anything is read
    picture = picture_members(config)
    urls: list[str] = []
    rows: list[ManifestRow] = []
    folders: list[str] = []
    entries: list[int] = []
    source_of: list[int] = []
    for number, source in enumerate(sources_of(config)):
        folder, found = _open_source(config, source, progress)
        first = len(urls)
        for row in found:
            urls.append(row.shard)
            rows.append(row)
            folders.append(folder)
            source_of.append(number)
        entries += [first + i for _ in range(source.repeat) for i in range(len(found))]
    _check_distinct(urls)
    index_urls = tuple(join(f, r.index or index_name(r.shard)) for f, r in zip(folders, rows, strict=True))
    alike = _read_alike(configs, source_of)
    for each, mine in alike:
        check_columns(Filter(each.filter), [rows[i] for i in mine])
        check_captions(each.captions, [rows[i] for i in mine if rows[i].samples])
    _check_members(picture, rows)
    counting = partial(progress, "counting what is accepted")
    accepted = _accepted(alike, rows, index_urls, counting) if config.buckets else None
    shard_of = np.asarray(entries, np.int64)
    samples = np.asarray([row.samples for row in rows], np.int64)
    return _complete(
        Dataset(
            urls=tuple(urls),
            index_urls=index_urls,
            sizes=tuple(row.size for row in rows),
            versions=tuple(row.version for row in rows),
            checksums=tuple(row.checksum for row in rows),
            beside=tuple(row.beside for row in rows),
            shard_of=shard_of,
            counts=samples[shard_of],
            mean_bytes=sum(r.bytes for r in rows) / max(1, int(samples.sum())),
            source_of=np.asarray(source_of, np.int64),
            accepted=accepted,
            fingerprint="",
            name_depth=distinguishing_depth(urls),
            shares=shares_of(config),
            former={shard: row.former for shard, row in enumerate(rows) if row.former},
        )
    )


def _read_alike(
    configs: Sequence[DataConfig], source_of: Sequence[int]
) -> list[tuple[DataConfig, list[int]]]:
    """The ways in which shards are read, each with its shards, in their order."""
    places = [configs.index(each) for each in configs]
    shards: dict[int, list[int]] = {}
    for shard, source in enumerate(source_of):
        shards.setdefault(places[source], []).append(shard)
    return [(configs[place], mine) for place, mine in shards.items()]


def _accepted(
    alike: Sequence[tuple[DataConfig, list[int]]],
    rows: Sequence[ManifestRow],
    index_urls: Sequence[str],
    progress: Callable[[int, int], object],
) -> Accepted:
    """What the index accepts of all shards, of which some are read otherwise than others."""
    aspects = np.zeros((len(rows), ASPECTS), np.int64)
    reasons: Counter[str] = Counter()
    for each, shards in alike:
        mine = [shard for shard in shards if not rows[shard].is_bad]
        some = count_accepted(each, [rows[i] for i in mine], [index_urls[i] for i in mine], progress)
        aspects[mine] = some.aspects
        reasons.update(some.reasons)
    return Accepted(aspects, dict(reasons))


def _listed(config: DataConfig, why: str) -> Dataset:
    """The shards by their names, which are listed only where they are not spelled out."""
    if config.buckets:
        raise DataError(
            "data.buckets needs an index, which says how many samples each shape has; set data.order=indexed."
        )
    for each in configs_of(config):
        Filter(each.filter)  # refused now rather than by each worker
    timeout_s, urls, entries = config.request_timeout_s, list[str](), list[int]()
    folders, source_of = [], list[int]()
    for number, source in enumerate(sources_of(config)):
        found: Sequence[str] | None = spelled_out(source.shards)
        if found is None:
            found = [shard.url for shard in list_files(source.shards, timeout_s=timeout_s)]
        folders.append((len(urls), index_folder(config, found[0])))
        entries += [len(urls) + i for _ in range(source.repeat) for i in range(len(found))]
        urls += found
        source_of += [number] * len(found)
    _check_distinct(urls)
    with ThreadPoolExecutor(_NOTED) as pool:  # beside the first look at a shard, which takes as long
        notes = [pool.submit(_noted, url, timeout_s) for url in urls[:: -(-len(urls) // _NOTED)]]
        mean_bytes = _first_bytes(urls, timeout_s)
        _tell_samples([note.result() for note in notes], len(urls))
    return _complete(
        Dataset(
            urls=tuple(urls),
            index_urls=(),
            sizes=(),
            versions=(),
            checksums=(),
            beside=(),
            shard_of=np.asarray(entries, np.int64),
            source_of=np.asarray(source_of, np.int64),
            counts=np.zeros(0, np.int64),
            mean_bytes=mean_bytes,
            accepted=None,
            fingerprint="",
            name_depth=distinguishing_depth(urls),
            unindexed=why,
            folders=tuple(folders),
            shares=shares_of(config),
        )
    )


def _check_distinct(urls: Sequence[str]) -> None:
    if len(set(urls)) != len(urls):
        raise DataError("The same shard is in two sources; name it once, with repeat, to weight it.")


def _complete(dataset: Dataset) -> Dataset:
    """With its fingerprint."""
    return dataset.first(dataset.shards.shards)


def _first_bytes(urls: Sequence[str], timeout_s: float) -> float:
    """Mean size of the first samples of the first shard that is there and has some.

    Raises NoShards where none of several has.
    """
    for url in urls[:_TRIED]:
        try:
            shard = look_up(url, timeout_s=timeout_s)
            head = read_range(url, 0, min(shard.size, _HEAD_BYTES), timeout_s=timeout_s)
        except NotFound:
            continue
        members = scan(partial(_part, head), len(head)).members
        if samples := group(members).samples:
            return sum(member.size for member in members) / len(samples)
    raise NoShards(
        f"None of the first {min(_TRIED, len(urls))} shards, from {urls[0]} on, is there and has samples; "
        "correct data.shards."
    )


def _noted(url: str, timeout_s: float) -> int | None:
    """Samples of a shard by the `_stats.json` beside it; None where none is there or can be read."""
    try:
        return promised_by_stats(read_bytes(stats_of(url), timeout_s=timeout_s, tries=1))
    except Failure:
        return None


def _tell_samples(notes: Sequence[int | None], shards: int) -> None:
    """About how many samples there are, where files beside some shards say what those hold."""
    known = [samples for samples in notes if samples is not None]
    if known:
        about = float(f"{sum(known) / len(known) * shards:.2g}")
        logger.info(
            "about %s samples in %d shards, by the _stats.json beside %d of them",
            f"{about:,.0f}",
            shards,
            len(known),
        )


def _part(data: bytes, start: int, stop: int) -> bytes:
    return data[start:stop]


def _check_members(picture: Sequence[str], rows: Sequence[ManifestRow]) -> None:
    """Whether there are pictures at all, and a word about shards whose members lie apart."""
    members = Counter(extension for row in rows for extension in row.members)
    if members and not any(members[extension] for extension in picture):
        listed = ", ".join(name for name, _ in members.most_common(20))
        raise DataError(
            f"No sample has a picture: data.picture names {', '.join(picture)}, and the members of the "
            f"shards are {listed}; {_remedy(members)}."
        )
    apart = [row for row in rows if row.apart]
    if apart:
        logger.warning(
            "the members of %d samples in %d of %d shards (first %s) lie apart, so each takes a request of "
            "its own; `tar --sort=name` puts them side by side",
            sum(row.apart for row in apart),
            len(apart),
            len(rows),
            apart[0].shard,
        )


def _remedy(members: Counter[str]) -> str:
    """Name the most frequent member that may be a picture."""
    found = [name for name, _ in members.most_common() if name.rpartition(".")[2] in IMAGE_EXTENSIONS]
    return f"name the pictures' extension, e.g. data.picture=[{found[0]}]" if found else "correct data.shards"


def _open_source(
    config: DataConfig, source: SourceConfig, progress: Progress
) -> tuple[str, list[ManifestRow]]:
    named = spelled_out(source.shards)  # a large set is then opened without a single listing
    if named is not None and len(named) > _SMALL:
        folder = index_folder(config, named[0])
        known = _manifest(folder, progress)
        missing = [name for name in named if name not in known]
        if missing:
            raise NoIndex(
                f"{len(missing)} of the {len(named)} shards of {source.shards} have no index "
                f"({spans(missing, named)}); run `ldm data index '{source.shards}' --workers 32` once."
            )
        return folder, _usable(config, source, [known[name] for name in named])
    shards = list_files(source.shards, timeout_s=config.request_timeout_s)
    folder = index_folder(config, shards[0].url)
    if len(shards) > _SMALL:
        return folder, _usable(config, source, _known_rows(source, folder, shards, progress))
    indexing = partial(progress, f"indexing {source.shards}"[:60])
    report = build_index(
        shards,
        folder,
        progress=indexing,
        announce=lambda estimate: logger.info("index: %s", estimate.sentence()),
        timeout_s=config.request_timeout_s,
    )
    if report.other_parquets:
        logger.warning(
            "beside %d of %d shards lies another parquet than their index is of: what was read first counts, "
            "until `ldm data index %s` reads them again",
            report.other_parquets,
            len(shards),
            source.shards,
        )
    rows = report.rows | report.failed
    return folder, _usable(config, source, [rows[shard.url] for shard in shards])


def _usable(config: DataConfig, source: SourceConfig, rows: Sequence[ManifestRow]) -> list[ManifestRow]:
    """Rows of the shards that are tars, or were; the others are named. Raises NotATar when too many are none.

    What was a tar keeps its place without a sample: a run that began with it counts it.
    """
    bad = [row for row in rows if row.is_bad]
    if len(bad) > config.max_bad_shards * len(rows):
        others = f" Nor are {spans([r.shard for r in bad[1:]], [r.shard for r in rows])}." if bad[1:] else ""
        share = -(-1000 * len(bad) // len(rows)) / 1000
        raise NotATar(
            f"{bad[0].problems[0]}{others} data.max_bad_shards={share:g} trains without "
            f"{'it' if len(bad) == 1 else 'them'}, {len(bad)} of the {len(rows)} shards of {source.shards}."
        )
    for row in bad:
        logger.warning("left out, %d of %d shards: %s", len(bad), len(rows), row.problems[0])
    return [row for row in rows if row.former or not row.is_bad]


def _manifest(folder: str, progress: Progress) -> dict[str, ManifestRow]:
    """Rows by shard; what many processes have written while training becomes one file again."""
    rows, parts = read_parts(folder, partial(progress, "reading the index"))
    if has_many(parts):
        try:
            merge_parts(folder, rows, parts, partial(progress, "merging the index"))
        except Failure as error:
            logger.warning("%d parts of the manifest stay: %s", len(parts), error)
    return rows


def _known_rows(
    source: SourceConfig, folder: str, shards: Sequence[ListedFile], progress: Progress
) -> list[ManifestRow]:
    known = _manifest(folder, progress)
    stale = [s for s in shards if not is_current(s, known.get(s.url))]
    if stale:
        raise NoIndex(
            f"{len(stale)} of the {len(shards)} shards of {source.shards} are new or changed; run "
            f"`ldm data index '{source.shards}' --workers 32` once."
        )
    return [known[s.url] for s in shards]
