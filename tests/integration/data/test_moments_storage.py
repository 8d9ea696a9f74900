"""The cache of moments on a real S3 server that misbehaves, and filled by a process that is killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.moments.parts import STAGE, taken_bytes
from data_pipeline.storage.files import write_bytes
from data_pipeline.storage.local_s3 import LocalS3
from data_pipeline.tools.purge import purge
from data_pipeline.tools.scenes.scene import SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from tests.integration.data.fault_proxy import FaultProxy
from tests.integration.data.moments_filler import cache_at, config_for, same, train

SAMPLES = 192


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Buckets of the server: shards, and an empty one for the cache."""
    root = tmp_path_factory.mktemp("buckets")
    options = SynthesisOptions(
        SAMPLES, failed_share=0.0, samples_per_shard=64, scene=SceneOptions(1, 1, 40, 56)
    )
    list(synthesize(str(root / "scenes"), options))
    (root / "kept").mkdir()
    return root


@pytest.mark.parametrize("order", ["indexed", "streamed"])
def test_faults_of_storage_change_nothing(folder: Path, server: FaultProxy, order: str) -> None:
    """Filling and reading through resets, short and stalled bodies and 503s, with processes and without."""
    off, _ = train(config_for(str(folder / "scenes" / "*.tar"), order=order), None)
    server.faults = {"short": 0.03, "storm": 0.05, "reset": 0.03}
    config, cache = config_for("s3://scenes/*.tar", order=order), cache_at(f"s3://kept/{order}")
    filling, counts = train(replace(config, workers=2), cache)
    assert same(filling, off)
    assert counts["written"] > 0
    full, counts = train(config, cache)
    assert same(full, off)
    assert counts["cache_found"] > 0
    assert sum(server.counts[fault] for fault in server.faults) > 5


def test_orders_share_a_cache_by_the_etags_of_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run without an index has stored is found by one with it, and by one that has learned."""
    with LocalS3(folder, etags=True) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        streamed = config_for("s3://scenes/*.tar", order="streamed", lanes=1)
        cache = cache_at("s3://kept/shared")
        first, counts = train(streamed, cache)
        distinct = {key for keys, _ in first for key in keys}
        assert (len(distinct), counts["written"]) == (SAMPLES, SAMPLES)
        for config in (config_for("s3://scenes/*.tar"), streamed):  # the first leaves a whole index
            _, counts = train(config, cache)
            assert (counts["cache_found"], counts["cache_missed"]) == (SAMPLES, 0)
            assert counts["bytes"] < 0.5 * sum(f.stat().st_size for f in (folder / "scenes").glob("*.tar"))


def test_purging_and_measuring_on_s3(folder: Path, server: FaultProxy, tmp_path: Path) -> None:
    """What is removed is encoded again by a run that has no list, and nothing else is."""
    config, cache = config_for("s3://scenes/*.tar"), cache_at("s3://kept/b/stage")
    first, _ = train(config, cache)
    write_bytes(f"s3://kept/b/stage/{STAGE}", b"{}")
    held = sum(part.stat().st_size for part in (folder / "kept" / "b").rglob("*.tar"))
    assert taken_bytes("s3://kept/b") == held > 0
    (tmp_path / "list.txt").write_text("\n".join(first[0][0][:3]))
    server.faults = {"storm": 0.05, "reset": 0.03}
    found = purge("s3://kept/b", [str(tmp_path / "list.txt")])
    assert (found.entries, found.removed, found.unknown, found.unfinished) == (SAMPLES, 3, 0, 0)
    server.faults = {}  # under them a look-up may give up, and its pictures are encoded anew as well
    again, counts = train(config, cache)
    assert same(again, first)
    assert counts["cache_missed"] == counts["written"] == 3


@pytest.mark.parametrize("order", ["indexed", "streamed"])
def test_a_process_that_is_killed_leaves_whole_parts(folder: Path, tmp_path: Path, order: str) -> None:
    """Without an index it is in the midst of shards that nobody knows yet, and has left what it learned."""
    shutil.copytree(folder / "scenes", tmp_path / "scenes", ignore=shutil.ignore_patterns("_index"))
    config = config_for(str(tmp_path / "scenes" / "*.tar"), order=order)
    cache = cache_at(str(tmp_path / "cache"))
    off, _ = train(replace(config, index=str(tmp_path / "index")), None)
    script = Path(__file__).with_name("moments_filler.py")
    filler = subprocess.Popen(
        [sys.executable, str(script), config.shards, cache.folder, order],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    deadline = time.monotonic() + 90
    while len(list(Path(cache.folder).glob("shards/*/*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    filler.kill()
    filler.wait()
    again, counts = train(config, cache)
    assert same(again, off)
    assert counts["cache_found"] > 0
    full, counts = train(config, cache)
    assert same(full, off)
    assert (counts["cache_missed"], counts["cache_damaged"]) == (0, 0)
