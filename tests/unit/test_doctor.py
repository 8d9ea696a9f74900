"""The doctor finds what is wrong and passes what is well, one process at a time."""

import dataclasses
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from trainer.config.models import FirstStageConfig, UNetConfig
from trainer.config.run import Config
from trainer.config.training import CheckpointConfig, DistributedConfig, EMAConfig
from trainer.distributed.build import build_engine
from trainer.distributed.engine import Engine
from trainer.distributed.env import DistributedEnv, initialise, shutdown
from trainer.doctor import examination
from trainer.doctor import gradients as doctor_gradients
from trainer.doctor import machine as doctor_machine
from trainer.doctor.check import Check
from trainer.doctor.examination import format_table, run_doctor
from trainer.doctor.gradients import check_gradients
from trainer.doctor.inputs import check_samples, check_shards, check_storage
from trainer.doctor.machine import (
    check_all_reduce,
    check_clocks,
    check_disk,
    check_memory,
    check_versions,
    plan,
)
from trainer.exit_codes import ExitCode


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    list(synthesize(str(folder), SynthesisOptions(samples=40, samples_per_shard=20)))
    return f"{folder}/*.tar"


@pytest.fixture
def env() -> Iterator[DistributedEnv]:
    env = DistributedEnv.detect({})
    initialise(env, 60.0)
    yield env
    shutdown()


def config(tmp_path: Path, shards: str = "", **changes: Any) -> Config:
    small = Config(
        run_dir=str(tmp_path / "run"),
        global_batch_size=8,
        micro_batch_size=4,
        data=DataConfig(shards=shards, image_size=32),
        first_stage=FirstStageConfig(name="identity", latent_channels=3),
        unet=UNetConfig(
            model_channels=32,
            channel_multipliers=(1, 2),
            num_res_blocks=1,
            head_dim=16,
            attention_factors=(2,),
        ),
        distributed=DistributedConfig(engine="torch", precision="fp32"),
    )
    return dataclasses.replace(small, **changes)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_healthy_setting_passes_every_check(
    tmp_path: Path, env: DistributedEnv, shards: str, precision: Any
) -> None:
    checks = run_doctor(
        config(tmp_path, shards, distributed=DistributedConfig(engine="torch", precision=precision)), env
    )
    assert [check for check in checks if not check.passed] == []
    names = {check.name for check in checks}
    assert {"versions", "clocks", "gradients", "storage", "shards", "memory", "disk"} <= names
    assert not list((tmp_path / "run").rglob("doctor*"))


class LosesAMicroBatch:
    """An engine that leaves the first micro-batch of every step out of its gradient."""

    def __init__(self, engine: Engine, accumulation: int) -> None:
        self._engine, self._accumulation, self._calls = engine, accumulation, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *args: Tensor) -> Any:
        return self._engine(*args)

    def backward(self, loss: Tensor) -> None:
        first = self._calls % self._accumulation == 0
        self._calls += 1
        self._engine.backward(loss * 0 if first else loss)


class Unscaled(LosesAMicroBatch):
    """An engine whose gradient is the sum over micro-batches instead of their mean."""

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self._accumulation)


@pytest.mark.parametrize("defect", [LosesAMicroBatch, Unscaled])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_wrong_gradients_are_found(
    tmp_path: Path,
    env: DistributedEnv,
    monkeypatch: pytest.MonkeyPatch,
    defect: type[LosesAMicroBatch],
    precision: Any,
) -> None:
    def broken(module: nn.Module, config: Config, env: DistributedEnv) -> LosesAMicroBatch:
        return defect(build_engine(module, config, env), config.accumulation(env.world_size))

    monkeypatch.setattr(doctor_gradients, "build_engine", broken)
    distributed = DistributedConfig(engine="torch", precision=precision)
    checks = check_gradients(config(tmp_path, distributed=distributed), env)
    assert [check.passed for check in checks] == [False, False]
    assert "zero_stage" in checks[0].remedy


def test_the_doctor_leaves_torchs_random_numbers_alone(tmp_path: Path, env: DistributedEnv) -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    check_gradients(config(tmp_path), env)
    assert torch.equal(torch.rand(3), wanted)


def test_storage_that_cannot_be_written_fails(tmp_path: Path, env: DistributedEnv) -> None:
    (tmp_path / "file").write_text("")
    (check,) = check_storage(config(tmp_path, run_dir=str(tmp_path / "file" / "run")), env)
    assert not check.passed
    assert "run_dir" in check.remedy


def test_a_shard_that_is_not_a_tar_fails(tmp_path: Path, env: DistributedEnv) -> None:
    (tmp_path / "00000.tar").write_bytes(b"not a tar" * 1000)
    (check,) = check_shards(config(tmp_path, str(tmp_path / "*.tar")), env)
    assert not check.passed
    assert "not a tar" in check.detail


def test_no_shards_fail_and_good_ones_are_counted(tmp_path: Path, env: DistributedEnv, shards: str) -> None:
    (check,) = check_shards(config(tmp_path, str(tmp_path / "*.tar")), env)
    assert not check.passed
    assert "No shard matches" in check.detail
    (check,) = check_shards(config(tmp_path, shards), env)
    assert check.passed
    assert "decoded 16 pictures" in check.detail


def test_samples_fail_for_want_of_the_captions_that_their_source_names(
    tmp_path: Path, env: DistributedEnv, shards: str
) -> None:
    """Of two sources one has no .txt, and says where its captions are."""
    source = next(Path(shards).parent.glob("*.tar"))
    with tarfile.open(source) as full, tarfile.open(tmp_path / "0.tar", "w") as bare:
        for member in full:
            if member.name.endswith(".jpg"):
                bare.addfile(member, full.extractfile(member))
                text = json.dumps({"recaption": member.name}).encode()
                info = tarfile.TarInfo(member.name.replace(".jpg", ".json"))
                info.size = len(text)
                bare.addfile(info, io.BytesIO(text))
    bad = config(tmp_path, str(tmp_path / "*.tar"))
    assert check_shards(bad, env)[0].passed
    (check,) = check_samples(bad, env)
    assert not check.passed
    assert "no_caption" in check.detail
    optional = dataclasses.replace(bad, data=dataclasses.replace(bad.data, require_caption=False))
    assert check_samples(optional, env)[0].passed
    sources = (
        SourceConfig(shards=shards),
        SourceConfig(shards=str(tmp_path / "*.tar"), captions=("recaption",)),
    )
    mixed = dataclasses.replace(bad, data=dataclasses.replace(bad.data, shards="", sources=sources))
    assert [check.passed for check in (*check_shards(mixed, env), *check_samples(mixed, env))] == [True, True]


def test_versions_that_differ_fail(
    tmp_path: Path, env: DistributedEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_ranks(facts: dict[str, str]) -> list[dict[str, str]]:
        return [facts, {**facts, "torch": "2.0.0"}]

    monkeypatch.setattr(doctor_machine.collectives, "all_gather_object", two_ranks)
    check = check_versions(config(tmp_path), env)[0]
    assert not check.passed
    assert "torch: 2.0.0, " in check.detail


def test_clocks_that_differ_fail(
    tmp_path: Path, env: DistributedEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_machine.collectives, "all_gather_object", lambda t: [t, t + 300.0])
    (check,) = check_clocks(config(tmp_path), env)
    assert not check.passed
    assert "300000" in check.detail


def test_one_rank_has_nothing_to_reduce(tmp_path: Path, env: DistributedEnv) -> None:
    (check,) = check_all_reduce(config(tmp_path), env)
    assert check.passed


def test_the_plan_divides_what_zero_divides(tmp_path: Path) -> None:
    def bytes_per_parameter(stage: Any, ranks: int, precision: Any = "bf16") -> float:
        distributed = DistributedConfig(zero_stage=stage, precision=precision, channels_last_kernels=False)
        needed = plan(config(tmp_path, distributed=distributed), ranks, ranks)
        assert needed.frozen == 0
        return needed.device_bytes / needed.trained_parameters

    # weights + gradients + (master + two moments) + one average
    assert bytes_per_parameter(0, 1) == pytest.approx(2 + 4 + 12 + 4, rel=1e-3)
    assert bytes_per_parameter(1, 4) == pytest.approx(2 + 4 + 12 / 4 + 4 / 4, rel=1e-3)
    assert bytes_per_parameter(2, 4) == pytest.approx(2 + 4 / 4 + 12 / 4 + 4 / 4, rel=1e-3)
    assert bytes_per_parameter(3, 4) == pytest.approx((2 + 4 + 12 + 4) / 4, rel=1e-3)


def test_the_plan_counts_what_a_checkpoint_holds(tmp_path: Path) -> None:
    ema = EMAConfig(power_stds=(0.05, 0.10))
    needed = plan(config(tmp_path, ema=ema), 2, 2)
    assert needed.checkpoint_bytes == needed.trained_parameters * 4 * (1 + 2 + 3)


def test_too_little_memory_or_disk_fails(
    tmp_path: Path, env: DistributedEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = config(tmp_path, checkpoint=CheckpointConfig(keep_last=3, keep_best=2))
    monkeypatch.setattr(doctor_machine, "available_host_bytes", lambda: 1_000_000)
    (memory,) = check_memory(small, env)
    assert not memory.passed
    assert "zero_stage" in memory.remedy
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    (disk,) = check_disk(small, env)
    assert not disk.passed
    assert "6 checkpoints" in disk.detail


def test_checkpoints_that_are_stored_need_no_room(
    tmp_path: Path, env: DistributedEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on, whose disk has room for the two that it has yet to write."""
    run = config(tmp_path)
    size = plan(run, 1, 1).checkpoint_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2.5 * size))
    (disk,) = check_disk(run, env)
    assert not disk.passed
    for step in (1, 2):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:09d}"
        folder.mkdir(parents=True)
        if step == 1:
            (folder / "manifest.json").touch()
    (disk,) = check_disk(run, env)
    assert disk.passed
    assert "3 checkpoints (1 there)" in disk.detail
    for step in range(3, 9):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:09d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0.5 * size))
    (disk,) = check_disk(run, env)
    assert not disk.passed  # the next is written before an old one goes


def test_the_table_shows_remedies_only_for_failures() -> None:
    table = format_table([Check("one", True, "fine", "never shown"), Check("two", False, "bad", "mend it")])
    assert "never shown" not in table
    assert "FAIL  bad" in table
    assert "-> mend it" in table
    assert table.endswith("1 of 2 checks passed")


def test_a_large_set_that_is_spelled_out_is_looked_up_and_not_listed(
    tmp_path: Path, env: DistributedEnv, shards: str
) -> None:
    """Of 1200 names a handful is asked for."""
    folder = tmp_path / "many"
    folder.mkdir()
    made = Path(shards).parent / "00000.tar"
    assert made.exists()
    for i in range(1200):
        (folder / f"{i:05d}.tar").symlink_to(made)
    (check,) = check_shards(config(tmp_path, f"{folder}/{{00000..01199}}.tar"), env)
    assert check.passed, check.detail
    assert check.detail.startswith("1200 shards; decoded")
    (folder / "00800.tar").unlink()
    (check,) = check_shards(config(tmp_path, f"{folder}/{{00000..01199}}.tar"), env)
    assert not check.passed
    assert "00800.tar does not exist" in check.detail


def test_what_only_some_machines_have_is_worth_another_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = DistributedEnv.detect({})
    for failed, code in (
        ([Check("clocks", False, "4 s", machine=True)], ExitCode.RETRYABLE),
        ([Check("clocks", False, "4 s", machine=True), Check("shards", False, "none")], ExitCode.USER_ERROR),
        ([Check("clocks", True, "0 s", machine=True)], ExitCode.DONE),
    ):
        monkeypatch.setattr(examination, "CHECKS", (lambda config, env, failed=failed: failed,))
        assert examination.diagnose(config(tmp_path), nodes) is code
