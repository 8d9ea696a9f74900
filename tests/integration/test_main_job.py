"""The main job on the real S3 server: both stages, resume, sampling, layouts, bad input."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.tools.scenes.scene import SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from trainer.__main__ import main
from trainer.weights import read_weights

FIRST_STAGE = [
    "stage=autoencoder",
    "steps=4",
    "first_stage={name: kl, base_channels: 8, channel_multipliers: [1, 2], num_res_blocks: 1, num_groups: 4}",
    "autoencoder_loss.perceptual_weights=random",
    "autoencoder_loss.discriminator_start=2",
    "autoencoder_loss.discriminator_channels=8",
    "autoencoder_loss.discriminator_layers=1",
    "optimizer.learning_rate=1e-4",
    "sampling.every=3",
    "conditioning={}",
]
ZERO_TOLERANCE = 2e-5
"""Relative difference of losses that another summation order may make within eight fp32 steps."""


def ldm(bucket: Any, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """One command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "trainer", *arguments],
        env={**os.environ, **bucket.environment, **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def first_stage(bucket: Any) -> tuple[Any, str]:
    """A trained and exported first stage, and its run."""
    # ZeRO-3 here, since every other first stage of these tests uses ZeRO-1.
    run = bucket.train_here("first_stage", *FIRST_STAGE, "distributed.zero_stage=3", "logging.wandb=offline")
    target = "s3://ldm/first_stage.safetensors"
    done = ldm(bucket, "export", run.url, target)
    assert done.returncode == 0, done.stderr
    return run, target


def test_first_stage_trains_logs_and_exports(
    bucket: Any, first_stage: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, target = first_stage
    records = [record for record in run.records() if "loss" in record]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(record["samples_seen"] == 8 * record["step"] for record in records)
    assert "discriminator" not in records[1]
    assert "discriminator" in records[2]  # two generator steps had been made
    assert {"images_per_s", "data_wait", "grad_norm", "learning_rate", "memory_gib"} <= records[3].keys()
    assert (run.folder / "config.yaml").exists()
    assert list((run.folder / "samples").glob("preview-00000003.png"))
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    tensors, metadata = read_weights(target)
    assert float(tensors["latent_scale"].min()) > 0
    assert not np.allclose(tensors["latent_scale"].numpy(), 1.0), "the scale was never measured"
    assert "config" in metadata


def test_second_stage_trains_resumes_and_samples(
    bucket: Any, first_stage: tuple[Any, str], tmp_path: Path
) -> None:
    own = [*FIRST_STAGE[2:3], f"first_stage.weights={first_stage[1]}", "sampling.steps=4"]
    run = bucket.train_here("second_stage", *own, "steps=4")
    assert run.steps() == [4, 0]
    again = bucket.train_here("second_stage", *own, "steps=6")
    assert again.steps() == [6, 4]
    assert [event["step"] for event in again.events("resume")] == [4]
    assert sorted(again.losses()) == [1, 2, 3, 4, 5, 6]
    out = tmp_path / "out"
    arguments = ["--prompt", "a red circle", "--prompt", "a blue square", "--out", str(out), "--seed", "5"]
    done = ldm(bucket, "sample", run.url, *arguments, "--sampler", "dpmpp_2m", "--steps", "3")
    assert done.returncode == 0, done.stderr
    assert np.asarray(Image.open(out / "pictures" / "00000.png")).shape == (16, 16, 3)
    assert (out / "pictures" / "00001.png").exists()
    assert (out / "grid.png").exists()
    whole = str(tmp_path / "whole.safetensors")
    done = ldm(bucket, "export", run.url, whole, "--layout", "compvis", "--weights", "weights")
    assert done.returncode == 0, done.stderr
    stored, average = read_weights(whole)[0], read_weights(exported_average(bucket, run.url, tmp_path))[0]
    first = "input_blocks.0.0.weight"
    kept = stored[f"model_ema.diffusion_model{first.replace('.', '')}"]
    assert (kept == average["unet.conv_in.weight"]).all()
    assert (kept != stored[f"model.diffusion_model.{first}"]).any()


def exported_average(bucket: Any, run: str, folder: Path) -> str:
    """The averaged weights of a run, as a file of ours."""
    target = str(folder / "average.safetensors")
    assert ldm(bucket, "export", run, target).returncode == 0
    return target


EIGHT_STEPS = ["steps=8", "checkpoint.every=0"]


@pytest.fixture(scope="module")
def one_rank(bucket: Any) -> dict[int, float]:
    """Losses of one rank that accumulates."""
    losses: dict[int, float] = bucket.train_here("one", *EIGHT_STEPS, "distributed.ranks=1").losses()
    return losses


@pytest.mark.parametrize(
    "engine",
    [
        "zero_stage=2",
        "engine=fsdp",
        *(pytest.param(f"zero_stage={stage}", marks=pytest.mark.slow) for stage in (0, 1, 3)),
    ],
)
def test_two_ranks_equal_one_with_accumulation(bucket: Any, one_rank: dict[int, float], engine: str) -> None:
    settings = [*EIGHT_STEPS, "distributed.ranks=2", f"distributed.{engine}"]
    one, two = one_rank, bucket.train_here(f"two_{engine}", *settings).losses()
    assert list(one) == list(two) == list(range(1, 9))
    np.testing.assert_allclose(list(one.values()), list(two.values()), rtol=ZERO_TOLERANCE)


@pytest.mark.slow
def test_bf16_follows_fp32(bucket: Any, one_rank: dict[int, float]) -> None:
    settings = [*EIGHT_STEPS, "distributed.ranks=1", "distributed.precision=bf16"]
    half = bucket.train_here("half", *settings).losses()
    np.testing.assert_allclose(list(one_rank.values()), list(half.values()), rtol=0.03)
    assert one_rank != half


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compile_survives_accumulation_and_resume(
    bucket: Any, one_rank: dict[int, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank accumulates four micro-batches; broken after step 4, the losses are the unbroken ones."""
    settings = ["distributed.ranks=1", "distributed.compile=true", "checkpoint.every=0"]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled = bucket.train_here("compiled", *settings, "steps=8").losses()
    assert any(tmp_path.rglob("*.so")), "nothing was compiled"
    bucket.train_here("compiled_broken", *settings, "steps=4")
    broken = bucket.train_here("compiled_broken", *settings, "steps=8")
    assert [event["step"] for event in broken.events("resume")] == [4]
    assert broken.losses() == compiled
    np.testing.assert_allclose(list(compiled.values()), list(one_rank.values()), rtol=ZERO_TOLERANCE)


def test_loss_falls_on_one_repeated_batch(bucket: Any, tmp_path: Path) -> None:
    options = SynthesisOptions(samples=8, failed_share=0.0, scene=SceneOptions(min_edge=24, max_edge=40))
    list(synthesize(str(tmp_path / "shards"), options))
    losses = bucket.train_here(
        "overfit",
        f"data.shards={tmp_path}/shards/*.tar",
        "steps=80",
        "distributed.ranks=1",
        "distributed.engine=torch",
        "optimizer.learning_rate=3e-3",
        "checkpoint.every=0",
    ).losses()
    values = [losses[step] for step in sorted(losses)]
    assert np.mean(values[-10:]) < 0.6 * np.mean(values[:10])


def test_another_architecture_is_refused_and_nothing_is_lost(bucket: Any, one_rank: Any) -> None:
    run = bucket.run("one")
    before = run.fingerprint()
    done = ldm(
        bucket, "train", str(bucket.config), f"run_dir={run.url}", "steps=9", "distributed.ranks=1",
        "unet.model_channels=32",
    )  # fmt: skip
    assert done.returncode == 2
    assert "Use its configuration, or another run_dir" in done.stderr
    assert "Traceback" not in done.stderr
    assert run.fingerprint() == before


def test_a_full_disk_ends_with_one_sentence(bucket: Any, tmp_path: Path) -> None:
    disk = tmp_path / "small"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root; run the tests as root to include this one")
    try:
        done = ldm(
            bucket, "train", str(bucket.config), f"run_dir={disk}/run", "steps=2", "distributed.ranks=1",
            "distributed.max_restarts=0",
        )  # fmt: skip
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    assert done.returncode == 2, done.stderr
    assert "No space left" in done.stderr or "full" in done.stderr


def _shard(folder: Path, members: dict[str, bytes]) -> str:
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return f"{folder}/*.tar"


@pytest.mark.parametrize(
    ("kind", "reason"), [("not an image", "image"), ("no caption", "caption"), ("not a tar", "tar")]
)
def test_shards_without_one_usable_sample(bucket: Any, tmp_path: Path, kind: str, reason: str) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "JPEG")
    image = b"these bytes are no picture" if kind == "not an image" else picture.getvalue()
    members = {f"{i:09d}.jpg": image for i in range(64)}
    if kind != "no caption":
        members |= {f"{i:09d}.txt": b"a caption" for i in range(64)}
    shards = _shard(tmp_path / "shards", dict(sorted(members.items())))
    if kind == "not a tar":
        (tmp_path / "shards" / "00000.tar").write_bytes(b"no tar at all" * 100)
    done = ldm(
        bucket, "train", str(bucket.config), f"run_dir={tmp_path}/run", f"data.shards={shards}",
        "distributed.ranks=1", "distributed.max_restarts=0",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["inspect", "s3://nowhere/shards"], {}, "nowhere"),
        (["inspect", "s3://ldm/shards"], {"AWS_SECRET_ACCESS_KEY": "wrong"}, "AWS_SECRET_ACCESS_KEY"),
        (["inspect", "s3://ldm/shards"], {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "127.0.0.1:9"),
        (["inspect", "s3://ldm/none/*.tar"], {}, "none"),
        (["inspect", "pipe:cat /etc/passwd"], {}, "pipe"),
    ],
)
def test_storage_mistakes_are_one_sentence(
    bucket: Any, arguments: list[str], environment: dict[str, str], expected: str
) -> None:
    done = ldm(bucket, "data", *arguments, **environment)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ldm: ")
    assert expected in last
    assert "Traceback" not in done.stderr
    assert bucket.server.env["AWS_SECRET_ACCESS_KEY"] not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "configs/demo_text_to_image.yaml", "sampling.sampler=ddimm"], "ddim"),
        (["train", "configs/demo_text_to_image.yaml", "unet.model_chanels=3"], "model_channels"),
        (["train", "configs/nothing.yaml"], "configs/nothing.yaml"),
        (["sample", "nowhere", "--prompt", "x"], "nowhere"),
        (["export", "nowhere", "x.safetensors"], "nowhere"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err


def test_unknown_sampler_of_the_sample_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["sample", "run", "--sampler", "best"])
    assert exit_info.value.code == 2
    assert "dpmpp_2m" in capsys.readouterr().err
