"""The samplers, generators that yield once per level that they leave; their table; from noise to latents.

A sampler takes (look, x at level 0, levels), and noise or eta only where it has a use for them; `Sampler`
binds the rest. x = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1, whatever the process.

One step each: DDPM, DDIM, Euler, Euler ancestral, Heun. The samplers of Karras et al. (2022) work on
y = x / alpha at noise level r = sigma / alpha, where the probability-flow ODE is dy / dr = eps; Euler and
Heun go along the path itself where it is straight (`NoiseLevels.line`).

Multistep: PLMS, DPM-Solver++ 2M and its SDE form, UniPC. The last three integrate in
lambda = ln(alpha / sigma), with h the width of a step and predictions of x0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from trainer.config.training import SamplerName
from trainer.diffusion.denoiser import Callback, Denoiser, Look, NoiseSource, Step, evaluate, ignore, no_noise
from trainer.diffusion.editing import image_to_image_start
from trainer.diffusion.levels import NoiseLevels, Spacing, make_levels

FEW_STEPS = 15
"""Below this many steps the last step of DPM-Solver++ is first order, for stability."""


def sample_ddpm(look: Look, x: Tensor, levels: NoiseLevels, noise: NoiseSource) -> Iterator[Step]:
    """Ancestral sampling from q(x_s | x_t, x0), the smaller variance (Ho et al. 2020, equations 6 and 7)."""
    for i in range(len(levels)):
        x0, _ = look(x, i)
        alpha, sigma, alpha_next, sigma_next = _interval(levels, i)
        step_alpha = (alpha / alpha_next) ** 2  # product of (1 - beta) between the two levels
        x0_weight = alpha_next * (1.0 - step_alpha) / sigma**2
        x_weight = math.sqrt(step_alpha) * sigma_next**2 / sigma**2
        x = x0_weight * x0 + x_weight * x
        if sigma_next > 0.0:
            x = x + sigma_next / sigma * math.sqrt(1.0 - step_alpha) * noise(i)
        yield x, x0


def sample_ddim(look: Look, x: Tensor, levels: NoiseLevels, noise: NoiseSource, eta: float) -> Iterator[Step]:
    """Song, Meng and Ermon 2021, equations 12 and 16: eta 0 is deterministic, eta 1 as noisy as DDPM."""
    for i in range(len(levels)):
        x0, eps = look(x, i)
        alpha, sigma, alpha_next, sigma_next = _interval(levels, i)
        deviation = eta * sigma_next / sigma * math.sqrt(1.0 - (alpha / alpha_next) ** 2)
        x = alpha_next * x0 + math.sqrt(max(sigma_next**2 - deviation**2, 0.0)) * eps
        if deviation > 0.0:
            x = x + deviation * noise(i)
        yield x, x0


def sample_euler(look: Look, x: Tensor, levels: NoiseLevels) -> Iterator[Step]:
    """Euler steps of the ODE (Karras et al. 2022): in exact arithmetic DDIM with eta 0."""
    c, r = levels.line(0)
    y = x / c
    for i in range(len(levels)):
        x0, slope = _slope(look, y * c, i, levels)
        r_before, (c, r) = r, levels.line(i + 1)
        y = y + slope * (r - r_before)
        yield y * c, x0


def sample_euler_ancestral(look: Look, x: Tensor, levels: NoiseLevels, noise: NoiseSource) -> Iterator[Step]:
    """Euler to a lower level than wanted, then noise up to it, with DDPM's share of fresh noise."""
    y = x / levels.alphas[0]
    for i in range(len(levels)):
        x0, slope = look(y * levels.alphas[i], i)
        ratio, ratio_next = levels.ratio(i), levels.ratio(i + 1)
        up = ratio_next / ratio * math.sqrt(ratio**2 - ratio_next**2)
        down = math.sqrt(max(ratio_next**2 - up**2, 0.0))
        y = y + slope * (down - ratio)
        if up > 0.0:
            y = y + up * noise(i)
        yield y * levels.alphas[i + 1], x0


def sample_heun(look: Look, x: Tensor, levels: NoiseLevels) -> Iterator[Step]:
    """Heun's second-order steps (Karras et al. 2022, algorithm 1), 2 n - 1 evaluations: the last is Euler."""
    c, r = levels.line(0)
    y = x / c
    for i in range(len(levels)):
        x0, slope = _slope(look, y * c, i, levels)
        r_before, (c, r) = r, levels.line(i + 1)
        width = r - r_before
        if i + 1 < len(levels):
            _, slope_next = _slope(look, (y + slope * width) * c, i + 1, levels)
            slope = (slope + slope_next) / 2
        y = y + slope * width
        yield y * c, x0


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


@dataclass(frozen=True)
class Sampler:
    """A sampler's steps with what they need bound: called alike, whatever that is."""

    steps: Callable[..., Iterator[Step]]
    """(look, x, levels, and the arguments named in `needs`)."""
    needs: tuple[Literal["noise", "eta"], ...] = ()
    """Arguments beyond the first three."""
    divides_by_alpha: bool = True
    """Zero terminal SNR is replaced by a very small one for it (`NoiseLevels.finite`)."""
    starts_straight: bool = False
    """Of a straight path it takes the pure noise at the start as it is."""

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        levels: NoiseLevels,
        *,
        noise: NoiseSource = no_noise,
        eta: float = 0.0,
        callback: Callback = ignore,
    ) -> Tensor:
        """From x [B, C, H, W] at level 0, of variance about 1, to x at the last level, usually clean."""
        if self.divides_by_alpha and not (levels.straight and self.starts_straight):
            levels = levels.finite()
        given = {"noise": noise, "eta": eta}
        steps = self.steps(
            partial(evaluate, denoiser, levels), x, levels, **{name: given[name] for name in self.needs}
        )
        for index, step in enumerate(steps):
            x, x0 = step
            callback(index, len(levels), x0)
        return x


SAMPLERS: dict[SamplerName, Sampler] = {
    "ddpm": Sampler(sample_ddpm, needs=("noise",), divides_by_alpha=False),
    "ddim": Sampler(sample_ddim, needs=("noise", "eta"), divides_by_alpha=False),
    "plms": Sampler(sample_plms),
    "euler": Sampler(sample_euler, starts_straight=True),
    "euler_ancestral": Sampler(sample_euler_ancestral, needs=("noise",)),
    "heun": Sampler(sample_heun, starts_straight=True),
    "dpmpp_2m": Sampler(sample_dpmpp_2m, starts_straight=True),
    "dpmpp_sde": Sampler(sample_dpmpp_sde, needs=("noise",), starts_straight=True),
    "unipc": Sampler(sample_unipc, starts_straight=True),
}


@torch.no_grad()
def sample(
    name: SamplerName,
    denoiser: Denoiser,
    start_noise: Tensor,
    *,
    num_steps: int,
    spacing: Spacing = "leading",
    eta: float = 0.0,
    noise: NoiseSource = no_noise,
    latents: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Latents [B, C, H, W] from standard normal `start_noise` of that shape (any height and width).

    With `latents`, image-to-image: they are noised with `start_noise` and the last `strength` share of the
    steps is run. `noise` is needed by ddpm, euler_ancestral, dpmpp_sde and ddim with eta > 0.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}")
    levels = make_levels(denoiser.schedule, num_steps, spacing)
    x = start_noise
    if latents is not None:
        x, levels = image_to_image_start(latents, start_noise, levels, strength)
    return SAMPLERS[name](denoiser, x, levels, noise=noise, eta=eta)


def _slope(look: Look, x: Tensor, i: int, levels: NoiseLevels) -> tuple[Tensor, Tensor]:
    """(x0, dy / dr) at level i, along `NoiseLevels.line`."""
    x0, eps = look(x, i)
    return x0, eps - x0 if levels.straight else eps


def _interval(levels: NoiseLevels, i: int) -> tuple[float, float, float, float]:
    return levels.alphas[i], levels.sigmas[i], levels.alphas[i + 1], levels.sigmas[i + 1]


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
