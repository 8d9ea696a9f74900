"""`ldm evaluate fidelity` with pictures, tars, statistics and results on a real S3 server."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.storage.files import read_text, write_bytes
from data_pipeline.storage.local_s3 import LocalS3
from trainer.__main__ import main


def png(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((24, 24), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def tar(seeds: range) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for seed in seeds:
            for name, content in ((f"{seed:04d}.png", png(seed)), (f"{seed:04d}.txt", b"a caption")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with LocalS3(tmp_path / "s3", buckets=("bucket",)) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        yield "s3://bucket"


def test_folders_tars_statistics_and_results_are_urls(bucket: str, tmp_path: Path) -> None:
    for seed in range(12):
        write_bytes(f"{bucket}/made/part{seed % 2}/{seed}.png", png(seed))
    write_bytes(f"{bucket}/val/00000.tar", tar(range(100, 108)))
    write_bytes(f"{bucket}/val/00001.tar", tar(range(108, 113)))
    for i, shard in enumerate((range(100, 108), range(108, 113))):
        (tmp_path / f"{i}.tar").write_bytes(tar(shard))
    common = ["--features", "random"]
    figures = []
    references = (f"{bucket}/val", f"{bucket}/val/{{00000..00001}}.tar", f"{tmp_path}/*.tar")
    for reference in references:
        command = ["evaluate", "fidelity", f"{bucket}/made", "--reference", reference, *common]
        out = f"{bucket}/figures.json"
        assert main([*command, "--out", out, "--save-reference", f"{bucket}/val.safetensors"]) == 0
        found = json.loads(read_text(out))
        assert (found["pictures"]["pictures"], found["reference"]["pictures"]) == (12, 13)
        figures.append(found["figures"])
    stored = ["evaluate", "fidelity", f"{bucket}/made", "--reference", f"{bucket}/val.safetensors"]
    assert main([*stored, "--out", str(tmp_path / "stored.json")]) == 0
    figures.append(json.loads((tmp_path / "stored.json").read_text())["figures"])
    assert figures == [figures[0]] * 4


def test_what_is_not_there_is_one_sentence(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    for url in (f"{bucket}/nothing", "s3://absent/made"):
        assert main(["evaluate", "fidelity", url, "--reference", url, "--features", "random"]) == 2
        error = capsys.readouterr().err
        assert len([line for line in error.splitlines() if line.startswith("ldm: ")]) == 1
        assert url.split("/")[2] in error
