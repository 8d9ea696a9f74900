"""The index has the size that the decoder gives, in every format, wherever the file keeps it."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipeline.config import DataConfig
from data_pipeline.errors import Rejected, StorageOutage
from data_pipeline.loader import build_loader
from data_pipeline.pictures.decoding import decode
from data_pipeline.pictures.headers import picture_size, size_of
from data_pipeline.shards.read_index import read_index
from data_pipeline.storage.listing import list_files

TALL = 40, 16
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


def noise(height: int = 16, width: int = 40, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def exif(orientation: int, padding: int = 0) -> Image.Exif:
    found = Image.Exif()
    if orientation:
        found[0x0112] = orientation
    if padding:
        found[0x927C] = bytes(padding)  # a maker note
    return found


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    out = io.BytesIO()
    (image or noise()).save(out, kind, **options)
    return out.getvalue()


def jpeg_with(*segments: tuple[int, bytes]) -> bytes:
    """A JPEG with more segments in front of all others."""
    plain = encoded("JPEG")
    packed = (bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments)
    return plain[:2] + b"".join(packed) + plain[2:]


def app1(orientation: int, padding: int = 0) -> tuple[int, bytes]:
    return 0xE1, exif(orientation, padding).tobytes()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_behind(*chunks: bytes) -> bytes:
    """A PNG with chunks behind its pixels."""
    plain = encoded("PNG")
    return plain[:-12] + b"".join(chunks) + plain[-12:]


def tiff_at_end(orientation: int) -> bytes:
    """An uncompressed TIFF whose directory lies behind the pixels, as libtiff writes them."""
    body = noise(160, 400).tobytes()
    end = 8 + len(body)
    fields = {256: 400, 257: 160, 258: end, 259: 1, 262: 2, 273: 8, 274: orientation, 277: 3, 278: 160}
    fields[279] = len(body)
    entries = b"".join(
        struct.pack("<HHII", tag, 3, 3, value) if tag == 258 else struct.pack("<HHII", tag, 4, 1, value)
        for tag, value in fields.items()
    )
    bits = struct.pack("<3H", 8, 8, 8) + b"\0\0"
    directory = struct.pack("<H", len(fields)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", end + len(bits)) + body + bits + directory


def icc(count: int) -> list[tuple[int, bytes]]:
    """Segments of a large profile that also holds what ends a header."""
    return [(0xE2, b"ICC_PROFILE\0" + bytes([i + 1, count]) + b"\xff\xda" * 30_000) for i in range(count)]


CASES = {
    "jpeg": encoded("JPEG", exif=exif(6)),
    "jpeg, CMYK": encoded("JPEG", noise(mode="CMYK"), exif=exif(6)),
    "jpeg, progressive": encoded("JPEG", exif=exif(8), progressive=True),
    "jpeg, profile of 240 kB": jpeg_with(*icc(4)),
    "jpeg, EXIF behind a profile": jpeg_with(*icc(4), app1(6)),
    "jpeg, maker note of 60 kB and XMP of 600 kB": jpeg_with(
        app1(5, 60_000),
        *((0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(60_000)) for _ in range(10)),
    ),
    "jpeg, XMP alone": jpeg_with((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP % 6)),
    "jpeg, EXIF and another XMP": jpeg_with((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP % 6), app1(3)),
    "jpeg, filling": encoded("JPEG", exif=exif(6)).replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1),
    "jpeg, damaged EXIF": jpeg_with((0xE1, b"Exif\0\0" + b"MM\0*\xff\xff\xff\xff" + b"x" * 40)),
    "png": encoded("PNG", exif=exif(6)),
    "png, EXIF behind the pixels": png_behind(png_chunk(b"eXIf", exif(6).tobytes()[6:])),
    "png, XMP behind the pixels": png_behind(png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP % 8)),
    "png, large": encoded("PNG", noise(300, 500), exif=exif(5)),
    "png, animated": encoded(
        "PNG", save_all=True, append_images=[noise().transpose(Image.Transpose.ROTATE_180)], exif=exif(6)
    ),
    "png, damaged EXIF": png_behind(png_chunk(b"eXIf", b"II*\0\xff\xff\xff\xffxx")),
    "webp": encoded("WEBP", exif=exif(6)),
    "webp, large": encoded("WEBP", noise(300, 500), lossless=True, exif=exif(7)),
    "webp, large without orientation": encoded("WEBP", noise(300, 500), lossless=True),
    "tiff": encoded("TIFF", exif=exif(6)),
    "tiff, LZW": encoded("TIFF", exif=exif(8), compression="tiff_lzw"),
    "tiff, directory at the end": tiff_at_end(6),
    "tiff, upright": tiff_at_end(1),
    "tiff, XMP alone": encoded("TIFF", tiffinfo={700: XMP % 6}),
    "gif": encoded("GIF"),
    "bmp": encoded("BMP"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_index_has_the_size_of_the_decoded_picture(name: str) -> None:
    data = CASES[name]
    picture = decode(data, target=None, max_pixels=10**6)
    assert picture.pixels.shape[:2] == (picture.height, picture.width)
    assert picture_size(data) == (picture.height, picture.width)
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image) if "damaged" not in name else image
        assert (upright.height, upright.width) == (picture.height, picture.width)
        if "tiff" not in name and "CMYK" not in name:
            assert np.abs(np.asarray(upright.convert("RGB")).astype(int) - picture.pixels).mean() < 3


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientations(kind: str, orientation: int) -> None:
    data = encoded(kind, exif=exif(orientation))
    expected = TALL if 5 <= orientation <= 8 else TALL[::-1]
    assert picture_size(data) == expected
    picture = decode(data, target=None, max_pixels=10**6)
    assert (picture.height, picture.width) == expected


def test_damaged_pictures_have_the_size_that_decoding_gives_or_none() -> None:
    rng = random.Random(7)
    for number in range(600):
        data = bytearray(list(CASES.values())[number % len(CASES)][:6000])
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
        size = picture_size(bytes(data))
        try:
            picture = decode(bytes(data), target=None, max_pixels=10**6)
        except Rejected:
            continue
        assert size == (picture.height, picture.width), number


def test_storage_that_fails_is_no_damaged_picture() -> None:
    """Among the errors of damaged files are those of storage; they must not become an unknown size."""
    for data in CASES.values():

        def read(start: int, stop: int, data: bytes = data) -> bytes:
            if start > 0:
                raise StorageOutage("gone")
            return data[start:stop]

        if len(data) > 70_000:
            with pytest.raises(StorageOutage):
                size_of(read, len(data))


def test_filters_and_buckets_see_pictures_upright(tmp_path: Path, write_tar) -> None:
    """Every picture of the cases in one shard: indexed as it is decoded, and so in the right bucket."""
    kinds = {name: name.split(",")[0].replace("jpeg", "jpg") for name in CASES}
    members = []
    for i, (name, data) in enumerate(CASES.items()):
        members += [(f"{i:02d}.{kinds[name]}", data), (f"{i:02d}.txt", name.encode())]
    write_tar(tmp_path / "0.tar", members)
    index = read_index(list_files(str(tmp_path))[0])
    heights, widths = index.picture_sizes()
    for name, height, width in zip(CASES, heights, widths, strict=True):
        picture = decode(CASES[name], target=None, max_pixels=10**6)
        assert (height, width) == (picture.height, picture.width), name
    url, rule = str(tmp_path / "*.tar"), "picture_height > picture_width"
    config = DataConfig(shards=url, image_size=16, workers=0, lanes=1, filter=rule)
    turned = {name for name, height, width in zip(CASES, heights, widths, strict=True) if height > width}
    assert len(turned) > 12
    with build_loader(config, seed=1, global_batch_size=len(turned)) as loader:
        assert set(next(loader).captions) == turned
