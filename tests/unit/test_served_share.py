"""What share of the samples a run is trained on: told, and too small a one ends it with exit code 2."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.unit.one_rank import Train, one_rank
from trainer.config.io import load_config
from trainer.distributed.env import DistributedEnv, initialise, shutdown
from trainer.doctor.check import Check
from trainer.doctor.inputs import check_samples, check_shards
from trainer.exit_codes import ExitCode

TINY = (
    *("data.image_size=16", "data.workers=0", "steps=2", "global_batch_size=8", "micro_batch_size=8"),
    "first_stage.name=identity",
    "unet={model_channels: 16, channel_multipliers: [1, 2], num_res_blocks: 1, attention_factors: [2]}",
    *("unet.head_dim=16", "unet.num_groups=4", "unet.attention=plain"),
    "logging={every: 1, wandb: disabled, progress_bar: false}",
    "distributed={engine: torch, zero_stage: 0, precision: fp32, doctor: false, watchdog_s: 0}",
    "checkpoint.asynchronous=false",
)


def write_shard(path: Path, samples: int, captioned: Callable[[int], bool], *, first: int = 0) -> None:
    """A tar of 16 px pictures whose scores are their last digit, a tenth of it."""
    out = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(out, "PNG")
    with tarfile.open(path, "w") as tar:
        for i in range(first, first + samples):
            record = json.dumps({"score": i % 10 / 10}).encode()
            members = [("png", out.getvalue()), ("json", record)] + ([("txt", b"x")] if captioned(i) else [])
            for extension, body in members:
                info = tarfile.TarInfo(f"{i:05d}.{extension}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    return one_rank(monkeypatch, tmp_path, settings(tmp_path))


def settings(folder: Path) -> list[str]:
    return [*TINY, f"run_dir={folder}/run", f"data.shards={folder}/*.tar"]


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


def doctor(folder: Path, *overrides: str) -> Check:
    env = DistributedEnv.detect({})
    initialise(env, 60.0)
    try:
        (check,) = check_samples(load_config(None, [*settings(folder), *overrides]), env)
    finally:
        shutdown()
    return check


def test_too_many_rejections_end_the_run_with_their_reasons(train: Train, tmp_path: Path, caplog) -> None:
    """75 of 1500 samples are left: the first step already has seen more than a thousand."""
    write_shard(tmp_path / "0.tar", 1500, lambda i: i % 20 == 0)
    few = ("global_batch_size=64", "micro_batch_size=64", "data.lanes=8")
    assert train(*few, "steps=50") == ExitCode.USER_ERROR
    *_, error = errors(caplog)
    assert re.search(r"samples \([45]\.\d %\) are served; rejected: no_caption \(\d", error)
    assert "data.max_rejected_share=0.5" in error
    caplog.clear()
    caplog.set_level("INFO")
    assert train(*few, "data.max_rejected_share=0.96") == ExitCode.DONE
    assert any(") are served; rejected: no_caption (" in r.getMessage() for r in caplog.records)
    records = [json.loads(line) for line in (tmp_path / "run/logs/metrics.jsonl").read_text().splitlines()]
    shares = [record["served_share"] for record in records if "served_share" in record]
    assert len(shares) == 2
    assert all(0.04 < share < 0.06 for share in shares)


def test_a_filter_that_keeps_little_counts_too_and_few_samples_are_not_judged(
    train: Train, tmp_path: Path, caplog
) -> None:
    write_shard(tmp_path / "0.tar", 120, lambda i: True)
    assert train("data.filter=score < 0.25") == ExitCode.DONE  # 2 steps of 8: about 50 were seen
    assert train("data.filter=score < 0.25", "steps=60") == ExitCode.USER_ERROR
    *_, error = errors(caplog)
    assert re.search(r"samples \((2\d|30)\.\d %\) are served; rejected: filter: score < 0.25 \(7", error)


def test_the_doctor_says_the_same_before(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", 400, lambda i: i % 4 == 0)
    check = doctor(tmp_path)
    assert (check.name, check.passed) == ("samples", False)
    assert re.search(r"samples \(2[4-9]\.\d %\) are served; rejected: no_caption \(\d", check.detail)
    assert "data.max_rejected_share" in check.remedy
    # not one of 400 may be rejected: all are looked at
    all_served = ("data.require_caption=false", "data.max_rejected_share=0")
    check = doctor(tmp_path, *all_served)
    assert (check.passed, check.detail) == (True, "400 of 400 samples (100.0 %) are served")
    # without an index nobody knows that there are no more
    check = doctor(tmp_path, *all_served, "data.order=streamed")
    assert (check.passed, check.detail) == (True, "1,000 of 1,000 samples (100.0 %) are served")
    check = doctor(tmp_path, "data.filter=scor < 1")
    assert not check.passed
    assert "the nearest is score" in check.detail


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ((), "256 of 256"),
        (("data.max_rejected_share=0",), "400 of 400"),
        (("data.shards=", "data.sources=[{{shards: '{folder}/*.tar', weight: 1}}]"), "400 of 400"),
    ],
    ids=["clear", "in doubt", "a mixture, whose sources may be rare"],
)
def test_the_doctor_reads_no_more_samples_than_its_verdict_takes(
    tmp_path: Path, settings: tuple[str, ...], told: str
) -> None:
    write_shard(tmp_path / "0.tar", 400, lambda i: True)
    check = doctor(tmp_path, "data.lanes=8", *(each.format(folder=tmp_path) for each in settings))
    assert (check.passed, check.detail) == (True, f"{told} samples (100.0 %) are served")


def test_resampled_order_trains_on_what_cannot_be_indexed(train: Train, tmp_path: Path) -> None:
    """Compressed tars: no index is made, and the doctor reads them too."""
    write_shard(tmp_path / "0", 60, lambda i: True)
    (tmp_path / "0.tar").write_bytes(gzip.compress((tmp_path / "0").read_bytes()))
    assert train() == ExitCode.USER_ERROR
    resampled = "data.order=resampled"
    assert train(resampled) == ExitCode.DONE
    assert not list(tmp_path.rglob("_index/*.npz"))
    assert doctor(tmp_path, resampled).passed
    env = DistributedEnv.detect({})
    initialise(env, 60.0)
    try:
        (check,) = check_shards(load_config(None, [*settings(tmp_path), resampled]), env)
    finally:
        shutdown()
    assert check.passed, check.detail


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda path: write_shard(path, 30, lambda i: False), r"every sample was rejected: no_caption \(1,0"),
        (
            lambda path: path.write_bytes(b"<html></html>" * 99),
            r"0.tar: no tar archive .*data.max_bad_shards=0.01",
        ),
        (lambda path: write_shard(path, 0, lambda i: True), r"None of the 1 shards .* holds a sample"),
    ],
)
def test_resampled_order_says_what_is_wrong_instead_of_waiting(
    train: Train, tmp_path: Path, caplog, spoil: Callable[[Path], Any], told: str
) -> None:
    spoil(tmp_path / "0.tar")
    assert train("data.order=resampled") == ExitCode.USER_ERROR
    *_, error = errors(caplog)
    assert re.search(told, error), error
