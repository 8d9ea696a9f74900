"""The login node's side of SLURM: submit with a snapshot taken now, status of jobs, logs of ranks."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trainer
from trainer.config.io import load_run
from trainer.config.run import Config, ConfigError, option_words
from trainer.exit_codes import ExitCode
from trainer.launch.observe import latest_record, newest_checkpoint
from trainer.launch.slurm_job import SPARE_VARIABLE, snapshot
from trainer.launch.slurm_records import (
    baseline,
    read_attempts,
    read_submission,
    recovery_sentence,
    run_folder,
)
from trainer.launch.slurm_verdict import fruitless
from trainer.operation.standing import duration

_FOLLOW_S = 1.0
_RUN_JOB, _RUN_SEED = "LDM_RUN_JOB", "LDM_RUN_SEED"
"""By which slurm/evaluate.sh knows whose evaluator it is."""


def jobs_folder() -> Path:
    """Where job folders are: LDM_JOBS_DIR, else runs/slurm below the folder jobs are submitted from."""
    return Path(os.environ.get("LDM_JOBS_DIR", "runs/slurm"))


def add_commands(parser: argparse.ArgumentParser) -> None:
    """`submit`, `status` and `logs`; each leaves its function in `handler`."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    submit_ = commands.add_parser(
        "submit",
        help="check a configuration here and now, snapshot the code, and sbatch it",
        epilog="example: ldm slurm submit configs/sd/sd2_base_256.yaml --sbatch='--nodes=32 -p gpu' "
        "run_dir=s3://bucket/run data.shards='s3://bucket/laion/*.tar' "
        "first_stage.weights=s3://bucket/kl_f8.safetensors "
        "conditioning.openclip.pretrained=laion2b_s32b_b79k",
    )
    submit_.add_argument("config", metavar="CONFIG", help="YAML file")
    submit_.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that win over the file")
    submit_.add_argument("--sbatch", default="", metavar="OPTIONS", help="options for sbatch, in one word")
    submit_.add_argument(
        "--spare",
        type=int,
        default=0,
        metavar="S",
        help="nodes to ask for beyond --nodes: they replace failed ones",
    )
    submit_.add_argument(
        "--evaluate",
        metavar="OPTIONS",
        help="submit an evaluator beside it: options of `ldm evaluate watch`, in one word",
    )
    submit_.add_argument(
        "--evaluate-sbatch", default="", metavar="OPTIONS", help="options for the evaluator's sbatch"
    )
    submit_.set_defaults(handler=_submit)
    status_ = commands.add_parser("status", help="state, attempts, faults and progress of jobs")
    status_.add_argument("jobs", nargs="*", metavar="JOB", help="job numbers; none: all in the jobs folder")
    status_.set_defaults(handler=lambda args: _status(args.jobs))
    logs_ = commands.add_parser("logs", help="what a rank wrote")
    logs_.add_argument("job", metavar="JOB", help="job number, with _TASK for a job array")
    logs_.add_argument("--rank", type=int, default=0, help="rank (default 0)")
    logs_.add_argument("--attempt", type=int, help="attempt (default: the newest)")
    logs_.add_argument("--lines", type=int, default=40, help="last lines to show; 0: all")
    logs_.add_argument("--follow", "-f", action="store_true", help="go on as the log grows, over requeues")
    logs_.set_defaults(
        handler=lambda args: _logs(args.job, args.rank, args.attempt, args.lines, forever=args.follow)
    )


@dataclass(frozen=True)
class EvaluatorJob:
    """An evaluator to be submitted with a run."""

    words: tuple[str, ...]
    """Of `ldm evaluate watch`, without the run."""
    options: tuple[str, ...] = ()
    """Of sbatch."""


def submit(
    config_path: str,
    overrides: Sequence[str],
    options: Sequence[str],
    spare: int = 0,
    evaluator: EvaluatorJob | None = None,
) -> list[str]:
    """Submit slurm/train_ldm.sh from a snapshot of the code as it is now.

    Args:
        options: of sbatch.
        spare: nodes beyond those that `options` ask for.
        evaluator: what goes with it, both or neither.

    Returns:
        The job's number, and that of its evaluator where there is one.

    Plain `sbatch slurm/train_ldm.sh` takes the snapshot when the job first starts; a job that waits in
    the queue for days then runs what the working tree holds on that day.

    Raises:
        ConfigError: a mistake in the configuration or in the number of nodes, or sbatch refuses.
    """
    config = load_run(config_path, overrides)
    options = [*options, *_with_spares(options, spare)]
    array = _understood(options, "--sbatch").array
    if evaluator is not None:
        _check_export(evaluator)
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch is not on this machine; run this on a login node of the cluster.")
    repository = Path(trainer.__file__).resolve().parents[1]
    folder = (jobs_folder() / "submitted" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}").resolve()
    snapshot(repository, folder)
    shutil.copy2(config_path, folder / "submitted.yaml")
    words = [*options, str(folder / "slurm" / "train_ldm.sh"), str(folder / "submitted.yaml"), *overrides]
    job = _sbatch(words, {SPARE_VARIABLE: str(spare)} if spare else {})
    if evaluator is None:
        return [job]
    return [job, _submit_beside(folder, job, config, evaluator, array)]


def _submit_beside(folder: Path, job: str, config: Config, evaluator: EvaluatorJob, array: str | None) -> str:
    """The number of the evaluator's job, which starts when the run's has; of an array, a task for each."""
    # The last task of an array may start in weeks: there, evaluators wait for their run's first checkpoint.
    when = f"--dependency=after:{job}" if array is None else f"--array={array}"
    script = str(folder / "slurm" / "evaluate.sh")
    words = [when, *evaluator.options, script, config.run_dir, *evaluator.words]
    try:
        return _sbatch(words, {_RUN_JOB: job, _RUN_SEED: str(config.seed)})
    except ConfigError as error:
        subprocess.run(["scancel", job], check=False)
        raise ConfigError(f"job {job} is cancelled again, for its evaluator: {error}") from error


def _sbatch(words: Sequence[str], variables: Mapping[str, str]) -> str:
    """The number of a new job, which is handed `variables` beside the environment, and this interpreter."""
    # A container has one of its own, which slurm/container.sh finds.
    ours = {} if os.environ.get("LDM_CONTAINER") else {"LDM_PYTHON": sys.executable}
    done = subprocess.run(
        ["sbatch", "--parsable", *words],
        env={**ours, **os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ConfigError(f"sbatch refused: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


def describe_job(folder: Path, states: dict[str, str]) -> list[str]:
    """Lines about one job: SLURM's state, how attempts ended, nodes at fault, how far the run is."""
    key = folder.name
    submission = read_submission(folder)
    if submission is None:
        return [f"{key}  {states.get(key, 'not in the queue')}  preparing, or refused: see ldm-{key}.log"]
    lines = [f"{key}  {states.get(key, 'not in the queue')}  {submission['run_dir']}"]
    lines += describe_attempts(folder, submission)
    lines.append(f"    progress: {_progress(submission)}")
    return lines


def describe_attempts(folder: Path, submission: Mapping[str, Any]) -> list[str]:
    """How the attempts of a job ended, what they cost, and which nodes are to blame."""
    attempts = read_attempts(folder)
    if not attempts:
        return []
    ended = ", ".join(
        f"{count} x {outcome}" for outcome, count in Counter(one["outcome"] for one in attempts).items()
    )
    last = attempts[-1]
    lines = [f"    attempts: {ended}; last ended {duration(max(0.0, time.time() - last['ended']))} ago"]
    if last["code"] == ExitCode.RETRYABLE:
        count = fruitless(attempts, baseline(submission))
        why = f"{last['because']}; " if "because" in last else ""
        lines.append(f"    then:     {last['then']}: {why}{count} in a row without a new checkpoint")
    strikes = Counter(node for attempt in attempts for node in attempt["blamed"])
    if strikes:
        lines.append("    faults:   " + ", ".join(f"{node} {count}" for node, count in strikes.items()))
    gone = {node for one in attempts if one["allocation"] == last["allocation"] for node in one["gone"]}
    if gone:
        lines.append(f"    left out: {', '.join(sorted(gone))}")
    restarts = (recovery_sentence(folder, one["attempt"] + 1) for one in reversed(attempts))
    newest = next((sentence for sentence in restarts if sentence), None)
    if newest is not None:
        lines.append(f"    restart:  {newest}")
    return lines


def follow(folder: Path, rank: int, *, attempt: int | None, lines: int, forever: bool) -> Iterator[str]:
    """Lines of one rank's log, and of the next attempts' when `forever`.

    Raises:
        ConfigError: no such job, attempt or rank.
    """
    current = attempt or _newest_attempt(folder)
    while True:
        path = folder / f"attempt-{current}" / f"rank-{rank:04d}.log"
        if not path.exists() and not forever:
            known = sorted(p.name[5:-4] for p in path.parent.glob("rank-*.log"))
            raise ConfigError(f"{path} does not exist; ranks there: {', '.join(known) or 'none yet'}.")
        if path.exists():
            with path.open(encoding="utf-8", errors="replace") as stream:
                yield from deque(stream, maxlen=lines or None)
                while forever and _newest_attempt(folder) == current:
                    text = stream.readline()
                    if text:
                        yield text
                    else:
                        time.sleep(_FOLLOW_S)
        if not forever:
            return
        if _newest_attempt(folder) == current:
            time.sleep(_FOLLOW_S)
        else:
            current, lines = _newest_attempt(folder), 0


def _with_spares(options: Sequence[str], spare: int) -> list[str]:
    """The option that asks for the spare nodes, too; sbatch believes the last one."""
    if spare < 0:
        raise ConfigError(f"--spare {spare} must be at least 0.")
    if spare == 0:
        return []
    given = _understood(options, "--sbatch")
    if not given.nodes.isdigit():
        raise ConfigError(
            f"--spare wants one number of nodes beside it, as in --sbatch='--nodes=32'; not {given.nodes!r}."
        )
    if not {"ALL", SPARE_VARIABLE} & set(given.export.split(",")):
        raise ConfigError(
            f"--spare is handed on in {SPARE_VARIABLE}, which --export={given.export} leaves behind; name it "
            "there, too."
        )
    return [f"--nodes={int(given.nodes) + spare}"]


def _understood(options: Sequence[str], what: str) -> argparse.Namespace:
    """Those options of sbatch that something follows from. Raises ConfigError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--nodes", "-N", default="1")
    parser.add_argument("--export", default=os.environ.get("SBATCH_EXPORT", "ALL"))
    parser.add_argument("--array", "-a", default=os.environ.get("SBATCH_ARRAY_INX"))
    try:
        return parser.parse_known_args(list(options))[0]
    except argparse.ArgumentError as error:
        raise ConfigError(f"{what} is not understood: {error}.") from error


def _check_export(evaluator: EvaluatorJob) -> None:
    """Raises ConfigError: the evaluator would not hear whose it is."""
    export = _understood(evaluator.options, "--evaluate-sbatch").export
    named = set(export.split(","))
    if "ALL" not in named and not {_RUN_JOB, _RUN_SEED} <= named:
        raise ConfigError(
            f"the run's job and seed are handed on in {_RUN_JOB} and {_RUN_SEED}, which --export={export} "
            "leaves behind; name them there, too."
        )


def _submit(args: argparse.Namespace) -> int:
    beside = None
    if args.evaluate is not None:
        words, options = args.evaluate, args.evaluate_sbatch
        beside = EvaluatorJob(
            tuple(option_words("--evaluate", words)), tuple(option_words("--evaluate-sbatch", options))
        )
    elif args.evaluate_sbatch:
        raise ConfigError("--evaluate-sbatch is of an evaluator; give --evaluate, too.")
    job, *others = submit(
        args.config, args.overrides, option_words("--sbatch", args.sbatch), args.spare, beside
    )
    sys.stdout.write(f"submitted job {job}; ldm slurm status {job}; ldm slurm logs {job} -f\n")
    for other in others:
        sys.stdout.write(f"its evaluator is job {other}, which writes ldm-evaluate-{other}.log\n")
    return ExitCode.DONE


def _status(jobs: Sequence[str]) -> int:
    folder = jobs_folder()
    found = [folder / job for job in jobs] or sorted(
        path for path in folder.glob("[0-9]*") if path.name.replace("_", "").isdigit()
    )
    if not found:
        raise ConfigError(f"there are no jobs in {folder}; set LDM_JOBS_DIR, or go where you submitted from.")
    states = _states()
    for one in found:
        if not one.exists() and one.name not in states:
            raise ConfigError(f"there is no job {one.name} in {folder}, nor in the queue.")
        sys.stdout.write("\n".join(describe_job(one, states)) + "\n")
    return ExitCode.DONE


def _logs(job: str, rank: int, attempt: int | None, lines: int, *, forever: bool) -> int:
    folder = jobs_folder() / job
    if not folder.exists():
        raise ConfigError(f"there is no job {job} in {jobs_folder()}.")
    if lines < 0:
        raise ConfigError(f"--lines {lines} must be at least 0, which shows all.")
    for line in follow(folder, rank, attempt=attempt, lines=lines, forever=forever):
        sys.stdout.write(line)
        sys.stdout.flush()
    return ExitCode.DONE


def _states() -> dict[str, str]:
    """State (and reason, while waiting) by job key, of what squeue still knows."""
    if shutil.which("squeue") is None:
        return {}
    done = subprocess.run(
        ["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r|%N"],
        capture_output=True,
        text=True,
        check=False,
    )
    states = {}
    for line in done.stdout.splitlines():
        key, state, reason, nodes = line.split("|", 3)
        states[key] = f"{state} ({reason})" if state == "PENDING" else f"{state} on {nodes}"
    return states


def _progress(submission: Mapping[str, Any]) -> str:
    run_dir = run_folder(submission)
    steps = submission["config"]["steps"]
    record, checkpoint = latest_record(run_dir), newest_checkpoint(run_dir)
    if record is None and checkpoint is None:
        return "nothing yet"
    parts = [f"step {max((record or {}).get('step', 0), (checkpoint or (0, ''))[0])} of {steps}"]
    if record is not None:
        loss = record["loss"]  # a text where it is not finite
        parts.append(f"loss {loss if isinstance(loss, str) else format(loss, '.4f')}")
        if "images_per_s" in record:
            parts.append(f"{record['images_per_s']:.1f} images/s")
    if checkpoint is not None:
        parts.append(f"checkpoint at step {checkpoint[0]}")
    return ", ".join(parts)


def _newest_attempt(folder: Path) -> int:
    numbers = [int(path.name.partition("-")[2]) for path in folder.glob("attempt-*")]
    return max(numbers, default=1)
