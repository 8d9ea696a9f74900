"""What is held out by data.validation is never trained on, is measured, and is the same whatever reads it."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.config import DataConfig, HeldOutConfig, SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.loader import HeldOut, Part, build_loader, held_out_batches, open_dataset, open_held_out
from data_pipeline.shards.split import is_held_out
from trainer.__main__ import main

COUNTS = [17, 9, 25]
SHARE = 0.3
ALL = 10_000
BROKEN = next(f"main2{i:03d}" for i in range(25) if is_held_out(f"main2{i:03d}", SHARE))


@pytest.fixture(scope="module", name="sets")
def sets_fixture(tmp_path_factory: Any, write_tar: Any, tiny_picture: Any) -> Path:
    """Two sources of shards; pictures of three aspects, one of them broken, scores in their json."""
    folder: Path = tmp_path_factory.mktemp("sets")
    for source, counts in (("main", COUNTS), ("rare", [13])):
        for shard, count in enumerate(counts):
            members = []
            for i in range(count):
                key = f"{source}{shard}{i:03d}"
                picture = tiny_picture(i, size=((20, 16), (16, 20), (18, 18))[i % 3])
                members += [
                    (f"{key}.jpg", b"no picture" if key == BROKEN else picture),
                    (f"{key}.json", json.dumps({"score": i % 10 / 10}).encode()),
                    (f"{key}.txt", f"caption {key}".encode()),
                ]
            write_tar(folder / source / f"{shard:05d}.tar", members)
    return folder


def names(sets: Path) -> set[str]:
    """Keys of all samples."""
    main_keys = {f"main{shard}{i:03d}" for shard, count in enumerate(COUNTS) for i in range(count)}
    return main_keys | {f"rare0{i:03d}" for i in range(13)}


def key_of(name: str) -> str:
    return name.rpartition("/")[2]


def configured(sets: Path, **changes: Any) -> DataConfig:
    base = DataConfig(
        shards=str(sets / "main" / "*.tar"),
        image_size=16,
        workers=0,
        shuffle_window=5,
        validation=HeldOutConfig(share=SHARE),
    )
    return dataclasses.replace(base, **changes)


def mixture(sets: Path) -> tuple[SourceConfig, ...]:
    return (
        SourceConfig(str(sets / "main" / "*.tar")),
        SourceConfig(str(sets / "rare" / "*.tar"), repeat=3),
    )


def trained_on(config: DataConfig, *, seed: int, ranks: int, steps: int) -> list[str]:
    loaders = [
        build_loader(config, seed=seed, global_batch_size=12, part=Part(rank, ranks)) for rank in range(ranks)
    ]
    keys = []
    for _ in range(steps):
        for loader in loaders:
            keys += map(key_of, next(loader).keys)
    for loader in loaders:
        loader.close()
    return keys


def measured(held: HeldOut, size: int = 4) -> dict[str, tuple[int, str, bytes]]:
    """(ordinal, caption, pixels) by key."""
    found = {}
    for made in held_out_batches(held, held.batches(size)):
        for row, sample in enumerate(made.samples):
            if sample >= 0:
                assert key_of(made.batch.keys[row]) not in found, "measured twice"
                pixels = made.batch.pixels[row].contiguous().numpy().tobytes()
                ordinal = int(made.batch.ordinals[row])
                found[key_of(made.batch.keys[row])] = (ordinal, made.batch.captions[row], pixels)
    return found


def held(config: DataConfig, samples: int = ALL) -> HeldOut:
    return open_held_out(config, samples, seed=0, global_batch_size=12, dataset=open_dataset(config))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mixed=st.booleans(),
    bucketed=st.booleans(),
    filtered=st.sampled_from(["", "score < 0.75", "score >= 0.2 and score < 0.9"]),
    removed=st.integers(0, 3),
    share=st.sampled_from([0.1, 0.3, 0.5]),
    seed=st.integers(0, 5),
    ranks=st.sampled_from([1, 2, 3]),
)
def test_the_parts_are_disjoint_and_together_all(
    sets: Path,
    tmp_path: Path,
    mixed: bool,
    bucketed: bool,
    filtered: str,
    removed: int,
    share: float,
    seed: int,
    ranks: int,
) -> None:
    everything = sorted(name for name in names(sets) if mixed or name.startswith("main"))
    gone = set(everything[:: len(everything) // 3][:removed])
    listed = tmp_path / "gone.txt"
    listed.write_text("\n".join([*gone, "nobody"]))
    config = configured(
        sets,
        **({"shards": "", "sources": mixture(sets)} if mixed else {}),
        buckets=bucketed,
        bucket_step=4,
        bucket_max_aspect=1.5,
        filter=filtered,
        removal_lists=(str(listed),),
        validation=HeldOutConfig(share=share),
    )
    whole = dataclasses.replace(config, validation=HeldOutConfig())
    steps = 4 * -(-len(everything) * (3 if mixed else 1) // 12)  # several epochs
    before = set(trained_on(whole, seed=seed, ranks=1, steps=steps))
    trained = set(trained_on(config, seed=seed, ranks=ranks, steps=steps))
    others = set(measured(held(config)))
    assert not trained & others
    assert trained | others == before
    assert others == {name for name in before if is_held_out(name, share)}
    assert not gone & (trained | others)


@pytest.mark.parametrize("removed", [False, True])
def test_resampled_order_leaves_the_same_samples_out(sets: Path, tmp_path: Path, removed: bool) -> None:
    config = configured(sets, order="resampled", workers=1)
    if removed:
        (tmp_path / "gone").write_text("main0003")
        config = dataclasses.replace(config, removal_lists=(str(tmp_path / "gone"),))
    with build_loader(config, seed=1, global_batch_size=8) as loader:
        trained = {key_of(key) for _ in range(40) for key in next(loader).keys}
        assert loader.rejected["held_out"]
        assert loader.tally.served_share > 0.9  # held out is no loss
    others = set(measured(open_held_out(config, ALL, seed=0, global_batch_size=12)))
    assert others == set(measured(held(dataclasses.replace(config, order="indexed"))))
    assert others
    assert not trained & others


def test_batches_of_any_size_have_the_same_samples(sets: Path) -> None:
    found = held(configured(sets, buckets=True, bucket_step=4, bucket_max_aspect=1.5))
    assert measured(found, 1) == measured(found, 4) == measured(found, 7)
    assert {len(rows) for rows in found.batches(7)} == {7}


def test_nothing_of_a_run_changes_what_is_read(sets: Path) -> None:
    """Crop, flip, seed of the order, lanes: the pictures, captions and ordinals stay."""
    plain = measured(held(configured(sets)))
    other = configured(sets, crop="random", horizontal_flip=True, lanes=3, shuffle_window=2)
    assert measured(held(other)) == plain
    mixed = measured(held(configured(sets, shards="", sources=mixture(sets))))
    assert {key: value for key, value in mixed.items() if key.startswith("main")} == plain


def test_a_number_of_samples_is_the_same_choice_each_time(sets: Path) -> None:
    config = configured(sets, shards="", sources=mixture(sets))
    six, all_of_them = held(config, 6), held(config)
    assert len(six) == 6
    assert {s.key for s in six.samples} < {s.key for s in all_of_them.samples}
    assert six.samples == held(config, 6).samples
    assert {s.key.partition("/")[0]: s.weight for s in all_of_them.samples}["rare"] == 3


def test_an_undecodable_sample_is_counted_and_not_measured(sets: Path) -> None:
    found = held(configured(sets))
    rejected = Counter[str]()
    for made in held_out_batches(found, found.batches(4)):
        rejected += made.rejected
    assert rejected == {"not_an_image": 1}
    assert set(measured(found)) == {key_of(s.key) for s in found.samples} - {BROKEN}


def test_shards_of_their_own_are_measured_whole(sets: Path, tmp_path: Path) -> None:
    own = HeldOutConfig(shards=str(sets / "rare" / "*.tar"))
    config = configured(sets, validation=own, filter="score < 0.45")
    kept = {f"rare0{i:03d}" for i in range(13) if i % 10 < 5}
    assert set(measured(held(config))) == kept
    trained = {name for name in names(sets) if name.startswith("main") and int(name[5:]) % 10 < 5}
    assert set(trained_on(config, seed=0, ranks=1, steps=20)) == trained - {BROKEN}
    (tmp_path / "gone").write_text("rare0001")
    gone = dataclasses.replace(config, removal_lists=(str(tmp_path / "gone"),))
    assert set(measured(held(gone))) == kept - {"rare0001"}
    everything = dataclasses.replace(own, filter="")
    assert len(measured(held(dataclasses.replace(config, validation=everything)))) == 13


def test_streams_that_have_no_index_need_shards_of_their_own(sets: Path, tmp_path: Path) -> None:
    """Compressed tars can be trained on in resampled order: samples are left out of them, and not read."""
    for shard in (sets / "main").glob("*.tar"):
        (tmp_path / f"{shard.stem}.tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
    config = configured(sets, shards=str(tmp_path / "*.tar.gz"), order="resampled", workers=1)
    with build_loader(config, seed=1, global_batch_size=8) as loader:
        trained = {key_of(key) for _ in range(40) for key in next(loader).keys}
    assert not any(is_held_out(key, SHARE) for key in trained)
    with pytest.raises(
        DataError, match=r"whatever data\.order is; name plain tars by data\.validation\.shards"
    ):
        open_held_out(config, 4, seed=0, global_batch_size=12)
    own = dataclasses.replace(config, validation=HeldOutConfig(shards=str(sets / "rare" / "*.tar")))
    assert len(open_held_out(own, 4, seed=0, global_batch_size=12)) == 4


@pytest.mark.parametrize("order", ["indexed", "streamed"])
def test_a_large_set_without_an_index_says_what_wants_one(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """Training starts at once on it; whoever asks for a share to be held out is told why that does not."""
    monkeypatch.setattr("data_pipeline.shards.opening._SMALL", 1)
    for shard in (sets / "main").glob("*.tar"):
        shutil.copy(shard, tmp_path)
    shards = f"{tmp_path}/{{00000..{len(COUNTS) - 1:05d}}}.tar"
    config = configured(sets, shards=shards, order=order)
    dataset = open_dataset(config, at_once=True)
    with pytest.raises(DataError, match=r"are chosen by an index.*run `ldm data index.*instead of data\.val"):
        open_held_out(config, 4, seed=0, global_batch_size=12, dataset=dataset)
    own = dataclasses.replace(config, validation=HeldOutConfig(shards=str(sets / "rare" / "*.tar")))
    assert len(open_held_out(own, 4, seed=0, global_batch_size=12, dataset=dataset)) == 4


@pytest.mark.parametrize("order", ["indexed", "resampled"])
def test_a_shard_on_both_sides_is_refused(sets: Path, order: str) -> None:
    own = HeldOutConfig(shards=str(sets / "main" / "00001.tar"))
    config = configured(sets, order=order, validation=own)
    dataset = open_dataset(config) if order == "indexed" else None
    with pytest.raises(DataError, match=r"00001\.tar is in data\.validation\.shards and among the training"):
        open_held_out(config, 4, seed=0, global_batch_size=12, dataset=dataset)


def test_a_share_that_holds_nothing_out_is_refused(sets: Path) -> None:
    config = configured(sets, validation=HeldOutConfig(share=1e-9))
    with pytest.raises(DataError, match=r"not_held_out .*; raise data\.validation\.share"):
        open_held_out(config, 4, seed=0, global_batch_size=12)


def test_inspect_and_explain_show_them(sets: Path, tmp_path: Path, capsys: Any) -> None:
    url, config = str(sets / "main" / "*.tar"), configured(sets)
    expected = sorted(s.key for s in held(config).samples)
    everybody = sum(is_held_out(name, SHARE) for name in names(sets) if name.startswith("main"))
    assert main(["data", "inspect", url, "--sheet", str(tmp_path / "s.png"), "--held-out", str(SHARE)]) == 0
    assert f"held out          {everybody} of {sum(COUNTS)}" in capsys.readouterr().out
    overrides = [f"data.shards={url}", "data.image_size=16", f"data.validation.share={SHARE}"]
    overrides += ["global_batch_size=4", "micro_batch_size=4"]
    (tmp_path / "run.yaml").write_text("first_stage: {name: identity}\n")
    assert main(["data", "explain", str(tmp_path / "run.yaml"), *overrides, "--validation"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(line["key"] for line in lines) == expected
    assert main(["data", "explain", str(tmp_path / "run.yaml"), *overrides, "--step", "0"]) == 0
    served = {json.loads(line)["key"] for line in capsys.readouterr().out.splitlines()}
    assert not served & set(expected)


def test_the_ledger_has_them(sets: Path, tmp_path: Path) -> None:
    config = configured(sets, reject_file=str(tmp_path / "rejects.jsonl"))
    trained_on(config, seed=0, ranks=1, steps=5)
    lines = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    told = {key_of(line["key"]) for line in lines if line["reason"] == "held_out"}
    assert told == {key_of(s.key) for s in held(config).samples}


def test_ordinals_are_no_visit_of_training(sets: Path) -> None:
    ordinals = [sample.ordinal for sample in held(configured(sets)).samples]
    assert len(set(ordinals)) == len(ordinals)
    assert min(ordinals) > 2**40
    assert torch.tensor(ordinals).dtype == torch.int64
