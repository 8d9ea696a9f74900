"""First-stage objective against closed forms and finite differences."""

from __future__ import annotations

import math

import lpips
import pytest
import torch
import torch.nn.functional as F

from trainer.config.models import FirstStageConfig
from trainer.first_stage import losses
from trainer.first_stage.autoencoders import AutoencoderKL, VectorQuantizer, kl_divergence, split_moments
from trainer.first_stage.losses import BatchNorm, PatchDiscriminator
from trainer.first_stage.perceptual import (
    PerceptualDistance,
    VGG16Features,
    _lpips_weights,
    load_perceptual,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_kl_equals_torch_distributions() -> None:
    moments = torch.randn(3, 8, 5, 5, generator=generator())
    mean, logvar = split_moments(moments)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(kl_divergence(mean, logvar), expected.sum(dim=(1, 2, 3)))
    assert torch.equal(kl_divergence(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)), torch.zeros(1))


def test_log_variance_is_clamped() -> None:
    moments = torch.cat([torch.zeros(1, 2, 1, 1), torch.tensor([-1e3, 1e3]).view(1, 2, 1, 1)], dim=1)
    assert split_moments(moments)[1].flatten().tolist() == [-30.0, 20.0]


def test_posterior_samples_have_the_posteriors_moments() -> None:
    module = AutoencoderKL(FirstStageConfig(base_channels=4, channel_multipliers=(1,), num_res_blocks=1))
    moments = torch.randn(1, 8, 1, 1, generator=generator())
    noise = torch.randn(40_000, 4, 1, 1, generator=generator(1))
    samples = module.sample(moments.expand(40_000, -1, -1, -1), noise)
    first, second = module.second_moment(moments)
    torch.testing.assert_close(samples.mean(dim=0), first[0], atol=0.05, rtol=0.03)
    torch.testing.assert_close(samples.square().mean(dim=0), second[0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("reduction", "count"), [("sum", 3 * 4 * 4), ("mean", 1)])
def test_likelihood_is_a_sum_per_sample_or_a_mean(reduction: str, count: int) -> None:
    error = torch.rand(2, 3, 4, 4, generator=generator())
    perceptual = torch.tensor([0.5, 1.5])
    logvar = torch.tensor(0.7)
    nll = losses.negative_log_likelihood(error, perceptual, logvar, reduction=reduction)  # type: ignore[arg-type]
    expected = count * ((error.mean() + 1.0) / math.exp(0.7) + 0.7)
    torch.testing.assert_close(nll, expected)


def test_the_best_log_variance_is_the_log_of_the_error() -> None:
    error = torch.rand(2, 3, 4, 4, generator=generator())
    logvar = error.mean().log().requires_grad_()
    losses.negative_log_likelihood(error, torch.zeros(2), logvar, reduction="mean").backward()
    assert logvar.grad is not None
    assert abs(float(logvar.grad)) < 1e-6


def test_discriminator_losses_in_closed_form() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.25])
    hinge = losses.discriminator_loss(real, fake, "hinge")
    assert float(hinge) == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0 + 1.25) / 2))
    vanilla = losses.discriminator_loss(real, fake, "vanilla")
    labels = F.binary_cross_entropy_with_logits
    expected = 0.5 * (labels(real, torch.ones(2)) + labels(fake, torch.zeros(2)))
    torch.testing.assert_close(vanilla, expected)
    assert float(losses.generator_loss(fake)) == pytest.approx(1.375)


def test_adaptive_weight_is_the_ratio_of_last_layer_gradients() -> None:
    features = torch.randn(2, 5, 8, 8, generator=generator())
    weight = torch.randn(3, 5, 3, 3, generator=generator(1)).requires_grad_()
    picture = F.conv2d(features, weight, padding=1)
    target = torch.randn(2, 3, 8, 8, generator=generator(2))
    nll = (picture - target).abs().sum() / 2
    adversarial = 0.1 * picture.square().mean()
    by_weight = [torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (nll, adversarial)]
    by_picture = [torch.autograd.grad(x, picture, retain_graph=True)[0] for x in (nll, adversarial)]
    for direct, indirect in zip(by_weight, by_picture, strict=True):
        torch.testing.assert_close(losses.last_layer_gradient(features, indirect), direct)
    expected = by_weight[0].norm() / (by_weight[1].norm() + 1e-4)
    torch.testing.assert_close(losses.adaptive_weight(features, *by_picture), expected)
    # By finite differences of the adversarial loss along its own gradient.
    norm = by_weight[1].norm()
    direction = by_weight[1] / norm
    with torch.no_grad():
        values = [
            0.1 * F.conv2d(features.double(), (weight + s * direction).double(), padding=1).square().mean()
            for s in (1e-3, -1e-3)
        ]
    assert float((values[0] - values[1]) / 2e-3) == pytest.approx(float(norm), rel=1e-3)


def test_adaptive_weight_is_clamped() -> None:
    features = torch.ones(1, 1, 4, 4)
    weight = losses.adaptive_weight(features, 1e6 * torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))
    assert float(weight) == 1e4


def test_codebook_usage_and_perplexity() -> None:
    usage, perplexity = losses.codebook_usage(torch.tensor([5, 5, 0, 0]))
    assert (float(usage), float(perplexity)) == (0.5, pytest.approx(2.0))
    usage, perplexity = losses.codebook_usage(torch.tensor([7, 0, 0, 0]))
    assert (float(usage), float(perplexity)) == (0.25, pytest.approx(1.0))


def test_quantiser_picks_the_nearest_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    quantiser = VectorQuantizer(50, 3)
    with torch.no_grad():
        quantiser.embedding.weight.copy_(torch.randn(50, 3, generator=generator()))
    z = torch.randn(2, 3, 4, 6, generator=generator(1))
    points = z.permute(0, 2, 3, 1).reshape(-1, 3)
    expected = torch.cdist(points, quantiser.embedding.weight).argmin(dim=1).view(2, 4, 6)
    result = quantiser(z)
    assert torch.equal(result.indices, expected)
    entries = quantiser.embedding.weight[expected].permute(0, 3, 1, 2)
    torch.testing.assert_close(result.latents, entries)
    distance = (z - entries).square().mean()
    torch.testing.assert_close(result.codebook_loss, distance)
    torch.testing.assert_close(result.commitment_loss, distance)
    monkeypatch.setattr("trainer.first_stage.autoencoders.DISTANCES_AT_ONCE", 150)
    assert torch.equal(quantiser(z).indices, expected)


def test_quantiser_gradients_go_where_they_should() -> None:
    quantiser = VectorQuantizer(8, 3)
    z = torch.randn(1, 3, 2, 2, generator=generator(), requires_grad=True)
    weight = quantiser.embedding.weight
    result = quantiser(z)
    upstream = torch.randn(1, 3, 2, 2, generator=generator(1))
    straight = torch.autograd.grad((result.latents * upstream).sum(), (z, weight), allow_unused=True)
    assert straight[0] is not None
    torch.testing.assert_close(straight[0], upstream)  # as if quantising were the identity
    assert straight[1] is None or not straight[1].any()
    codebook = torch.autograd.grad(result.codebook_loss, (z, weight), retain_graph=True, allow_unused=True)
    assert codebook[0] is None
    assert codebook[1].any()
    commitment = torch.autograd.grad(result.commitment_loss, (z, weight), allow_unused=True)
    assert commitment[0].any()
    assert commitment[1] is None


def test_codebook_loss_alone_pulls_entries_onto_their_points() -> None:
    quantiser = VectorQuantizer(1, 2)
    z = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)
    optimizer = torch.optim.SGD(quantiser.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        quantiser(z).codebook_loss.backward()
        optimizer.step()
    torch.testing.assert_close(quantiser.embedding.weight.detach(), z.view(1, 2), rtol=1e-4, atol=1e-4)


def test_batch_statistics_are_those_of_each_part() -> None:
    norm = BatchNorm(4)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=generator())
    reference = torch.nn.BatchNorm2d(4).train()
    reference.weight.data.copy_(norm.weight)
    x = torch.randn(6, 4, 5, 5, generator=generator(1)) * torch.tensor([1.0, 9.0]).repeat_interleave(3).view(
        6, 1, 1, 1
    )
    expected = torch.cat([reference(x[:3]), reference(x[3:])])
    torch.testing.assert_close(norm(x, 2), expected)
    assert not torch.allclose(norm(x, 1), expected, atol=0.1)


def test_discriminator_judges_parts_as_if_alone() -> None:
    judge = PatchDiscriminator(channels=8, num_layers=2)
    real, fake = torch.randn(2, 2, 3, 32, 32, generator=generator())
    together = judge(torch.cat([real, fake]), parts=2)
    torch.testing.assert_close(together, torch.cat([judge(real), judge(fake)]), rtol=1e-4, atol=1e-5)
    assert dict(judge.named_buffers()) == {}


def test_discriminator_has_the_size_and_patch_grid_of_pix2pix() -> None:
    with torch.device("meta"):
        judge = PatchDiscriminator(channels=64, num_layers=3)
        assert sum(p.numel() for p in judge.parameters()) == 2_765_633
        assert judge(torch.empty(2, 3, 256, 256)).shape == (2, 1, 30, 30)


def same_network_as_lpips() -> tuple[PerceptualDistance, lpips.LPIPS]:
    """Our distance and the lpips package's on the same random VGG16, with the package's layer weights."""
    torch.manual_seed(0)
    reference = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    network = VGG16Features()
    theirs = [m for m in reference.net.modules() if isinstance(m, torch.nn.Conv2d)]
    ours = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    for a, b in zip(ours, theirs, strict=True):
        a.load_state_dict(b.state_dict())
    return PerceptualDistance(network, _lpips_weights(), "test", is_lpips=True), reference


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_distance_and_gradient_equal_the_lpips_package() -> None:
    # In fp64: a ReLU that rounding turns on in one of them moves an fp32 gradient by a per cent.
    ours, reference = (network.double() for network in same_network_as_lpips())
    first = (torch.rand(2, 3, 32, 32, generator=generator()).double() * 2 - 1).requires_grad_()
    second = torch.rand(2, 3, 32, 32, generator=generator(1)).double() * 2 - 1
    mine, theirs = ours(first, second), reference(first, second).flatten()
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=0)
    gradients = [torch.autograd.grad(x.sum(), first)[0] for x in (mine, theirs)]
    scale = float(gradients[1].abs().max())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-8 * scale)


def test_perceptual_gradient_by_finite_differences() -> None:
    distance = load_perceptual("random").double()
    first = (torch.rand(1, 3, 32, 32, generator=generator(), dtype=torch.float64) * 2 - 1).requires_grad_()
    second = torch.rand(1, 3, 32, 32, generator=generator(1), dtype=torch.float64) * 2 - 1
    direction = torch.randn(first.shape, generator=generator(2), dtype=torch.float64)

    def value(x: torch.Tensor) -> torch.Tensor:
        return distance(x, second).sum()

    (gradient,) = torch.autograd.grad(value(first), first)
    step = 1e-6
    with torch.no_grad():
        slope = (value(first + step * direction) - value(first - step * direction)) / (2 * step)
    assert float(gradient.norm()) > 0
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-4)


def test_perceptual_distance_follows_the_pictures() -> None:
    distance = load_perceptual("random")
    picture = torch.rand(2, 3, 32, 32, generator=generator()) * 2 - 1
    noise = torch.randn(picture.shape, generator=generator(1))
    near, far = distance(picture, picture + 0.05 * noise), distance(picture, picture + 0.5 * noise)
    assert torch.equal(distance(picture, picture), torch.zeros(2))
    assert (near > 0).all()
    assert (far > 2 * near).all()


def test_flat_pictures_give_finite_gradients() -> None:
    """Where every channel of a feature is 0 the normalisation must not divide 0 by 0."""
    distance = load_perceptual("random")
    with torch.no_grad():
        for parameter in distance.network.parameters():
            parameter.zero_()
    picture = torch.zeros(1, 3, 16, 16, requires_grad=True)
    distance(picture, torch.ones(1, 3, 16, 16)).sum().backward()
    assert picture.grad is not None
    assert torch.isfinite(picture.grad).all()
