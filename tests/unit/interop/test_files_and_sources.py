"""Foreign weight files: what is read, what is refused, and that nothing in them runs."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from trainer.config.run import ConfigError
from trainer.interop.compvis import average_name, split
from trainer.interop.source import open_source
from trainer.weights import read_tensors


class ModelCheckpoint:
    """Pretends to be Lightning's class, which old checkpoints name in their callbacks."""


ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"


class Attack:
    """Runs a command when a careless reader unpickles it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def test_a_checkpoint_is_unwrapped(tmp_path: Path) -> None:
    file = str(tmp_path / "model.ckpt")
    torch.save({"state_dict": {"a.b": torch.arange(3), "note": "text"}, "global_step": 7}, file)
    tensors = read_tensors(file)
    assert list(tensors) == ["a.b"]
    assert tensors["a.b"].tolist() == [0, 1, 2]


def test_the_callback_key_of_lightning_checkpoints_is_inert(tmp_path: Path) -> None:
    file = str(tmp_path / "model.ckpt")
    names = [ModelCheckpoint.__module__.rsplit(".", i)[0] for i in (2, 1, 0)]
    modules = {name: ModuleType(name) for name in names}
    modules[names[-1]].ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        torch.save({"state_dict": {"w": torch.ones(1)}, "callbacks": {ModelCheckpoint: {"best": 1.0}}}, file)
    assert read_tensors(file)["w"].tolist() == [1.0]


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    file, trace = str(tmp_path / "model.ckpt"), tmp_path / "trace"
    torch.save({"state_dict": {"w": torch.ones(1)}, "extra": Attack(trace)}, file)
    with pytest.raises(ConfigError, match="could run code"):
        read_tensors(file)
    assert not trace.exists()
    with Path(file).open("wb") as bare:
        pickle.dump(Attack(trace), bare)
    with pytest.raises(ConfigError):
        read_tensors(file)
    assert not trace.exists()


@pytest.mark.parametrize("ending", [".ckpt", ".safetensors"])
def test_missing_and_broken_files_are_one_sentence(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"model{ending}"
    with pytest.raises(ConfigError, match="no weights file"):
        read_tensors(str(file))
    file.write_bytes(b"not weights at all")
    with pytest.raises(ConfigError):
        read_tensors(str(file))


def test_an_unknown_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a weights file"):
        open_source(str(tmp_path))
    torch.save({"some.weight": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=r"recognised.*some\.weight"):
        open_source(str(tmp_path / "other.pt"))
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ConfigError, match="safe_serialization"):
        open_source(str(tmp_path / "unet"))


def test_the_parts_of_stable_diffusion_files() -> None:
    one = torch.ones(1)
    name = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    names = [
        f"model.diffusion_model.{name}",
        average_name(name),
        "model_ema.decay",
        "model_ema.num_updates",
        "first_stage_model.encoder.conv_in.weight",
        "first_stage_model.loss.logvar",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.model.ln_final.weight",
        "cond_stage_model.model.logit_scale",
        "betas",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    ]
    assert names[1] == "model_ema.diffusion_modelinput_blocks11transformer_blocks0attn1to_qweight"
    parts = split(dict.fromkeys(names, one))
    assert list(parts.unet) == list(parts.unet_average) == [name]
    assert list(parts.first_stage) == ["encoder.conv_in.weight"]
    assert list(parts.clip) == [
        "text_model.final_layer_norm.weight",
        "text_model.embeddings.token_embedding.weight",
    ]
    assert list(parts.open_clip) == ["ln_final.weight"]
    assert list(parts.schedule) == ["betas"]
    assert set(parts.left) == {names[i] for i in (2, 3, 5, 7, 9)}
