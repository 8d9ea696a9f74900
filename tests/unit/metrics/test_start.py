"""Where the time until the first step goes."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data_pipeline.processes import process_age_s, without_packages
from trainer.metrics.timer import StartTimer


def test_the_parts_are_told_once_and_add_up(caplog: pytest.LogCaptureFixture) -> None:
    timer = StartTimer()
    timer.mark("imports")
    time.sleep(0.3)
    timer.mark("networks")
    with caplog.at_level(logging.INFO):
        timer.first_step(torch.device("cpu"))
        timer.first_step(torch.device("cpu"))
    (message,) = [record.getMessage() for record in caplog.records]
    whole, *parts = [float(number) for number in re.findall(r"([0-9.]+) s", message)]
    assert re.findall(r"([a-z ]+) [0-9.]+ s[,$]", message.partition(": ")[2] + ",") == [
        "imports",
        " networks",
        " first step",
    ]
    assert parts[1] == pytest.approx(0.3, abs=0.25)
    assert sum(parts) == pytest.approx(whole, abs=0.2)


def test_whoever_started_the_process_gets_the_parts_in_a_file(tmp_path: Path) -> None:
    timer = StartTimer(str(tmp_path / "start.json"))
    timer.mark("imports")
    before = time.time()
    timer.first_step(torch.device("cpu"))
    told = json.loads((tmp_path / "start.json").read_text())
    assert before <= told["time"] <= time.time()
    assert list(told["parts"]) == ["imports", "first step"]
    assert sum(told["parts"].values()) == pytest.approx(told["age"])
    StartTimer(str(tmp_path / "nowhere" / "start.json")).first_step(
        torch.device("cpu")
    )  # no reason to end a run


def test_age_counts_from_the_start_of_the_process() -> None:
    code = (
        "import time; time.sleep(0.5)\n"
        "from data_pipeline.processes import process_age_s\nprint(process_age_s())"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.45 < float(done.stdout) < time.monotonic() - began + 0.05
    assert process_age_s() > 0


def test_hidden_packages_are_absent_inside_alone() -> None:
    code = (
        "import sys\nfrom data_pipeline.processes import without_packages\n"
        "import json\n"
        "with without_packages('wave', 'json'):\n"
        "    import json\n"
        "    try:\n        import wave\n    except ImportError:\n        print('hidden')\n"
        "import wave\nprint(wave.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["hidden", "wave"]
    with without_packages("sys"):
        assert sys.modules["sys"] is sys
