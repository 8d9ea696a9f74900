"""How long an answer is waited for."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from trainer.__main__ import parse, verb_parser
from trainer.operation.asking import Patience


def test_no_seconds_are_one_look(tmp_path: Path) -> None:
    began = time.monotonic()
    assert not Patience(0.0).until(lambda: False, str(tmp_path), print, "waiting")
    assert time.monotonic() - began < 30.0


@pytest.mark.parametrize("verb", ["stop", "profile"])
def test_no_number_is_for_ever_and_none_is_not_at_all(verb: str) -> None:
    waits = [parse(verb_parser(verb), ["run", *words]).wait for words in ([], ["--wait"], ["--wait", "0"])]
    assert waits == [None, math.inf, 0.0]
