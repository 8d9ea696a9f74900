"""Large sets: which pictures they consist of, how they lie on disk, what is made again, what is refused."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from data_pipeline.errors import DataError
from data_pipeline.tools.picture_sets import open_pictures, read_blocks
from data_pipeline.tools.prompts import listed_prompts, prompts_of
from trainer.__main__ import main
from trainer.cli import sample_series
from trainer.config.io import config_to_dict, load_config
from trainer.config.run import ConfigError
from trainer.generation.series import AHEAD, Series, make_pictures
from trainer.generation.store import Form, SetStore, SmallSet
from trainer.model import build_model, load_model
from trainer.sample import Request
from trainer.weights import write_weights

CLASSES = ("conditioning.class_label={num_classes: 3, width: 16}",)
TEXT = ("conditioning.text_transformer={width: 16, layers: 1, heads: 1, head_dim: 8, max_tokens: 8}",)


def exported(folder: Path, *settings: str) -> str:
    """A tiny model that hears its conditions."""
    network = (
        "unet={model_channels: 16, channel_multipliers: [1], num_res_blocks: 1, attention_factors: [1], "
        "head_dim: 16, num_groups: 4}"
    )
    smallest = ["data.image_size=8", "first_stage.name=identity", network]
    sampling = "sampling={steps: 2, guidance_scale: 2.0}"
    config = load_config(None, [*smallest, sampling, *settings])
    torch.manual_seed(0)
    made = build_model(config)
    for parameter in made.network.parameters():
        nn.init.normal_(parameter, std=0.2)
    url = str(folder / "model.safetensors")
    write_weights(url, dict(made.network.state_dict()), {"config": json.dumps(config_to_dict(config))})
    return url


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_picture_does_not_depend_on_the_set_around_it(tmp_path: Path) -> None:
    """Nor on where its batch lies: the last one is filled up to the same size."""
    source = exported(tmp_path, *CLASSES)
    shared = ["sample", source, "--batch-size", "4", "--seed", "5"]
    assert main([*shared, "--count", "10", "--out", str(tmp_path / "all")]) == 0
    assert main([*shared, "--count", "7", "--out", str(tmp_path / "some")]) == 0
    names = sorted(path.name for path in (tmp_path / "all/pictures").iterdir())
    assert names == [f"{i:07d}.png" for i in range(10)]
    for name in names[:7]:
        assert np.array_equal(
            pixels(tmp_path / "all/pictures" / name), pixels(tmp_path / "some/pictures" / name)
        )
    alone = ["--class-label", str(6 % 3), "--first-index", "6", "--out", str(tmp_path / "alone")]
    assert main([*shared, *alone]) == 0
    difference = pixels(tmp_path / "alone/pictures/00000.png").astype(int) - pixels(
        tmp_path / "all/pictures/0000006.png"
    )
    assert np.abs(difference).max() <= 1  # another batch: the last bit
    told = Image.open(tmp_path / "all/pictures/0000007.png").text
    assert json.loads(told["ldm"])["class_label"] == 7 % 3, "all classes in turn"
    assert json.loads(told["ldm"])["index"] == 7
    assert (tmp_path / "all/grid.png").exists()


def test_what_is_whole_is_not_made_again(tmp_path: Path) -> None:
    source, out = exported(tmp_path, *CLASSES), tmp_path / "out"
    command = ["sample", source, "--batch-size", "4", "--count", "20", "--out", str(out)]
    assert main(command) == 0
    before = tree(out)
    kept = out / "pictures/0000000.png"
    kept.touch()
    stamp = kept.stat().st_mtime_ns
    (out / "pictures/0000005.png").unlink()  # lost
    cut = out / "pictures/0000009.png"
    cut.write_bytes(cut.read_bytes()[:40])  # cut short
    (out / "parts/000004.json").unlink()  # a kill before its record
    (out / "pictures/0000016.png").write_bytes(b"other")
    assert main(command) == 0
    assert tree(out) == before
    assert kept.stat().st_mtime_ns == stamp


def test_what_urls_carry_to_be_let_in_is_in_no_picture(tmp_path: Path) -> None:
    """Pictures are passed on. A set is the same by whatever signature it is asked for."""

    def record(secret: str) -> dict[str, Any]:
        return {
            "source": f"https://me:{secret}@host/run.safetensors",
            "first_stage": f"https://host/kl.safetensors?X-Amz-Signature={secret}",
            "image": f"https://host/a.png?X-Amz-Signature={secret}&part=3",
            "prompts": ["a URL: https://you:1f2e@host"],
            "files": {"image": "5a5a"},
            "versions": {},
        }

    item = {"prompt": "a red circle", "index": 0}
    small = SmallSet(str(tmp_path / "small"), record("1f2e3d"), [item], overwrite=False)
    small.begin()
    small.add(0, torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    large = SetStore(str(tmp_path / "large"), record("1f2e3d"), Form(tars=True))
    large.begin(overwrite=False)
    large.put(0, [0], [item], [large.encode(np.zeros((4, 4, 3), np.uint8), item)])
    for name, content in tree(tmp_path).items():
        assert b"1f2e3d" not in content, name
    told = json.loads(Image.open(tmp_path / "small/pictures/00000.png").text["ldm"])
    assert told["source"] == "https://***@host/run.safetensors"
    assert told["image"] == "https://host/a.png?X-Amz-Signature=***&part=3"
    assert json.loads((tmp_path / "small/prompts.json").read_text())["prompts"] == record("")["prompts"]
    # Gone on with, also where an earlier version has written everything.
    SmallSet(str(tmp_path / "small"), record("4c5b6a"), [item], overwrite=False)
    (tmp_path / "large/prompts.json").write_text(json.dumps(record("1f2e3d")))
    again = SetStore(str(tmp_path / "large"), record("4c5b6a"), Form(tars=True))
    assert again.begin(overwrite=False) == {0}
    with pytest.raises(ConfigError, match="holds another set of pictures"):
        SetStore(str(tmp_path / "large"), {**record("1f2e3d"), "source": "other"}, Form()).begin(
            overwrite=False
        )


def test_a_restarted_command_replaces_another_set_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher, and SLURM's requeue, give the same words again, --overwrite among them."""
    source, out = exported(tmp_path, *CLASSES), tmp_path / "out"
    command = ["sample", source, "--count", "6", "--batch-size", "3", "--out", str(out), "--overwrite"]
    monkeypatch.setenv("LDM_JOB", "first")
    for restarts, job, kept in (("0", "first", 0), ("0", "first", 0), ("1", "first", 6), ("1", "other", 0)):
        monkeypatch.setenv("LDM_RESTARTS", restarts)
        monkeypatch.setenv("LDM_JOB", job)
        assert main(command) == 0
        told = capsys.readouterr().out
        assert (f"{kept} of them from before" in told) == bool(kept), (restarts, job)
    carried = json.loads(Image.open(out / "pictures/0000000.png").text["ldm"])
    assert "begun_by" not in carried
    assert main(command[:-1]) == 0, "and the set is the same to whoever goes on with it"


def test_a_set_is_continued_in_its_own_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = exported(tmp_path, *CLASSES), tmp_path / "out"
    command = ["sample", source, "--count", "9", "--out", str(out)]
    assert main([*command, "--batch-size", "4"]) == 0
    capsys.readouterr()
    assert main(command) == 0
    assert "9 of them from before" in capsys.readouterr().out
    for other in (["--batch-size", "3"], ["--seed", "1"], ["--guidance", "3"], ["--format", "jpg"]):
        assert main([*command, *other]) == 2, other
        assert "holds another set of pictures" in capsys.readouterr().err
    assert main([*command, "--format", "jpg", "--overwrite"]) == 0
    names = {path.name for path in (out / "pictures").iterdir()}
    assert names == {f"{i:07d}.{kind}" for i in range(9) for kind in ("jpg", "txt")}
    assert main(["sample", source, "--class-label", "1", "--out", str(out), "--overwrite"]) == 0
    assert [path.name for path in (out / "pictures").iterdir()] == ["00000.png"]
    assert not (out / "parts").exists()
    assert main(command) == 2, "a small set is another one, too"


def test_tars_with_captions_are_what_training_and_evaluation_read(tmp_path: Path) -> None:
    source, out = exported(tmp_path, *TEXT), tmp_path / "out"
    (tmp_path / "prompts.tsv").write_text('id\tcaption\n1\ta "red\n2\t\n3\ta  blue   square\n')
    command = ["sample", source, "--prompts-from", str(tmp_path / "prompts.tsv"), "--count", "5"]
    assert main([*command, "--tars", "4", "--batch-size", "2", "--out", str(out)]) == 0
    assert sorted(path.name for path in (out / "pictures").iterdir()) == ["00000.tar", "00001.tar"]
    with tarfile.open(out / "pictures/00001.tar") as tar:
        assert tar.getnames() == ["0000004.png", "0000004.txt", "0000004.json"]
        member = tar.extractfile("0000004.json")
        assert member is not None
        about = json.loads(member.read())
    assert (about["caption"], about["index"], about["steps"]) == ('a "red', 4, 2)
    blocks = list(read_blocks(open_pictures(str(out / "pictures")), lambda picture: picture.shape, block=8))
    captions = [caption for block in blocks for caption in block.captions]
    assert captions == ['a "red', "a blue square", 'a "red', "a blue square", 'a "red']
    assert listed_prompts(str(out / "pictures"), 2) == captions[:2]
    before = tree(out)
    (out / "pictures/00000.tar").unlink()
    assert main([*command, "--tars", "4", "--batch-size", "2", "--out", str(out)]) == 0
    assert tree(out) == before


def test_prompts_come_from_anything_with_captions(tmp_path: Path) -> None:
    captions = ["a red circle", "two, blue"]
    (tmp_path / "a.txt").write_text("a red circle\n\n two,  blue\n")
    (tmp_path / "a.csv").write_text('file,prompt\n1,a red circle\n2,"two, blue"\n')
    (tmp_path / "a.jsonl").write_text('{"text": "a red circle"}\n"two, blue"\n')
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"key": [1, 2, 3], "caption": [*captions, None]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": [1, 2, 3], "prompt": [*captions, " "]}), tmp_path / "b.parquet")
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for i, caption in enumerate(captions):
            picture = io.BytesIO()
            Image.new("RGB", (8, 8)).save(picture, "PNG")
            for extension, content in (("png", picture.getvalue()), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{i}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    for name in ("a.txt", "a.csv", "a.jsonl", "a.parquet", "b.parquet", "00000.tar", "{00000..00000}.tar"):
        assert listed_prompts(str(tmp_path / name)) == captions, name
        assert listed_prompts(str(tmp_path / name), 1) == captions[:1], name


def test_prompts_that_would_be_lost_or_cut_are_refused(tmp_path: Path) -> None:
    """They would be other prompts, and the following ones have other numbers."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"caption": [["a", "b"], ["c"]]}), tmp_path / "lists.parquet")
    pq.write_table(pa.table({"caption": [1, 2]}), tmp_path / "numbers.parquet")
    (tmp_path / "comma.csv").write_text("id,caption\n1,a\n2,a circle, red\n")
    (tmp_path / "short.csv").write_text("id,caption\n1\n2,b\n")
    (tmp_path / "tab.tsv").write_text("id\tcaption\n1\ta\tb\n")
    (tmp_path / "list.jsonl").write_text('{"caption": "a"}\n{"caption": ["b", "c"]}\n')
    (tmp_path / "number.json").write_text('["a", 5]')
    for name, said in (
        ("lists.parquet", r"prompt 1 of .* is \['a', 'b'\], which is no text"),
        ("numbers.parquet", "prompt 1 of .* is 1"),
        ("comma.csv", r"line 3 of .*comma\.csv has more or fewer cells than the header"),
        ("short.csv", "line 2 of"),
        ("tab.tsv", "line 2 of"),
        ("list.jsonl", r"prompt 2 of .* is \['b', 'c'\]"),
        ("number.json", "prompt 2 of .* is 5"),
    ):
        for read in (listed_prompts, prompts_of):
            with pytest.raises(DataError, match=said):
                read(str(tmp_path / name))


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "classes").mkdir()
    text, classes = exported(tmp_path / "text", *TEXT), exported(tmp_path / "classes", *CLASSES)
    (tmp_path / "other.csv").write_text("file,alt\n1,a\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "torn.jsonl").write_text('{"text": "a"}\n{"te\n')
    for source, words, said in (
        (text, ["--count", "3"], "--prompts-from"),
        (text, ["--prompts-from", str(tmp_path / "none.txt")], "none.txt"),
        (text, ["--prompts-from", str(tmp_path / "other.csv")], "columns file, alt"),
        (text, ["--prompts-from", str(tmp_path / "empty.txt")], "no caption"),
        (text, ["--prompts-from", str(tmp_path / "torn.jsonl")], "line 2"),
        (classes, ["--count", "0"], "--count 0"),
        (text, ["--prompts-from", ""], "--prompts-from is empty"),
        (classes, ["--count", "2", "--per-prompt", "2"], "--per-prompt"),
        (classes, ["--count", "2", "--class-label", "0", "--class-label", "7"], "--class-label 7"),
        (classes, ["--count", "2", "--tars", "0"], "--tars 0"),
        (classes, ["--count", "2", "--ranks", "-1"], "--ranks -1"),
        (classes, ["--tars", "--class-label", "0"], "--tars belongs"),
        (classes, ["--count", "2", "--quality", "101", "--format", "jpg"], "--quality 101 must lie"),
        (classes, ["--count", "2", "--quality", "80"], "--quality 80 is of JPEG; give --format jpg"),
        (classes, ["--quality", "80", "--class-label", "0"], "--quality belongs"),
        (classes, ["--no-compile", "--class-label", "0"], "--compile belongs"),
        (classes, ["--cuda-graphs", "--class-label", "0"], "--cuda-graphs belongs"),
        (classes, ["--count", "2", "--prompts-from", str(tmp_path / "torn.jsonl")], "torn.jsonl"),
    ):
        assert main(["sample", source, *words, "--out", str(tmp_path / "out")]) == 2, words
        error = capsys.readouterr().err
        assert said in error, words
        assert len([line for line in error.splitlines() if line.startswith("ldm: ")]) == 1
    assert not (tmp_path / "out").exists()


def test_local_ranks_beside_those_of_a_launcher_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = exported(tmp_path, *CLASSES)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    command = ["sample", source, "--count", "3", "--out", str(tmp_path / "out")]
    assert main([*command, "--ranks", "2"]) == 2
    assert "--ranks starts local processes" in capsys.readouterr().err
    assert main(command) == 0


def test_all_batches_are_of_one_size_and_aligned() -> None:
    """Or kernels would round the last ones otherwise; parts cover the set once."""
    series = Series(Request(("",)), 10, prompts=("a", "b", "c"), batch_size=4, batches_per_part=2)
    batches = [batch for part in range(series.parts) for batch in series.batches(part)]
    assert batches == [range(0, 4), range(4, 8), range(8, 12)]
    assert [row for part in range(series.parts) for row in series.rows(part)] == list(range(10))
    assert series.request(batches[2]).captions == ("c", "a", "b", "c")


class WatchedStore(SetStore):
    """Says how many pictures were encoded before a part was written."""

    def __init__(self, out: str) -> None:
        super().__init__(out, {}, Form())
        self.encoded = 0
        self.ahead: list[int] = []

    def encode(self, picture: np.ndarray, item: dict[str, Any]) -> bytes:
        self.encoded += 1
        return super().encode(picture, item)

    def put(
        self, part: int, rows: Sequence[int], items: Sequence[dict[str, Any]], files: list[bytes]
    ) -> None:
        time.sleep(0.2)  # slow storage: drawing gets ahead of it as far as it may
        self.ahead.append(self.encoded - rows[-1] - 1)
        super().put(part, rows, items, files)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU; tests/gpu has the rest")
def test_cuda_graphs_without_a_gpu_and_compiling_without_a_compiler_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = exported(tmp_path, *CLASSES, "distributed={compile: true, precision: bf16, cuda_graphs: true}")
    options = ["sample", source, "--count", "2", "--out", str(tmp_path / "out")]
    assert main([*options, "--cuda-graphs"]) == 2
    assert "--cuda-graphs needs a GPU, and there is none here" in capsys.readouterr().err
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main([*options, "--compile"]) == 2
    assert "--compile needs a C++ compiler" in capsys.readouterr().err
    assert main(options) == 0  # what a run was trained with on GPUs is no obstacle on a CPU


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_draw_the_same_pictures(tmp_path: Path) -> None:
    """And tell it; a set that was begun without them is not mixed with theirs."""
    source = exported(tmp_path, *CLASSES)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    options = ["sample", source, "--count", "6", "--batch-size", "4"]
    assert main([*options, "--out", str(tmp_path / "plain")]) == 0
    assert counters["stats"]["unique_graphs"] == 0
    assert main([*options, "--out", str(tmp_path / "compiled"), "--compile"]) == 0
    assert counters["stats"]["unique_graphs"] > 0
    for i in range(6):
        name = f"pictures/{i:07d}.png"
        plain, compiled = (pixels(tmp_path / made / name).astype(int) for made in ("plain", "compiled"))
        assert abs(plain - compiled).max() <= 1
    told = [json.loads((tmp_path / made / "prompts.json").read_text()) for made in ("plain", "compiled")]
    assert [record["compile"] for record in told] == [False, True]
    assert main([*options, "--out", str(tmp_path / "plain"), "--compile"]) == 2


def test_memory_does_not_grow_with_the_set(tmp_path: Path) -> None:
    source = exported(tmp_path, *CLASSES)
    trained = load_model(source, device=torch.device("cpu"))
    store = WatchedStore(str(tmp_path / "out"))
    series = Series(Request(("",)), 40, labels=(0, 1), batch_size=2, batches_per_part=2)
    assert make_pictures(store, series, trained) == 0
    assert len(store.ahead) == 10
    assert max(store.ahead) <= AHEAD * series.part_size


def test_another_machine_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = exported(tmp_path, *CLASSES), tmp_path / "out"
    command = ["sample", source, "--count", "3", "--out", str(out)]
    assert main(command) == 0
    record = json.loads((out / "prompts.json").read_text())
    record["versions"]["device"] = "NVIDIA H100"
    (out / "prompts.json").write_text(json.dumps(record))
    (out / "parts/000000.json").unlink()
    assert main(command) == 0
    assert "begun with device NVIDIA H100, now cpu" in caplog.text + capsys.readouterr().err


def test_shares_make_the_set_between_them_whichever_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Share 1 comes first and waits for share 0, and makes nothing of what the others are to make."""
    source = exported(tmp_path, *CLASSES)
    shared = ["sample", source, "--count", "22", "--batch-size", "4", "--seed", "5"]
    assert main([*shared, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "shared"
    codes: list[int] = []
    said: list[str] = []
    waits = threading.Event()

    def heard(text: str) -> None:
        said.append(text)
        waits.set()

    monkeypatch.setattr(sample_series, "say", heard)
    words = [*shared, "--out", str(out), "--share", "1/3"]
    early = threading.Thread(target=lambda: codes.append(main(words)))
    early.start()
    assert waits.wait(600)
    assert said == [f"share 1/3 waits until share 0 has begun {out}"]
    assert not out.exists()
    assert main([*shared, "--out", str(out), "--share", "0/3"]) == 0
    early.join()
    assert codes == [0]
    parts = sorted(path.stem for path in (out / "parts").iterdir())
    assert parts == ["000000", "000001", "000003", "000004"]
    assert not (out / "grid.png").exists(), "there is no whole set yet"
    assert main([*shared, "--out", str(out), "--share", "2/3"]) == 0
    assert tree(out) == tree(tmp_path / "whole")

    (out / "grid.png").unlink()  # a kill between the last part and it
    assert main([*shared, "--out", str(out), "--share", "1/2"]) == 0
    assert tree(out) == tree(tmp_path / "whole")
    assert "share 1/2 of 22 pictures, 10 of them from before" in capsys.readouterr().out


def test_a_share_leaves_another_set_alone(tmp_path: Path) -> None:
    other = json.dumps({"source": "elsewhere", "count": 3})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/prompts.json").write_text(other)
    words = ["sample", exported(tmp_path, *CLASSES), "--count", "3", "--out", str(tmp_path / "out")]
    assert main([*words, "--share", "1/2"]) == 2, "another set"
    assert (tmp_path / "out/prompts.json").read_text() == other


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--count", "3", "--share", "2/2"], "--share 2/2 is none; write K/N"),
        (["--count", "3", "--share", "half"], "--share half is none; write K/N"),
        (["--count", "3", "--share", "0/0"], "--share 0/0 is none; write K/N"),
        (["--count", "3", "--share", "0/2", "--overwrite"], "would remove what other shares have made"),
        (["--share", "0/2"], "--share belongs to sets of any size"),
    ],
)
def test_mistakes_about_shares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    out = tmp_path / "out"
    assert main(["sample", exported(tmp_path, *CLASSES), *words, "--out", str(out)]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()
