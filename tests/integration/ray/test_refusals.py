"""`ray job submit` of mistakes: they end the job once, with a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--encoders", "2"], "--encoders fill first_stage.cache, which is not set"),
        (["--encoders", "-1"], "--encoders -1 must be at least 0"),
        (
            [
                *("--encoders", "1", "data.horizontal_flip=false", "phases=[{from_step: 5, image_size: 32}]"),
                "first_stage={name: kl, cache: /cache, weights: x, base_channels: 8, num_groups: 4}",
            ],
            "phases have several",
        ),
        (["--watch=--reference 'x"], "correct its quotes"),
        (["--watch=--reference x --every 2"], "--watch needs --sample"),
    ],
)
def test_mistakes_about_what_runs_beside_it_are_one_sentence(
    bucket: Any, capsys: Any, words: list[str], sentence: str
) -> None:
    """Before any cluster is asked."""
    pytest.importorskip("ray", reason='pip install "ray[default,train]"')
    from trainer.launch.ray import main

    assert main([str(bucket.config), *words]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert "Traceback" not in told


def test_a_bad_configuration_fails_once(ray_cluster: Any, tmp_path: Path) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text("stepz: 3\n", encoding="utf-8")
    job = ray_cluster.submit(str(config))
    ray_cluster.wait_for(job, "the end", lambda: ray_cluster.status(job) == "FAILED")
    assert "unknown key `stepz`; did you mean `steps`?" in ray_cluster.logs(job)
