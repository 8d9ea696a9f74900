"""Training or validation: on which side of `data.validation.share` a sample is.

A sample's key alone decides, by a hash in [0, 1) that nothing else enters: no seed, no rank, no shard, no
filter.

    key          000030007   000030008   000030009
    hash         0.83        0.004       0.27
    share 0.01   training    held out    training        0.004 < 0.01
    share 0.5    training    held out    held out        a larger share has all of a smaller one's

So a sample stays on its side when shards are renamed, written anew, mixed with others or read in any order,
and copies of it under the same key are all on one side. Copies under other keys are not known as such: a set
with duplicates needs them removed first, or validation shards of its own.

>>> share = 0.25
>>> keys = np.asarray([f"{i:09d}".encode() for i in range(10_000)])
>>> held = held_out(keys, share)
>>> abs(held.mean() - share) < 0.02
np.True_
>>> bool((held_out(keys, 0.1) & ~held).any())
False
>>> is_held_out(keys[0].decode(), share) == held[0]
np.True_
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

Part = Literal["training", "validation"]
"""The sides; what is rejected because it is on the other one is counted as `REASONS` has it."""
REASONS: dict[Part, str] = {"training": "held_out", "validation": "not_held_out"}

_SALT = 0x48454C44
"""Makes this hash another one than those that files and caches are named by."""


def places(keys: Iterable[bytes]) -> NDArray[np.uint64]:
    """[n] XXH3-64 of each key: what is compared with the share, and by which the measured are chosen."""
    return np.asarray([xxhash.xxh3_64_intdigest(bytes(key), seed=_SALT) for key in keys], np.uint64)


def held_out(keys: NDArray[np.bytes_], share: float) -> NDArray[np.bool_]:
    """[n] whether each of these keys (UTF-8) is held out."""
    if share <= 0.0:
        return np.zeros(len(keys), np.bool_)
    return places(keys) < np.uint64(int(share * 2.0**64))


def is_held_out(key: str, share: float) -> bool:
    """The same of one sample that is in no index."""
    return bool(held_out(np.asarray([key.encode("utf-8", "surrogatepass")], np.bytes_), share)[0])
