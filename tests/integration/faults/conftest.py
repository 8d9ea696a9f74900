"""Real runs of a tiny model, faults put into them from outside, and fingerprints of what is left."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_pipeline.storage.local_s3 import LocalS3
from data_pipeline.tools.scenes.scene import SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from trainer.checkpoint.catalogue import (
    CheckpointHandle,
    checkpoints_url,
    folder_name,
    open_checkpoint,
    steps_found,
)
from trainer.checkpoint.reader import EngineReader
from trainer.launch.observe import LocalRun
from trainer.reliability.heartbeat import Pulse

LIMIT_S = 900.0
INJECT = str(Path(__file__).with_name("inject.py"))
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries, the second one's values winning."""
    out = dict(base)
    for key, value in changes.items():
        out[key] = merge(out.get(key, {}), value) if isinstance(value, dict) else value
    return out


def tiny(shards: str, run_dir: str) -> dict[str, Any]:
    """A text-conditioned pixel-space model of some ten thousand parameters on two ranks."""
    return {
        "run_dir": run_dir,
        "steps": 24,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "data": {
            "shards": shards,
            "image_size": 16,
            "shuffle_window": 16,
            "workers": 1,
            "horizontal_flip": True,
        },
        "first_stage": {"name": "identity", "latent_channels": 3},
        "unet": {
            "model_channels": 16,
            "channel_multipliers": [1, 2],
            "num_res_blocks": 1,
            "attention_factors": [2],
            "head_dim": 16,
            "num_groups": 4,
        },
        "conditioning": {
            "text_transformer": {
                "width": 32,
                "layers": 1,
                "heads": 2,
                "head_dim": 16,
                "max_tokens": 16,
                "tokenizer": "wordpiece",
                "vocabulary": str(Path(shards).parent / "vocabulary.txt"),
                "drop_probability": 0.2,
            }
        },
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 4},
        "ema": {"decay": 0.9},
        "distributed": {
            "ranks": 2,
            "doctor": False,
            "engine": "torch",
            "precision": "fp32",
            "max_restarts": 40,
            "watchdog_s": 6.0,
        },
        "checkpoint": {"every": 4},
        "logging": {"every": 1, "wandb": "disabled", "progress_bar": False},
    }


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """96 small pictures in 4 shards, and the words of their captions."""
    folder = tmp_path_factory.mktemp("fault-shards")
    options = SynthesisOptions(samples=96, samples_per_shard=24, scene=SceneOptions(min_edge=24, max_edge=40))
    list(synthesize(str(folder), options))
    words = "a an and the on in of with background red green blue yellow black white circle square triangle"
    (folder / "vocabulary.txt").write_text("\n".join([*SPECIAL_TOKENS, *words.split()]) + "\n")
    return f"{folder}/*.tar"


class FaultyRun:
    """`ldm train` in a process of its own, with a view into its ranks."""

    def __init__(self, folder: Path, values: dict[str, Any], environment: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.run_dir = str(values["run_dir"])
        self.folder_of_run = Path(self.run_dir)
        self.command = [INJECT, "none"]
        self.log = folder / "console.log"
        self.config_path = folder / "config.yaml"
        self.config_path.write_text(yaml.safe_dump(values))
        self._hold = folder / "hold"
        self._environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "FAULT_HOLD": str(self._hold), **environment
        }  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None
        self._seen: LocalRun | None = None

    def start(self) -> FaultyRun:
        """Start it; returns at once."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.command, str(self.config_path)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        self._seen = LocalRun(self.process.pid)
        return self

    def hold(self, step: int | None) -> None:
        """Let no step be begun once this many are made, whoever starts it; None: let it go."""
        if step is None:
            self._hold.unlink(missing_ok=True)
            return
        beside = self._hold.with_suffix(".new")
        beside.write_text(str(step))
        beside.replace(self._hold)

    def wait(self, limit_s: float = LIMIT_S) -> int:
        """Let it go; its exit code."""
        self.hold(None)
        assert self.process is not None
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {limit_s} s:\n{self.console[-4000:]}") from None

    def run(self) -> int:
        """Start it and wait for its exit code."""
        return self.start().wait()

    def kill(self) -> None:
        """SIGKILL the launcher; its ranks die with it."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def console(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def ranks(self) -> dict[int, int]:
        """Process id by rank, of the ranks that are there now."""
        return self._view().ranks()

    def pulse(self, rank: int) -> Pulse | None:
        """What a rank last said; None before it has spoken."""
        return self._view().pulse(rank)

    def _view(self) -> LocalRun:
        assert self._seen is not None, "not started"
        return self._seen

    def until(
        self, condition: Callable[[], bool], what: str, *, hold: int | None = None, limit_s: float = 400.0
    ) -> float:
        """Poll until a condition holds, and hold the run at this step; the monotonic time at which it did."""
        self.hold(hold)
        limit = time.monotonic() + limit_s
        while not condition():
            assert self.process is not None
            assert self.process.poll() is None, f"ended before {what}:\n{self.console[-4000:]}"
            assert time.monotonic() < limit, f"never saw {what}:\n{self.console[-4000:]}"
            time.sleep(0.001)
        return time.monotonic()

    def until_step(self, step: int, rank: int = 0, phase: str = "step") -> float:
        """Wait until a rank is at this phase of this optimizer step, or past it (phases are short).

        The run is held there, or at the next step, until the test lets it go.
        """

        def there() -> bool:
            pulse = self.pulse(rank)
            if pulse is None or pulse.phase in ("start", "exit"):
                return False
            return pulse.step > step or (pulse.step == step and pulse.phase == phase)

        what = f"rank {rank} in phase {phase} of step {step}"
        return self.until(there, what, hold=step if phase == "step" else step + 1)

    def signal(self, number: int, *targets: int) -> float:
        """Send a signal to ranks (all of them if none is named); the monotonic time."""
        ranks = self.ranks()
        for rank in targets or tuple(ranks):
            os.kill(ranks[rank], number)
        return time.monotonic()

    def follow_recovery(self, fault: str, struck: float, step: int, old: dict[int, int]) -> None:
        """Measure a fault that ends the ranks: until new ones are there, and the lost steps made again."""

        def replaced() -> bool:
            ranks = self.ranks()
            return len(ranks) == len(old) and not set(ranks.values()) & set(old.values())

        noticed = self.until(replaced, "new ranks", hold=step + 2)  # others are inside a step when it strikes
        back = self.until_step(step)
        (resumed,) = [event["step"] for event in self.events("resume")[-1:]] or [0]
        lost = max(0, step - resumed)
        self.report(fault, detect_s=noticed - struck, recover_s=back - struck, lost_steps=lost)

    def report(self, fault: str, **measured: float | str) -> None:
        """Append what was measured to the file that LDM_FAULT_REPORT names (docs/reliability.md)."""
        if path := os.environ.get("LDM_FAULT_REPORT"):
            with Path(path).open("a") as stream:
                stream.write(json.dumps({"fault": fault, **measured}) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """Everything in the run's JSONL files, in order."""
        folder = Path(self.run_dir) / "logs"
        texts = [path.read_text() for path in sorted(folder.glob("*.jsonl"))]
        # The last line may still be being written.
        lines = [line for text in texts for line in text[: text.rfind("\n") + 1].splitlines()]
        return [json.loads(line) for line in lines]

    def events(self, name: str) -> list[dict[str, Any]]:
        """JSONL events of one name."""
        return [record for record in self.records() if record.get("event") == name]

    def trace(self) -> dict[int, float]:
        """Loss by step; a step that was made twice must have had the same loss twice."""
        losses: dict[int, float] = {}
        for record in self.records():
            if "loss" in record:
                step = record["step"]
                same = losses.setdefault(step, record["loss"]) == record["loss"]
                assert same, (step, losses[step], record["loss"])
        return losses

    def last_losses(self) -> dict[int, float]:
        """Loss by step where a rewind made some steps twice: the last one counts."""
        return {record["step"]: record["loss"] for record in self.records() if "loss" in record}

    def losses_of(self, step: int) -> list[float]:
        """Every loss that was logged for a step: one for each time it was made."""
        return [r["loss"] for r in self.records() if r["step"] == step and "loss" in r]

    def committed(self) -> list[int]:
        """Steps with a complete checkpoint, newest first."""
        folder = Path(checkpoints_url(self.run_dir))
        return [s for s in steps_found(str(folder)) if (folder / folder_name(s) / "manifest.json").exists()]

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of every parameter's master weights, moments and averages at the last checkpoint."""
        handle = self._last_checkpoint()
        prints = {"step": str(handle.step)}
        for kind, whole in self._whole(handle):
            for name, tensor in whole.items():
                digest = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
                prints[f"{kind}.{name}"] = digest
        return prints

    def state_distances(self, other: FaultyRun) -> dict[str, float]:
        """Of the last checkpoints' master weights, moments and averages, relative to the other's norm."""
        ours, theirs = (
            {
                kind: torch.cat([whole[name].flatten().double() for name in sorted(whole)])
                for kind, whole in run._whole(run._last_checkpoint())
            }
            for run in (self, other)
        )
        assert ours.keys() == theirs.keys()
        return {kind: float((ours[kind] - theirs[kind]).norm() / theirs[kind].norm()) for kind in ours}

    def position(self) -> dict[str, Any]:
        """Where the data of the last checkpoint stand."""
        handle = self._last_checkpoint()
        state = json.loads((Path(handle.url) / handle.manifest.state.name).read_text(encoding="utf-8"))
        return dict(state["state"]["train"]["position"])

    def _last_checkpoint(self) -> CheckpointHandle:
        folder = checkpoints_url(self.run_dir)
        return open_checkpoint(f"{folder}/{folder_name(steps_found(folder)[0])}")

    def _whole(self, handle: CheckpointHandle) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for engine, shapes in handle.manifest.shapes.items():
            reader = EngineReader(handle, engine)
            for kind in handle.manifest.plan(0).kinds[engine]:
                yield f"{engine}.{kind}", reader.whole(kind, list(shapes))


@dataclass(frozen=True)
class RunFactory:
    """Makes runs that differ from the tiny one only in what is asked for."""

    folder: Path
    shards: str
    made: list[FaultyRun] = dataclasses.field(default_factory=list)

    def __call__(
        self,
        changes: dict[str, Any] | None = None,
        *,
        name: str = "run",
        environment: dict[str, str] | None = None,
    ) -> FaultyRun:
        values = merge(tiny(self.shards, str(self.folder / name / "out")), changes or {})
        run = FaultyRun(self.folder / name, values, environment or {})
        self.made.append(run)
        return run


@pytest.fixture
def make_run(tmp_path: Path, shards: str) -> Iterator[RunFactory]:
    """Factory of runs; whatever still runs at the end of the test is killed."""
    factory = RunFactory(tmp_path, shards)
    yield factory
    for run in factory.made:
        run.kill()


@pytest.fixture
def s3(tmp_path: Path, shards: str) -> Iterator[LocalS3]:
    """A real S3 server over a folder that holds the shards."""
    folder = tmp_path / "s3"
    shutil.copytree(Path(shards).parent, folder / "bucket" / "shards")
    with LocalS3(folder, buckets=("bucket",)) as server:
        yield server


@pytest.fixture
def on_s3(make_run: RunFactory, s3: LocalS3) -> Callable[[dict[str, Any]], FaultyRun]:
    """Makes a run with shards and checkpoints in the bucket; the harness looks at the folder behind it."""

    def make(changes: dict[str, Any]) -> FaultyRun:
        bucket = {"run_dir": "s3://bucket/out", "data": {"shards": "s3://bucket/shards/*.tar"}}
        run = make_run(merge(bucket, changes), environment=s3.env)
        run.folder_of_run = s3.folder / "bucket" / "out"
        run.run_dir = str(run.folder_of_run)
        return run

    return make


@dataclass(frozen=True)
class Unbroken:
    """What a run without faults leaves behind."""

    fingerprint: dict[str, str]
    trace: dict[int, float]


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Callable[..., Unbroken]:
    """The unbroken run with these changes to the tiny configuration; made once a session each."""
    known: dict[str, Unbroken] = {}

    def get(changes: dict[str, Any] | None = None) -> Unbroken:
        key = json.dumps(changes or {}, sort_keys=True)
        if key not in known:
            run = RunFactory(tmp_path_factory.mktemp("unbroken"), shards)(changes)
            code = run.run()
            assert code == 0, run.console[-4000:]
            known[key] = Unbroken(run.fingerprint(), run.trace())
        return known[key]

    return get
