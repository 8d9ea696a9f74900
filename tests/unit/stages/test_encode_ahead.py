"""`ldm encode --ahead` beside a run: waits when far ahead, skips what the run has passed, loses nothing."""

from __future__ import annotations

import dataclasses
import itertools
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from data_pipeline.config import SourceConfig
from data_pipeline.loader import build_loader, open_dataset, position_near
from data_pipeline.moments.parts import read_table
from data_pipeline.tools.scenes.scene import SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from trainer.__main__ import main
from trainer.config.io import config_to_dict, load_config
from trainer.config.run import Config
from trainer.first_stage.build import build_first_stage, first_stage_tensors
from trainer.metrics.jsonl import JSONLWriter
from trainer.weights import write_weights

SAMPLES, N = 60, 4
FIRST_STAGE = "name: kl, base_channels: 8, channel_multipliers: [1, 2], num_res_blocks: 1, num_groups: 4"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run of 15 steps per epoch, whose folder is empty yet."""
    scene = SceneOptions(min_objects=1, max_objects=1, min_edge=16, max_edge=24)
    list(synthesize(str(tmp_path / "shards"), SynthesisOptions(SAMPLES, failed_share=0.0, scene=scene)))
    stage = build_first_stage(load_config(None, [f"first_stage={{{FIRST_STAGE}}}"]).first_stage)
    stage.set_latent_statistics(torch.zeros(4), torch.ones(4))
    weights = str(tmp_path / "first_stage.safetensors")
    write_weights(weights, *first_stage_tensors(stage))
    made = load_config(
        None,
        [
            f"run_dir={tmp_path / 'run'}",
            *(f"data.shards={tmp_path}/shards/*.tar", "data.image_size=16", "data.workers=0"),
            *("data.require_caption=false", f"global_batch_size={N}", "micro_batch_size=4", "steps=1000"),
            f"first_stage={{{FIRST_STAGE}, weights: {weights}, cache: {tmp_path / 'cache'}}}",
            "distributed={engine: torch, precision: fp32, channels_last: false}",
        ],
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config_to_dict(made)))
    return made


class Encoder:
    """`ldm encode` as a process."""

    def __init__(self, folder: Path, *words: str) -> None:
        self._log = folder / "encode.log"
        with self._log.open("w") as log:
            command = [sys.executable, "-m", "trainer", "encode", str(folder / "run.yaml"), *words]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def until(self, words: str) -> None:
        limit = time.monotonic() + 600
        while words not in self._log.read_text():
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < limit, self._log.read_text()
            time.sleep(0.05)


def stored(folder: Path) -> Counter[str]:
    """Samples in the cache, as often as they are there."""
    found: Counter[str] = Counter()
    for table in folder.glob("cache/*/parts/*.json"):
        for rows in read_table(str(table)).rows.values():
            found.update(row.sample for row in rows)
    return found


def keys(config: Config, steps: int) -> list[tuple[str, ...]]:
    """The names of the samples of each step of the run."""
    with build_loader(config.data, seed=config.seed, global_batch_size=N) as loader:
        batches = itertools.islice(loader, steps)
        return [tuple(key.rpartition("/")[2] for key in batch.keys) for batch in batches]


def test_parts_share_an_epoch_whose_last_batch_goes_into_the_next(config: Config, tmp_path: Path) -> None:
    """Nine batches of seven are 63 of 60 samples: none is of two parts, which might encode it at once."""
    scene = SceneOptions(min_objects=1, max_objects=1, min_edge=16, max_edge=24)
    # In several shards, so that a lane meets others' samples in its next epoch.
    list(
        synthesize(
            str(tmp_path / "several"),
            SynthesisOptions(SAMPLES, samples_per_shard=6, failed_share=0.0, scene=scene),
        )
    )
    found: Counter[str] = Counter()
    for rank in range(2):
        data = [f"data.shards={tmp_path}/several/*.tar", "global_batch_size=7"]
        cache = f"first_stage.cache={tmp_path}/{rank}/cache"
        words = [str(tmp_path / "run.yaml"), *data, cache, "--ranks", "2", "--rank", str(rank)]
        assert main(["encode", *words]) == 0
        found += stored(tmp_path / str(rank))
    assert (len(found), found.total()) == (SAMPLES, SAMPLES)


def test_it_keeps_in_front_of_the_run_and_loses_nothing_when_stopped(config: Config, tmp_path: Path) -> None:
    encoder = Encoder(tmp_path, "--ahead", "4")
    encoder.until("step 4: waiting, as the run is at step 0")
    record = {"step": 9, "samples_seen": 9 * N, "time": 1.0, "loss": 0.5}
    JSONLWriter(config.run_dir).write(record)
    encoder.until("step 4: the run is at step 9; going on at step 11")
    encoder.until("step 13: waiting, as the run is at step 9")
    encoder.process.send_signal(signal.SIGTERM)
    assert encoder.process.wait(600) == 75
    walked = keys(config, 15)
    assert stored(tmp_path) == Counter(itertools.chain.from_iterable([*walked[:4], *walked[11:13]]))
    # The same command without a run to follow: what is there is not encoded twice.
    assert main(["encode", str(tmp_path / "run.yaml")]) == 0
    assert stored(tmp_path) == Counter(itertools.chain.from_iterable(walked))


def test_it_begins_where_the_run_is_and_ends_with_it(config: Config, tmp_path: Path) -> None:
    """A real run, with the position of its checkpoint."""
    run = [f"run_dir={tmp_path / 'run'}", "conditioning={}", "sampling.every=0", "logging.wandb=disabled"]
    small = "unet={model_channels: 8, channel_multipliers: [1], num_res_blocks: 1, attention_factors: [], "
    small += "head_dim: 8, num_groups: 4, attention: plain}"
    settings = [*run, small, "checkpoint.every=6", "steps=6", "distributed.doctor=false"]
    uncached = "first_stage.cache=null"
    assert main(["train", str(tmp_path / "run.yaml"), *settings, uncached]) == 0
    assert main(["encode", str(tmp_path / "run.yaml"), "--ahead", "100", "steps=8"]) == 0
    walked = keys(config, 8)
    assert stored(tmp_path) == Counter(itertools.chain.from_iterable(walked[6:]))
    assert main(["encode", str(tmp_path / "run.yaml"), "--ahead", "100", "steps=6"]) == 0
    assert len(stored(tmp_path)) == 2 * N


def test_without_an_index_parts_encode_each_sample_once(config: Config, tmp_path: Path) -> None:
    """Lanes end the epoch at different steps; what is of the next is not encoded, whoever comes to it."""
    scene = SceneOptions(min_objects=1, max_objects=1, min_edge=16, max_edge=24)
    several = SynthesisOptions(SAMPLES, samples_per_shard=7, failed_share=0.0, scene=scene)
    list(synthesize(str(tmp_path / "several"), several))
    found: Counter[str] = Counter()
    for rank in range(2):
        data = [f"data.shards={tmp_path}/several/*.tar", "data.order=streamed"]
        cache = f"first_stage.cache={tmp_path}/{rank}/cache"
        words = [str(tmp_path / "run.yaml"), *data, cache, "--ranks", "2", "--rank", str(rank)]
        assert main(["encode", *words]) == 0
        found += stored(tmp_path / str(rank))
    assert (len(found), found.total()) == (SAMPLES, SAMPLES)


def test_without_an_index_it_begins_at_the_checkpoint_and_ends_with_the_run(
    config: Config, tmp_path: Path
) -> None:
    run = [f"run_dir={tmp_path / 'run'}", "conditioning={}", "sampling.every=0", "logging.wandb=disabled"]
    small = "unet={model_channels: 8, channel_multipliers: [1], num_res_blocks: 1, attention_factors: [], "
    small += "head_dim: 8, num_groups: 4, attention: plain}"
    settings = [*run, small, "checkpoint.every=6", "steps=6", "distributed.doctor=false"]
    streamed = "data.order=streamed"
    assert main(["train", str(tmp_path / "run.yaml"), *settings, streamed, "first_stage.cache=null"]) == 0
    assert main(["encode", str(tmp_path / "run.yaml"), "--ahead", "100", "steps=8", streamed]) == 0
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, order="streamed"))
    walked = keys(config, 8)
    assert stored(tmp_path) == Counter(itertools.chain.from_iterable(walked[6:]))


def test_without_an_index_it_walks_on_when_the_run_has_passed_it(config: Config, tmp_path: Path) -> None:
    """Where the run is nobody knows but by what lies before; the run's checkpoints are none so far."""
    encoder = Encoder(tmp_path, "--ahead", "4", "data.order=streamed", "steps=12")
    encoder.until("step 4: waiting, as the run is at step 0")
    record = {"step": 9, "samples_seen": 9 * N, "time": 1.0, "loss": 0.5}
    JSONLWriter(config.run_dir).write(record)
    assert encoder.process.wait(600) == 0
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, order="streamed"))
    assert stored(tmp_path) == Counter(itertools.chain.from_iterable(keys(config, 12)))


@pytest.mark.parametrize("words", [["--ahead", "0"], ["--ahead", "-3"]])
def test_no_distance_is_one_sentence(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(["encode", str(tmp_path / "run.yaml"), *words]) == 2
    assert "it must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("buckets", [False, True])
def test_a_position_is_known_without_reading(config: Config, buckets: bool) -> None:
    """That of a loader which has walked there, over epochs and buckets, from the start and from between."""
    data = config.data
    if buckets:
        data = dataclasses.replace(data, buckets=True, bucket_step=8, allow_enlarging=True)
    dataset = open_dataset(data)
    positions = {}
    with build_loader(data, seed=3, global_batch_size=N) as loader:
        for step, batch in enumerate(itertools.islice(loader, 40), start=1):
            positions[step] = batch.position
    assert loader.rejected.total() == 0
    for known, step in ((None, 1), (None, 7), (None, 40), (positions[7], 31), (positions[31], 31)):
        near = position_near(data, dataset, seed=3, global_batch_size=N, step=step, known=known)
        assert near == positions[step]


def test_a_position_of_mixed_sources_is_known_to_a_few_samples(config: Config, tmp_path: Path) -> None:
    scene = SceneOptions(min_objects=1, max_objects=1, min_edge=16, max_edge=24)
    list(synthesize(str(tmp_path / "more"), SynthesisOptions(40, failed_share=0.0, scene=scene)))
    sources = (
        SourceConfig(config.data.shards, weight=3.0),
        SourceConfig(f"{tmp_path}/more/*.tar", weight=1.0),
    )
    data = dataclasses.replace(config.data, shards="", sources=sources)
    with build_loader(data, seed=3, global_batch_size=N) as loader:
        batch = [next(loader) for _ in range(90)][-1]
    near = position_near(data, open_dataset(data), seed=3, global_batch_size=N, step=90)
    assert near is not None
    assert {**near, "states": []} == {**batch.position, "states": []}
    sizes = [15, 10]  # of the four lanes, of each source
    for i, (about, exact) in enumerate(zip(near["states"], batch.position["states"], strict=True)):
        walked = [state[0] * sizes[i % 2] + state[1] for state in (about, exact)]
        assert abs(walked[0] - walked[1]) <= 2
