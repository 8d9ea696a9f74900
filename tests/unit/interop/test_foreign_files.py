"""Weight files as other programs leave them: read where that is plain, else one sentence on what they are."""

from __future__ import annotations

import argparse
import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from data_pipeline.storage.files import write_bytes
from trainer.__main__ import main
from trainer.checkpoint.export import open_weights
from trainer.cli import evaluate
from trainer.config.models import FirstStageConfig, UNetConfig
from trainer.config.run import Config, ConfigError
from trainer.first_stage.build import build_first_stage, load_first_stage
from trainer.interop.convert import import_weights
from trainer.interop.export import export_weights
from trainer.interop.unet_names import UNetSizes
from trainer.weights import read_metadata, read_tensors, read_weights

FIRST_STAGE = FirstStageConfig(
    base_channels=8, channel_multipliers=(1, 2), num_groups=4, latent_scale=0.18215
)
CONFIG = Config(
    unet=UNetConfig(
        model_channels=16, channel_multipliers=(1, 2), attention_factors=(2,), head_dim=8, num_groups=4
    ),
    first_stage=FIRST_STAGE,
)
WRAPPED = (
    "_orig_mod.{}",
    "module.{}",
    "module._orig_mod.{}",
    "_orig_mod.module.{}",
    "_fsdp_wrapped_module.{}",
)


@pytest.fixture(scope="module")
def stage() -> dict[str, Tensor]:
    """A KL autoencoder in diffusers' names, which are ours."""
    torch.manual_seed(0)
    network = build_first_stage(FIRST_STAGE).state_dict()
    return {name: torch.randn(t.shape) for name, t in network.items() if not name.startswith("lat")}


def save(path: Path, tensors: dict[str, Any]) -> str:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return str(path)


def imported(source: str, folder: Path, config: Config | None = CONFIG) -> dict[str, Tensor]:
    import_weights(source, str(folder), config)
    tensors = read_weights(str(folder / "first_stage.safetensors"))[0]
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("lat")}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(left) == set(right)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("wrapped", [*WRAPPED, "vae.{}", "model.autoencoder.{}"])
def test_prefixes_of_wrappers_are_left_out(
    wrapped: str, ending: str, stage: dict[str, Tensor], tmp_path: Path
) -> None:
    source = save(tmp_path / f"model.{ending}", {wrapped.format(n): t for n, t in stage.items()})
    assert_same(imported(source, tmp_path / "there"), stage)


def test_a_wrapper_in_the_middle_of_names_and_a_chosen_tensor(tmp_path: Path) -> None:
    names = ("model._orig_mod.diffusion_model.a", "model._orig_mod.diffusion_model.b")
    file = save(tmp_path / "model.safetensors", {name: torch.ones(1) for name in names})
    for url in (file, file.replace(str(tmp_path), f"memory://{tmp_path}")):
        write_bytes(url, Path(file).read_bytes())
        assert sorted(read_tensors(url)) == ["model.diffusion_model.a", "model.diffusion_model.b"]
        assert list(read_tensors(url, lambda found: sorted(found)[1:])) == ["model.diffusion_model.b"]


def test_names_that_would_collide_stay_as_they_are(tmp_path: Path) -> None:
    tensors = {"_orig_mod.a": torch.ones(1), "a": torch.zeros(1)}
    assert set(read_tensors(save(tmp_path / "x.safetensors", tensors))) == set(tensors)


def test_an_averaged_model_of_torch_is_read(stage: dict[str, Tensor], tmp_path: Path) -> None:
    file = save(
        tmp_path / "ema.pt", {"n_averaged": torch.tensor(7)} | {f"module.{n}": t for n, t in stage.items()}
    )
    assert_same(imported(file, tmp_path / "there"), stage)


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1.0}]}


@pytest.mark.parametrize(
    "keys", ["module", "model_state_dict", "ema", "state.model", "anything", "state_dict", "ema_model"]
)
def test_nested_dictionaries_are_opened(keys: str, stage: dict[str, Tensor], tmp_path: Path) -> None:
    content: Any = stage
    for key in reversed(keys.split(".")):
        content = {key: content, "optimizer": OPTIMIZER, "step": torch.tensor(7), "args": {"lr": 0.1}}
    assert_same(imported(save(tmp_path / "x.pt", content), tmp_path / "there"), stage)


def test_weights_go_before_their_average_and_that_is_said(
    stage: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    average = {name: tensor + 1 for name, tensor in stage.items()}
    file = save(tmp_path / "x.pt", {"ema": average, "model": stage, "opt": OPTIMIZER})
    assert_same(read_tensors(file), stage)
    assert f"read model ({len(stage)} tensors); left: ema ({len(stage)} tensors)" in caplog.text
    save(tmp_path / "x.pt", {"ema": average, "opt": OPTIMIZER})
    assert_same(read_tensors(file), average)
    assert "which is an average (EMA)" in caplog.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"generator": {"a": torch.ones(1)}, "disc": {"a": torch.ones(1)}},
            r"several .* generator \(1 tensors\)",
        ),
        ({"step": 7, "args": {"lr": 1.0}}, r"no dictionary of tensors; its entries are step, args"),
        ([torch.ones(1)], "no dictionary of tensors but a list"),
        (torch.ones(1), "no dictionary of tensors but a Tensor"),
        ({}, "its entries are none"),
    ],
)
def test_what_is_in_a_file_is_said(content: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        read_tensors(save(tmp_path / "x.pt", content))


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x.pt", "x.bin"])
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\n<!DOCTYPE html><html>sign in</html>", "a web page"),
        (b"<HTML>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"/annex/objects/SHA256E-s1--0.ckpt\n", "git annex get"),
        (b"<?xml version='1.0'?><Error/>", "XML"),
        (b'{"error": "gone"}', "JSON"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"", "is empty"),
        (b"\0" * 4096, "is empty"),
        (b"Entry not found", "begins with b'Entry not found'"),
        (b"PK\x03\x04 and no more", "cut short"),
        (struct.pack("<Q", 1000) + b'{"a":', "cut short"),
        (b"\x80\x02\x8a", "cut short|holds more"),
    ],
)
def test_what_is_no_weights_file_is_told_by_its_content(
    name: str, data: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=said):
        read_tensors(str(tmp_path / name))
    with pytest.raises(ConfigError):
        read_weights(str(tmp_path / name))


def test_a_file_is_read_by_what_it_is_and_not_by_its_name(stage: dict[str, Tensor], tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", stage)
    (tmp_path / "a.safetensors").rename(tmp_path / "a.ckpt")
    assert_same(read_tensors(str(tmp_path / "a.ckpt")), stage)
    save(tmp_path / "b.pt", stage)
    (tmp_path / "b.pt").rename(tmp_path / "b.safetensors")
    assert_same(read_tensors(str(tmp_path / "b.safetensors")), stage)
    with pytest.raises(ConfigError, match="torch file; convert it with `ldm import`"):
        read_weights(str(tmp_path / "b.safetensors"))


def with_header(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0\0\x80\x3f"


@pytest.mark.parametrize("extra", [None, {}])
def test_metadata_may_be_null(extra: Any, tmp_path: Path) -> None:
    header = {"__metadata__": extra, "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    file = tmp_path / "x.safetensors"
    file.write_bytes(with_header(header))
    assert read_weights(str(file)) == ({"w": torch.ones(1)}, {})
    assert read_metadata(str(file)) == {}


@pytest.mark.parametrize("text", ["{cut", "[1]", "null", "[" * 100_000])
def test_metadata_that_is_no_json_is_one_sentence(
    text: str, stage: dict[str, Tensor], tmp_path: Path
) -> None:
    file = str(tmp_path / "first_stage.safetensors")
    safetensors.torch.save_file(stage, file, {"first_stage": text, "config": text})
    with pytest.raises(ConfigError, match="first_stage in its metadata that is no JSON"):
        load_first_stage(dataclasses.replace(FIRST_STAGE, weights=file))
    with pytest.raises(ConfigError, match="config in its metadata that is no JSON"):
        evaluate.run(evaluate_arguments(file))
    safetensors.torch.save_file(stage, file)
    with pytest.raises(ConfigError, match="does not describe its first stage"):
        evaluate.run(evaluate_arguments(file))


def evaluate_arguments(file: str) -> Any:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    return parser.parse_args(["reconstruction", file, "--shards", "none", "--perceptual-weights", "none"])


@pytest.mark.parametrize("name", ["vae.pt", "vae.ckpt", "vae.bin"])
def test_a_file_of_another_program_as_first_stage_or_start(
    name: str, stage: dict[str, Tensor], tmp_path: Path
) -> None:
    file = save(tmp_path / name, stage)
    with pytest.raises(ConfigError, match="ldm import"):
        load_first_stage(dataclasses.replace(FIRST_STAGE, weights=file))
    with pytest.raises(ConfigError, match="ldm import"):
        open_weights(file)


def test_double_precision_becomes_single_and_no_folder_is_half_written(
    stage: dict[str, Tensor], tmp_path: Path
) -> None:
    unet = UNetSizes(4, 4, 16).build(CONFIG.unet).state_dict()
    ours = {f"unet.{n}": torch.randn(t.shape) for n, t in unet.items()}
    ours |= {f"first_stage.{n}": t for n, t in stage.items()}
    file = str(tmp_path / "model.safetensors")
    export_weights(ours, file, CONFIG, "compvis")
    single = read_tensors(file)
    save(tmp_path / "model.safetensors", {n: t.double() for n, t in single.items()})
    read = imported(file, tmp_path / "there")
    assert_same(read, stage)
    assert {t.dtype for t in read.values()} == {torch.float32}


OLD = {"group_norm": "group_norm", "to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
SHORT = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("words", [OLD, SHORT, {word: word for word in OLD}])
@pytest.mark.parametrize("layout", ["diffusers", "compvis"])
def test_attention_of_either_kind_by_any_name_in_either_layout(
    layout: str, words: dict[str, str], convolution: bool, stage: dict[str, Tensor], tmp_path: Path
) -> None:
    file = str(tmp_path / "model.safetensors")
    tensors = stage
    if layout == "compvis":
        export_weights({f"first_stage.{n}": t for n, t in stage.items()}, file, CONFIG, "compvis")
        prefix = "first_stage_model."
        tensors = {n.removeprefix(prefix): t for n, t in read_tensors(file).items() if n.startswith(prefix)}
    theirs = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        for usual in (SHORT if layout == "compvis" else OLD).keys() if ".attentions." in name else ():
            if stem.endswith(f".{usual}"):
                stem = stem.removesuffix(usual) + words[usual]
                break
        for usual, short in SHORT.items() if ".attn_1." in name else ():
            if stem.endswith(f".{short}"):
                stem = stem.removesuffix(short) + words[usual]
                break
        if (".attentions." in name or ".attn_1." in name) and kind == "weight" and tensor.dim() > 1:
            matrix = tensor.reshape(tensor.shape[:2])
            tensor = matrix[:, :, None, None] if convolution else matrix
        theirs[f"{stem}.{kind}"] = tensor.contiguous()
    assert_same(imported(save(tmp_path / "old.safetensors", theirs), tmp_path / "there"), stage)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "SD3.*UNets"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux.*UNets"),
        ("transformer_blocks.0.attn.add_k_proj.weight", "SD3, Flux"),
        ("lora_unet_down_blocks_0.lora_up.weight", "LoRA"),
        ("unet.conv_in.lora_A.weight", "LoRA"),
        ("control_model.zero_convs.0.0.weight", "ControlNet"),
        ("some.weight", r"its first tensors are some\.weight"),
    ],
)
def test_networks_of_other_kinds_are_named(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        import_weights(
            save(tmp_path / "x.safetensors", {name: torch.ones(2, 2)}), str(tmp_path / "to"), CONFIG
        )
    assert not (tmp_path / "to").exists()


def test_an_average_alone_is_said(tmp_path: Path) -> None:
    name = "model_ema.diffusion_modelinput_blocks00weight"
    with pytest.raises(ConfigError, match="average alone"):
        import_weights(save(tmp_path / "ema.ckpt", {name: torch.ones(1)}), str(tmp_path / "to"), CONFIG)


@pytest.fixture
def folder(stage: dict[str, Tensor], tmp_path: Path) -> Path:
    """A pipeline of diffusers."""
    unet = UNetSizes(4, 4, 16).build(CONFIG.unet).state_dict()
    ours = {f"unet.{n}": torch.randn(t.shape) for n, t in unet.items()}
    ours |= {f"first_stage.{n}": t for n, t in stage.items()}
    export_weights(ours, str(tmp_path / "pipeline"), CONFIG, "diffusers")
    return tmp_path / "pipeline"


VARIANTS = (
    ("diffusion_pytorch_model.fp16.safetensors", None),
    ("diffusion_pytorch_model.bf16.safetensors", None),
    ("diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
    (
        "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
    ),
    (
        "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
    ),
)


@pytest.mark.parametrize(("file", "index"), VARIANTS)
def test_variants_of_a_folder_are_read(
    file: str, index: str | None, folder: Path, stage: dict[str, Tensor], tmp_path: Path
) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    weights.unlink()
    if index is None:
        save(weights.with_name(file), tensors)
    else:
        other = file.replace("00001-of", "00002-of")
        halves = (list(tensors)[::2], list(tensors)[1::2])
        for name, part in zip((file, other), halves, strict=True):
            save(weights.with_name(name), {n: tensors[n] for n in part})
        places = {n: name for name, part in zip((file, other), halves, strict=True) for n in part}
        weights.with_name(index).write_text(json.dumps({"weight_map": places}))
    assert_same(imported(str(folder), tmp_path / "there"), stage)


@pytest.mark.parametrize(
    "text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": "../b.safetensors"}}', "{cut"]
)
def test_an_index_that_names_no_files_is_one_sentence(text: str, folder: Path, tmp_path: Path) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("elsewhere"))
    weights.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match=r"weight_map|is not JSON"):
        imported(str(folder), tmp_path / "there")


BROKEN: tuple[tuple[str, str, Any], ...] = (
    *((part, key, ...) for part in ("unet", "vae") for key in ("block_out_channels", "down_block_types")),
    ("unet", "in_channels", ...),
    ("unet", "attention_head_dim", None),
    ("unet", "attention_head_dim", [2, None]),
    ("unet", "attention_head_dim", [2, 2, 2]),
    ("unet", "attention_head_dim", 0),
    ("unet", "block_out_channels", [16, "32"]),
    ("unet", "block_out_channels", []),
    ("unet", "block_out_channels", 16),
    ("unet", "down_block_types", ["DownBlock2D"]),
    ("unet", "layers_per_block", [2, 2]),
    ("unet", "norm_num_groups", None),
    ("unet", "cross_attention_dim", None),
    ("vae", "scaling_factor", "0.18"),
    ("vae", "scaling_factor", 0),
    ("vae", "latent_channels", None),
    ("vae", "latents_std", [0.0, 1.0, 1.0, 1.0]),
    ("vae", "latents_mean", [1.0]),
)


@pytest.mark.parametrize(("part", "key", "value"), BROKEN)
def test_configurations_that_are_incomplete_are_one_sentence(
    part: str, key: str, value: Any, folder: Path, tmp_path: Path
) -> None:
    path = folder / part / "config.json"
    config = json.loads(path.read_text())
    config.pop(key, None)
    path.write_text(json.dumps(config if value is ... else config | {key: value}))
    with pytest.raises(ConfigError, match=key):
        import_weights(str(folder), str(tmp_path / "there"), None)
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_configurations_that_are_cut_are_one_sentence(part: str, folder: Path, tmp_path: Path) -> None:
    path = folder / part / "config.json"
    text = path.read_text()
    for size in range(0, len(text) - 2, 97):
        path.write_text(text[:size])
        with pytest.raises(ConfigError, match="cut short"):
            import_weights(str(folder), str(tmp_path / "there"), None)


@pytest.mark.parametrize("prefix", ["cond_stage_model.transformer.", ""])
def test_a_tower_without_text_model_in_its_names(prefix: str, tmp_path: Path) -> None:
    width = 4
    ends = {
        "embeddings.token_embedding.weight": (9, width),
        "embeddings.position_embedding.weight": (7, width),
        "final_layer_norm.weight": (width,),
        "final_layer_norm.bias": (width,),
    }
    layer = {f"self_attn.{p}_proj": (width, width) for p in ("q", "k", "v", "out")}
    layer |= {"mlp.fc1": (8, width), "mlp.fc2": (width, 8), "layer_norm1": (width,), "layer_norm2": (width,)}
    shapes: dict[str, tuple[int, ...]] = dict(ends)
    for name, shape in layer.items():
        shapes |= {f"encoder.layers.0.{name}.weight": shape, f"encoder.layers.0.{name}.bias": shape[:1]}
    tensors = {f"{prefix}{name}": torch.randn(shape) for name, shape in shapes.items()}
    extra = {"first_stage_model.x": torch.ones(1)} if prefix else {}
    source = save(tmp_path / "x.safetensors", tensors | extra)
    if prefix:
        source = save(tmp_path / "x.safetensors", tensors | {"model_ema.decay": torch.ones(())})
    import_weights(source, str(tmp_path / "there"), None)
    tower = read_weights(str(tmp_path / "there/text_encoder.safetensors"))[0]
    assert torch.equal(tower["ln_final.bias"], tensors[f"{prefix}final_layer_norm.bias"])
    stacked = [tensors[f"{prefix}encoder.layers.0.self_attn.{p}_proj.bias"] for p in "qkv"]
    assert torch.equal(tower["transformer.resblocks.0.attn.in_proj_bias"], torch.cat(stacked))


def refused(source: str, folder: Path) -> str:
    """The sentence; nothing is written."""
    with pytest.raises(ConfigError) as caught:
        import_weights(source, str(folder), CONFIG)
    assert not folder.exists()
    return str(caught.value)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.to(torch.int8), "int8 where weights belong"),
        (lambda t: t.to(torch.uint8), "uint8 where weights belong"),
        (lambda t: t.to(torch.complex64), "complex64 where weights belong"),
        (lambda t: t * float("nan"), "NaN or infinity"),
        (lambda t: (t.abs() + 1e6).half(), "NaN or infinity"),
    ],
)
def test_what_no_trained_network_holds_is_no_weights(
    change: Any, sentence: str, ending: str, stage: dict[str, Tensor], tmp_path: Path
) -> None:
    name = "encoder.conv_in.weight"
    source = save(tmp_path / f"model.{ending}", stage | {name: change(stage[name])})
    assert sentence in refused(source, tmp_path / "there")


def test_tensors_that_are_sparse_are_written_out_and_empty_ones_refused(
    stage: dict[str, Tensor], tmp_path: Path
) -> None:
    sparse = {name: t.to_sparse() if t.dim() == 1 else t for name, t in stage.items()}
    assert_same(imported(save(tmp_path / "x.pt", sparse), tmp_path / "there"), stage)
    meta = {name: t.to("meta") for name, t in stage.items()}
    assert "was saved on the meta device" in refused(save(tmp_path / "y.pt", meta), tmp_path / "meta")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_autoencoder_with_an_average_of_its_own(
    prefix: str, stage: dict[str, Tensor], tmp_path: Path
) -> None:
    """As CompVis' AutoencoderKL writes it with ema_decay: the average has lost its dots."""
    average = {f"model_ema.{name.replace('.', '')}": t + 1 for name, t in stage.items()}
    whole = stage | average | {"model_ema.decay": torch.tensor(0.999), "loss.logvar": torch.zeros(())}
    source = save(tmp_path / "x.ckpt", {"state_dict": {prefix + name: t for name, t in whole.items()}})
    assert_same(imported(source, tmp_path / "there"), stage)


def test_a_file_of_which_nothing_is_taken_is_refused(tmp_path: Path) -> None:
    others = {
        "first_stage_model.loss.logvar": torch.zeros(2),
        "first_stage_model.model_ema.decay": torch.zeros(1),
    }
    assert "nothing was taken" in refused(save(tmp_path / "x.safetensors", others), tmp_path / "there")


def test_a_folder_or_configuration_from_a_variable_that_is_not_set(
    stage: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "x.safetensors", stage)
    for arguments, sentence in (
        (["", "--config", "c.yaml"], "FOLDER is empty"),
        (["there", "--config", ""], "cannot read"),
    ):
        assert main(["import", source, *arguments]) == 2
        assert sentence in capsys.readouterr().err
