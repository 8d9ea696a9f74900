"""What a SLURM job asks Python for: a snapshot of what was submitted, and what follows an attempt's end.

The script of the job (slurm/train_ldm.sh) starts and ends ranks, and asks here between them; what it keeps of
the job is in slurm_records.py. How far the run is, only the folder of the run says: the newest committed
checkpoint is looked up at every end.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import logging
import os
import shutil
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import Failure, UserError
from data_pipeline.storage.files import write_bytes
from trainer.config.io import config_to_dict, dump_yaml, load_run
from trainer.config.run import Config, ConfigError
from trainer.console import configure_logging
from trainer.exit_codes import ExitCode
from trainer.launch.observe import newest_checkpoint
from trainer.launch.slurm_records import (
    ATTEMPTS,
    SUBMISSION,
    baseline,
    read_attempts,
    read_submission,
    recovery_sentence,
    run_folder,
)
from trainer.launch.slurm_verdict import (
    Allocation,
    AttemptVerdict,
    Policy,
    TaskEnd,
    blame,
    decide,
    exit_code,
    expand,
    parse_srun,
)
from trainer.metrics.jsonl import read_records
from trainer.provenance import COMMIT_FILE, git_commit
from trainer.reliability.doubt import named_nodes

logger = logging.getLogger(__name__)

SPARE_VARIABLE = "LDM_SPARE_NODES"
"""Environment variable: how many of the job's nodes only wait to take the place of another."""
_SNAPSHOT = ("trainer", "data_pipeline", "configs", "slurm", "pyproject.toml", "constraints.txt")
_RECORDS_BYTES = 1 << 20
"""Of a run's newest records: hours of them."""
_LOOK_S = 30.0


def prepare(job_dir: Path, repository: Path, arguments: Sequence[str]) -> Config:
    """Check the configuration and copy it and the code into `job_dir`; `submission.json` is the commit.

    In a job array, the task's number is added to the seed and the run folder gets `/seed-N`.

    Raises:
        ConfigError: a mistake in the configuration or in a variable, or a batch that this allocation's ranks
            cannot share; nothing was written.
    """
    policy_from_environment()
    path, overrides = arguments[0], list(arguments[1:])
    if not Path(path).exists() and (repository / path).exists():
        path = str(repository / path)  # submitted from outside the repository
    config = load_run(path, overrides)
    nodes, tasks = (os.environ.get(f"SLURM_{name}", "") for name in ("NNODES", "NTASKS_PER_NODE"))
    spare = whole_number(SPARE_VARIABLE, 0, least=0)
    if nodes.isdigit() and spare >= int(nodes):
        raise ConfigError(
            f"{SPARE_VARIABLE}={spare} leaves none of the job's {nodes} nodes to train on; submit with "
            "--nodes=N+S, of which S are the spares."
        )
    if nodes.isdigit() and tasks.isdigit():
        config.sharing((int(nodes) - spare) * int(tasks))
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
        "commit": git_commit(job_dir / "code"),
        "run_dir": config.run_dir,
        "committed": (newest_checkpoint(config.run_dir) or (0, ""))[0],
        "config": config_to_dict(config),
    }
    _store_in_run(config.run_dir, job_dir, submission)
    (job_dir / SUBMISSION).write_text(json.dumps(submission, indent=2) + "\n", encoding="utf-8")
    return config


def snapshot(repository: Path, target: Path) -> None:
    """Copy what a run needs of `repository` to `target`, with its commit, replacing an unfinished copy."""
    commit = git_commit(repository, mark_changes=True)  # before the copy, which may be a change itself
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in _SNAPSHOT:
        source = repository / name
        if source.is_dir():
            shutil.copytree(source, partial / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        elif source.exists():
            partial.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, partial / name)
    (partial / COMMIT_FILE).write_text(f"{commit or ''}\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def policy_from_environment() -> Policy:
    """Defaults where a variable is unset.

    Raises:
        ConfigError: a variable is no number, or too small.
    """
    return Policy(
        max_faults=whole_number("LDM_MAX_FAULTS", Policy.max_faults),
        node_strikes=whole_number("LDM_NODE_STRIKES", Policy.node_strikes),
        min_nodes=whole_number("LDM_MIN_NODES", Policy.min_nodes),
    )


def whole_number(variable: str, default: int, *, least: int = 1) -> int:
    """An environment variable's number. Raises ConfigError where it is none, or less than `least`."""
    text = os.environ.get(variable, "") or str(default)
    if not text.isdigit() or int(text) < least:
        raise ConfigError(f"{variable}={text} must be a whole number, at least {least}.")
    return int(text)


def sick_nodes(run_dir: str, since: float) -> list[str]:
    """Nodes whose drivers have told of a sick GPU since this moment, by the records of the run.

    None where storage does not answer.
    """
    try:
        records = read_records(run_dir, _RECORDS_BYTES)
    except Failure as error:
        logger.warning("nothing is known of the health of GPUs: %s", error)
        return []
    events = (record for record in records if record.get("event") == "sick gpu")
    return sorted({record["host"] for record in events if record["time"] >= since})


def record_end(args: argparse.Namespace) -> tuple[dict[str, Any], AttemptVerdict]:
    """Add the end of an attempt to the job's records, with what follows it."""
    job_dir: Path = args.job_dir
    attempts = read_attempts(job_dir)
    submission = read_submission(job_dir)
    record = {**_end_of_attempt(args), **_said_by_run(submission, args.started)}
    allocation = Allocation(
        number=args.allocation,
        nodes=tuple(args.have),
        wanted=args.wanted,
        drained=frozenset(args.drained),
        lasts=not args.ending,
    )
    verdict = decide(
        [*attempts, record],
        policy_from_environment(),
        allocation,
        holds=_holder(job_dir, args.tasks_per_node),
        baseline=baseline(submission),
    )
    record |= {"judged": time.time(), "then": verdict.action, "because": verdict.reason}
    with (job_dir / ATTEMPTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return record, verdict


def _end_of_attempt(args: argparse.Namespace) -> dict[str, Any]:
    ends: list[TaskEnd] = []
    lost = list(args.unfit)
    if args.srun_log is not None and args.srun_log.exists():
        ends, lost = parse_srun(args.srun_log.read_text(encoding="utf-8", errors="replace"))
    used = expand(args.nodes)
    if args.stuck:  # SIGKILL ended every task but theirs
        heard = {node for end in ends for node in expand(end.nodes)}
        lost += [node for node in used if heard and node not in heard and node not in lost]
    code = exit_code(args.status, ends, lost)
    blamed, suspect = [], []
    if code is ExitCode.RETRYABLE:
        away = [node for node in used if node not in args.have]
        suspect = [node for node in named_nodes() if node in used]
        blamed = blame(ends, lost) or suspect or away
    return {
        "attempt": args.attempt,
        "allocation": args.allocation,
        "started": args.started,
        "fault": args.fault,
        "seen": args.seen,
        "ended": args.over or time.time(),
        "nodes": args.nodes,
        "ran": args.srun_log is not None,
        "status": args.status,
        "code": int(code),
        "outcome": code.name.lower(),
        "blamed": sorted({*blamed, *args.unfit}),
        "gone": sorted({*lost, *args.unfit}),
        "suspect": suspect,
    }


def _said_by_run(submission: Mapping[str, Any] | None, since: float) -> dict[str, Any]:
    """Newest committed step and nodes found sick; nothing where storage does not say within half a minute."""
    said: dict[str, Any] = {"committed": None, "sick": []}

    def look(run_dir: str) -> None:
        newest = newest_checkpoint(run_dir)
        said["committed"] = None if newest is None else newest[0]
        said["sick"] = sick_nodes(run_dir, since)

    if submission is not None:
        looking = threading.Thread(target=look, args=(run_folder(submission),), daemon=True)
        looking.start()
        looking.join(_LOOK_S)
    return dict(said)


def _holder(job_dir: Path, tasks_per_node: int) -> Callable[[int], bool]:
    """Whether the job's configuration can be trained on so many nodes: as the ranks will ask themselves."""

    def holds(nodes: int) -> bool:
        try:
            load_run(str(job_dir / "config.yaml")).sharing(nodes * tasks_per_node)
        except UserError:
            return False
        return True

    return holds


def _decide(args: argparse.Namespace) -> int:
    _, verdict = record_end(args)
    words = [verdict.action, int(verdict.code), ",".join(verdict.exclude) or "-", verdict.count]
    sys.stdout.write(" ".join(map(str, words)) + f"\n{' '.join(verdict.candidates)}\n{verdict.reason}\n")
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
            (SUBMISSION, json.dumps(submission, indent=2).encode()),
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
    decide_ = commands.add_parser(
        "decide", help="record an attempt's end; print what follows, in three lines"
    )
    decide_.add_argument("job_dir", type=Path)
    for name in ("attempt", "allocation", "status", "wanted", "tasks-per-node"):
        decide_.add_argument(f"--{name}", type=int, required=True)
    decide_.add_argument("--started", type=float, required=True)
    # When SLURM told of a fault, when the script saw it, when all ranks had ended.
    for name in ("fault", "seen", "over"):
        decide_.add_argument(f"--{name}", type=float)
    decide_.add_argument("--nodes", required=True, help="host list of the ranks")
    decide_.add_argument("--srun-log", type=Path, help="left out where no rank was started")
    decide_.add_argument("--stuck", action="store_true", help="srun was still waiting after SIGKILL")
    decide_.add_argument("--unfit", nargs="*", default=[])
    decide_.add_argument("--have", nargs="*", default=[], help="nodes of the allocation that answer SLURM")
    decide_.add_argument("--drained", nargs="*", default=[])
    decide_.add_argument("--ending", action="store_true", help="the allocation is being taken back")
    recovered = commands.add_parser(
        "recovered", help="how long an attempt took from the fault to its first step"
    )
    recovered.add_argument("job_dir", type=Path)
    recovered.add_argument("--attempt", type=int, required=True)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point for slurm/train_ldm.sh."""
    configure_logging()
    args = _parser().parse_args(argv)
    if args.command == "decide":
        return _decide(args)
    if args.command == "recovered":
        sys.stdout.write(f"{recovery_sentence(args.job_dir, args.attempt) or ''}\n")
        return 0
    try:
        prepare(args.job_dir, args.repository, args.arguments)
    except UserError as error:
        sys.stderr.write(f"ldm: {error}\n")
        return ExitCode.USER_ERROR
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
