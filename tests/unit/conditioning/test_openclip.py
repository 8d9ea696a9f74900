"""OpenCLIP: what is encoded, how weights are found, and what is refused."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trainer.conditioning.base import Source
from trainer.conditioning.build import require_activations
from trainer.conditioning.open_clip_towers import build_tower, load_tower, weights_file
from trainer.conditioning.openclip import OpenCLIP
from trainer.config.io import load_config
from trainer.config.models import ConditioningConfig, FirstStageConfig, OpenCLIPConfig
from trainer.config.run import ConfigError
from trainer.stages.build import build_stage
from trainer.weights import read_alone, read_tensors, read_through, write_weights

T = TypeVar("T")

TOWER = OpenCLIPConfig(model="ViT-B-32", pretrained="random", width=32, layers=3, heads=4)


def build(seed: int = 0, **changes: Any) -> OpenCLIP:
    return OpenCLIP(dataclasses.replace(TOWER, **changes), FirstStageConfig(), seed)


def source(*captions: str) -> Source:
    return Source(captions=captions, ordinals=torch.arange(len(captions)), seed=0)


def test_random_weights_are_announced_and_the_same_in_every_process(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        first = build().encode(["red"])["context"]
    assert "RANDOM" in caplog.text
    torch.manual_seed(99)
    state = torch.get_rng_state()
    torch.testing.assert_close(build().encode(["red"])["context"], first)
    assert torch.equal(torch.get_rng_state(), state)  # building it disturbs nobody's draws
    assert not torch.equal(build(seed=1).encode(["red"])["context"], first)


def test_each_different_caption_is_encoded_once() -> None:
    condition = build()
    rows: list[int] = []
    real = condition.tower.forward_intermediates

    def counted(tokens: Tensor, **options: Any) -> Any:
        rows.append(len(tokens))
        return real(tokens, **options)

    condition.tower.forward_intermediates = counted
    inputs = condition.prepare(source("red", "blue", "red", "red"))
    assert rows == [2, 1]  # two captions, and the empty one
    condition.prepare(source("red", "blue"))
    assert rows == [2, 1, 2]  # the empty one is remembered
    context = inputs["context"]
    assert torch.equal(context[0], context[2])
    assert not torch.equal(context[0], context[1])
    torch.testing.assert_close(context[1:2], condition.encode(["blue"])["context"], rtol=1e-4, atol=1e-5)


def test_null_is_the_empty_prompt_or_zeros() -> None:
    empty, zeros = build(pooled=True), build(pooled=True, null="zeros")
    for name, value in empty.encode([""]).items():
        assert torch.equal(empty.null()[name], value)
        assert torch.equal(zeros.null()[name], torch.zeros_like(value))
    inputs = empty.prepare(source("red", "blue"))
    assert inputs["null_context"].shape == inputs["context"].shape
    assert inputs["null_context"].stride(0) == 0  # a view: no memory per sample


def test_long_captions_in_chunks() -> None:
    """Each part is encoded for itself; short captions and the null form get empty parts."""
    condition = build(pooled=True, context_length=8)
    long, short = "red blue green red blue green red blue", "red"  # eight tokens, six at a time
    one, two = (
        condition.prepare(dataclasses.replace(source(long, short), text_chunks=chunks)) for chunks in (1, 2)
    )
    assert condition.text_tokens(long) == (8, 6)
    assert two["context"].shape == (2, 16, 32)
    parts = condition.encode(["red blue green red blue green", "red blue", "red", ""])["context"]
    torch.testing.assert_close(two["context"][0], parts[:2].flatten(0, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two["context"][1], parts[2:].flatten(0, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two["pooled"], one["pooled"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two["null_context"][1], parts[[3, 3]].flatten(0, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two["null_pooled"], one["null_pooled"])


def test_a_move_renews_the_empty_prompt() -> None:
    condition = build()
    assert condition.null()["context"].dtype == torch.float32
    condition.to("cpu", torch.bfloat16)
    assert condition.null()["context"].dtype == torch.bfloat16
    assert condition.prepare(source("red"))["context"].dtype == torch.bfloat16


def test_context_comes_from_the_named_layer() -> None:
    contexts = [
        build(**changes).encode(["a red circle"])["context"]
        for changes in ({"layer": "last"}, {"layer": "penultimate"}, {"final_norm": False})
    ]
    for i, first in enumerate(contexts):
        for second in contexts[:i]:
            assert not torch.allclose(first, second, atol=1e-3)
    pooled = build(pooled=True)  # keeps the last block, and still gives the penultimate context
    torch.testing.assert_close(pooled.encode(["a red circle"])["context"], contexts[1], rtol=1e-4, atol=1e-5)


def test_what_is_never_read_is_not_built() -> None:
    with torch.device("meta"):
        count = {
            name: sum(p.numel() for p in OpenCLIP(config, FirstStageConfig(), 0).tower.parameters())
            for name, config in {
                "penultimate": OpenCLIPConfig(),
                "whole": OpenCLIPConfig(pooled=True),
            }.items()
        }
    block, projection = 12_596_224, 1024 * 1024
    assert count["whole"] == 354_032_640  # SD2's OpenCLIP-H text tower as published, 354.03 M
    assert count["whole"] - count["penultimate"] == block + projection


def stored(tmp_path: Path, prefix: str, extra: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    tower = build_tower(TOWER, _model(), seed=7)
    weights = {name: torch.randn_like(value) for name, value in tower.state_dict().items()}
    url = str(tmp_path / "tower.safetensors")
    write_weights(url, {**{prefix + name: value for name, value in weights.items()}, **extra}, {})
    return weights, url


def _model() -> dict[str, Any]:
    from trainer.conditioning.open_clip_towers import architecture

    return architecture(TOWER)


@pytest.mark.parametrize("prefix", ["", "text.", "cond_stage_model.model.", "conditioner.embedders.1.model."])
@pytest.mark.parametrize("form", ["safetensors", "torch", "url"])
def test_weights_are_found_in_whole_checkpoints(tmp_path: Path, prefix: str, form: str) -> None:
    extra = {"visual.conv1.weight": torch.zeros(2), "logit_scale": torch.zeros(1)}
    weights, url = stored(tmp_path, prefix, extra)
    if form == "torch":
        url = str(tmp_path / "tower.pt")
        torch.save({"state_dict": {prefix + k: v for k, v in weights.items()} | extra, "step": 3}, url)
    elif form == "url":
        url = f"file://{url}"
    tower = build_tower(TOWER, _model(), seed=0)
    load_tower(tower, url)
    for name, value in tower.state_dict().items():
        assert torch.equal(value, weights[name])


def test_misfits_are_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    weights, url = stored(tmp_path, "", {})
    del weights["ln_final.bias"]
    weights["token_embedding.weight"] = torch.zeros(9, 32)
    write_weights(url, weights, {})
    tower = build_tower(TOWER, _model(), seed=0)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    with pytest.raises(ConfigError, match=r"1 tensors missing.*1 of another") as error:
        load_tower(tower, url)
    assert "ln_final.bias" in str(error.value)
    assert "token_embedding.weight is (9, 32) and should be (49408, 32)" in str(error.value)
    for name, value in tower.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_file_that_is_no_weights_file_is_refused(tmp_path: Path) -> None:
    tower = build_tower(TOWER, _model(), seed=0)
    for name in ("broken.pt", "broken.safetensors"):
        path = tmp_path / name
        path.write_bytes(b"not weights at all")
        with pytest.raises(ConfigError, match=name):
            load_tower(tower, str(path))


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"state_dict": {}, "code": Path}, path)  # a class needs unpickling code
    with pytest.raises(ConfigError, match=r"evil\.pt"):
        load_tower(build_tower(TOWER, _model(), seed=0), str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "ViT-H14"}, "ViT-H-14"),
        ({"model": "ViT-B-16-SigLIP"}, "Hugging Face"),
        ({"heads": 5}, "divisor"),
        ({"layers": 1}, "layer=last"),
    ],
)
def test_impossible_towers_are_refused_with_a_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)


def test_an_unknown_tag_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="laion2b_s32b_b79k"):
        weights_file("ViT-H-14", "laion_3b")


@pytest.mark.parametrize("model", ["ViT-L-14", "ViT-B-32"])
def test_a_new_run_refuses_weights_that_want_another_activation(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tower(name: str, pretrained: str) -> ConditioningConfig:
        return ConditioningConfig(openclip_second=OpenCLIPConfig(model=name, pretrained=pretrained))

    for tag in ("openai", "metaclip_400m"):
        with pytest.raises(ConfigError, match=f"QuickGELU.*openclip_second.model={model}-quickgelu,"):
            require_activations(tower(model, tag))
        require_activations(tower(f"{model}-quickgelu", tag))
    require_activations(tower(model, "datacomp_xl_s13b_b90k"))
    require_activations(tower(model, "random"))
    require_activations(tower(f"{model}-quickgelu", "openia"))  # no tag, which is told when it is looked for
    require_activations(ConditioningConfig())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").touch()  # a file, which says nothing of it
    require_activations(tower(model, "openai"))


def test_a_run_that_goes_on_keeps_its_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> str:
        raise ConfigError("what it was trained with is read")

    monkeypatch.setattr("trainer.conditioning.open_clip_towers.weights_file", read)
    tower = "conditioning.openclip={model: ViT-L-14, pretrained: openai}"
    config = load_config(None, ["first_stage.name=identity", tower])
    timers: Any = SimpleNamespace(device=torch.device("cpu"))
    for resumes, said in ((None, "QuickGELU"), (timers, "is read")):
        with pytest.raises(ConfigError, match=said):
            build_stage(config, timers, timers, timers, resumes)


def test_whoever_reads_weights_asks_the_hub_and_has_the_file(tmp_path: Path) -> None:
    """As on ranks, of which one reads: a tower needs the hub, and the file, only where its reader is."""
    stored = build_tower(TOWER, _model(), seed=3)
    write_weights(str(tmp_path / "file.safetensors"), stored.state_dict(), {})
    asked = []

    def elsewhere(read: Callable[[], T]) -> T:
        asked.append(read)
        with read_alone():
            # The first question is for a place, the second for what lies there.
            value: Any = "laion2b_s34b_b79k.bin" if len(asked) == 1 else read_tensors(file)
        return value

    file = str(tmp_path / "file.safetensors")
    with read_through(elsewhere):
        config = dataclasses.replace(TOWER, pretrained="laion2b_s34b_b79k")
        tower = build_tower(config, _model(), seed=0)
    assert len(asked) == 2
    assert all(torch.equal(value, stored.state_dict()[name]) for name, value in tower.state_dict().items())


def test_a_tower_with_weights_draws_none_and_keeps_its_mask(tmp_path: Path) -> None:
    weights, url = stored(tmp_path, "", {})
    mask = build_tower(TOWER, _model(), seed=0).attn_mask
    with _Calls() as calls:
        tower = build_tower(dataclasses.replace(TOWER, pretrained=url), _model(), seed=0)
    assert not calls.functions & {Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.kaiming_uniform_}
    for name, value in tower.state_dict().items():
        assert torch.equal(value, weights[name])
    assert torch.equal(tower.attn_mask, mask)
    with _Calls() as calls:
        build_tower(TOWER, _model(), seed=0)
    assert nn.init.normal_ in calls.functions


class _Calls(TorchFunctionMode):
    """Which functions of torch are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.add(func)
        return func(*args, **(kwargs or {}))


def test_a_random_tower_is_the_same_whatever_the_default_generator_and_device() -> None:
    drawn = build_tower(TOWER, _model(), seed=5).state_dict()
    with torch.device("cpu"):
        torch.manual_seed(1)
        again = build_tower(TOWER, _model(), seed=5).state_dict()
    assert all(torch.equal(drawn[name], value) for name, value in again.items())


def test_open_clip_comes_without_what_only_other_towers_need() -> None:
    code = "import sys, trainer.conditioning.openclip; print({'timm', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
