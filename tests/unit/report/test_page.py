"""The page about a run: what it draws, what it says, and that it needs nothing but itself."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainer.__main__ import main
from trainer.metrics.jsonl import JSONLWriter, read_records
from trainer.report.figures import column, figures, running_median, thinned
from trainer.report.page import previews, write_page

RECORDED = (
    *("adaptive_weight", "checkpoint/blocked_s", "checkpoint/bytes", "checkpoint/waited_s", "data_wait"),
    *("discriminator", "eval/fd_random", "generator", "grad_norm", "images_per_s", "kl", "learning_rate"),
    *("loss", "loss/bin_0", "memory_gib", "nll", "perceptual", "rejected/held_out", "served_share"),
    *("slow_ranks", "step_s", "storage/requests", "time/data_s", "time/unet_s", "validation/bin_0"),
    *("validation/loss", "validation/psnr", "validation/raw_loss"),
    *("gpu/xids", "layers/unet.mid_block/gradient", "layers/unet.mid_block/weight", "ranks/data_s_most"),
)
"""By `ldm demo`, its evaluator and, the last ones, runs on GPUs with layer_norms_every; some of many."""


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "samples_seen": 8 * step, "time": 1_000.0 + step, **more}


def validated(loss: float) -> dict[str, float]:
    """A record of validation, of eleven noise levels."""
    found = {"loss": loss, "raw_loss": loss + 1, **{f"bin_{i}": loss + i for i in (10, *range(10))}}
    errors = {f"{name}_stderr": 0.01 * value for name, value in found.items()}
    whole = {**found, **errors, "samples": 1000.0, "seconds": 3.0}
    return {f"validation/{name}": value for name, value in whole.items()}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Four steps, a rewind to the second, two more; pictures of three steps."""
    writer = JSONLWriter(str(tmp_path))
    for step, loss in ((1, 1.0), (2, 0.8), (3, math.nan), (4, 5.0)):
        writer.write(record(step, loss=loss, **{"time/unet_s": 0.2, "step_s": 0.3, "images_per_s": 26.5}))
    writer.write(record(4, event="rewind", kind="spike", value="<script>5.0</script>", skipped=[7, 9]))
    for step, loss in ((3, 0.7), (4, 0.6)):
        writer.write(record(step, loss=loss, **{"rejected/too_small": 2.0}))
        writer.write(record(step, **validated(loss + 0.1)))
    writer.close()
    with (tmp_path / "logs/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "samples_se')  # cut by a crash
    (tmp_path / "samples").mkdir()
    for step, colour in ((0, "red"), (2, "green"), (4, "blue")):
        Image.new("RGB", (3000, 20), colour).save(tmp_path / f"samples/preview-{step:08d}.png")
    (tmp_path / "config.yaml").write_text("run_dir: </pre><script>alert(1)</script>\n")
    return tmp_path


def test_a_curve_is_broken_where_training_went_back(run_dir: Path) -> None:
    rows = [r for r in read_records(str(run_dir)) if "event" not in r]
    xs, ys = column(rows, "loss")
    # Step 3 was not finite, which records hold as a text; steps 3 and 4 come a second time.
    assert ys == [1.0, 0.8, 5.0, None, 0.7, 0.6]
    assert xs == [8, 16, 32, 32, 24, 32]
    assert column(rows, "nothing") == ([], [])


def test_long_curves_are_thinned_evenly() -> None:
    xs, _ = thinned(*column([record(step, loss=1.0) for step in range(1, 10_001)], "loss"))
    assert 2_000 < len(xs) <= 4_000
    assert len({after - before for before, after in pairwise(xs)}) == 1
    assert thinned([], []) == ([], [])


def test_long_curves_are_broken_at_every_rewind() -> None:
    """Three of them in 19,000 records, each 1,001 steps back, between points that stay."""
    steps = [*range(1, 6_003), *range(5_001, 10_004), *range(9_002, 13_005), *range(12_004, 15_996)]
    drawn = figures([record(step, loss=float(step)) for step in steps])["Loss"]
    for curve in drawn.data:
        assert 3_000 < len(curve.x) < 4_020
        assert list(curve.y).count(None) == 3
        assert [b for a, b in pairwise(curve.x) if b < a] == [8 * first for first in (5_001, 9_002, 12_004)]
        for at, (before, after) in enumerate(pairwise(curve.x)):
            if after < before:  # from the end of a stretch over a break to the beginning of the next
                assert curve.y[at] is None
    # The median is of 25 records, not of 25 points, and begins anew behind a break.
    loss, median = drawn.data
    assert list(loss.y[:4]) == [1.0, 6.0, 11.0, 16.0]
    assert list(median.y[:8]) == [1.0, 3.5, 6.0, 8.5, 11.0, 14.0, 19.0, 24.0]
    anew = list(median.y).index(None) + 1
    assert list(median.y[anew : anew + 3]) == [5_001.0, 5_003.5, 5_006.0]


def test_the_median_runs_within_a_stretch() -> None:
    assert running_median([1.0, 9.0, 2.0, None, 5.0, 3.0], 3) == [1.0, 5.0, 2.0, None, 5.0, 4.0]


def test_figures_hold_what_the_records_hold(run_dir: Path) -> None:
    drawn = figures(read_records(str(run_dir)))
    assert list(drawn) == [
        *(
            "Loss",
            "Validation: loss",
            "Validation by noise level, from little to much",
            "Speed",
            "Where a step's time goes",
            "Rejected samples by reason",
        ),
        "Progress and faults in time",
    ]
    assert [trace.name for trace in drawn["Loss"].data] == ["loss", "median of 25"]
    averaged, raw = drawn["Validation: loss"].data
    assert (averaged.name, raw.name) == ("loss", "raw_loss")
    assert list(averaged.y) == pytest.approx([0.8, 0.7])
    assert list(raw.error_y.array) == pytest.approx([0.018, 0.017])
    levels = drawn["Validation by noise level, from little to much"].data
    assert [level.name for level in levels] == [f"bin_{i}" for i in range(11)]
    assert [shape.x0 for shape in drawn["Loss"].layout.shapes] == [32]  # the rewind
    steps, rewinds = drawn["Progress and faults in time"].data
    assert (steps.name, rewinds.name, list(rewinds.y)) == ("step", "rewind", [4])
    assert rewinds.x[0].timestamp() == 1_004.0


def test_norms_ranks_and_gpus_are_drawn() -> None:
    told = {"ranks/data_s_most": 0.1, "ranks/slowest": 3.0, "ranks/waits_s_most": 0.2, "gpu/xids": 1.0}
    norms = {"layers/unet.mid_block/weight": 5.0, "layers/unet.mid_block/gradient": 0.1}
    drawn = figures([record(step, **told, **norms, slow_ranks=1, served_share=0.9) for step in (1, 2)])
    assert {title: [curve.name for curve in figure.data] for title, figure in drawn.items()} == {
        "Norm of the weights, by block": ["unet.mid_block"],
        "Norm of the mean gradient, by block": ["unet.mid_block"],
        "Most of any rank, and how long the quickest waits, in seconds": ["data", "waits"],
        "Slow ranks": ["ranks"],
        "Served samples": ["share of all"],
        "What the GPUs' drivers say": ["xids"],
        "Progress and faults in time": ["step"],
    }


def test_the_page_stands_alone_and_runs_nothing_of_the_run(run_dir: Path) -> None:
    page = write_page(str(run_dir)).decode()
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"']?(https?:)?//", page)
    body = page[page.index("<body>") :]
    assert "<script>alert(1)</script>" not in page
    assert "&lt;script&gt;alert(1)" in body
    assert "<script>5.0" not in page
    for word in ("Loss", "Validation", "spike", "Configuration"):
        assert word in body
    assert "<b>4</b><span>step</span>" in body
    assert "<b>1</b><span>rewinds</span>" in body


def test_pictures_are_shrunk_and_spread_over_the_run(run_dir: Path) -> None:
    grids = previews(str(run_dir), 2)
    assert [grid.step for grid in grids] == [0, 4]
    assert all(grid.data_url.startswith("data:image/webp;base64,") for grid in grids)
    assert previews(str(run_dir), 0) == []
    page = write_page(str(run_dir), most_pictures=0).decode()
    assert 'id="grid"' not in page


def test_records_of_a_remote_folder_are_in_order_of_time() -> None:
    """After a rewind a later object may bear an earlier step."""
    import fsspec

    memory = fsspec.filesystem("memory")
    first = [record(1, loss=1.0), record(900, loss=0.5)]
    again = [{**record(500, loss=0.6), "time": 5_000.0}]
    for begin, lines in ((1, first), (500, again)):
        text = "\n".join(map(json.dumps, lines))
        memory.pipe_file(f"/report-run/logs/metrics-{begin:08d}.jsonl", text.encode())
    found = read_records("memory://report-run")
    assert [r["step"] for r in found] == [1, 900, 500]
    assert [r["step"] for r in read_records("memory://report-run", 70)] == [500]


def test_the_command_says_where_the_page_is(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_dir)]) == 0
    where = capsys.readouterr().out.strip()
    assert where == f"{run_dir}/report.html"
    assert Path(where).read_bytes().startswith(b"<!DOCTYPE html>")
    assert main(["report", str(run_dir / "samples")]) == 2
    assert "holds no records of a run" in capsys.readouterr().err
    assert main(["report", str(run_dir), "--pictures", "-1"]) == 2


def test_a_workspace_shows_what_runs_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The columns are those that the two runs of the demo record; W&B's library checks the schema."""
    out = tmp_path / "workspace.json"
    assert main(["report", "--workspace", "team/sd2", "--out", str(out)]) == 0
    view = json.loads(out.read_text())
    assert (view["entity"], view["project"]) == ("team", "sd2")
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    panels = [panel for section in sections for panel in section["panels"]]
    curves = [panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot"]
    assert {curve["xAxis"] for curve in curves} == {"samples_seen"}
    empty = [
        curve["chartTitle"]
        for curve in curves
        if not set(curve["metrics"] or ()) <= set(RECORDED)
        or (curve["metricRegex"] and not any(re.search(curve["metricRegex"], name) for name in RECORDED))
    ]
    assert empty == []
    assert [panel["config"]["mediaKeys"] for panel in panels if panel["viewType"] == "Media Browser"] == [
        ["preview"]
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workspace", "team"], "write ENTITY/PROJECT"),
        (["--workspace", "a/b/c"], "write ENTITY/PROJECT"),
        (["--workspace", "team/sd2"], "needs WANDB_API_KEY"),
        (["run", "--workspace", "team/sd2"], "name a RUN"),
        ([], "name a RUN"),
    ],
)
def test_mistakes_about_a_workspace(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/nowhere")
    assert main(["report", *words]) == 2
    assert said in capsys.readouterr().err
