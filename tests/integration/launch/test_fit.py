"""`ldm doctor --fit`: the search, and on a CPU whose memory is bounded the real thing."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.config.io import load_config
from trainer.config.run import Config, ConfigError
from trainer.exit_codes import ExitCode
from trainer.launch.fit import NoAnswer, Tried, find_largest, search

SMALL = (
    "data={shards: none.tar, image_size: 192}",
    "first_stage={name: kl, base_channels: 8, channel_multipliers: [1], num_res_blocks: 1, num_groups: 4}",
    "unet={model_channels: 32, channel_multipliers: [1, 1], num_res_blocks: 1, attention_factors: []}",
    "unet={num_groups: 4, head_dim: 8}",
    "distributed={ranks: 1, engine: torch, precision: fp32}",
    "global_batch_size=8",
    "micro_batch_size=1",
)

FIRST_STAGE = ("stage=autoencoder", "autoencoder_loss.perceptual_weights=nowhere.safetensors")


def small(*overrides: str) -> Config:
    return load_config(None, [*SMALL, *overrides])


@pytest.mark.parametrize("configured", [1, 2, 16, 64])
@pytest.mark.parametrize("room", [0, 1, 2, 5, 31, 32, 33, 63, 64, 1000])
def test_the_largest_is_found_and_no_size_is_tried_twice(configured: int, room: int) -> None:
    config = small("global_batch_size=128", f"micro_batch_size={configured}", "distributed.ranks=2")
    tried: list[int] = []

    def attempt(size: int) -> Tried:
        tried.append(size)
        return Tried(size <= room, size << 20, (room or 1) << 26, "cpu")

    assert search(config, 2, attempt) == min(room, 64)  # a rank has no more than 64 of 128
    assert tried[0] == configured
    assert len(set(tried)) == len(tried) < 14
    assert max(tried) <= 64


def test_what_a_larger_size_dies_of_is_taken_for_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    """A library has its own words for want of memory; what a run's first size dies of is its own mistake."""

    def attempt(size: int) -> Tried:
        if size > 3:
            raise NoAnswer(ExitCode.RETRYABLE, "Traceback\nRuntimeError: could not create a thing")
        return Tried(True, size << 20, 1 << 30, "cpu")

    assert search(small(), 1, attempt) == 3
    assert "4  does not fit: RuntimeError: could not create a thing" in capsys.readouterr().out
    with pytest.raises(NoAnswer):
        search(small("micro_batch_size=4"), 1, attempt)


@pytest.mark.slow
def test_a_cpu_with_little_memory_takes_fewer_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Its own process takes 1.1 GiB, and a fifth of one each sample.
    code = main(["doctor", "--fit", "--memory", "1.6", *written(tmp_path)])
    said = capsys.readouterr().out
    sizes = {int(n): fits for n, fits in re.findall(r"^ *(\d+)  (fits|does not fit)", said, re.MULTILINE)}
    found = re.search(r"largest micro-batch that fits: (\d+); micro_batch_size=(\d+)", said)
    assert found is not None, said
    most, best = int(found[1]), int(found[2])
    assert sizes[most] == "fits"
    assert sizes[most + 1] == "does not fit"
    assert best == -(-8 // -(-8 // most))
    assert "of 1.60 GiB of each rank, 1 x cpu" in said
    assert code == 0


def test_what_fails_for_another_reason_is_no_matter_of_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["doctor", "--fit", *written(tmp_path, *FIRST_STAGE)])
    said = capsys.readouterr().out
    assert "another reason than memory" in said
    assert "nowhere.safetensors" in said
    assert code == 2


def test_ranks_that_a_launcher_gave_are_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SLURM_PROCID", "0"), ("SLURM_STEP_ID", "0"), ("SLURM_STEP_NUM_TASKS", "8")):
        monkeypatch.setitem(os.environ, name, value)
    with pytest.raises(ConfigError, match=r"srun --nodes=1 --ntasks=1"):
        find_largest(small(), 0.0)


def test_memory_without_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--memory", "2", *written(tmp_path)]) == 2
    assert "add --fit" in capsys.readouterr().err


@pytest.mark.parametrize("memory", ["-1", "nan", "inf"])
def test_what_is_no_amount_of_memory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], memory: str
) -> None:
    assert main(["doctor", "--fit", f"--memory={memory}", *written(tmp_path)]) == 2
    assert "no amount of GiB" in capsys.readouterr().err


def written(folder: Path, *overrides: str) -> list[str]:
    file = folder / "empty.yaml"
    file.write_text("{}\n")
    return [str(file), *SMALL, f"run_dir={folder / 'run'}", *overrides]
