"""One set of pictures over the nodes of a real Ray cluster: a lost worker, a stop, another number of them."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_sample_series import CLASSES, exported, tree
from trainer.__main__ import main

COUNT, BATCH = 120, 4
LIMIT_S = 600.0


def share_pids(out: Path) -> dict[str, int]:
    """Processes that draw shares of this set, by share."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if {"trainer", "sample", str(out)} <= set(words):
            found[words[words.index("--share") + 1]] = int(process.name)
    return found


def parent(pid: int) -> int:
    """The Ray worker that follows a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"^PPid:\s+(\d+)$", text, re.MULTILINE)[0])


def parts(out: Path) -> set[str]:
    return {path.name for path in (out / "parts").glob("*.json")}


class Job:
    """A set that is drawn by the cluster."""

    def __init__(self, cluster: Any, out: Path, *words: str) -> None:
        self.cluster, self.out = cluster, out
        self.number = cluster.submit(*words, module="trainer.launch.ray_sample")

    def until(self, condition: Callable[[], Any], what: str) -> None:
        limit = time.monotonic() + LIMIT_S
        while not condition():
            assert self.cluster.status(self.number) in ("PENDING", "RUNNING", "UNKNOWN"), self.log
            assert time.monotonic() < limit, f"never saw {what}:\n{self.log}"
            time.sleep(0.02)

    def finish(self, status: str) -> None:
        self.cluster.wait_for(self.number, "the end", lambda: self.cluster.status(self.number) == status)

    @property
    def log(self) -> str:
        return str(self.cluster.logs(self.number)[-8000:])


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_worker_and_another_number_of_them_make_the_same_bytes(
    ray_cluster: Any, tmp_path: Path
) -> None:
    """Each node has room for one share, so two that live at once are on two nodes."""
    source, out = exported(tmp_path, *CLASSES), tmp_path / "drawn"
    words = [source, "--count", str(COUNT), "--batch-size", str(BATCH), "--steps", "60", "--out"]
    assert main(["sample", *words, str(tmp_path / "unbroken")]) == 0
    whole = tree(tmp_path / "unbroken")

    job = Job(ray_cluster, out, "--workers", "2", "--on", "cpu", *words, str(out))
    job.until(lambda: share_pids(out).keys() == {"0/2", "1/2"}, "both shares")
    job.until(lambda: any(int(name[:6]) % 2 for name in parts(out)), "a part of share 1")
    before = share_pids(out)
    os.kill(parent(before["1/2"]), signal.SIGKILL)
    job.until(lambda: share_pids(out).get("1/2", before["1/2"]) != before["1/2"], "share 1 again")
    ray_cluster.run("job", "stop", f"--address={ray_cluster.address}", job.number)
    job.finish("STOPPED")
    assert "share 1 is lost" in job.log
    assert not share_pids(out), "they end with the job"
    kept = parts(out)
    stamps = {name: (out / "parts" / name).stat().st_mtime_ns for name in kept}
    assert 0 < len(kept) < COUNT // BATCH, "stopped on the way"

    again = Job(ray_cluster, out, "--workers", "3", "--on", "cpu", *words, str(out))
    again.finish("SUCCEEDED")  # one of the three waits for a place
    assert tree(out) == whole
    assert {name: (out / "parts" / name).stat().st_mtime_ns for name in kept} == stamps, "none made again"

    other = Job(ray_cluster, out, "--on", "cpu", *words, str(out), "--seed", "7")
    other.finish("FAILED")
    assert "holds another set of pictures (seed 0 instead of 7)" in other.log
    assert tree(out) == whole
    assert json.loads(whole["prompts.json"])["count"] == COUNT


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["RUN", "--count", "9"], "--out is not given: each node would write to a folder of its own"),
        (["RUN", "--count", "9", "--out", "samples"], "--out samples: each node would write"),
        (["RUN", "--out", "/sets/a"], "with --count or --prompts-from"),
        (["RUN", "--count", "9", "--out", "/sets/a", "--share=0/2"], "--share is not for ray_sample"),
        (["RUN", "--count", "9", "--out", "/sets/a", "--rank", "2"], "--ranks is not for ray_sample"),
        (["RUN", "--count", "9", "--out", "/sets/a", "--overwrite"], "--overwrite is not for ray_sample"),
        (["RUN", "--count", "9", "--out", "/sets/a", "--workers", "2"], "write it before RUN"),
        (["--workers", "0", "RUN", "--count", "9", "--out", "/sets/a"], "--workers 0 must lie in 1"),
    ],
)
def test_mistakes_are_one_sentence_before_any_cluster_is_asked(
    capsys: Any, words: list[str], sentence: str
) -> None:
    pytest.importorskip("ray", reason='pip install "ray[default,train]"')
    from trainer.launch.ray_sample import main as draw

    handler = signal.getsignal(signal.SIGINT)
    assert draw(words) == 2
    assert signal.getsignal(signal.SIGINT) is handler
    told = capsys.readouterr().err
    assert sentence in told
    assert "Traceback" not in told
