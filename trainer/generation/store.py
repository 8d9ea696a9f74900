"""Where a set of pictures lies: a small one written as it is made, a large one part by part.

    OUT/prompts.json                  everything that the pictures are a function of; written first
    OUT/pictures/00000.png ...        in the order of the prompts, each with its own record as text
    OUT/grid.png                      the first of them at a glance

Of a large set, which many ranks write and a kill may interrupt:

    OUT/pictures/0000000.png ...      or .jpg with .txt beside it, or tars of both: 00000.tar, 00001.tar ...
    OUT/parts/000000.json ...         one per part, written last: names and sizes of its files

A part without its record does not count and is made again, and so is one of whose files one is missing or
of another size. So a kill costs what was under way, and never shows half a picture.
"""

from __future__ import annotations

import io
import json
import logging
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from data_pipeline.errors import NotFound
from data_pipeline.storage.files import (
    check_writable,
    exists,
    list_names,
    list_sizes,
    read_bytes,
    read_text,
    remove_names,
    write_bytes,
)
from data_pipeline.storage.urls import join, without_secrets
from data_pipeline.tools.picture_sets import GRID, PROMPTS
from trainer.config.run import ConfigError
from trainer.metrics.pictures import MAX_SHEET, contact_sheet
from trainer.reliability.job import job_identity

logger = logging.getLogger(__name__)
PICTURES = "pictures"
PARTS = "parts"
OURS = re.compile(r"\d{5,}\.(png|jpg|txt|tar|json)")
"""Names of what a set consists of, in its folders."""
BEGUN_BY = "begun_by"
"""Of a record, the job that replaced another set by this one."""
_MAY_DIFFER = ("versions", BEGUN_BY)
"""Of a set that is continued, or made again."""
_OF_PICTURES = ("prompts", "class_labels")
"""Of a record, what differs between the pictures."""
_WRITTEN = ("prompts", "negative_prompt")
"""Of a record, what are texts to draw by."""
_REQUESTS = 16
"""At a time, of those that wait for storage."""
Kind = Literal["png", "jpg"]


class SmallSet:
    """A small set: where the pictures of one record go; refuses a folder that holds others."""

    def __init__(
        self, out: str, record: dict[str, Any], items: Sequence[dict[str, Any]], *, overwrite: bool
    ) -> None:
        """A set that is not begun yet.

        Args:
            out: folder, any URL.
            record: what the pictures are a function of.
            items: the same of each picture alone.
            overwrite: whether another set may go.

        Raises:
            ConfigError: the folder holds another set, which may not go.
            UserError, RetryableFault: it cannot be written to.
        """
        self.url = out.rstrip("/") or out
        self._record = _public(record)
        self._shared = _shared(self._record)
        self._items = items
        self._shown: list[Tensor] = []
        former = None if overwrite else what_is_there(self.url)
        if former is not None:
            require_same(self.url, former, self._record)
        check_writable(self.url)

    def begin(self) -> None:
        """Write the record, and remove the pictures of a former set."""
        begin_set(self.url, self._record)

    def add(self, row: int, pictures: Tensor) -> None:
        """Write uint8 [B, 3, H, W]; `row` is the place of the first in the set."""
        for i, picture in enumerate(pictures.cpu(), row):
            data = encode_png(picture.permute(1, 2, 0).numpy(), self._shared, self._items[i])
            write_bytes(join(self.url, PICTURES, f"{i:05d}.png"), data)
            if i < MAX_SHEET:
                self._shown.append(picture)

    def finish(self, titles: tuple[str, ...]) -> str:
        """Write the grid; what was written, for people."""
        n, shown = len(titles), len(self._shown)
        write_bytes(join(self.url, GRID), contact_sheet(self._shown, titles))
        which = f" with the first {shown}" if shown < n else ""
        return f"{n} picture{'s' if n > 1 else ''} in {self.url}/{PICTURES}, {self.url}/{GRID}{which}"


@dataclass(frozen=True)
class Form:
    """How pictures are written."""

    kind: Kind = "png"
    quality: int = 95
    """Of JPEG, whose colours are kept at full resolution."""
    tars: bool = False
    """Parts as webdataset tars (picture, caption, json), instead of a folder of pictures."""


class SetStore:
    """The folder of one set, which any rank may write parts to; `begin` on one of them first."""

    def __init__(self, out: str, record: dict[str, Any], form: Form) -> None:
        """`record` is JSON-able: what the pictures are a function of."""
        self.url = out.rstrip("/") or out
        self._record = _public(record)
        self._shared = {name: v for name, v in _shared(self._record).items() if name not in _MAY_DIFFER}
        self._form = form

    @property
    def pictures_url(self) -> str:
        """What `ldm evaluate` is to read."""
        return join(self.url, PICTURES)

    def former(self, *, overwrite: bool) -> dict[str, Any] | None:
        """The record of what is there and may be gone on with; None where the set is to be begun.

        Raises:
            ConfigError: the folder holds another set, which may not go.
        """
        former = None if overwrite else what_is_there(self.url)
        if former is not None:
            require_same(self.url, former, self._record)
        return former

    def begin(self, *, overwrite: bool) -> set[int]:
        """Write the record of a new set; parts that an earlier start has left whole.

        Raises:
            ConfigError: the folder holds another set, which may not go.
            UserError, RetryableFault: it cannot be written to.
        """
        former = self.former(overwrite=overwrite)
        if former is not None:
            self._warn_of_versions(former)
            return self._whole_parts()
        check_writable(self.url)
        begin_set(self.url, self._record | ({BEGUN_BY: job_identity()} if overwrite else {}))
        return set()

    def encode(self, picture: NDArray[np.uint8], item: dict[str, Any]) -> bytes:
        """A file of uint8 [H, W, 3]; a PNG carries its caption and all that it was made from as text."""
        if self._form.kind == "png":
            return encode_png(picture, self._shared, item)
        out = io.BytesIO()
        Image.fromarray(picture).save(out, "JPEG", quality=self._form.quality, subsampling=0)
        return out.getvalue()

    def put(
        self, part: int, rows: Sequence[int], items: Sequence[dict[str, Any]], files: list[bytes]
    ) -> None:
        """Write a part of encoded pictures, and then its record."""
        if self._form.tars:
            made = {f"{part:05d}.tar": self._tar(rows, items, files)}
        else:
            made = {f"{row:07d}.{self._form.kind}": data for row, data in zip(rows, files, strict=True)}
            if self._form.kind == "jpg":  # which carries no text that `ldm evaluate` reads
                made |= {f"{row:07d}.txt": i["prompt"].encode() for row, i in zip(rows, items, strict=True)}
        with ThreadPoolExecutor(min(_REQUESTS, len(made))) as pool:  # each waits for storage, not for us
            list(pool.map(lambda name: write_bytes(join(self.pictures_url, name), made[name]), made))
        sizes = {name: len(data) for name, data in made.items()}
        record = {"first": rows[0], "pictures": len(rows), "files": sizes}
        write_bytes(join(self.url, PARTS, f"{part:06d}.json"), json.dumps(record).encode())

    def is_whole(self, parts: int) -> bool:
        """Whether so many parts have their records."""
        return len(_ours_in(join(self.url, PARTS))) >= parts

    def has_grid(self) -> bool:
        """Whether the set was once finished."""
        return exists(join(self.url, GRID))

    def first_pictures(self, count: int) -> list[NDArray[np.uint8]]:
        """The first of a whole set as they were stored, uint8 [H, W, 3] each."""
        found: list[NDArray[np.uint8]] = []
        part = 0
        while len(found) < count:
            if self._form.tars:
                data = read_bytes(join(self.pictures_url, f"{part:05d}.tar"))
                with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                    members = [m for m in tar if m.name.endswith(self._form.kind)][: count - len(found)]
                    files = [tar.extractfile(m).read() for m in members]  # type: ignore[union-attr]
            else:
                files = [read_bytes(join(self.pictures_url, f"{len(found):07d}.{self._form.kind}"))]
            found += [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in files]
            part += 1
        return found

    def _tar(self, rows: Sequence[int], items: Sequence[dict[str, Any]], files: list[bytes]) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row, item, picture in zip(rows, items, files, strict=True):
                about = {"caption": item["prompt"], **self._shared, **item}
                members = {
                    self._form.kind: picture,
                    "txt": item["prompt"].encode(),
                    "json": json.dumps(about, ensure_ascii=False).encode(),
                }
                if "class_label" in item:
                    members["cls"] = str(item["class_label"]).encode()
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{row:07d}.{extension}")  # no time: equal sets are equal bytes
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        return out.getvalue()

    def _warn_of_versions(self, former: dict[str, Any]) -> None:
        before, now = (record.get("versions", {}) for record in (former, self._record))
        if before != now:
            changed = [f"{n} {before.get(n)}, now {now[n]}" for n in now if before.get(n) != now[n]]
            logger.warning(
                "%s was begun with %s: new pictures may differ from those of then in the last bit",
                self.url,
                "; ".join(changed),
            )

    def _whole_parts(self) -> set[int]:
        folder = join(self.url, PARTS)
        names = _ours_in(folder)
        with ThreadPoolExecutor(_REQUESTS) as pool:
            records = list(pool.map(lambda name: _part_record(join(folder, name)), names))
        there = list_sizes(self.pictures_url)
        return {
            int(name.partition(".")[0])
            for name, files in zip(names, records, strict=True)
            if files and all(there.get(each) == size for each, size in files.items())
        }


def former_record(out: str) -> dict[str, Any] | None:
    """What a set in a folder was made from; None where there is none, empty where it is not ours."""
    try:
        former = json.loads(read_text(join(out, PROMPTS)))
    except NotFound:
        return None
    except ValueError:  # not ours, or cut short
        return {}
    return former if isinstance(former, dict) else {}


def what_is_there(out: str) -> dict[str, Any] | None:
    """As `former_record`, and empty for files of nobody knows what that a new set would remove."""
    former = former_record(out)
    return {} if former is None and any(_ours_in(join(out, name)) for name in (PARTS, PICTURES)) else former


def require_same(out: str, former: dict[str, Any], record: dict[str, Any]) -> None:
    """Raise ConfigError where a folder holds another set than that of a record, which is as JSON gives it."""
    former = _public(former)  # earlier versions wrote it as it was
    names = sorted(former.keys() | record.keys())
    differing = [n for n in names if n not in _MAY_DIFFER and former.get(n) != record.get(n)]
    if differing:
        raise ConfigError(
            f"{out} holds another set of pictures ({_told(differing[0], former, record)}); "
            "choose another folder with --out, or give --overwrite to replace it."
        )


def begin_set(out: str, record: dict[str, Any]) -> None:
    """Remove the pictures of a former set, and write the record of a new one."""
    for folder in (PARTS, PICTURES):
        remove_names(join(out, folder), _ours_in(join(out, folder)))
    write_bytes(join(out, PROMPTS), json.dumps(record, indent=1, ensure_ascii=False).encode())


def encode_png(picture: NDArray[np.uint8], shared: dict[str, Any], item: dict[str, Any]) -> bytes:
    """A file of uint8 [H, W, 3] that carries its caption and all that it was made from as text."""
    out, text = io.BytesIO(), PngInfo()
    text.add_text("prompt", item["prompt"])
    text.add_text("ldm", json.dumps(shared | item, ensure_ascii=False))
    Image.fromarray(picture).save(out, "PNG", pnginfo=text)
    return out.getvalue()


def _shared(record: dict[str, Any]) -> dict[str, Any]:
    """What a picture carries besides what is its own."""
    return {name: value for name, value in record.items() if name not in _OF_PICTURES}


def _public(record: dict[str, Any]) -> dict[str, Any]:
    """A record as JSON gives it, without what URLs carry to be let in; what people wrote stays as it is.

    Pictures are passed on, and each carries it. A URL that was signed anew names the same.
    """
    hidden = {name: value for name, value in record.items() if name not in _WRITTEN}
    return {**json.loads(json.dumps(record)), **json.loads(without_secrets(json.dumps(hidden)))}


def _ours_in(folder: str) -> list[str]:
    return [name for name in list_names(folder) if OURS.fullmatch(name)]


def _part_record(url: str) -> dict[str, int]:
    try:
        record = json.loads(read_text(url))
        return {str(name): int(size) for name, size in record["files"].items()}
    except (NotFound, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _told(name: str, former: dict[str, Any], ours: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        return "unknown" if value is None else str(value)[:60]

    return f"{name} {shown(former.get(name))} instead of {shown(ours.get(name))}"
