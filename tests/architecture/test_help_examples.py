"""Every example that a --help shows is accepted by the parser that shows it, and its configuration loads."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.__main__ import VERBS, parse, verb_parser
from trainer.config.io import load_config

ROOT = Path(__file__).parents[2]


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and those of its sub-commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


def examples(verb: str) -> list[str]:
    """The command lines in the help of a verb and of its sub-commands."""
    found = []
    for parser in parsers(verb_parser(verb)):
        found += re.findall(r"example: (ldm .+)", parser.format_help())
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_examples_are_parsed(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # in which an example is still one line, to be copied
    monkeypatch.chdir(ROOT)
    commands = examples(verb)
    assert commands
    for command in commands:
        name, verb_shown, *arguments = shlex.split(command)
        assert (name, verb_shown) == ("ldm", verb)
        parsed = parse(verb_parser(verb), arguments)
        config = getattr(parsed, "config", None)
        if isinstance(config, str) and (ROOT / config).exists():
            settings = [word for word in getattr(parsed, "overrides", []) if word != "a.b=c"]
            loaded = load_config(config, settings)
            assert verb not in ("data", "encode") or loaded.data.shards, f"{command} reads no shards"


def test_every_sub_command_of_data_shows_one() -> None:
    assert len(examples("data")) >= 5


def test_settings_may_follow_options_but_options_must_be_known(capsys: pytest.CaptureFixture[str]) -> None:
    parser = verb_parser("params")
    parsed = parse(parser, ["c.yaml", "a.b=1", "--json", "steps=2"])
    assert (parsed.config, parsed.overrides, parsed.json) == ("c.yaml", ["a.b=1", "steps=2"], True)
    with pytest.raises(SystemExit) as ended:
        parse(parser, ["c.yaml", "--jsno", "steps=2"])
    assert ended.value.code == 2
    assert "--jsno" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(verb_parser("checkpoint"), ["list", "s3://bucket/run", "surplus"])


def test_an_example_of_sampling_on_ray_is_parsed() -> None:
    pytest.importorskip("ray")
    from trainer.launch import ray_sample

    (command,) = re.findall(r"python -m trainer\.launch\.ray_sample (.+)$", ray_sample._parser().epilog)
    parsed = ray_sample._parser().parse_args(shlex.split(command))
    assert (parsed.workers, parsed.source) == (64, "s3://bucket/run")
    assert ray_sample._check(parsed) == "s3://bucket/sets/coco"
    drawn = parse(verb_parser("sample"), [parsed.source, *parsed.options])
    assert (drawn.count, drawn.prompts_from) == (30000, "s3://bucket/prompts.txt")


def test_ray_example_is_parsed() -> None:
    pytest.importorskip("ray")
    from trainer.launch import ray

    (command,) = re.findall(r"python -m trainer\.launch\.ray (.+)$", ray._parser().epilog)
    parsed = ray._parser().parse_intermixed_args(shlex.split(command))
    assert (ROOT / parsed.config).exists()
    assert parsed.workers == "64:256"
    load_config(str(ROOT / parsed.config), parsed.overrides)
