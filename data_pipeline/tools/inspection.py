"""Looks into shards: counts, sizes, captions, bad members, and a contact sheet."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from data_pipeline.config import DataConfig
from data_pipeline.errors import Failure, Rejected
from data_pipeline.order.draws import permutation
from data_pipeline.pictures.decoding import decode
from data_pipeline.shards.grouping import IMAGE_EXTENSIONS, group
from data_pipeline.shards.index import DEFECTS, ShardIndex
from data_pipeline.shards.read_index import not_a_tar, read_index
from data_pipeline.shards.records import clean, parse_record, text_of
from data_pipeline.shards.removals import RemovalList, read_removals
from data_pipeline.shards.selection import identity_hashes, picture_members
from data_pipeline.shards.split import held_out
from data_pipeline.shards.tars import scan
from data_pipeline.storage.files import read_range
from data_pipeline.storage.listing import ListedFile, list_files
from data_pipeline.storage.urls import name_of
from data_pipeline.tools.lettering import Lettering

_TILE = 160
_TEXT = 44
_COLUMNS = 6
_MAX_BYTES = 64_000_000
_HEAD_BYTES = 4_000_000
_HEAD_SAMPLES = 8
_COMMON = 5
"""Texts of a column that are shown."""


@dataclass
class Inspection:
    """What `inspect_shards` found."""

    shards: int = 0
    bytes: int = 0
    samples: int = 0
    extensions: Counter[str] = field(default_factory=Counter)
    missing_rows: int = 0
    """Rows of the parquets without tar members (failed downloads)."""
    problems: list[str] = field(default_factory=list)
    removals: list[ListMatches] = field(default_factory=list)
    """What each of the asked removal lists has of these samples."""
    held_out: int | None = None
    """Samples that a share of data.validation would hold out, where one was asked for."""
    bad_members: Counter[str] = field(default_factory=Counter)
    """Rejections by reason among the samples whose pictures were decoded, and defects of the index."""
    decoded: int = 0
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    columns: dict[str, list[float]] = field(default_factory=dict)
    """Numbers of the index, NaN where they are missing."""
    texts: dict[str, Counter[str | None]] = field(default_factory=dict)
    """Texts of the index; None counts what is missing or a number."""
    unkept: Counter[str] = field(default_factory=Counter)
    """Shards in which a column has values that are too long or varied for the index, by column."""
    pictures: list[tuple[NDArray[np.uint8], str]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report."""
        words = [len(c.split()) for c in self.captions]
        text = [
            f"shards            {self.shards}",
            f"bytes             {self.bytes:,}",
            f"samples           {self.samples:,}",
            f"members           {', '.join(f'{e} {n:,}' for e, n in sorted(self.extensions.items()))}",
            f"rows without tar  {self.missing_rows:,}",
            f"decoded           {self.decoded:,}",
        ]
        if self.widths:
            text.append(f"width             {_spread(self.widths)}")
            text.append(f"height            {_spread(self.heights)}")
        if self.captions:
            text.append(f"caption words     {_spread(words)}")
            text.append(f"distinct captions {len(set(self.captions)):,} of {len(self.captions):,}")
            common = Counter(self.captions).most_common(3)
            text.append("most common       " + "; ".join(f"{c!r} ({n})" for c, n in common))
        for name, values in sorted(self.columns.items()):
            finite = [v for v in values if np.isfinite(v)]
            missing = len(values) - len(finite)
            if finite:
                text.append(f"column {name:<17} {_spread(finite)}, {missing} missing")
        text += [f"column {name:<17} {_texts(counts)}" for name, counts in sorted(self.texts.items())]
        text += [
            f"column {name:<17} long or varied values in {n:,} shards: not in the index"
            for name, n in sorted(self.unkept.items())
        ]
        bad = ", ".join(f"{reason} {n}" for reason, n in self.bad_members.most_common()) or "none"
        text.append(f"bad members       {bad}")
        text += [f"removal list      {matches.line()}" for matches in self.removals]
        if self.held_out is not None:
            text.append(f"held out          {self.held_out:,} of {self.samples:,}")
        text += [f"problem           {p}" for p in self.problems[:20]]
        if len(self.problems) > 20:
            text.append(f"problem           and {len(self.problems) - 20} more")
        return text


@dataclass
class ListMatches:
    """What a removal list has of the samples that were seen."""

    removal: RemovalList
    samples: int = 0
    met: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    """Hashes of the list that some sample had."""

    def add(self, names: NDArray[np.uint64]) -> None:
        """Take in the hashes [ways to name a sample, n] of a shard's samples."""
        found = self.removal.matches(names)
        self.samples += int(found.any(axis=0).sum())
        self.met = np.union1d(self.met, names[found])

    def line(self) -> str:
        """How many samples it has, and its entries that match none."""
        assert self.removal.entries is not None
        entries = np.unique(self.removal.entries)
        used = np.unique(self.removal.entries[np.isin(self.removal.hashes, self.met)])
        idle = np.setdiff1d(entries, used)
        text = f"{self.removal.name}: entries {len(entries):,}, samples matched {self.samples:,}"
        if len(idle):
            listed = ", ".join(f"{number}" for number in idle[:20]) + (" ..." if len(idle) > 20 else "")
            text += f", entries without a match {len(idle):,}: {self.removal.unit} {listed}"
        return text


def inspect_shards(
    url: str,
    *,
    removal_lists: Sequence[str] = (),
    held_out_share: float | None = None,
    picture: Sequence[str] = IMAGE_EXTENSIONS,
    decode_per_shard: int = 50,
    pictures: int = 36,
    max_pixels: int = 64_000_000,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Inspection:
    """Scan every shard behind `url` and decode a fixed random choice of its pictures.

    `picture` is data.picture: the extensions of the pictures; `held_out_share` is data.validation.share. A
    shard that is no tar is reported as a problem. Raises DataError when nothing matches or storage does not
    answer.
    """
    removals = [ListMatches(each) for each in read_removals(removal_lists, numbered=True)]
    chosen_picture = picture_members(DataConfig(picture=tuple(picture)))
    shards = list_files(url)
    result = Inspection(removals=removals, held_out=None if held_out_share is None else 0)
    per_sheet = -(-pictures // len(shards))
    for done, shard in enumerate(shards):
        progress(done, len(shards))
        result.shards += 1
        result.bytes += shard.size
        try:
            index = read_index(shard)
        except Failure as error:
            result.problems.append(str(error))
            continue
        index.choose_picture(chosen_picture)
        _count(result, index)
        if removals and len(index):
            names = identity_hashes(index)
            for matches in removals:
                matches.add(names)
        if result.held_out is not None and held_out_share:
            result.held_out += int(held_out(index.keys, held_out_share).sum())
        chosen = permutation(1, len(index))[:decode_per_shard]
        _decode_some(result, shard, index, np.sort(chosen).tolist(), per_sheet, max_pixels, chosen_picture)
    progress(len(shards), len(shards))
    result.pictures = result.pictures[:pictures]
    return result


def _count(result: Inspection, index: ShardIndex) -> None:
    name = name_of(index.shard)
    result.samples += len(index)
    result.missing_rows += index.missing_rows
    result.problems += [f"{name}: {p}" for p in index.problems]
    for extension in index.extensions:
        result.extensions[extension] += int((index.extents(extension)[0] >= 0).sum())
    for code, reason in enumerate(DEFECTS):
        if code and (index.defects == code).any():
            result.bad_members[reason] += int((index.defects == code).sum())
    for column, values in index.numbers.items():
        result.columns.setdefault(column, []).extend(values.astype(float).tolist())
    for column, codes in index.codes.items():
        if not index.words[column] and not (codes == -2).any():
            continue  # without a value in the whole shard
        counts = result.texts.setdefault(column, Counter())
        for code, count in zip(*np.unique(codes, return_counts=True), strict=True):
            counts[index.words[column][code] if code >= 0 else None] += int(count)
    result.unkept.update(index.omitted)
    result.unkept.update(name for name, codes in index.codes.items() if (codes == -2).any())


def _decode_some(
    result: Inspection,
    shard: ListedFile,
    index: ShardIndex,
    rows: Sequence[int],
    keep: int,
    max_pixels: int,
    picture_extensions: Sequence[str],
) -> None:
    image_extensions = [e for e in picture_extensions if e in index.extensions]
    kept = 0
    for row in rows:
        members: dict[str, bytes] = {}
        for extension in (*image_extensions, "txt", "caption", "json"):
            if extension not in index.extensions:
                continue
            starts, sizes = index.extents(extension)
            start, size = int(starts[row]), int(sizes[row])
            if start >= 0 and size <= _MAX_BYTES:
                members[extension] = read_range(shard.url, start, start + size)
        caption = caption_of(members)
        if caption:
            result.captions.append(caption)
        else:
            result.bad_members["no_caption"] += 1
        data = next((members[e] for e in image_extensions if e in members), None)
        if data is None:
            continue
        try:
            picture = decode(data, target=(_TILE, _TILE), max_pixels=max_pixels)
        except Rejected as error:
            result.bad_members[error.reason] += 1
            key = index.keys[row].decode("utf-8", "replace")
            result.problems.append(f"{name_of(shard.url)}/{key}: {error}")
            continue
        result.decoded += 1
        result.widths.append(picture.width)
        result.heights.append(picture.height)
        if kept < keep:
            result.pictures.append((picture.pixels, caption))
            kept += 1


@dataclass(frozen=True)
class HeadLook:
    """What `look_at_head` found."""

    pictures: int
    defects: list[str]


def look_at_head(shard: ListedFile, config: DataConfig) -> HeadLook:
    """The first samples of a shard, from its first megabytes."""
    stored = head = read_range(shard.url, 0, min(shard.size, _HEAD_BYTES))
    if config.order == "resampled":
        head = _unpacked(head)  # webdataset's streams may be compressed
    found = scan(lambda start, stop: head[start:stop], len(head))
    if not found.is_tar:
        return HeadLook(0, [not_a_tar(shard.url, stored, found)])
    samples = group(found.members).samples
    if len(samples) > 1 and len(stored) < shard.size:
        samples.pop()  # perhaps cut
    pictures, defects = 0, []
    target = (config.image_size, config.image_size)
    for sample in samples[:_HEAD_SAMPLES]:
        member = next((sample.members[e] for e in picture_members(config) if e in sample.members), None)
        if member is None:
            continue
        data = head[member.offset : member.offset + member.size]
        try:
            decode(data, target=target, max_pixels=config.max_image_pixels)
            pictures += 1
        except Rejected as rejected:
            defects.append(f"{shard.url} {member.name}: {rejected}")
    return HeadLook(pictures, defects)


def _unpacked(head: bytes) -> bytes:
    """What is in the beginning of a compressed stream, of another one itself."""
    decompressors: dict[bytes, Callable[[], Any]] = {
        b"\x1f\x8b": lambda: zlib.decompressobj(31),
        b"BZh": bz2.BZ2Decompressor,
        b"\xfd7zXZ": lzma.LZMADecompressor,
    }
    for magic, decompressor in decompressors.items():
        if head.startswith(magic):
            try:
                return bytes(decompressor().decompress(head))
            except (zlib.error, OSError, lzma.LZMAError):
                return head
    return head


def caption_of(members: dict[str, bytes]) -> str:
    """Caption of a sample: its txt, else its caption, as a member or in the json."""
    for extension in ("txt", "caption"):
        if extension in members:
            return clean(text_of(members[extension]))
    value = (parse_record(members.get("json")) or {}).get("caption")
    return clean(value) if isinstance(value, str) else ""


def contact_sheet(pictures: Sequence[tuple[NDArray[np.uint8], str]]) -> bytes:
    """PNG of the pictures in a grid, captions below."""
    columns = min(_COLUMNS, max(1, len(pictures)))
    rows = max(1, -(-len(pictures) // columns))
    sheet = Image.new("RGB", (columns * (_TILE + 8) + 8, rows * (_TILE + _TEXT + 8) + 8), (32, 32, 36))
    draw, lettering = ImageDraw.Draw(sheet), Lettering(10)
    for i, (pixels, caption) in enumerate(pictures):
        tile = Image.fromarray(np.ascontiguousarray(pixels))
        tile.thumbnail((_TILE, _TILE))
        x, y = 8 + i % columns * (_TILE + 8), 8 + i // columns * (_TILE + _TEXT + 8)
        sheet.paste(tile, (x + (_TILE - tile.width) // 2, y + (_TILE - tile.height) // 2))
        for line, text in enumerate(lettering.lines(caption, _TILE, 3)):
            lettering.draw(draw, x, y + _TILE + 2 + 13 * line, text, fill=(230, 230, 230))
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def _texts(counts: Counter[str | None]) -> str:
    """How many different texts, the most frequent, and how often there is none."""
    found = Counter({text: count for text, count in counts.items() if text is not None})
    told = ", ".join(f"{text!r} ({count:,})" for text, count in found.most_common(_COMMON))
    more = ", ..." if len(found) > _COMMON else ""
    return f"{len(found):,} texts: {told}{more}; {counts[None]:,} without"


def _spread(values: Sequence[float]) -> str:
    low, middle, high = np.percentile(np.asarray(values, np.float64), [0, 50, 100])
    return f"min {low:.4g}, median {middle:.4g}, max {high:.4g}"
