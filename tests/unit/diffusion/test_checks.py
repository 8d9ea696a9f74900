"""Diffusion and sampling settings that divide by zero or make no sense are refused, with the remedy."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trainer.config.checks_diffusion import check_diffusion, check_sampling
from trainer.config.io import load_config
from trainer.config.run import ConfigError
from trainer.config.training import DiffusionConfig, SamplingConfig

FLOW = {"process": "flow", "prediction": "velocity"}
EDM = {"process": "edm", "prediction": "edm", "density": "log_normal"}
REFUSED = {
    "eps at zero SNR divides by zero": (
        {"zero_terminal_snr": True, "prediction": "eps"},
        "diffusion.prediction=v",
    ),
    "min-SNR weight 0 at the last step": (
        {"zero_terminal_snr": True, "prediction": "v", "min_snr_gamma": 5.0},
        "never be trained",
    ),
    "gamma 0 trains nothing": ({"min_snr_gamma": 0.0}, "min_snr_gamma=0.0"),
    "gamma nan": ({"min_snr_gamma": float("nan")}, "min_snr_gamma=nan"),
    "min-SNR is about squares": ({"min_snr_gamma": 5.0, "loss": "l1"}, "diffusion.loss=l2"),
    "min-SNR and huber": ({"min_snr_gamma": 5.0, "loss": "huber"}, "diffusion.loss=l2"),
    "huber without width": ({"loss": "huber", "huber_delta": 0.0}, "huber_delta=0.0"),
    "negative offset noise": ({"offset_noise": -0.1}, "offset_noise=-0.1"),
    "beta 0 has infinite SNR": ({"beta_start": 0.0}, "0 < beta_start"),
    "beta 1 ends the signal": ({"beta_end": 1.0}, "beta_end=1.0 must be above 0 and below 1"),
    "falling betas": ({"beta_start": 0.02, "beta_end": 0.01}, "beta_start <= beta_end"),
    "one step": ({"num_timesteps": 1}, "num_timesteps=1"),
    "eps says nothing at the start of a flow": (
        {"process": "flow"},
        "set diffusion.prediction=velocity or x0.",
    ),
    "v is for alpha^2 + sigma^2 = 1": (
        {"process": "flow", "prediction": "v"},
        "diffusion.prediction=velocity",
    ),
    "velocity of a curved path": ({"prediction": "velocity"}, "set diffusion.prediction=eps or v or x0."),
    "edm's output elsewhere": ({"prediction": "edm"}, "set diffusion.prediction=eps or v or x0."),
    "edm of eps": (
        {"process": "edm"},
        "set diffusion.prediction=edm and diffusion.density=log_normal.",
    ),
    "edm has no time": (
        {"process": "edm", "prediction": "edm", "density": "logit_normal"},
        "set diffusion.density=log_normal.",
    ),
    "a flow has no sigma": ({**FLOW, "density": "log_normal"}, "density=uniform or logit_normal"),
    "neither have levels": ({"density": "log_normal"}, "density=uniform or logit_normal"),
    "a mean that nothing has": ({**FLOW, "density_mean": 0.5}, "no mean and deviation"),
    "a deviation that nothing has": ({"density": "mode", "density_std": 1.0}, "no mean and deviation"),
    "no deviation": ({**FLOW, "density": "logit_normal", "density_std": 0.0}, "density_std=0.0"),
    "mode folds over": ({**FLOW, "density": "mode", "mode_scale": 2.0}, "mode_scale=2.0"),
    "a shift of levels": ({"shift": 3.0}, "set diffusion.process=flow"),
    "a shift of sigma": ({**EDM, "shift_pixels": 512}, "set diffusion.process=flow"),
    "no shift": ({**FLOW, "shift": 0.0}, "shift=0.0"),
    "weights of a velocity for eps": ({"weighting": "cosmap"}, "set diffusion.weighting=uniform"),
    "weights of a velocity for x0": (
        {"process": "flow", "prediction": "x0", "weighting": "sigma_sqrt"},
        "set diffusion.weighting=uniform",
    ),
    "weights of a velocity for edm": ({**EDM, "weighting": "cosmap"}, "set diffusion.weighting=uniform"),
    "terminal SNR of a flow": ({**FLOW, "zero_terminal_snr": True}, "zero_terminal_snr=false"),
    "terminal SNR of edm": ({**EDM, "zero_terminal_snr": True}, "zero_terminal_snr=false"),
    "min-SNR of a flow": ({**FLOW, "min_snr_gamma": 5.0}, "min_snr_gamma"),
    "min-SNR of edm": ({**EDM, "min_snr_gamma": 5.0}, "min_snr_gamma"),
    "no range of sigma": ({**EDM, "sigma_min": 80.0}, "diffusion.sigma_max=80"),
    "no data": ({**EDM, "sigma_data": 0.0}, "sigma_data=0.0"),
}
ACCEPTED = [
    {},
    {"prediction": "v", "zero_terminal_snr": True},
    {"prediction": "x0", "zero_terminal_snr": True},
    {"prediction": "x0", "min_snr_gamma": 5.0},
    {"loss": "huber"},
    {"beta_schedule": "cosine", "beta_start": 0.0},  # unused there
    {"loss": "l1", "offset_noise": 0.1, "timesteps": "stratified"},
    {"density": "logit_normal", "density_mean": 0.5, "density_std": 0.8, "min_snr_gamma": 5.0},
    {**FLOW, "density": "mode", "mode_scale": -1.0, "timesteps": "stratified", "offset_noise": 0.1},
    {**FLOW, "shift": 3.0, "shift_pixels": 1024, "weighting": "cosmap", "loss": "huber"},
    {**FLOW, "density": "cosmap", "beta_start": 0.5, "beta_end": 0.1},  # betas are unused there
    {"process": "flow", "prediction": "x0", "density": "logit_normal"},
    {**EDM, "sigma_data": 0.5, "density_mean": -0.4, "density_std": 1.0},
]


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(settings, message):
    with pytest.raises(ConfigError, match="diffusion") as caught:
        check_diffusion(DiffusionConfig(**settings))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", ACCEPTED)
def test_accepted(settings):
    check_diffusion(DiffusionConfig(**settings))


REFUSED_SAMPLING = {
    "unknown sampler": ({}, {"sampler": "ddmi"}, "dpmpp_2m"),
    "no steps": ({}, {"steps": 0}, "at least 1"),
    "more steps than noise levels": ({"num_timesteps": 20}, {"steps": 21}, "num_timesteps=20"),
    "eta above 1": ({}, {"eta": 1.5}, "at least 0 and at most 1"),
    "eta that nothing reads": ({}, {"eta": 0.5, "sampler": "euler"}, "only applies"),
    "negative guidance": ({}, {"guidance_scale": -1.0}, "guidance_scale=-1.0"),
    "rescale above 1": ({}, {"guidance_rescale": 1.1}, "guidance_rescale=1.1"),
    "leading misses the last step": (
        {"zero_terminal_snr": True, "prediction": "v"},
        {"spacing": "leading"},
        "spacing=trailing",
    ),
    "karras at infinite sigma": (
        {"zero_terminal_snr": True, "prediction": "v"},
        {"spacing": "karras"},
        "spacing=trailing",
    ),
}


@pytest.mark.parametrize(
    ("diffusion", "sampling", "message"), REFUSED_SAMPLING.values(), ids=REFUSED_SAMPLING.keys()
)
def test_refused_sampling(diffusion, sampling, message):
    with pytest.raises(ConfigError, match="sampling") as caught:
        check_sampling(DiffusionConfig(**diffusion), SamplingConfig(**sampling))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("diffusion", "sampling"),
    [
        ({}, {}),
        ({}, {"sampler": "ddim", "eta": 1.0}),
        ({}, {"spacing": "karras", "sampler": "dpmpp_2m", "guidance_scale": 0.0}),
        ({"zero_terminal_snr": True, "prediction": "v"}, {"spacing": "trailing", "sampler": "unipc"}),
    ],
)
def test_accepted_sampling(diffusion, sampling):
    check_sampling(DiffusionConfig(**diffusion), SamplingConfig(**sampling))


NEVER = "drop_probability: 0"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ([f"conditioning.openclip={{{NEVER}, null: zeros}}"], "conditioning.openclip.drop_probability=0"),
        ([f"conditioning.openclip={{{NEVER}}}"], None),  # the empty caption of a frozen tower is one of many
        ([f"conditioning.class_label={{{NEVER}}}"], "conditioning.class_label.drop_probability=0"),
        ([f"conditioning={{openclip: {{}}, layout: {{{NEVER}, width: 1024}}}}"], "conditioning.layout"),
        ([f"conditioning.openclip={{{NEVER}}}", "sampling.guidance_scale=1"], None),
        ([f"conditioning.openclip={{{NEVER}}}", "conditioning.drop_all_probability=0.1"], None),
        ([f"conditioning.openclip={{{NEVER}}}", "init_from=somewhere"], None),
        (["conditioning={openclip: {}, depth: {}}"], None),
        ([], None),
    ],
)
def test_guidance_needs_a_null_form_that_was_trained(settings, named):
    load_config(None, settings)  # a run without previews may do as it likes
    if named is None:
        load_config(None, [*settings, "sampling.every=10"])
    else:
        with pytest.raises(ConfigError, match=named) as caught:
            load_config(None, [*settings, "sampling.every=10"])
        assert "--guidance" in str(caught.value)


def test_checks_do_not_import_torch():
    code = "import sys, trainer.config.checks_diffusion; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
