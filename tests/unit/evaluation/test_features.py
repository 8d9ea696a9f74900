"""Feature networks give what the programs they stand for give, and say which file is missing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from trainer.__main__ import main
from trainer.config.run import ConfigError
from trainer.evaluation.features import FeatureNetwork, weights_digest
from trainer.evaluation.networks import FeatureOptions, build_networks

CPU = torch.device("cpu")


def pictures(count: int, edge: int) -> list[NDArray[np.uint8]]:
    generator = np.random.default_rng(edge)
    return [generator.integers(0, 256, (edge, edge, 3), dtype=np.uint8) for _ in range(count)]


def seen(
    network: FeatureNetwork, given: list[NDArray[np.uint8]], captions: tuple[str, ...] = ()
) -> dict[str, Any]:
    with torch.no_grad():
        outputs = network([network.prepare(picture) for picture in given], captions or ("",) * len(given))
    assert {name: value.shape[1] for name, value in outputs.items()} == dict(network.widths)
    return outputs


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """torch-fidelity's own network with random weights, and a file of them."""
    extractor = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="pip install torch-fidelity"
    ).FeatureExtractorInceptionV3

    class Unloaded(extractor):  # type: ignore[misc, valid-type]
        def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
            """Keep the random weights."""

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    network = Unloaded("inception-v3-compat", ["2048", "logits_unbiased"], str(folder / "empty.pth"))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), folder / "weights.pth")
    return network.eval(), str(folder / "weights.pth")


def inception(theirs: tuple[Any, str], **options: Any) -> FeatureNetwork:
    return build_networks(FeatureOptions(inception_weights=theirs[1], **options), CPU)["inception"]


def test_inception_equals_torch_fidelity(theirs: tuple[Any, str]) -> None:
    network = inception(theirs)
    given = pictures(2, 40)
    batch = torch.from_numpy(np.stack(given)).permute(0, 3, 1, 2)
    branch: list[torch.Tensor] = []
    hook = theirs[0].Mixed_6d.branch1x1.register_forward_hook(lambda *call: branch.append(call[2]))
    with torch.no_grad():
        pool, logits = theirs[0](batch)
    hook.remove()
    found = seen(network, given)
    torch.testing.assert_close(found["pool"], pool, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["logits"], logits, rtol=1e-5, atol=1e-6)
    # as guided diffusion has it of a TensorFlow map, whose channels are last
    spatial = branch[0].permute(0, 2, 3, 1).numpy()[..., :7].reshape(2, -1)
    np.testing.assert_allclose(found["spatial"].numpy(), spatial, rtol=1e-5, atol=1e-6)
    # pictures of several sizes in one block are what they are alone
    mixed = seen(network, [given[0], *pictures(1, 33)])
    torch.testing.assert_close(mixed["pool"][0], pool[0], rtol=1e-5, atol=1e-6)
    assert network.digest == weights_digest(theirs[0])
    assert "torch-fidelity" in network.name


@pytest.mark.slow  # eigenvalues of 2048 x 2048, ours and theirs
def test_figures_equal_those_of_torch_fidelity_for_the_same_folders(
    theirs: tuple[Any, str], tmp_path: Path
) -> None:
    from torch_fidelity import calculate_metrics

    for name, ending, edge in (("made", "png", 40), ("real", "jpg", 48)):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(pictures(12, edge)):
            Image.fromarray(picture // (1 + i % 3)).save(tmp_path / name / f"{i}.{ending}")
    out = tmp_path / "figures.json"
    command = ["evaluate", "fidelity", str(tmp_path / "made"), "--reference", str(tmp_path / "real")]
    options = [
        "--inception-weights",
        theirs[1],
        "--metrics",
        "fid,kid,is,precision,recall",
        "--out",
        str(out),
    ]
    assert main([*command, *options]) == 0
    ours = json.loads(out.read_text())["figures"]
    expected = calculate_metrics(
        input1=str(tmp_path / "made"),
        input2=str(tmp_path / "real"),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=theirs[1],
        **dict.fromkeys(("isc", "fid", "kid", "prc", "save_cpu_ram"), True),
        **dict.fromkeys(("cuda", "cache", "verbose"), False),
        kid_subset_size=12,
    )
    assert ours["is"] == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert ours["is_deviation"] == pytest.approx(expected["inception_score_std"], rel=1e-4, abs=1e-6)
    assert ours["kid"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert ours["precision"] == pytest.approx(expected["precision"], abs=1e-6)
    assert ours["recall"] == pytest.approx(expected["recall"], abs=1e-6)
    # of 12 pictures in 2048 dimensions, theirs takes roots of what rounding leaves of 2037 zeros
    assert ours["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)


def test_each_program_has_its_way_to_299(theirs: tuple[Any, str]) -> None:
    given = pictures(1, 600)[0]
    x = torch.from_numpy(given).permute(2, 0, 1)[None].float()
    direct = F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    planes = [Image.fromarray(given[:, :, i].astype(np.float32), mode="F") for i in range(3)]
    smooth = np.stack([np.asarray(plane.resize((299, 299), Image.Resampling.BICUBIC)) for plane in planes])
    smooth = smooth.clip(0, 255)
    expected = {"pytorch-fid": direct, "clean-fid": (torch.from_numpy(smooth)[None] - 128) / 128}
    pools = {}
    for way, pixels in expected.items():
        network = inception(theirs, resizing=way)
        pools[way] = seen(network, [given])["pool"]
        with torch.no_grad():
            torch.testing.assert_close(pools[way], network.outputs(pixels)["pool"])  # type: ignore[attr-defined]
        assert network.sees == f"{way} at 299" + (", clipped" if way == "clean-fid" else "")
    pools["torch-fidelity"] = seen(inception(theirs), [given])["pool"]
    values = list(pools.values())
    assert all(not torch.allclose(values[i], values[i - 1], rtol=1e-3) for i in range(3))


def test_missing_weights_are_one_sentence_that_says_what_to_bring_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "set").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "set" / "x.png")
    command = ["evaluate", "fidelity", str(tmp_path / "set"), "--reference", str(tmp_path / "set")]
    wanted = {
        "inception": (
            "weights-inception-2015-12-05-6726825d.pth",
            str(tmp_path / "torch"),
            "--inception-weights",
        ),
        "dinov2": ("dinov2_vitl14_pretrain.pth", "--dinov2-weights"),
        "clip": ("cannot download", "--clip-weights, with --clip-model ViT-L-14-336-quickgelu"),
    }
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for family, words in wanted.items():
        capsys.readouterr()
        assert main([*command, "--features", family]) == 2, family
        error = capsys.readouterr().err
        assert len([line for line in error.splitlines() if line.startswith("ldm: ")]) == 1
        for word in words:
            assert word in error, (family, error)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity", reason="pip install torch-fidelity")
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    for options in (
        FeatureOptions(inception_weights=str(tmp_path / "other.safetensors")),
        FeatureOptions(families=("dinov2",), dinov2_weights=str(tmp_path / "other.safetensors")),
        FeatureOptions(
            ("clip",), clip_model="ViT-S-32-alt", clip_weights=str(tmp_path / "other.safetensors")
        ),
    ):
        with pytest.raises(ConfigError, match=r"other\.safetensors does not fit"):
            build_networks(options, CPU)


def test_clip_equals_open_clip(tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt").eval()
    save_file(model.state_dict(), tmp_path / "clip.safetensors")
    options = FeatureOptions(
        ("clip",), clip_model="ViT-S-32-alt", clip_weights=str(tmp_path / "clip.safetensors")
    )
    network = build_networks(options, CPU)["clip"]
    given = [*pictures(1, 224), *pictures(1, 300)]
    preprocess = open_clip.image_transform(224, is_train=False)
    captions = ("a red circle", "")
    with torch.no_grad():
        batch = torch.stack([preprocess(Image.fromarray(picture)) for picture in given])
        images = F.normalize(model.encode_image(batch), dim=1)
        text = F.normalize(model.encode_text(open_clip.tokenize([captions[0]])), dim=1)
    found = seen(network, given, captions)
    torch.testing.assert_close(found["embedding"], images, rtol=1e-4, atol=1e-5)
    assert found["score"].shape == (1, 1), "a picture without a caption has no score"
    torch.testing.assert_close(found["score"][0, 0], (images[0] * text[0]).sum(), rtol=1e-4, atol=1e-5)
    assert len(network.details["text_sha256"]) == 64
    without = build_networks(FeatureOptions(**{**vars(options), "clip_text": False}), CPU)["clip"]
    assert (without.digest, dict(without.details)) == (network.digest, {})


def test_dinov2_takes_metas_file(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="pip install timm")
    name, file = "vit_small_patch14_dinov2", str(tmp_path / "dinov2.pth")
    options = FeatureOptions(("dinov2",), dinov2_model=name, dinov2_weights=file)
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=0, img_size=224).eval()
    mask_token = {"mask_token": torch.zeros(1, 384)}  # which only training needs
    torch.save(model.state_dict() | mask_token, file)
    given = pictures(1, 224)[0]
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((torch.from_numpy(given).float() / 255 - mean) / deviation).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = model(x)
    found = seen(build_networks(options, CPU)["dinov2"], [given])["pool"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # Meta's has positions for 518 pixels, 37 x 37 of them, which are brought to 16 x 16
    grid = np.random.default_rng(0).normal(size=(37, 37, 384))
    positions = torch.cat([model.pos_embed[:, :1], torch.from_numpy(grid).float().view(1, -1, 384)], dim=1)
    torch.save(model.state_dict() | mask_token | {"pos_embed": positions}, file)
    network = build_networks(options, CPU)["dinov2"]
    found = network._network.pos_embed  # type: ignore[attr-defined]
    along = cubic(37, 16, scale=(16 + 0.1) / 37)
    wanted = np.einsum("yh,xw,hwd->yxd", along, along, grid).reshape(1, -1, 384)
    np.testing.assert_allclose(found[:, 1:].numpy(), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[:, :1], model.pos_embed[:, :1])
    assert network.sees == "squashed by Pillow's bicubic to 224, positions not antialiased"


def cubic(old: int, new: int, scale: float) -> NDArray[np.float64]:
    """[new, old]: Keys's cubic convolution with a = -0.75 from the nearest four, the border repeated."""
    a, weights = -0.75, np.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) / scale - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            t = abs(place - j)
            near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
            weights[i, min(max(j, 0), old - 1)] += near if t <= 1 else far
    return weights


def test_dinov2_with_registers_has_antialiased_positions_as_metas_has(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="pip install timm")
    name, file = "vit_small_patch14_reg4_dinov2", str(tmp_path / "dinov2.pth")
    model = timm.create_model(name, pretrained=False, num_classes=0, img_size=518)
    stored = model.state_dict()
    class_position = torch.randn(1, 1, 384)
    stored["register_tokens"] = stored.pop("reg_token")  # Meta's names and form
    stored["pos_embed"] = torch.cat([class_position, torch.randn(1, 37 * 37, 384)], dim=1)
    torch.save(stored | {"mask_token": torch.zeros(1, 384)}, file)
    options = FeatureOptions(("dinov2",), dinov2_model=name, dinov2_weights=file)
    network = build_networks(options, CPU)["dinov2"]
    found = network._network.pos_embed  # type: ignore[attr-defined]
    grid = stored["pos_embed"][:, 1:].view(1, 37, 37, 384).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, size=(16, 16), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert network.sees == "squashed by Pillow's bicubic to 224"


def test_random_features_are_the_same_whoever_draws_before() -> None:
    first = build_networks(FeatureOptions(("random",)), CPU)["random"]
    state = torch.get_rng_state()
    torch.rand(5)
    again = build_networks(FeatureOptions(("random",)), CPU)["random"]
    torch.set_rng_state(state)
    assert first.digest == again.digest
    assert "comparable with nothing else" in first.name
