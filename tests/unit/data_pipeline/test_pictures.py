"""Decoding of every kind of picture, crops, maps and their geometry."""

from __future__ import annotations

import io
import math
import zlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.errors import Rejected
from data_pipeline.feed.captions import choose_caption
from data_pipeline.feed.conditions import layout_rows
from data_pipeline.pictures.crops import Geometry, crop_map, crop_pixels, plan_crop
from data_pipeline.pictures.decoding import DecodedPicture, decode
from data_pipeline.pictures.headers import picture_size
from data_pipeline.shards.records import clean

LIMIT = 1_000_000


def ramp(width: int = 64, height: int = 48) -> np.ndarray:
    """Red grows to the right, green downwards: every turn and flip shows."""
    x = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return np.stack([x, y, np.full_like(x, 128)], axis=2).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def full(data: bytes) -> np.ndarray:
    return decode(data, target=(10_000, 10_000), max_pixels=LIMIT).pixels


def whole(pixels: np.ndarray) -> DecodedPicture:
    return DecodedPicture(pixels, *pixels.shape[:2])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_formats(kind: str) -> None:
    picture = decode(encoded(Image.fromarray(ramp()), kind), target=(48, 48), max_pixels=LIMIT)
    assert (picture.height, picture.width) == (48, 64)
    assert np.abs(picture.pixels.astype(int) - ramp()).mean() < 12
    assert picture_size(encoded(Image.fromarray(ramp()), kind)) == (48, 64)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "LA", "1", "I;16", "F", "YCbCr", "RGBA"])
def test_modes(mode: str) -> None:
    image = Image.fromarray(ramp())
    if mode in ("I;16", "F"):
        deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
        source = Image.fromarray(deep if mode == "I;16" else deep.astype(np.float32))
    else:
        source = image.convert(mode)
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "TIFF" if mode == "F" else "PNG"
    pixels = full(encoded(source, kind))
    expected = np.asarray(
        image.convert("L").convert("RGB") if mode in ("L", "LA", "I;16", "F", "1") else image
    )
    assert pixels.shape == (48, 64, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int).mean(axis=(0, 1)) - expected.mean(axis=(0, 1))).max() < 12


def test_alpha_lies_on_white_and_animation_shows_its_first_frame() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (full(encoded(clear, "PNG")) == 255).all()
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    animated = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert full(animated)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    """All eight undo what a camera did: the ramp comes out as Pillow's own transpose gives it."""
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(ramp()), kind, exif=exif)
    picture = decode(data, target=(9999, 9999), max_pixels=LIMIT)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert (picture.height, picture.width) == expected.shape[:2]
    assert np.abs(picture.pixels.astype(int) - expected).mean() < 2


@pytest.mark.parametrize("edge", [16, 32, 64, 100, 256])
def test_scaled_decode_keeps_enough_pixels(edge: int) -> None:
    smooth = Image.fromarray(ramp(800, 600))
    picture = decode(encoded(smooth, "JPEG", quality=95), target=(edge, edge), max_pixels=LIMIT)
    assert (picture.height, picture.width) == (600, 800)
    assert min(picture.pixels.shape[:2]) >= edge
    assert min(picture.pixels.shape[:2]) < max(2 * edge, 80)  # libjpeg goes down to an eighth
    geometry = plan_crop(600, 800, (edge, edge), random_crop=False, may_flip=False, seed=0, ordinal=0)
    out = np.zeros((edge, edge, 3), np.uint8)
    crop_pixels(picture, geometry, out)
    expected = smooth.resize((edge, edge), Image.Resampling.BICUBIC, box=(100, 0, 700, 600))
    assert np.abs(out.astype(int) - np.asarray(expected)).mean() < 2


@pytest.mark.parametrize("height", [1, 3, 4, 7, 8, 9, 100, 255, 257])
@pytest.mark.parametrize("width", [1, 4, 5, 16, 99, 256])
@pytest.mark.parametrize("edge", [1, 2, 16, 50])
def test_scale_of_a_reduced_picture(height: int, width: int, edge: int) -> None:
    """What `scale` says is what libjpeg did, and the target can be cropped if the original allows."""
    picture = decode(
        encoded(Image.fromarray(ramp(width, height)), "JPEG"), target=(edge, edge), max_pixels=LIMIT
    )
    expected = tuple(int(side * picture.scale) for side in (height, width))
    assert picture.pixels.shape[:2] == expected
    assert min(expected) >= min(edge, height, width)


def test_crop_of_a_reduced_picture_lies_where_it_says() -> None:
    """Random crops of a JPEG whose edges eighths do not divide equal Pillow's crop of the box returned."""
    y, x = np.indices((787, 1021))
    waves = [255 - np.abs(v % 128 - 64) * 3.9 for v in (x, y, x + y)]  # steep: a pixel's shift is 4 levels
    picture_of_waves = Image.fromarray(np.stack(waves, axis=2).astype(np.uint8))
    picture = decode(
        encoded(picture_of_waves, "JPEG", quality=98, subsampling=0), target=(300, 300), max_pixels=LIMIT
    )
    assert picture.scale == 0.5
    for ordinal in range(20):
        plan = plan_crop(787, 1021, (300, 300), random_crop=True, may_flip=True, seed=5, ordinal=ordinal)
        out = np.zeros((300, 300, 3), np.uint8)
        crop = crop_pixels(picture, plan, out)
        box = (crop.left * 1021, crop.top * 787, crop.right * 1021, crop.bottom * 787)
        expected = np.asarray(picture_of_waves.resize((300, 300), Image.Resampling.BOX, box=box))
        expected = expected[:, ::-1] if plan.flip else expected
        assert np.abs(out.astype(int) - expected).mean() < 1.0


def test_bombs_and_rubbish_are_rejected() -> None:
    bomb = encoded(Image.new("L", (3000, 3000)), "PNG")
    with pytest.raises(Rejected, match="too_many_pixels"):
        decode(bomb, target=(64, 64), max_pixels=LIMIT)
    header = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + b"\0\1\0\0\0\1\0\0\x08\2\0\0\0"
    header += zlib.crc32(header[12:29]).to_bytes(4, "big")
    for rubbish in (
        b"",
        b"x",
        b"\xff\xd8\xff",
        b"GIF89a",
        header,
        b"\xff\xd8" + b"\0" * 500,
        b"%PDF-1.4",
        b"<svg/>",
    ):
        with pytest.raises(Rejected):
            decode(rubbish, target=(64, 64), max_pixels=LIMIT)
    whole = encoded(Image.fromarray(ramp()), "JPEG")
    with pytest.raises(Rejected, match="not_an_image"):
        decode(whole[: len(whole) // 2], target=(64, 64), max_pixels=LIMIT)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 200), width=st.integers(1, 200), th=st.integers(1, 64), tw=st.integers(1, 64),
    ordinal=st.integers(0, 2**62),
)  # fmt: skip
def test_crop_is_inside_and_has_the_right_aspect(height, width, th, tw, ordinal) -> None:
    g = plan_crop(height, width, (th, tw), random_crop=True, may_flip=True, seed=3, ordinal=ordinal)
    assert -1e-9 <= g.top < g.bottom <= 1 + 1e-9
    assert -1e-9 <= g.left < g.right <= 1 + 1e-9
    assert (g.right - g.left) * width / ((g.bottom - g.top) * height) == pytest.approx(tw / th)
    assert g == plan_crop(height, width, (th, tw), random_crop=True, may_flip=True, seed=3, ordinal=ordinal)
    picture = whole(np.full((height, width, 3), 77, np.uint8))
    snapped, rows, columns = g.on_grid(picture)
    assert (snapped, rows, columns) == snapped.on_grid(picture)
    for name, edge in (("top", height), ("bottom", height), ("left", width), ("right", width)):
        assert abs(getattr(snapped, name) - getattr(g, name)) * edge <= 1.5
        assert getattr(snapped, name) * edge == pytest.approx(round(getattr(snapped, name) * edge))
    assert snapped.bottom <= 1
    assert snapped.right <= 1
    out = np.zeros((th, tw, 3), np.uint8)
    crop_pixels(picture, g, out)
    assert (out == 77).all()


def test_draws_are_spread_and_independent() -> None:
    crops = [
        plan_crop(64, 128, (64, 64), random_crop=True, may_flip=True, seed=1, ordinal=i) for i in range(2000)
    ]
    lefts = np.asarray([g.left for g in crops]) * 2
    flips = np.asarray([g.flip for g in crops])
    assert abs(lefts.mean() - 0.5) < 0.03
    assert abs(flips.mean() - 0.5) < 0.05
    assert abs(np.corrcoef(lefts, flips)[0, 1]) < 0.07


@pytest.mark.parametrize("edge", [36, 48, 52, 64, 70])
def test_shrinking_does_not_alias(edge: int) -> None:
    """A checkerboard finer than the target's pixels comes near its mean."""
    board = (np.indices((96, 96)).sum(0) % 2 * 255).astype(np.uint8)[:, :, None].repeat(3, 2)
    g = plan_crop(96, 96, (edge, edge), random_crop=False, may_flip=False, seed=0, ordinal=0)
    out = np.zeros((edge, edge, 3), np.uint8)
    crop_pixels(whole(board), g, out)
    assert np.abs(out.astype(int) - 127).max() < (40 if edge < 48 else 50)
    assert abs(out.mean() - 127.5) < 2


def test_maps_and_boxes_follow_the_picture() -> None:
    """A marked rectangle lands at the same place in pixels, label map, depth map and layout."""
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[12:36, 40:70] = 255
    labels = np.zeros((60, 100), np.uint8)
    labels[12:36, 40:70] = 7
    for flip in (False, True):
        g = Geometry(60, 100, 0.0, 0.25, 1.0, 0.85, flip, 60, 60)
        out = np.zeros((60, 60, 3), np.uint8)
        crop_pixels(whole(pixels), g, out)
        seg = crop_map(encoded(Image.fromarray(labels), "PNG"), g, labels=True, max_pixels=LIMIT)
        depth = crop_map(encoded(Image.fromarray(labels * 36), "PNG"), g, labels=False, max_pixels=LIMIT)
        assert ((out[:, :, 0] > 127) == (seg == 7)).all()
        assert (np.abs(depth - (seg == 7) * 252 / 255) < 0.01).all()
        row = layout_rows({"layout": [[3, 0.4, 0.2, 0.7, 0.6]]}, g, 2)
        ys, xs = np.nonzero(seg)
        assert row[0] == pytest.approx(
            [3, xs.min() / 60, ys.min() / 60, (xs.max() + 1) / 60, (ys.max() + 1) / 60]
        )
        assert row[1, 0] == -1
        assert g.size_row() == [60, 100, 0, 15 if flip else 25, 60, 60], "cut at the left of what is shown"


def test_layout_keeps_the_largest_and_refuses_rubbish() -> None:
    g = Geometry(10, 10, 0.0, 0.5, 1.0, 1.0, False, 8, 8)
    rows = layout_rows({"layout": [[1, 0, 0, 0.4, 1], [2, 0.6, 0, 0.7, 0.1], [3, 0.5, 0, 1, 1]]}, g, 5)
    assert rows[:, 0].tolist() == [3, 2, -1, -1, -1]
    for rubbish in (None, {}, {"layout": "x"}, {"layout": [[1, 2]]}, {"layout": [["a", 0, 0, 1, 1]]}):
        with pytest.raises(Rejected, match="no_layout"):
            layout_rows(rubbish, g, 5)


@pytest.mark.parametrize(
    "row",
    [
        [1, 12, 30, 200, 180],  # pixels
        [1, 0.5, 0.5, 0.2, 0.3],  # width and height in place of the second corner
        [0.5, 0, 0, 1, 1],
        [1, 0, 0, 1, 2.1],
    ],
)
def test_boxes_of_another_kind_are_no_empty_layout(row: list[float]) -> None:
    g = Geometry(300, 300, 0.0, 0.0, 1.0, 1.0, False, 8, 8)
    with pytest.raises(Rejected, match=r"bad_layout: .* corners x0, y0, x1, y1 in 0 \.\. 1"):
        layout_rows({"layout": [[2, 0, 0, 1, 1], row]}, g, 5)
    hanging_over = layout_rows({"layout": [[1, -0.2, 0.5, 1.3, 0.7], [2, 0.4, 0.4, 0.4, 0.4]]}, g, 5)
    assert hanging_over[:2].tolist() == [pytest.approx([1, 0, 0.5, 1, 0.7]), [-1, 0, 0, 0, 0]]


def test_a_map_of_one_bit_has_two_labels() -> None:
    labels = np.arange(64).reshape(8, 8) % 3 == 0
    g = Geometry(8, 8, 0.0, 0.0, 1.0, 1.0, False, 8, 8)
    for kind in ("PNG", "TIFF"):
        data = encoded(Image.fromarray(labels), kind)
        assert (crop_map(data, g, labels=True, max_pixels=LIMIT) == labels).all()


@pytest.mark.parametrize("labels", [True, False])
def test_a_map_beside_a_turned_picture_is_turned_too(labels: bool) -> None:
    """Its picture is 40 x 56 upright; a map of 56 x 40 would be stretched over it, and mean other places."""
    g = Geometry(56, 40, 0.0, 0.0, 1.0, 1.0, False, 8, 8)

    def cropped(height: int, width: int) -> None:
        data = encoded(Image.fromarray(np.zeros((height, width), np.uint8)), "PNG")
        crop_map(data, g, labels=labels, max_pixels=LIMIT)

    for height, width in ((56, 40), (28, 20), (19, 14), (64, 64)):  # smaller, rounded, squashed on purpose
        cropped(height, width)
    for height, width in ((40, 56), (20, 28), (14, 19)):
        with pytest.raises(Rejected, match=r"bad_map: .* 40 x 56 upright: it lies on its side"):
            cropped(height, width)


def test_captions() -> None:
    assert clean("  a\tred\n\0circle\u200b \u0065\u0301 ") == "a red circle \u00e9"
    record = {"caption": "one", "all_captions": ["two", "three", 4, ""], "other": None}
    chosen = {
        choose_caption(["txt", "all_captions"], {"txt": b"zero"}, record, require=True, seed=1, ordinal=i)
        for i in range(60)
    }
    assert chosen == {"zero", "two", "three"}
    with pytest.raises(Rejected, match="no_caption"):
        choose_caption(["txt"], {"txt": b" \n"}, record, require=True, seed=1, ordinal=0)
    assert choose_caption(["other"], {}, record, require=False, seed=1, ordinal=0) == ""


def test_captions_are_mixed_by_weight_among_those_that_are_there() -> None:
    sources, record = ["txt", "long", "absent"], {"long": ["two", "three"]}
    found = Counter(
        choose_caption(
            sources, {"txt": b"one"}, record, require=True, seed=1, ordinal=i, weights=[1.0, 3.0, 96.0]
        )
        for i in range(4000)
    )
    assert {name: round(n / 4000, 1) for name, n in found.items()} == {"one": 0.2, "two": 0.4, "three": 0.4}
    assert abs(found["one"] - 1000) < 5 * math.sqrt(4000 * 0.25 * 0.75)
    with pytest.raises(Rejected, match="no_caption"):
        choose_caption(["absent"], {}, {}, require=True, seed=1, ordinal=0, weights=[1.0])


@pytest.mark.parametrize(
    ("whole", "beginnings"),
    [
        ("A dog. It runs! Where, to", {"A dog.", "A dog. It runs!"}),
        ("red dog, wet grass; 3.5 m, sun", {"red dog", "red dog, wet grass", "red dog, wet grass; 3.5 m"}),
        ("\u72d7\u3002\u8dd1\u3002", {"\u72d7\u3002"}),
        ("a dog of 3.5 m", {"a dog of 3.5 m"}),
        ("A dog.", {"A dog."}),
    ],
)
def test_a_share_of_captions_ends_early(whole: str, beginnings: set[str]) -> None:
    def told(shorten: float) -> Counter[str]:
        return Counter(
            choose_caption(
                ["txt"], {"txt": whole.encode()}, {}, require=True, seed=2, ordinal=i, shorten=shorten
            )
            for i in range(1000)
        )

    assert told(0.0) == {whole: 1000}
    assert set(told(1.0)) == beginnings
    some = told(0.3)
    if beginnings != {whole}:
        assert abs(some[whole] - 700) < 5 * math.sqrt(1000 * 0.21)
