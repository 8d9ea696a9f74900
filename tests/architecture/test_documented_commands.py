"""Every command that documents, configurations, manifests and help say to type names its networks."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from trainer.__main__ import VERBS, verb_parser
from trainer.config.io import load_config, load_run

ROOT = Path(__file__).parents[2]
PLACES = (
    "README.md",
    "docs/*.md",
    "slurm/*",
    "k8s/**/*.md",
    "k8s/**/*.yaml",
    "configs/**/*.yaml",
    "trainer/launch/*.py",
)
START = re.compile(
    r"(?:ldm (?:train|doctor|encode)|ldm slurm submit|train_ldm\.sh|-m trainer\.launch\.ray)"
    r" +(configs/\S+\.yaml.*)"
)


def commands(text: str) -> list[str]:
    """What follows the verb, of every command with a configuration of ours; continued lines are joined."""
    text = re.sub(r"\\\n[# ]*", " ", text)  # of a shell
    text = re.sub(
        r"(configs/\S+\.yaml)((?:\n {10}[^\n]+)+)", lambda m: m[1] + m[2].replace("\n", " "), text
    )  # of YAML's >-
    return [re.split(r"`| \|\| ", found)[0] for found in START.findall(text)]


def written() -> list[tuple[str, str]]:
    """(file, command) of every document."""
    files = sorted({path for place in PLACES for path in ROOT.glob(place) if path.suffix != ".py"})
    return [(str(f.relative_to(ROOT)), command) for f in files for command in commands(f.read_text("utf-8"))]


def helped() -> list[tuple[str, str]]:
    """The same of the help of every verb."""
    return [(verb, command) for verb in VERBS for command in commands(verb_parser(verb).format_help())]


def test_there_are_commands_in_every_kind_of_place() -> None:
    found = {place for place, _ in written()}
    assert {"README.md", "slurm/README.md", "slurm/train_ldm.sh", "docs/launching.md"} <= found
    assert "k8s/overlays/a100/kustomization.yaml" in found
    assert len([place for place in found if place.startswith("configs/")]) > 30
    assert {place for place, _ in helped()} >= {"train", "doctor", "encode", "slurm"}


@pytest.mark.parametrize(("place", "command"), written() + helped())
def test_a_documented_command_names_every_network(place: str, command: str) -> None:
    path, *words = shlex.split(command)
    assert not re.search(r"\{\d", re.sub(r"'[^']*'", "", command)), f"{place}: a shell expands {command}"
    overrides = [word for word in words if re.match(r"[a-z_][\w.]*=", word)]
    config = load_run(str(ROOT / path), overrides)
    assert config.data.shards or config.data.sources, f"{place}: no data.shards in {command}"
    if config.stage == "autoencoder":
        assert config.autoencoder_loss.perceptual_weights, f"{place}: no weights for LPIPS in {command}"


def test_only_the_demo_is_untrained() -> None:
    random = {
        path.name
        for path in (ROOT / "configs").rglob("*.yaml")
        for config in [load_config(str(path))]
        for tower in [config.conditioning.openclip, config.conditioning.openclip_second]
        if (tower and tower.pretrained == "random") or config.autoencoder_loss.perceptual_weights == "random"
    }
    assert random == {"demo_text_to_image.yaml", "demo_first_stage.yaml"}
