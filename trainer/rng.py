"""Counter-based random numbers: every draw is a function of (seed, sample ordinal, purpose, element)."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from trainer.kernels import philox as kernel
from trainer.kernels.language import fused

# Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", table 2).
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF

CPU_CHUNK = 1 << 17
"""Elements drawn at a time on a CPU: temporaries stay in the cache, and below malloc's mmap threshold."""


class Purpose(IntEnum):
    """What a draw is for: one 32-bit word of the counter. Any integer in a range below may be used."""

    TIMESTEP = 1
    NOISE = 2
    POSTERIOR = 3
    OFFSET_NOISE = 4
    LOW_RESOLUTION_NOISE = 5
    LOW_RESOLUTION_LEVEL = 6
    MASK = 7
    DEGRADATION = 8
    STRATUM = 9
    INITIAL = 13
    """Starting noise of a sampled picture."""
    DROP_ALL = 14
    """Whether a sample loses all of its conditions together."""
    REVIVAL = 15
    """Which encoder output of a sample a dead entry of the codebook is moved to."""
    DROP = 0x100
    """DROP + index of the condition, 256 values."""
    CONDITION = 0x200
    """CONDITION + index: anything else that one condition draws, 256 values."""
    SAMPLER = 0x10000
    """SAMPLER + step index: noise that a stochastic sampler adds, 65536 values."""
    VALIDATION = 0x20000
    """VALIDATION + index of the level: noise at which a held-out sample is measured, 65536 values."""


def step_seed(seed: int, step: int, rank: int) -> int:
    """For torch's generator, which dropout draws from: a step made again has its masks again.

    Masks differ between ranks, and with their number, as no other draw does: torch counts elements of a
    tensor, not samples.
    """
    # Two words of each, for a sequence does not say where one number ends.
    words = [word for number in (seed, step, rank) for word in (number & MASK, number >> 32)]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


def philox(counter: tuple[Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Philox4x32-10 of 128-bit counters under a 64-bit key.

    `counter` is (even, odd): int64 [2, ...], words (0, 2) and (1, 3), each in [0, 2**32). The result has
    the same layout. Words are paired so that one tensor operation serves both halves of a round.
    """
    even, odd = counter
    shape = (2, *(1 for _ in even.shape[1:]))
    row = torch.arange(2, device=even.device).view(shape)  # built on the device: no copy, no synchronisation
    # With the multiplier taken as signed, M - 2**32, the product of M and a word never overflows int64:
    # M * x = (M - 2**32) * x + 2**32 * x, so the high word is the shifted product plus x.
    multipliers = _both_orders(row, MULTIPLIERS[0] - MASK - 1, MULTIPLIERS[1] - MASK - 1)
    keys = _both_orders(row, *key)
    increments = _both_orders(row, *KEY_INCREMENTS)
    # A round exchanges its halves. Instead of moving `even` back, every round leaves it in the opposite
    # order (0, 2) -> (2, 0) -> (0, 2); `odd` must come in the order in which `even` will leave.
    odd = odd.flip(0)
    for index in range(ROUNDS):
        order = index % 2
        product = even * multipliers[order]
        round_key = (keys[1 - order] + index * increments[1 - order]) & MASK
        even = (product >> 32).add_(even).bitwise_xor_(odd).bitwise_xor_(round_key)
        odd = product.bitwise_and_(MASK)
        if index < ROUNDS - 1:
            odd = odd.flip(0)
    return even, odd


def words(seed: int, ordinals: Tensor, purpose: int, count: int) -> tuple[Tensor, Tensor]:
    """Random 32-bit words in `philox`'s layout: two int64 [2, B, ceil(count / 4)].

    Word 0 of the counter is the block of four elements, word 1 the purpose, words 2 and 3 the ordinal;
    the key is the seed. So the first elements of a larger draw equal those of a smaller one.
    """
    blocks = -(-count // 4)
    assert blocks <= MASK, "a draw holds at most 2**34 elements per sample"
    ordinals = ordinals.to(torch.int64).view(-1, 1)  # [B, 1]
    row = torch.arange(2, device=ordinals.device).view(2, 1, 1)
    block = torch.arange(blocks, device=ordinals.device)  # [blocks]
    even = block * (1 - row) + (ordinals & MASK) * row  # [2, B, blocks]
    odd = (purpose * (1 - row) + ((ordinals >> 32) & MASK) * row).expand(even.shape)
    return philox((even, odd), (seed & MASK, (seed >> 32) & MASK))


def uniform(seed: int, ordinals: Tensor, purpose: int, shape: tuple[int, ...]) -> Tensor:
    """Uniform float32 [B, *shape] in [0, 1), multiples of 2**-24, for int64 `ordinals` [B]."""
    count = math.prod(shape)
    if fused(ordinals):
        return kernel.draw(ordinals, seed, purpose, count, False).view(len(ordinals), *shape)

    def draw(part: Tensor) -> Tensor:
        even, odd = words(seed, part, purpose, count)
        return _in_element_order((even >> 8).to(torch.float32), (odd >> 8).to(torch.float32), count)

    return _chunked(draw, ordinals, count).mul_(2.0**-24).view(len(ordinals), *shape)


def normal(seed: int, ordinals: Tensor, purpose: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 [B, *shape] for int64 `ordinals` [B], by Box and Muller (1958).

    Radius sqrt(-2 ln u) with u = (word + 1) / 2**32 in (0, 1], angle 2 pi (word / 2**32 - 1/2), so
    |value| <= 6.67. Logarithm, sine and cosine are float64 polynomials made of correctly rounded
    operations only (library versions differ between devices), then rounded once to float32: the same
    bits on every device. Under torch.compile fused multiply-adds may move a float64 by 1e-15, which
    changes the float32 with a probability of about 1e-8 per value.
    """
    count = math.prod(shape)
    if fused(ordinals):
        return kernel.draw(ordinals, seed, purpose, count, True).view(len(ordinals), *shape)

    def draw(part: Tensor) -> Tensor:
        even, odd = words(seed, part, purpose, count)
        radius = torch.sqrt(-2.0 * _log((even + 1).to(torch.float64) * 2.0**-32))
        sine, cosine = _sincos_of_turn(odd.to(torch.float64) * 2.0**-32 - 0.5)
        return _in_element_order((radius * cosine).float(), (radius * sine).float(), count)

    return _chunked(draw, ordinals, count).view(len(ordinals), *shape)


def randint(seed: int, ordinals: Tensor, purpose: int, high: int) -> Tensor:
    """Integers int64 [B] in [0, high): a 63-bit word modulo high, bias below high / 2**63."""
    return _integers(seed, ordinals, purpose, 2)[:, 0] % high


def permutation(
    seed: int, ordinal: int, purpose: int, size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """A permutation of range(size), int64 [size], keyed by one ordinal (say, the step)."""
    keys = _integers(seed, torch.full((1,), ordinal, dtype=torch.int64, device=device), purpose, 2 * size)
    return torch.argsort(keys[0], stable=True)


def _integers(seed: int, ordinals: Tensor, purpose: int, count: int) -> Tensor:
    """63-bit integers, int64 [B, count / 2], each from two consecutive words."""
    even, odd = words(seed, ordinals, purpose, count)
    joined = ((even >> 1) << 32) | odd  # [2, B, blocks]
    return joined.permute(1, 2, 0).reshape(joined.shape[1], 2 * joined.shape[2])[:, : count // 2]


def _chunked(draw: Callable[[Tensor], Tensor], ordinals: Tensor, count: int) -> Tensor:
    """draw(ordinals), [B, count]; on a CPU by groups of samples, which no value depends on."""
    rows = max(1, CPU_CHUNK // max(count, 1))
    if ordinals.device.type != "cpu" or len(ordinals) <= rows or torch.compiler.is_compiling():
        return draw(ordinals)
    return torch.cat([draw(part) for part in ordinals.split(rows)])


def _in_element_order(even: Tensor, odd: Tensor, count: int) -> Tensor:
    """Two [2, B, blocks] -> [B, count], elements 4k .. 4k+3 from words 0 .. 3 of block k."""
    stacked = torch.stack([even, odd], dim=-1)  # [2, B, blocks, 2]
    return stacked.permute(1, 2, 0, 3).reshape(even.shape[1], 4 * even.shape[2])[:, :count]


def _both_orders(row: Tensor, first: int, second: int) -> tuple[Tensor, Tensor]:
    """(first, second) and (second, first) along the axis of `row`, which holds 0 and 1."""
    return row * (second - first) + first, row * (first - second) + second


def _log(u: Tensor) -> Tensor:
    """Natural logarithm of float64 in (0, 1], absolute error below 1e-12.

    u = m 2**e with m in [0.5, 1); with c = sqrt(1/2) and f = (m - c) / (m + c), ln m = ln c + 2 artanh f.
    """
    bits = u.view(torch.int64)  # IEEE 754 binary64: 52 bits of mantissa, exponent biased by 1023
    exponent = (bits >> 52) - 1022
    mantissa = ((bits & (2**52 - 1)) | (1022 << 52)).view(torch.float64)
    centre = math.sqrt(0.5)
    f = (mantissa - centre) / (mantissa + centre)  # |f| <= 0.172
    z = f * f
    series = _horner(z, [1.0 / (2 * k + 1) for k in range(7)])
    # Clamped: at u = 1 the three terms cancel up to rounding, and the square root needs -ln u >= 0.
    return (2.0 * f * series + (exponent.to(u.dtype) - 0.5) * math.log(2.0)).clamp(max=0.0)


def _sincos_of_turn(turn: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of 2 pi `turn` for float64 in [-1/2, 1/2], absolute error below 1e-10.

    Taylor series at a quarter of the angle (at most pi / 4), then twice the double-angle formulas.
    """
    angle = turn * (math.pi / 2)
    z = angle * angle
    sine = angle * _horner(z, [(-1.0) ** k / math.factorial(2 * k + 1) for k in range(6)])
    cosine = _horner(z, [(-1.0) ** k / math.factorial(2 * k) for k in range(7)])
    for _ in range(2):
        sine, cosine = 2.0 * sine * cosine, 1.0 - 2.0 * (sine * sine)
    return sine, cosine


def _horner(z: Tensor, coefficients: list[float]) -> Tensor:
    """Sum of coefficients[k] z**k: multiply, then add, never fused, so that every device rounds alike."""
    value = z * coefficients[-1] + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        value = value * z + coefficient
    return value
