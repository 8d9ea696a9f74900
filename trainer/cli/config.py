"""Print the resolved configuration (defaults < file < overrides) and the DeepSpeed dictionary it becomes.

Torch is not imported, so a login node answers at once; a mistake is one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import json

from trainer.config.io import dump_yaml, load_config
from trainer.distributed.deepspeed_config import deepspeed_config

EXAMPLE = "example: ldm config configs/sd/sd2_base_512.yaml distributed.zero_stage=2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and overrides."""
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file; none: the defaults")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that win over the file")


def run(args: argparse.Namespace) -> int:
    """Print YAML, with the DeepSpeed dictionary as a comment below where it may be used."""
    if args.config is not None and "=" in args.config:
        args.config, args.overrides = None, [args.config, *args.overrides]
    config = load_config(args.config, args.overrides)
    print(dump_yaml(config), end="")
    if config.distributed.engine == "fsdp":
        return 0
    ranks = config.distributed.ranks or 1
    print(f"# DeepSpeed, for {ranks} rank(s):")
    for line in json.dumps(deepspeed_config(config, ranks), indent=2).splitlines():
        print(f"#   {line}")
    return 0
