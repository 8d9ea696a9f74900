"""A part of a network is trained: what moves, what is stored, what a run goes on, draws and exports with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.unit.one_rank import Train, one_rank, small_shards
from trainer.__main__ import main
from trainer.checkpoint.commands import find_checkpoint
from trainer.checkpoint.export import open_weights
from trainer.cli.ema import reconstruct
from trainer.config.io import load_config
from trainer.config.run import ConfigError
from trainer.distributed.frozen import FrozenWeights, freeze
from trainer.exit_codes import ExitCode
from trainer.model import build_model, count_parameters
from trainer.weights import read_weights, write_weights

TINY = (
    "data.image_size=16",
    "data.workers=0",
    "first_stage.name=identity",
    "unet={model_channels: 16, channel_multipliers: [1, 2], num_res_blocks: 1, attention_factors: [2]}",
    "unet.head_dim=16",
    "unet.num_groups=4",
    "conditioning.class_label={num_classes: 100, width: 16}",
    "global_batch_size=2",
    "micro_batch_size=2",
    "optimizer.learning_rate=1e-2",
    "logging={every: 1, wandb: disabled, progress_bar: false}",
    "distributed={engine: torch, zero_stage: 0, precision: fp32, doctor: false, watchdog_s: 0}",
    "checkpoint.asynchronous=false",
    "sampling.guidance_scale=1",
)
PART = "trainable=[conditions, unet.*.attn2.*]"


def is_trained(name: str) -> bool:
    return name.startswith("conditions.") or ".attn2." in name


def is_idle(name: str) -> bool:
    """Attention to one token, the class, weighs it 1 whatever is asked: rounding alone moves these."""
    return ".attn2.to_q." in name or ".attn2.to_k." in name


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    return from_weights(tmp_path, monkeypatch)


def from_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Trains on from the weights in a file, start.safetensors."""
    write_start(tmp_path / "start.safetensors", seed=3)
    where = (
        f"run_dir={tmp_path}/run",
        f"data.shards={small_shards(tmp_path / 'shards')}",
        f"init_from={tmp_path}/start.safetensors",
    )
    return one_rank(monkeypatch, tmp_path, [*TINY, *where])


def write_start(path: Path, seed: int) -> None:
    """Weights to start from, none of them zero."""
    torch.manual_seed(seed)
    network = build_model(load_config(None, list(TINY))).network
    tensors = {name: 0.1 * torch.randn_like(value) for name, value in network.state_dict().items()}
    write_weights(str(path), tensors, {})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_the_part_moves_and_weights_are_whole_everywhere(
    train: Train, tmp_path: Path, precision: str
) -> None:
    started = read_weights(str(tmp_path / "start.safetensors"))[0]
    averages = ("ema.power_stds=[0.05, 0.1]", "ema.snapshot_every=2")
    settings = (PART, *averages, f"distributed.precision={precision}")
    assert train("steps=2", *settings) == ExitCode.DONE
    assert train("steps=4", *settings) == ExitCode.DONE  # goes on
    run = str(tmp_path / "run")
    manifest = find_checkpoint(run, None).manifest
    assert set(manifest.shapes["unet"]) == {name for name in started if is_trained(name)}
    assert set(manifest.kinds["unet"]) >= {"master", "exp_avg", "exp_avg_sq", "ema.decay"}
    assert manifest.kinds["frozen"] == ("master",)
    reconstruct(run, str(tmp_path / "ema.safetensors"), std=0.07)
    assert main(["export", run, str(tmp_path / "export.safetensors")]) == 0
    for tensors in (
        open_weights(run)[0],
        open_weights(run, profile="weights")[0],
        read_weights(str(tmp_path / "ema.safetensors"))[0],
        read_weights(str(tmp_path / "export.safetensors"))[0],
    ):
        for name, value in started.items():
            assert is_idle(name) or torch.equal(tensors[name], value) != is_trained(name), name
    assert main(["sample", run, "--class-label", "1", "--steps", "2", "--out", str(tmp_path / "out")]) == 0


def test_going_on_is_not_another_run(train: Train, tmp_path: Path) -> None:
    """Four steps at once, and two and two, end with the same weights bit for bit."""
    assert train("steps=4", PART) == ExitCode.DONE
    at_once = open_weights(str(tmp_path / "run"), profile="weights")[0]
    (tmp_path / "run").rename(tmp_path / "first")
    for steps in (2, 4):
        assert train(f"steps={steps}", PART) == ExitCode.DONE
    again = open_weights(str(tmp_path / "run"), profile="weights")[0]
    assert all(torch.equal(value, again[name]) for name, value in at_once.items())


@pytest.mark.parametrize("part", [PART, "trainable=[]"])
def test_going_on_reads_nothing_that_it_began_with(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    """Neither what the file holds by then counts, nor whether it is there."""
    start = tmp_path / "start.safetensors"
    assert train("steps=1", part) == ExitCode.DONE
    (tmp_path / "run").rename(tmp_path / "first")
    ends = []
    for change in (lambda: None, lambda: write_start(start, seed=4), start.unlink):
        shutil.copytree(tmp_path / "first", tmp_path / "run")
        change()
        assert train("steps=2", part) == ExitCode.DONE
        ends.append(open_weights(str(tmp_path / "run"), profile="weights")[0])
        (tmp_path / "run").rename(tmp_path / f"end{len(ends)}")
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
        assert torch.equal(value, ends[2][name]), name
    # A run that has nothing to go on with needs it.
    assert train("steps=1", part) == ExitCode.USER_ERROR
    assert caplog.records[-1].getMessage() == f"there is no weights file at {start}; check the path or URL."


def test_a_run_whose_checkpoints_are_all_damaged_begins_with_its_file(train: Train, tmp_path: Path) -> None:
    assert train("steps=1", PART) == ExitCode.DONE
    for shard in (tmp_path / "run").rglob("rank_*"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    assert train("steps=1", PART) == ExitCode.DONE
    started = read_weights(str(tmp_path / "start.safetensors"))[0]
    ended = open_weights(str(tmp_path / "run"), profile="weights")[0]
    assert all(torch.equal(ended[name], value) for name, value in started.items() if not is_trained(name))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("trainable=[conditions]", "was trained with trainable=[conditions, unet.*.attn2.*]"),
        ("trainable=[]", "was trained with trainable=[conditions, unet.*.attn2.*]"),
        ("init_from={tmp_path}/other.safetensors", "beside other frozen weights"),
    ],
)
def test_a_run_that_goes_on_otherwise_is_refused(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str, said: str
) -> None:
    write_start(tmp_path / "other.safetensors", seed=4)
    assert train("steps=1", PART) == ExitCode.DONE
    assert train("steps=2", PART, change.format(tmp_path=tmp_path)) == ExitCode.USER_ERROR
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert said in error
    assert "another run_dir (init_from=" in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["trainable=[unet]"], "set init_from"),
        (["trainable=[unet]", "stage=autoencoder", "first_stage.name=kl"], "stage=diffusion"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(None, [*TINY, *settings])


def test_a_pattern_that_names_nothing_is_refused(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    assert train("steps=1", "trainable=[unet.*.attn3.*]") == ExitCode.USER_ERROR
    assert "trainable names 'unet.*.attn3.*', which is no parameter of the network" in caplog.text


def test_a_rate_of_conditioners_without_one_that_is_trained_is_refused(
    train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    rate = "optimizer.conditioner_learning_rate=1e-5"
    assert train("steps=1", "trainable=[unet.*.attn2.*]", rate) == ExitCode.USER_ERROR
    assert "no conditioner is trained here" in caplog.records[-1].getMessage()
    assert train("steps=1", PART, rate) == ExitCode.DONE


@pytest.mark.parametrize(
    ("patterns", "trained"),
    [
        ([], {"0.weight", "0.bias", "2.weight", "2.bias"}),
        (["0"], {"0.weight", "0.bias"}),
        (["*.bias"], {"0.bias", "2.bias"}),
        (["2.weight", "0.b*"], {"2.weight", "0.bias"}),
    ],
)
def test_patterns(patterns: list[str], trained: set[str]) -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    freeze(network, patterns)
    assert {name for name, p in network.named_parameters() if p.requires_grad} == trained
    with pytest.raises(ConfigError, match="did you mean"):
        freeze(nn.Sequential(nn.ModuleDict({"decoder": nn.Linear(2, 2)})), ["0.decodr"])


@pytest.mark.parametrize("world_size", [1, 2, 3, 50])
def test_ranks_share_what_is_frozen(world_size: int) -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    freeze(network, ["2.bias"])
    flat = {name: torch.full((p.numel(),), torch.nan) for name, p in network.named_parameters()}
    for number in range(world_size):
        share = FrozenWeights(network, number, world_size)
        assert set(share.parameter_shapes) == {"0.weight", "0.bias", "2.weight"}
        for fragment in share.fragments():
            part = flat[fragment.name][fragment.start : fragment.start + fragment.master.numel()]
            assert part.isnan().all()
            part.copy_(fragment.master)
        values = [fragment.master.clone() for fragment in share.fragments()]
        assert share.differing(values) == []
        if values:
            values[-1][-1] += 1e-6
            assert share.differing(values) == [share.fragments()[-1].name]
    for name, parameter in network.named_parameters():
        expected = torch.nan if name == "2.bias" else parameter.detach().flatten()
        torch.testing.assert_close(
            flat[name], torch.as_tensor(expected).expand(parameter.numel()), equal_nan=True
        )


def test_counts_tell_the_part_from_the_rest() -> None:
    whole = count_parameters(load_config(None, list(TINY)))
    part = count_parameters(load_config(None, [*TINY, PART, "init_from=x"]))
    assert 0 < part["trained"]["unet"] < whole["trained"]["unet"]
    assert part["trained"]["unet"] + part["frozen"]["unet"] == whole["trained"]["unet"]
    assert part["trained"]["conditioning.class_label"] == whole["trained"]["conditioning.class_label"]
    assert part["trained"]["total"] + part["frozen"]["total"] == (
        whole["trained"]["total"] + whole["frozen"]["total"]
    )
