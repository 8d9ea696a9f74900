"""The shards of a configuration with their indexes: what an order is made from."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import DataError, Failure, NoIndex, NoShards, NotATar, NotFound
from data_pipeline.order.buckets import ASPECTS, Buckets, Walk, make_buckets, mix_buckets
from data_pipeline.order.lanes import Order, choose_lanes, choose_window
from data_pipeline.order.position import (
    Earlier,
    Fingerprint,
    Position,
    ShardSet,
    lanes_and_window,
    shards_of,
    takes_turns,
    window_of,
)
from data_pipeline.order.turns import Turns, choose_turn_lanes
from data_pipeline.shards.accepted import Accepted, count_accepted
from data_pipeline.shards.build_index import build_index, is_current
from data_pipeline.shards.filter_columns import check_captions, check_columns
from data_pipeline.shards.filters import Filter
from data_pipeline.shards.grouping import IMAGE_EXTENSIONS, group
from data_pipeline.shards.manifest import ManifestRow, bad_row, merge_parts, read_parts
from data_pipeline.shards.selection import picture_members, target_shapes
from data_pipeline.shards.sources import configs_of, shares_of, sources_of
from data_pipeline.shards.tars import scan
from data_pipeline.storage.files import read_range
from data_pipeline.storage.listing import ListedFile, list_files, look_up, spans
from data_pipeline.storage.urls import (
    distinguishing_depth,
    join,
    name_of,
    parent,
    shard_name,
    spelled_out,
)

logger = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[str, int, int], object]
"""Called with what is done, for how many shards, of how many; again about once a second, news or not."""

_MANY_PARTS = 64
_TRIED = 8
_HEAD_BYTES = 1_000_000
_SMALL = 2000
"""Up to this many shards are listed and checked at every start, and indexed on first use."""


@dataclass(frozen=True)
class Dataset:
    """Shards in the order of the sources; a source of repeat r occurs r times in `shard_of`."""

    urls: tuple[str, ...]
    """[U] distinct shards."""
    index_urls: tuple[str, ...]
    """[U] their index files."""
    sizes: tuple[int, ...]
    """[U] bytes of the shards."""
    versions: tuple[str, ...]
    """[U] ETags or modification times."""
    checksums: tuple[str, ...]
    """[U] SHA-256 of the index files."""
    shard_of: NDArray[np.int64]
    """[S] distinct shard of every entry of the epoch."""
    source_of: NDArray[np.int64]
    """[U] source of every distinct shard."""
    counts: NDArray[np.int64]
    """[S] raw samples of every entry."""
    mean_bytes: float
    """Mean size of a sample."""
    accepted: Accepted | None
    """What the index accepts of each distinct shard; None without buckets, which alone need it."""
    fingerprint: Fingerprint
    """Changes with anything the order depends on but the seed and lanes."""
    name_depth: int
    """Parts of a URL that make its short name unique."""
    unindexed: str = ""
    """Why nothing but names is known of the shards, a sentence; empty where an index tells. Without one, what
    stands for a shard above is empty, and `mean_bytes` is that of the first samples."""
    folders: tuple[tuple[int, str], ...] = ()
    """Of each source without an index: number of its first shard, and where its index goes."""
    record_in: str = ""
    """Folder for the index that a run without one leaves, where it may only read the shards; "": none."""
    shares: tuple[float, ...] = ()
    """How much of the served samples is of each source, which then has walks of its own; (): by `repeat`."""
    grown: tuple[Earlier, ...] = ()
    """What a run has known of the set before it grew."""

    @property
    def shards(self) -> ShardSet:
        """As a position tells of them."""
        counted = np.bincount(self.source_of, minlength=len(self.shares))
        return ShardSet(self.fingerprint, tuple(counted.tolist()), self.grown)

    def first(self, shards: Sequence[int]) -> Dataset:
        """The same with the first so many shards of each source as its entries, numbered as ever."""
        starts = np.searchsorted(self.source_of, np.arange(len(shards)))
        kept = np.arange(len(self.urls)) - starts[self.source_of] < np.asarray(shards)[self.source_of]
        entries = kept[self.shard_of]
        some = replace(
            self,
            shard_of=self.shard_of[entries],
            counts=self.counts[entries] if len(self.counts) else self.counts,
        )
        return replace(some, fingerprint=some._printed(some._lines()))

    def _lines(self, *, names_alone: bool = False) -> list[str]:
        """What an order depends on of each entry."""
        shards = self.shard_of.tolist()
        if self.unindexed or names_alone:
            return [name_of(self.urls[shard]) for shard in shards]
        pairs = zip(shards, self.counts.tolist(), strict=True)
        return [f"{name_of(self.urls[shard])} {count} {self.sizes[shard]}" for shard, count in pairs]

    def _printed(self, lines: Sequence[str]) -> Fingerprint:
        """Fingerprint of a line for each entry: of all, or where sources have weights of those of each."""
        if not self.shares:
            return _fingerprint(lines)
        sources = self.source_of[self.shard_of]
        mine = (np.flatnonzero(sources == number).tolist() for number in range(len(self.shares)))
        return tuple(_fingerprint(lines[i] for i in some) for some in mine)

    def sample_key(self, shard: int, key: str) -> str:
        """How a sample is called in traces, reject files and removal lists: `shard/key`."""
        return f"{shard_name(self.urls[shard], self.name_depth)}/{key}"

    @property
    def epoch_samples(self) -> int:
        """Raw samples that lanes pass until each has come once, also those of the rarest source."""
        if not self.shares:
            return int(self.counts.sum())
        own = np.bincount(self.source_of, self.counts, minlength=len(self.shares))
        return int(np.ceil(own / self.shares).max())

    def walk(
        self, config: DataConfig, *, seed: int, global_batch_size: int, position: Position = None
    ) -> Order | Turns:
        """Order of all samples, or turns at shards where there is no index or a run began without.

        Raises DataError for lanes that do not fit.
        """
        known = shards_of(position)
        if known is not None and (known.grown or known.shards != self.shards.shards):
            # What follows from the set must not change with it.
            lanes, window = lanes_and_window(position)
            config = replace(
                config, lanes=config.lanes or lanes, shuffle_window=config.shuffle_window or window
            )
        before = takes_turns(position)
        if not (self.unindexed or before):
            return self.order(config, seed=seed, global_batch_size=global_batch_size)
        if before is False:
            raise DataError(
                f"The checkpoint stopped in the order of an index. {self.unindexed} Go on with "
                "data.order=indexed and an index of all shards, or start a new run with init_from."
            )
        fewest = len(self.shard_of)
        if self.shares:
            fewest = int(np.bincount(self.source_of, minlength=len(self.shares)).min())
        lanes = choose_turn_lanes(config.lanes, global_batch_size, fewest)
        given = window_of(position) if before and not config.shuffle_window else None
        window = given or choose_window(config.shuffle_window, lanes, self.mean_bytes)
        return Turns(len(self.shard_of), seed, lanes, window, self.shard_of)

    def fingerprint_of(self, order: Order | Turns) -> Fingerprint:
        """Fingerprint of all that an order depends on: turns at shards on their names alone."""
        if self.unindexed or isinstance(order, Order):
            return self.fingerprint
        return self._printed(self._lines(names_alone=True))

    def order(self, config: DataConfig, *, seed: int, global_batch_size: int) -> Order:
        """Order of all samples, by the index. Raises DataError for lanes that do not fit."""
        assert not self.unindexed, self.unindexed
        counts = self.counts
        if self.accepted is not None and counts.sum():
            counts = self.accepted.aspects.sum(axis=1)[self.shard_of]
        total = int(counts.sum())
        if self.shares:
            total = int(np.bincount(self.source_of, counts, minlength=len(self.shares)).min())
        if self.accepted is not None and self.counts.sum() and total < max(1, config.lanes):
            enlarge = "set data.allow_enlarging=true, " if "too_small" in self.accepted.reasons else ""
            raise DataError(
                f"{self.accepted.sentence()}; {enlarge}loosen data.filter, lower data.lanes or correct "
                "the shards."
            )
        lanes = choose_lanes(config.lanes, global_batch_size, total)
        window = choose_window(config.shuffle_window, lanes, self.mean_bytes)
        return Order(self.counts, seed, lanes, window, shard_of=self.shard_of)

    def buckets(self, config: DataConfig, order: Order | Turns) -> Buckets:
        """Aspect-ratio buckets, or the one square shape. Raises DataError when they cannot be made.

        order: that of all samples, from `order` or `walk`
        """
        shapes = target_shapes(config)
        if not self.shares:
            if not config.buckets:
                return Buckets(shapes, (order,))
            assert isinstance(order, Order), "buckets need an index"
            assert self.accepted is not None, "opened with buckets"
            return make_buckets(shapes, self.accepted.aspects, order)
        orders = [self._of_source(order, source, share) for source, share in enumerate(self.shares)]
        if self.accepted is None or isinstance(order, Turns):
            walks = (Walk(0, source, share) for source, share in enumerate(self.shares))
            return Buckets(shapes, tuple(orders), mixed=tuple(walks))
        indexed = [order for order in orders if isinstance(order, Order)]
        return mix_buckets(shapes, self.accepted.aspects, indexed, self.shares)

    def _of_source(self, order: Order | Turns, source: int, share: float) -> Order | Turns:
        """The order of one source: a window of a rare one is as many steps as another's."""
        mine = np.flatnonzero(self.source_of[self.shard_of] == source)
        shards, window = self.shard_of[mine], max(1, round(order.window * share))
        if isinstance(order, Turns):
            return replace(order, shards=len(mine), window=window, shard_of=shards, source=source)
        return replace(order, counts=self.counts[mine], window=window, shard_of=shards, source=source)


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
    index_urls = tuple(join(f, r.index) for f, r in zip(folders, rows, strict=True))
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
            shard_of=shard_of,
            counts=samples[shard_of],
            mean_bytes=sum(r.bytes for r in rows) / max(1, int(samples.sum())),
            source_of=np.asarray(source_of, np.int64),
            accepted=accepted,
            fingerprint="",
            name_depth=distinguishing_depth(urls),
            shares=shares_of(config),
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
    for each, mine in alike:
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
        named = spelled_out(source.shards)
        found = named or [shard.url for shard in list_files(source.shards, timeout_s=timeout_s)]
        folders.append((len(urls), index_folder(config, found[0])))
        entries += [len(urls) + i for _ in range(source.repeat) for i in range(len(found))]
        urls += found
        source_of += [number] * len(found)
    _check_distinct(urls)
    return _complete(
        Dataset(
            urls=tuple(urls),
            index_urls=(),
            sizes=(),
            versions=(),
            checksums=(),
            shard_of=np.asarray(entries, np.int64),
            source_of=np.asarray(source_of, np.int64),
            counts=np.zeros(0, np.int64),
            mean_bytes=_first_bytes(urls, timeout_s),
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


def _fingerprint(lines: Iterable[str]) -> str:
    """Of a line for each entry of an epoch."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()[:16]


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
        known = _manifest(folder)
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
        return folder, _usable(config, source, _known_rows(source, folder, shards))
    indexing = partial(progress, f"indexing {source.shards}"[:60])
    report = build_index(
        shards,
        folder,
        progress=indexing,
        announce=lambda estimate: logger.info("index: %s", estimate.sentence()),
        timeout_s=config.request_timeout_s,
    )
    rows = [report.rows.get(s.url) or bad_row(s.url, s.size, s.version, report.failed[s.url]) for s in shards]
    return folder, _usable(config, source, rows)


def _usable(config: DataConfig, source: SourceConfig, rows: Sequence[ManifestRow]) -> list[ManifestRow]:
    """Rows of the shards that are tars; the others are named. Raises NotATar when they are too many."""
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
    return [row for row in rows if not row.is_bad]


def _manifest(folder: str) -> dict[str, ManifestRow]:
    """Rows by shard; what many processes have written while training becomes one file again."""
    rows, parts = read_parts(folder)
    if len(parts) > _MANY_PARTS:
        try:
            merge_parts(folder, {})
        except Failure as error:
            logger.warning("%d parts of the manifest stay: %s", len(parts), error)
    return rows


def _known_rows(source: SourceConfig, folder: str, shards: Sequence[ListedFile]) -> list[ManifestRow]:
    known = _manifest(folder)
    stale = [s for s in shards if not is_current(s, known.get(s.url))]
    if stale:
        raise NoIndex(
            f"{len(stale)} of the {len(shards)} shards of {source.shards} are new or changed; run "
            f"`ldm data index '{source.shards}' --workers 32` once."
        )
    return [known[s.url] for s in shards]
