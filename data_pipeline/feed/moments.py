"""A worker's side of the cache of moments: what stands for a picture, found before it is read, checked after.

The life of one sample. At its first visit the cache has nothing:

    plan     key from stage, picture and transform -> not found: the picture is read with the other members
    serve    decoded and cropped; a label goes with the row: under what its moments are to be stored
    encode   the training process encodes the row, hands moments and label to its writer, trains on
    pack     in a thread there: an entry of a part, beside its neighbours of the shard     (writer.py)
    commit   the part is full: tar, table, rows of the shard                               (parts.py)

and from the next visit on, in this run or another, it has:

    plan     found: a range of the part is asked for instead of the picture
    take     checksum and key are right, and the shard is still what the key says: moments into the row
             otherwise the picture is read after all, and all is as at the first visit

Small members (txt, json, cls) are kept beside the moments, as they lie in the shard, or bytes of pictures
would still be read in passing from one caption to the next. What becomes of them is decided at every visit as
ever: filters, captions, conditions and draws do not know where the bytes came from.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import astuple, dataclass, replace

from data_pipeline.errors import Gone, ReadFailed, Replaced
from data_pipeline.feed.reads import Contents, Extent, MemberReads
from data_pipeline.feed.sample import Reused, draw_crop
from data_pipeline.feed.task import ShareTask
from data_pipeline.moments.catalogue import REFRESH_S, Catalogue, EntryPlace
from data_pipeline.moments.entry import Damaged, IndexedPicture, KeptMember, Label, digest, entry_key, unpack
from data_pipeline.moments.parts import part_url
from data_pipeline.pictures.crops import RESAMPLING, Geometry
from data_pipeline.shards.selection import picture_members
from data_pipeline.shards.sources import configs_of
from data_pipeline.shards.view import ShardView
from data_pipeline.storage.editions import Edition
from data_pipeline.storage.ranges import RangeReader
from data_pipeline.storage.retry import ShortBody, is_transient

logger = logging.getLogger(__name__)

_ENTRY = "moments"
_MEMBER_BYTES = 16_384
"""Larger members, maps mostly, stay in the shard alone."""


@dataclass
class PlannedMoments:
    """What the cache has for one visit, or is to get from it."""

    label: Label
    shard: int
    edition: Edition
    """Of the shard when the key was made."""
    picture: str
    """Extension of the member that is the picture."""
    extents: dict[str, Extent]
    """Where each member of the sample lies in its shard, by extension."""
    target: tuple[int, int]
    met: bool = False
    """Whether the lane, which has no index, has just read of the shard: nothing else tells the edition."""
    place: EntryPlace | None = None
    """Where its moments lie; None: they are not there."""
    future: Future[Contents] | None = None

    @property
    def unread(self) -> frozenset[str]:
        """Members that are not read from the shard."""
        if self.place is None:
            return frozenset()
        return (self.place.members & self.extents.keys()) | {self.picture}


class MomentsReads:
    """Finds, reads and checks the moments of a worker's samples."""

    def __init__(self, task: ShareTask, reads: MemberReads, capacity: int) -> None:
        """`capacity`: shards in use; `reads`: of the shards, asked whether they are still the same."""
        assert task.moments.cache is not None
        config = task.config
        self._task, self._cache = task, task.moments.cache
        self._pictures = frozenset(picture_members(config))
        self._configs = configs_of(config)
        self._reads = reads
        self._parts = RangeReader(
            timeout_s=config.request_timeout_s,
            tries=min(3, config.max_retries),
            patience_s=config.patience_s,
            probes=task.dataset.urls[:2],
        )
        self._catalogue = Catalogue(self._cache.folder, capacity)
        self._asked: dict[int, tuple[float, Edition]] = {}
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._told = False

    @property
    def counts(self) -> Counter[str]:
        """cache_found, cache_missed, cache_damaged samples; cache_requests and cache_bytes of reading."""
        read = {f"cache_{name}": self._parts.counts[name] for name in ("requests", "bytes", "retries")}
        return self._counts + Counter(read)

    def plan(
        self,
        shard: int,
        view: ShardView,
        row: int,
        target: tuple[int, int],
        ordinal: int,
        met: Edition | None = None,
    ) -> PlannedMoments | None:
        """What the cache has of a row; None where it can neither have nor get anything.

        met: the edition of the shard that a lane without an index has just read of
        """
        places = zip(view.members, view.offsets[:, row].tolist(), view.sizes[:, row].tolist(), strict=True)
        extents = {name: Extent(start, start + size, 0, name) for name, start, size in places if start >= 0}
        picture = next((name for name in extents if name in self._pictures), None)
        edition = self._edition(shard, met)
        if picture is None or edition is None:
            return None
        first, stop = extents[picture].start, extents[picture].stop
        task, url, sample = self._task, self._task.dataset.urls[shard], view.key(row)
        config = self._configs[task.dataset.source_of[shard]]
        crop = draw_crop(config, sample, task.moments.variants, seed=task.order.seed, ordinal=ordinal)
        key = entry_key(
            self._cache.stage,
            IndexedPicture(url, edition.size, edition.version, first, stop - first),
            (*target, *crop, RESAMPLING),
        )
        place = self._catalogue.find(url, key) if self._catalogue.answers else None
        if place is not None and met is None:
            edition_now = self._asked_again(shard, edition)
            if edition_now != edition:
                return self.plan(shard, view, row, target, ordinal) if edition_now is not None else None
        label = Label(key.hex(), url, sample, first, view.identities_of(row))
        return PlannedMoments(label, shard, edition, picture, extents, target, met is not None, place)

    def start(self, planned: Mapping[int, PlannedMoments], due: float) -> None:
        """Begin to read what was found, by slot of the plan."""
        wanted: dict[tuple[str, int], list[Extent]] = {}
        for slot, each in planned.items():
            if each.place is not None:
                extent = Extent(each.place.offset, each.place.offset + each.place.size, slot, _ENTRY)
                part = part_url(self._cache.folder, each.place.part), each.place.part_size
                wanted.setdefault(part, []).append(extent)
        for (slot, _), future in self._reads.start_from(wanted, due, self._read_part).items():
            planned[slot].future = future

    def _read_part(self, part: tuple[str, int], start: int, stop: int) -> bytes:
        """A range of a part, which has a certain size: one that is cut short is not asked again and again."""
        url, size = part
        return self._parts.read(url, start, stop, expected=Edition(size, "None"))

    def take(self, planned: PlannedMoments, slot: int) -> Reused | None:
        """The moments of a visit, once they are there and right; None: the picture is to be encoded.

        Raises:
            Replaced: the shard holds other samples by now.
        """
        if planned.place is None or planned.future is None:
            return None
        try:
            data = planned.future.result().pop((slot, _ENTRY))
        except Replaced as error:
            self._damaged(planned.place, str(error)[:200])
            return None
        except ReadFailed as error:
            cause = error.__cause__
            if cause is None or (is_transient(cause) and not isinstance(cause, ShortBody)):
                self._catalogue.silent(error)
            else:
                why = "it is gone" if isinstance(error, Gone) else str(cause)[:200]
                self._damaged(planned.place, why)
            return None
        if digest(data) != planned.place.check:
            self._damaged(planned.place, "a checksum differs")
            return None
        if self._expected(planned) != planned.edition:
            return None
        try:
            shape = self._cache.shape(*planned.target)
            entry = unpack(data, planned.label.key, self._cache.dtype, shape)
        except Damaged as error:
            self._damaged(planned.place, str(error))
            return None
        same = {
            name: member.content
            for name, member in entry.members.items()
            if name in planned.unread and _is_at(member, planned.extents[name])
        }
        return Reused(entry.values, geometry_of(entry.geometry), same)

    def unread(self, planned: PlannedMoments, reused: Reused | None) -> dict[str, bytes]:
        """Members that were to come from the cache: what it holds, the others from the shard after all.

        Raises ReadFailed, Replaced.
        """
        held = reused.members if reused is not None else {}
        lacking = planned.unread - held.keys() - ({planned.picture} if reused is not None else set())
        return {**held, **{name: self._read(planned, planned.extents[name]) for name in sorted(lacking)}}

    def label(
        self, planned: PlannedMoments, members: Mapping[str, bytes], geometry: Geometry
    ) -> Label | None:
        """Under what, and beside what, the moments are stored; None where the shard changed on the way."""
        try:
            same = self._expected(planned) == planned.edition
        except Replaced:
            same = False
        if not same:
            return None
        small = tuple(
            KeptMember(name, planned.extents[name].start, content)
            for name, content in members.items()
            if name not in self._pictures and name in planned.extents and len(content) <= _MEMBER_BYTES
        )
        return replace(planned.label, members=small, geometry=astuple(geometry))

    def count(self, name: str) -> None:
        """One more served sample that was `found` or `missed`."""
        self._counts[f"cache_{name}"] += 1

    def close(self) -> None:
        """Wake sleeping retries."""
        self._parts.close()

    def _damaged(self, place: EntryPlace, why: str) -> None:
        self._counts["cache_damaged"] += 1
        self._catalogue.broken(place, why)

    def _expected(self, planned: PlannedMoments) -> Edition:
        """The edition of its shard by now. Raises Replaced."""
        return planned.edition if planned.met else self._reads.editions.expected(planned.shard)

    def _read(self, planned: PlannedMoments, extent: Extent) -> bytes:
        if planned.met:
            return self._reads.read_met((planned.shard, planned.edition), extent.start, extent.stop)
        return self._reads.read_now(planned.shard, extent)

    def _edition(self, shard: int, met: Edition | None) -> Edition | None:
        """None: the shard was replaced, or its storage tells neither ETag nor time."""
        try:
            edition = met or self._reads.editions.expected(shard)
        except Replaced:
            return None
        if edition.version not in ("", "None"):
            return edition
        if not self._told:
            self._told = True
            logger.warning(
                "the storage of %s tells neither an ETag nor when it was changed, so nothing would show that "
                "its pictures are others by now: they are encoded at every visit, and not kept in %s",
                self._task.dataset.urls[shard],
                self._cache.folder,
            )
        return None

    def _asked_again(self, shard: int, edition: Edition) -> Edition | None:
        """The edition that the shard has by now, asked for once a minute: nothing else may read it."""
        with self._lock:
            asked = self._asked.get(shard)
            if asked is not None and asked[1] == edition and time.monotonic() - asked[0] < REFRESH_S:
                return edition
        try:
            self._reads.reader.read(self._task.dataset.urls[shard], 0, 1, expected=edition)
        except Replaced as error:
            try:
                edition = self._reads.editions.renew(shard, edition, error)
            except (Replaced, ReadFailed):
                return None
        except ReadFailed:
            return None
        with self._lock:
            self._asked[shard] = time.monotonic(), edition
        return edition


def _is_at(member: KeptMember, extent: Extent) -> bool:
    """Whether a member of an entry is the one that the index names by now."""
    return member.first == extent.start and len(member.content) == extent.stop - extent.start


def geometry_of(numbers: tuple[float, ...]) -> Geometry:
    """The crop that an entry tells of."""
    height, width, top, left, bottom, right, flip, target_height, target_width = numbers
    return Geometry(
        int(height), int(width), top, left, bottom, right, bool(flip), int(target_height), int(target_width)
    )
