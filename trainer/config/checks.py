"""Combinations of settings that cannot work, refused before any process starts or model is built."""

from __future__ import annotations

from data_pipeline.config import of_source
from trainer.config.checks_diffusion import check_diffusion, check_guidance, check_sampling
from trainer.config.checks_engines import check_communication, check_graphs, check_optimizer
from trainer.config.checks_validation import check_validation
from trainer.config.derived import check_derived
from trainer.config.models import FROM_PIXELS, RANDOM, TOWERS, FirstStageConfig, OpenCLIPConfig, UNetConfig
from trainer.config.network_plan import norm_groups, plan_levels
from trainer.config.run import Config, require


def check(config: Config) -> None:
    """Raise ConfigError, with the remedy, for the first impossible combination; ranges come before."""
    _check_sizes(config)
    _check_attention(config)
    plan_levels(config.unet)
    if config.first_stage.name != "identity":
        norm_groups(config.first_stage)
    _check_stage(config)
    check_derived(config)
    _check_conditioning(config)
    check_optimizer(config)
    require(
        not config.ema.snapshot_every or bool(config.ema.power_stds),
        "ema.snapshot_every stores power-function averages, and ema.power_stds names none; set it, e.g. to "
        "[0.05,0.1], or snapshot_every to 0.",
    )
    check_communication(config.distributed)
    _check_cache(config)
    check_graphs(config)
    check_validation(config)
    _check_phases(config)
    if config.stage == "diffusion":
        check_diffusion(config.diffusion)
        check_sampling(config.diffusion, config.sampling)
        if config.sampling.every:
            check_guidance(config)


def check_networks(config: Config) -> None:
    """Raise ConfigError, with the remedy, for a trained network that a second stage needs and nobody named.

    Nothing stands in for it unasked. What `ldm config` and `ldm params` do needs no weights; a run does.
    """
    if config.stage != "diffusion":
        return
    require_first_stage(config.first_stage)
    for name in TOWERS:
        tower: OpenCLIPConfig | None = getattr(config.conditioning, name)
        if tower is not None:
            require_tower(name, tower)


def require_first_stage(config: FirstStageConfig) -> None:
    """Raise ConfigError where a second stage has no first stage's weights."""
    require(
        config.name == "identity" or config.weights is not None,
        "first_stage.weights is not set: a diffusion run needs a trained first stage; name a file that `ldm "
        "export` or `ldm import` wrote, or train one with stage=autoencoder (configs/first_stage) first.",
    )


def require_tower(name: str, config: OpenCLIPConfig) -> None:
    """Raise ConfigError where the text tower of this section of `conditioning` has no weights."""
    require(
        config.pretrained is not None,
        f"conditioning.{name}.pretrained is not set, so nothing says which weights the text tower "
        f"{config.model} has; name a tag of open_clip (ViT-H-14 of SD2: "
        "laion2b_s32b_b79k) or a file, or "
        f"conditioning.{name}.pretrained={RANDOM} for an untrained tower, as demos and tests use.",
    )


def _check_sizes(config: Config) -> None:
    if config.distributed.ranks:
        config.sharing(config.distributed.ranks)
        config.shard_size(config.distributed.ranks, config.distributed.ranks)
    require(
        config.stage != "autoencoder" or config.global_batch_size % config.micro_batch_size == 0,
        f"global_batch_size={config.global_batch_size} must be a multiple of micro_batch_size="
        f"{config.micro_batch_size}, whose micro-batches stay whole in a first stage.",
    )
    factor = config.first_stage.downsampling
    require(
        config.data.image_size % factor == 0,
        f"data.image_size={config.data.image_size} must be a multiple of the first stage's downsampling "
        f"factor {factor}.",
    )
    require(
        not config.data.buckets or config.data.bucket_step % factor == 0,
        f"data.bucket_step={config.data.bucket_step} must be a multiple of the first stage's downsampling "
        f"factor {factor}.",
    )
    require(
        not (config.data.shards and config.data.sources),
        "give either data.shards or data.sources, not both.",
    )
    weights, captions = config.data.caption_weights, config.data.captions
    require(
        not weights or len(weights) == len(captions),
        f"data.caption_weights={list(weights)} must be one number for each of "
        f"data.captions={list(captions)}, or empty.",
    )


def _check_attention(config: Config) -> None:
    """Attention at factors that no level has would be left out without a word.

    Some that no level has are common in published configurations (LDM's super-resolution lists 16 and 8).
    """
    sections: dict[str, UNetConfig | FirstStageConfig] = {"unet": config.unet}
    if config.first_stage.name != "identity":
        sections["first_stage"] = config.first_stage
    for name, section in sections.items():
        levels = [2**level for level in range(len(section.channel_multipliers))]
        given, odd = section.attention_factors, [f for f in section.attention_factors if f & (f - 1)]
        require(
            not odd and (not given or bool(set(given) & set(levels))),
            f"{name}.attention_factors={list(given)} has {f'{odd[0]}, which' if odd else 'factors that'} no "
            f"level has: those of {name}.channel_multipliers are "
            f"{', '.join(map(str, levels))} (CompVis' first stages list edges of feature maps instead); name "
            "some of these, or [] for none.",
        )


def _check_cache(config: Config) -> None:
    """What cannot be encoded once, or not be kept."""
    stage, conditioning = config.first_stage, config.conditioning
    if stage.cache_variants:
        require(
            config.data.order != "resampled",
            "first_stage.cache_variants needs data.order=indexed; set it to 0, since a resampled stream "
            "draws each crop anew.",
        )
    if stage.cache is None:
        return
    require(
        stage.cache.strip() != "",
        "first_stage.cache is empty; name a folder or URL, or null for no cache.",
    )
    require(
        config.stage == "diffusion",
        "first_stage.cache keeps what a frozen first stage gives, and stage=autoencoder trains it; remove "
        "first_stage.cache.",
    )
    require(
        stage.name != "identity",
        "first_stage.cache has nothing to keep where first_stage.name=identity encodes nothing; remove it.",
    )
    require(
        config.data.order != "resampled",
        "first_stage.cache needs to know where in a shard a picture lies, and a resampled stream does not; "
        "remove first_stage.cache or set data.order=indexed.",
    )
    pixels = [name for name in FROM_PIXELS if getattr(conditioning, name) is not None]
    require(
        not pixels,
        f"first_stage.cache serves no pixels, from which conditioning.{' and conditioning.'.join(pixels)} is "
        "made at every visit; remove first_stage.cache.",
    )
    read = [of_source(config.data, source) for source in config.data.sources] or [config.data]
    drawn = [
        name
        for name, there in {
            "data.crop=random": any(each.crop == "random" for each in read),
            "data.horizontal_flip=true": any(each.horizontal_flip for each in read),
        }.items()
        if there
    ]
    require(
        not drawn or stage.cache_variants > 0,
        f"{' and '.join(drawn)} makes other pixels of a picture at every visit, which first_stage.cache "
        "cannot keep; set first_stage.cache_variants, e.g. to 4, for that many crops of each picture, or "
        "data.crop=center and data.horizontal_flip=false.",
    )


def _check_stage(config: Config) -> None:
    if config.stage == "diffusion":
        require(
            not config.trainable or config.init_from is not None,
            "trainable freezes the other weights, which without init_from are random ones; set init_from to "
            "the weights to start from.",
        )
        _check_lora(config)
        return
    require(
        config.lora is None,
        "lora puts adapters on the UNet of stage=diffusion; a first stage is trained whole, so remove it.",
    )
    require(
        not config.trainable,
        "trainable is for stage=diffusion; a first stage is trained whole, so remove it.",
    )
    require(
        config.first_stage.name != "identity",
        "first_stage.name=identity has nothing to train; choose kl or vq for stage=autoencoder.",
    )
    require(
        config.first_stage.name == "vq" or not config.autoencoder_loss.revive_codes_every,
        f"autoencoder_loss.revive_codes_every revives entries of a codebook, which first_stage.name="
        f"{config.first_stage.name} does not have; set it to 0, or first_stage.name=vq.",
    )
    layers = config.autoencoder_loss.discriminator_layers
    require(
        not config.autoencoder_loss.discriminator_weight or config.data.image_size >= 3 * 2**layers,
        f"a discriminator of {layers} strided layers needs at least {3 * 2**layers} pixels; lower "
        "autoencoder_loss.discriminator_layers or raise data.image_size.",
    )


def _check_phases(config: Config) -> None:
    starts = [phase.from_step for phase in config.phases]
    require(
        starts == sorted(set(starts)),
        f"phases begin at the steps {', '.join(map(str, starts))}; let from_step rise from one to the next.",
    )
    require(
        not starts or config.data.order == "indexed",
        f"phases need data.order=indexed, and not {config.data.order}: another size begins at a place of the "
        "index; set data.order=indexed, or remove phases.",
    )
    require(
        not starts or config.distributed.engine != "deepspeed" or config.distributed.zero_stage < 3,
        "phases do not go together with distributed.zero_stage=3, where DeepSpeed never lets go of the memory"
        " of a phase that is over; set zero_stage to 2 or lower, or engine=fsdp.",
    )


def _check_lora(config: Config) -> None:
    if config.lora is None:
        return
    require(
        config.init_from is not None,
        "lora adapts weights that stay frozen, which without init_from are random ones; set init_from to the "
        "weights to adapt.",
    )
    others = {
        "trainable": bool(config.trainable),
        "diffusion.learned_uncertainty": config.diffusion.learned_uncertainty,
    }
    present = [name for name, there in others.items() if there]
    require(
        not present,
        f"lora trains adapters and nothing else, which {' and '.join(present)} contradicts; remove one of "
        "them.",
    )
    require(
        bool(config.lora.targets),
        "lora.targets is empty, so that nothing would be trained; name layers, or remove it for those of all "
        "attentions.",
    )


def _check_conditioning(config: Config) -> None:
    conditioning = config.conditioning
    tau = conditioning.text_transformer
    require(
        tau is None or tau.tokenizer != "wordpiece" or tau.vocabulary is not None,
        "conditioning.text_transformer.tokenizer=wordpiece needs its vocabulary file; set "
        "conditioning.text_transformer.vocabulary, or tokenizer=clip.",
    )
    low = conditioning.low_resolution
    if low is not None:
        require(
            config.first_stage.downsampling == low.factor,
            f"conditioning.low_resolution.factor={low.factor} must equal the first stage's downsampling "
            f"factor {config.first_stage.downsampling}, since the image is concatenated to the latents.",
        )
    sizes = conditioning.image_size
    require(
        sizes is None or sizes.width % 2 == 0,
        "conditioning.image_size.width must be even: half of the features are sines, half cosines.",
    )
    for name in TOWERS:
        tower = getattr(conditioning, name)
        shrunk = tower is not None and any(
            value is not None for value in (tower.width, tower.layers, tower.heads, tower.context_length)
        )
        require(
            not (shrunk and tower.pretrained not in (None, RANDOM)),
            f"conditioning.{name}: width, layers, heads and context_length shrink the tower, so pretrained "
            f"weights cannot fit; remove them, or set pretrained={RANDOM}.",
        )
