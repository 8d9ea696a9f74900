"""An evaluator beside a run: what it measures, passes over, marks and tells, and what it leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.unit.metrics.test_meters_and_sinks import offline_runs, wandb_records
from trainer.__main__ import main
from trainer.checkpoint.catalogue import Learned, Retention, folder_name, open_checkpoint, steps_to_retire
from trainer.checkpoint.marks import mark, marked_steps
from trainer.config.run import ConfigError
from trainer.evaluator.findings import EvaluatorFindings, higher_is_better
from trainer.evaluator.lookout import Lookout, Sighting
from trainer.metrics.jsonl import JSONLWriter

from .committed_run import MakeRun, lines, reference, watch


def marked(tmp_path: Path) -> set[int]:
    return marked_steps(str(tmp_path / "run/checkpoints"))


def test_what_is_committed_is_measured_once(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run()
    run.commit(100)
    assert watch(tmp_path, "--once") == 0
    run.commit(200)
    run.commit(300)
    assert watch(tmp_path, "--once") == 0
    assert watch(tmp_path, "--once") == 0
    assert [line["step"] for line in lines(tmp_path)] == [100, 300], "200 was passed over"
    assert [line["samples_seen"] for line in lines(tmp_path)] == [400, 1200]
    for line in lines(tmp_path):
        assert line["eval/fd_random"] > 0
        assert "eval/kd_random" in line
    best = min(lines(tmp_path), key=lambda line: line["eval/fd_random"])["step"]
    assert marked(tmp_path) == {best}
    out = tmp_path / "run/evaluation"
    assert (out / "samples/step_000000300.png").exists()
    assert not (out / "pictures").exists() or not list((out / "pictures").iterdir())


def test_the_figures_are_those_of_the_commands_one_by_one(tmp_path: Path, make_run: MakeRun) -> None:
    make_run().commit(100)
    assert watch(tmp_path, "--once") == 0
    drawn = [
        "sample",
        str(tmp_path / "run"),
        "--count",
        "20",
        "--batch-size",
        "4",
        "--out",
        str(tmp_path / "a"),
    ]
    assert main(drawn) == 0
    measured = ["evaluate", "fidelity", str(tmp_path / "a/pictures"), "--reference", str(tmp_path / "real")]
    assert main([*measured, "--features", "random", "--out", str(tmp_path / "a.json")]) == 0
    figures = json.loads((tmp_path / "a.json").read_text())["figures"]
    assert lines(tmp_path)[0]["eval/fd_random"] == figures["fd_random"]


def test_all_of_them_in_order(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run()
    for step in (100, 150, 200, 300):
        run.commit(step)
    assert watch(tmp_path, "--once", "--rule", "all", "--every", "100", "--best", "2") == 0
    assert [line["step"] for line in lines(tmp_path)] == [100, 200, 300]
    ranked = sorted(lines(tmp_path), key=lambda line: line["eval/fd_random"])
    assert marked(tmp_path) == {line["step"] for line in ranked[:2]}


def test_it_ends_with_the_run(tmp_path: Path, make_run: MakeRun) -> None:
    """And sees what is committed while it watches."""
    run = make_run("steps=300")
    status: list[int] = []
    thread = threading.Thread(target=lambda: status.append(watch(tmp_path, "--rule", "all")))
    thread.start()
    for step in (100, 300):
        run.commit(step)
    thread.join(timeout=120)
    assert status == [0]
    assert [line["step"] for line in lines(tmp_path)] == [100, 300]


def test_a_run_that_was_rewound_is_measured_again(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run()
    run.commit(100)
    run.commit(200)
    assert watch(tmp_path, "--once", "--rule", "all") == 0
    run.commit(200, weights=7)  # as it is after a rewind to 100
    assert watch(tmp_path, "--once", "--rule", "all") == 0
    assert [line["step"] for line in lines(tmp_path)] == [100, 200, 200]
    first, again = (line["eval/fd_random"] for line in lines(tmp_path)[1:])
    assert first != again
    latest = {line["step"]: line["eval/fd_random"] for line in lines(tmp_path)}
    assert marked(tmp_path) == {min(latest, key=lambda step: latest[step])}, "the lost weights do not count"


def test_snapshots_are_measured_where_there_is_no_checkpoint(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run()
    run.commit(100)
    run.commit(100, snapshot=True)
    run.commit(150, snapshot=True)
    assert watch(tmp_path, "--once", "--rule", "all") == 0
    assert [(line["step"], line["snapshot"]) for line in lines(tmp_path)] == [(100, False), (150, True)]
    assert [line["samples_seen"] for line in lines(tmp_path)] == [400, 600]
    assert marked(tmp_path) == {100}, "a snapshot is kept anyway"
    assert watch(tmp_path, "--once", "--no-snapshots", "--out", str(tmp_path / "other")) == 0
    assert len((tmp_path / "other/metrics.jsonl").read_text().splitlines()) == 1


def test_retention_keeps_what_is_marked(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run("checkpoint.keep_last=1")
    folder = str(tmp_path / "run/checkpoints")
    run.commit(100)
    mark(folder, "a", {100}, "the best")
    mark(folder, "b", {100, 200}, "of another")
    for step in (200, 300, 400):
        run.commit(step)
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert names == ["step_000000100", "step_000000200", "step_000000400"]
    mark(folder, "b", set(), "nothing any more")
    run.commit(500)
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert names == ["step_000000100", "step_000000500"]


@pytest.mark.parametrize("content", ["{", "[]", '{"steps": ["100"]}', '{"steps": 100}', '{"keep": [1]}'])
def test_a_mark_that_is_not_understood_keeps_everything(
    tmp_path: Path, make_run: MakeRun, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run("checkpoint.keep_last=1")
    run.commit(100)
    place = tmp_path / "run/checkpoints/keep/by_hand.json"
    place.parent.mkdir()
    place.write_text(content)
    run.commit(200)
    assert len(list((tmp_path / "run/checkpoints").glob("step_*"))) == 2
    assert "by_hand.json" in caplog.text
    place.unlink()
    folder = tmp_path / "run/checkpoints"
    newest = open_checkpoint(str(folder / folder_name(200))).manifest
    assert steps_to_retire(str(folder), newest, Retention(1, 0, 0), Learned()) == [100]


def test_one_that_is_removed_or_damaged_is_passed_over(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run()
    for step in (100, 200, 300):
        run.commit(step)
    shard = next((tmp_path / "run/checkpoints/step_000000200").glob("*.safetensors"))
    manifest = tmp_path / "run/checkpoints/step_000000300/manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    shard.unlink()
    for each in (tmp_path / "run/checkpoints/step_000000200").iterdir():
        if each.name != "manifest.json":
            each.unlink()
    assert watch(tmp_path, "--once", "--rule", "all") == 0
    assert [line["step"] for line in lines(tmp_path)] == [100]


def test_a_rewind_is_seen_by_one_that_goes_on_looking(tmp_path: Path, make_run: MakeRun) -> None:
    run, lookout = make_run(), Lookout(str(tmp_path / "run"))
    assert lookout.look() == []
    run.commit(100)
    run.commit(200)
    (_, before) = lookout.look()
    run.commit(200, weights=7)
    (kept, after) = lookout.look()
    assert (before.step, after.step) == (200, 200)
    assert before.checksum != after.checksum
    assert not lookout.is_there(before)
    assert lookout.due([kept, after], {kept.key, before.key}, "newest") == (after, [])


def test_the_newest_rule_after_a_restart(tmp_path: Path) -> None:
    def seen(*steps: int) -> list[Sighting]:
        return [Sighting(step, f"sum{step}", str(step), snapshot=False) for step in steps]

    def looked(found: list[Sighting]) -> Lookout:
        lookout = Lookout(str(tmp_path))
        lookout.look()
        lookout._first_seen.update({each.key: 1 for each in found})
        return lookout

    found = seen(100, 200, 300)
    assert looked(found).due(found, {(300, "sum300")}, "newest") == (None, found[:2])
    assert looked(found).due(found, {(100, "sum100")}, "newest") == (found[2], [found[1]])
    lookout = looked(found)
    rewound = [found[0], Sighting(200, "other", "200", snapshot=False), found[2]]
    lookout._first_seen[rewound[1].key] = 2
    known = {each.key for each in found}
    assert lookout.due(rewound, known, "newest") == (rewound[1], []), "older in steps, newer in time"


def test_findings_of_another_are_refused_and_numbers_that_are_none_are_texts(tmp_path: Path) -> None:
    found = EvaluatorFindings(str(tmp_path))
    found.add({"step": 1, "checkpoint": "a", "samples_seen": 4, "eval/fid": float("nan")})
    found.add({"step": 2, "checkpoint": "b", "samples_seen": 8, "eval/fid": 3.0})
    again = EvaluatorFindings(str(tmp_path))
    assert again.measured == {(1, "a"), (2, "b")}
    assert again.best("fid", 2) == [2]
    with pytest.raises(ValueError, match=r"no figure 'kid'.*fid"):
        again.best("kid", 1)
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    with pytest.raises(ValueError, match="line 1"):
        EvaluatorFindings(str(tmp_path))
    higher = ["precision", "clip_score", "is", "recall_dinov2", "coverage_random"]
    lower = ["fid", "kid", "sfid", "fd_dinov2", "mind", "cmmd"]
    assert [higher_is_better(name) for name in (*higher, *lower)] == [True] * 5 + [False] * 6


def test_mistakes_are_one_sentence(
    tmp_path: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run().commit(100)
    for words, said in (
        (["--every", "0"], "--every 0"),
        (["--out", " "], "--out is empty"),
        (["--best", "-1"], "--best -1"),
        (["--poll-s", "0"], "--poll-s 0"),
        (["--sample", "--steps 3"], "--count"),
        (["--sample", "--count 3 --out x"], "--out"),
        (["--sample", "--count 0"], "--count 0"),
        (["--sample", "--count '3"], "correct its quotes"),
        (["--reference", " "], "--reference is empty"),
        (["--once", "--sample", "--count 3 --prompts-from x.txt"], "x.txt"),
        (["--once", "--best-metric", "recall"], "no figure 'recall' here; choose from fd_random"),
    ):
        assert watch(tmp_path, *words) == 2, words
        error = capsys.readouterr().err
        assert said in error, words
        assert len([line for line in error.splitlines() if line.startswith("ldm: ")]) == 1


def test_lines_say_what_measured_them_and_others_are_not_mixed_with_them(
    tmp_path: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run()
    run.commit(100)
    assert watch(tmp_path, "--once") == 0
    (line,) = lines(tmp_path)
    name, digest, sees = line["measured_by"]["networks"]["random"]
    assert name.startswith("random-64")
    assert len(digest) == 64
    assert sees
    assert {"reference": 24, "sample": "--count 20 --batch-size 4"}.items() <= line["measured_by"].items()
    assert any("holds 20 pictures, not more than the 64 dimensions" in note for note in line["notes"])
    assert any("not more than the 64 dimensions" in record.message for record in caplog.records)
    run.commit(200)
    capsys.readouterr()
    assert watch(tmp_path, "--once", "--sample", "--count 8 --batch-size 4") == 2
    assert "holds figures by other sample, which do not compare" in capsys.readouterr().err
    assert watch(tmp_path, "--once", "--image-size", "4") == 2
    assert "holds figures by other image_size" in capsys.readouterr().err
    other = ["--reference", reference(tmp_path / "other", seed=100)]  # as many pictures
    assert watch(tmp_path, "--once", *other) == 2
    assert "holds figures by other reference_content" in capsys.readouterr().err
    assert watch(tmp_path, "--once", "--sample", "--batch-size 5 --seed 0 --count=20") == 0
    assert [line["step"] for line in lines(tmp_path)] == [100, 200]


def test_lines_of_earlier_versions_are_gone_on_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They say how many pictures the reference has, and not which."""
    now = {"reference": 24, "reference_content": "1f2e", "fit": None}
    found = EvaluatorFindings(str(tmp_path))
    line = {"step": 1, "checkpoint": "a", "samples_seen": 4}
    found.add(line | {"measured_by": {"reference": 24}})
    found.require_same(now)
    assert "did not write fit and reference_content: whether that is the same is not known" in caplog.text
    found.add(line | {"step": 2, "measured_by": now})
    with pytest.raises(ConfigError, match="by other reference_content"):
        found.require_same(now | {"reference_content": "5a5a"})
    with pytest.raises(ConfigError, match="by other fit"):
        found.require_same(now | {"fit": "squash"})


def test_a_set_that_was_begun_in_other_batches_is_begun_anew(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run()
    run.commit(100)
    assert watch(tmp_path, "--once", "--keep-pictures") == 0
    (line,) = lines(tmp_path)
    (tmp_path / "run/evaluation/metrics.jsonl").unlink()  # as if it had been killed before it measured
    (tmp_path / "run/evaluation").glob("pictures/*/parts/*").__next__().unlink()
    assert watch(tmp_path, "--once", "--sample", "--count 20 --batch-size 10", "--keep-pictures") == 0
    assert lines(tmp_path)[0]["eval/fd_random"] == pytest.approx(line["eval/fd_random"], rel=1e-6)
    assert len(list((tmp_path / "run/evaluation").glob("pictures/*/parts/*"))) == 2


def test_a_network_that_draws_no_numbers_is_said(
    tmp_path: Path, make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    """NaN becomes pictures of a single colour, whose figures are numbers like others."""
    make_run().commit(100, scale=float("nan"))
    assert watch(tmp_path, "--once") == 0
    assert any("what NaN becomes" in note for note in lines(tmp_path)[0]["notes"])
    assert any("what NaN becomes" in record.message for record in caplog.records)


def test_wandb_has_it_in_the_group_of_the_run(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run("logging.wandb=offline")
    run.commit(100)
    run.commit(150, snapshot=True)
    assert watch(tmp_path, "--once") == 0
    deadline = time.monotonic() + 60
    while not (runs := offline_runs(tmp_path / "run/evaluation")) and time.monotonic() < deadline:
        time.sleep(0.1)  # wandb's own process writes the files
    ((run_id, group),) = runs
    assert group == "abc123"
    assert run_id.startswith("abc123-evaluator-")
    (path,) = (tmp_path / "run/evaluation").glob("wandb/offline-run-*/*.wandb")
    history = [record.history.item for record in wandb_records(path) if record.HasField("history")]
    configured = [
        item for record in wandb_records(path) if record.HasField("run") for item in record.run.config.update
    ]
    (by,) = (json.loads(item.value_json) for item in configured if item.key == "measured_by")
    assert by == lines(tmp_path)[0]["measured_by"]
    rows = [{item.key or "/".join(item.nested_key): item.value_json for item in row} for row in history]
    told = [row for row in rows if "eval/fd_random" in row]
    assert [int(row["samples_seen"]) for row in told] == [line["samples_seen"] for line in lines(tmp_path)]
    assert [float(row["eval/fd_random"]) for row in told] == [
        line["eval/fd_random"] for line in lines(tmp_path)
    ]


def test_one_wandb_run_for_both_has_no_offline_form() -> None:
    """The first reason in docs/monitoring.md; where this fails, W&B has learnt it."""
    wandb = pytest.importorskip("wandb")
    shared = wandb.Settings(mode="shared")
    assert shared._shared
    assert not shared._offline
    assert not wandb.Settings(mode="offline")._shared


def test_the_script_for_slurm_says_how_to_use_it(tmp_path: Path) -> None:
    script = Path(__file__).parents[3] / "slurm/evaluate.sh"
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    for environment, words in ((outside, ["s3://bucket/run"]), ({**outside, "SLURM_JOB_ID": "1"}, [])):
        done = subprocess.run(
            [str(script), *words], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
        )
        assert done.returncode == 2
        assert "usage: sbatch" in done.stderr


def test_the_report_draws_what_it_has_found(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run()
    run.commit(100)
    assert watch(tmp_path, "--once") == 0
    JSONLWriter(str(tmp_path / "run")).write({"step": 100, "samples_seen": 400, "time": 1.0, "loss": 0.5})
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Fidelity" in page
    assert "fd_random" in page
    name, digest, _ = lines(tmp_path)[0]["measured_by"]["networks"]["random"]
    assert f"<p>measured by {name}, weights {digest[:16]}, " in page
