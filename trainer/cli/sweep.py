"""`ldm evaluate sweep`: the curve of fidelity over guidance scales and sampler steps.

OUT/guidance_G_steps_S/pictures/   what `ldm sample` makes, all points from the same seeds and prompts
OUT/guidance_G_steps_S/figures.json   everything known of that point; a point that has it is not made again
OUT/curve.csv                      a row per point, after each
OUT/curve.png, OUT/curve.html      what draws them, as a picture and as a page
OUT/sweep.json                     the checkpoint of all points, the newest when the sweep began
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from data_pipeline.errors import NotFound
from data_pipeline.storage.files import check_writable, read_text, write_bytes
from data_pipeline.storage.urls import join
from trainer.checkpoint.commands import find_checkpoint, fingerprint
from trainer.cli import sample
from trainer.cli.fidelity import Measuring, add_measuring_arguments, as_json, check, figures, stored
from trainer.config.run import ConfigError
from trainer.distributed.env import DistributedEnv
from trainer.evaluation.survey import pictures_to_measure
from trainer.report.chart import fidelity_chart, to_png

logger = logging.getLogger(__name__)
SWEEP_EXAMPLE = (
    "example: ldm evaluate sweep s3://bucket/run --guidance 1:8:1 --steps 10,25,50 "
    "--sample '--prompts-file prompts.txt --sampler dpmpp_2m' --reference val.safetensors --out curve"
)
MOST_POINTS = 1000
_SAID_LATER = ("weights", "reference_content")
"""Of what tells sweeps apart, what points of earlier versions do not have."""
_OURS = ("--guidance", "--steps", "--out", "--overwrite", "--share")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which points, from which model, against what."""
    parser.add_argument("source", metavar="RUN", help="run folder, checkpoint folder or .safetensors file")
    parser.add_argument(
        "--guidance", required=True, metavar="VALUES", help="1,2.5,7 or FIRST:LAST:STEP, LAST included"
    )
    parser.add_argument("--steps", required=True, metavar="VALUES", help="the same for sampler steps")
    parser.add_argument("--reference", required=True, metavar="PICTURES", help="as of `fidelity`")
    parser.add_argument(
        "--sample", default="", metavar="OPTIONS", help="further options of `ldm sample`, as one text"
    )
    parser.add_argument("--out", required=True, help="folder or URL")
    add_measuring_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Sample and measure point by point."""
    out = args.out.rstrip("/")
    points = [(g, s) for s in _values(args.steps, "--steps") for g in _values(args.guidance, "--guidance")]
    _check(args, points)
    commands = {point: _command(args, point, join(out, _name(point))) for point in points}
    env = DistributedEnv.detect()
    if env.world_size > 1:
        raise ConfigError("a sweep is made by one process; start it without torchrun or srun.")
    check_writable(out)
    step = _step_of_all(args, out, next(iter(commands.values())))
    for command in commands.values():
        command.checkpoint = step
        if step is not None:
            command.command_line += ["--checkpoint", str(step)]
    sample.check_all(list(commands.values()), env.device)
    real = stored(args.reference)
    measuring = Measuring(args, [real] if real else [], env.device)
    real = real or measuring.statistics(pictures_to_measure(args.reference), reference=True)
    assert real is not None
    settings = {
        "source": args.source,
        "weights": fingerprint(args.source, step),
        "sample": args.sample,
        "reference": args.reference,
        "reference_content": real.content(),
        "metrics": args.metrics,
        **_measured_by(measuring.networks, args.image_size, args.fit),
    }
    rows: list[dict[str, Any]] = []
    missing = ""
    for point, command in commands.items():
        place = join(out, _name(point), "figures.json")
        found = _former(place, settings)
        if found is None:
            status = sample.run(command)
            if status != 0:  # of the ranks that have drawn; they have said why
                return status
            made = measuring.statistics(pictures_to_measure(join(out, _name(point))))
            assert made is not None
            found = as_json(made, real, figures(args, made, real, env.device))
            found["settings"] = settings
            write_bytes(place, json.dumps(found, indent=1).encode())
        rows.append({"guidance": str(point[0]), "steps": str(point[1]), **_numbers(found["figures"])})
        networks = _networks(found)
        write_bytes(join(out, "curve.csv"), _table([{**row, "networks": networks} for row in rows]).encode())
        missing = _draw(rows, networks, out)
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()))
    print(f"{len(rows)} points in {join(out, 'curve.csv')}, drawn in curve.png{missing}")
    return 0


def _check(args: argparse.Namespace, points: Sequence[tuple[Decimal, Decimal]]) -> None:
    args.save_reference = None
    check(args)
    if len(points) > MOST_POINTS:
        raise ConfigError(f"{len(points)} points are more than {MOST_POINTS}; sweep fewer values.")
    whole = [steps for _, steps in points if steps != int(steps) or steps < 1]
    if whole:
        raise ConfigError(f"--steps {whole[0]} is no number of steps; give whole numbers of at least 1.")


def _values(text: str, option: str) -> list[Decimal]:
    """Exact decimals: a step of 0.1 reaches its end."""
    try:
        if ":" not in text:
            listed = [Decimal(part) for part in text.split(",")]
            if not all(value.is_finite() for value in listed):
                raise ValueError
            return listed
        first, last, step = (Decimal(part) for part in text.split(":"))
        if step <= 0 or last < first or not (first + last + step).is_finite():
            raise ValueError
        count = int((last - first) / step) + 1
        return [first + i * step for i in range(min(count, MOST_POINTS + 1))]
    except (InvalidOperation, ValueError) as error:
        raise ConfigError(
            f"{option} {text} is neither a list such as 1,2.5,7 nor FIRST:LAST:STEP."
        ) from error


def _name(point: tuple[Decimal, Decimal]) -> str:
    return f"guidance_{point[0]}_steps_{int(point[1])}"


def _command(args: argparse.Namespace, point: tuple[Decimal, Decimal], folder: str) -> argparse.Namespace:
    """What `ldm sample` is to do for one point."""
    own = ["--guidance", str(point[0]), "--steps", str(int(point[1])), "--out", folder]
    return sample.arguments(args.source, args.sample, own, _OURS, "ldm evaluate sweep")


def _step_of_all(args: argparse.Namespace, out: str, command: argparse.Namespace) -> int | None:
    """The checkpoint of every point: a run that trains on must not move along the curve.

    None for a file, which has one.
    """
    if command.checkpoint is not None or args.source.endswith(".safetensors"):
        return None if command.checkpoint is None else int(command.checkpoint)
    url = join(out, "sweep.json")
    try:
        former = json.loads(read_text(url))
        if former["source"] == args.source:
            return int(former["checkpoint"])
    except NotFound:
        pass
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{url} is not a sweep's; choose another folder with --out.") from error
    step = find_checkpoint(args.source).step
    write_bytes(url, json.dumps({"source": args.source, "checkpoint": step}).encode())
    return step


def _former(url: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a sweep before has found of a point. Raises ConfigError where it was another sweep."""
    try:
        found = json.loads(read_text(url))
        seen = found["pictures"]
        networks = {family: [n["name"], n["sha256"], n["sees"]] for family, n in seen["networks"].items()}
        # sets of earlier versions do not say it in their settings
        theirs = _measured_by(networks, seen["image_size"], seen["fit"]) | found["settings"]
    except NotFound:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        theirs = None
    if isinstance(theirs, dict):
        unknown = {name: settings[name] for name in _SAID_LATER if name not in theirs}
        if unknown:
            told = " and ".join(unknown)
            logger.warning("%s does not say its %s: whether that is the same is not known", url, told)
        theirs = unknown | theirs
        if sample.same_pictures(str(theirs.get("sample")), str(settings["sample"])):
            theirs = theirs | {"sample": settings["sample"]}
    if theirs != settings:
        told = "not written by one" if theirs is None else _differences(theirs, settings)
        raise ConfigError(f"{url} is of another sweep ({told}); choose another folder with --out.")
    return dict(found)


def _measured_by(
    networks: Mapping[str, Sequence[str]], image_size: int | None, fit: str | None
) -> dict[str, Any]:
    """What the figures of all points have to share besides the pictures; as JSON gives it."""
    size = None if image_size is None else f"{image_size}, {fit or 'crop'}"
    return {"networks": dict(networks), "image_size": size}


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What another sweep was told otherwise, for people."""
    names = [name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)]
    return "; ".join(f"{name} {theirs.get(name)} instead of {ours.get(name)}" for name in sorted(names))


def _networks(found: Mapping[str, Any]) -> str:
    """Which networks saw the pictures, the same at every point, with the beginning of their hashes."""
    seen = found["pictures"]["networks"].values()
    return "; ".join(f"{network['name']}, weights {network['sha256'][:16]}" for network in seen)


def _draw(rows: Sequence[Mapping[str, str]], networks: str, out: str) -> str:
    """The curve as picture and page; what to say where there is nothing to draw the page with."""
    points = [{name: float(value) for name, value in row.items()} for row in rows]
    write_bytes(join(out, "curve.png"), to_png(fidelity_chart(points), header=networks))
    try:
        from trainer.report.figures import fidelity_curve
    except ModuleNotFoundError as error:
        if error.name != "plotly":
            raise
        return "; to have curve.html as well, install plotly (pip install plotly) and repeat the command"
    write_bytes(join(out, "curve.html"), fidelity_curve(points, networks))
    return ""


def _numbers(found: object) -> dict[str, str]:
    assert isinstance(found, dict)
    return {name: f"{value:.6g}" for name, value in found.items()}


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
