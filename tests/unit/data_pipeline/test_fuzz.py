"""Mutated tar, JPEG, JSON, parquet, index and filter bytes: only declared errors, no hang, no blow-up.

LDM_FUZZ_CASES sets the number of cases over all targets (100,000 for the full run); every case is a
function of its number, so a failing one can be repeated alone.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import resource
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import DataError, Rejected
from data_pipeline.feed.captions import choose_caption
from data_pipeline.feed.conditions import layout_rows
from data_pipeline.pictures.crops import Geometry
from data_pipeline.pictures.decoding import decode
from data_pipeline.pictures.headers import picture_size
from data_pipeline.shards.build_index import build_index
from data_pipeline.shards.filters import Filter
from data_pipeline.shards.grouping import group
from data_pipeline.shards.index import decode_index
from data_pipeline.shards.manifest import MANIFEST, read_manifest
from data_pipeline.shards.read_index import read_index
from data_pipeline.shards.records import parse_record
from data_pipeline.shards.tars import scan
from data_pipeline.storage.listing import list_files
from data_pipeline.tools.scenes.scene import SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize

CASES = int(os.environ.get("LDM_FUZZ_CASES", "3000"))
SHARES = {"tar": 0.3, "jpeg": 0.25, "other": 0.1, "json": 0.2, "filter": 0.1, "index": 0.04, "parquet": 0.01}


def mutate(data: bytes, number: int) -> bytes:
    """One to eight byte flips, cuts, insertions, repetitions or splices of zeros."""
    rng = random.Random(number)
    body = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(body) + 1)
        kind = rng.randrange(6)
        if kind == 0 and body:
            body[at % len(body)] = rng.randrange(256)
        elif kind == 1:
            del body[at : at + rng.randint(1, 64)]
        elif kind == 2:
            body[at:at] = rng.randbytes(rng.randint(1, 32))
        elif kind == 3:
            body[at:at] = body[at : at + rng.randint(1, 600)]
        elif kind == 4:
            size = rng.randint(1, 16)
            body[at : at + size] = rng.choice([b"\0", b"\xff", b"7"]) * size
        elif rng.random() < 0.1:
            del body[at:]
    return bytes(body)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    list(synthesize(str(root), SynthesisOptions(6, scene=SceneOptions(1, 2, 24, 40), failed_share=0.2)))
    return root


def run(name: str, seeds: list[bytes], check: Callable[[bytes], object]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(int(CASES * SHARES[name])):
        data = mutate(seeds[number % len(seeds)], number)
        try:
            check(data)
        except (DataError, Rejected):
            pass
        except BaseException as error:
            raise AssertionError(f"{name} case {number} of {len(seeds)} seeds: {error!r}") from error
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


def pictures(*kinds: str) -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 30, 3), np.uint8)
    found = []
    for kind in kinds:
        for mode in ("RGB", "L", "CMYK") if kind == "JPEG" else ("RGB", "L"):
            out = io.BytesIO()
            Image.fromarray(pixels).convert(mode).save(out, kind)
            found.append(out.getvalue())
    return found


def test_tar(tmp_path: Path) -> None:
    seeds = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
            for name in ("a.jpg", "a.txt", "b" * 140 + ".jpg" if kind != tarfile.USTAR_FORMAT else "b.jpg"):
                info = tarfile.TarInfo(name)
                info.size = 300
                tar.addfile(info, io.BytesIO(b"x" * 300))
        seeds.append(buffer.getvalue())

    def check(data: bytes) -> None:
        found = scan(
            lambda a, b: data[a:b], len(data), look=lambda name, body: len(body.read(0, 100)), chunk=2000
        )
        for member in found.members:
            assert 0 <= member.offset <= member.offset + member.size <= len(data)
        group(found.members)

    run("tar", seeds, check)


def check_picture(data: bytes) -> None:
    picture_size(data[:2000])
    picture = decode(data, target=(16, 16), max_pixels=100_000)
    assert picture.pixels.ndim == 3
    assert 0 < picture.height * picture.width <= 100_000


def test_jpeg() -> None:
    run("jpeg", pictures("JPEG"), check_picture)


def test_other_pictures() -> None:
    run("other", pictures("PNG", "WEBP", "GIF", "BMP", "TIFF"), check_picture)


def test_json() -> None:
    record = {
        "caption": "a",
        "all": ["b", None, 3],
        "layout": [[1, 0.1, 0.2, 0.5, 0.6]],
        "class_label": 3,
        "punsafe": 0.1,
    }
    seeds = [
        json.dumps(record).encode(),
        b"[" * 3000,
        b'{"punsafe": 1e999, "layout": [[1e400,0,0,1,1]]}',
        b'{"a": ' + b"9" * 5000 + b"}",
    ]
    rule = Filter("punsafe < 0.2 or default(caption, 'x') == 'x'")

    def check(data: bytes) -> None:
        found = parse_record(data)
        rule.check(found or {})
        choose_caption(
            ["caption", "all"], {"caption": data[:30]}, found or {}, require=False, seed=0, ordinal=1
        )
        layout_rows(found, Geometry(10, 10, 0, 0, 1, 1, True, 8, 8), 4)

    run("json", seeds, check)


def test_filter() -> None:
    seeds = [
        b"punsafe < 0.1 and min(width, height) >= 512",
        b"not (a in (1, 'b')) or default(c, 2) / 3 != -d",
    ]

    def check(data: bytes) -> None:
        rule = Filter(data.decode("latin-1"))
        rule.check(dict.fromkeys(rule.columns, 1))

    run("filter", seeds, check)


def test_index_files(folder: Path, tmp_path: Path) -> None:
    build_index(list_files(str(folder / "*.tar")), str(tmp_path))
    seeds = [p.read_bytes() for p in tmp_path.glob("*.npz")]
    run("index", seeds, lambda data: decode_index(data, "here"))
    manifest = tmp_path / MANIFEST
    body = gzip.decompress(manifest.read_bytes())

    def check(data: bytes) -> None:
        manifest.write_bytes(gzip.compress(data))
        read_manifest(str(tmp_path))

    run("index", [body], check)


def test_parquet(folder: Path) -> None:
    parquet = folder / "00000.parquet"
    shard = list_files(str(folder / "*.tar"))[0]
    whole = parquet.read_bytes()

    def check(data: bytes) -> None:
        parquet.write_bytes(data)
        assert len(read_index(shard)) > 0

    run("parquet", [whole], check)
