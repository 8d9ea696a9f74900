"""Saving and loading on one rank: exactness, damage, retention, mistakes."""

from __future__ import annotations

import argparse
import logging
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import UserError
from trainer.checkpoint.commands import find_checkpoint, list_checkpoints, verify
from trainer.cli import checkpoint as command
from trainer.config.run import ConfigError
from trainer.config.training import EMAConfig

from .conftest import MakeRun
from .small_run import SmallRun


def folder_of(run: SmallRun, step: int) -> Path:
    return Path(run.config.run_dir) / "checkpoints" / f"step_{step:09d}"


def shard_of(run: SmallRun, step: int) -> Path:
    return next(folder_of(run, step).glob("rank_*.safetensors"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_everything_comes_back_bit_for_bit(make_run: MakeRun, asynchronous: bool) -> None:
    run = make_run(asynchronous=asynchronous)
    run.train(3)
    run.save({"train": {"step": 3, "position": [1, 2]}})
    saved = run.everything()
    again = make_run(asynchronous=asynchronous, seed=1)
    handle = again.manager.latest_good()
    assert handle is not None
    loaded = again.manager.load(handle, {"unet": again.engine}, again.ema)
    assert loaded.step == 3
    assert loaded.state == {"train": {"step": 3, "position": [1, 2]}}
    assert loaded.tensors["latent_scale"].tolist() == [0.5] * 4
    assert all(torch.equal(a, b) for a, b in zip(saved, again.everything(), strict=True))
    assert again.engine.optimizer_steps == 3
    run.train(2)
    again.train(2)
    assert all(torch.equal(a, b) for a, b in zip(run.everything(), again.everything(), strict=True))


def test_training_goes_on_while_the_copy_is_written(make_run: MakeRun) -> None:
    run = make_run(asynchronous=True)
    run.train(2)
    saved = run.everything()
    run.begin_save()
    run.train(3)  # must not reach the copy
    run.manager.wait()
    again = make_run()
    handle = again.manager.latest_good()
    assert handle is not None
    again.manager.load(handle, {"unet": again.engine}, again.ema)
    assert all(torch.equal(a, b) for a, b in zip(saved, again.everything(), strict=True))


def test_no_checkpoint_is_none(make_run: MakeRun) -> None:
    assert make_run().manager.latest_good() is None


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def drop_manifest(path: Path) -> None:
    (path.parent / "manifest.json").unlink()


def tear_manifest(path: Path) -> None:
    truncate(path.parent / "manifest.json")


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, os.remove, drop_manifest, tear_manifest])
def test_damage_is_reported_and_the_previous_one_used(
    make_run: MakeRun, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run()
    run.train(1)
    run.save()
    first = run.everything()
    run.train(1)
    run.save()
    assert callable(damage)
    damage(shard_of(run, 2))
    again = make_run()
    with caplog.at_level(logging.WARNING):
        handle = again.manager.latest_good()
    assert handle is not None
    assert handle.step == 1
    assert "step_000000002 is not used" in caplog.text
    again.manager.load(handle, {"unet": again.engine}, again.ema)
    assert all(torch.equal(a, b) for a, b in zip(first, again.everything(), strict=True))
    assert [bool(row.problems) for row in verify(run.config.run_dir)] == [True, False]


def test_saving_again_over_a_damaged_checkpoint_heals_it(make_run: MakeRun) -> None:
    run = make_run()
    run.train(1)
    run.save()
    drop_manifest(shard_of(run, 1))
    again = make_run()
    assert again.manager.latest_good() is None
    again.train(1)
    again.save()
    assert not verify(run.config.run_dir)[0].problems
    assert len(list(folder_of(run, 1).iterdir())) == 4  # nothing of the first attempt is left


def test_retention(make_run: MakeRun) -> None:
    run = make_run(keep_last=2, keep_every=3)
    for _ in range(7):
        run.train(1)
        run.save()
    assert [row.step for row in list_checkpoints(run.config.run_dir)] == [7, 6, 3]
    assert all(row.complete for row in list_checkpoints(run.config.run_dir))


LOSSES = (None, 0.5, 0.2, math.nan, 0.3, 0.2, 0.9, 0.4)
"""By step; step 5 is as good as step 2, and newer."""


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("keep_best", "kept"), [(0, [7]), (1, [7, 5]), (3, [7, 5, 4, 2])])
def test_the_best_are_kept(make_run: MakeRun, asynchronous: bool, keep_best: int, kept: list[int]) -> None:
    run = make_run(asynchronous=asynchronous, keep_last=1, keep_best=keep_best)
    for loss in LOSSES:
        run.save(loss=loss)
        run.train(1)
    run.manager.close()  # older ones go after the report that a newer one is there
    rows = list_checkpoints(run.config.run_dir)
    assert [(row.step, row.loss) for row in rows] == [(step, LOSSES[step]) for step in kept]


def test_one_whose_loss_cannot_be_read_is_not_among_the_best(make_run: MakeRun) -> None:
    run = make_run(keep_last=1, keep_best=1)
    for loss in (0.1, 0.2):
        run.save(loss=loss)
        run.train(1)
    tear_manifest(shard_of(run, 0))
    run.save(loss=0.3)
    assert [row.step for row in list_checkpoints(run.config.run_dir)] == [2, 1]


def test_the_listing_shows_losses(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    run.save()
    run.train(1)
    run.save(loss=0.123456)
    command.run(argparse.Namespace(command="list", source=run.config.run_dir))
    newest, oldest = capsys.readouterr().out.splitlines()
    assert newest.split()[:3] == ["1", "loss", "0.1235"]
    assert oldest.split()[:3] == ["0", "loss", "-"]


def test_retention_clears_what_a_killed_save_left(make_run: MakeRun) -> None:
    run = make_run()
    run.train(1)
    run.save()
    shutil.copytree(folder_of(run, 1), folder_of(run, 0))
    (folder_of(run, 0) / "manifest.json").unlink()
    run.train(1)
    run.save()
    assert not folder_of(run, 0).exists()


def test_rows_and_lookup(make_run: MakeRun) -> None:
    run = make_run()
    run.train(1)
    run.save()
    run.train(1)
    run.save()
    drop_manifest(shard_of(run, 2))
    newest, oldest = list_checkpoints(run.config.run_dir)
    assert (newest.complete, oldest.complete) == (False, True)
    assert "never completed" in newest.problem
    assert (oldest.num_shards, oldest.networks, oldest.averages) == (1, ("unet",), ("decay", "power_0.1"))
    assert find_checkpoint(run.config.run_dir).step == 1
    assert find_checkpoint(str(folder_of(run, 1))).step == 1
    for source, step in ((run.config.run_dir, 2), (run.config.run_dir, 9), ("/nowhere/at/all", None)):
        with pytest.raises(ConfigError):
            find_checkpoint(source, step)


def test_another_architecture_is_named(make_run: MakeRun) -> None:
    run = make_run()
    run.train(1)
    run.save()
    other = make_run(width=5)
    handle = other.manager.latest_good()
    assert handle is not None
    before = other.everything()
    with pytest.raises(ConfigError, match=r"0\.weight is \(4, 3\) and should be \(5, 3\)"):
        other.manager.load(handle, {"unet": other.engine}, other.ema)
    with pytest.raises(ConfigError, match="no network 'discriminator'"):
        other.manager.load(handle, {"discriminator": other.engine}, other.ema)
    assert all(torch.equal(a, b) for a, b in zip(before, other.everything(), strict=True))


def test_an_average_that_is_new_starts_from_the_weights(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run()
    run.train(2)
    run.save()
    again = make_run(ema=EMAConfig(decay=0.9, power_stds=(0.2,)), seed=3)
    handle = again.manager.latest_good()
    assert handle is not None
    again.manager.load(handle, {"unet": again.engine}, again.ema)
    assert "power_0.2" in caplog.text
    for value, fragment in zip(again.ema.values("power_0.2"), again.ema.fragments, strict=True):
        assert torch.equal(value, fragment.master)
    for value, stored in zip(again.ema.values("decay"), run.ema.values("decay"), strict=True):
        assert torch.equal(value, stored)


def test_an_unwritable_folder_is_known_before_training(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        make_run(run_dir=str(tmp_path / "file" / "run"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_one_sentence_and_harms_nothing(make_run: MakeRun, asynchronous: bool) -> None:
    run = make_run(asynchronous=asynchronous)
    run.train(1)
    run.save()
    # /dev/full refuses every byte with ENOSPC, like a disk without room. The name says what it would hold.
    run.train(1)
    twin = make_run(run_dir=f"{run.config.run_dir}-twin")
    twin.train(2)
    twin.save()
    checksum = shard_of(twin, 2).name.split(".")[2]
    folder_of(run, 2).mkdir()
    attempt = f"{run.manager._session}{run.manager._attempts + 1:04x}"
    os.symlink("/dev/full", folder_of(run, 2) / f"rank_00000.{attempt}.{checksum}.safetensors.part")
    with pytest.raises(UserError, match="the disk is full"):
        run.save()
    again = make_run()
    handle = again.manager.latest_good()
    assert handle is not None
    assert handle.step == 1


def test_blocked_time_and_bytes_are_reported(make_run: MakeRun) -> None:
    run = make_run(asynchronous=True)
    run.train(1)
    run.save()
    report = run.manager.last_save
    assert report is not None
    elements = sum(fragment.master.numel() for fragment in run.engine.fragments())
    assert (report.step, report.num_bytes) == (1, 5 * 4 * elements)
    assert 0 <= report.waited_s <= report.blocked_s
