"""All of `trainer.rng`'s draws about one purpose in one kernel, with the same bits as its tensor form.

One thread makes the four words of one counter block (see `trainer.rng.words`), and what is made of them.
Multiply and add stay two operations here, too (`enable_fp_fusion=False`); square root and division are
correctly rounded: the float64 arithmetic of `normal` gives what it gives on a CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.kernels.language import cdiv, register, tl, triton

BLOCKS = 256
"""Counter blocks of one program."""
SQRT_HALF = tl.constexpr(math.sqrt(0.5)) if tl is not None else None
LN_2 = tl.constexpr(math.log(2.0)) if tl is not None else None
QUARTER_TURN = tl.constexpr(math.pi / 2) if tl is not None else None


@triton.jit
def _words(block, purpose, ordinal, key_low, key_high):
    """Philox4x32-10 of the counter (block, purpose, ordinal's low and high word): int64 words below 2**32."""
    mask = 0xFFFFFFFF
    c0, c1 = block.to(tl.uint64), (block * 0 + purpose).to(tl.uint64)
    c2, c3 = (ordinal & mask).to(tl.uint64) + c0 * 0, ((ordinal >> 32) & mask).to(tl.uint64) + c0 * 0
    k0, k1 = key_low.to(tl.uint64), key_high.to(tl.uint64)
    for _ in tl.static_range(10):
        first = c0 * 0xD2511F53
        second = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & mask, (first >> 32) ^ c3 ^ k1, first & mask
        k0 = (k0 + 0x9E3779B9) & mask
        k1 = (k1 + 0xBB67AE85) & mask
    return c0.to(tl.int64), c1.to(tl.int64), c2.to(tl.int64), c3.to(tl.int64)


@triton.jit
def _log(u):
    """`trainer.rng._log`."""
    bits = u.to(tl.int64, bitcast=True)
    exponent = (bits >> 52) - 1022
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    f = (mantissa - SQRT_HALF) / (mantissa + SQRT_HALF)
    z = f * f
    series = z * (1.0 / 13) + 1.0 / 11
    series = series * z + 1.0 / 9
    series = series * z + 1.0 / 7
    series = series * z + 1.0 / 5
    series = series * z + 1.0 / 3
    series = series * z + 1.0
    return tl.minimum(2.0 * f * series + (exponent.to(tl.float64) - 0.5) * LN_2, 0.0)


@triton.jit
def _pair(radius_word, angle_word):
    """Box and Muller: two standard normals, float32."""
    u = (radius_word + 1).to(tl.float64) * 2.3283064365386962890625e-10
    radius = tl.sqrt(-2.0 * _log(u))
    angle = (angle_word.to(tl.float64) * 2.3283064365386962890625e-10 - 0.5) * QUARTER_TURN
    z = angle * angle
    sine = z * (-1.0 / 39916800) + 1.0 / 362880
    sine = sine * z + -1.0 / 5040
    sine = sine * z + 1.0 / 120
    sine = sine * z + -1.0 / 6
    sine = sine * z + 1.0
    sine = angle * sine
    cosine = z * (1.0 / 479001600) + -1.0 / 3628800
    cosine = cosine * z + 1.0 / 40320
    cosine = cosine * z + -1.0 / 720
    cosine = cosine * z + 1.0 / 24
    cosine = cosine * z + -1.0 / 2
    cosine = cosine * z + 1.0
    for _ in tl.static_range(2):
        sine, cosine = 2.0 * sine * cosine, 1.0 - 2.0 * (sine * sine)
    return (radius * cosine).to(tl.float32), (radius * sine).to(tl.float32)


@triton.jit
def _fraction(word):
    """The upper 24 bits as a float32 in [0, 1)."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit(do_not_specialize=["purpose", "key_low", "key_high"])
def _draw(
    ordinals, result, count, blocks, purpose, key_low, key_high, NORMAL: tl.constexpr, BLOCKS: tl.constexpr
):
    b = tl.program_id(0)
    block = tl.program_id(1).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    ordinal = tl.load(ordinals + b)
    w0, w1, w2, w3 = _words(block, purpose, ordinal, key_low.to(tl.int64), key_high.to(tl.int64))
    result += b.to(tl.int64) * count
    at = block * 4
    if NORMAL:
        v0, v1 = _pair(w0, w1)
        v2, v3 = _pair(w2, w3)
    else:
        v0, v1 = _fraction(w0), _fraction(w1)
        v2, v3 = _fraction(w2), _fraction(w3)
    inside = block < blocks
    tl.store(result + at, v0, mask=inside & (at < count))
    tl.store(result + at + 1, v1, mask=inside & (at + 1 < count))
    tl.store(result + at + 2, v2, mask=inside & (at + 2 < count))
    tl.store(result + at + 3, v3, mask=inside & (at + 3 < count))


def _launch(ordinals: Tensor, seed: int, purpose: int, count: int, normal: bool) -> Tensor:
    result = _result(ordinals, seed, purpose, count, normal)
    blocks = cdiv(count, 4)
    _draw[(len(ordinals), cdiv(blocks, BLOCKS))](
        ordinals.contiguous(), result, count, blocks, purpose, seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF,
        NORMAL=normal, BLOCKS=BLOCKS, enable_fp_fusion=False,
    )  # fmt: skip
    return result


def _result(ordinals: Tensor, seed: int, purpose: int, count: int, normal: bool) -> Tensor:
    return torch.empty((len(ordinals), count), dtype=torch.float32, device=ordinals.device)


draw = register(
    "draw(Tensor ordinals, int seed, int purpose, int count, bool normal) -> Tensor", _launch, _result
)
"""int64 ordinals [B] -> float32 [B, count], standard normal or uniform in [0, 1)."""
