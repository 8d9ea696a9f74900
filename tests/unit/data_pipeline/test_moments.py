"""The cache of moments: what the loader serves with it off, filling, full, half lost; never out of date.

A stand-in for the encoder, so that every number can be told: moments are 4 x 4 means of the pixels.

Orders: that of an index, that of shards which nobody has indexed, and the same once they were learned.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import tarfile
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import DataError, Unreachable, UserError
from data_pipeline.loader import Part, build_loader, merge_positions, open_dataset
from data_pipeline.moments import writer as moments_writer
from data_pipeline.moments.entry import Label, Moments, MomentsCache
from data_pipeline.moments.parts import STAGE, commit_part
from data_pipeline.moments.writer import MomentsWriter
from data_pipeline.pictures.crops import RESAMPLING, crop_pixels, plan_crop
from data_pipeline.pictures.decoding import DecodedPicture
from data_pipeline.shards.build_index import build_index
from data_pipeline.storage.listing import list_files
from data_pipeline.tools.purge import purge
from data_pipeline.tools.scenes.scene import SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize

BATCH, EDGE, FACTOR = 12, 16, 4
UNSHRUNK = (Phase.explicit, Phase.reuse, Phase.generate)
"""An example takes a second."""


def encode(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 [B, 3, H / 4, W / 4]"""
    return torch.nn.functional.avg_pool2d(pixels.float(), FACTOR)


def config_for(folder: Path, **changes: Any) -> DataConfig:
    given = {"shards": str(folder / "*.tar"), "image_size": EDGE, "workers": 0, "shuffle_window": 5}
    return DataConfig(**{**given, **changes})


ORDERS = ("indexed", "streamed", "learned")


def in_order(config: DataConfig, order: str) -> DataConfig:
    """The configuration in one of the orders, with its shards as they are now."""
    beside = Path(config.shards).parent
    if order == "indexed":
        return config
    if order == "learned":
        build_index(list_files(config.shards), str(beside / "_index"))
        return replace(config, order="streamed")
    # Beneath a file nothing can be kept, so that no shard is ever known.
    (beside / "nowhere").write_text("no folder")
    return replace(config, order="streamed", index=str(beside / "nowhere" / "index"))


def cache_at(folder: Path, **changes: Any) -> MomentsCache:
    plain = MomentsCache(str(folder), "stage", "fp32", channels=3, downsampling=FACTOR)
    return replace(plain, **changes)


def values_of(batch: Batch, writer: MomentsWriter | None) -> Tensor:
    """Moments of all rows, those that were missing on their way to the cache."""
    if batch.cached is None:
        return encode(batch.pixels)
    cached = batch.cached
    live = encode(batch.pixels).to(cached.values.dtype)
    values = torch.where(cached.found[:, None, None, None], cached.values, live)
    if writer is not None:
        bits = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
        writer.put(cached.labels, lambda: bits.numpy(), 1)
    return values


def train(
    config: DataConfig,
    steps: int,
    moments: Moments | None,
    *,
    ranks: int = 1,
    position: Any = None,
    seed: int = 3,
    part_bytes: int = 20_000,
) -> tuple[list[Any], Any, Counter[str]]:
    """(keys, ordinals, captions, sizes, moments) of every step, the position behind them, and counts."""
    cache = moments.cache if moments is not None else None
    writers = [MomentsWriter(cache, part_bytes=part_bytes) if cache else None for _ in range(ranks)]
    loaders = [
        build_loader(
            config,
            seed=seed,
            global_batch_size=BATCH,
            part=Part(rank, ranks),
            position=position,
            moments=moments,
        )
        for rank in range(ranks)
    ]
    out, counts = [], Counter[str]()
    for _ in range(steps):
        parts = [next(loader) for loader in loaders]
        values = torch.cat([values_of(part, w) for part, w in zip(parts, writers, strict=True)])
        out.append(
            (
                [key for part in parts for key in part.keys],
                torch.cat([part.ordinals for part in parts]).tolist(),
                [caption for part in parts for caption in part.captions],
                torch.cat([part.conditions["size"] for part in parts]).tolist(),
                values,
            )
        )
        position = merge_positions([json.loads(json.dumps(part.position)) for part in parts])
    for loader, writer in zip(loaders, writers, strict=True):
        counts += loader.counts + loader.rejected
        loader.close()
        if writer is not None:
            writer.close()
            counts += writer.counts
    return out, position, counts


def same(a: list[Any], b: list[Any]) -> bool:
    return all(x[:4] == y[:4] and torch.equal(x[4], y[4]) for x, y in zip(a, b, strict=True))


def parts_of(cache: MomentsCache) -> list[Path]:
    return sorted(Path(cache.folder).glob("parts/*.tar"))


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), phases=UNSHRUNK)
@given(
    counts=st.lists(st.integers(6, 25), min_size=1, max_size=4).filter(lambda c: sum(c) >= 24),
    ranks=st.sampled_from([1, 2, 3]),
    again=st.sampled_from([1, 2, 3, 4]),
    lost=st.sampled_from(["nothing", "parts", "tables", "bytes", "rows", "ends"]),
    variants=st.sampled_from([0, 3]),
    filtered=st.booleans(),
    order=st.sampled_from(ORDERS),
)
def test_off_filling_full_and_half_lost_are_the_same(
    tmp_path_factory, write_shards, counts, ranks, again, lost, variants, filtered, order
) -> None:
    """Keys, draws, captions, sizes and fp32 moments, bit for bit, at any number of ranks."""
    folder, cache = tmp_path_factory.mktemp("shards"), cache_at(tmp_path_factory.mktemp("cache"))
    write_shards(folder, counts, corrupt=frozenset({"00000/000000001"}))
    changes: dict[str, Any] = {"filter": "score < 0.85"} if filtered else {}
    if variants:
        changes |= {"crop": "random", "horizontal_flip": True}
    config = in_order(config_for(folder, **changes), order)
    off, _, _ = train(config, 8, Moments(variants) if variants else None)
    filling, _, _ = train(config, 8, Moments(variants, cache), ranks=ranks)
    assert same(filling, off)
    tars = parts_of(cache)
    assert tars
    for part in tars[::2]:
        if lost == "parts":
            part.unlink()
        elif lost == "tables":
            part.with_suffix(".json").unlink()
        elif lost == "bytes":
            data = bytearray(part.read_bytes())
            data[1000:] = bytes(byte ^ 1 for byte in data[1000:])
            part.write_bytes(data)
        elif lost == "ends":
            part.write_bytes(part.read_bytes()[:3000])
        elif lost == "rows":
            for rows in Path(cache.folder).glob(f"shards/*/{part.stem}.json"):
                rows.write_bytes(rows.read_bytes()[:-3])
    half, position, found = train(config, 5, Moments(variants, cache), ranks=again)
    rest, _, _ = train(config, 3, Moments(variants, cache), ranks=ranks, position=position)
    assert same(half + rest, off)
    if lost == "nothing":
        assert found["cache_missed"] == 0
    assert found["cache_found"] > 0 or lost != "nothing"


@pytest.mark.parametrize("order", ORDERS)
def test_pictures_that_are_cached_are_neither_read_nor_decoded(
    tmp_path: Path, write_shards, order: str
) -> None:
    """Where a shard is read for the first time, they are read in passing."""
    write_shards(tmp_path / "shards", [24])
    config = in_order(config_for(tmp_path / "shards"), order)
    moments = Moments(0, cache_at(tmp_path / "cache"))
    first, _, filling = train(config, 2, moments)
    shard = tmp_path / "shards" / "00000.tar"
    status = shard.stat()
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        for member in tar.getmembers():
            if member.name.endswith(".jpg"):
                data[member.offset_data : member.offset_data + member.size] = bytes(member.size)
    shard.write_bytes(data)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))  # as if it had never been touched
    second, _, full = train(config, 2, moments)
    assert same(first, second)
    assert (filling["cache_missed"], filling["cache_found"], full["cache_missed"]) == (24, 0, 0)
    assert full["cache_found"] == 24
    assert full["written"] == 0
    index = sum(file.stat().st_size for file in (tmp_path / "shards" / "_index").glob("*.npz"))
    if order == "indexed":
        # And a byte now and then, to see whether it is the same.
        assert full["bytes"] - full["written"] <= index + 24
    elif order == "learned":
        visits = full["bytes"] // index  # a lane reads ahead, in the same shard again
        assert 1 <= visits < 9
        assert full["bytes"] - full["written"] <= visits * (index + 24)
    else:
        assert full["bytes"] > len(data)


@pytest.mark.parametrize("buckets", [False, True])
def test_boxes_maps_and_sizes_follow_the_crop_that_was_encoded(tmp_path: Path, buckets: bool) -> None:
    """Every field of a batch, with random crops of pictures of many shapes, in buckets and without."""
    scene = SceneOptions(min_objects=1, max_objects=2, min_edge=24, max_edge=60)
    options = SynthesisOptions(samples=96, failed_share=0.0, maps=True, scene=scene)
    list(synthesize(str(tmp_path / "shards"), options))
    changes = {"conditions": ("class_label", "layout", "semantic_map", "depth"), "require_caption": False}
    drawn = {"crop": "random", "horizontal_flip": True, "buckets": buckets, "bucket_step": 4}
    config = config_for(tmp_path / "shards", **changes, **drawn, lanes=1, allow_enlarging=True)
    cache = cache_at(tmp_path / "cache")
    seen: list[list[dict[str, Any]]] = []
    for moments in (Moments(2), Moments(2, cache), Moments(2, cache)):
        writer = MomentsWriter(cache) if moments.cache else None
        loader = build_loader(config, seed=3, global_batch_size=BATCH, moments=moments)
        steps = []
        for _ in range(6):
            batch = next(loader)
            values = values_of(batch, writer)
            steps.append({**batch.conditions, "values": values, "keys": batch.keys, "texts": batch.captions})
        counts = loader.counts
        loader.close()
        if writer is not None:
            writer.close()
        seen.append(steps)
    assert counts["cache_missed"] == 0
    assert len({step["values"].shape for step in seen[0]}) > (1 if buckets else 0)
    for name, value in ((name, value) for step in seen[0] for name, value in step.items()):
        assert isinstance(value, tuple) or value.numel(), name
    for others in seen[1:]:
        for step, other in zip(seen[0], others, strict=True):
            assert step.keys() == other.keys()
            for name, value in step.items():
                same_value = value == other[name] if isinstance(value, tuple) else value.equal(other[name])
                assert same_value, name


@pytest.mark.parametrize("order", ORDERS)
def test_members_that_were_not_kept_come_from_the_shard(tmp_path: Path, write_shards, order: str) -> None:
    """Captions from another member than when the cache was filled, and a filter that needs each json."""
    write_shards(tmp_path / "shards", [24])
    config = in_order(config_for(tmp_path / "shards"), order)
    moments = Moments(0, cache_at(tmp_path / "cache"))
    train(config, 2, moments)
    for changes in ({"captions": ("url",)}, {"captions": ("url", "txt"), "filter": "score < 0.75"}):
        off, _, _ = train(replace(config, **changes), 1, None)
        on, _, counts = train(replace(config, **changes), 1, moments)
        assert same(on, off)
        assert counts["cache_missed"] == 0


CHANGES: dict[str, Any] = {
    "nothing": lambda config, cache: (config, cache),
    "stage": lambda config, cache: (config, replace(cache, stage="another")),
    "precision": lambda config, cache: (config, replace(cache, stage="rounded", dtype="bf16")),
    "crop size": lambda config, cache: (replace(config, image_size=8), cache),
    "random crop": lambda config, cache: (replace(config, crop="random"), cache),
    "flip": lambda config, cache: (replace(config, horizontal_flip=True), cache),
    "enlarging": lambda config, cache: (replace(config, allow_enlarging=True, image_size=24), cache),
}
MENDED = ("touched", "other picture", "moved picture", "grown")


def change_shard(kind: str, folder: Path) -> None:
    """Give sample 3 another picture, or the same content another edition."""
    shard = folder / "00000.tar"
    with tarfile.open(shard) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]  # type: ignore[union-attr]
    names = [name for name, _ in members if name.endswith(".jpg")]
    pictures = dict(members)
    if kind in ("other picture", "moved picture"):  # of one size: a byte of a JPEG's comment would do as well
        a, b = names[3], names[4]
        pictures[a], pictures[b] = pictures[b], pictures[a]
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        order = members[3:] + members[:3] if kind == "moved picture" else members
        for name, _ in order:
            content = pictures[name] + (bytes(700) if kind == "grown" and name == names[0] else b"")
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), phases=UNSHRUNK)
@given(
    changed=st.lists(st.sampled_from([*CHANGES, *MENDED]), min_size=1, max_size=3, unique=True),
    variants=st.sampled_from([1, 2]),
    order=st.sampled_from(ORDERS),
)
def test_nothing_out_of_date_is_ever_served(tmp_path_factory, write_shards, changed, variants, order) -> None:
    """After any change the moments are those of encoding without a cache; only what stayed is found."""
    folder, place = tmp_path_factory.mktemp("shards"), tmp_path_factory.mktemp("cache")
    write_shards(folder, [24])
    config, cache = in_order(config_for(folder), order), cache_at(place)
    train(config, 2, Moments(variants, cache))
    for change in changed:
        if change in CHANGES:
            config, cache = CHANGES[change](config, cache)
        else:
            change_shard(change, folder)
        off, _, _ = train(config, 2, Moments(variants))
        expected = [
            (*step[:4], step[4].to(torch.bfloat16 if cache.dtype == "bf16" else torch.float32))
            for step in off
        ]
        on, _, counts = train(config, 2, Moments(variants, cache))
        assert same(on, expected)
        if change in MENDED or change in ("stage", "precision", "crop size", "enlarging"):
            assert counts["cache_found"] == 0 or changed.index(change) > 0
        full, _, counts = train(config, 2, Moments(variants, cache))
        assert same(full, expected)
        assert counts["cache_missed"] == 0


def test_a_shard_replaced_while_it_is_cached_is_noticed(tmp_path: Path, write_shards) -> None:
    """No byte of the picture is read, and yet the replaced shard is: its edition belongs to the key."""
    folder, cache = tmp_path / "shards", cache_at(tmp_path / "cache")
    write_shards(folder, [24])
    # captions lie beside nothing: no other member is read either
    config = config_for(folder, captions=(), require_caption=False)
    moments = Moments(0, cache)
    train(config, 2, moments)
    dataset = open_dataset(config)
    change_shard("grown", folder)
    loader = build_loader(config, seed=3, global_batch_size=BATCH, moments=moments, dataset=dataset)
    with pytest.raises(DataError, match="changed after they were indexed"):
        next(loader)
    assert loader.counts["cache_found"] == 0
    loader.close()


@pytest.mark.parametrize("order", ORDERS)
def test_an_opted_out_sample_is_not_served(tmp_path: Path, write_shards, order: str) -> None:
    write_shards(tmp_path / "shards", [36])
    config = in_order(config_for(tmp_path / "shards"), order)
    moments = Moments(0, cache_at(tmp_path / "cache"))
    first, _, _ = train(config, 3, moments)
    gone = first[0][0][:2]
    (tmp_path / "removed.txt").write_text("\n".join(gone))
    second, _, counts = train(replace(config, removal_lists=(str(tmp_path / "removed.txt"),)), 6, moments)
    assert not set(gone) & set(itertools.chain.from_iterable(step[0] for step in second))
    assert counts["removed: removed.txt"] > 0


@pytest.mark.parametrize("order", ORDERS)
def test_purging_reaches_what_the_loader_stored(tmp_path: Path, write_shards, order: str) -> None:
    """By the URL of a sample, which the cache knows by its hash alone, and by the key as `trace` has it."""
    write_shards(tmp_path / "shards", [24])
    config = in_order(config_for(tmp_path / "shards"), order)
    moments = Moments(0, cache_at(tmp_path / "cache" / "stage"))
    served, _, _ = train(config, 2, moments)
    (tmp_path / "cache" / "stage" / STAGE).write_text("{}")
    by_url, by_key = served[0][0][0].split("/")[1], served[1][0][5]
    (tmp_path / "removed.txt").write_text(f"http://x.invalid/{by_url}\n{by_key}\n")
    assert purge(str(tmp_path / "cache"), [str(tmp_path / "removed.txt")]).removed == 2
    again, _, counts = train(config, 2, moments)
    assert same(again, served)
    assert counts["cache_missed"] == 2


def test_shards_that_tell_no_edition_are_not_kept(tmp_path: Path, write_shards, caplog) -> None:
    """Nothing would show that such a shard was replaced; that they are not kept is said once."""
    write_shards(tmp_path / "shards", [24, 24])
    config, cache = config_for(tmp_path / "shards"), cache_at(tmp_path / "cache")
    dataset = replace(open_dataset(config), versions=("None", "None"))
    writer = MomentsWriter(cache)
    loader = build_loader(config, seed=3, global_batch_size=BATCH, moments=Moments(0, cache), dataset=dataset)
    for _ in range(4):
        values_of(next(loader), writer)
    loader.close()
    writer.close()
    assert writer.counts["written"] == 0
    assert caplog.text.count("neither an ETag nor when it was changed") == 1


def test_parts_are_ordinary_tars_of_safetensors(tmp_path: Path, write_shards) -> None:
    write_shards(tmp_path / "shards", [24])
    cache = cache_at(tmp_path / "cache", dtype="bf16")
    served, _, _ = train(config_for(tmp_path / "shards"), 2, Moments(0, cache))
    expected = {tuple(values.flatten().tolist()) for step in served for values in step[4].to(torch.float32)}
    found = set()
    for part in parts_of(cache):
        with tarfile.open(part) as tar:
            for member in tar.getmembers():
                entry = load(tar.extractfile(member).read())["moments"]  # type: ignore[union-attr]
                assert entry.dtype == torch.bfloat16
                found.add(tuple(entry.to(torch.float32).flatten().tolist()))
    assert found == expected


@pytest.mark.parametrize("order", ORDERS)
def test_damage_is_said_once_and_mended(tmp_path: Path, write_shards, caplog, order: str) -> None:
    write_shards(tmp_path / "shards", [48])
    config = in_order(config_for(tmp_path / "shards"), order)
    cache = cache_at(tmp_path / "cache")
    off, _, _ = train(config, 4, Moments(0, cache), part_bytes=10**6)
    (part,) = parts_of(cache)
    part.write_bytes(part.read_bytes().replace(b"moments", b"momentz"))
    mended, _, counts = train(config, 4, Moments(0, cache), part_bytes=10**6)
    assert same(off, mended)
    assert counts["cache_missed"] == 48
    assert sum("is damaged" in record.message for record in caplog.records) == 1
    again, _, counts = train(config, 4, Moments(0, cache))
    assert same(off, again)
    assert (counts["cache_found"], counts["cache_damaged"]) == (48, 0)


def test_a_kill_loses_only_what_was_not_committed(tmp_path: Path, write_shards) -> None:
    """Whatever file a part was interrupted at, its samples are encoded again, and nobody stumbles."""
    write_shards(tmp_path / "shards", [24])
    config = config_for(tmp_path / "shards")
    off, _, _ = train(config, 2, None)
    for kept in (".tar", "parts"):
        cache = cache_at(tmp_path / f"cache{kept}")
        train(config, 2, Moments(0, cache))
        for file in Path(cache.folder).rglob("*"):
            if file.is_file() and file.suffix != ".tar" and (kept == ".tar" or file.parent.name != "parts"):
                file.unlink()
        on, _, counts = train(config, 2, Moments(0, cache))
        assert same(on, off)
        assert counts["cache_missed"] == 24


def test_two_runs_may_fill_one_cache(tmp_path: Path, write_shards) -> None:
    write_shards(tmp_path / "shards", [24, 24])
    config, moments = config_for(tmp_path / "shards"), Moments(0, cache_at(tmp_path / "cache"))
    off, _, _ = train(config, 4, None)
    loaders = [build_loader(config, seed=seed, global_batch_size=BATCH, moments=moments) for seed in (3, 4)]
    writers = [MomentsWriter(moments.cache, part_bytes=9_000) for _ in loaders]  # type: ignore[arg-type]
    for _ in range(4):
        for loader, writer in zip(loaders, writers, strict=True):
            values_of(next(loader), writer)
    for each in (*loaders, *writers):
        each.close()
    on, _, counts = train(config, 4, moments)
    assert same(on, off)
    assert counts["cache_missed"] == 0


def test_a_full_cache_keeps_what_it_has(tmp_path: Path, write_shards, caplog) -> None:
    write_shards(tmp_path / "shards", [24])
    config, cache = config_for(tmp_path / "shards"), cache_at(tmp_path / "cache")
    writer = MomentsWriter(cache, allowance=30_000, part_bytes=9_000)
    loader = build_loader(config, seed=3, global_batch_size=BATCH, moments=Moments(0, cache))
    for _ in range(2):
        values_of(next(loader), writer)
    loader.close()
    writer.close()
    sizes = [part.stat().st_size for part in parts_of(cache)]
    assert 0 < sum(sizes) <= 30_000
    assert writer.counts["bytes"] == sum(sizes)
    assert "cache_bytes" in caplog.text
    off, _, _ = train(config, 2, None)
    loader_counts = train(config, 2, Moments(0, cache))
    assert same(loader_counts[0], off)


def test_variants_are_as_many_as_declared(tmp_path: Path, write_shards) -> None:
    """Each key has that many crops, whatever seed and visit; each is drawn in its turn."""
    write_shards(tmp_path / "shards", [12])
    config = config_for(tmp_path / "shards", crop="random", horizontal_flip=True)
    seen: dict[str, set[tuple[int, ...]]] = {}
    for seed in (1, 2):
        for keys, _, _, sizes, _ in train(config, 30, Moments(3), seed=seed)[0]:
            for key, size in zip(keys, sizes, strict=True):
                seen.setdefault(key, set()).add(tuple(size))
    crops = {key: len(each) for key, each in seen.items()}
    assert set(crops.values()) <= {1, 2, 3}
    assert max(crops.values()) == 3


def test_what_resampling_makes_of_a_picture_is_pinned() -> None:
    """RESAMPLING must be raised together with this digest, or old moments are taken for new ones."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    digests = hashlib.sha256()
    for edge in (24, 40, 64, 90, 96):
        out = np.zeros((edge, edge, 3), np.uint8)
        plan = plan_crop(90, 130, (edge, edge), random_crop=True, may_flip=True, seed=1, ordinal=edge)
        crop_pixels(DecodedPicture(pixels, 90, 130), plan, out)
        digests.update(out.tobytes())
    assert (RESAMPLING, digests.hexdigest()[:16]) == (1, "6b54e75effb773e0")


@pytest.mark.parametrize("order", ORDERS)
def test_orders_share_a_cache(tmp_path: Path, write_shards, order: str) -> None:
    """What a run without an index has stored is served to one with it, and the other way round."""
    write_shards(tmp_path / "shards", [24, 24])
    moments = Moments(0, cache_at(tmp_path / "cache"))
    served, _, _ = train(in_order(config_for(tmp_path / "shards"), order), 4, moments)
    assert len({key for keys, *_ in served for key in keys}) == 48
    for other in ORDERS:
        _, _, counts = train(in_order(config_for(tmp_path / "shards"), other), 4, moments)
        assert (counts["cache_found"], counts["cache_missed"]) == (48, 0)


def test_what_a_first_visit_has_learned_spares_reading_at_the_next(tmp_path: Path, write_shards) -> None:
    """In the run that goes on, and in another, at other numbers of ranks; the order stays."""
    write_shards(tmp_path / "shards", [24, 30, 18, 27, 21, 24])
    config = replace(config_for(tmp_path / "shards"), order="streamed")
    moments, index = Moments(0, cache_at(tmp_path / "cache")), tmp_path / "shards" / "_index"
    whole, _, live = train(in_order(config, "streamed"), 40, None)
    assert not index.exists()
    taken: list[Any] = []
    position = None
    while len(taken) < 24:  # two epochs; stopped after every eighth step
        some, position, _ = train(config, 8, moments, ranks=1 + len(taken) // 8, position=position)
        taken += some
    assert len([*index.glob("*.npz")]) > 0
    assert same(taken, whole[:24])
    build_index(list_files(config.shards), str(index))  # what no process has read to its end
    rest, _, later = train(config, 16, moments, ranks=2, position=position)
    assert same(rest, whole[24:])
    again, _, full = train(config, 40, moments)
    assert same(again, whole)
    assert (later["cache_missed"], full["cache_missed"]) == (0, 0)
    assert full["bytes"] < 0.3 * live["bytes"]  # indexes, which are large where pictures are tiny


def test_an_opt_out_that_came_after_the_index_is_not_passed_over(tmp_path: Path, write_shards) -> None:
    """Also where windows are planned from the index, so that the tar is not read."""
    write_shards(tmp_path / "shards", [24] * 6)
    (tmp_path / "gone.txt").write_text("0" * 64)
    config = replace(
        config_for(tmp_path / "shards"), order="streamed", removal_lists=(str(tmp_path / "gone.txt"),)
    )
    build_index(list_files(config.shards), str(tmp_path / "shards" / "_index"))
    moments = Moments(0, cache_at(tmp_path / "cache"))
    train(config, 6, moments)
    for shard in range(6):
        table = {"key": [f"{shard:05d}{i:04d}" for i in range(24)], "sha256": ["1" * 64] * 24}
        pq.write_table(pa.table(table), tmp_path / "shards" / f"{shard:05d}.parquet")
    with pytest.raises(DataError, match=r"sha256 of .* stand in the parquet .*run `ldm data index`"):
        train(config, 1, moments)


@pytest.mark.parametrize("order", ["streamed", "learned"])
def test_a_shard_replaced_under_a_lane_is_left(tmp_path: Path, write_shards, order: str) -> None:
    """At the next window, as without the cache; then it is served as it is by now."""
    write_shards(tmp_path / "shards", [24, 24])
    config = in_order(replace(config_for(tmp_path / "shards"), lanes=1), order)
    moments = Moments(0, cache_at(tmp_path / "cache"))
    train(config, 4, moments)
    _, position, _ = train(config, 1, moments)
    first = train(config, 1, None)[0][0][0][0].partition("/")[0]
    (tmp_path / "first").mkdir()
    shard = tmp_path / "shards" / f"{first}.tar"
    shard.rename(tmp_path / "first" / "00000.tar")
    change_shard("other picture", tmp_path / "first")
    (tmp_path / "first" / "00000.tar").rename(shard)
    off, _, expected = train(config, 9, None, position=position)
    on, _, counts = train(config, 9, moments, position=position)
    assert same(on, off)
    assert counts["shard_replaced"] == expected["shard_replaced"] == 1
    assert {key.partition("/")[0] for key in on[0][0]} != {first}
    assert 0 < counts["cache_missed"] < 48  # of the shard that it is by now


def test_sources_of_which_one_was_indexed(tmp_path: Path, write_shards) -> None:
    """By weights: all take turns, and what is known of the indexed ones spares reading from the first on."""
    write_shards(tmp_path / "a" / "shards", [24, 24])
    write_shards(tmp_path / "b" / "shards", [30, 20])
    sources = tuple(
        SourceConfig(str(tmp_path / name / "shards" / "*.tar"), weight=weight)
        for name, weight in (("a", 2.0), ("b", 1.0))
    )
    config = replace(config_for(tmp_path), shards="", sources=sources, order="streamed")
    moments = Moments(0, cache_at(tmp_path / "cache"))
    off, _, _ = train(config, 8, None)
    build_index(list_files(sources[0].shards), str(tmp_path / "a" / "shards" / "_index"))
    filling, position, _ = train(config, 5, moments, ranks=2)
    rest, _, _ = train(config, 3, moments, position=position)
    assert same(filling + rest, off)
    full, _, counts = train(config, 8, moments)
    assert same(full, off)
    assert counts["cache_missed"] == 0


@pytest.mark.parametrize("order", ["streamed", "learned"])
def test_fields_that_an_index_keeps_otherwise_than_windows_change_nothing(
    tmp_path: Path, write_tar, tiny_picture, order: str
) -> None:
    """Texts of which few come in a window and many in a shard, sizes before storing, and no json at all."""
    members = []
    for i in range(40):
        record = {"note": f"note {i}", "original_width": 40 + i, "original_height": 32}
        members += [(f"{i:03d}.jpg", tiny_picture(i)), (f"{i:03d}.txt", b"text")]
        members += [(f"{i:03d}.json", json.dumps(record).encode())] if i % 5 else []
    write_tar(tmp_path / "shards" / "00000.tar", members)
    chosen = "missing(note) or not (note in ('note 3', 'note 7', 'note 21'))"
    config = in_order(config_for(tmp_path / "shards", filter=chosen, captions=("note", "txt")), order)
    moments = Moments(0, cache_at(tmp_path / "cache"))
    off, _, _ = train(config, 4, None)
    assert len({tuple(size) for *_, sizes, _ in off for size in sizes}) > 20
    for missed in (True, False):
        on, _, counts = train(config, 4, moments)
        assert same(on, off)
        assert bool(counts["cache_missed"]) is missed


@pytest.mark.parametrize("order", ["streamed", "learned"])
def test_little_room_changes_nothing_of_what_is_served(tmp_path: Path, write_shards, order: str) -> None:
    """Windows for which data.buffer_bytes has no room, of which some samples are in the cache."""
    write_shards(tmp_path / "shards", [24, 30])
    config = in_order(replace(config_for(tmp_path / "shards"), filter="score < 0.85"), order)
    moments = Moments(0, cache_at(tmp_path / "cache"))
    off, _, _ = train(config, 8, None)
    train(config, 2, moments)
    for buffer_bytes in (1, 3_000, 20_000):
        on, _, counts = train(replace(config, buffer_bytes=buffer_bytes), 8, moments)
        assert same(on, off)
        assert counts["cache_found"] > 0


def test_storage_that_fails_does_not_end_anything(tmp_path: Path, write_shards, caplog) -> None:
    """The cache's folder cannot be written and not be read; pictures are encoded live."""
    write_shards(tmp_path / "shards", [24])
    config = config_for(tmp_path / "shards")
    (tmp_path / "file").write_text("no folder")
    off, _, _ = train(config, 2, None)
    on, _, counts = train(config, 2, Moments(0, cache_at(tmp_path / "file")))
    assert same(on, off)
    assert counts["failed"] == 24
    assert caplog.text.count("cannot be written") == 1


def test_a_part_that_cannot_be_written_is_not_half_there(tmp_path: Path) -> None:
    (tmp_path / "parts").write_text("no folder")
    with pytest.raises(UserError, match="cannot be written"):
        commit_part(str(tmp_path), [])


@pytest.mark.parametrize("patient", [True, False], ids=["encoder", "training"])
def test_what_is_not_stored_at_the_end_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, patient: bool
) -> None:
    """An encoder waits until storage has been tried; training, which does not, counts what is under way."""
    begun, answered = threading.Event(), threading.Event()

    def slow(folder: str, entries: object) -> None:
        begun.set()
        answered.wait(0.5 if patient else 30.0)
        raise Unreachable("storage is away.")

    monkeypatch.setattr(moments_writer, "commit_part", slow)
    monkeypatch.setattr(moments_writer, "_END_S", 0.1)
    writer = MomentsWriter(cache_at(tmp_path), part_bytes=1, patient=patient)
    for sample in range(3):
        label = Label(f"{sample:032x}", "s", str(sample), 0, ())
        writer.put([label], lambda: np.zeros((1, 8, 4, 4), np.int16), 256)
        begun.wait(10.0)  # the first is under way, the others wait
    writer.close()
    assert (writer.counts["failed"], writer.counts["written"]) == (3, 0)
    assert caplog.text.count("3 samples are not stored at its end") == (not patient)
    answered.set()
