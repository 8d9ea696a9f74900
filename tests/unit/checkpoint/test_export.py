"""Exported files: the chosen weights, whole, with the configuration beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trainer.__main__ import main
from trainer.checkpoint import export as export_module
from trainer.checkpoint.export import export, open_weights, read_about
from trainer.config.io import config_from_dict
from trainer.config.run import ConfigError
from trainer.weights import read_weights, write_weights

from .conftest import MakeRun
from .small_run import SmallRun


@pytest.fixture
def run(make_run: MakeRun) -> SmallRun:
    run = make_run()
    run.train(3)
    run.save()
    return run


def whole(run: SmallRun, values: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    fragments = run.engine.fragments()
    return {f.name: v.reshape(f.shape) for f, v in zip(fragments, values, strict=True)}


@pytest.mark.parametrize("profile", [None, "decay", "power_0.1", "weights"])
def test_profiles(
    run: SmallRun, tmp_path: Path, profile: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "_GROUP_BYTES", 20)  # several groups even here
    made = export(run.config.run_dir, str(tmp_path / "out.safetensors"), profile=profile)
    tensors, metadata = read_weights(made.destination)
    expected = (
        [f.master for f in run.engine.fragments()]
        if profile == "weights"
        else run.ema.values(profile or "decay")
    )
    scale = tensors.pop("latent_scale")
    assert scale.tolist() == [0.5] * 4
    wanted = whole(run, expected)
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert config_from_dict(json.loads(metadata["config"])) == run.config
    assert (metadata["step"], metadata["profile"]) == ("3", profile or "decay")
    assert made.num_parameters == sum(value.numel() for value in wanted.values())
    assert made.num_bytes == Path(made.destination).stat().st_size


def test_tensors_of_a_file_are_read_in_the_same_order_each_time(tmp_path: Path) -> None:
    """An average that is made again is the same file, by which a set that is continued knows its weights."""
    url = str(tmp_path / "many.safetensors")
    names = [f"{number:02d}" for number in range(20)]
    write_weights(url, {name: torch.zeros(1) for name in reversed(names)}, {})
    assert list(read_weights(url)[0]) == names


def test_half_precision(run: SmallRun, tmp_path: Path) -> None:
    made = export(run.config.run_dir, str(tmp_path), dtype="bf16")
    assert made.destination.endswith("weights.safetensors")
    tensors, _ = read_weights(made.destination)
    assert tensors["0.weight"].dtype == torch.bfloat16
    assert tensors["latent_scale"].dtype == torch.float32
    expected = whole(run, run.ema.values("decay"))["0.weight"]
    assert torch.equal(tensors["0.weight"], expected.to(torch.bfloat16))


def test_mistakes_are_explained(run: SmallRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"choose one of decay, power_0\.1, weights"):
        export(run.config.run_dir, str(tmp_path), profile="fast")
    with pytest.raises(ConfigError, match="fp32, bf16, fp16"):
        export(run.config.run_dir, str(tmp_path), dtype="fp8")
    with pytest.raises(ConfigError, match="step 77"):
        export(run.config.run_dir, str(tmp_path), step=77)
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        export(str(tmp_path / "nothing"), str(tmp_path))


@pytest.mark.parametrize("name", ["", " ", "out.pt", "out.ckpt", "out.bin", "out.pth"])
def test_a_destination_of_another_format_or_none_is_refused(run: SmallRun, tmp_path: Path, name: str) -> None:
    destination = str(tmp_path / name) if name.strip() else name
    with pytest.raises(ConfigError, match=r"is empty|let it end in \.safetensors"):
        export(run.config.run_dir, destination)
    assert not list(tmp_path.glob("out*"))


def test_a_file_is_asked_for_what_it_holds(run: SmallRun, tmp_path: Path) -> None:
    file = export(run.config.run_dir, str(tmp_path / "out.safetensors")).destination
    for look in (open_weights, read_about):
        for choice in ({}, {"profile": "decay"}, {"step": 3}):
            look(file, **choice)
        with pytest.raises(ConfigError, match="holds decay alone, not 'weights'; leave out --weights"):
            look(file, profile="weights")
        with pytest.raises(ConfigError, match="holds step 3 alone, not step 2; leave out --checkpoint"):
            look(file, step=2)
    with pytest.raises(ConfigError, match="is a file, not a run"):
        export(file, str(tmp_path / "again.safetensors"))


def test_listing_what_is_no_run_is_a_mistake(
    run: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "list", run.config.run_dir]) == 0
    assert "step_000000003" in capsys.readouterr().out
    assert main(["checkpoint", "list", str(tmp_path / "nowhere")]) == 2
    assert "there is no checkpoint in" in capsys.readouterr().err
