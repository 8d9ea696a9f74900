"""Multistep samplers: PLMS, DPM-Solver++ 2M and its SDE form, UniPC. Written like samplers.py.

The last three integrate in lambda = ln(alpha / sigma), with h the width of a step and predictions of x0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from trainer.diffusion.denoiser import Look, NoiseSource, Step
from trainer.diffusion.levels import NoiseLevels

FEW_STEPS = 15
"""Below this many steps the last step of DPM-Solver++ is first order, for stability."""


def sample_plms(look: Look, x: Tensor, levels: NoiseLevels) -> Iterator[Step]:
    """Pseudo linear multistep (Liu et al. 2022), started by one Heun-like step: n + 1 evaluations."""
    history: list[Tensor] = []
    for i in range(len(levels)):
        _, eps = look(x, i)
        history = [*history[-3:], eps]
        slope = _adams_bashforth(history)
        if i == 0 and len(levels) > 1:
            _, eps_next = look(_transfer(x, eps, levels, i), i + 1)
            slope = (eps + eps_next) / 2
        x0 = (x - levels.sigmas[i] * slope) / levels.alphas[i]
        x = _transfer(x, slope, levels, i)
        yield x, x0


def sample_dpmpp_2m(look: Look, x: Tensor, levels: NoiseLevels) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2), one evaluation per step."""
    previous: Tensor | None = None
    for i in range(len(levels)):
        x0, _ = look(x, i)
        h = levels.log_snr(i + 1) - levels.log_snr(i)
        extrapolated = _extrapolated(x0, previous, levels, i)
        x = levels.sigmas[i + 1] / levels.sigmas[i] * x - levels.alphas[i + 1] * math.expm1(-h) * extrapolated
        previous = x0
        yield x, x0


def sample_dpmpp_sde(look: Look, x: Tensor, levels: NoiseLevels, noise: NoiseSource) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b): one evaluation and one noise per step."""
    previous: Tensor | None = None
    for i in range(len(levels)):
        x0, _ = look(x, i)
        h = levels.log_snr(i + 1) - levels.log_snr(i)
        share = -math.expm1(-2.0 * h)
        extrapolated = _extrapolated(x0, previous, levels, i)
        sigma_next = levels.sigmas[i + 1]
        x = sigma_next / levels.sigmas[i] * math.exp(-h) * x + levels.alphas[i + 1] * share * extrapolated
        if sigma_next > 0.0:
            x = x + sigma_next * math.sqrt(share) * noise(i)
        previous = x0
        yield x, x0


def sample_unipc(look: Look, x: Tensor, levels: NoiseLevels) -> Iterator[Step]:
    """UniPC-2 with B(h) = e^h - 1 (Zhao et al. 2023): every evaluation also corrects the step before it.

    One evaluation per step. The first step and the last are first order.
    """
    history: list[Tensor] = []  # x0 at levels i - 2, i - 1 when step i begins
    start = x  # corrected x at level i - 1
    for i in range(len(levels)):
        x0, _ = look(x, i)
        if i > 0:
            x = _unipc_correct(start, x0, history, levels, i)
        history = [*history[-1:], x0]
        start = x
        order = 1 if i == 0 or i == len(levels) - 1 else 2
        x = _unipc_predict(x, history[-order:], levels, i)
        yield x, x0


def _adams_bashforth(history: list[Tensor]) -> Tensor:
    """The next slope from up to four past ones, newest last (orders 1 to 4)."""
    match history:
        case [e]:
            return e
        case [d, e]:
            return (3 * e - d) / 2
        case [c, d, e]:
            return (23 * e - 16 * d + 5 * c) / 12
        case [b, c, d, e]:
            return (55 * e - 59 * d + 37 * c - 9 * b) / 24
        case _:
            raise AssertionError(f"{len(history)} slopes")


def _transfer(x: Tensor, eps: Tensor, levels: NoiseLevels, i: int) -> Tensor:
    """The deterministic DDIM step from level i to i + 1 along `eps`."""
    x0 = (x - levels.sigmas[i] * eps) / levels.alphas[i]
    return levels.alphas[i + 1] * x0 + levels.sigmas[i + 1] * eps


def _extrapolated(x0: Tensor, previous: Tensor | None, levels: NoiseLevels, i: int) -> Tensor:
    """x0 at the middle of the step, by the line through the last two predictions; x0 itself at the ends."""
    last = i == len(levels) - 1
    if previous is None or (last and (levels.sigmas[-1] == 0.0 or len(levels) < FEW_STEPS)):
        return x0
    h = levels.log_snr(i + 1) - levels.log_snr(i)
    h_before = levels.log_snr(i) - levels.log_snr(i - 1)
    return x0 + h / (2.0 * h_before) * (x0 - previous)


def _unipc_predict(x: Tensor, history: list[Tensor], levels: NoiseLevels, i: int) -> Tensor:
    """UniP from level i to i + 1; the order is the number of past predictions given."""
    h = levels.log_snr(i + 1) - levels.log_snr(i)
    slope = history[-1]
    if len(history) == 2:
        r = (levels.log_snr(i - 1) - levels.log_snr(i)) / h
        slope = slope + 0.5 * (history[0] - history[1]) / r
    return levels.sigmas[i + 1] / levels.sigmas[i] * x - levels.alphas[i + 1] * math.expm1(-h) * slope


def _unipc_correct(start: Tensor, x0: Tensor, history: list[Tensor], levels: NoiseLevels, i: int) -> Tensor:
    """UniC: x at level i again, from `start` at level i - 1, now knowing the prediction x0 at level i."""
    h = levels.log_snr(i) - levels.log_snr(i - 1)
    newest = history[-1]
    slope = newest + 0.5 * (x0 - newest)
    if len(history) == 2:
        # Weights of the differences to levels i - 2 and i that integrate second-degree polynomials exactly
        # (the paper's linear system for p = 2, solved by hand); z = -h.
        z = -h
        first = (math.expm1(z) / z - 1.0) / math.expm1(z)
        second = 2.0 * ((math.expm1(z) / z - 1.0) / z - 0.5) / math.expm1(z)
        r = (levels.log_snr(i - 2) - levels.log_snr(i - 1)) / h
        old_weight = (first - second) / (1.0 - r)
        slope = newest + old_weight * (history[0] - newest) / r + (first - old_weight) * (x0 - newest)
    return levels.sigmas[i] / levels.sigmas[i - 1] * start - levels.alphas[i] * math.expm1(-h) * slope
