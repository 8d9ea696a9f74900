"""Which pipeline of diffusers draws what a run draws, or why none does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

from trainer.config.models import ConditioningConfig, OpenCLIPConfig
from trainer.config.run import Config, ConfigError
from trainer.interop.diffusers_unet import Json

UPSCALER_SCALE = 0.08333
"""The scale factor that StableDiffusionUpscalePipeline puts in the place of any other."""


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's class and what its folder says beside its networks."""

    name: str
    needs: tuple[str, ...]
    """Networks without which it is not loaded, by folder."""
    towers: tuple[str, ...] = ()
    """Folders of text towers; each has a tokenizer beside it."""
    reads_penultimate: bool = False
    """It takes the last hidden state but one, so that towers must be whole."""
    scale_factor: float | None = None
    """The autoencoder's, where it must be this one."""
    settings: Json = field(default_factory=dict)
    """Of model_index.json."""


class NoPipeline(Exception):
    """No pipeline of diffusers draws this; the message says why."""


def choose_pipeline(config: Config) -> Pipeline:
    """The pipeline that computes what `ldm sample` computes.

    Raises:
        NoPipeline: none does; the sentence names the setting.
    """
    if config.diffusion.process == "flow":  # no flow scheduler has scale_model_input, which all of them call
        raise NoPipeline("no pipeline of diffusers with these networks draws by diffusion.process=flow")
    given = _conditions(config.conditioning)
    stage = config.first_stage.name
    if not given:
        if config.unet.attention != "plain":
            raise NoPipeline("diffusers draws without conditions with unet.attention=plain alone")
        if stage == "identity" and config.diffusion.process != "discrete":
            raise NoPipeline(
                f"DDIMPipeline draws by DDIM, not by diffusion.process={config.diffusion.process}"
            )
        if stage == "identity":
            return Pipeline("DDIMPipeline", ("unet",))
        return Pipeline("LDMPipeline", ("unet", "vqvae"))
    pipeline = _TEXT.get(given)
    if pipeline is None:
        raise NoPipeline(f"no pipeline of diffusers is told {', '.join(sorted(given))} and nothing else")
    for obstacle in _obstacles(config, pipeline):
        raise NoPipeline(f"{pipeline.name} differs from this run: {obstacle}")
    return _with_settings(pipeline, config)


def require_vector_as_sdxl(config: Config) -> None:
    """Refuse a vector condition that diffusers' UNet cannot take: it always joins pooled text and six sizes.

    Raises:
        ConfigError: pooled text or sizes stand alone.
    """
    conditioning = config.conditioning
    pooled = [name for name in ("openclip", "openclip_second") if _pooled(getattr(conditioning, name))]
    if bool(pooled) != (conditioning.image_size is not None):
        alone = f"conditioning.{pooled[0]}.pooled" if pooled else "conditioning.image_size"
        raise ConfigError(
            f"diffusers' UNet takes pooled text and picture sizes together, as SDXL does, and this run has "
            f"{alone} alone, with which nothing there could draw; use --layout native or compvis."
        )


_STABLE = {
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
}
_SD = ("unet", "vae", "text_encoder")
_TEXT = {
    frozenset({"openclip"}): Pipeline(
        "StableDiffusionPipeline", _SD, ("text_encoder",), settings={**_STABLE, "image_encoder": [None, None]}
    ),
    frozenset({"openclip", "masked_image"}): Pipeline(
        "StableDiffusionInpaintPipeline",
        _SD,
        ("text_encoder",),
        settings={**_STABLE, "image_encoder": [None, None]},
    ),
    frozenset({"openclip", "low_resolution"}): Pipeline(
        "StableDiffusionUpscalePipeline", _SD, ("text_encoder",), scale_factor=UPSCALER_SCALE
    ),
    frozenset({"openclip", "openclip_second", "image_size"}): Pipeline(
        "StableDiffusionXLPipeline",
        (*_SD, "text_encoder_2"),
        ("text_encoder", "text_encoder_2"),
        reads_penultimate=True,
    ),
}
"""By the conditions of a run, the pipeline that is told the same."""


def _conditions(config: ConditioningConfig) -> frozenset[str]:
    names = (f.name for f in fields(config) if f.name != "drop_all_probability")
    return frozenset(name for name in names if getattr(config, name) is not None)


def _obstacles(config: Config, pipeline: Pipeline) -> Iterator[str]:
    """Settings with which the pipeline would draw something else, in words."""
    conditioning, stage = config.conditioning, config.first_stage
    if stage.name != "kl":
        yield f"it decodes with an AutoencoderKL, not first_stage.name={stage.name}"
    if stage.input_range != "-1..1":
        yield f"its pixels lie in -1..1, not first_stage.input_range={stage.input_range}"
    towers = {
        name: tower
        for name in ("openclip", "openclip_second")
        for tower in [getattr(conditioning, name)]
        if tower is not None
    }
    for name, tower in towers.items():
        yield from (f"conditioning.{name}: {words}" for words in _tower_obstacles(tower, pipeline))
    if len({tower.null for tower in towers.values()}) > 1:
        yield "the null forms of the two text towers differ"
    if pipeline.reads_penultimate and (towers["openclip"].pooled or not towers["openclip_second"].pooled):
        yield "the second text tower alone is pooled there"
    masked, low = conditioning.masked_image, conditioning.low_resolution
    if masked is not None and masked.mask_channels != 1:
        yield f"its mask has one channel, not conditioning.masked_image.mask_channels={masked.mask_channels}"
    if masked is not None and masked.form != "sd":
        yield "its hidden pixels are grey and its mask is 0 or 1, not conditioning.masked_image.form=ldm"
    if low is not None and not low.max_noise_level:
        yield "it says the noise level of the low-resolution picture, which max_noise_level=0 leaves out"
    for name in ("masked_image", "low_resolution", "image_size"):
        section = getattr(conditioning, name)
        if section is not None and section.drop_probability:
            yield f"its guidance keeps what conditioning.{name}.drop_probability has taught to leave out"


def _tower_obstacles(tower: OpenCLIPConfig, pipeline: Pipeline) -> Iterator[str]:
    if pipeline.reads_penultimate:
        if tower.layer != "penultimate" or tower.final_norm:
            yield "it reads layer=penultimate with final_norm=false"
        return
    if tower.layer == "penultimate" and not tower.final_norm:
        yield "it applies the final norm, which final_norm=false leaves out"
    if tower.null != "empty":
        yield f"its unconditional branch is the empty prompt, not null={tower.null}"


def _with_settings(pipeline: Pipeline, config: Config) -> Pipeline:
    settings = dict(pipeline.settings)
    conditioning = config.conditioning
    if pipeline.reads_penultimate:
        assert conditioning.openclip is not None
        settings["force_zeros_for_empty_prompt"] = conditioning.openclip.null == "zeros"
    if conditioning.low_resolution is not None:
        settings["max_noise_level"] = conditioning.low_resolution.max_noise_level
    return replace(pipeline, settings=settings)


def _pooled(tower: OpenCLIPConfig | None) -> bool:
    return tower is not None and tower.pooled
