"""Where an experiment gets its data, models and pictures: from the `ldm` commands that users type."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.__main__ import main as ldm
from trainer.checkpoint.commands import find_checkpoint
from trainer.cli.demo import CONFIGS, SCENES
from trainer.config.run import ConfigError
from trainer.metrics.jsonl import read_records

FIRST_STAGE = CONFIGS / "demo_first_stage.yaml"
SECOND_STAGE = CONFIGS / "demo_text_to_image.yaml"
QUIET = ("logging.wandb=disabled", "logging.progress_bar=false", "sampling.every=0", "distributed.ranks=1")
"""One rank, so that two seeds share two cores; the result is that of any number of ranks."""

CONSTANT = ("optimizer.schedule=constant",)
SNAPSHOTS = 16
_SMALLEST, _LARGEST = map(float, SCENES[SCENES.index("--radius") + 1].split(":"))
RADIUS = (_SMALLEST, _LARGEST)
"""Of the demo's objects, a share of the picture's shorter edge."""


class Refused(RuntimeError):
    """One sentence for the user, and the exit code that goes with it."""

    def __init__(self, sentence: str, code: int = 2) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True)
class Scale:
    """How much is trained and drawn."""

    scenes: int
    """Rows of the shards."""
    first_stage_steps: int
    steps: int
    """Of a second stage."""
    pictures: int
    """Drawn for each point, and taken from the shards as their reference."""
    sampler_steps: int


FULL = Scale(scenes=6000, first_stage_steps=360, steps=800, pictures=432, sampler_steps=10)
SMALL = Scale(scenes=120, first_stage_steps=4, steps=6, pictures=12, sampler_steps=2)


class Workshop:
    """One folder, in which everything is made once."""

    def __init__(self, folder: Path, scale: Scale) -> None:
        """Raises Refused where the folder holds experiments of another size."""
        self.folder = folder
        self.scale = scale
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "logs").mkdir(exist_ok=True)
        self._log = (folder / "logs" / f"commands_{os.getpid()}.log").open("a")  # as long as the process:
        # what is logged once goes to the stream that was there
        path = folder / "scale.json"
        with self._alone("scale"):
            if not path.exists():
                path.write_text(json.dumps(asdict(scale), indent=1) + "\n")
            elif json.loads(path.read_text()) != asdict(scale):
                raise Refused(f"{path} is of experiments of another size; choose another folder with --out.")

    def shards(self, radius: tuple[float, float] = RADIUS) -> Path:
        """The demo's scenes with their maps, as shards: 00000.tar is the reference of fidelity.

        Or scenes with objects of another size.
        """
        smallest, largest = radius
        folder = self.folder / ("shards" if radius == RADIUS else f"shards_{smallest}_{largest}")
        with self._alone(folder.name):
            if not (folder / "done").exists():
                sized = ("--radius", f"{smallest}:{largest}")
                self.command(["data", "synthesize", str(folder), "--maps", *self._scenes(), *sized])
                (folder / "done").touch()
        return folder

    def _scenes(self) -> list[str]:
        rows = ["--samples", str(self.scale.scenes), "--samples-per-shard", str(min(1000, self.scale.scenes))]
        return [*rows, *SCENES]

    def first_stage(self, name: str = "first_stage", overrides: Sequence[str] = ()) -> Path:
        """Exported weights of the demo's first stage, or of another one."""
        weights = self.folder / f"{name}.safetensors"
        steps = self.scale.first_stage_steps
        start = (f"autoencoder_loss.discriminator_start={steps * 29 // 36}", "sampling.num_previews=1")
        with self._alone(name):
            if not weights.exists():
                self._train(name, FIRST_STAGE, steps, ("checkpoint.every=0", *start, *overrides))
                self.command(["export", str(self.folder / name), str(weights)])
        return weights

    def second_stage(self, name: str, seed: int, overrides: Sequence[str] = (), steps: int = 0) -> Path:
        """Run folder of the demo's text-to-image model, or of another; `name` stands for the overrides.

        `steps`: 0 for those of the scale.
        """
        run, steps = self.folder / name / f"seed_{seed}", steps or self.scale.steps
        first = () if any(o.startswith("first_stage.weights=") for o in overrides) else self._frozen()
        with self._alone(f"{name}_{seed}"):
            if not self._is_trained(run, steps):
                self._train(f"{name}/seed_{seed}", SECOND_STAGE, steps, (f"seed={seed}", *first, *overrides))
        return run

    def race(self, name: str, seed: int, steps: int, overrides: Sequence[str]) -> None:
        """A second stage by the demo's configuration, to its end, in the run folder `name`."""
        settings = (f"seed={seed}", *self._frozen(), "distributed.ranks=2", *overrides)
        self._train(name, SECOND_STAGE, steps, settings)

    def base(self, seed: int) -> Path:
        """The run that experiments without settings of training share: a constant rate, as in the paper."""
        return self.second_stage("base", seed, (*CONSTANT, *self.stored_averages()))

    def stored_averages(self) -> tuple[str, ...]:
        """Two power-function averages and snapshots of them, for `ldm ema`."""
        every = max(1, self.scale.steps // SNAPSHOTS)
        return ("ema.power_stds=[0.05,0.1]", f"ema.snapshot_every={every}")

    def _frozen(self) -> tuple[str, ...]:
        return (f"first_stage.weights={self.first_stage()}",)

    def _train(self, name: str, config: Path, steps: int, overrides: Sequence[str]) -> None:
        run = self.folder / name
        words = [
            "train",
            str(config),
            f"run_dir={run}",
            f"steps={steps}",
            f"data.shards={self.shards()}/*.tar",
        ]
        self._beside(name, [*words, *QUIET, *overrides])

    @staticmethod
    def _is_trained(run: Path, steps: int) -> bool:
        try:
            return find_checkpoint(str(run)).step >= steps
        except ConfigError:
            return False

    def draw(self, source: Path, out: Path, *options: str) -> Path:
        """Folder of `scale.pictures` pictures by `ldm sample`; what is there is kept."""
        count, steps = str(self.scale.pictures), str(self.scale.sampler_steps)
        words = ["sample", str(source), "--out", str(out), "--count", count, "--steps", steps]
        self.command([*words, "--batch-size", "72", *options])
        return out / "pictures"

    def fidelity(self, pictures: Path, size: int = 32) -> dict[str, float]:
        """Frechet distance, precision and recall of `ldm evaluate fidelity`, by random features."""
        out = pictures.parent / "fidelity.json"
        measured = ("--features", "random", "--metrics", "fid,precision,recall", "--image-size", str(size))
        words = ["evaluate", "fidelity", str(pictures), "--reference", str(self.reference(size))]
        self.command([*words, "--out", str(out), *measured])
        found: dict[str, float] = json.loads(out.read_text())["figures"]
        return {name.removesuffix("_random"): value for name, value in found.items()}

    def reconstruction(self, weights: Path) -> dict[str, float]:
        """PSNR, and Frechet distance by random features, of `ldm evaluate reconstruction`."""
        out = weights.with_suffix(".json")
        networks = ("--features", "random", "--perceptual-weights", "none")
        measured = (*networks, "--image-size", "32", "--samples", str(self.scale.pictures))
        shards = ("--shards", str(self.shards() / "00000.tar"))
        self.command(["evaluate", "reconstruction", str(weights), *shards, "--out", str(out), *measured])
        found = json.loads(out.read_text())
        return {"psnr": found["psnr"], "reconstruction fd": found["rfd_random"]}

    def reference(self, size: int) -> Path:
        """Statistics of the first shard at this edge."""
        out = self.folder / f"reference_{size}.safetensors"
        with self._alone(out.stem):
            if not out.exists():
                shard = str(self.shards() / "00000.tar")
                wanted = ("--features", "random", "--metrics", "fid,precision,recall")
                words = ["evaluate", "statistics", shard, "--image-size", str(size), "--out", str(out)]
                self.command([*words, *wanted])
        return out

    def records(self, run: Path) -> list[dict[str, Any]]:
        """Lines of the run's metrics."""
        return read_records(str(run))

    def command(self, words: Sequence[str]) -> None:
        """Any command of `ldm`, in this process; its output goes to a file of it.

        Raises Refused where the command fails.
        """
        self._check(words, self._log.name, self._in_process(words))

    def _in_process(self, words: Sequence[str]) -> int:
        """Spares the seconds in which torch is imported."""
        print(f"$ ldm {' '.join(words)}", file=self._log, flush=True)
        with contextlib.redirect_stdout(self._log), contextlib.redirect_stderr(self._log):
            code = ldm(list(words))
        self._log.flush()
        return code

    def _beside(self, name: str, words: Sequence[str]) -> None:
        """A command that starts processes of its own, with a log of its own."""
        with (self.folder / "logs" / f"{name.replace('/', '_')}.log").open("a") as log:
            print(f"$ ldm {' '.join(words)}", file=log, flush=True)
            command = [sys.executable, "-m", "trainer", *words]
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        self._check(words, log.name, done.returncode)

    @staticmethod
    def _check(words: Sequence[str], log: str, code: int) -> None:
        if code:
            raise Refused(f"ldm {words[0]} ended with exit code {code}; its words are in {log}.", code)

    @contextlib.contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """One process at a time makes the thing; the others wait and find it made."""
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / what.replace("/", "_")).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
