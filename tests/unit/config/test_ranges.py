"""Every number of the configuration has a range, and every value outside it is one sentence."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator

import pytest

from data_pipeline.config import RANGE, Range
from trainer.__main__ import main
from trainer.config.io import load_config
from trainer.config.run import Config, ConfigError


def numbers(cls: type, prefix: str = "") -> Iterator[tuple[str, object, Range | None]]:
    """(key, type, declared range) of every field that holds numbers, through all sections."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, key = hints[field.name], prefix + field.name
        kinds = {hint, *typing.get_args(hint)}
        for kind in kinds:
            if dataclasses.is_dataclass(kind):
                assert isinstance(kind, type)
                yield from numbers(kind, f"{key}.")
        if kinds & {int, float}:
            yield key, hint, field.metadata.get(RANGE)


NUMBERS = list(numbers(Config))


ITEMS = {"data.sources": "shards: a.tar, ", "phases": "from_step: 1, "}
"""Lists of sections, and what an item must have."""


def override(key: str, hint: object, value: float) -> str:
    """`value` where the field has it, in all places of a tuple."""
    text = str(value).replace("nan", ".nan").replace("inf", ".inf")
    section, _, name = key.rpartition(".")
    if section in ITEMS:
        return f"{section}=[{{{ITEMS[section] * (name != 'from_step')}{name}: {text}}}]"
    if typing.get_origin(hint) is tuple:
        length = 1 if Ellipsis in typing.get_args(hint) else len(typing.get_args(hint))
        return f"{key}=[{', '.join([text] * length)}]"
    return f"{key}={text}"


def test_there_are_as_many_as_expected() -> None:
    assert len(NUMBERS) > 120
    keys = {key for key, *_ in NUMBERS}
    assert {
        "seed",
        "ema.decay",
        "data.sources.repeat",
        "conditioning.openclip_second.drop_probability",
    } <= keys


@pytest.mark.parametrize(("key", "hint", "allowed"), NUMBERS, ids=[key for key, *_ in NUMBERS])
def test_a_number_has_limits_and_is_refused_outside(key: str, hint: object, allowed: Range | None) -> None:
    assert allowed is not None, f"{key} declares no range"
    assert -math.inf < allowed.low < allowed.high < math.inf
    whole = int in {hint, *typing.get_args(hint)}
    step = 1 if whole else 1e-3 * max(1.0, abs(allowed.low))
    outside: list[float] = [allowed.low - step if allowed.low_allowed else allowed.low]
    outside.append(allowed.high + (1 if whole else allowed.high) if allowed.high_allowed else allowed.high)
    if not whole:
        outside += [math.nan, math.inf, -math.inf]
    for value in outside:
        with pytest.raises(ConfigError) as caught:
            load_config(None, [override(key, hint, value)])
        shown = value if whole else float(value)
        assert str(caught.value) == f"{key}={shown} must be {allowed}."


@pytest.mark.parametrize(
    "setting",
    [
        "conditioning.openclip.drop_probability=10",
        "conditioning.openclip.drop_probability=.nan",
        "conditioning.openclip.drop_probability=-1",
        "ema.decay=1.5",
        "unet.dropout=10",
        "optimizer.final_fraction=5",
        "optimizer.eps=-1",
        "optimizer.learning_rate=.inf",
    ],
)
def test_the_command_ends_with_one_sentence_and_exit_code_two(
    setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "configs/sd/sd2_base_256.yaml", setting]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert setting.split("=")[0] in lines[0]
    assert "must be at least 0" in lines[0] or "must be above 0" in lines[0]


def test_the_defaults_lie_inside() -> None:
    load_config(None)
