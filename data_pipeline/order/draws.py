"""Counter-based draws of the pipeline: functions of (seed, ordinal, purpose), never of a process."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1


class Draw(IntEnum):
    """What a number is drawn for; values are part of the reproducible stream, so never reuse one."""

    SHARD_ORDER = 1
    WINDOW_ORDER = 2
    CROP_X = 3
    CROP_Y = 4
    FLIP = 5
    CAPTION = 6
    BUCKET = 7
    VARIANT = 8
    CAPTION_SOURCE = 9
    SHORTEN = 10
    CAPTION_END = 11
    SOURCE_ORDER = 12
    MIXTURE = 13


def mix(x: int) -> int:
    """Finaliser of SplitMix64 (Steele et al. 2014): a bijection of 64-bit integers."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def fold(*values: int) -> int:
    """64-bit key of a tuple of integers."""
    key = 0
    for value in values:
        key = mix(key ^ mix(value & _MASK))
    return key


def mix_array(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`mix` on every element."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def fold_array(*values: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """`fold` of numbers and [K] arrays of numbers, element by element."""
    key = np.zeros(1, np.uint64)
    for value in values:
        words = np.asarray([value & _MASK], np.uint64) if isinstance(value, int) else value.astype(np.uint64)
        key = mix_array(key ^ mix_array(words))
    return key


def uniform(seed: int, ordinal: int, draw: Draw) -> float:
    """Number in [0, 1) for one sample and purpose."""
    return (fold(seed, ordinal, int(draw)) >> 11) * 2.0**-53


def below(seed: int, ordinal: int, draw: Draw, high: int) -> int:
    """Integer in [0, high) for one sample and purpose."""
    return int(uniform(seed, ordinal, draw) * high)


def permutation(key: int, n: int) -> NDArray[np.int64]:
    """Permutation of range(n) that is a function of `key` alone, on every platform and version."""
    return permutations(np.asarray([key], np.uint64), n)[0]


def permutations(keys: NDArray[np.uint64], n: int) -> NDArray[np.int64]:
    """[K, n] `permutation` of each of K keys."""
    hashes = mix_array(np.arange(n, dtype=np.uint64) ^ mix_array(keys)[:, None])
    return np.argsort(hashes, axis=1, kind="stable").astype(np.int64)
