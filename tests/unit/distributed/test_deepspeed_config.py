"""The DeepSpeed dictionary: everything that decides numerics is in it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from trainer.config.checks import check
from trainer.config.io import load_config
from trainer.config.run import Config, ConfigError
from trainer.config.training import DistributedConfig, OptimizerConfig
from trainer.distributed.deepspeed_config import deepspeed_config


def make(**distributed: object) -> Config:
    return Config(
        global_batch_size=64,
        micro_batch_size=4,
        optimizer=OptimizerConfig(max_grad_norm=0.7),
        distributed=DistributedConfig(**distributed),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_numerics_are_explicit(stage: int, precision: str) -> None:
    made = deepspeed_config(make(zero_stage=stage, precision=precision), world_size=8)
    assert made["train_batch_size"] == 64
    assert made["gradient_accumulation_steps"] == 2
    assert made["gradient_clipping"] == 0.7
    assert made["bf16"]["enabled"] == (precision == "bf16")
    expected = "bf16" if precision == "bf16" and stage == 0 else "fp32"
    assert made["data_types"] == {"grad_accum_dtype": expected}
    assert made["communication_data_type"] == expected
    assert made["zero_optimization"]["stage"] == stage
    assert made["zero_optimization"]["overlap_comm"] is False
    assert json.loads(json.dumps(made)) == made


def test_buckets_follow_the_configuration() -> None:
    zero = deepspeed_config(make(zero_stage=3, reduce_bucket_elements=123), 1)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 123
    assert zero["stage3_prefetch_bucket_size"] == 123


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_are_sent_in_the_precision_that_was_asked_for(stage: int) -> None:
    made = deepspeed_config(make(zero_stage=stage, precision="bf16", reduce_precision="bf16"), 8)
    assert made["communication_data_type"] == "bf16"
    assert made["data_types"]["grad_accum_dtype"] == ("fp32" if stage else "bf16")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ("{engine: torch, overlap_communication: true}", "overlap_communication .*engine=torch"),
        ("{zero_stage: 0, overlap_communication: true}", "overlap_communication .*zero_stage=0"),
        ("{cuda_graphs: true, overlap_communication: true}", "overlap_communication .*cuda_graphs"),
        ("{compile: true, overlap_communication: true}", "overlap_communication .*compile"),
        ("{zero_stage: 0, reduce_bucket_elements: 1000}", "reduce_bucket_elements .*zero_stage=0"),
        ("{shard_ranks: 2}", "shard_ranks .*engine=deepspeed"),
        ("{engine: fsdp, zero_stage: 3}", "zero_stage=3 .*engine=fsdp"),
        ("{engine: fsdp, overlap_communication: true}", "overlap_communication .*engine=fsdp"),
        ("{engine: fsdp, reduce_bucket_elements: 1000}", "reduce_bucket_elements .*engine=fsdp"),
        ("{engine: fsdp, precision: fp32, reduce_precision: bf16}", "reduce_precision=bf16 .*engine=fsdp"),
        ("{engine: fsdp, compile: true}", "compile was not tried .*engine=fsdp"),
        ("{engine: fsdp, cuda_graphs: true}", "cuda_graphs was not tried .*engine=fsdp"),
        ("{engine: torch, reduce_precision: bf16}", "reduce_precision=bf16 .*engine=torch"),
        ("{precision: fp32, reduce_precision: bf16}", "reduce_precision=bf16 .*precision=fp32"),
    ],
)
def test_settings_without_effect_are_refused(settings: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check(load_config(None, [f"distributed={settings}"]))


def test_ranks_are_cut_into_equal_groups() -> None:
    config = make(engine="fsdp")
    assert config.shard_size(16, 8) == 8
    assert config.shard_size(15, 8) == 15  # nodes of 8 and 7: one group
    assert make(engine="fsdp", shard_ranks=4).shard_size(16, 8) == 4
    with pytest.raises(ConfigError, match=r"shard_ranks=3 does not divide 16 ranks; .* 1, 2, 4, 8, 16"):
        make(engine="fsdp", shard_ranks=3).shard_size(16, 8)
    with pytest.raises(ConfigError, match="shard_ranks=2 does not divide 3 ranks"):
        load_config(None, ["global_batch_size=48", "distributed={engine: fsdp, ranks: 3, shard_ranks: 2}"])


def test_muon_is_refused_where_matrices_are_taken_apart_and_nowhere_else() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.name=muon .*zero_stage=3 .*to 2 or lower"):
        load_config(None, ["optimizer.name=muon", "distributed.zero_stage=3"])
    for place in ("{engine: fsdp}", "{engine: torch}", "{zero_stage: 2}"):
        assert load_config(None, ["optimizer.name=muon", f"distributed={place}"]).optimizer.name == "muon"


def test_padding_counts_as_samples() -> None:
    """64 samples on 5 ranks: 13 of the largest share in passes of 4, of which 64 of 80 are samples."""
    made = deepspeed_config(make(), world_size=5)
    assert made["train_batch_size"] == 80
    assert (made["train_micro_batch_size_per_gpu"], made["gradient_accumulation_steps"]) == (4, 4)


def test_more_ranks_than_samples_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match="65 ranks cannot share global_batch_size=64"):
        deepspeed_config(make(), world_size=65)


def test_needs_no_torch() -> None:
    code = "import sys, trainer.distributed.deepspeed_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
