"""`ray job submit` of mistakes: they end the job once, with a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_bad_configuration_fails_once(ray_cluster: Any, tmp_path: Path) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text("stepz: 3\n", encoding="utf-8")
    job = ray_cluster.submit(str(config))
    ray_cluster.wait_for(job, "the end", lambda: ray_cluster.status(job) == "FAILED")
    assert "unknown key `stepz`; did you mean `steps`?" in ray_cluster.logs(job)
