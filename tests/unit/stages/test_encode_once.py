"""Training from the cache of moments is training that encodes live: the same losses, bit for bit."""

from __future__ import annotations

import dataclasses
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from data_pipeline.loader import Part, build_loader
from data_pipeline.moments.entry import Moments
from data_pipeline.moments.writer import MomentsWriter
from data_pipeline.tools.scenes.scene import SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from trainer.__main__ import main
from trainer.config.io import config_to_dict, load_config
from trainer.config.run import Config, ConfigError
from trainer.distributed.env import DistributedEnv
from trainer.distributed.torch_engine import TorchEngine
from trainer.first_stage.build import build_first_stage, first_stage_tensors
from trainer.first_stage.encode_once import EncodeOnce, moments_cache, open_cache
from trainer.metrics.timer import StepTimer
from trainer.model import build_model
from trainer.stages.diffusion import DiffusionStage
from trainer.weights import write_weights

CPU = torch.device("cpu")
N, STEPS = 12, 5
FIRST_STAGE = "name: kl, base_channels: 8, channel_multipliers: [1, 2], num_res_blocks: 1, num_groups: 4"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    scene = SceneOptions(min_objects=1, max_objects=1, min_edge=16, max_edge=24)
    list(synthesize(str(folder), SynthesisOptions(samples=60, failed_share=0.0, scene=scene)))
    return f"{folder}/*.tar"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    stage = build_first_stage(load_config(None, [f"first_stage={{{FIRST_STAGE}}}"]).first_stage)
    stage.set_latent_statistics(torch.zeros(4), torch.ones(4))
    path = str(tmp_path_factory.mktemp("first_stage") / "first_stage.safetensors")
    write_weights(path, *first_stage_tensors(stage))
    return path


def configuration(shards: str, weights: str, *settings: str) -> Config:
    return load_config(
        None,
        [
            *(f"data.shards={shards}", "data.image_size=16", "data.workers=0", "data.require_caption=false"),
            f"first_stage={{{FIRST_STAGE}, weights: {weights}}}",
            "unet={model_channels: 8, channel_multipliers: [1], num_res_blocks: 1, attention_factors: [], "
            "head_dim: 8, num_groups: 4, attention: plain}",
            *(f"global_batch_size={N}", "micro_batch_size=4", "optimizer.warmup_steps=0"),
            "distributed={engine: torch, precision: fp32, channels_last: false}",
            *settings,
        ],
    )


class Training:
    """A stage with or without its cache, step by step from the start."""

    def __init__(self, config: Config) -> None:
        self.config = config
        torch.manual_seed(0)
        model = build_model(config)
        self.once: EncodeOnce | None = None
        if config.first_stage.cache is not None:
            cache = moments_cache(config.first_stage, model.first_stage)
            open_cache(config.first_stage, cache)
            writer = MomentsWriter(cache, part_bytes=12_000)
            self.once = EncodeOnce(model.first_stage, cache, writer, config.micro_batch_size)
        env = DistributedEnv(0, 0, 1, 1, "127.0.0.1", 29500, "single", CPU)
        self.encoded = 0
        plain = model.first_stage.encode_whole
        model.first_stage.encode_whole = lambda pixels: self._counted(plain, pixels)  # type: ignore[method-assign]
        engine = TorchEngine(model.network, config, env)
        parts = (config, {"unet": engine}, model.conditioner, model.first_stage, StepTimer(CPU), self.once)
        self.stage = DiffusionStage(*parts)

    def _counted(self, plain: Any, pixels: Tensor) -> Tensor:
        self.encoded += len(pixels)
        return plain(pixels)

    def loader(self, rank: int = 0, ranks: int = 1) -> Any:
        cache = self.once.cache if self.once is not None else None
        moments = Moments(self.config.first_stage.cache_variants, cache)
        config = self.config
        return build_loader(config.data, seed=0, global_batch_size=N, part=Part(rank, ranks), moments=moments)

    def run(self) -> tuple[list[float], Counter[str]]:
        """Losses of the first steps, and what the loader counted."""
        with closing(self.loader()) as batches:
            losses = [
                self.stage.train_step(next(batches), step, 1e-3)["loss"].item() for step in range(STEPS)
            ]
            counts = Counter(batches.counts)
        if self.once is not None:
            self.once.close()
        return losses, counts


@pytest.mark.parametrize("order", ["indexed", "streamed"])
@pytest.mark.parametrize("drawn", [(), ("data.crop=random", "data.horizontal_flip=true")])
def test_losses_are_those_of_encoding_live(
    shards: str, weights: str, tmp_path: Path, drawn: tuple[str, ...], order: str
) -> None:
    """Off, filling, full, half lost; stored in fp32."""
    variants = ("first_stage.cache_variants=2",) if drawn else ()
    drawn = (*drawn, f"data.order={order}")
    cached = (*drawn, *variants, f"first_stage.cache={tmp_path}", "first_stage.cache_dtype=fp32")
    off, _ = Training(configuration(shards, weights, *drawn, *variants)).run()
    assert len(set(off)) == STEPS
    for expected in (STEPS * N, 0):
        training = Training(configuration(shards, weights, *cached))
        losses, counts = training.run()
        assert losses == off
        assert training.encoded == counts["cache_missed"] == expected
    for part in sorted(tmp_path.glob("*/parts/*.tar"))[::2]:
        part.unlink()
    training = Training(configuration(shards, weights, *cached))
    losses, counts = training.run()
    assert losses == off
    assert 0 < counts["cache_missed"] < STEPS * N
    assert counts["cache_missed"] <= training.encoded < STEPS * N + 4 * STEPS


def test_in_bf16_filling_and_full_are_the_same(shards: str, weights: str, tmp_path: Path) -> None:
    config = configuration(shards, weights, f"first_stage.cache={tmp_path}")
    filling, _ = Training(config).run()
    full, counts = Training(config).run()
    assert filling == full
    assert counts["cache_missed"] == 0
    off, _ = Training(configuration(shards, weights)).run()
    assert filling == pytest.approx(off, rel=1e-2)


def test_moments_are_the_same_at_any_number_of_ranks(shards: str, weights: str, tmp_path: Path) -> None:
    """Filled by three ranks, read by one, and the other way round: those of every step, bit for bit."""
    seen = []
    for name, ranks in (("a", 3), ("a", 1), ("b", 1), ("b", 3)):
        cache = (f"first_stage.cache={tmp_path / name}", "first_stage.cache_dtype=fp32")
        training = Training(configuration(shards, weights, *cache))
        assert training.once is not None
        loaders = [training.loader(rank, ranks) for rank in range(ranks)]
        steps = []
        for _ in range(STEPS):
            parts = [training.once.complete(next(loader)).cached for loader in loaders]
            steps.append(torch.cat([part.values for part in parts]))
        counts = sum((loader.counts for loader in loaders), Counter())
        for each in (*loaders, training.once):
            each.close()
        seen.append((torch.stack(steps), counts["cache_missed"]))
    assert [missed for _, missed in seen] == [STEPS * N, 0, STEPS * N, 0]
    assert all(torch.equal(values, seen[0][0]) for values, _ in seen)


CHANGES: dict[str, Any] = {
    "a weight of the encoder": lambda stage: stage.encoder.conv_in.weight.data.mul_(1.001),
    "a weight of the decoder": lambda stage: stage.decoder.conv_out.weight.data.mul_(1.001),
    "one bit": lambda stage: stage.quant_conv.bias.data.view(torch.int32)[0:1].bitwise_xor_(1),
    "precision": lambda stage: stage.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", [*CHANGES, "input_range", "tile_pixels", "cache_dtype", "scale", "layout"])
def test_another_first_stage_is_another_cache(shards: str, weights: str, change: str) -> None:
    """All but what is applied after the moments, and where weights lie in memory."""
    config = configuration(shards, weights, "first_stage.cache=/cache").first_stage
    torch.manual_seed(0)
    stage = build_first_stage(config)
    before = moments_cache(config, stage)
    if change in CHANGES:
        CHANGES[change](stage)
    elif change == "scale":
        stage.set_latent_statistics(torch.ones(4), torch.full((4,), 2.0))
    elif change == "layout":
        stage.to(memory_format=torch.channels_last)
    else:
        value: Any = {"input_range": "0..1", "tile_pixels": 8, "cache_dtype": "fp32"}[change]
        config = dataclasses.replace(config, **{change: value})
    after = moments_cache(config, stage)
    kept = change in ("scale", "layout")
    assert (after.stage == before.stage) == kept
    assert (after.folder == before.folder) == kept


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["stage=autoencoder", "data.image_size=32"], "remove first_stage.cache"),
        (["first_stage.name=identity"], "nothing to keep"),
        (["data.order=resampled"], "data.order=indexed"),
        (["conditioning.low_resolution={factor: 2}"], "conditioning.low_resolution is made"),
        (["conditioning.masked_image={}"], "conditioning.masked_image is made"),
        (["data.crop=random"], "data.crop=random makes other pixels"),
        (["data.horizontal_flip=true"], "first_stage.cache_variants, e.g. to 4"),
        (["first_stage.cache="], "first_stage.cache is empty"),
        (
            ["first_stage.cache=null", "first_stage.cache_variants=2", "data.order=resampled"],
            "cache_variants",
        ),
    ],
)
def test_what_cannot_be_encoded_once_is_refused(
    shards: str, weights: str, settings: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        configuration(shards, weights, "first_stage.cache=/cache", *settings)


def test_a_cache_that_cannot_be_written_is_one_sentence(shards: str, weights: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written") as raised:
        Training(configuration(shards, weights, f"first_stage.cache={tmp_path / 'file' / 'cache'}"))
    assert "\n" not in str(raised.value)


def test_the_bound_counts_what_is_there(shards: str, weights: str, tmp_path: Path) -> None:
    config = configuration(shards, weights, f"first_stage.cache={tmp_path}")
    Training(config).run()
    taken = sum(part.stat().st_size for part in tmp_path.glob("*/parts/*.tar"))
    bounded = dataclasses.replace(config.first_stage, cache_bytes=taken + 7)
    cache = moments_cache(bounded, build_first_stage(bounded))
    assert taken > 0
    assert open_cache(bounded, cache) == 7


def test_what_is_encoded_ahead_is_there_when_training_comes(
    shards: str, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ldm encode` by two ranks, then by one that finds all; training encodes nothing, and loses nothing."""
    cached = (f"first_stage.cache={tmp_path / 'cache'}", "first_stage.cache_dtype=fp32")
    config = configuration(shards, weights, *cached)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    for rank in (0, 1):
        assert main(["encode", str(tmp_path / "run.yaml"), "--ranks", "2", "--rank", str(rank)]) == 0
    capsys.readouterr()
    assert main(["encode", str(tmp_path / "run.yaml")]) == 0
    assert "in the cache      60 before, 0 stored now" in capsys.readouterr().out
    off, _ = Training(configuration(shards, weights)).run()
    training = Training(config)
    assert training.run()[0] == off
    assert training.encoded == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["first_stage.cache=null"], "first_stage.cache is not set"),
        (["--rank", "2", "--ranks", "2"], "--rank 2 is none of --ranks 2"),
        (["--steps", "0"], "--steps 0 is nothing"),
        (["--ranks", "13"], "13 ranks cannot share global_batch_size=12; use 1 to 12"),
        (["first_stage.weights=null"], "first_stage.weights is not set"),
    ],
)
def test_encode_says_what_is_wrong(
    shards: str, weights: str, tmp_path: Path, capsys, words: list[str], sentence: str
) -> None:
    config = configuration(shards, weights, f"first_stage.cache={tmp_path / 'cache'}")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    assert main(["encode", str(tmp_path / "run.yaml"), *words]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert "Traceback" not in told
