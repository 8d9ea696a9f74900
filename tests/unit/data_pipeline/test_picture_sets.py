"""Sets of pictures: folders and tars, each picture once, exactly decoded, in blocks that ranks can share."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data_pipeline.errors import DataError, NoShards, NotATar
from data_pipeline.tools.picture_sets import PictureBlock, captions_in, open_pictures, read_blocks


def noise(seed: int, *, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """Width x height of random pixels."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def folder_of(path: Path, count: int, ending: str = "png") -> Path:
    path.mkdir(parents=True)
    for i in range(count):
        noise(i).save(path / f"{i:03d}.{ending}")
    return path


def blocks_of(url: Path | str, **options: Any) -> list[PictureBlock]:
    return list(read_blocks(open_pictures(str(url)), np.asarray, **{"block": 2, "threads": 2, **options}))


def names(blocks: list[PictureBlock]) -> list[str]:
    return [name.rpartition("/")[2] for block in blocks for name in block.names]


@pytest.mark.parametrize(("ending", "format"), [("png", "png"), ("jpg", "jpeg"), ("webp", "webp")])
def test_a_folder_is_read_as_pillow_reads_it(tmp_path: Path, ending: str, format: str) -> None:
    folder = folder_of(tmp_path / "set", 5, ending)
    blocks = blocks_of(folder)
    assert [len(block.names) for block in blocks] == [2, 2, 1]
    assert names(blocks) == [f"{i:03d}.{ending}" for i in range(5)]
    for i, picture in enumerate(p for block in blocks for p in block.prepared):
        expected = np.asarray(Image.open(folder / f"{i:03d}.{ending}").convert("RGB"))
        np.testing.assert_array_equal(picture, expected)
    assert sum((block.formats for block in blocks), start=blocks[0].formats.__class__()) == {format: 5}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_make_the_same_blocks(
    tmp_path: Path, world_size: int, write_shards: Callable[..., Any]
) -> None:
    write_shards(tmp_path / "tars", [3, 1, 4])
    for url in (folder_of(tmp_path / "set", 7), tmp_path / "tars"):
        alone = {block.position: names([block]) for block in blocks_of(url)}
        shared: dict[tuple[int, int], list[str]] = {}
        for rank in range(world_size):
            for block in blocks_of(url, rank=rank, world_size=world_size):
                assert block.position not in shared
                shared[block.position] = names([block])
        assert shared == alone


def test_tars_carry_captions_and_are_named_in_every_way(
    tmp_path: Path, write_shards: Callable[..., Any]
) -> None:
    write_shards(tmp_path, [3, 2])
    for url in (tmp_path, f"{tmp_path}/*.tar", f"{tmp_path}/{{00000..00001}}.tar"):
        blocks = blocks_of(url)
        assert [block.position for block in blocks] == [(0, 0), (0, 1), (1, 0)]
        captions = [caption for block in blocks for caption in block.captions]
        assert captions == [
            f"caption {key}" for key in ("000000000", "000000001", "000000002", "000010000", "000010001")
        ]


def test_captions_beside_pictures_and_those_of_sampled_pictures(tmp_path: Path) -> None:
    beside = folder_of(tmp_path / "beside", 2)
    (beside / "001.txt").write_text("a second one\n")
    assert [block.captions for block in blocks_of(beside)] == [("", "a second one")]
    # as `ldm sample` writes them
    sampled = tmp_path / "sampled"
    (sampled / "pictures").mkdir(parents=True)
    for i, prompt in enumerate(["x", "y", "ça va"]):
        text = PngInfo()
        text.add_text("ldm", json.dumps({"seed": 0, "prompt": prompt}))
        noise(i).save(sampled / "pictures" / f"{i:05d}.png", pnginfo=text)
    noise(9, size=(72, 20)).save(sampled / "grid.png")
    (sampled / "prompts.json").write_text("{}")
    for url in (sampled, sampled / "pictures"):
        blocks = blocks_of(url)
        assert names(blocks) == ["00000.png", "00001.png", "00002.png"], "the contact sheet is no picture"
        assert [c for block in blocks for c in block.captions] == ["x", "y", "ça va"]


def test_captions_in_any_encoding_are_those_of_training_or_refused(tmp_path: Path, write_tar: Any) -> None:
    """Beside pictures and in tars: with a mark they are read, in Latin-1 they would be another text."""
    folder = folder_of(tmp_path / "folder", 3)
    texts = [("a r\u00e9d  circle\r\n", encoding) for encoding in ("utf-16", "utf-8-sig", "utf-8")]
    bodies = [text.encode(encoding) for text, encoding in texts]
    pictures = [(folder / f"{i:03d}.png").read_bytes() for i in range(3)]

    def written(bodies: list[bytes]) -> list[str]:
        members: list[tuple[str, bytes]] = []
        for i, body in enumerate(bodies):
            (folder / f"{i:03d}.txt").write_bytes(body)
            members += [(f"{i:03d}.png", pictures[i]), (f"{i:03d}.txt", body)]
        write_tar(tmp_path / "0.tar", members)
        return [str(folder), str(tmp_path / "0.tar")]

    for url in written(bodies):
        assert [c for block in blocks_of(url) for c in block.captions] == ["a r\u00e9d circle"] * 3
        assert list(captions_in(url)) == ["a r\u00e9d circle"] * 3
    for url in written([bodies[0], "caf\u00e9".encode("latin-1"), "caf\u00e9".encode("utf-16-le")]):
        with pytest.raises(DataError, match=r"001(\.png)?\.txt is no text in UTF-8"):
            list(captions_in(url))
        assert len(names(list(read_blocks(open_pictures(url), len, block=8, captions=False)))) == 3


def test_equal_pictures_have_equal_digests_in_any_lossless_format(tmp_path: Path) -> None:
    tmp_path.joinpath("set").mkdir()
    for name in ("a.png", "b.bmp", "c.tiff"):
        noise(1).save(tmp_path / "set" / name)
    noise(1, size=(20, 24)).save(tmp_path / "set" / "turned.png")
    noise(2).save(tmp_path / "set" / "z.png")
    digests = np.concatenate([block.digests for block in blocks_of(tmp_path / "set")])
    assert len(set(digests.tolist())) == 3
    assert len(set(digests[:3].tolist())) == 1


def test_what_cannot_be_used_is_named_and_nan_is_not_black(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", 1)
    (folder / "broken.png").write_bytes(b"\x89PNG no more")
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(folder / "nan.tiff")
    Image.new("RGB", (8, 8), (3, 4, 5)).save(folder / "one_colour.png")
    blocks = blocks_of(folder, block=8)
    assert names(blocks) == ["000.png", "one_colour.png"]
    assert [(name.rpartition("/")[2], why.partition(":")[0]) for name, why in blocks[0].broken] == [
        ("broken.png", "not_an_image"),
        ("nan.tiff", "not_finite"),
    ]
    assert blocks[0].blank == 1


def test_a_tar_that_is_cut_short_is_refused(tmp_path: Path, write_shards: Callable[..., Any]) -> None:
    write_shards(tmp_path, [4])
    tar = tmp_path / "00000.tar"
    whole = tar.read_bytes()
    for part in (whole[:3000], whole[:800]):
        tar.write_bytes(part)
        with pytest.raises(DataError, match="measured in part"):
            blocks_of(tar)
    for content, what in ((b"text " * 1000, "not a tar"), (gzip.compress(whole), "gunzip")):
        tar.write_bytes(content)
        with pytest.raises(NotATar, match=what):
            blocks_of(tar)


def test_nothing_to_measure(tmp_path: Path, write_shards: Callable[..., Any]) -> None:
    (tmp_path / "empty").mkdir()
    for url in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(NoShards, match="no pictures"):
            open_pictures(str(url))
    write_shards(tmp_path / "both", [1])
    noise(0).save(tmp_path / "both" / "x.png")
    with pytest.raises(DataError, match="both pictures and tars"):
        open_pictures(str(tmp_path / "both"))


def test_sub_folders_count_and_hidden_files_do_not(tmp_path: Path) -> None:
    folder_of(tmp_path / "set" / "n01440764", 2)
    folder_of(tmp_path / "set" / "n01443537", 1)
    noise(5).save(tmp_path / "set" / "._000.png")
    assert len(open_pictures(str(tmp_path / "set")).files) == 3


def test_pictures_by_wildcard_and_braces(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", 12)
    folder_of(tmp_path / "other", 2)
    for url, count in (
        (f"{folder}/*.png", 12),
        (f"{folder}/00[0-9].png", 10),
        (f"{folder}/{{000..003}}.png", 4),
        (f"{tmp_path}/{{set,other}}", 14),
        (f"{folder}/000.png", 1),
    ):
        found = open_pictures(url)
        assert (len(found.files), found.tars) == (count, False), url


def test_texts_are_read_for_captions_alone(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", 2)
    (folder / "000.txt").write_text("x")
    found = open_pictures(str(folder))
    (folder / "000.txt").unlink()
    (block,) = read_blocks(found, np.asarray, block=2, captions=False)
    assert block.captions == ("", "")


def test_reading_can_stop_early(tmp_path: Path, write_shards: Callable[..., Any]) -> None:
    write_shards(tmp_path, [300])
    blocks = read_blocks(open_pictures(str(tmp_path)), np.asarray, block=2, threads=2)
    assert len(next(blocks).names) == 2
    blocks.close()  # type: ignore[attr-defined]  # returns, and leaves no thread that waits


def test_orientation_transparency_and_grey(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    grey = noise(3).convert("L")
    grey.save(folder / "a.png")
    turned = noise(4)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "b.png", exif=exif)
    out = io.BytesIO()
    Image.new("RGBA", (6, 6), (0, 0, 0, 0)).save(out, "PNG")
    (folder / "c.png").write_bytes(out.getvalue())
    first, second, third = (p for block in blocks_of(folder) for p in block.prepared)
    np.testing.assert_array_equal(first, np.asarray(grey.convert("RGB")))
    assert second.shape == (24, 20, 3)
    assert (third == 255).all()
