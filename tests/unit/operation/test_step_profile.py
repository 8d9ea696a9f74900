"""Profiles that are asked for while a run trains: what is written, by whom, and that nothing else changes."""

from __future__ import annotations

import gzip
import json
import logging
import re
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from tests.integration.ranks import run_ranks
from tests.unit.one_rank import Train
from tests.unit.test_resume_changed import records
from trainer.exit_codes import ExitCode
from trainer.metrics.step_profile import Spent, by_kind, format_profile
from trainer.reliability.requests import ProfileRequest, ask_for_profile, profile_url


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in records(run_dir) if "loss" in record]


def test_a_run_writes_the_steps_that_were_asked_for_and_its_losses_stay(train: Train, tmp_path: Path) -> None:
    plain, asked = tmp_path / "plain", tmp_path / "asked"
    assert train("steps=6", f"run_dir={plain}") == ExitCode.DONE
    request = ask_for_profile(str(asked), steps=2, ranks=(0,))
    assert train("steps=6", f"run_dir={asked}") == ExitCode.DONE

    assert losses(asked) == losses(plain)
    assert not Path(profile_url(str(asked))).exists()
    assert not (plain / "profiles").exists()
    (folder,) = (asked / "profiles").iterdir()
    begun = int(re.fullmatch(rf"step_(\d{{9}})_{request.name}", folder.name)[1])  # type: ignore[index]
    assert {path.name for path in folder.iterdir()} == {"rank_00000.txt", "rank_00000.trace.json.gz"}
    table = (folder / "rank_00000.txt").read_text()
    assert table.startswith(f"steps {begun + 1} to {begun + 2}, rank 0 (")
    assert {"convolution", "matmul", "optimizer"} <= set(re.findall(r"%\s+[\d.]+\s+(\w+)\n", table))
    trace = json.loads(gzip.decompress((folder / "rank_00000.trace.json.gz").read_bytes()))
    assert sum("convolution" in str(event.get("name")) for event in trace["traceEvents"]) > 10


def test_a_profile_that_the_end_of_the_run_cuts_short_is_written(train: Train, tmp_path: Path) -> None:
    ask_for_profile(str(tmp_path / "run"), steps=50, ranks=(0,))
    assert train("steps=4") == ExitCode.DONE
    (table,) = (tmp_path / "run/profiles").glob("*/rank_00000.txt")
    assert " to 4, rank 0" in table.read_text()


def test_ranks_begin_together_and_only_the_chosen_ones_write(tmp_path: Path) -> None:
    told = run_ranks("tests/unit/operation/profile_ranks.py:profiled", 2, {"run_dir": str(tmp_path)})
    # Who was recording at each of six boundaries; rank 0 hears of the request before the second.
    assert told == [[False] * 6, [False, True, True, False, False, False]]
    names = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "profiles").rglob("rank_*"))
    folder = "profiles/step_000000002_abc"
    assert names == [f"{folder}/rank_00001.trace.json.gz", f"{folder}/rank_00001.txt"]


def test_an_empty_file_asks_for_the_defaults_and_nonsense_for_nothing(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request = ProfileRequest.from_bytes(b"\n")
    assert (request.steps, request.ranks) == (3, (0,))
    for content in (b"{", b"[]", b'{"ranks": []}', b'{"steps": 0}', b'{"ranks": [-1]}', b'{"steps": "many"}'):
        with pytest.raises(UserError, match="profile"):
            ProfileRequest.from_bytes(content)
    assert ProfileRequest.from_bytes(b'{"name": "../../x"}').name == "x"

    (tmp_path / "run").mkdir()
    (tmp_path / "run/PROFILE").write_text("please")
    with caplog.at_level(logging.WARNING):
        assert train("steps=2") == ExitCode.DONE
    assert [r.getMessage() for r in caplog.records if "PROFILE is not followed" in r.getMessage()]
    assert not (tmp_path / "run/PROFILE").exists()
    assert not (tmp_path / "run/profiles").exists()


def test_kinds_add_up() -> None:
    spent = [
        Spent("aten::mkldnn_convolution", 6.0, 4),
        Spent("aten::addmm", 3.0, 2),
        Spent("aten::convolution_backward", 2.0, 2),
        Spent("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 1.0, 2),
    ]
    assert by_kind(spent) == [
        Spent("convolution", 8.0, 6),
        Spent("matmul", 3.0, 2),
        Spent("communication", 1.0, 2),
    ]
    lines = format_profile(spent, "steps 1 to 2", 2).splitlines()
    assert lines[1] == "6.000 ms per step in all"
    assert lines[4].split() == ["4.000", "66.7%", "3.0", "convolution"]
