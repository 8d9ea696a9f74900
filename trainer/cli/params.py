"""Count trained and frozen parameters per module: seconds, no memory, nothing is downloaded."""

from __future__ import annotations

import argparse
import json

from trainer.config.io import load_config
from trainer.model import count_parameters

EXAMPLE = "example: ldm params configs/sd/sd2_base_512.yaml --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, overrides and the output form."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that win over the file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the table or the JSON object."""
    counts = count_parameters(load_config(args.config, args.overrides))
    if args.json:
        print(json.dumps(counts))
        return 0
    for kind, modules in counts.items():
        for name, count in modules.items():
            print(f"{kind:8} {name:28} {count:>15,}  {count / 1e6:10.2f} M")
    return 0
