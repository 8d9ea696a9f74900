"""Validation inside a run: what it measures, that training does not notice it, and what is kept by it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import ReadFailed
from data_pipeline.feed import reads
from data_pipeline.loader import HELD_OUT_SEED
from data_pipeline.storage.large import checksum_bytes
from data_pipeline.tools.scenes.scene import NUM_CLASSES, SceneOptions
from data_pipeline.tools.scenes.write_shards import SynthesisOptions, synthesize
from trainer.__main__ import main
from trainer.assembly import build_run
from trainer.checkpoint.catalogue import checkpoints_url, folder_name, open_checkpoint, steps_found
from trainer.checkpoint.commands import list_checkpoints
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.reader import EngineReader
from trainer.cli import checkpoint as checkpoint_command
from trainer.config.io import load_config
from trainer.config.run import ConfigError
from trainer.diffusion.objective import draw_timesteps, loss_per_sample
from trainer.distributed.env import DistributedEnv
from trainer.doctor.inputs import check_samples
from trainer.evaluation.networks import FeatureOptions, build_networks
from trainer.evaluation.survey import ReconstructionDistance
from trainer.exit_codes import ExitCode
from trainer.metrics.jsonl import read_records
from trainer.pixels import to_unit_range
from trainer.reliability.watchdog import Watchdog
from trainer.report.figures import figures as report_figures
from trainer.report.figures import to_html
from trainer.rng import Purpose, normal, uniform
from trainer.run import Run
from trainer.train import run as train
from trainer.validation import validate

UNET = (
    "unet={model_channels: 8, channel_multipliers: [1], num_res_blocks: 1, attention_factors: [1], "
    "head_dim: 8, num_groups: 4}"
)
CLASSES = f"conditioning.class_label={{num_classes: {NUM_CLASSES}, width: 16, drop_probability: 0.5}}"
MEASURED = ["data.validation.share=0.4", "validation={every: 2, samples: 9, timesteps: 3}"]
OBJECTIVES = {
    "eps": [],
    "v, min-SNR": ["diffusion.prediction=v", "diffusion.min_snr_gamma=5"],
    "x0, offset noise": ["diffusion.prediction=x0", "diffusion.offset_noise=0.2"],
    "flow": ["diffusion.process=flow", "diffusion.prediction=velocity", "diffusion.weighting=cosmap"],
    "flow, mode": ["diffusion.process=flow", "diffusion.prediction=velocity", "diffusion.density=mode"],
    "edm": ["diffusion.process=edm", "diffusion.prediction=edm", "diffusion.density=log_normal"],
}


@pytest.fixture(scope="module", name="shards")
def shards_fixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 small pictures in 2 shards, with classes, layouts and maps."""
    folder = tmp_path_factory.mktemp("shards")
    scene = SceneOptions(max_objects=1, min_edge=20, max_edge=40)
    list(synthesize(str(folder), SynthesisOptions(samples=40, samples_per_shard=20, scene=scene, maps=True)))
    return f"{folder}/*.tar"


@pytest.fixture(name="settings")
def settings_fixture(shards: str, tmp_path: Path) -> Callable[..., list[str]]:
    def make(*more: str, name: str = "run", steps: int = 4) -> list[str]:
        return [
            f"run_dir={tmp_path / name}",
            f"steps={steps}",
            f"data={{shards: '{shards}', image_size: 16, workers: 0}}",
            "global_batch_size=4",
            "micro_batch_size=2",
            "first_stage.name=identity",
            UNET,
            "optimizer.learning_rate=1e-3",
            "ema.decay=0.5",
            "distributed={engine: torch, precision: fp32, channels_last: false, watchdog_s: 0}",
            "checkpoint={asynchronous: false, every: 2}",
            "logging={every: 1, wandb: disabled, progress_bar: false}",
            *more,
        ]

    return make


def run_it(settings: list[str]) -> list[dict[str, Any]]:
    """Train, and give back all records."""
    config = load_config(None, settings)
    assert train(config, DistributedEnv.detect({})) == ExitCode.DONE
    lines = (Path(config.run_dir) / "logs" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def validations(records: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    timed = ("time", "validation/seconds")
    return {
        record["step"]: {key: value for key, value in record.items() if key not in timed}
        for record in records
        if "validation/samples" in record
    }


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in records if "loss" in record]


def weights(run_dir: Path) -> torch.Tensor:
    """Masters, moments and averages of the newest checkpoint."""
    folder = checkpoints_url(str(run_dir))
    handle = open_checkpoint(f"{folder}/{folder_name(steps_found(folder)[0])}")
    (engine,) = handle.manifest.shapes
    reader, names = EngineReader(handle, engine), sorted(handle.manifest.shapes[engine])
    whole = [reader.whole(kind, names) for kind in handle.manifest.kinds[engine]]
    return torch.cat([kind[name].flatten() for kind in whole for name in names])


def opened(settings: list[str]) -> Run:
    return build_run(load_config(None, settings), DistributedEnv.detect({}))


def test_the_first_start_tells_how_far_the_indexing_of_both_sets_is(
    settings: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scene = SceneOptions(max_objects=1, min_edge=20, max_edge=28)
    for name, shards in (("trained", 3), ("measured", 2)):
        list(
            synthesize(str(tmp_path / name), SynthesisOptions(10 * shards, samples_per_shard=10, scene=scene))
        )
    given = [
        f"data={{shards: '{tmp_path}/trained', image_size: 16, workers: 0}}",
        f"data.validation.shards={tmp_path}/measured",
        "validation={every: 1, samples: 4, timesteps: 1}",
    ]
    signs: list[int] = []

    def start() -> list[str]:
        """What the start shows of its bars; `signs` gets the signs of life."""
        signs.append(0)

        def alive() -> None:
            signs[-1] += 1

        build_run(load_config(None, settings(*given)), DistributedEnv.detect({}), alive=alive).close()
        lines = capfd.readouterr().err.replace("\r", "\n").splitlines()
        return [line.partition(" [")[0][-3:] for line in lines if line.startswith("indexing")]

    assert start()[-1] == "2/2"
    assert start() == []  # no bar without work
    assert signs == [4 + 3, 1 + 1]  # none, then each of the shards; and that all are there


def test_training_does_not_notice(settings: Any, tmp_path: Path) -> None:
    """The same samples are held out, measured at every step or never: the runs are one, to the bit."""
    held_out = ["data.validation.share=0.4", CLASSES, "unet.dropout=0.2"]
    often = [*held_out, "validation={every: 1, samples: 9, timesteps: 3}"]
    with_it = run_it(settings(*often, name="with"))
    without = run_it(settings(*held_out, name="without"))
    assert len(validations(with_it)) == 4
    assert not validations(without)
    assert losses(with_it) == losses(without)
    assert torch.equal(weights(tmp_path / "with"), weights(tmp_path / "without"))


def test_it_has_a_phase_of_its_own_before_the_watchdog(settings: Any) -> None:
    """A beat before each batch and one at the end: 9 samples in batches of 2, twice."""
    seen: list[tuple[int, str]] = []

    class Listening(Watchdog):
        def beat(self, step: int, phase: Any = "step") -> None:
            seen.append((step, phase))

    run = opened(settings(*MEASURED))
    try:
        validate(run, Listening(0))
    finally:
        run.close()
    assert seen == [(0, "validation")] * 12


def test_a_run_that_resumes_has_the_same_figures(settings: Any) -> None:
    """Of weights that learned under dropout, whose masks are those of the step."""
    asked = (*MEASURED, CLASSES, "unet.dropout=0.2")
    whole = validations(run_it(settings(*asked, name="whole", steps=6)))
    run_it(settings(*asked, name="parts", steps=2))
    parts = validations(run_it(settings(*asked, name="parts", steps=6)))
    assert list(whole) == [2, 4, 6]
    assert parts == whole


def test_the_last_step_is_measured(settings: Any) -> None:
    assert list(validations(run_it(settings(*MEASURED, steps=3)))) == [2, 3]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_that_of_the_objective_at_fixed_noise(settings: Any, objective: str) -> None:
    """A network whose last convolution is zero predicts zero, so the loss follows from the draws alone."""
    run = opened(settings(*MEASURED, *OBJECTIVES[objective]))
    try:
        validate(run, Watchdog(0))
        figures = run.measured[1]
        expected = torch.stack([_loss_of_zero(run, sample) for sample in range(9)])  # [N, levels]
    finally:
        run.close()
    assert figures["validation/loss"] == pytest.approx(float(expected.mean()), rel=1e-5)
    deviation = float(expected.mean(dim=1).std()) / 3
    assert figures["validation/loss_stderr"] == pytest.approx(deviation, rel=1e-4)
    by_noise = expected.mean(dim=0)
    by_noise = by_noise.flip(0) if "mode" in objective else by_noise
    for level in range(3):
        assert figures[f"validation/bin_{level}"] == pytest.approx(float(by_noise[level]), rel=1e-5)


def _loss_of_zero(run: Run, sample: int) -> torch.Tensor:
    """[levels] losses of one held-out sample."""
    from data_pipeline.loader import held_out_batches

    assert run.held_out is not None
    config, stage = run.config, run.stage
    (made,) = held_out_batches(run.held_out, [(sample,)])
    latents, ordinals = to_unit_range(made.batch.pixels), made.batch.ordinals
    uniforms = uniform(HELD_OUT_SEED, ordinals, Purpose.TIMESTEP, (3,))
    shifts = normal(HELD_OUT_SEED, ordinals, Purpose.OFFSET_NOISE, (3, 3))
    found = []
    for level in range(3):
        # a third of [0, 1) each, by the definition of the quantile of (level + u) / 3
        even = config.diffusion.__class__(**{**vars(config.diffusion), "timesteps": "stratified"})
        timesteps = draw_timesteps(even, uniforms[:, level], torch.tensor([level]), 3)
        noise = normal(HELD_OUT_SEED, ordinals, Purpose.VALIDATION + level, tuple(latents.shape[1:]))
        noise = noise + config.diffusion.offset_noise * shifts[:, level, :, None, None]
        zero = torch.zeros_like(latents)
        found.append(
            loss_per_sample(
                config.diffusion,
                stage._process,
                zero,
                latents,
                noise,
                timesteps,  # type: ignore[attr-defined]
            )
        )
    return torch.cat(found).double()


@pytest.mark.parametrize(
    "condition",
    [
        f"conditioning.layout={{num_labels: {NUM_CLASSES}, max_boxes: 2, grid: 16, width: 16, layers: 1, "
        "heads: 2}",
        f"conditioning.semantic_map={{num_labels: {NUM_CLASSES + 1}}}",
        "conditioning.depth={}",
        "conditioning.image_size={width: 8}",
        "conditioning.openclip={model: ViT-B-32, pretrained: random, width: 64, layers: 1, heads: 2, "
        "layer: last, context_length: 16, drop_probability: 0.9}",
    ],
)
def test_every_condition_is_measured_without_being_dropped(settings: Any, condition: str) -> None:
    run = opened(settings(*MEASURED, condition))
    try:
        validate(run, Watchdog(0))
        first = run.measured[1]
        assert math.isfinite(first["validation/loss"])
        run.state.step += 1  # another step, the same weights: nothing is drawn anew
        validate(run, Watchdog(0))
        assert run.measured == (1, first)
    finally:
        run.close()


def test_pictures_of_several_shapes_are_measured_in_batches_of_one(settings: Any) -> None:
    buckets = ["data.buckets=true", "data.bucket_step=4", "data.allow_enlarging=true", "data.lanes=1"]
    flow = [*OBJECTIVES["flow"], "diffusion.shift=2", "diffusion.shift_pixels=16"]
    found = []
    for micro in (1, 2, 4):
        run = opened(settings(*MEASURED, *buckets, *flow, f"micro_batch_size={micro}", name=f"run{micro}"))
        try:
            assert run.held_out is not None
            assert len({sample.shape for sample in run.held_out.samples}) > 1
            validate(run, Watchdog(0))
        finally:
            run.close()
        found.append(run.measured[1])
    assert found[0]["validation/samples"] == 9
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-6)


def test_a_loss_that_is_no_number_is_said_and_ends_nothing(settings: Any, caplog: Any) -> None:
    run = opened(settings(*MEASURED))
    try:
        for fragment in run.stage.engines["unet"].fragments():
            fragment.master.fill_(math.nan)
        run.stage.engines["unet"].refresh()
        with caplog.at_level(logging.WARNING):
            validate(run, Watchdog(0))
        figures = run.measured[1]
        run.save()
    finally:
        run.close()
    assert math.isnan(figures["validation/raw_loss"])
    assert math.isfinite(figures["validation/loss"]), "the averages are whole"
    assert "not finite: raw_loss" in caplog.text
    events = (Path(run.config.run_dir) / "logs" / "metrics.jsonl").read_text()
    assert '"event": "validation not finite"' in events
    stored = open_checkpoint(str(Path(run.config.run_dir) / "checkpoints" / folder_name(0))).manifest
    assert "validation/raw_loss" not in stored.metrics  # and never the best
    assert stored.metrics["validation/loss"] == figures["validation/loss"]


def test_samples_that_cannot_be_read_for_now_leave_the_measurement_out(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> bytes:
        raise ReadFailed("the bucket is away")

    run = opened(settings(*MEASURED))
    try:
        monkeypatch.setattr(reads.MemberReads, "_bytes", fail)
        validate(run, Watchdog(0))
        assert run.measured == (-1, {})
    finally:
        run.close()
    lines = (Path(run.config.run_dir) / "logs" / "metrics.jsonl").read_text().splitlines()
    (event,) = [json.loads(line) for line in lines if "validation left out" in line]
    assert event["reason"] == "the bucket is away"


AUTOENCODER = [
    "stage=autoencoder",
    "first_stage={name: vq, base_channels: 8, channel_multipliers: [1, 2], num_res_blocks: 1, "
    "latent_channels: 3, codebook_size: 16, num_groups: 4}",
    "autoencoder_loss={perceptual_weight: 0.1, perceptual_weights: random, discriminator_weight: 0}",
]


def test_a_first_stage_is_measured_by_its_reconstructions(settings: Any) -> None:
    records = run_it(settings(*MEASURED, *AUTOENCODER))
    figures = validations(records)[4]
    for name in ("reconstruction", "psnr", "ssim", "random_features"):
        assert math.isfinite(figures[f"validation/{name}"])
        assert math.isfinite(figures[f"validation/raw_{name}_stderr"])
    assert 1 / 16 <= figures["validation/codebook_usage"] <= 1
    assert 1 <= figures["validation/codebook_perplexity"] <= 16
    assert "validation/loss" not in figures


def test_the_distance_of_reconstructions_is_that_of_the_command(
    settings: Any, shards: str, tmp_path: Path
) -> None:
    """The same pictures through the same weights: R-FID of the run's end and of what it exports."""
    own = tmp_path / "own"
    scene = SceneOptions(max_objects=1, min_edge=20, max_edge=40)
    list(synthesize(str(own), SynthesisOptions(samples=21, failed_share=0.0, scene=scene)))
    measured = [
        f"data.validation.shards={own}/*.tar",
        "validation={every: 2, samples: 100, features: random}",
    ]
    records = run_it(settings(*measured, *AUTOENCODER, "optimizer.learning_rate=0.05"))
    figures = validations(records)[4]
    assert figures["validation/samples"] == 21
    assert figures["measured_by"]["networks"].keys() == {"random"}
    assert "measured_by" not in records[0], "a record of the training loss, which no network measures"
    weights, out = str(tmp_path / "first_stage.safetensors"), tmp_path / "figures.json"
    assert main(["export", str(tmp_path / "run"), weights]) == 0
    words = ["--shards", f"{own}/*.tar", "--image-size", "16", "--perceptual-weights", "none"]
    words += ["--features", "random", "--out", str(out)]
    assert main(["evaluate", "reconstruction", weights, *words]) == 0
    found = json.loads(out.read_text())
    assert found["pictures"] == 21
    assert found["feature_networks"] == figures["measured_by"]["networks"]
    name, digest, _ = found["feature_networks"]["random"]
    drawn = report_figures(read_records(str(tmp_path / "run")))
    assert len(drawn["Validation: rfd_random"].data) == 2, "by the averages and by the trained weights"
    assert f"<p>measured by {name}, weights {digest[:16]}, " in to_html(drawn["Validation: rfd_random"])
    assert "measured by" not in to_html(drawn["Validation: psnr"])
    for name in ("rfd_random", "psnr"):
        assert figures[f"validation/{name}"] == pytest.approx(found[name], rel=1e-4)
    assert figures["validation/raw_rfd_random"] != pytest.approx(found["rfd_random"], rel=1e-3)


@pytest.mark.parametrize(
    ("metric", "best"),
    [("validation/psnr", max), ("validation/reconstruction", min), ("validation/rfd_random", min)],
)
def test_the_best_checkpoints_by_a_metric_are_kept(
    settings: Any, tmp_path: Path, capsys: Any, metric: str, best: Any
) -> None:
    records = run_it(
        settings(
            *MEASURED,
            *AUTOENCODER,
            "validation.every=1",
            "validation.features=random",
            "checkpoint={asynchronous: false, every: 1, keep_last: 1, keep_best: 1}",
            f"checkpoint.best_metric={metric}",
            "optimizer={learning_rate: 0.05}",
            steps=6,
        )
    )
    found = {step: record[metric] for step, record in validations(records).items()}
    wanted = {max(found), best(found, key=lambda step: (found[step], step))}
    rows = list_checkpoints(str(tmp_path / "run"))
    assert {row.step for row in rows} == wanted
    for row in rows:
        assert (row.best_metric, row.merit) == (metric, found[row.step])
    parser = __import__("argparse").ArgumentParser()
    checkpoint_command.add_arguments(parser)
    capsys.readouterr()
    checkpoint_command.run(parser.parse_args(["list", str(tmp_path / "run")]))
    assert f"{metric} {found[6]:>9.4g}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["validation.every=5"], "nothing is held out to be measured; set data.validation.share"),
        (["data.validation={share: 0.1, shards: /x/*.tar}"], "not both"),
        (["data.validation.share=0.7"], "data.validation.share=0.7 must be at least 0 and at most 0.5"),
        (["checkpoint.best_metric=validation/loss"], "which is off; set validation.every"),
        ([*MEASURED, "checkpoint.best_metric=validation/psnr"], "choose one of loss, validation/loss"),
        ([*MEASURED, "checkpoint.best_metric=fid"], "nothing that this run records"),
        (
            [*MEASURED, "validation.every=3", "checkpoint.best_metric=validation/loss"],
            "make one of checkpoint.every and validation.every a multiple of the other",
        ),
        ([*MEASURED, "validation.features=random"], "with stage=diffusion leave it out"),
        (["validation.features=random"], "which is off; set validation.every"),
        ([*MEASURED, "validation.features_weights=/x"], "set validation.features"),
        (
            [*MEASURED, *AUTOENCODER, "validation.features=dinov2"],
            "name its path or URL in validation.features_weights",
        ),
        ([*MEASURED, "ema.decay=0", "checkpoint.best_metric=validation/raw_loss"], "choose one of loss"),
    ],
)
def test_contradictions_are_refused(settings: Any, more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, settings(*more))


def test_features_whose_file_is_not_at_hand_end_the_start_in_a_sentence(
    settings: Any, tmp_path: Path
) -> None:
    more = ["validation.features=inception", f"validation.features_weights={tmp_path / 'none.pth'}"]
    with pytest.raises(ConfigError, match=r"none\.pth"):
        run_it(settings(*MEASURED, *AUTOENCODER, *more))


def test_a_distance_of_too_few_or_of_no_numbers_is_none() -> None:
    cpu = torch.device("cpu")
    networks = build_networks(FeatureOptions(families=("random",)), cpu)
    distance = ReconstructionDistance(networks, cpu)
    pictures = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    distance.see(pictures[:1], pictures[:1])
    assert math.isnan(distance.over_ranks()["rfd_random"])
    networks["random"]._body[0].weight.data.fill_(math.nan)  # type: ignore[attr-defined]
    distance.see(pictures, pictures)
    assert math.isnan(distance.over_ranks()["rfd_random"])


def test_the_doctor_says_what_is_measured_and_what_cannot_be(settings: Any) -> None:
    env = DistributedEnv.detect({})
    (good,) = check_samples(load_config(None, settings(*MEASURED)), env)
    assert good.passed
    assert good.detail.endswith("; 9 held out are measured")
    (bad,) = check_samples(load_config(None, settings(*MEASURED, "data.validation.share=1e-9")), env)
    assert not bad.passed
    assert "raise data.validation.share" in bad.detail


def test_manifests_of_before_have_the_training_loss_alone(settings: Any, tmp_path: Path) -> None:
    run_it(settings(*MEASURED, steps=2))
    new = open_checkpoint(str(tmp_path / "run" / "checkpoints" / folder_name(2))).manifest
    assert new.value("validation/loss") == new.metrics["validation/loss"]
    body = json.loads(new.to_bytes())
    for name in ("metrics", "best_metric", "checksum"):
        del body[name]
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    old = Manifest.from_bytes(json.dumps({**body, "checksum": checksum_bytes(text.encode())}).encode())
    assert (old.best_metric, old.metrics) == ("loss", {})
    assert old.value("loss") == new.loss
    assert old.value("validation/loss") is None


def test_another_share_is_another_run(settings: Any) -> None:
    run_it(settings(*MEASURED, steps=2))
    with pytest.raises(ConfigError, match=r"data\.validation\.share was 0\.4, is 0\.2"):
        run_it(settings(*MEASURED, "data.validation.share=0.2", steps=4))
    run_it(
        settings(*MEASURED, "data.validation.share=0.2", "resume_changed=[data.validation.share]", steps=4)
    )
