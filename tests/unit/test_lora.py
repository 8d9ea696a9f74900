"""Adapters are trained, and nothing else: what moves, what is stored, what a run goes on and draws with."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.one_rank import Train
from tests.unit.test_trainable import TINY, from_weights, is_idle
from trainer.__main__ import main
from trainer.checkpoint.commands import find_checkpoint
from trainer.checkpoint.export import open_adapters, open_weights
from trainer.checkpoint.reader import EngineReader
from trainer.cli.ema import reconstruct
from trainer.config.io import load_config
from trainer.config.run import ConfigError
from trainer.exit_codes import ExitCode
from trainer.model import count_parameters
from trainer.planning.memory import plan
from trainer.planning.work import count_work
from trainer.weights import read_weights

pytest.importorskip("peft")

LORA = "lora={rank: 3, alpha: 6}"
BLOCKS = (
    "down_blocks.1.attentions.0",
    "mid_block.attentions.0",
    *(f"up_blocks.0.attentions.{i}" for i in (0, 1)),
)


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    return from_weights(tmp_path, monkeypatch)


def is_adapted(name: str) -> bool:
    return ".attn" in name and ".to_" in name and name.endswith(".weight")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_adapters_move_and_whoever_reads_the_network_has_them_merged(
    train: Train, tmp_path: Path, precision: str
) -> None:
    started = read_weights(str(tmp_path / "start.safetensors"))[0]
    averages = ("ema.power_stds=[0.05, 0.1]", "ema.snapshot_every=2")
    settings = (LORA, *averages, f"distributed.precision={precision}")
    assert train("steps=2", *settings) == ExitCode.DONE
    assert train("steps=4", *settings) == ExitCode.DONE  # goes on
    run = str(tmp_path / "run")
    handle = find_checkpoint(run, None)
    trained = set(handle.manifest.shapes["unet"])
    layers = {name.removesuffix(".weight") for name in started if is_adapted(name)}
    assert len(layers) == 5 * len(BLOCKS)
    assert trained == {f"{layer}.lora_{side}.default.weight" for layer in layers for side in "AB"}
    assert set(handle.manifest.kinds["unet"]) >= {"master", "exp_avg", "exp_avg_sq", "ema.decay"}
    assert handle.manifest.shapes["frozen"] == {n: tuple(value.shape) for n, value in started.items()}

    stored = EngineReader(handle, "unet").whole("ema.decay", sorted(trained))
    averaged = open_weights(run)[0]
    for name, value in started.items():
        expected = value
        if is_adapted(name):
            down, up = (stored[name.replace(".weight", f".lora_{side}.default.weight")] for side in "AB")
            assert down.shape[0] == up.shape[1] == 3
            expected = value + 2.0 * up @ down
            assert is_idle(name) or not torch.equal(averaged[name], value), name
        torch.testing.assert_close(averaged[name], expected, rtol=1e-6, atol=1e-7)
    reconstruct(run, str(tmp_path / "ema.safetensors"), std=0.07)
    assert main(["export", run, str(tmp_path / "export.safetensors")]) == 0
    exported = read_weights(str(tmp_path / "export.safetensors"))[0]
    assert all(torch.equal(exported[name], value) for name, value in averaged.items())
    for tensors in (
        read_weights(str(tmp_path / "ema.safetensors"))[0],
        open_weights(run, profile="weights")[0],
    ):
        for name, value in started.items():
            assert is_idle(name) or torch.equal(tensors[name], value) != is_adapted(name), name
    assert main(["sample", run, "--class-label", "1", "--steps", "2", "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    "second", [[], ["distributed.engine=deepspeed", "distributed.zero_stage=1"]], ids=["torch", "to-zero-1"]
)
def test_going_on_is_not_another_run(train: Train, tmp_path: Path, second: list[str]) -> None:
    """Four steps at once, and two and two, end with the same adapters: bit for bit in the same engine."""
    assert train("steps=4", LORA) == ExitCode.DONE
    at_once = open_adapters(str(tmp_path / "run"), profile="weights")[0]
    (tmp_path / "run").rename(tmp_path / "first")
    assert train("steps=2", LORA) == ExitCode.DONE
    (tmp_path / "start.safetensors").unlink()  # the checkpoint has it
    assert train("steps=4", LORA, *second) == ExitCode.DONE
    again = open_adapters(str(tmp_path / "run"), profile="weights")[0]
    for name, both in at_once.items():
        torch.testing.assert_close(again[name], both, rtol=1e-4 if second else 0, atol=1e-6 if second else 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("lora.rank=4", "was trained with lora.rank=3"),
        ("lora.alpha=3", "was trained with lora.alpha=6"),
        ("lora.targets=[unet.*.ff.*]", "was trained with lora.targets=[unet.*.attn*.to_*]"),
        ("lora=null", "was trained with lora and"),
    ],
)
def test_a_run_that_goes_on_otherwise_is_refused(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str, said: str
) -> None:
    assert train("steps=1", LORA) == ExitCode.DONE
    assert train("steps=2", LORA, change) == ExitCode.USER_ERROR
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert said in error
    assert "\n" not in error
    assert train("steps=2", LORA, "lora.dropout=0.1") == ExitCode.DONE


def test_adapters_of_a_whole_run_are_refused(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train("steps=1") == ExitCode.DONE
    assert train("steps=2", LORA) == ExitCode.USER_ERROR
    assert "was trained with lora=null" in caplog.records[-1].getMessage()
    for source, said in (("run", "trained no adapters"), ("start.safetensors", "name the run")):
        with pytest.raises(ConfigError, match=said):
            open_adapters(str(tmp_path / source))


def test_what_the_base_lacks_is_refused(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An added condition would stay random."""
    assert train("steps=1", LORA, "conditioning.image_size={width: 8}") == ExitCode.USER_ERROR
    assert "start.safetensors lacks unet.vector_embedding" in caplog.records[-1].getMessage()


def test_layers_are_named_by_pattern_or_module(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train("steps=1", "lora={targets: [unet.mid_block, unet.*.ff.proj_out]}") == ExitCode.DONE
    names = set(open_adapters(str(tmp_path / "run"))[0])
    middle = {name for name in names if name.startswith("unet.mid_block.")}
    assert {name.split(".", 2)[2] for name in middle} >= {
        "resnets.0.time_emb_proj.weight",
        "attentions.0.proj_in.weight",
        "attentions.0.transformer_blocks.0.ff.proj_in.weight",
    }
    assert {name.rpartition("blocks.0.")[2] for name in names - middle} == {"ff.proj_out.weight"}
    assert (
        train("steps=1", "lora={targets: [unet.*.conv1]}", f"run_dir={tmp_path}/other") == ExitCode.USER_ERROR
    )
    assert "'unet.*.conv1', which is no linear layer of the UNet" in caplog.records[-1].getMessage()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([LORA], "set init_from"),
        ([LORA, "init_from=x", "trainable=[unet]"], "trainable contradicts"),
        ([LORA, "init_from=x", "diffusion.learned_uncertainty=true"], "learned_uncertainty contradicts"),
        (["lora={targets: []}", "init_from=x"], "lora.targets is empty"),
        ([LORA, "stage=autoencoder", "first_stage.name=kl"], "stage=diffusion"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(None, [*TINY, *settings])


def test_without_peft_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'latent-diffusion-trainer\[lora\]'"):
        count_parameters(load_config(None, [*TINY, LORA, "init_from=x"]))


def test_counts_memory_and_work_know_of_them() -> None:
    whole = load_config(None, list(TINY))
    adapted = load_config(None, [*TINY, LORA, "init_from=x"])
    sizes = [(32, 96), (32, 32), (32, 32), (16, 64), (32, 32)]  # qkv, out, q, kv of 16, out
    expected = len(BLOCKS) * sum(3 * (taken + given) for taken, given in sizes)
    counts, base = count_parameters(adapted), count_parameters(whole)
    assert counts["trained"]["total"] == counts["trained"]["unet"] == expected
    assert counts["frozen"]["unet"] == base["trained"]["unet"]
    assert counts["frozen"]["total"] == base["trained"]["total"] + base["frozen"]["total"]
    planned = plan(adapted, 1, 1)
    assert planned.optimizer == 2 * 4 * expected  # AdamW's moments; in fp32 masters are the weights
    assert planned.gradients == planned.weights == planned.ema == 4 * expected
    assert planned.frozen == 4 * base["trained"]["total"]
    assert planned.checkpoint_bytes == 4 * (4 * expected + base["trained"]["total"])
    # More forward, but no gradients of the base's weights.
    assert count_work(adapted).forward_flops > count_work(whole).forward_flops
    assert count_work(adapted).network_flops < count_work(whole).network_flops
