"""Philox against the published vectors, layout guarantees, device and world-size freedom, statistics.

The statistical tests use fixed seeds, so they give the same answer every time. Their thresholds are
5.5 standard deviations: for a perfect generator and a new seed one check fails with probability 4e-8.
"""

from __future__ import annotations

import math
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import rng
from trainer.rng import Purpose
from trainer.train import take_step

LIMIT = 5.5

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

word = st.integers(0, 2**32 - 1)


def words_of(counter, key):
    even, odd = rng.philox(
        (torch.tensor([[counter[0]], [counter[2]]]), torch.tensor([[counter[1]], [counter[3]]])), key
    )
    return even[0].item(), odd[0].item(), even[1].item(), odd[1].item()


def philox_in_python(counter, key):
    """The same function written with Python's unbounded integers, word by word."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, expected):
    assert words_of(counter, key) == expected
    assert philox_in_python(counter, key) == expected


@settings(max_examples=60, deadline=None)
@given(st.tuples(word, word, word, word), st.tuples(word, word))
def test_philox_equals_unbounded_integer_arithmetic(counter, key):
    assert words_of(counter, key) == philox_in_python(counter, key)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**64 - 1),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(1, 11),
)
def test_words_sit_where_the_docstring_says(seed, ordinal, purpose, count):
    """Element 4 k + j is word j of Philox(counter = (k, purpose, ordinal), key = seed)."""
    flat = rng.uniform(seed, torch.tensor([ordinal]), purpose, (count,))[0]
    for i in range(count):
        expected = philox_in_python(
            (i // 4, purpose, ordinal % 2**32, (ordinal >> 32) % 2**32),
            (seed % 2**32, seed >> 32),
        )[i % 4]
        assert flat[i].item() == (expected >> 8) / 2**24


@pytest.mark.parametrize("draw", [rng.uniform, rng.normal])
def test_larger_draws_extend_smaller_ones(draw):
    ordinals = torch.arange(3)
    whole = draw(7, ordinals, Purpose.NOISE, (23,))
    for count in range(1, 23):
        assert torch.equal(draw(7, ordinals, Purpose.NOISE, (count,)), whole[:, :count])
    assert draw(7, ordinals, Purpose.NOISE, ()).shape == (3,)
    assert draw(7, ordinals[:0], Purpose.NOISE, (4, 2)).shape == (0, 4, 2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_draws_do_not_depend_on_world_size_or_micro_batch(world_size, micro_batch):
    """Whoever draws for a sample, and beside whichever others, draws the same bits."""
    ordinals = torch.arange(24) * 1_000_003 + 2**33
    shape = (4, 5, 5)
    expected = {
        "normal": rng.normal(3, ordinals, Purpose.NOISE, shape),
        "uniform": rng.uniform(3, ordinals, Purpose.TIMESTEP, ()),
        "randint": rng.randint(3, ordinals, Purpose.MASK, 1000),
    }
    for rank in range(world_size):
        own = torch.arange(24)[rank::world_size]
        for rows in own.split(micro_batch):
            part = ordinals[rows]
            assert torch.equal(rng.normal(3, part, Purpose.NOISE, shape), expected["normal"][rows])
            assert torch.equal(rng.uniform(3, part, Purpose.TIMESTEP, ()), expected["uniform"][rows])
            assert torch.equal(rng.randint(3, part, Purpose.MASK, 1000), expected["randint"][rows])


@pytest.mark.parametrize("chunk", [1, 100, 250])
def test_chunks_do_not_change_a_bit(chunk, monkeypatch):
    ordinals = torch.arange(7)
    expected = rng.normal(1, ordinals, Purpose.NOISE, (50,)), rng.uniform(1, ordinals, 1, (50,))
    monkeypatch.setattr(rng, "CPU_CHUNK", chunk)
    assert torch.equal(rng.normal(1, ordinals, Purpose.NOISE, (50,)), expected[0])
    assert torch.equal(rng.uniform(1, ordinals, 1, (50,)), expected[1])


def test_every_part_of_the_key_matters():
    base = rng.normal(1, torch.tensor([5]), Purpose.NOISE, (8,))
    others = [
        rng.normal(2, torch.tensor([5]), Purpose.NOISE, (8,)),
        rng.normal(1 + 2**32, torch.tensor([5]), Purpose.NOISE, (8,)),
        rng.normal(1, torch.tensor([6]), Purpose.NOISE, (8,)),
        rng.normal(1, torch.tensor([5 + 2**32]), Purpose.NOISE, (8,)),
        rng.normal(1, torch.tensor([5]), Purpose.POSTERIOR, (8,)),
    ]
    for other in others:
        assert not torch.isclose(base, other).any()


def test_purposes_leave_their_promised_room():
    bases = sorted(Purpose)
    assert len({int(p) for p in Purpose}) == len(Purpose.__members__)  # no accidental aliases
    room = dict(zip(bases, [*bases[1:], 2**32], strict=True))
    assert room[Purpose.DROP] - Purpose.DROP >= 256
    assert room[Purpose.CONDITION] - Purpose.CONDITION >= 256
    assert room[Purpose.SAMPLER] - Purpose.SAMPLER >= 65536


def test_polynomials_against_the_library():
    u = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    edge = torch.tensor([2.0**-32, 0.5, 1 - 2.0**-32, 1.0], dtype=torch.float64)
    u = torch.cat([u.clamp(min=2.0**-32), edge])
    assert (rng._log(u) - u.log()).abs().max() < 1e-12
    turn = torch.linspace(-0.5, 0.5, 100_001, dtype=torch.float64)
    sine, cosine = rng._sincos_of_turn(turn)
    assert (sine - torch.sin(2 * math.pi * turn)).abs().max() < 1e-10
    assert (cosine - torch.cos(2 * math.pi * turn)).abs().max() < 1e-10


def test_normal_is_box_muller_of_the_words():
    ordinals = torch.arange(50)
    even, odd = rng.words(9, ordinals, Purpose.NOISE, 64)
    radius = torch.sqrt(-2 * torch.log((even + 1).double() / 2**32))
    angle = 2 * math.pi * (odd.double() / 2**32 - 0.5)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)  # [2, B, 16, 2]
    expected = pairs.permute(1, 2, 0, 3).reshape(50, 64)
    actual = rng.normal(9, ordinals, Purpose.NOISE, (64,))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected.float(), rtol=1e-6, atol=1e-8)


def test_extreme_words_give_finite_normals(monkeypatch):
    extremes = torch.tensor([0, 1, 2**31, 2**32 - 2, 2**32 - 1]).view(1, 1, -1).expand(2, 1, 5)
    monkeypatch.setattr(rng, "words", lambda *_: (extremes, extremes.flip(2)))
    values = rng.normal(0, torch.zeros(1, dtype=torch.int64), 0, (20,))
    assert values.isfinite().all()
    assert values.abs().max() <= 6.67


# Statistics -----------------------------------------------------------------------------------------


def chi_square_z(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Standard normal score of a chi-square statistic (Wilson and Hilferty 1931)."""
    degrees = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    width = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - (1 - width)) / math.sqrt(width)


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 17])
def test_uniform_is_uniform(seed):
    values = rng.uniform(seed, torch.arange(2048), Purpose.TIMESTEP, (64,)).flatten()
    assert values.min() >= 0
    assert values.max() < 1
    counts = torch.histc(values, bins=256, min=0, max=1)
    assert abs(chi_square_z(counts, torch.full((256,), len(values) / 256))) < LIMIT
    # The first element of each ordinal, which is all that a timestep uses.
    first = rng.uniform(seed, torch.arange(2**16), Purpose.TIMESTEP, ())
    counts = torch.histc(first, bins=64, min=0, max=1)
    assert abs(chi_square_z(counts, torch.full((64,), 2**10))) < LIMIT


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 17])
def test_normal_is_normal(seed):
    values = rng.normal(seed, torch.arange(256), Purpose.NOISE, (4, 16, 16)).flatten().double()
    n = len(values)
    moments = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}  # power -> (mean, variance of the power)
    for power, (mean, variance) in moments.items():
        z = (values.pow(power).mean().item() - mean) / math.sqrt(variance / n)
        assert abs(z) < LIMIT, power
    edges = torch.linspace(-4, 4, 81, dtype=torch.float64)
    cdf = torch.special.ndtr(edges)
    probability = torch.cat([cdf[:1], cdf.diff(), 1 - cdf[-1:]])
    counts = torch.bincount(torch.bucketize(values, edges), minlength=82).double()
    assert abs(chi_square_z(counts, probability * n)) < LIMIT


def test_streams_are_uncorrelated():
    """Neighbouring seeds, ordinals, purposes and elements, which differ in one bit of the counter."""
    ordinals = torch.arange(4096)

    def stream(seed=1, shift=0, purpose=Purpose.NOISE):
        return rng.normal(seed, ordinals + shift, purpose, (32,)).double()

    base = stream()
    others = {
        "seed": stream(seed=2),
        "seed, high word": stream(seed=1 + 2**32),
        "ordinal, high word": stream(shift=2**32),
        "purpose": stream(purpose=Purpose.POSTERIOR),
        "next drop": stream(purpose=Purpose.DROP + 1),
        "next ordinal": base.roll(1, dims=0),
        "next element": base.roll(1, dims=1),
        "next block": base.roll(4, dims=1),
    }
    for name, other in others.items():
        z = (base * other).mean().item() * math.sqrt(base.numel())
        assert abs(z) < LIMIT, name
        z = ((base**2 - 1) * (other**2 - 1)).mean().item() / 2 * math.sqrt(base.numel())
        assert abs(z) < LIMIT, f"{name}, squares"


@pytest.mark.parametrize("high", [2, 10, 1000])
def test_randint_is_uniform(high):
    values = rng.randint(5, torch.arange(2**16), Purpose.MASK, high)
    assert values.min() == 0
    assert values.max() == high - 1
    counts = torch.bincount(values, minlength=high).double()
    assert abs(chi_square_z(counts, torch.full((high,), 2**16 / high).double())) < LIMIT
    huge = rng.randint(5, torch.arange(1000), Purpose.MASK, 2**62)
    assert huge.max() > 2**61


def test_permutation():
    for size in (1, 2, 100):
        order = rng.permutation(0, 7, Purpose.STRATUM, size)
        assert sorted(order.tolist()) == list(range(size))
    assert not torch.equal(
        rng.permutation(0, 7, Purpose.STRATUM, 100), rng.permutation(0, 8, Purpose.STRATUM, 100)
    )
    firsts = torch.stack([rng.permutation(0, k, Purpose.STRATUM, 8) for k in range(1500)])
    for place in range(8):
        counts = torch.bincount(firsts[:, place], minlength=8).double()
        assert abs(chi_square_z(counts, torch.full((8,), 1500 / 8))) < LIMIT


def test_dropout_has_masks_of_its_own_in_each_step_on_each_rank():
    places = [(seed, step, rank) for seed in (0, 1) for step in (0, 1, 2**33) for rank in range(64)]
    seeds = [rng.step_seed(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert seeds == [rng.step_seed(*place) for place in places]
    assert all(0 <= seed < 2**63 for seed in seeds)
    run = SimpleNamespace(
        config=SimpleNamespace(seed=1, global_batch_size=4),
        state=SimpleNamespace(step=2, advance=lambda *_: None),
        env=SimpleNamespace(rank=3, device=torch.device("cpu")),
        stage=SimpleNamespace(train_step=lambda *_: {"mask": F.dropout(torch.ones(64))}),
        ema=SimpleNamespace(update=lambda _: None),
        timer=lambda _: nullcontext(),
        start=SimpleNamespace(first_step=lambda _: None),
    )
    mask = take_step(run, SimpleNamespace(to=lambda _: None, position={}), 0.0)["mask"]
    torch.manual_seed(rng.step_seed(1, 2, 3))
    assert torch.equal(mask, F.dropout(torch.ones(64)))


# Devices and compilers ------------------------------------------------------------------------------


def draws(device="cpu", normal=rng.normal):
    ordinals = torch.arange(64, device=device) * 7 + 2**34
    return [
        normal(11, ordinals, Purpose.NOISE, (4, 32, 32)),
        rng.uniform(11, ordinals, Purpose.TIMESTEP, (3,)),
        rng.randint(11, ordinals, Purpose.MASK, 1000),
        rng.permutation(11, 3, Purpose.STRATUM, 100, device),
    ]


def test_one_graph_without_breaks():
    compiled = torch.compile(rng.normal, fullgraph=True, backend="eager")
    assert torch.equal(
        compiled(1, torch.arange(4), Purpose.NOISE, (6,)), rng.normal(1, torch.arange(4), 2, (6,))
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_draws_are_the_same():
    torch._dynamo.reset()  # or it would generalise over the shapes of the test before
    compiled = draws(normal=torch.compile(rng.normal, fullgraph=True))
    for actual, expected in zip(compiled, draws(), strict=True):
        different = actual != expected
        assert different.sum() <= 1  # fused multiply-adds: about 1e-8 per value, 262144 values
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_bits_on_a_gpu():
    for actual, expected in zip(draws("cuda"), draws(), strict=True):
        assert torch.equal(actual.cpu(), expected)
