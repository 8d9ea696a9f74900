"""`ldm evaluate fidelity` on small sets with the random network: figures, statistics, and known traps."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from trainer.__main__ import main
from trainer.config.run import ConfigError
from trainer.evaluation.features import to_size, to_size_unrounded
from trainer.evaluation.fidelity import Comparison, compare
from trainer.evaluation.statistics import (
    UNKNOWN,
    NetworkRecord,
    Record,
    SetStatistics,
    check_comparable,
    read_statistics,
    write_statistics,
)

Measure = Callable[..., dict[str, Any]]
TAG = "_random"


def picture(seed: int, edge: int = 32) -> NDArray[np.uint8]:
    """Smooth random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((edge, edge), Image.Resampling.BICUBIC))


def folder_of(path: Path, seeds: range, *, ending: str = "png", edge: int = 32, **options: Any) -> Path:
    path.mkdir()
    for seed in seeds:
        Image.fromarray(picture(seed, edge)).save(path / f"{seed:04d}.{ending}", **options)
    return path


@pytest.fixture
def measure(tmp_path: Path) -> Measure:
    """The JSON of one command; further arguments as they are."""

    def run(made: Path | str, real: Path | str, *arguments: str, features: str = "random") -> dict[str, Any]:
        out = tmp_path / "figures.json"
        out.unlink(missing_ok=True)
        command = ["evaluate", "fidelity", str(made), "--reference", str(real), "--out", str(out), *arguments]
        assert main([*command, *(["--features", features] if features else [])]) == 0
        return dict(json.loads(out.read_text()))

    return run


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one sentence of a command that must be refused."""

    def run(*arguments: Path | str) -> str:
        capsys.readouterr()
        assert main(["evaluate", *map(str, arguments)]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ldm: ")]
        assert len(lines) == 1
        return lines[0]

    return run


def test_every_figure_and_who_made_it(tmp_path: Path, measure: Measure) -> None:
    made, real = folder_of(tmp_path / "made", range(80)), folder_of(tmp_path / "real", range(100, 190))
    found = measure(made, real)
    names = "fd kd kd_deviation is is_deviation precision recall density coverage mind sfd"
    assert set(found["figures"]) == {
        (name.removesuffix("_deviation") + TAG + "_deviation" if "_dev" in name else name + TAG)
        for name in names.split()
    }
    assert (found["pictures"]["pictures"], found["reference"]["pictures"]) == (80, 90)
    network = found["pictures"]["networks"]["random"]
    assert "random-64" in network["name"]
    assert len(network["sha256"]) == 64
    assert network == found["reference"]["networks"]["random"]
    assert any("comparable with nothing else" in note for note in found["notes"])


def test_a_set_against_itself_and_against_another(tmp_path: Path, measure: Measure) -> None:
    real = folder_of(tmp_path / "real", range(80))
    flat = tmp_path / "flat"
    flat.mkdir()
    for seed in range(80):
        Image.fromarray(picture(seed) // 2).save(flat / f"{seed}.png")
    same, other = measure(real, real)["figures"], measure(flat, real)["figures"]
    assert same["fd" + TAG] == pytest.approx(0.0, abs=1e-9)
    assert (same["precision" + TAG], same["recall" + TAG], same["coverage" + TAG]) == (1.0, 1.0, 1.0)
    assert other["fd" + TAG] > 0.01
    assert other["mind" + TAG] > 10 * same["mind" + TAG]
    assert other["precision" + TAG] < 0.5


def test_statistics_are_stored_and_give_the_same_figures(
    tmp_path: Path, measure: Measure, refusal: Callable[..., str]
) -> None:
    made, real = (
        folder_of(tmp_path / "made", range(70), edge=40),
        folder_of(tmp_path / "real", range(100, 190)),
    )
    direct = measure(made, real, "--image-size", "24")
    stored = tmp_path / "real.safetensors"
    common = ("--features", "random", "--image-size", "24")
    assert main(["evaluate", "statistics", str(real), "--out", str(stored), *common]) == 0
    # the size is that of the statistics, and a reference can be kept on the way
    again = measure(made, stored, "--save-reference", str(tmp_path / "copy.safetensors"), features="")
    assert again["figures"] == direct["figures"]
    assert again["reference"] == direct["reference"]
    assert measure(made, tmp_path / "copy.safetensors")["figures"] == direct["figures"]
    assert measure(stored, stored)["figures"]["fd" + TAG] == pytest.approx(0.0, abs=1e-9)
    sentence = refusal("fidelity", made, "--reference", stored, "--image-size", "32")
    assert "was measured with --image-size 24" in sentence
    assert "no inception features" in refusal(
        "fidelity", stored, "--reference", stored, "--features", "inception"
    )
    # a stored set on the other side lacks a network just as well; names of metrics are checked there, too
    assert "no inception features" in refusal(
        "fidelity", stored, "--reference", stored, "--features", "random,inception"
    )
    assert "there is no metric" in refusal("fidelity", stored, "--reference", stored, "--metrics", "fif")
    found = read_statistics(str(stored))
    assert found.means["random.pool"].dtype == torch.float64
    assert found.features["random.pool"].shape == (90, 64)
    assert "random.logits" in found.features


def test_only_what_is_asked_for_is_kept(
    tmp_path: Path, measure: Measure, refusal: Callable[..., str]
) -> None:
    real, stored = folder_of(tmp_path / "real", range(70)), tmp_path / "real.safetensors"
    command = ["evaluate", "statistics", str(real), "--out", str(stored), "--features", "random"]
    assert main([*command, "--metrics", "fid,sfid"]) == 0
    assert read_statistics(str(stored)).features == {}
    assert set(measure(real, stored, "--metrics", "fid")["figures"]) == {"fd" + TAG}
    assert set(measure(real, stored)["figures"]) == {
        "fd" + TAG, "sfd" + TAG, "is" + TAG, f"is{TAG}_deviation",
    }  # fmt: skip
    sentence = refusal("fidelity", real, "--reference", stored, "--features", "random", "--metrics", "kid")
    assert "no features for kid" in sentence
    assert "make it anew with --metrics kid" in sentence


def test_statistics_of_other_programs(
    tmp_path: Path, measure: Measure, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = folder_of(tmp_path / "made", range(3))
    widths = {"inception.pool": 4, "inception.spatial": 3}
    monkeypatch.setattr("trainer.evaluation.statistics._NPZ_WIDTHS", widths)
    np.savez(tmp_path / "fid.npz", mu=np.zeros(4), sigma=np.eye(4), mu_s=np.ones(3), sigma_s=np.eye(3))
    found = read_statistics(str(tmp_path / "fid.npz"))
    assert found.means["inception.pool"].tolist() == [0.0] * 4
    assert found.covariances["inception.spatial"].shape == (3, 3)
    np.savez(tmp_path / "moved.npz", mu=np.full(4, 0.5), sigma=4 * np.eye(4))
    assert measure(tmp_path / "moved.npz", tmp_path / "fid.npz", features="")["figures"] == {
        "fid": pytest.approx(4 * 0.25 + 4.0)
    }
    np.savez(tmp_path / "other.npz", arr_0=np.zeros(3))
    assert "holds neither mu and sigma" in refusal("fidelity", made, "--reference", tmp_path / "other.npz")
    np.savez(tmp_path / "pickled.npz", mu=np.asarray([{}], dtype=object), sigma=np.eye(1))
    assert "not a .npz file of numbers" in refusal("fidelity", made, "--reference", tmp_path / "pickled.npz")


def test_spatial_statistics_of_earlier_versions_are_read_in_the_order_of_other_programs(
    tmp_path: Path,
) -> None:
    """They had channels first, and said nothing of it."""
    maps = torch.randn(9, 7, 17, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def stored(rows: torch.Tensor, sha256: str, **details: str) -> SetStatistics:
        network = NetworkRecord("inception", sha256, "torch-fidelity at 299", details)
        name = "inception.spatial"
        means, covariances = {name: rows.mean(dim=0)}, {name: rows.T.cov()}
        record = Record("made", 9, {"inception": network})
        found = SetStatistics(record, {name: 9}, means, covariances, {name: rows.float()}, torch.arange(9))
        write_statistics(str(tmp_path / "stored.safetensors"), found)
        return read_statistics(str(tmp_path / "stored.safetensors"))

    channels_last = maps.permute(0, 2, 3, 1).flatten(1)
    order = "height, width, channel"
    for found in (
        stored(maps.flatten(1), "0" * 64),
        stored(channels_last, "0" * 64, spatial=order),
        stored(channels_last, UNKNOWN),  # from a .npz, by --save-reference
    ):
        torch.testing.assert_close(found.means["inception.spatial"], channels_last.mean(dim=0))
        assert torch.equal(found.features["inception.spatial"], channels_last.float())
        torch.testing.assert_close(found.covariances["inception.spatial"], channels_last.T.cov())
    assert stored(maps.flatten(1), "0" * 64).record.networks["inception"].details == {"spatial": order}


def test_sets_that_a_network_saw_in_other_ways_are_refused_by_both_names() -> None:
    def record(source: str, sees: str) -> Record:
        return Record(source, 9, {"dinov2": NetworkRecord("vit", "0" * 64, sees)})

    before, now = (
        "squashed by Pillow's bicubic to 224",
        "squashed by Pillow's bicubic to 224, positions as are",
    )
    with pytest.raises(
        ConfigError, match=f"of a and b do not compare .resizing {now} against {before}.; measure"
    ):
        check_comparable(record("a", now), record("b", before), {"dinov2": None})


def test_statistics_of_other_networks_are_told_before_anything_is_read(
    tmp_path: Path, refusal: Callable[..., str]
) -> None:
    broken = folder_of(tmp_path / "made", range(3))
    (broken / "0000.png").write_bytes(b"whoever reads this is told so")
    covariance = np.eye(2048)
    covariance[3, 4] = np.nan
    for arrays, said in (
        ({"mu": np.zeros(768), "sigma": np.eye(768)}, "768 features where inception.pool has 2048"),
        ({"mu_s": np.zeros(7), "sigma_s": np.eye(7)}, "7 features where inception.spatial has 2023"),
        ({"mu": np.zeros(2048), "sigma": covariance}, "NaN or infinity in the statistics of inception.pool"),
    ):
        np.savez(tmp_path / "other.npz", **arrays)
        assert said in refusal("fidelity", broken, "--reference", tmp_path / "other.npz")


def with_captions(count: int, pictures: int = 20) -> SetStatistics:
    """Of a set with a caption beside so many of its pictures."""
    network = NetworkRecord("CLIP", "0" * 64, "crop")
    means, covariances = torch.full((1,), 0.25, dtype=torch.float64), torch.eye(1, dtype=torch.float64)
    return SetStatistics(
        record=Record("made", pictures, {"clip": network}),
        counts={"clip.score": count} if count else {},
        means={"clip.score": means} if count else {},
        covariances={"clip.score": covariances} if count else {},
        features={"clip.embedding": torch.randn(pictures, 8)},
        digests=torch.arange(pictures),
    )


def test_captions_that_are_not_there_are_said() -> None:
    def compared(count: int, *wanted: str) -> Comparison:
        made = with_captions(count)
        return compare(made, with_captions(20), ["clip"], wanted or None, torch.device("cpu"))

    (note,) = [note for note in compared(3).notes if "caption" in note]
    assert note == "the CLIP score is of 3 of the 20 pictures of made; the others have no caption"
    assert not [note for note in compared(20).notes if "caption" in note]
    assert "clip_score" not in compared(0).figures
    with pytest.raises(
        ConfigError, match=r"made has no captions beside its pictures; .* leave clip_score out"
    ):
        compared(0, "cmmd", "clip_score")
    with pytest.raises(ConfigError, match="made has no features for fid"):
        compared(20, "cmmd", "fid")


def test_stored_sets_are_what_their_pictures_are(tmp_path: Path, refusal: Callable[..., str]) -> None:
    sets = []
    for name, start in (("one", 0), ("other", 1)):
        sets.append(tmp_path / f"{name}.safetensors")
        pictures = folder_of(tmp_path / name, range(start, start + 5))
        command = ["evaluate", "statistics", str(pictures), "--out", str(sets[-1]), "--features", "random"]
        assert main([*command, "--image-size", "24"]) == 0
    one, other = map(read_statistics, map(str, sets))
    assert one.content() == replace(one, digests=one.digests.flip(0), means={}).content() != other.content()
    unknown = replace(one, digests=torch.zeros(0, dtype=torch.int64))
    assert unknown.content() != replace(unknown, means=other.means).content()
    for options, said in ((["--image-size", "32"], "--image-size 24"), (["--fit", "squash"], "--fit crop")):
        for made, real in (sets, sets[::-1]):
            assert f"was measured with {said}" in refusal("fidelity", made, "--reference", real, *options)


class TestTraps:
    """What silently moves the figures of other programs."""

    def test_resizing_is_antialiased_in_floating_point_without_rounding(self) -> None:
        pixels = picture(0, 97)
        found = to_size_unrounded(pixels, 31)
        for channel in range(3):
            plain = Image.fromarray(pixels[:, :, channel].astype(np.float32), mode="F")
            expected = np.asarray(plain.resize((31, 31), Image.Resampling.BICUBIC)).clip(0, 255)
            np.testing.assert_array_equal(found[channel], expected)
        assert (found != np.round(found)).any()
        # A grid finer than the target averages out; sampling without a filter keeps one of its phases.
        grid = np.zeros((128, 128, 3), np.uint8)
        grid[::2] = 255
        assert np.abs(to_size_unrounded(grid, 32)[:, 4:-4, 4:-4] - 127.5).max() < 8
        naive = torch.nn.functional.interpolate(
            torch.from_numpy(grid).permute(2, 0, 1)[None].float(), (32, 32)
        )
        assert (naive - 127.5).abs().min() > 100

    def test_sizes_are_rounded_to_8_bits_and_not_cut_off(self) -> None:
        pixels = np.zeros((4, 4, 3), np.uint8)
        pixels[:, ::2] = 1  # means of 0.5 and around: cutting off would lose all of it
        assert to_size(pixels, 2, "squash").max() == 1
        wide = np.stack([picture(i, 32) for i in range(3)], axis=1).reshape(32, 96, 3)
        assert to_size(wide, 32, "crop").tolist() == wide[:, 32:64].tolist()
        assert to_size(wide, 16, "squash").shape == (16, 16, 3)

    def test_sets_of_several_sizes_are_said(self, tmp_path: Path, measure: Measure) -> None:
        small, large = (
            folder_of(tmp_path / "small", range(66)),
            folder_of(tmp_path / "large", range(66), edge=96),
        )
        found = measure(large, small)
        assert (found["pictures"]["sizes"], found["reference"]["sizes"]) == ({"96x96": 66}, {"32x32": 66})
        assert any("by different resizing" in note for note in found["notes"])
        together = measure(large, small, "--image-size", "32")
        assert not any("resizing" in note for note in together["notes"])
        assert together["figures"]["fd" + TAG] < found["figures"]["fd" + TAG]
        Image.fromarray(picture(0, 64)[:, :32]).save(small / "odd.png")
        assert any("are of several sizes (32x32, 32x64" in note for note in measure(small, small)["notes"])

    def test_jpeg_against_png_moves_the_figures_and_is_said(self, tmp_path: Path, measure: Measure) -> None:
        real = folder_of(tmp_path / "real", range(80))
        jpeg = folder_of(tmp_path / "jpeg", range(80), ending="jpg", quality=10)
        found = measure(jpeg, real)
        assert found["pictures"]["formats"] == {"jpeg": 80}
        assert found["figures"]["fd" + TAG] > 1e-4
        assert any("JPEG" in note for note in found["notes"])

    def test_fewer_pictures_than_dimensions(self, tmp_path: Path, measure: Measure) -> None:
        found = measure(folder_of(tmp_path / "few", range(20)), folder_of(tmp_path / "real", range(50, 150)))
        assert np.isfinite(list(found["figures"].values())).all()
        assert any("20 pictures, not more than the 64 dimensions of random.pool" in n for n in found["notes"])
        assert any("20 pictures instead of 1000" in note for note in found["notes"])

    def test_a_single_picture_is_not_a_set(self, tmp_path: Path, refusal: Callable[..., str]) -> None:
        one, real = folder_of(tmp_path / "one", range(1)), folder_of(tmp_path / "real", range(9))
        for pair in ((one, real), (real, one)):
            sentence = refusal("fidelity", pair[0], "--reference", pair[1], "--features", "random")
            assert "takes at least 2" in sentence

    def test_the_previews_of_a_run_are_no_set(
        self, tmp_path: Path, measure: Measure, refusal: Callable[..., str]
    ) -> None:
        made = folder_of(tmp_path / "made", range(4))
        run = tmp_path / "run"
        run.mkdir()
        folder_of(run / "samples", range(4))
        (run / "config.yaml").write_text("steps: 1\n")
        for words in ((run, "--reference", made), (made, "--reference", run)):
            assert f"{run} is a run, and holds previews" in refusal(
                "fidelity", *words, "--features", "random"
            )
        said = refusal("statistics", run, "--features", "random", "--out", tmp_path / "s.safetensors")
        assert f"by `ldm sample {run} --count N --out SET`" in said
        assert measure(run / "samples", made)["figures"]["fd_random"] >= 0  # named, it is one

    def test_duplicates_and_copies_of_the_reference(self, tmp_path: Path, measure: Measure) -> None:
        real, made = folder_of(tmp_path / "real", range(80)), folder_of(tmp_path / "made", range(200, 270))
        for i in range(5):
            shutil.copy(made / "0200.png", made / f"again{i}.png")
        Image.fromarray(picture(3)).save(made / "stolen.bmp")
        found = measure(made, real)
        assert found["pictures"]["duplicates"] == 5
        assert any(note.startswith("5 of the 76 pictures") for note in found["notes"])
        assert any(note.startswith("1 different pictures") for note in found["notes"])

    def test_grey_pictures_are_grey_in_three_channels(self, tmp_path: Path, measure: Measure) -> None:
        grey, colour = tmp_path / "grey", tmp_path / "colour"
        for folder in (grey, colour):
            folder.mkdir()
        for seed in range(70):
            flat = Image.fromarray(picture(seed)).convert("L")
            flat.save(grey / f"{seed}.png")
            flat.convert("RGB").save(colour / f"{seed}.png")
        found = measure(grey, colour)
        assert found["figures"]["fd" + TAG] == pytest.approx(0.0, abs=1e-9)

    def test_nan_pictures_are_refused_and_what_became_of_them_is_said(
        self, tmp_path: Path, measure: Measure, refusal: Callable[..., str]
    ) -> None:
        real, made = folder_of(tmp_path / "real", range(80)), folder_of(tmp_path / "made", range(90, 170))
        Image.new("RGB", (32, 32)).save(made / "black.png")
        found = measure(made, real)
        assert found["pictures"]["blank"] == 1
        assert any("what NaN becomes" in note for note in found["notes"])
        Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(made / "nan.tiff")
        sentence = refusal("fidelity", made, "--reference", real, "--features", "random")
        assert "nan.tiff" in sentence
        assert "NaN" in sentence
        assert "--skip-broken" in sentence
        left = measure(made, real, "--skip-broken")
        assert left["pictures"]["broken"] == {"not_finite": 1}
        assert left["figures"] == found["figures"]
        assert any("left out: 1 not_finite" in note for note in left["notes"])

    def test_the_size_of_blocks_moves_nothing_but_the_last_digits(
        self, tmp_path: Path, measure: Measure
    ) -> None:
        made, real = folder_of(tmp_path / "made", range(70)), folder_of(tmp_path / "real", range(90, 170))
        by_one, by_many = (measure(made, real, "--batch-size", size)["figures"] for size in ("1", "64"))
        assert by_one == pytest.approx(by_many, rel=1e-4, abs=1e-6)


def test_mistakes(tmp_path: Path, refusal: Callable[..., str]) -> None:
    made = folder_of(tmp_path / "made", range(3))
    fidelity = ("fidelity", made, "--reference")
    assert "there are no features vgg" in refusal(*fidelity, made, "--features", "vgg")
    assert "there is no metric 'fidd'" in refusal(
        *fidelity, made, "--features", "random", "--metrics", "fidd"
    )
    assert "cmmd needs --features clip" in refusal(
        *fidelity, made, "--features", "random", "--metrics", "cmmd"
    )
    assert "--image-size 0" in refusal(*fidelity, made, "--image-size", "0")
    assert "has to end in .safetensors" in refusal("statistics", made, "--out", "x.npz")
    assert "there is no weights file" in refusal(
        *fidelity, tmp_path / "x.safetensors", "--features", "random"
    )
    assert "There are no pictures" in refusal(*fidelity, tmp_path / "absent", "--features", "random")
    for words, told in (
        ((made, "--reference", " "), "--reference is empty"),
        (("", "--reference", made), "PICTURES is empty"),
        ((made, "--reference", made, "--features", ","), "--features is empty"),
        ((made, "--reference", made, "--features", "random", "--metrics", ""), "--metrics is empty"),
        ((made, "--reference", made, "--features", "random", "--out", tmp_path), "is a folder; name a file"),
    ):
        assert told in refusal("fidelity", *words)
    (tmp_path / "some.safetensors").write_bytes(_foreign())
    sentence = refusal(*fidelity, tmp_path / "some.safetensors", "--features", "random")
    assert "holds no statistics of pictures" in sentence


def test_a_set_that_is_not_there_is_told_before_another_is_read(
    tmp_path: Path, refusal: Callable[..., str]
) -> None:
    """A reference may take hours."""
    real = folder_of(tmp_path / "real", range(3))
    (real / "0000.png").write_bytes(b"whoever reads this is told so")
    random = ("--features", "random")
    assert "0000.png cannot be measured" in refusal("fidelity", real, "--reference", real, *random)
    absent = tmp_path / "absent"
    assert f"no tars in {absent}." in refusal("fidelity", absent, "--reference", real, *random)


def test_pictures_and_archives_that_are_not_read_are_said(
    tmp_path: Path, measure: Measure, refusal: Callable[..., str]
) -> None:
    made = folder_of(tmp_path / "made", range(3))
    folder_of(tmp_path / "others", range(2), ending="ppm")
    for path in (tmp_path / "others").iterdir():
        shutil.copy(path, made / path.name)
    (made / "labels.csv").write_text("of no format that one would look for pictures in")
    told = measure(made, made)
    assert told["pictures"]["pictures"] == 3
    assert any("left out: 2 of .ppm, which is not read" in note for note in told["notes"])
    sentence = refusal("fidelity", tmp_path / "others", "--reference", made, "--features", "random")
    assert "but 2 of other formats; convert or unpack 0000.ppm" in sentence


def _foreign() -> bytes:
    from safetensors.torch import save

    buffer = io.BytesIO()
    buffer.write(save({"x": torch.zeros(1)}))
    return buffer.getvalue()
