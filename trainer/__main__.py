"""The `ldm` command: one verb per line, no logic."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import select
import signal
import sys
from collections.abc import Sequence
from typing import Any

from data_pipeline.errors import Failure
from trainer.console import configure_logging
from trainer.exit_codes import ExitCode, classify

VERBS = {
    "train": "train a first stage or a diffusion model; the same command again resumes",
    "encode": "fill the cache of the first stage's moments ahead of training",
    "sample": "draw pictures from a run or from exported weights",
    "demo": "train both stages on this machine against a real S3 server and look at the pictures",
    "data": "synthesize, inspect, index and trace shards",
    "config": "print the resolved configuration and the DeepSpeed dictionary",
    "params": "count parameters per module, without building the model",
    "plan": "say what a run needs on so many GPUs: memory, time, data, checkpoints, days",
    "doctor": "check machines, storage, shards and gradients before training",
    "status": "say where a run stands: step, speed, loss, time left, checkpoint, faults, ranks",
    "stop": "ask a running job to save and leave",
    "profile": "take a torch profile of a few steps of a running job",
    "checkpoint": "list and verify the checkpoints of a run",
    "export": "write a run's weights: native, CompVis or diffusers layout",
    "import": "convert CompVis and diffusers weights",
    "ema": "reconstruct an average of any length from snapshots",
    "slurm": "submit runs to SLURM, and see where they stand",
    "report": "write an HTML page about a run: curves, pictures, faults",
    "evaluate": "measure what a model can do, against data",
}

# A file where a folder should be or the other way round: what a person has named, where the command is new.
_MISPLACED = frozenset({errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG})


class _CommandParser(argparse.ArgumentParser):
    """Shows texts as they are written, its sub-commands' too: an example broken over lines would not run."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of one verb; what can be explained is one sentence on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in VERBS:
        return _overview(argv)
    configure_logging()
    verb = importlib.import_module(f"trainer.cli.{argv[0]}")
    arguments = parse(verb_parser(argv[0]), argv[1:])
    arguments.command_line = argv  # for verbs that start ranks, each with the same words
    try:
        code = int(verb.run(arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 128 + signal.SIGPIPE  # as of a program that the signal ends
    except (Failure, OSError, KeyboardInterrupt) as error:
        from trainer.reliability.job import is_restart  # not at the top: most commands end well, and sooner

        code = classify(error, restarted=is_restart())
        if isinstance(error, Failure):
            print(f"ldm: {error}", file=sys.stderr)
        elif isinstance(error, OSError):
            misplaced = error.errno in _MISPLACED and not is_restart()
            if misplaced:
                code = ExitCode.USER_ERROR
            elif code is not ExitCode.USER_ERROR:
                raise
            remedy = "choose another" if misplaced else "free space or choose another"
            print(f"ldm: {error.strerror}: {error.filename or 'while writing'}; {remedy}.", file=sys.stderr)
        return code


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that was closed (`| head`), to which nothing is written then."""
    looked = select.poll()
    looked.register(sys.stdout.fileno(), 0)
    closed = any(event & select.POLLERR for _, event in looked.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def verb_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one verb."""
    verb = importlib.import_module(f"trainer.cli.{name}")
    parser = _CommandParser(prog=f"ldm {name}", description=verb.__doc__, epilog=verb.EXAMPLE)
    verb.add_arguments(parser)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Like `parse_args`, and settings (a.b=c) may follow options, where argparse would refuse them."""
    arguments, rest = parser.parse_known_args(argv)
    if rest and hasattr(arguments, "overrides") and not any(word.startswith("-") for word in rest):
        arguments.overrides = [*arguments.overrides, *rest]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def _overview(argv: list[str]) -> int:
    parser = _CommandParser(
        prog="ldm",
        description="Train latent diffusion models. Verbs:\n"
        + "\n".join(f"  {verb:10} {summary}" for verb, summary in VERBS.items()),
        epilog="`ldm VERB --help` explains a verb and shows an example.",
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="one of the above")
    parser.parse_args(argv or ["--help"])
    return 2


if __name__ == "__main__":
    sys.exit(main())
