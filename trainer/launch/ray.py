"""`python -m trainer.launch.ray CONFIG a.b=c`: the same run on a Ray cluster.

This file, ray_rank.py, ray_beside.py and ray_sample.py alone import ray.

driver (main)        starts the board and Ray Train; a stop of the job becomes a request to save
board (actor)        what all of them tell each other: ray_board.py
controller (Ray's)   places workers, restarts and resizes them; `_SaveBeforeResize`, `_UsefulWorkers` are its
worker (Ray's)       starts its rank as a process and follows it: ray_rank.py
tasks (Ray's)        encoders and an evaluator beside the ranks: ray_beside.py
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.collective
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data_pipeline.errors import UserError
from data_pipeline.storage.client import filesystem
from trainer.config.io import config_to_dict, load_run
from trainer.config.run import Config, ConfigError
from trainer.console import configure_logging
from trainer.exit_codes import ExitCode
from trainer.launch.ray_beside import Beside, Command, encoders, evaluator, resources, watch_words
from trainer.launch.ray_board import RunBoard, RunRequest, useful_ranks
from trainer.launch.ray_rank import shown_name, train_rank
from trainer.launch.ray_worker import ROUND_S

logger = logging.getLogger(__name__)

_SILENCE_S = 15.0


class _NoProcessGroup(Backend):
    """Ray's workers hold no process group: the ranks, their children, do.

    Each of them sees all GPUs that this run has on its node, and takes number local_rank: a rank that
    cannot see its neighbours' GPUs loses NVLink peer access.
    """

    share_cuda_visible_devices = True


@dataclass
class _RanksOfTheirOwn(TorchConfig):
    @property
    def backend_cls(self) -> type[Backend]:
        return _NoProcessGroup


class _SaveBeforeResize(ControllerCallback):
    """Lets the ranks save before Ray Train ends them to start more or fewer of them."""

    def __init__(self, board: Any, patience_s: float) -> None:
        self._board = board
        self._patience_s = patience_s
        self._planned = False

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """A group that died is restarted through a resize too, but nobody is left to save then."""
        name = type(current_state).__name__
        if name != "SchedulingState":
            self._planned = name == "ResizingState"

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """In the controller. Its loop waits meanwhile, and so does everything it would do to us."""
        if not self._planned:
            return
        ray.get(self._board.ask.remote(RunRequest.RESIZE))
        limit = time.monotonic() + self._patience_s
        while time.monotonic() < limit:
            state = ray.get(self._board.state.remote())
            # Silence: a worker has failed, and the others wait for it.
            if len(state["codes"]) >= state["ranks"] or state["quiet_s"] > _SILENCE_S:
                return
            time.sleep(ROUND_S / 2)


class _UsefulWorkers(ElasticScalingPolicy):
    """As many workers as make a step shorter: a resize that would not is none.

    `taken`: workers whose places commands beside the run have, which Ray Train counts as free.
    """

    def __init__(self, scaling: ray.train.ScalingConfig, config: Config, taken: int) -> None:
        super().__init__(scaling)
        self._config, self._taken = config, taken

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        possible = super()._count_possible_workers(reserved_resources)
        fewest = self.scaling_config.min_workers
        if possible <= fewest:
            return possible
        return max(fewest, useful_ranks(self._config, max(fewest, possible - self._taken)))


class _Trainer(TorchTrainer):
    """Ray's, with our policy where the number of workers may change: it takes none as an argument."""

    _config: Config
    _taken: int

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if isinstance(parts["scaling_policy"], ElasticScalingPolicy):
            parts["scaling_policy"] = _UsefulWorkers(self.scaling_config, self._config, self._taken)
        return super()._initialize_and_run_controller(**parts)


def main(argv: Sequence[str] | None = None) -> int:
    """The driver: exit codes are those of `ldm train`."""
    args = _parser().parse_intermixed_args(argv)
    configure_logging()
    try:
        config = load_run(args.config, args.overrides)
        _check_beside(config, args)
        ray.init(log_to_driver=True, logging_level=logging.WARNING)
        fewest, most = _worker_range(args.workers, config)
        return _drive(config, args, fewest, most)
    except UserError as error:
        sys.stderr.write(f"ldm: {error}\n")
        return ExitCode.USER_ERROR


def _drive(config: Config, args: argparse.Namespace, fewest: int, most: int) -> int:
    board = _start_board(config)
    commands = _commands(config, args)
    trainer = _build_trainer(config, args, (fewest, most), board, _workers_worth(commands, args))
    outcome: list[int] = []

    def fit() -> None:
        try:
            outcome.append(int(trainer.fit().return_value))
        except ray.train.TrainingFailedError as error:
            logger.error("%s", error)
            outcome.append(int(ExitCode.RETRYABLE))

    # Ray Train takes over Ctrl-C when it runs in the main thread, and would kill the ranks unsaved.
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: asked.set())
    thread.start()
    beside = Beside(commands, board)
    told = False
    while thread.is_alive():
        thread.join(ROUND_S / 2)
        beside.tend()
        if asked.is_set() and not told:
            told = True
            logger.warning("asked to stop: the ranks save and leave")
            ray.get(board.ask.remote(RunRequest.PREEMPT))
            beside.finish(ExitCode.PREEMPTED, asked.is_set)  # while the ranks save: Ray's patience is one
    code = ExitCode(outcome[0]) if outcome else ExitCode.RETRYABLE
    beside.finish(code, asked.is_set)
    logger.info("the run ends: %s", code.name.lower())
    return code


def _arrow(storage: Any) -> Any:
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(storage))


def _build_trainer(
    config: Config, args: argparse.Namespace, workers: tuple[int, int], board: Any, taken: int
) -> TorchTrainer:
    storage, path = filesystem(config.run_dir)
    use_gpu = _use_gpu(args)
    resources = {"CPU": args.cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})}
    trainer = _Trainer(
        train_rank,
        train_loop_config={
            "config": config_to_dict(config),
            "board": board,
            "job": f"Ray job {uuid.uuid4().hex}",
        },
        torch_config=_RanksOfTheirOwn(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers[0] if workers[0] == workers[1] else workers,
            use_gpu=use_gpu,
            resources_per_worker=resources,
            placement_strategy=args.placement,
            elastic_resize_monitor_interval_s=args.resize_every_s,
        ),
        run_config=ray.train.RunConfig(
            name=args.name or shown_name(config.run_dir),
            storage_path=f"{path.rstrip('/')}/ray",
            storage_filesystem=_arrow(storage),
            # Faults in a row are counted on the board, the way the other launchers count them.
            failure_config=ray.train.FailureConfig(max_failures=-1, preemption_grace_s=args.save_limit_s),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),  # pointers
            callbacks=[_SaveBeforeResize(board, args.save_limit_s)],
        ),
    )
    trainer._config, trainer._taken = config, taken
    return trainer


def _use_gpu(args: argparse.Namespace) -> bool:
    if args.device == "auto":
        return bool(ray.cluster_resources().get("GPU", 0) > 0)
    return bool(args.device == "gpu")


def _check_beside(config: Config, args: argparse.Namespace) -> None:
    """Mistakes about what runs beside the ranks. Raises ConfigError."""
    watch_words(args.watch)
    for option, value, least in (
        ("--encoders", args.encoders, 0),
        ("--encoders-ahead", args.encoders_ahead, 1),
    ):
        if value < least:
            raise ConfigError(f"{option} {value} must be at least {least}.")
    if args.encoders and config.first_stage.cache is None:
        raise ConfigError(
            "--encoders fill first_stage.cache, which is not set; name a folder or URL that all nodes can "
            "write, e.g. first_stage.cache=s3://bucket/cache."
        )
    if args.encoders and config.phases:
        raise ConfigError(
            "--encoders fill a cache for one size of pictures, and phases have several; leave --encoders out "
            "and fill it for each size by `ldm encode` ahead of the run."
        )
    if args.encoders:
        config.sharing(args.encoders)


def _commands(config: Config, args: argparse.Namespace) -> list[Command]:
    """What runs beside the ranks."""
    ranks_on = "gpu" if _use_gpu(args) else "cpu"
    encode_on, watch_on = (
        resources(named or ranks_on, args.cpus_per_worker) for named in (args.encoders_on, args.watch_on)
    )
    return [
        *encoders(config, args.encoders, args.encoders_ahead, encode_on),
        *evaluator(config, args.watch, watch_on),
    ]


def _workers_worth(commands: Sequence[Command], args: argparse.Namespace) -> int:
    """How many ranks could be where the commands beside them are."""
    if _use_gpu(args):
        return math.ceil(sum(command.gpus for command in commands))
    cpus = sum(command.cpus for command in commands)
    return math.ceil(cpus / args.cpus_per_worker) if args.cpus_per_worker else 0


def _start_board(config: Config) -> Any:
    """On the driver's node, which must live anyway."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(RunBoard).options(num_cpus=0, scheduling_strategy=here)
    return actor.remote(config.distributed.max_restarts)


def _worker_range(text: str | None, config: Config) -> tuple[int, int]:
    """(fewest, most) workers from `N` or `MIN:MAX`; unset: distributed.ranks, else one per GPU.

    Raises:
        ConfigError: it is neither, or the global batch has no sample for each of them.
    """
    if text is None:
        count = config.distributed.ranks or int(ray.cluster_resources().get("GPU", 0)) or 1
        config.sharing(count)
        return count, count
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    fewest = int(match[1]) if match else 0
    most = int(match[2] or fewest) if match else 0
    if not 1 <= fewest <= most:
        raise ConfigError(f"--workers must be N or MIN:MAX with 1 <= MIN <= MAX, not {text!r}.")
    config.sharing(fewest)
    # More are not even asked for: an autoscaler would start nodes for them.
    return fewest, most if most == fewest else max(fewest, useful_ranks(config, most))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.launch.ray",
        description="Train what a configuration describes on a Ray cluster; the same command resumes it.",
        epilog="example: ray job submit --working-dir . -- python -m trainer.launch.ray "
        "configs/sd/sd2_base_256.yaml --workers 64:256 run_dir=s3://bucket/run "
        "data.shards='s3://bucket/laion/*.tar' first_stage.weights=s3://bucket/kl_f8.safetensors "
        "conditioning.openclip.pretrained=laion2b_s32b_b79k",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file with differences from the defaults")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that win over the file")
    parser.add_argument("--workers", metavar="N|MIN:MAX", help="ranks; MIN:MAX follows the cluster's size")
    parser.add_argument(
        "--device", choices=("auto", "gpu", "cpu"), default="auto", help="one GPU each, or none"
    )
    parser.add_argument("--cpus-per-worker", type=float, default=1.0, help="CPUs reserved for each rank")
    parser.add_argument(
        "--placement", choices=("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"), default="PACK"
    )
    parser.add_argument("--resize-every-s", type=float, default=60.0, help="how often to look for more nodes")
    parser.add_argument("--save-limit-s", type=float, default=300.0, help="time for saving before a resize")
    parser.add_argument(
        "--encoders", type=int, default=0, metavar="N", help="`ldm encode` in front of the ranks, in N parts"
    )
    parser.add_argument(
        "--encoders-on",
        metavar="cpu|gpu|KIND",
        help="KIND: of GPU, as Ray calls it, e.g. L4 (default: as the ranks)",
    )
    parser.add_argument(
        "--encoders-ahead",
        type=int,
        default=1000,
        metavar="STEPS",
        help="in front at most (default: %(default)s)",
    )
    parser.add_argument(
        "--watch",
        default="",
        metavar="OPTIONS",
        help="`ldm evaluate watch` of the run, its options as one text",
    )
    parser.add_argument("--watch-on", metavar="cpu|gpu|KIND", help="as --encoders-on")
    parser.add_argument("--name", help="name in the Ray dashboard; default: from run_dir")
    return parser


if __name__ == "__main__":
    # Through the import system, so that Ray pickles functions by name and not by value.
    from trainer.launch import ray as launcher

    sys.exit(launcher.main())
