"""Train both stages on this machine against a real S3 server, sample, and judge the pictures.

Run again, it resumes whatever is unfinished; --fresh starts over.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.storage.files import exists
from data_pipeline.storage.local_s3 import LocalS3
from data_pipeline.storage.urls import join
from data_pipeline.tools.scenes.judge import evaluation_prompts, judge
from data_pipeline.tools.scenes.scene import COLORS, SHAPES
from trainer.config.io import load_config
from trainer.config.run import ConfigError
from trainer.evaluator.findings import FOLDER, EvaluatorFindings
from trainer.metrics.jsonl import read_records

EXAMPLE = "example: ldm demo --folder .demo steps=3000"
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BUCKET = "ldm-demo"
SHARDS = f"s3://{BUCKET}/shards"
FIRST_STAGE_RUN = f"s3://{BUCKET}/runs/first_stage"
FIRST_STAGE_FILE = f"s3://{BUCKET}/first_stage.safetensors"
RUN = f"s3://{BUCKET}/runs/text_to_image"
FIGURE = "eval/fd_random"
SAMPLES = 6000
MARK = ".ldm-demo"
"""In a folder that was empty when a demo began, so that all in it is the demo's."""
SCENES = ("--objects", "1:1", "--size", "72:96", "--radius", "0.3:0.44", "--workers", "2")
PROMPTS = 108
MEASURED = ("--features", "random", "--metrics", "fid", "--rule", "all", "--once")
"""Random features compare with nothing but themselves; here that is enough to see the distance fall."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where, and from scratch or not."""
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings for the second stage")
    parser.add_argument("--folder", default=".demo", help="everything the demo writes (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier demo has written first")


def run(args: argparse.Namespace) -> int:
    """Exit code of the first command that failed, or 0."""
    if not args.folder.strip():
        raise ConfigError("--folder is empty (a variable that is not set?); name a folder.")
    try:
        return run_demo(Path(args.folder).resolve(), fresh=args.fresh, overrides=args.overrides)
    except DemoFailed as failure:
        return failure.code


class DemoFailed(RuntimeError):
    """A command of the demo failed; its own message is above."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


@dataclass(frozen=True)
class Accuracy:
    """Share of pictures that show what their prompt names."""

    prompts: int
    color: float
    shape: float


def _clear(folder: Path) -> None:
    """Remove a demo's folder, and no other.

    Raises:
        ConfigError: something else was there before the demo.
    """
    if not folder.exists():
        return
    if not (folder / MARK).is_file():
        raise ConfigError(
            f"{folder} was not begun by a demo, so --fresh does not remove it; choose another --folder, or "
            "remove it yourself."
        )
    shutil.rmtree(folder)


def run_demo(folder: Path, *, fresh: bool, overrides: list[str]) -> int:
    """Synthesize, train both stages, sample, judge, report. What is there already is kept.

    Args:
        folder: everything the demo writes, the S3 server's files included.
        overrides: `a.b=c` for the second stage, e.g. steps=10 in tests.
    """
    if fresh:
        _clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        (folder / MARK).touch()
    started = time.monotonic()
    with LocalS3(folder / "s3", buckets=(BUCKET,)) as server:
        print(f"S3 server at {server.endpoint}, files under {folder / 's3'}", flush=True)
        # Two ranks on CPU cores, also where there is a GPU, which one alone could have.
        masked = {"CUDA_VISIBLE_DEVICES": ""}
        environment = {**os.environ, **server.env, **masked, "WANDB_DIR": str(folder / "wandb")}
        os.environ.update(server.env)
        (folder / "wandb").mkdir(exist_ok=True)
        _stage("1/7", "captioned scenes as img2dataset shards", started)
        if not exists(f"{SHARDS}/00000.tar"):
            _ldm(environment, "data", "synthesize", SHARDS, "--samples", str(SAMPLES), *SCENES)
        _ldm(environment, "data", "inspect", SHARDS, "--sheet", str(folder / "shards.png"))
        _stage("2/7", "first stage: KL autoencoder with LPIPS and PatchGAN", started)
        _ldm(environment, "train", str(CONFIGS / "demo_first_stage.yaml"), f"run_dir={FIRST_STAGE_RUN}")
        _ldm(environment, "export", FIRST_STAGE_RUN, FIRST_STAGE_FILE)
        _stage("3/7", "how well it reconstructs", started)
        quality, config = folder / "reconstruction.json", CONFIGS / "demo_text_to_image.yaml"
        image_size = load_config(str(config), overrides).data.image_size
        _ldm(environment, "evaluate", "reconstruction", FIRST_STAGE_FILE, "--shards", f"{SHARDS}/*.tar",
             "--image-size", str(image_size), "--samples", "512", "--out", str(quality),
             "--perceptual-weights", "random")  # fmt: skip
        _stage("4/7", "text-conditioned latent diffusion", started)
        _ldm(environment, "train", str(config), f"run_dir={RUN}", *overrides)
        _stage("5/7", f"{PROMPTS} pictures from prompts", started)
        accuracy = _sample_and_judge(environment, folder)
        _stage("6/7", "what an evaluator beside the run measures of each checkpoint", started)
        drawing = f"--count {PROMPTS} --steps 10 --prompts-from {shlex.quote(str(folder / 'prompts.txt'))}"
        _ldm(environment, "evaluate", "watch", RUN, *MEASURED, "--reference", f"{SHARDS}/00000.tar",
             "--image-size", str(image_size), "--sample", drawing)  # fmt: skip
        _stage("7/7", "summary", started)
        _ldm(environment, "report", RUN, "--out", str(folder / "report.html"))
        records, figures = read_records(RUN), EvaluatorFindings(join(RUN, FOLDER)).records
    psnr = json.loads(quality.read_text())["psnr"]
    _report(folder, accuracy, psnr, (records, figures), time.monotonic() - started)
    return 0


def _stage(number: str, what: str, started: float) -> None:
    print(f"\n== [{number}] {what} ({time.monotonic() - started:.0f} s so far)", flush=True)


def _ldm(environment: dict[str, str], *arguments: str) -> None:
    print(f"$ ldm {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "trainer", *arguments], env=environment, check=False)
    if done.returncode:
        raise DemoFailed(done.returncode)


def _sample_and_judge(environment: dict[str, str], folder: Path) -> Accuracy:
    prompts = evaluation_prompts(PROMPTS)
    listed = folder / "prompts.txt"
    listed.write_text("".join(f"{prompt.prompt}\n" for prompt in prompts))
    out = folder / "samples"
    _ldm(environment, "sample", RUN, "--prompts-file", str(listed), "--out", str(out), "--overwrite")
    verdicts = [
        judge(
            np.asarray(Image.open(out / "pictures" / f"{i:05d}.png").convert("RGB")).transpose(2, 0, 1),
            prompt,
        )
        for i, prompt in enumerate(prompts)
    ]
    return Accuracy(
        prompts=len(prompts),
        color=statistics.fmean(verdict.color_correct for verdict in verdicts),
        shape=statistics.fmean(verdict.shape_correct for verdict in verdicts),
    )


def _validation(records: list[dict[str, Any]]) -> str:
    """The last validation loss, with its standard error, and the first."""
    found = [record for record in records if "validation/loss" in record]
    if not found:
        return "not measured"
    first, last = (found[i]["validation/loss"] for i in (0, -1))
    count, error = found[-1]["validation/samples"], found[-1]["validation/loss_stderr"]
    return (
        f"{last:.3f} +- {error:.3f} on {count:.0f} held-out pictures ({first:.3f} at step {found[0]['step']})"
    )


def _distance(figures: list[dict[str, Any]]) -> str:
    """From pictures to shards, of the weights that training began with (step 0) and of the last ones."""
    found = sorted((record["step"], record[FIGURE]) for record in figures if FIGURE in record)
    if not found:
        return "not measured"
    (first, before), (last, after) = found[0], found[-1]
    when = f"at step {first}" if first else "before training"
    return f"{before:.4f} {when}, {after:.4f} at step {last} (fd_random: random features)"


def _report(
    folder: Path,
    accuracy: Accuracy,
    psnr: float,
    told: tuple[list[dict[str, Any]], list[dict[str, Any]]],
    seconds: float,
) -> None:
    """The end of it; `told` are the records of the run and of its evaluator."""
    records, figures = told
    rates = [record["images_per_s"] for record in records if "images_per_s" in record]
    rate = statistics.median(rates) if rates else math.nan
    print(f"""
pictures            {folder / "samples" / "grid.png"}
curves and faults   {folder / "report.html"} (ldm report)
shards at a glance  {folder / "shards.png"}
colour accuracy     {accuracy.color:.2f} on {accuracy.prompts} prompts (chance {1 / len(COLORS):.2f})
shape accuracy      {accuracy.shape:.2f} (chance {1 / len(SHAPES):.2f})
reconstruction      {psnr:.1f} dB PSNR
validation loss     {_validation(records)}
Frechet distance    {_distance(figures)}
training speed      {rate:.0f} images/s
wall time           {seconds:.0f} s

go on:
  resume, longer    make demo DEMO='steps=3000'
  start over        make demo-clean
  W&B               .venv/bin/wandb sync {folder / "wandb"}/wandb/offline-run-*
  pictures, again   the S3 files stay under {folder / "s3"}; `make demo` samples anew from them
""")
