"""Sets of pictures to be measured: folders and webdataset tars at any URL, decoded exactly, each once.

A set is cut into chunks whose limits depend on the set alone (so many files of a folder, one tar), and chunks
into blocks of at most `block` pictures. Rank r takes chunks r, r + world_size, ...: whatever the number of
ranks, the same blocks are made, and (chunk, block) puts them back into the order of the set.

    folder of 5, blocks of 2     00 01 | 02 03 | 04           chunks (0, 0) (1, 0) (2, 0)
    tars a of 3 and b of 1       a0 a1 | a2 || b0             (0, 0) (0, 1) (1, 0)
"""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError, Failure, NoShards, NotATar, Rejected
from data_pipeline.feed.captions import choose_caption
from data_pipeline.feed.tar_stream import samples_of
from data_pipeline.pictures.decoding import decode_exactly
from data_pipeline.pictures.headers import DECODE_ERRORS
from data_pipeline.shards.grouping import IMAGE_EXTENSIONS
from data_pipeline.shards.read_index import not_a_tar
from data_pipeline.shards.records import TEXT_BYTES, clean, is_damaged, parse_record, text_of
from data_pipeline.shards.selection import Selection, make_selection
from data_pipeline.shards.tars import BLOCK, scan
from data_pipeline.storage.files import read_bytes, read_head, read_range
from data_pipeline.storage.listing import ListedFile, find, list_files
from data_pipeline.storage.urls import expand_braces, join, literal, name_of, parent

MAX_PIXELS = 256_000_000
_STREAM_BYTES = 8_000_000
PROMPTS = "prompts.json"
"""What `ldm sample` writes beside its pictures: what each was made from, captions among it."""
GRID = "grid.png"
"""Beside it, the first pictures at a glance: none of the set."""
_TEXTS = ("txt", "caption")
"""Members of a tar that are captions."""

_UNREAD = ("avif", "heic", "heif", "jxl", "jp2", "j2k", "jfif", "jpe", "ppm", "pgm", "tga", "psd")
_PACKED = ("gz", "tgz", "xz", "zst", "bz2", "zip")
"""Endings of pictures and archives that are no part of a set, and whose absence is to be said."""

Prepare = Callable[[NDArray[np.uint8]], Any]
"""What is made of a decoded picture, uint8 [h, w, 3], in the thread that decoded it."""


@dataclass(frozen=True)
class PictureSet:
    """What a URL stands for."""

    url: str
    """As it was given."""
    files: tuple[ListedFile, ...]
    """Pictures of a folder or tars, sorted by URL."""
    tars: bool
    texts: frozenset[str] = frozenset()
    """URLs of the `NAME.txt` beside the pictures of a folder."""
    unread: tuple[str, ...] = ()
    """URLs of pictures and archives of other formats: no part of it, which a person may not know."""

    def chunks(self, block: int) -> int:
        """Parts that ranks can share."""
        return len(self.files) if self.tars else -(-len(self.files) // block)


@dataclass(frozen=True)
class PictureBlock:
    """Consecutive pictures of a set; those that cannot be used are left out, and counted."""

    position: tuple[int, int]
    """(chunk, block): sorts blocks into the order of the set."""
    names: tuple[str, ...]
    """B names, for messages."""
    prepared: tuple[Any, ...]
    """B times what `prepare` made."""
    captions: tuple[str, ...]
    """B captions; empty where there is none."""
    digests: NDArray[np.int64]
    """[B] XXH3-64 of size and pixels, after no preparation: equal for equal pictures of any format."""
    blank: int
    """Pictures of a single colour."""
    formats: Counter[str]
    """jpeg, png, webp, other."""
    sizes: Counter[tuple[int, int]]
    """(width, height) as decoded, before any preparation."""
    broken: tuple[tuple[str, str], ...]
    """(name, reason) of pictures that cannot be used."""


def open_pictures(url: str) -> PictureSet:
    """List folders (their sub-folders too) or files, pictures or tars, by name, braces or wildcards.

    Raises:
        DataError: nothing there, neither pictures nor tars, or both.
    """
    if not url.strip():
        raise DataError("The name of a set of pictures is empty; name a folder, tars or pictures.")
    patterns = expand_braces(url)
    if all(pattern.endswith(".tar") for pattern in patterns):
        return PictureSet(url, tuple(list_files(url)), tars=True)
    # what stands for several things, or bears the ending of a file, is one; all else is a folder
    single = [literal(p) is None or ending_of(p) in IMAGE_EXTENSIONS for p in patterns]
    listed = [
        f
        for pattern, is_file in zip(patterns, single, strict=True)
        for f in find(pattern if is_file else join(pattern, "**"))
    ]
    files = {f.url: f for f in listed if not name_of(f.url).startswith(".")}
    tars = [f for f in files.values() if f.url.endswith(".tar")]
    prompts = [name for name in files if name_of(name) == PROMPTS]
    sheets = {join(parent(name), GRID) for name in prompts}
    pictures = [f for f in files.values() if ending_of(f.url) in IMAGE_EXTENSIONS and f.url not in sheets]
    if tars and pictures:
        raise DataError(
            f"{url} holds both pictures and tars; name the tars ({join(url, '*.tar')}) or move them."
        )
    unread = tuple(sorted(name for name in files if ending_of(name) in (*_UNREAD, *_PACKED)))
    if tars:
        return PictureSet(url, tuple(sorted(tars, key=lambda f: f.url)), tars=True, unread=unread)
    if not pictures:
        others = (
            f", but {len(unread)} of other formats; convert or unpack {name_of(unread[0])}" if unread else ""
        )
        raise NoShards(
            f"There are no pictures ({', '.join(IMAGE_EXTENSIONS[:4])}, ...) and no tars in {url}{others}."
        )
    texts = frozenset(name for name in files if name.endswith(".txt"))
    return PictureSet(
        url, tuple(sorted(pictures, key=lambda f: f.url)), tars=False, texts=texts, unread=unread
    )


def read_blocks(
    pictures: PictureSet,
    prepare: Prepare,
    *,
    block: int,
    captions: bool = True,
    rank: int = 0,
    world_size: int = 1,
    threads: int = 4,
) -> Iterator[PictureBlock]:
    """This rank's blocks in order, decoded ahead by `threads` threads; close it to stop early.

    Without `captions`, texts beside pictures are not read: each would be a request of its own.

    Raises:
        DataError: a tar that is damaged or cut short.
        NotFound, AccessDenied, Unreachable, ...: see `storage.retry.explain`.
    """
    waiting: deque[tuple[tuple[int, int], list[Future[_Decoded]]]] = deque()
    ahead = 1 + -(-2 * threads // block)
    with ThreadPoolExecutor(threads) as pool:
        try:
            for chunk in range(rank, pictures.chunks(block), world_size):
                sources = _sources(pictures, chunk, block, captions=captions)
                for number, group in enumerate(_grouped(sources, block)):
                    futures = [pool.submit(_decode, source, prepare) for source in group]
                    waiting.append(((chunk, number), futures))
                    if len(waiting) > ahead:
                        yield _finished(*waiting.popleft())
            while waiting:
                yield _finished(*waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def captions_in(url: str) -> Iterator[str]:
    """The captions of all pictures behind a URL, in the order of the set; those without one are left out.

    Reads the pictures, too, as they lie between the captions.

    Raises:
        DataError: as `open_pictures`, or a damaged tar.
    """
    pictures = open_pictures(url)
    for chunk in range(pictures.chunks(1)):
        for source in _sources(pictures, chunk, 1, captions=True):
            try:
                data, caption = source.read()
            except Rejected:
                continue
            if found := clean(caption or _own_caption(data)):
                yield found


@dataclass(frozen=True)
class _PictureSource:
    name: str
    read: Callable[[], tuple[bytes, str]]
    """Bytes of the picture, and its caption."""


@dataclass(frozen=True)
class _Decoded:
    name: str
    prepared: Any = None
    caption: str = ""
    digest: int = 0
    blank: bool = False
    format: str = ""
    size: tuple[int, int] = (0, 0)
    broken: str = ""


def _decode(source: _PictureSource, prepare: Prepare) -> _Decoded:
    try:
        data, caption = source.read()
        pixels = decode_exactly(data, max_pixels=MAX_PIXELS)
        prepared = prepare(pixels)
    except Rejected as error:
        return _Decoded(source.name, broken=str(error))
    hashed = xxhash.xxh3_64(pixels.tobytes(), seed=pixels.shape[1])
    return _Decoded(
        source.name,
        prepared,
        caption or _own_caption(data),
        digest=int(np.uint64(hashed.intdigest()).astype(np.int64)),
        blank=bool((pixels == pixels[:1, :1]).all()),
        format=_format(data),
        size=(pixels.shape[1], pixels.shape[0]),
    )


def _finished(position: tuple[int, int], futures: Sequence[Future[_Decoded]]) -> PictureBlock:
    decoded = [future.result() for future in futures]
    whole = [d for d in decoded if not d.broken]
    return PictureBlock(
        position=position,
        names=tuple(d.name for d in whole),
        prepared=tuple(d.prepared for d in whole),
        captions=tuple(d.caption for d in whole),
        digests=np.asarray([d.digest for d in whole], np.int64),
        blank=sum(d.blank for d in whole),
        formats=Counter(d.format for d in whole),
        sizes=Counter(d.size for d in whole),
        broken=tuple((d.name, d.broken) for d in decoded if d.broken),
    )


def _own_caption(data: bytes) -> str:
    """The prompt that `ldm sample` writes into its pictures."""
    if _format(data) != "png":
        return ""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            record = json.loads(image.info.get("ldm", "{}"))
    except DECODE_ERRORS:
        return ""
    return str(record.get("prompt", "")) if isinstance(record, dict) else ""


def _format(data: bytes) -> str:
    if data[:2] == b"\xff\xd8":
        return "jpeg"
    if data[:4] == b"\x89PNG":
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else "other"


def ending_of(url: str) -> str:
    """What stands behind the last dot of a file's name, in small letters; empty without one."""
    _, dot, extension = name_of(url).rpartition(".")
    return extension.lower() if dot else ""


def _grouped(sources: Iterator[_PictureSource], size: int) -> Iterator[list[_PictureSource]]:
    while group := list(itertools.islice(sources, size)):
        yield group


def _sources(pictures: PictureSet, chunk: int, block: int, *, captions: bool) -> Iterator[_PictureSource]:
    if pictures.tars:
        yield from _tar_sources(pictures.files[chunk], captions=captions)
        return
    for file in pictures.files[chunk * block : (chunk + 1) * block]:
        text = file.url.rpartition(".")[0] + ".txt"
        wanted = captions and text in pictures.texts
        yield _PictureSource(file.url, partial(_read_file, file.url, text if wanted else None))


def _read_file(url: str, text: str | None) -> tuple[bytes, str]:
    return read_bytes(url), "" if text is None else _caption_in(text)


def _caption_in(url: str) -> str:
    """Of a text beside a picture, as training reads one in a shard. Raises DataError for other encodings."""
    body = read_bytes(url)
    _require_text(body, url)
    return clean(text_of(body))


def _require_text(body: bytes, name: str) -> None:
    if is_damaged(body[:TEXT_BYTES]):
        raise DataError(f"{name} is no text in UTF-8, so it would be another caption; save it as UTF-8.")


def _tar_sources(file: ListedFile, *, captions: bool) -> Iterator[_PictureSource]:
    """Samples of a tar in order, in one pass."""
    head = read_head(file.url, 2 * BLOCK)
    found = scan(lambda start, stop: head[start:stop], len(head))
    if not found.is_tar:  # a compressed one could be cut short unnoticed
        raise NotATar(not_a_tar(file.url, head, found))
    left_out: list[str] = []
    shards = [{"url": file.url, "stream": _Stream(file)}]
    broken = partial(_refuse_tar, file.url)
    for sample in samples_of(shards, _selection(), broken=broken, reject=left_out.append):
        name = f"{file.url}: {sample['__key__']}"
        picture = next((sample[e] for e in IMAGE_EXTENSIONS if e in sample), None)
        if picture is not None:
            for text in _TEXTS if captions else ():
                _require_text(sample.get(text, b""), f"{name}.{text}")
            caption = choose_caption(
                _TEXTS,
                {name: body for name, body in sample.items() if isinstance(body, bytes)},
                parse_record(sample.get("json")) or {},
                require=False,
                seed=0,
                ordinal=0,
            )
            yield _PictureSource(name, partial(_found, picture, caption))
        while left_out:
            yield _PictureSource(
                f"{file.url}: before {sample['__key__']}", partial(_rejected, left_out.pop())
            )
    if file.size % BLOCK:  # tarfile takes what is left of a header for the end
        _refuse_tar(file.url, EOFError("it ends inside a block"))


def _selection() -> Selection:
    """Of each sample its pictures and texts, however large: whoever measures a set names it."""
    return make_selection(DataConfig(picture=IMAGE_EXTENSIONS, captions=_TEXTS, max_member_bytes=10**13))


def _found(picture: bytes, caption: str) -> tuple[bytes, str]:
    return picture, caption


def _rejected(reason: str) -> tuple[bytes, str]:
    raise Rejected(reason)


def _refuse_tar(url: str, error: Exception) -> None:
    if isinstance(error, Failure):
        raise error
    raise DataError(
        f"{url} is damaged ({error}), so its pictures would be measured in part; write it anew, or leave it "
        "out."
    ) from error


class _Stream:
    """A file from its beginning to its end, one block of it read ahead."""

    def __init__(self, file: ListedFile) -> None:
        self._file = file
        self._pool = ThreadPoolExecutor(1)
        self._position = 0
        self._rest = memoryview(b"")
        self._next: Future[bytes] | None = None

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, fewer at the end alone."""
        parts = []
        while size > 0 and (len(self._rest) or self._advance()):
            parts.append(self._rest[:size])
            self._rest = self._rest[len(parts[-1]) :]
            size -= len(parts[-1])
        return b"".join(parts)

    def _advance(self) -> bool:
        if self._position >= self._file.size:
            self._pool.shutdown()
            return False
        found = self._next or self._begin(self._position)
        self._rest = memoryview(found.result())
        self._position += len(self._rest)
        self._next = self._begin(self._position) if self._position < self._file.size else None
        return True

    def _begin(self, start: int) -> Future[bytes]:
        stop = min(start + _STREAM_BYTES, self._file.size)
        return self._pool.submit(read_range, self._file.url, start, stop)
