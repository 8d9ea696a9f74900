"""What ranks of a Ray run see of a node with several GPUs. Ray counts logical ones; no device is touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[3]
DRIVER = """
import json, os, sys
from pathlib import Path
import ray, ray.train
from ray.train.torch import TorchTrainer
from trainer.launch.ray import _RanksOfTheirOwn

def look(settings):
    context = ray.train.get_context()
    facts = {
        "visible": os.environ["CUDA_VISIBLE_DEVICES"],
        "local_rank": context.get_local_rank(),
        "local_world_size": context.get_local_world_size(),
    }
    Path(settings["folder"], f"{context.get_world_rank()}.json").write_text(json.dumps(facts))

gpus, folder = int(sys.argv[1]), sys.argv[2]
ray.init(num_cpus=gpus, num_gpus=gpus, include_dashboard=False, log_to_driver=False)
scaling = ray.train.ScalingConfig(num_workers=gpus, use_gpu=True, resources_per_worker={"CPU": 1, "GPU": 1})
run = ray.train.RunConfig(storage_path=folder, name="look")
TorchTrainer(
    look, train_loop_config={"folder": folder}, torch_config=_RanksOfTheirOwn(), scaling_config=scaling,
    run_config=run,
).fit()
"""


@pytest.mark.parametrize("gpus", [2, 8])
def test_all_gpus_of_the_node_are_visible_to_each_rank(tmp_path: Path, gpus: int) -> None:
    pytest.importorskip("ray")
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, str(script), str(gpus), str(tmp_path)],
        env={**environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(gpus)]
    assert sorted(one["local_rank"] for one in told) == list(range(gpus))
    for one in told:
        assert sorted(one["visible"].split(",")) == [str(number) for number in range(gpus)]
        assert one["local_world_size"] == gpus


def environment() -> dict[str, str]:
    """Ours, but no cluster or real device is to be found, and no token left in the home folder."""
    left_out = ("RAY_ADDRESS", "CUDA_VISIBLE_DEVICES")
    return {k: v for k, v in os.environ.items() if k not in left_out} | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }
