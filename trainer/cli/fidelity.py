"""The part of `ldm evaluate` that measures sets of pictures: arguments, ranks, and what is printed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import typing
from collections.abc import Sequence
from typing import Any

import torch

from data_pipeline.storage.files import check_writable, write_bytes
from data_pipeline.storage.urls import is_local, local_path, parent
from data_pipeline.tools.picture_sets import PictureSet
from trainer.config.run import ConfigError
from trainer.distributed import collectives
from trainer.distributed.shared_reads import read_together
from trainer.evaluation.features import Fit, Resizing
from trainer.evaluation.fidelity import (
    METRICS,
    Comparison,
    check_metrics,
    compare,
    figure_names,
    outputs_needed,
)
from trainer.evaluation.networks import FAMILIES, FeatureOptions, build_networks, identities
from trainer.evaluation.statistics import (
    ENDINGS,
    UNKNOWN,
    Record,
    SetStatistics,
    read_statistics,
    write_statistics,
)
from trainer.evaluation.survey import SurveyOptions, pictures_to_measure, survey
from trainer.launch.command import as_rank

logger = logging.getLogger(__name__)

FIDELITY_EXAMPLE = (
    "example: ldm evaluate fidelity samples --reference 's3://bucket/val/*.tar' --image-size 256\n"
    "example: ldm evaluate fidelity s3://bucket/run --sample '--count 5000 --prompts-from prompts.txt' "
    "--reference s3://bucket/val.safetensors"
)
STATISTICS_EXAMPLE = "example: ldm evaluate statistics 's3://bucket/val/*.tar' --image-size 256 --out s3://bucket/val.safetensors"
MOST_THREADS = 16


def add_arguments(fidelity: argparse.ArgumentParser, statistics: argparse.ArgumentParser) -> None:
    """Those of the two sub-commands."""
    fidelity.add_argument(
        "pictures",
        metavar="PICTURES|RUN",
        help="folder, tars (braces or wildcards) or statistics, at any URL; a run with --sample",
    )
    fidelity.add_argument(
        "--reference",
        required=True,
        metavar="PICTURES",
        help="the same; or the .npz (mu, sigma) of other programs",
    )
    fidelity.add_argument("--save-reference", metavar="FILE", help="also store the reference's statistics")
    fidelity.add_argument("--out", help="also write all of it as JSON to this path or URL")
    statistics.add_argument(
        "pictures", metavar="PICTURES", help="folder or tars (braces or wildcards), at any URL"
    )
    statistics.add_argument("--out", required=True, metavar="FILE", help="a .safetensors path or URL")
    for parser in (fidelity, statistics):
        add_measuring_arguments(parser)


def add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of everything that measures pictures."""
    group = add_network_arguments(parser, "inception")
    group.add_argument(
        "--metrics", metavar="NAMES", help=f"of {', '.join(METRICS)} (default: all that can be)"
    )
    parser.add_argument("--image-size", type=int, help="bring every picture to this edge first")
    parser.add_argument(
        "--fit", choices=typing.get_args(Fit), help="keep the middle, or squash (default: crop)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, help="pictures at a time (default: %(default)s)"
    )
    parser.add_argument("--skip-broken", action="store_true", help="leave out pictures that cannot be read")


def add_network_arguments(parser: argparse.ArgumentParser, default: str) -> argparse._ArgumentGroup:
    """Which networks see the pictures, and where their weights are; `default` says what happens without."""
    group = parser.add_argument_group(
        "features", "weights are paths or URLs; Inception's and DINOv2's stay offline"
    )
    group.add_argument(
        "--features", default=None, metavar="NAMES", help=f"of {', '.join(FAMILIES)} (default: {default})"
    )
    group.add_argument(
        "--resize",
        choices=typing.get_args(Resizing),
        help=f"whose way to Inception's 299 pixels (default: {FeatureOptions.resizing})",
    )
    group.add_argument(
        "--inception-weights", metavar="FILE", help="torch-fidelity's (default: where torch.hub keeps it)"
    )
    group.add_argument(
        "--clip-model", default=FeatureOptions.clip_model, help="of open_clip (default: %(default)s)"
    )
    group.add_argument(
        "--clip-weights",
        default=FeatureOptions.clip_weights,
        metavar="TAG|FILE",
        help="tag of open_clip or file (default: %(default)s)",
    )
    group.add_argument(
        "--dinov2-model", default=FeatureOptions.dinov2_model, help="of timm (default: %(default)s)"
    )
    group.add_argument("--dinov2-weights", metavar="FILE", help="Meta's or timm's file of the model")
    return group


def run(args: argparse.Namespace) -> int:
    """Either sub-command, by one process or by the ranks that torchrun or srun have started."""
    check(args)
    return as_rank(lambda env: _measure(args, env.device))


def check(args: argparse.Namespace) -> None:
    """What can be wrong without a look at any picture. Raises ConfigError."""
    for place in ("source", "pictures", "reference", "out", "save_reference", "features", "metrics"):
        given = getattr(args, place, None)
        if given is not None and not names(given):
            told = place.upper() if place in ("source", "pictures") else f"--{place.replace('_', '-')}"
            raise ConfigError(f"{told} is empty (a variable that is not set?); name what is meant.")
    for option, value in (("--image-size", args.image_size), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value} is too small; give at least 1.")
    for option in ("out", "save_reference"):
        url = getattr(args, option, None)
        stores = option == "save_reference" or args.command == "statistics"
        if url is not None and stores and not url.endswith(".safetensors"):
            raise ConfigError(f"--{option.replace('_', '-')} {url} has to end in .safetensors.")


def _measure(args: argparse.Namespace, device: torch.device) -> None:
    collectives.from_main_rank(lambda: check_places(args))
    if args.command == "statistics":
        pictures = pictures_to_measure(args.pictures)
        made = Measuring(args, (), device).statistics(pictures)
        if made is not None:
            write_statistics(args.out, made)
            print(_described("pictures", made.record) + f"\nstatistics in {args.out}")
        return
    real, made = stored(args.reference), stored(args.pictures)
    known = [each for each in (real, made) if each is not None]
    if len(known) == 2:
        for each in known:  # only what was said: how the two differ is a note
            _adopt(argparse.Namespace(**vars(args)), each.record)
        check_metrics(names(args.metrics), known[1].outputs())
    else:
        measuring = Measuring(args, known, device)
        sides = ((real, args.reference), (made, args.pictures))
        unread = {url: pictures_to_measure(url) for each, url in sides if each is None}
        real = real or measuring.statistics(unread[args.reference], reference=True)
        made = made or measuring.statistics(unread[args.pictures])
    collectives.from_main_rank(lambda: report(args, made, real, device))


def check_places(args: argparse.Namespace) -> None:
    """What is written comes after all that is measured; whether it can be is better known before."""
    for option, url in (("--out", args.out), ("--save-reference", getattr(args, "save_reference", None))):
        if not url:
            continue
        if url.endswith("/") or (is_local(url) and os.path.isdir(local_path(url))):
            raise ConfigError(f"{option} {url} is a folder; name a file in it.")
        check_writable(parent(url))


class Measuring:
    """The networks of a command, and the options by which sets go through them. Collective."""

    def __init__(
        self, args: argparse.Namespace, known: Sequence[SetStatistics], device: torch.device
    ) -> None:
        """`known`: statistics that exist; networks and sizes that were not given are theirs.

        Raises ConfigError: weights that are not at hand, metrics that nothing gives, other sizes than theirs.
        """
        for each in known:
            _adopt(args, each.record)
        self._args, self._device = args, device
        self._wanted = names(args.metrics)
        families = names(args.features) or (list(known[0].record.networks) if known else ["inception"])
        scores = self._wanted is None or "clip_score" in self._wanted
        options = feature_options(args, families, clip_text=scores)
        with read_together(device):
            self._networks = collectives.on_every_rank(lambda: build_networks(options, device))
        self._widths = {family: tuple(network.widths) for family, network in self._networks.items()}
        check_metrics(self._wanted, self._widths)

    def check_figure(self, name: str) -> None:
        """Raises ConfigError: these networks and metrics give no figure of this name."""
        offered = figure_names(self._wanted, self._widths)
        if name not in offered:
            raise ConfigError(f"there is no figure {name!r} here; choose from {', '.join(offered)}.")

    @property
    def networks(self) -> dict[str, list[str]]:
        """See `identities`."""
        return identities(self._networks)

    def statistics(self, pictures: PictureSet, *, reference: bool = False) -> SetStatistics | None:
        """Of the pictures of a set, on rank 0; None on others. See `survey`."""
        args = self._args
        moments, kept = outputs_needed(self._wanted, self._widths, reference=reference)
        options = SurveyOptions(
            moments=moments,
            kept=kept,
            image_size=args.image_size,
            fit=args.fit or "crop",
            block=args.batch_size,
            threads=min(MOST_THREADS, len(os.sched_getaffinity(0))),
            skip_broken=args.skip_broken,
        )
        return survey(pictures, self._networks, options, self._device)


def report(
    args: argparse.Namespace,
    made: SetStatistics | None,
    real: SetStatistics | None,
    device: torch.device,
    drawn: dict[str, Any] | None = None,
) -> None:
    """On rank 0, which has the statistics; `drawn` is what the pictures are a function of, where known."""
    assert made is not None
    assert real is not None
    if args.save_reference:
        write_statistics(args.save_reference, real)
    found = figures(args, made, real, device)
    print(_described("pictures", made.record))
    print(_described("reference", real.record))
    for name, value in found.figures.items():
        print(f"{name:22} {value:.6g}")
    for note in found.notes:
        logger.warning("%s.", note)
    if args.out:
        told = as_json(made, real, found) | ({} if drawn is None else {"drawn": drawn})
        write_bytes(args.out, json.dumps(told, indent=1).encode())


def figures(
    args: argparse.Namespace, made: SetStatistics, real: SetStatistics, device: torch.device
) -> Comparison:
    """Of the features that were asked for, else of those that both sets have."""
    families = names(args.features) or [f for f in made.record.networks if f in real.record.networks]
    return compare(made, real, families, names(args.metrics), device)


def as_json(made: SetStatistics, real: SetStatistics, found: Comparison) -> dict[str, object]:
    """Everything that is known of a measurement."""
    return {
        "figures": found.figures,
        "pictures": dataclasses.asdict(made.record),
        "reference": dataclasses.asdict(real.record),
        "notes": found.notes,
    }


def _described(title: str, record: Record) -> str:
    lines = [f"{title}: {record.pictures or 'unknown number'} of {record.source}"]
    for family, network in record.networks.items():
        lines.append(f"  {family}: {network.name}, weights {network.sha256[:16]}, {network.sees}")
    return "\n".join(lines)


def names(text: str | None) -> list[str] | None:
    """The parts of a list with commas; None for none."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def feature_options(args: argparse.Namespace, families: Sequence[str], *, clip_text: bool) -> FeatureOptions:
    """What `add_network_arguments` was told."""
    return FeatureOptions(
        families=tuple(families),
        resizing=args.resize or "torch-fidelity",
        inception_weights=args.inception_weights,
        clip_model=args.clip_model,
        clip_weights=args.clip_weights,
        clip_text=clip_text,
        dinov2_model=args.dinov2_model,
        dinov2_weights=args.dinov2_weights,
    )


def stored(url: str) -> SetStatistics | None:
    """Statistics from a file, on every rank; None for pictures."""
    return collectives.on_every_rank(lambda: read_statistics(url)) if url.endswith(ENDINGS) else None


def _adopt(args: argparse.Namespace, record: Record) -> None:
    """Options that were not given are those of the statistics; with others, figures would not compare."""
    if not record.pictures:
        return  # a .npz says nothing
    seen = record.networks["inception"].sees.split(" ")[0] if "inception" in record.networks else None
    for option, theirs in (("image_size", record.image_size), ("fit", record.fit), ("resize", seen)):
        given = getattr(args, option)
        if given is None:
            setattr(args, option, theirs)
        elif theirs not in (None, UNKNOWN, given) and not (option == "fit" and record.image_size is None):
            raise ConfigError(
                f"{record.source} was measured with --{option.replace('_', '-')} {theirs}; leave the option "
                "out, or measure that set anew."
            )
