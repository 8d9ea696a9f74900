"""A measurement sees every picture once, however lanes and batches fall."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Set
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from trainer.__main__ import main
from trainer.config.models import FirstStageConfig
from trainer.console import progress_bar
from trainer.evaluation.pictures import pictures_once
from trainer.evaluation.survey import ReconstructionDistance
from trainer.first_stage.build import build_first_stage, first_stage_tensors
from trainer.weights import write_weights

EDGE = 16


def write_shards(folder: Path, counts: list[int], damaged: Set[int] = frozenset()) -> str:
    """Picture i of all is grey of 2 i; damaged ones are no pictures."""
    number = 0
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for _ in range(count):
                out = io.BytesIO()
                Image.fromarray(np.full((EDGE, EDGE, 3), 2 * number, np.uint8)).save(out, "PNG")
                data = b"no picture" if number in damaged else out.getvalue()
                member = tarfile.TarInfo(f"{number:04d}.png")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                number += 1
    return f"{folder}/*.tar"


def greys(shards: str, samples: int, batch_size: int) -> list[int]:
    data = DataConfig(shards=shards, image_size=EDGE)
    batches = list(pictures_once(data, samples, batch_size=batch_size, seed=0, purpose="a test"))
    assert max(map(len, batches)) <= batch_size
    return [int(value) for batch in batches for value in batch[:, 0, 0, 0]]


@pytest.mark.parametrize("batch_size", [1, 7, 32, 100])
@pytest.mark.parametrize("damaged", [set(), {0, 3, 4, 5, 49}])
def test_each_picture_once(tmp_path: Path, batch_size: int, damaged: set[int]) -> None:
    shards = write_shards(tmp_path, [17, 9, 25], damaged)
    everything = {2 * i for i in range(51) if i not in damaged}
    assert Counter(greys(shards, 200, batch_size)) == Counter(everything)
    some = greys(shards, 20, batch_size)
    assert len(some) == len(set(some)) == 20


def test_without_a_progress_bar_there_are_as_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = partial(progress_bar, disable=True)  # as TQDM_DISABLE=1
    monkeypatch.setattr("trainer.evaluation.pictures.progress_bar", without)
    assert len(greys(write_shards(tmp_path, [17, 9]), 10, 4)) == 10


def test_shards_without_pictures_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        greys(write_shards(tmp_path, [0]), 5, 4)


def test_the_command_counts_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_shards(tmp_path, [40, 5])
    module = build_first_stage(
        FirstStageConfig(base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1)
    )
    module.set_latent_statistics(torch.zeros(4), torch.ones(4))
    weights, out = str(tmp_path / "first_stage.safetensors"), tmp_path / "figures.json"
    write_weights(weights, *first_stage_tensors(module))
    command = ["evaluate", "reconstruction", weights, "--shards", shards, "--out", str(out)]
    command += ["--perceptual-weights", "none", "--image-size"]
    assert main([*command, "16", "--samples", "60"]) == 0
    assert json.loads(out.read_text())["pictures"] == 45
    assert "hold no more than 45 pictures" in capsys.readouterr().err
    assert main([*command, "16", "--samples", "33"]) == 0
    assert json.loads(out.read_text())["pictures"] == 33
    assert "rfd_random" not in json.loads(out.read_text())
    for refused, sentence in (
        (["16", "--features", "incepton"], "there are no features incepton"),
        (["8"], "--image-size 8 must be at least 16"),
        (["17"], "a multiple of 2"),
        (["16", "--samples", "0"], "--samples 0 measures nothing"),
    ):
        assert main([*command, *refused]) == 2
        assert sentence in capsys.readouterr().err


def test_the_distance_of_reconstructions_is_that_of_two_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path, [40])
    module = build_first_stage(
        FirstStageConfig(base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1)
    )
    module.set_latent_statistics(torch.zeros(4), torch.ones(4))
    weights, out = str(tmp_path / "first_stage.safetensors"), tmp_path / "figures.json"
    write_weights(weights, *first_stage_tensors(module))
    see = ReconstructionDistance.see

    def stored(self: ReconstructionDistance, pictures: Tensor, made: Tensor) -> None:
        for name, batch in (("real", pictures), ("made", made)):
            (tmp_path / name).mkdir(exist_ok=True)
            for picture in batch.permute(0, 2, 3, 1).cpu().numpy():
                number = len(list((tmp_path / name).iterdir()))
                Image.fromarray(picture).save(tmp_path / name / f"{number:05d}.png")
        see(self, pictures, made)

    monkeypatch.setattr(ReconstructionDistance, "see", stored)
    measured = ["--features", "random", "--out", str(out)]
    command = ["evaluate", "reconstruction", weights, "--shards", shards, "--perceptual-weights", "none"]
    assert main([*command, "--image-size", "16", "--samples", "40", *measured]) == 0
    found = json.loads(out.read_text())
    assert found["feature_networks"]["random"][0].startswith("random-64")
    folders = [str(tmp_path / "made"), "--reference", str(tmp_path / "real")]
    assert main(["evaluate", "fidelity", *folders, "--metrics", "fid", *measured]) == 0
    figures = json.loads(out.read_text())["figures"]
    assert found["rfd_random"] == pytest.approx(figures["fd_random"], rel=1e-6)
    assert found["rfd_random"] > 0
