"""The smallest values of numbers that have no other rule."""

from __future__ import annotations

import functools

from trainer.config.run import Config, ConfigError

SMALLEST: dict[str, float] = {
    "steps": 1,
    "global_batch_size": 1,
    "micro_batch_size": 1,
    "checkpoint.every": 0,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_every": 0,
    "checkpoint.keep_best": 0,
    "data.image_size": 1,
    "data.lanes": 0,
    "data.shuffle_window": 0,
    "data.workers": 0,
    "data.prefetch": 1,
    "data.buffer_bytes": 1,
    "data.cache_bytes": 0,
    "data.max_retries": 0,
    "data.patience_s": 0,
    "distributed.ranks": 0,
    "distributed.max_restarts": 0,
    "distributed.timeout_s": 1,
    "distributed.watchdog_s": 0,
    "ema.decay": 0,
    "ema.snapshot_every": 0,
    "healing.max_rewinds": 0,
    "healing.spike_window": 1,
    "healing.spike_zscore": 0,
    "logging.every": 1,
    "optimizer.max_grad_norm": 0,
    "optimizer.warmup_steps": 0,
    "optimizer.weight_decay": 0,
    "sampling.every": 0,
    "sampling.num_previews": 1,
}


def check_bounds(config: Config) -> None:
    """Refuse what no run could mean.

    Raises:
        ConfigError: names the key, the value and the smallest value allowed.
    """
    for name, smallest in SMALLEST.items():
        value = functools.reduce(getattr, name.split("."), config)
        if not value >= smallest:  # type: ignore[operator]  # NaN is refused as well
            raise ConfigError(f"{name}={value} must be at least {smallest:g}.")
