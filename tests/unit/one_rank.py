"""One rank of `ldm train` in the tests' own process, from its configuration file to its exit code."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from data_pipeline.tools.scenes.scene import SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from trainer.config.io import config_to_dict, load_config
from trainer.distributed.place import free_port
from trainer.launch import rank

Train = Callable[..., int]
"""Takes overrides, gives the exit code."""


def one_rank(monkeypatch: pytest.MonkeyPatch, folder: Path, settings: Sequence[str]) -> Train:
    """Trains with these settings, the configuration file lying in `folder`."""
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def train(*overrides: str) -> int:
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
        path = folder / "config.json"
        path.write_text(json.dumps(config_to_dict(load_config(None, [*settings, *overrides]))))
        return rank.main([str(path), "train"])

    return train


def small_shards(folder: Path) -> str:
    """Eight samples of 16 to 24 px; what `data.shards` is set to."""
    scene = SceneOptions(min_edge=16, max_edge=24)
    list(synthesize(str(folder), SynthesisOptions(samples=8, failed_share=0.0, scene=scene)))
    return f"{folder}/*.tar"
