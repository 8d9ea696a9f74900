"""A large set in real processes: killed three times, each time continued on another number of ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.storage.local_s3 import LocalS3
from tests.unit.test_sample_series import CLASSES, exported, tree
from trainer.__main__ import main
from trainer.distributed.place import Place, free_port

ROOT = Path(__file__).resolve().parents[2]
COUNT, BATCH = 2000, 8
PARTS = COUNT // BATCH


def start(words: list[str], **variables: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen([sys.executable, "-m", "trainer", *words], env=environment)


def local(words: list[str], ranks: int) -> list[subprocess.Popen[bytes]]:
    """As a person starts them."""
    return [start([*words, "--ranks", str(ranks)])]


def given(words: list[str], ranks: int) -> list[subprocess.Popen[bytes]]:
    """As torchrun starts them."""
    port = free_port()
    places = [Place(rank, rank, ranks, ranks, "127.0.0.1", port) for rank in range(ranks)]
    return [start(words, **place.variables()) for place in places]


def srun(words: list[str], ranks: int) -> list[subprocess.Popen[bytes]]:
    """As srun starts them."""
    shared = {
        "SLURM_STEP_NUM_TASKS": str(ranks),
        "SLURM_STEP_ID": "0",
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": str(os.getpid()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [start(words, **shared, SLURM_PROCID=str(r), SLURM_LOCALID=str(r)) for r in range(ranks)]


def others_of(out: Path) -> list[int]:
    """Processes with this folder on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(out) in path.read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def whole(out: Path) -> dict[str, int]:
    """Time stamps of the pictures of whole parts."""
    names = [n for p in (out / "parts").glob("*.json") for n in json.loads(p.read_text())["files"]]
    return {name: (out / "pictures" / name).stat().st_mtime_ns for name in names}


@pytest.mark.slow
def test_three_kills_and_other_numbers_of_ranks_make_the_same_bytes(tmp_path: Path) -> None:
    source, out = exported(tmp_path, *CLASSES), tmp_path / "killed"
    shared = ["sample", source, "--count", str(COUNT), "--batch-size", str(BATCH), "--steps", "4", "--out"]
    assert main([*shared, str(tmp_path / "unbroken")]) == 0
    kept: dict[str, int] = {}
    for number, (launch, ranks) in enumerate(((local, 2), (given, 3), (srun, 2)), 1):
        processes = launch([*shared, str(out)], ranks)
        deadline = time.monotonic() + 300
        while len(list((out / "parts").glob("*.json"))) < number * PARTS // 5:
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in processes)
            time.sleep(0.01)
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
        while others_of(out):  # ranks do not outlive their launcher
            assert time.monotonic() < deadline
            time.sleep(0.01)
        kept |= {name: stamp for name, stamp in whole(out).items() if name not in kept}
        assert len(kept) < COUNT, "killed on the way"
    assert local([*shared, str(out)], 1)[0].wait(timeout=300) == 0
    assert tree(out) == tree(tmp_path / "unbroken")
    assert {name: stamp for name, stamp in whole(out).items() if name in kept} == kept, "none was made again"


@pytest.mark.slow
def test_tars_on_s3_are_those_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = exported(tmp_path, *CLASSES)
    with LocalS3(tmp_path / "s3", buckets=("bucket",)) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        command = ["sample", source, "--count", "22", "--batch-size", "4", "--tars", "8", "--format", "jpg"]
        assert main([*command, "--out", str(tmp_path / "disk")]) == 0
        assert main([*command, "--out", "s3://bucket/sets/a"]) == 0
        served = tmp_path / "s3/bucket/sets/a"
        assert tree(served) == tree(tmp_path / "disk")
        (served / "pictures/00001.tar").unlink()
        (served / "parts/000002.json").unlink()
        assert main([*command, "--out", "s3://bucket/sets/a"]) == 0
        assert tree(served) == tree(tmp_path / "disk")
