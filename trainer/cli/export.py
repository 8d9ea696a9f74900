"""Write a run's weights, averaged ones unless told otherwise, as a file or folder that others read.

native: one safetensors file with the configuration and the latent statistics, streamed: what
first_stage.weights, init_from and `ldm sample` take. compvis: one file in the original layout.
diffusers: a pipeline's folder. The last two hold the UNet and the frozen first stage.
"""

from __future__ import annotations

import argparse
import json

from trainer.checkpoint.export import export, open_weights
from trainer.config.io import config_from_dict
from trainer.first_stage.build import first_stage_tensors, load_first_stage
from trainer.interop.export import export_weights

EXAMPLE = "example: ldm export s3://bucket/first_stage_run s3://bucket/first_stage.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From where, to where, which weights."""
    parser.add_argument("source", metavar="RUN", help="run folder or checkpoint folder")
    parser.add_argument("destination", metavar="DESTINATION", help="path or URL")
    parser.add_argument("--layout", choices=("native", "compvis", "diffusers"), default="native")
    parser.add_argument(
        "--weights", help="average to write, or `weights` for the trained ones (default: EMA)"
    )
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="default: the newest")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="native only")


def run(args: argparse.Namespace) -> int:
    """Export and say what was written."""
    if args.layout != "native":
        return _export_whole(args)
    made = export(args.source, args.destination, profile=args.weights, step=args.checkpoint, dtype=args.dtype)
    print(
        f"{made.destination}: {made.num_parameters / 1e6:.2f} M parameters, {made.num_bytes / 1e6:.1f} MB, "
        f"{made.profile} of step {made.step}"
    )
    return 0


def _export_whole(args: argparse.Namespace) -> int:
    tensors, metadata = open_weights(args.source, profile=args.weights, step=args.checkpoint)
    config = config_from_dict(json.loads(metadata["config"]))
    if config.stage == "autoencoder":
        tensors = {f"first_stage.{name}": value for name, value in tensors.items()}
    else:
        tensors = {n: v for n, v in tensors.items() if n.startswith(("unet.", "conditions."))}
        if config.first_stage.name != "identity":
            stage, _ = first_stage_tensors(load_first_stage(config.first_stage))
            tensors |= {f"first_stage.{name}": value for name, value in stage.items()}
    print(export_weights(tensors, args.destination, config, args.layout).describe())
    return 0
