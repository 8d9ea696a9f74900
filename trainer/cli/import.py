"""Convert weights of other programs: CompVis/Stability files (.safetensors, .ckpt) and diffusers folders.

Writes one file per network: unet.safetensors for init_from, first_stage.safetensors for first_stage.weights,
text_encoder.safetensors for conditioning.openclip.pretrained. Missing or unexpected tensors are listed, and
then nothing is written.
"""

from __future__ import annotations

import argparse

from trainer.config.io import load_config
from trainer.config.run import ConfigError
from trainer.interop.convert import import_weights

EXAMPLE = "example: ldm import v2-1_512-ema-pruned.safetensors sd21 --config configs/sd/sd2_base_512.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From where, to where, of which structure."""
    parser.add_argument("source", metavar="SOURCE", help="file in the original layout, or a diffusers folder")
    parser.add_argument("destination", metavar="FOLDER", help="path or URL of the folder to write")
    parser.add_argument("--config", help="structure of the networks (default: the folder's config.json)")


def run(args: argparse.Namespace) -> int:
    """Convert and say what became of every tensor."""
    if not args.destination.strip():
        raise ConfigError("FOLDER is empty (a variable that is not set?); name the folder to write.")
    config = None if args.config is None else load_config(args.config)
    print(import_weights(args.source, args.destination, config).describe())
    return 0
