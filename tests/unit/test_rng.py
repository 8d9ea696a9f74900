"""Philox against the published vectors, layout guarantees, and fixed-seed statistics."""

from __future__ import annotations

import pytest
import torch

from trainer import rng

# Random123 distribution (D. E. Shaw Research), examples/kat_vectors, rows "philox4x32 10".
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, expected):
    even, odd = rng.philox(
        (torch.tensor([[counter[0]], [counter[2]]]), torch.tensor([[counter[1]], [counter[3]]])), key
    )
    assert (even[0].item(), odd[0].item(), even[1].item(), odd[1].item()) == expected
