"""Size and orientation of pictures of every format, as decoding gives them, without decoding.

A picture is read where its format keeps them, which may be far in (JPEG: behind any number of profiles) or at
the end (directories of TIFF, EXIF of PNG and WebP).
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

import simplejpeg
from PIL import Image, TiffImagePlugin

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
DECODE_ERRORS = (
    *(OSError, ValueError, SyntaxError, LookupError, TypeError, EOFError, AttributeError),
    *(MemoryError, ArithmeticError, RuntimeError, AssertionError, struct.error, zlib.error),
)
"""Pillow's plugins raise all of these for damaged files; none of them may stop a run."""
_ORIENTATION = 0x0112
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
"""Chunks that may hold an orientation, in front of the pixels or behind them."""
_MAX_TEXT = 16_000_000
_BUFFER = 65_536
_SWAPPED = 5
"""Orientations from here on exchange height and width."""

Read = Callable[[int, int], bytes]


def picture_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) upright, as `decoding.decode` gives them; None where it would refuse the picture."""
    return size_of(lambda start, stop: data[start:stop], len(data))


def size_of(read: Read, size: int) -> tuple[int, int] | None:
    """The same of a picture of `size` bytes that read(start, stop) reads; what `read` raises passes."""
    source = _HeaderFile(read, size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _upright(source)
    except (*DECODE_ERRORS, Image.DecompressionBombError):
        if source.failure is not None:
            raise source.failure from None
        return None


def _upright(source: _HeaderFile) -> tuple[int, int] | None:
    if source.part(0, 2) == b"\xff\xd8":
        head = source.part(0, _jpeg_header_stop(source.part, source.size))
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(head)
        except ValueError:
            pass  # Pillow judges, as in decoding
        else:
            return _turned(height, width, jpeg_orientation(head, source.file))
    with Image.open(source.file(), formats=FORMATS) as image:
        width, height = image.size
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            # Pillow's size is turned by the tag alone, its pixels by what XMP says as well
            width, height = int(image.tag_v2[256]), int(image.tag_v2[257])
        if image.format == "PNG":
            with Image.open(io.BytesIO(_png_without_pixels(source.part, source.size))) as texts:
                return _turned(height, width, orientation_of(texts))
        return _turned(height, width, orientation_of(image))


def _turned(height: int, width: int, orientation: int) -> tuple[int, int]:
    return (width, height) if orientation >= _SWAPPED else (height, width)


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation 1 to 8 of what is open, from XMP where EXIF has none; 1 where neither can be read."""
    try:
        # Not PngImageFile's own, which decodes all pixels to look behind them.
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except DECODE_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def jpeg_orientation(data: bytes, opened: Callable[[], IO[bytes]] | None = None) -> int:
    """EXIF orientation of a JPEG, of which `data` is the header at least; `opened` opens the whole one."""
    for marker, start, stop in _jpeg_segments(lambda a, b: data[a:b], len(data)):
        told = data.startswith(b"Exif\0\0", start) or data.find(b"tiff:Orientation", start, stop) >= 0
        if marker == 0xE1 and told:
            break
    else:
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(opened() if opened else io.BytesIO(data), formats=("JPEG",)) as image:
                return orientation_of(image)
    except DECODE_ERRORS:
        return 1


def _jpeg_header_stop(read: Read, size: int) -> int:
    """Where the compressed pixels begin, or the file ends."""
    ends = [end for _, _, end in _jpeg_segments(read, size)]
    return min(size, ends[-1] + 2) if ends else size


def _jpeg_segments(read: Read, size: int) -> Iterator[tuple[int, int, int]]:
    """(marker, first byte, end) of the segments in front of the pixels, the start of scan last."""
    position = 2
    while position + 4 <= size:
        first, marker, *length = read(position, position + 4)
        if first != 0xFF or marker == 0xFF or marker == 0:
            position += 1  # filling, which libjpeg passes too
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            position += 2
            continue
        if marker == 0xD9:
            return
        start, position = position + 4, position + 2 + int.from_bytes(bytes(length), "big")
        yield marker, start, position
        if marker == 0xDA:
            return


def _png_without_pixels(read: Read, size: int) -> bytes:
    """A PNG with the texts of another in front of pixels that it does not have."""
    kept, total = [], 0
    animated = pixels = False
    position = len(_PNG)
    while position + 8 <= size:
        head = read(position, position + 8)
        kind, stop = head[4:], position + 12 + int.from_bytes(head[:4], "big")
        animated |= kind == b"acTL"
        pixels |= kind == b"IDAT"
        if kind == b"IEND" or stop > size or (animated and pixels and kind == b"fcTL"):
            break  # Pillow looks no further either
        if kind == b"IHDR" or (kind in _PNG_TEXTS and total < _MAX_TEXT):
            kept.append(read(position, stop))
            total += stop - position
        position = stop
    return _PNG + b"".join(kept) + b"\0\0\0\0IDAT\x35\xaf\x06\x1e" + b"\0\0\0\0IEND\xae\x42\x60\x82"


class _HeaderFile(io.RawIOBase):
    """A file that is read where it is looked at, and remembers what reading it failed with."""

    def __init__(self, read: Read, size: int) -> None:
        super().__init__()
        self.size = size
        self.failure: Exception | None = None
        self._read, self._position = read, 0

    def part(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer at the end."""
        try:
            return self._read(start, min(stop, self.size)) if start < min(stop, self.size) else b""
        except Exception as error:
            self.failure = error  # which Pillow may take for a damaged picture
            raise

    def file(self) -> IO[bytes]:
        """To be given to Pillow."""
        self._position = 0
        return cast(IO[bytes], io.BufferedReader(self, _BUFFER))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self.part(self._position, self._position + len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def readall(self) -> bytes:
        data = self.part(self._position, self.size)
        self._position += len(data)
        return data

    def close(self) -> None:
        """Pillow closes what it has read; it is opened again."""
