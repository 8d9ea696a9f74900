"""One worker of Ray Train: what `ray_worker.py` asks of Ray, and what Ray is told about the run.

rank       started as a process and followed: `train_rank`
worker 0   reports numbers and pointers to checkpoints, which Ray shows and never copies: `_Reporter`
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import time
from pathlib import Path, PurePath
from typing import Any

import ray
import ray.train
import ray.train.collective
from ray.util.metrics import Gauge

from data_pipeline.errors import Failure
from data_pipeline.storage.files import write_bytes
from data_pipeline.storage.retry import QUICK_TRIES
from data_pipeline.storage.urls import join
from trainer.config.io import config_from_dict
from trainer.config.run import Config
from trainer.distributed.place import Place, free_port
from trainer.exit_codes import ExitCode
from trainer.launch.observe import latest_record, newest_checkpoint
from trainer.launch.ray_worker import Facts, Follower, started_rank
from trainer.reliability.job import JOB_VARIABLE

logger = logging.getLogger(__name__)

_POINTER = "pointer.json"
_REPORT_S = 10.0
_METRICS = ("loss", "images_per_s", "data_wait", "learning_rate", "grad_norm")


def train_rank(settings: dict[str, Any]) -> int:
    """One Ray Train worker: the exit code of the whole run, or an exception for Ray Train to retry.

    Raises:
        RetryableFault: this rank died, hung, was preempted with its node, or could not go on.
    """
    config = config_from_dict(settings["config"])
    context = ray.train.get_context()
    rank, board = context.get_world_rank(), settings["board"]
    ranks = context.get_world_size()
    offer = None
    if rank == 0:
        attempt, give_up = ray.get(board.begin.remote(ranks))
        offer = (attempt, give_up, ray.util.get_node_ip_address(), free_port())
    attempt, give_up, address, port = ray.train.collective.broadcast_from_rank_zero(offer)
    if give_up:
        logger.error("too many faults in a row without progress (distributed.max_restarts); giving up")
        return ExitCode.RETRYABLE
    group = _RayTrainGroup(board, rank, config.run_dir)
    news = _Reporter(config, ranks).news if rank == 0 else _no_news
    place = Place(
        rank=rank,
        local_rank=context.get_local_rank(),
        world_size=ranks,
        local_world_size=context.get_local_world_size(),
        master_addr=address,
        master_port=port,
    )
    log = log_folder() / f"{context.get_experiment_name()}-attempt-{attempt}-rank-{rank:04d}.log"
    job = {JOB_VARIABLE: settings["job"]}
    with started_rank(config, place, log=log, restarts=attempt - 1, environment=job) as process:
        logger.info("rank %d of %d is process %d; log: %s", rank, ranks, process.pid, log)
        return Follower(rank, ranks, process, group, news).run()


def _no_news(step: int, final: bool) -> Facts | None:
    return None


class _RayTrainGroup:
    """Implements ray_worker.Group: the board is an actor, the rest is Ray Train."""

    def __init__(self, board: Any, rank: int, run_dir: str) -> None:
        self._board = board
        self._rank = rank
        self._run_dir = run_dir

    def tick(self, step: int) -> tuple[str, dict[int, int]]:
        """See Group."""
        asked, codes = ray.get(self._board.tick.remote(step))
        return asked, codes

    def ended(self, rank: int, code: int) -> None:
        """See Group."""
        ray.get(self._board.ended.remote(rank, code))

    def is_preempted(self) -> bool:
        """See Group."""
        return ray.train.get_preemption_info() is not None

    def share(self, message: Any) -> Any:
        """See Group."""
        return ray.train.collective.broadcast_from_rank_zero(message)

    def report(self, facts: Facts) -> None:
        """Ray gets a pointer to a checkpoint: it neither copies nor deletes any."""
        if self._rank or "checkpoint" not in facts:
            ray.train.report(facts)
            return
        storage = ray.train.get_context().get_storage()
        experiment = storage.experiment_fs_path  # below run_dir/ray; Ray takes checkpoints in it alone

        def upload(made: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
            url = join(self._run_dir, "ray", PurePath(experiment).name, name, _POINTER)
            store_pointer(Path(made.path) / _POINTER, url)
            return ray.train.Checkpoint(f"{experiment}/{name}", filesystem=storage.storage_filesystem)

        with tempfile.TemporaryDirectory() as folder:
            pointer = {"step": facts["checkpoint_step"], "url": facts["checkpoint"]}
            (Path(folder) / _POINTER).write_text(json.dumps(pointer), encoding="utf-8")
            made = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(facts, checkpoint=made, checkpoint_upload_fn=upload)


def store_pointer(pointer: Path, url: str) -> None:
    """What Ray shows for a checkpoint. It is for people: where storage does not take it, the log says so,
    while Ray's own copy would raise, and all ranks start anew.
    """
    try:
        write_bytes(url, pointer.read_bytes(), tries=QUICK_TRIES)
    except Failure as error:
        logger.warning("Ray's dashboard does not get its pointer to a checkpoint: %s", error)


class _Reporter:
    """On worker 0: turns the run's own records into Ray metrics, and says what Ray Train is told."""

    def __init__(self, config: Config, ranks: int) -> None:
        self._config = config
        self._ranks = ranks
        self._next = 0.0
        self._checkpoint: str | None = None
        tags = {"run": shown_name(config.run_dir)}
        self._gauges = {}
        for name in ("step", "samples_seen", "ranks", *_METRICS):
            self._gauges[name] = Gauge(f"ldm_{name}", f"{name} of the training run", tag_keys=("run",))
            self._gauges[name].set_default_tags(tags)

    def news(self, step: int, final: bool) -> Facts | None:
        """Something to report every few seconds: numbers, and a checkpoint that was not yet reported."""
        now = time.monotonic()
        if now < self._next and not final:
            return None
        self._next = now + _REPORT_S
        record = latest_record(self._config.run_dir) or {}
        report: Facts = {"step": step, "ranks": self._ranks}
        report["samples_seen"] = self._config.samples_after(step)
        report.update({name: record[name] for name in _METRICS if name in record})
        for name, value in report.items():
            self._gauges[name].set(float(value))
        newest = newest_checkpoint(self._config.run_dir)
        if newest is not None and newest[1] != self._checkpoint:
            report["checkpoint_step"], self._checkpoint = newest
            report["checkpoint"] = self._checkpoint
        return report


def shown_name(run_dir: str) -> str:
    """What Ray shows a run as."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", run_dir).strip("-.")


def log_folder() -> Path:
    """Beside Ray's own logs, so that the dashboard lists the ranks' logs under their node."""
    node = ray._private.worker._global_node  # nothing public knows it when Ray has its own --temp-dir
    return Path(node.get_logs_dir_path())
