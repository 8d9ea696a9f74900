"""What a SLURM job decides: a snapshot of what was submitted, and what an attempt's end means."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import logging
import os
import re
import shutil
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import Failure, UserError
from data_pipeline.storage.files import write_bytes
from trainer.config.io import config_to_dict, dump_yaml, load_run
from trainer.config.run import Config
from trainer.console import configure_logging
from trainer.exit_codes import ExitCode, combine, normalize, should_restart
from trainer.metrics.jsonl import read_records
from trainer.provenance import git_commit

logger = logging.getLogger(__name__)

_SNAPSHOT = ("trainer", "data_pipeline", "configs", "slurm", "pyproject.toml", "constraints.txt")
_SIGNALLED = {
    "Killed": 137,
    "Terminated": 143,
    "Segmentation fault": 139,
    "Bus error": 135,
    "Aborted": 134,
    "Out Of Memory": 137,
    "Hangup": 129,
    "User defined signal 1": 138,
    "User defined signal 2": 140,
    "Interrupt": 130,
}
_PREEMPTING = (138, 140, 143)
_RECORDS_BYTES = 1 << 20
"""Of a run's newest records: hours of them."""
_TASK_LINE = re.compile(r"srun: error: (?P<nodes>[^\s:]+): tasks? (?P<tasks>[\d,\-\[\]]+): (?P<what>.+)")
_EXIT = re.compile(r"Exited with exit code (\d+)")
_TERMINATING = re.compile(r"Terminating StepId|Force Terminated|Job step aborted|CANCELLED AT")
_NODE_FAILURE = re.compile(r"srun: error: Node failure on (\S+)")


@dataclass(frozen=True)
class TaskEnd:
    """What srun said about the end of one or several of its tasks."""

    nodes: str
    """Node, or a SLURM host list such as n[1-2]."""
    status: int
    """Exit status in the shell's form (128 + signal number)."""
    terminated: bool
    """Ended by srun because another task was gone."""


@dataclass(frozen=True)
class Policy:
    """When to give up on a job or a node; from LDM_MAX_FAULTS, LDM_HEALTHY_S and LDM_NODE_STRIKES."""

    max_faults: int = 5
    """Faults in a row after which the job is not requeued."""
    healthy_s: float = 1800.0
    """An attempt that lasted this long starts the count of faults anew."""
    node_strikes: int = 2
    """Faults of one node after which it is excluded from this job."""

    @staticmethod
    def from_environment() -> Policy:
        """Defaults where a variable is unset."""
        return Policy(
            max_faults=int(os.environ.get("LDM_MAX_FAULTS", Policy.max_faults)),
            healthy_s=float(os.environ.get("LDM_HEALTHY_S", Policy.healthy_s)),
            node_strikes=int(os.environ.get("LDM_NODE_STRIKES", Policy.node_strikes)),
        )


def prepare(job_dir: Path, repository: Path, arguments: Sequence[str]) -> Config:
    """Check the configuration and copy it and the code into `job_dir`; `submission.json` is the commit.

    In a job array, the task's number is added to the seed and the run folder gets `/seed-N`.

    Raises:
        ConfigError: a mistake in the configuration, or a batch that this allocation's ranks cannot share;
            nothing was written.
    """
    path, overrides = arguments[0], list(arguments[1:])
    if not Path(path).exists() and (repository / path).exists():
        path = str(repository / path)  # submitted from outside the repository
    config = load_run(path, overrides)
    nodes, tasks = (os.environ.get(f"SLURM_{name}", "") for name in ("NNODES", "NTASKS_PER_NODE"))
    if nodes.isdigit() and tasks.isdigit():
        config.sharing(int(nodes) * int(tasks))
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if task is not None:
        seed = config.seed + int(task)
        run_dir = f"{config.run_dir.rstrip('/')}/seed-{seed}"
        config = dataclasses.replace(config, seed=seed, run_dir=run_dir)
    job_dir.mkdir(parents=True, exist_ok=True)
    snapshot(repository, job_dir / "code")
    (job_dir / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    key = f"{config.run_dir} {job_dir.name} {time.time_ns()}".encode()
    (job_dir / "wandb_run_id").write_text(hashlib.sha256(key).hexdigest()[:8] + "\n", encoding="utf-8")
    submission = {
        "job": job_dir.name,
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "arguments": list(arguments),
        "working_directory": str(Path.cwd()),
        "commit": git_commit(repository, mark_changes=True),
        "run_dir": config.run_dir,
        "config": config_to_dict(config),
    }
    _store_in_run(config.run_dir, job_dir, submission)
    (job_dir / "submission.json").write_text(json.dumps(submission, indent=2) + "\n", encoding="utf-8")
    return config


def snapshot(repository: Path, target: Path) -> None:
    """Copy what a run needs of `repository` to `target`, replacing an unfinished copy."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in _SNAPSHOT:
        source = repository / name
        if source.is_dir():
            shutil.copytree(source, partial / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        elif source.exists():
            partial.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, partial / name)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def read_attempts(job_dir: Path) -> list[dict[str, Any]]:
    """Every finished attempt of a job, oldest first."""
    path = job_dir / "attempts.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def parse_srun(text: str) -> tuple[list[TaskEnd], list[str]]:
    """(ends of tasks in the order srun reported them, nodes that srun lost) from srun's stderr."""
    ends: list[TaskEnd] = []
    lost: list[str] = []
    terminating = False
    for line in text.splitlines():
        failure = _NODE_FAILURE.search(line)
        task = _TASK_LINE.search(line)
        if failure:
            lost += [node for node in failure[1].split(",") if node not in lost]
        elif task:
            code = _EXIT.search(task["what"])
            words = task["what"].partition(" (")[0].strip()
            status = int(code[1]) if code else _SIGNALLED.get(words, 137)
            ends.append(TaskEnd(task["nodes"], status, terminating))
        elif _TERMINATING.search(line):
            terminating = True
    return ends, lost


def blame(ends: Iterable[TaskEnd], lost: Sequence[str]) -> list[str]:
    """Nodes at fault: lost ones; else where a signal ended a rank; else where ranks hung to the end.

    Ranks that stopped by themselves with an exit code only noticed a fault: they are witnesses. A line
    that covers several nodes at once names no culprit.
    """
    if lost:
        return list(lost)
    ends = [end for end in ends if "[" not in end.nodes and "," not in end.nodes]
    own = {end.nodes for end in ends if not end.terminated}
    struck = [end.nodes for end in ends if not end.terminated and end.status > 128]
    hung = [end.nodes for end in ends if end.terminated and end.nodes not in own]
    culprits = struck[:1] or (hung if len(set(hung)) == 1 and own else [])
    return sorted(set(culprits))


def exit_code(status: int, ends: Sequence[TaskEnd], lost: Sequence[str]) -> ExitCode:
    """How the run ended, from srun's own status and what it said about each task."""
    own = [end.status for end in ends if not end.terminated]
    if lost:
        return ExitCode.RETRYABLE
    if not own:
        return normalize(status)
    # A rank that dies of such a signal was still importing, and had nothing to save yet.
    return combine(ExitCode.PREEMPTED if code in _PREEMPTING else code for code in own)


def decide(attempts: Sequence[dict[str, Any]], policy: Policy) -> tuple[str, list[str]]:
    """("done" | "stop" | "requeue", nodes to exclude) after the last of `attempts`."""
    code = ExitCode(attempts[-1]["code"])
    if code == ExitCode.DONE:
        return "done", []
    if not should_restart(code):
        return "stop", []
    faults = 0
    for attempt in attempts:
        lasting = attempt["ended"] - attempt["started"] >= policy.healthy_s
        fault = attempt["code"] == ExitCode.RETRYABLE
        faults = (0 if lasting else faults) + 1 if fault else 0
    if faults >= policy.max_faults:
        return "stop", []
    strikes = Counter(node for attempt in attempts for node in attempt["blamed"])
    sick = {node for attempt in attempts for node in attempt.get("sick", ())}
    return "requeue", sorted(sick.union(n for n, count in strikes.items() if count >= policy.node_strikes))


def sick_nodes(job_dir: Path, since: float) -> list[str]:
    """Nodes whose drivers have told of a sick GPU since this moment, by the records of the run.

    None where storage does not answer.
    """
    try:
        run_dir = json.loads((job_dir / "submission.json").read_text(encoding="utf-8"))["run_dir"]
        records = read_records(run_dir, _RECORDS_BYTES)
    except (OSError, Failure) as error:
        logger.warning("nothing is known of the health of GPUs: %s", error)
        return []
    events = (record for record in records if record.get("event") == "sick gpu")
    return sorted({record["host"] for record in events if record["time"] >= since})


def _record_and_decide(args: argparse.Namespace) -> int:
    ends: list[TaskEnd] = []
    lost: list[str] = list(args.unfit)
    if args.srun_log is not None and args.srun_log.exists():
        ends, lost = parse_srun(args.srun_log.read_text(encoding="utf-8", errors="replace"))
    code = exit_code(args.status, ends, lost)
    record = {
        "attempt": args.attempt,
        "started": args.started,
        "ended": time.time(),
        "nodes": args.nodes,
        "status": args.status,
        "code": int(code),
        "outcome": code.name.lower(),
        "blamed": blame(ends, lost) if code == ExitCode.RETRYABLE else [],
        "sick": sick_nodes(args.job_dir, args.started),
    }
    with (args.job_dir / "attempts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    action, exclude = decide(read_attempts(args.job_dir), Policy.from_environment())
    sys.stdout.write(f"{action} {','.join(exclude) or '-'}\n")
    return 0


def _store_in_run(run_dir: str, job_dir: Path, submission: dict[str, Any]) -> None:
    """Leave the snapshot in the run folder as well, so that it outlives the job folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(job_dir / "code", arcname="code")
    folder = f"{run_dir.rstrip('/')}/launch/slurm-{job_dir.name}"
    try:
        for name, content in (
            ("code.tar.gz", buffer.getvalue()),
            ("submission.json", json.dumps(submission, indent=2).encode()),
        ):
            write_bytes(f"{folder}/{name}", content)
    except Failure as error:
        # The ranks will say the same with more authority; the job folder has the snapshot anyway.
        logger.warning("the snapshot could not be stored in %s: %s", folder, error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.launch.slurm_job", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare_ = commands.add_parser("prepare", help="snapshot configuration and code, once per job")
    for name in ("job_dir", "repository"):
        prepare_.add_argument(name, type=Path)
    prepare_.add_argument("arguments", nargs="+", metavar="CONFIG a.b=c")
    decide_ = commands.add_parser("decide", help="record an attempt's end; print what follows")
    decide_.add_argument("job_dir", type=Path)
    decide_.add_argument("--attempt", type=int, required=True)
    decide_.add_argument("--started", type=float, required=True)
    decide_.add_argument("--status", type=int, required=True)
    decide_.add_argument("--nodes", required=True)
    decide_.add_argument("--srun-log", type=Path)
    decide_.add_argument("--unfit", nargs="*", default=[])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point for slurm/train_ldm.sh."""
    configure_logging()
    args = _parser().parse_args(argv)
    if args.command == "decide":
        return _record_and_decide(args)
    try:
        prepare(args.job_dir, args.repository, args.arguments)
    except UserError as error:
        sys.stderr.write(f"ldm: {error}\n")
        return ExitCode.USER_ERROR
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
