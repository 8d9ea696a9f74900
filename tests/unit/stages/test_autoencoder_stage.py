"""The autoencoder stage on one process with the plain torch engine."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from data_pipeline.batch import Batch
from trainer.config.io import load_config
from trainer.config.models import FirstStageConfig
from trainer.config.run import Config, ConfigError
from trainer.config.training import (
    AutoencoderLossConfig,
    DistributedConfig,
    OptimizerConfig,
    SamplingConfig,
)
from trainer.distributed.env import DistributedEnv
from trainer.distributed.torch_engine import TorchEngine
from trainer.first_stage.perceptual import build_perceptual
from trainer.first_stage.statistics import IDLE_TENSOR, exported_statistics
from trainer.metrics.timer import StepTimer
from trainer.model import build_autoencoder
from trainer.rng import Purpose, normal
from trainer.stages.autoencoder import ENTRIES, AutoencoderStage, to_bytes, to_unit_range

CPU = torch.device("cpu")
ENV = DistributedEnv(0, 0, 1, 1, "127.0.0.1", 29500, "single", CPU)
TINY = FirstStageConfig(
    base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=3, codebook_size=16
)
LOSS = AutoencoderLossConfig(
    perceptual_weight=0.1,
    perceptual_weights="random",
    discriminator_start=2,
    discriminator_channels=8,
    discriminator_layers=2,
)


def make_config(**changes: object) -> Config:
    base = Config(
        stage="autoencoder",
        global_batch_size=4,
        micro_batch_size=2,
        first_stage=TINY,
        autoencoder_loss=LOSS,
        optimizer=OptimizerConfig(learning_rate=1e-3, betas=(0.5, 0.9), weight_decay=0.0),
        distributed=DistributedConfig(engine="torch", precision="fp32", channels_last=False),
        sampling=SamplingConfig(num_previews=4),
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def make_stage(config: Config) -> AutoencoderStage:
    networks = build_autoencoder(config)
    engines = {name: TorchEngine(network, config, ENV) for name, network in networks.items()}
    return AutoencoderStage(config, engines, build_perceptual(config.autoencoder_loss), StepTimer(CPU))


def make_batch(size: int = 4, edge: int = 32, first: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(first)
    coarse = torch.randint(0, 256, (size, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return Batch(
        pixels=coarse.repeat_interleave(edge // 4, 2).repeat_interleave(edge // 4, 3),
        captions=tuple(f"picture {i}" for i in range(size)),
        conditions={},
        keys=tuple(str(i) for i in range(size)),
        ordinals=torch.arange(first, first + size),
        slots=torch.arange(size),
        position={},
    )


def weights(stage: AutoencoderStage, name: str) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in stage.engines[name].module.named_parameters()}


@pytest.mark.parametrize("name", ["kl", "vq"])
def test_the_loss_of_a_repeated_batch_falls(name: str) -> None:
    loss = dataclasses.replace(LOSS, discriminator_weight=0.0)
    config = make_config(first_stage=dataclasses.replace(TINY, name=name), autoencoder_loss=loss)
    stage = make_stage(config)
    assert set(stage.engines) == {"autoencoder"}
    errors = [float(stage.train_step(make_batch(), step, 3e-3)["reconstruction"]) for step in range(40)]
    assert sum(errors[-3:]) < 0.8 * sum(errors[:3])


def test_the_discriminator_waits_for_its_generator_step() -> None:
    stage = make_stage(make_config())
    before = weights(stage, "discriminator")
    for step in range(2):
        metrics = stage.train_step(make_batch(), step, 1e-3)
        assert "discriminator" not in metrics
        assert "generator" not in metrics
        assert stage.engines["discriminator"].optimizer_steps == 0
    assert all(torch.equal(v, before[k]) for k, v in weights(stage, "discriminator").items())
    metrics = stage.train_step(make_batch(), 2, 1e-3)
    assert metrics["adaptive_weight"] >= 0
    assert metrics["discriminator_grad_norm"] > 0
    assert stage.engines["autoencoder"].optimizer_steps == 3
    assert stage.engines["discriminator"].optimizer_steps == 1
    changed = weights(stage, "discriminator")
    assert all(not torch.equal(v, before[k]) for k, v in changed.items())


def test_the_start_is_counted_in_generator_steps_not_in_loop_steps() -> None:
    """A run that starts its own count anew (or counts both optimizers) must not move disc_start."""
    stage = make_stage(make_config())
    assert "discriminator" not in stage.train_step(make_batch(), 1000, 1e-3)
    stage.engines["autoencoder"].optimizer_steps = 2
    assert "discriminator" in stage.train_step(make_batch(), 0, 1e-3)


def test_neither_network_collects_gradients_in_the_other_ones_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(
        autoencoder_loss=dataclasses.replace(LOSS, discriminator_start=0), global_batch_size=2
    )
    stage = make_stage(config)
    engines = stage.engines
    seen: list[str] = []

    def watch(name: str, other: str) -> None:
        backward = engines[name].backward

        def watched(loss: torch.Tensor) -> None:
            before = [None if p.grad is None else p.grad.clone() for p in engines[other].module.parameters()]
            backward(loss)
            after = [p.grad for p in engines[other].module.parameters()]
            for old, new in zip(before, after, strict=True):
                assert (old is None and new is None) or torch.equal(old, new)
            own = [p.grad for p in engines[name].module.parameters()]
            assert all(g is not None for g in own)
            seen.append(name)

        monkeypatch.setattr(engines[name], "backward", watched)

    watch("autoencoder", "discriminator")
    watch("discriminator", "autoencoder")
    stage.train_step(make_batch(2), 0, 1e-3)
    assert seen == ["autoencoder", "discriminator"]


def test_gradients_equal_the_textbook_objective() -> None:
    """One backward through reconstruction gradients == backward of nll + KL + w * adaptive * gan."""
    loss_config = dataclasses.replace(LOSS, discriminator_start=0, learned_logvar=True, logvar_init=0.3)
    config = make_config(
        autoencoder_loss=loss_config,
        global_batch_size=2,
        optimizer=OptimizerConfig(learning_rate=0.0, max_grad_norm=0.0, weight_decay=0.0),
    )
    stage = make_stage(config)
    autoencoder, discriminator = (stage.engines[n].module for n in ("autoencoder", "discriminator"))
    captured: dict[str, torch.Tensor] = {}
    backward = stage.engines["autoencoder"].backward

    def keep(loss: torch.Tensor) -> None:
        backward(loss)
        captured.update({n: p.grad.clone() for n, p in autoencoder.named_parameters()})
        captured["loss"] = loss.detach()

    stage.engines["autoencoder"].backward = keep  # type: ignore[method-assign]
    batch = make_batch(2)
    metrics = stage.train_step(batch, 0, 0.0)

    pixels = to_unit_range(batch.pixels)
    noise = normal(config.seed, batch.ordinals, Purpose.POSTERIOR, (3, 16, 16))
    out = autoencoder(pixels, noise)
    picture, logvar = out["reconstruction"], autoencoder.logvar
    perceptual = build_perceptual(loss_config)(pixels, picture).view(-1, 1, 1, 1)
    error = (pixels - picture).abs() + 0.1 * perceptual
    nll = (error / logvar.exp() + logvar).sum() / 2
    fooling = -discriminator(picture).mean()
    last = autoencoder.decoder.conv_out.weight
    nll_norm, gan_norm = (torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (nll, fooling))
    weight = (nll_norm / (gan_norm + 1e-4)).clamp(0, 1e4).detach()
    total = nll + 1e-6 * out["kl"].sum() / 2 + 0.5 * weight * fooling
    expected = torch.autograd.grad(total, list(autoencoder.parameters()))
    torch.testing.assert_close(metrics["adaptive_weight"], weight, rtol=1e-4, atol=0)
    torch.testing.assert_close(captured["loss"], total.detach(), rtol=1e-5, atol=0)
    scale = max(float(g.abs().max()) for g in expected)
    for (name, _), gradient in zip(autoencoder.named_parameters(), expected, strict=True):
        torch.testing.assert_close(captured[name], gradient, rtol=1e-3, atol=1e-5 * scale)
    assert float(captured["logvar"]) != 0.0


def test_a_learned_logvar_moves_towards_the_error() -> None:
    loss = dataclasses.replace(LOSS, learned_logvar=True, discriminator_weight=0.0)
    stage = make_stage(make_config(autoencoder_loss=loss))
    first = float(stage.train_step(make_batch(), 0, 1e-2)["logvar"])
    for step in range(1, 20):
        metrics = stage.train_step(make_batch(), step, 1e-2)
    assert first == 0.0
    assert float(metrics["logvar"]) < -0.02  # errors are below 1, so their log is negative
    frozen = make_stage(make_config(autoencoder_loss=dataclasses.replace(LOSS, discriminator_weight=0.0)))
    assert "logvar" not in dict(frozen.engines["autoencoder"].module.named_parameters())


def test_micro_batches_are_the_same_computation_as_ranks_would_do() -> None:
    """Accumulating two micro-batches == averaging the gradients of the two halves, also with a GAN."""
    loss = dataclasses.replace(LOSS, discriminator_start=0)
    whole = make_config(autoencoder_loss=loss, optimizer=OptimizerConfig(max_grad_norm=0.0))
    half = dataclasses.replace(whole, global_batch_size=2)
    captured: dict[str, list[dict[str, torch.Tensor]]] = {"whole": [], "half": []}

    def run(key: str, config: Config, batch: Batch) -> None:
        stage = make_stage(config)
        for name, engine in stage.engines.items():
            step = engine.step

            def keep(rate: float, step=step, engine=engine, name=name) -> torch.Tensor | None:  # type: ignore[no-untyped-def]
                grads = {f"{name}.{n}": p.grad.clone() for n, p in engine.module.named_parameters()}
                result = step(rate)
                if result is not None:
                    captured[key].append(grads)
                return result

            engine.step = keep  # type: ignore[method-assign]
        stage.train_step(batch, 0, 0.0)

    batch = make_batch(4)
    run("whole", whole, batch)
    for part in batch.micro_batches(2):
        run("half", half, part)
    for index in range(2):  # autoencoder, discriminator
        for name, gradient in captured["whole"][index].items():
            mean = (captured["half"][index][name] + captured["half"][index + 2][name]) / 2
            torch.testing.assert_close(gradient, mean, rtol=1e-4, atol=1e-6 * float(mean.abs().max() + 1))


def test_codebook_usage_counts_the_whole_step() -> None:
    config = make_config(
        first_stage=dataclasses.replace(TINY, name="vq"),
        autoencoder_loss=dataclasses.replace(LOSS, discriminator_weight=0.0),
    )
    stage = make_stage(config)
    batch = make_batch()
    module = stage.module
    with torch.no_grad():
        used = module(to_unit_range(batch.pixels), None)["indices"].unique().numel()
    metrics = stage.train_step(batch, 0, 1e-4)
    assert float(metrics["codebook_usage"]) == pytest.approx(used / 16)
    assert 1.0 <= float(metrics["codebook_perplexity"]) <= used


def test_same_seed_same_networks_and_the_global_generator_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    first, second = build_autoencoder(make_config()), build_autoencoder(make_config())
    assert torch.equal(state, torch.random.get_rng_state())
    other = build_autoencoder(make_config(seed=1))
    for name in first:
        pairs = zip(first[name].parameters(), second[name].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert any(
            not torch.equal(a, b)
            for a, b in zip(first[name].parameters(), other[name].parameters(), strict=True)
        )


def test_a_preview_that_fails_leaves_the_network_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on after one that ran out of memory."""
    stage = make_stage(make_config())
    monkeypatch.setattr(stage.engines["autoencoder"].module, "decode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stage.preview(make_batch())
    assert stage.engines["autoencoder"].module.training


def test_preview_shows_reconstructions_under_originals() -> None:
    stage = make_stage(make_config())
    batch = make_batch(4)
    preview = stage.preview(batch)
    assert preview.columns == 4
    assert preview.pixels.dtype == torch.uint8
    assert torch.equal(preview.pixels[:4], batch.pixels)
    module = stage.module
    with torch.no_grad():
        expected = to_bytes(module.decode(module.latents(to_unit_range(batch.pixels), None)))
    assert torch.equal(preview.pixels[4:], expected)
    assert preview.captions == (*batch.captions, *["reconstruction"] * 4)
    assert module.training


@pytest.mark.parametrize("statistics", ["global", "channel"])
def test_finish_stores_unit_variance_statistics(statistics: str) -> None:
    loss = dataclasses.replace(LOSS, latent_statistics=statistics)
    stage = make_stage(make_config(autoencoder_loss=loss))
    batches = [make_batch(first=i) for i in range(0, 8, 4)]
    stage.finish(iter(batches))
    module = stage.module
    pixels = torch.cat([to_unit_range(b.pixels) for b in batches])
    with torch.no_grad():
        noise = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        latents = module.latents(pixels, noise)
    if statistics == "global":
        assert module.latent_shift.count_nonzero() == 0
        assert module.latent_scale.unique().numel() == 1
        assert float(latents.std()) == pytest.approx(1.0, abs=0.05)
    else:
        assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.1
        torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(3), atol=0.1, rtol=0)
    fresh = make_stage(make_config())
    fresh.load_state(stage.state())
    assert torch.equal(fresh.module.latent_scale, module.latent_scale)


def test_identity_cannot_be_trained() -> None:
    with pytest.raises(ConfigError, match="identity"):
        build_autoencoder(make_config(first_stage=FirstStageConfig(name="identity")))


def test_bf16_weights_train() -> None:
    distributed = DistributedConfig(engine="torch", precision="bf16", channels_last=True)
    config = make_config(
        distributed=distributed, autoencoder_loss=dataclasses.replace(LOSS, discriminator_start=3)
    )
    stage = make_stage(config)
    errors = [float(stage.train_step(make_batch(), i, 2e-3)["reconstruction"]) for i in range(12)]
    assert stage.module.latent_scale.dtype == torch.float32
    assert next(stage.module.parameters()).dtype == torch.bfloat16
    assert errors[-1] < errors[0]


@pytest.mark.parametrize(
    ("weighs", "codebook", "commitment"), [("commitment", 1.0, 0.25), ("codebook", 0.25, 1.0)]
)
def test_beta_weighs_the_term_that_the_configuration_says(
    weighs: str, codebook: float, commitment: float
) -> None:
    """Both terms are the same number; what differs is how fast entries and encoder move."""
    loss = dataclasses.replace(LOSS, codebook_weight=2.0, commitment_beta=0.25, beta_weighs=weighs)  # type: ignore[arg-type]
    first_stage = dataclasses.replace(TINY, name="vq")
    stage = make_stage(make_config(first_stage=first_stage, autoencoder_loss=loss))
    terms = {name: torch.tensor(0.5, requires_grad=True) for name in ("codebook", "commitment")}
    value, _ = stage._regulariser({"reconstruction": torch.zeros(1), **terms})
    value.backward()
    assert [float(terms[n].grad) for n in terms] == [2 * codebook, 2 * commitment]  # type: ignore[arg-type]


def test_dead_codes_move_to_encoder_outputs_and_only_those() -> None:
    loss = dataclasses.replace(LOSS, revive_codes_every=3, perceptual_weight=0.0, discriminator_weight=0.0)
    config = make_config(first_stage=dataclasses.replace(TINY, name="vq"), autoencoder_loss=loss)
    stage = make_stage(config)
    book = stage.module.quantize.embedding.weight  # type: ignore[union-attr]
    with torch.no_grad():
        book[5:] = 100.0  # out of reach: eleven of the sixteen entries
    stage.engines["autoencoder"].refresh()
    for step in range(2):
        assert stage.train_step(make_batch(first=4 * step), step, 1e-3)["codebook_revived"] == 0
    resumed = make_stage(config)  # what a checkpoint holds goes on
    for name, engine in resumed.engines.items():
        engine.module.load_state_dict(stage.engines[name].module.state_dict())
        engine.optimizer_steps = 2
        engine.refresh()
    resumed.load_state(stage.state())
    assert resumed.state()[IDLE_TENSOR][5:].tolist() == [2.0] * 11
    batch = make_batch(first=8)
    metrics = resumed.train_step(batch, 2, 0.0)
    assert metrics["codebook_revived"] == 4  # one for each sample
    weight = resumed.module.quantize.embedding.weight.detach()  # type: ignore[union-attr]
    assert (weight[9:] == 100.0).all()
    encoded = resumed.module.encode(to_unit_range(batch.pixels)).flatten(2)  # [B, z, h * w]
    for i in range(4):
        assert (encoded[i].T - weight[5 + i]).abs().sum(dim=1).min() < 1e-5
    assert resumed.state()[IDLE_TENSOR][5:9].tolist() == [0.0] * 4
    exported, _ = exported_statistics(resumed.state())
    assert IDLE_TENSOR not in exported
    for fragment in resumed.engines["autoencoder"].fragments():
        if fragment.name == ENTRIES:
            assert not fragment.moments["exp_avg"].view(-1, 3)[5:9].any()


def test_only_a_codebook_can_be_revived() -> None:
    with pytest.raises(ConfigError, match=r"revive_codes_every.*first_stage\.name=vq"):
        load_config(None, ["stage=autoencoder", "autoencoder_loss.revive_codes_every=5"])
