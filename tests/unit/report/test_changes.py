"""What the report says of the configuration: which setting each start and phase changed, and when."""

from __future__ import annotations

import html
import re
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.storage.local_s3 import LocalS3
from tests.unit.one_rank import Train, one_rank, small_shards
from tests.unit.test_phases import PHASES
from tests.unit.test_resume_changed import TINY
from trainer.__main__ import main
from trainer.config.run import Config
from trainer.config.training import LoggingConfig
from trainer.exit_codes import ExitCode
from trainer.metrics.jsonl import read_records
from trainer.metrics.sinks import Sinks
from trainer.report.figures import figures
from trainer.report.page import write_page

QUIET = LoggingConfig(wandb="disabled", progress_bar=False)


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    where = (f"run_dir={tmp_path}/run", f"data.shards={small_shards(tmp_path / 'shards')}")
    return one_rank(monkeypatch, tmp_path, [*TINY, *where])


def reported(run_dir: str | Path, out: Path) -> str:
    """The page that the command writes."""
    assert main(["report", str(run_dir), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def section(page: str, title: str) -> str:
    (found,) = re.findall(rf"<h2>{title}</h2>(.*?)</section>", page, re.DOTALL)
    return str(found)


def changes(page: str) -> list[tuple[str, ...]]:
    """(time, step, start, setting, was, is) of each line of the table."""
    lines = re.findall(r"<tr>(<td>.*?)</tr>", section(page, "Changes of the configuration"))
    return [tuple(html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", line)) for line in lines]


def told(event: dict[str, Any]) -> str:
    return datetime.fromtimestamp(event["time"], UTC).strftime("%m-%d %H:%M:%S")


def test_each_start_says_what_it_changed_on_the_axis_of_the_other_events(
    train: Train, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train("steps=1") == ExitCode.DONE
    page = reported(run, tmp_path / "one.html")
    assert "None: one start, one phase." in section(page, "Changes of the configuration")
    assert train("steps=2", "optimizer.learning_rate=5e-4") == ExitCode.DONE
    assert train("steps=2", "optimizer.learning_rate=5e-4") == ExitCode.DONE  # as it was
    assert train("steps=3", "optimizer.learning_rate=5e-4", "logging.layer_norms_every=1") == ExitCode.DONE

    page = reported(run, tmp_path / "four.html")
    changed = [r for r in read_records(str(run)) if r.get("event") == "settings changed"]
    resumed = [r for r in read_records(str(run)) if r.get("event") == "resume"]
    first, last, again = told(changed[0]), told(changed[1]), told(resumed[1])
    assert changes(page) == [
        (first, "1", "resume on 1 rank", "steps", "1", "2"),
        (first, "1", "resume on 1 rank", "optimizer.learning_rate", "0.0001", "0.0005"),
        (again, "2", "resume on 1 rank", "nothing recorded", "", ""),
        (last, "2", "resume on 1 rank", "steps", "2", "3"),
        (last, "2", "resume on 1 rank", "logging.layer_norms_every", "0", "1"),
    ]
    assert "\n  learning_rate: 0.0005\n" in section(page, "Configuration")
    (drawn,) = [
        trace
        for trace in figures(read_records(str(run)))["Progress and faults in time"].data
        if trace.name == "settings changed"
    ]
    assert [x.timestamp() for x in drawn.x] == pytest.approx([event["time"] for event in changed])
    assert list(drawn.y) == [1, 2]
    assert drawn.text[0] == "step 1, steps: 1 -> 2, optimizer.learning_rate: 0.0001 -> 0.0005"


def test_a_start_without_a_checkpoint_and_phases_are_told(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train("steps=5", *PHASES) == ExitCode.DONE
    before = [line[1:] for line in changes(reported(run, tmp_path / "page.html"))]
    assert before == [
        ("2", "phase 1", "global_batch_size", "2", "4"),
        ("2", "phase 1", "data.image_size", "8", "16"),
        ("2", "phase 1", "optimizer.learning_rate", "0.0001", "0.001"),
        ("4", "phase 2", "micro_batch_size", "2", "1"),
    ]
    shutil.rmtree(run / "checkpoints")
    assert train("steps=1", *PHASES[:1], "phases=[{from_step: 3}]") == ExitCode.DONE
    after = [line[1:] for line in changes(reported(run, tmp_path / "page.html"))]
    assert after[: len(before)] == before
    phases = {line[2]: line[3:] for line in after[len(before) :] if line[2].startswith("phases.")}
    assert {line[:2] for line in after[len(before) :]} == {("0", "start")}
    assert ("0", "start", "steps", "5", "1") in after
    assert phases["phases.0.from_step"] == ("2", "3")
    assert phases["phases.0.learning_rate"] == ("0.001", "null")
    assert phases["phases.1.from_step"] == ("4", "-")


def opened(config: Config) -> Sinks:
    """As much of a start as writes, which is still running."""
    sinks = Sinks(config, main_rank=True, resolved={})
    sinks.open(start_step=3, samples_seen=24, run_id=None)
    return sinks


def test_a_run_on_s3_tells_its_change_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalS3(tmp_path / "s3", buckets=("bucket",)) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        config = Config(run_dir="s3://bucket/run", logging=QUIET)
        first = opened(config)
        first.log(3, 24, {"loss": 1.0})
        first.close()
        second = opened(replace(config, global_batch_size=1024))
        page = reported("s3://bucket/run", tmp_path / "page.html")
        second.close()
    assert [line[1:] for line in changes(page)] == [("3", "start", "global_batch_size", "2048", "1024")]
    assert "global_batch_size: 1024" in section(page, "Configuration")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (
            "https://me:hunter2@host/{0..9}.tar?X-Amz-Signature=5ec4e7&a=b",
            "https://***@host/{0..9}.tar?X-Amz-Signature=***&a=b",
        ),
        ("https://hunter2@host/a.tar", "https://***@host/a.tar"),
        ("s3://me:hunter2@host/{0..9}.tar", "s3://***@host/{0..9}.tar"),
        ("https://host/a.tar?sv=1&sig=5ec4e7%3D", "https://host/a.tar?sv=1&sig=***"),
    ],
)
def test_what_lets_urls_in_is_in_no_record_and_on_no_page(tmp_path: Path, url: str, shown: str) -> None:
    run = str(tmp_path / "run")
    config = Config(run_dir=run, logging=QUIET, data=DataConfig(shards="abfss://part@account/a@b.tar"))
    opened(config).close()
    signed = replace(config, data=replace(config.data, shards=url))
    opened(signed).close()
    renewed = replace(config, data=replace(config.data, shards=url.replace("5ec4e7", "5ec4e8")))
    opened(renewed).close()  # another signature is no other data
    page = write_page(run).decode()
    for text in (page, (tmp_path / "run/logs/metrics.jsonl").read_text()):
        assert "hunter2" not in text
        assert "5ec4e" not in text
    lines = [line[3:] for line in changes(page)]
    assert lines == [("data.shards", "abfss://part@account/a@b.tar", shown)]
