"""The plain webdataset mode: frequencies, rejects, truncated tars, end without a hang."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.feed.resampled import ResampledLoader
from data_pipeline.feed.tar_stream import samples_of
from data_pipeline.loader import Part, build_loader, merge_positions
from data_pipeline.shards.selection import make_selection


def config_for(url: str, **changes: object) -> DataConfig:
    return DataConfig(shards=url, order="resampled", image_size=16, workers=2, **changes)  # type: ignore[arg-type]


def test_samples_come_with_equal_frequency(make_shards) -> None:
    url, keys = make_shards([20, 20, 20], corrupt=frozenset({"00001/000010003"}))
    with build_loader(
        config_for(url, filter="score < 0.85"), seed=1, global_batch_size=8, part=Part(0, 2)
    ) as loader:
        counts: Counter[str] = Counter()
        for _ in range(300):
            batch = next(loader)
            assert batch.pixels.shape == (4, 3, 16, 16)
            counts.update(batch.keys)
    served = {k for k in keys if (int(k[-4:]) * 7 % 10) / 10 < 0.85} - {"00001/000010003"}
    assert set(counts) == served
    assert min(counts.values()) > 1200 / len(served) / 4
    assert loader.rejected["not_an_image"] > 0
    assert loader.rejected["filter: score < 0.85"] > 0


def test_position_counts_on(make_shards) -> None:
    url, _ = make_shards([20])
    with build_loader(config_for(url), seed=1, global_batch_size=4) as loader:
        batches = [next(loader) for _ in range(3)]
    position = merge_positions([batches[-1].position])
    with build_loader(config_for(url), seed=1, global_batch_size=4, position=position) as loader:
        assert next(loader).ordinals.tolist() == [12, 13, 14, 15]


def test_a_cut_shard_is_counted_and_passed(make_shards) -> None:
    url, _ = make_shards([20, 20])
    shard = Path(url).parent / "00001.tar"
    with tarfile.open(shard) as tar:
        middle = tar.getmembers()[6]
    shard.write_bytes(shard.read_bytes()[: middle.offset_data + middle.size // 2])
    with build_loader(config_for(url), seed=1, global_batch_size=8) as loader:
        keys = {k for _ in range(40) for k in next(loader).keys}
    assert {f"00000/00000{i:04d}" for i in range(20)} <= keys
    assert loader.rejected["shard_cut_short"] > 0


def test_modes_do_not_mix(make_shards) -> None:
    url, _ = make_shards([20])
    with pytest.raises(DataError, match="order=resampled"):
        build_loader(
            DataConfig(shards=url, workers=0),
            seed=1,
            global_batch_size=4,
            position={"format": 1, "order": "resampled", "step": 3},
        )


def first(folder: Path, size: int, **changes: object) -> dict[str, str]:
    """Captions by key of everything that a few batches hold."""
    with build_loader(config_for(f"{folder}/*.tar", **changes), seed=1, global_batch_size=size) as loader:
        batches = [next(loader) for _ in range(12)]
    return {k: c for b in batches for k, c in zip(b.keys, b.captions, strict=True)}


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_streams_have_the_samples_of_an_index(tmp_path: Path, write_tar, tiny_picture, pack) -> None:
    """Several members per key, dots in keys, `./`, joined archives; packed in any way."""
    write_tar(tmp_path / "a", [
        ("./k.jpg", tiny_picture(1)), ("./k.mask.png", tiny_picture(2, kind="PNG")), ("./k.txt", b"one"),
        ("./i.v1.jpg", tiny_picture(3)), ("./i.v1.txt", b"two"), ("./README", b""),
    ])  # fmt: skip
    many = [
        (f"m.{i:02d}.{e}", tiny_picture(i) if e == "jpg" else b"%d" % i)
        for i in range(70)
        for e in ("jpg", "txt")
    ]
    write_tar(tmp_path / "b", many)
    (tmp_path / "0.tar").write_bytes(pack((tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes()))
    expected = {"0/k": "one", "0/i.v1": "two"} | {f"0/m.{i:02d}": str(i) for i in range(70)}
    assert first(tmp_path, 50) == expected


def test_streams_read_what_is_wanted_and_not_too_large(tmp_path: Path, write_tar, tiny_picture) -> None:
    """Little in a compressed tar may be much in memory."""
    write_tar(tmp_path / "a", [
        ("k.jpg", tiny_picture(1)), ("k.npy", bytes(90_000)), ("k.txt", b"k"),
        ("k.json", b"{}".ljust(90_000)),
        ("l.jpg", tiny_picture(2).ljust(90_000, b"\1")), ("l.txt", b"l"),
        ("m.jpg", tiny_picture(3)), ("m.png", bytes(90_000)), ("m.txt", b"m"),
        ("n.jpg", tiny_picture(4)), ("n.txt", bytes(90_000)),
    ])  # fmt: skip
    (tmp_path / "0.tar").write_bytes(gzip.compress((tmp_path / "a").read_bytes()))
    assert first(tmp_path, 2, max_member_bytes=20_000) == {"0/k": "k", "0/m": "m"}
    config = config_for(str(tmp_path / "*.tar"), max_member_bytes=20_000)
    rejected = Counter[str]()
    with (tmp_path / "0.tar").open("rb") as stream:
        samples = samples_of(
            [{"url": "0.tar", "stream": stream}],
            make_selection(config),
            broken=pytest.fail,
            reject=lambda reason: rejected.update([reason]),
        )
        found = {sample["__key__"]: {e for e in sample if "__" not in e} for sample in samples}
    assert found == {"k": {"jpg", "json", "txt"}, "m": {"jpg", "txt"}}
    assert rejected == {"too_large": 2}


def test_streams_refuse_what_they_cannot_join(tmp_path: Path, write_tar, tiny_picture) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", tiny_picture(1)), ("b.jpg", tiny_picture(2)), ("a.txt", b"a")])
    with pytest.raises(DataError, match="tar --sort=name"):
        first(tmp_path, 2, require_caption=False)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, link in (("a.jpg", ""), ("b.jpg", "a.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = (tarfile.LNKTYPE if link else tarfile.REGTYPE), link
            tar.addfile(info, io.BytesIO())
    with pytest.raises(DataError, match="--hard-dereference"):
        first(tmp_path, 2, require_caption=False)


def test_a_second_sample_of_a_key_is_counted(tmp_path: Path, write_tar, tiny_picture) -> None:
    names = ["a.jpg", "b.jpg", "a.jpg"]
    write_tar(tmp_path / "0.tar", [(name, tiny_picture(i)) for i, name in enumerate(names)])
    config = config_for(str(tmp_path / "*.tar"), require_caption=False)
    with build_loader(config, seed=1, global_batch_size=2) as loader:
        assert {k for _ in range(40) for k in next(loader).keys} == {"0/a", "0/b"}
        assert loader.rejected["duplicate_key"] > 0


def test_rejections_count_with_the_samples_that_come_after_them(make_shards) -> None:
    """However far the threads have read ahead of what is served."""
    url, _ = make_shards([50] * 4)
    config = config_for(url, filter="score < 0.65", prefetch=64)  # 7 of 10
    with build_loader(config, seed=1, global_batch_size=16) as loader:
        assert isinstance(loader, ResampledLoader)
        next(loader)
        while loader._queue.qsize() < 60 * 16:  # the suite's timeout bounds this
            time.sleep(0.01)
        assert loader.tally.served == 16
        assert loader.tally.lost < 60
        for _ in range(59):
            next(loader)
        assert loader.tally.served == 960
        assert abs(loader.tally.served_share - 0.7) < 0.05
