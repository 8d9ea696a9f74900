"""How a run trains: objective, losses, optimizer, EMA, distribution, checkpoints, logging. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from data_pipeline.config import number

Prediction = Literal["eps", "v", "x0", "velocity", "edm"]
"""What a network may predict; trainer/diffusion/parameterization.py has the formulas."""

SamplerName = Literal[
    "ddpm", "ddim", "plms", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_sde", "unipc"
]


Spacing = Literal["leading", "trailing", "karras"]
"""Which noise levels a sampler visits."""


@dataclass(frozen=True)
class DiffusionConfig:
    """Which noise level is drawn, how it noises, what is predicted and how that is weighted.

    (Ho et al. 2020; LDM paper, section 3.2; as flow Esser et al. 2024, as edm Karras et al. 2022.)
    """

    num_timesteps: int = number(1000, least=2, most=10**6)
    """T: number of discrete noise levels; at time t of a flow the UNet is told T t."""
    beta_schedule: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"
    """scaled_linear is linear in sqrt(beta), which CompVis configs call "linear"."""
    beta_start: float = number(0.00085, least=0, below=1)
    """First beta."""
    beta_end: float = number(0.012, above=0, below=1)
    """Last beta."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last step is pure noise (Lin et al. 2023); needs v prediction."""
    prediction: Prediction = "eps"
    """What the UNet predicts; velocity (eps - x0, or x0) belongs to flow, edm to edm."""
    loss: Literal["l2", "l1", "huber"] = "l2"
    """Distance between prediction and target, averaged per sample."""
    huber_delta: float = number(0.1, above=0, most=10**6)
    """Where huber turns from quadratic to linear."""
    min_snr_gamma: float | None = number(None, above=0, most=10**6)
    """Min-SNR loss weighting (Hang et al. 2023) with this gamma; unset: unweighted."""
    offset_noise: float = number(0.0, least=0, most=100)
    """Strength of a per-channel constant added to the noise."""
    timesteps: Literal["uniform", "stratified"] = "uniform"
    """stratified: the draws of one global batch are spread evenly over the density."""
    process: Literal["discrete", "flow", "edm"] = "discrete"
    """How latents are noised: discrete by the levels of a beta schedule, flow as (1 - t) x0 + t eps
    (rectified flow), edm as x0 + sigma eps with preconditioning."""
    density: Literal["uniform", "logit_normal", "mode", "cosmap", "log_normal"] = "uniform"
    """Law of the drawn timestep in (0, 1) (Esser et al. 2024, section 3.1); log_normal: of edm's sigma."""
    density_mean: float | None = number(None, least=-20, most=20)
    """Mean of ln(t / (1 - t)) or ln(sigma); unset: 0 for logit_normal, ln(2 sigma_data) - 1.2 for log_normal,
    which is -1.2 at the paper's sigma_data (EDM2: ln(2 sigma_data) - 0.4)."""
    density_std: float | None = number(None, above=0, most=20)
    """Its deviation; unset: 1 for logit_normal, 1.2 for log_normal (EDM2: 1)."""
    mode_scale: float = number(1.29, least=-1, most=2 / (math.pi - 2))
    """s of the mode density: above 0 more of the middle, below 0 more of the ends."""
    shift: float = number(1.0, above=0, most=1000)
    """Moves a flow to more noise, t -> a t / (1 + (a - 1) t), in training and sampling (SD3 at 1024: 3)."""
    shift_pixels: int | None = number(None, least=1, most=10**6)
    """Edge of a picture at which the shift is `shift`; at others it grows with the edge. Unset: at all."""
    weighting: Literal["uniform", "sigma_sqrt", "cosmap"] = "uniform"
    """Weight of a velocity's error at time t: 1, 1 / t^2, or 2 / (pi (1 - 2 t + 2 t^2))."""
    sigma_data: float = number(1.0, above=0, most=10**4)
    """Deviation of the latents, for edm's preconditioning: 1, since they are scaled so (pixels: 0.5)."""
    sigma_min: float = number(0.002, above=0, most=10**4)
    """Lowest sigma that edm samples at."""
    sigma_max: float = number(80.0, above=0, most=10**6)
    """Highest sigma that edm samples at."""
    learned_uncertainty: bool = False
    """Learn beside the UNet how well each noise level can be predicted, e^u, and weigh its loss by e^-u."""


@dataclass(frozen=True)
class AutoencoderLossConfig:
    """First-stage objective (LDM paper, section G; Esser et al. 2021)."""

    reconstruction: Literal["l1", "l2"] = "l1"
    """Pixel distance."""
    perceptual_weight: float = number(1.0, least=0, most=10**6)
    """Weight of LPIPS; 0 switches it off."""
    perceptual_weights: str | None = None
    """Weights of LPIPS' network, torchvision's VGG16: a file or URL; unset: torchvision's copy in torch's
    cache, and refused where there is none; the word random: a random-feature network, which is not LPIPS."""
    kl_weight: float = number(1e-6, least=0, most=10**6)
    """Weight of the KL term, summed per sample (kl)."""
    codebook_weight: float = number(1.0, least=0, most=10**6)
    """Weight of the codebook loss (vq)."""
    commitment_beta: float = number(0.25, least=0, most=10**6)
    """Relative weight of one part of the codebook loss (vq): of which, `beta_weighs` says."""
    beta_weighs: Literal["commitment", "codebook"] = "commitment"
    """commitment: beta holds the encoder's outputs to the entries (van den Oord et al. 2017, equation 3);
    codebook: it moves the entries, as taming-transformers' default did, with which the published LDM first
    stages were trained."""
    revive_codes_every: int = number(0, least=0, most=10**12)
    """Every so many optimizer steps, codebook entries that nothing chose meanwhile move to encoder outputs
    (vq), at most one for each sample of the global batch; 0: dead entries stay dead."""
    learned_logvar: bool = False
    """Learn one log variance of the reconstruction error, with the generator's optimizer."""
    logvar_init: float = number(0.0, least=-100, most=100)
    """Initial (or constant) log variance."""
    discriminator_weight: float = number(0.5, least=0, most=10**6)
    """Weight of the adversarial term; 0 trains without a discriminator."""
    discriminator_start: int = number(50_001, least=0, most=10**12)
    """Generator steps before the discriminator takes part."""
    discriminator_loss: Literal["hinge", "vanilla"] = "hinge"
    """Adversarial loss."""
    discriminator_channels: int = number(64, least=1, most=2**16)
    """Channels of the first PatchGAN layer."""
    discriminator_layers: int = number(3, least=0, most=16)
    """Strided layers of the PatchGAN."""
    adaptive_weight: bool = True
    """Scale the adversarial term by the ratio of last-layer gradient norms (VQGAN, equation 7)."""
    latent_statistics: Literal["global", "channel"] = "global"
    """What is stored with the weights: one scale (1 / std over everything), or per-channel mean and std."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, Muon or Adafactor with warm-up. Rates are final: nothing is multiplied by batch or GPU count."""

    learning_rate: float = number(1e-4, above=0, most=10)
    """Peak learning rate."""
    conditioner_learning_rate: float | None = number(None, above=0, most=10)
    """The same for the conditioners that are trained beside the UNet (parameters conditions.*), on the same
    schedule; unset: learning_rate."""
    betas: tuple[float, float] = number((0.9, 0.999), least=0, below=1)
    """Adam moment decay rates."""
    eps: float = number(1e-8, above=0, most=1)
    """Adam epsilon."""
    weight_decay: float = number(0.01, least=0, most=100)
    """Decoupled weight decay, on every parameter as in the SD recipes."""
    warmup_steps: int = number(0, least=0, most=10**12)
    """Linear warm-up from 0."""
    schedule: Literal["constant", "cosine", "linear", "inverse_sqrt"] = "constant"
    """Rate after warm-up; cosine and linear fall to final_fraction at the last step."""
    final_fraction: float = number(0.0, least=0, most=1)
    """Fraction of the peak rate at the end of cosine and linear."""
    max_grad_norm: float = number(1.0, least=0, most=10**9)
    """Global gradient norm clip; 0 switches it off."""
    name: Literal["adamw", "muon", "adafactor"] = "adamw"
    """muon: orthogonalised momentum for hidden matrices, in steps as large as AdamW's; AdamW for the rest.
    adafactor: no moments but those of rows and columns; its rates are relative to the weights, 1e-2 usual."""
    momentum: float = number(0.95, least=0, below=1)
    """Muon's decay rate (Nesterov)."""
    beta2_decay: float = number(-0.8, least=-10, below=0)
    """Of Adafactor, as of torch's: the gradient of step t weighs t ** beta2_decay in the second moment."""
    adafactor_eps: tuple[float, float] = number((2.0**-23, 1e-3), least=1e-18, most=1)
    """Adafactor's floors, as torch's eps: of the root of a second moment (and of a matrix's mean one), and of
    the size of weights that the rate is relative to."""
    update_clip: float = number(1.0, least=1, most=10**9)
    """Adafactor's bound on the root mean square of each parameter's update, before the rate."""

    @property
    def moments(self) -> tuple[str, ...]:
        """Moments of every weight that are kept, as large as the weights."""
        return () if self.name == "adafactor" else ("exp_avg", "exp_avg_sq")

    def rate(self, step: int, total_steps: int) -> float:
        """Learning rate of optimizer step `step` (counted from 0): linear warm-up, then the schedule."""
        peak = self.learning_rate
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return peak
        if self.schedule == "inverse_sqrt":
            reference = max(self.warmup_steps, 1)
            return peak * math.sqrt(reference / max(step + 1, reference))
        span = max(total_steps - self.warmup_steps, 1)
        progress = min((step - self.warmup_steps) / span, 1.0)
        remaining = 1 - progress if self.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return peak * (self.final_fraction + (1 - self.final_fraction) * remaining)


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (Hu et al. 2021): frozen layers W [out, in] compute as W + alpha / rank x B A."""

    rank: int = number(16, least=1, most=2**16)
    """r of A [r, in] and B [out, r]."""
    alpha: float | None = number(None, above=0, most=10**6)
    """Strength; unset: the rank, so that B A counts once."""
    targets: tuple[str, ...] = ("unet.*.attn*.to_*",)
    """Patterns of names of the UNet's linear layers, or modules for all in them; unset: the projections of
    all attentions. One adapter serves the projections that share a product (to_qkv, to_kv)."""
    dropout: float = number(0.0, least=0, below=1)
    """Of what an adapter is given, in training."""

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank


@dataclass(frozen=True)
class EMAConfig:
    """Exponential moving averages of the trained weights, in fp32, beside the optimizer's partition."""

    decay: float = number(0.9999, least=0, below=1)
    """Per-step decay of the profile named `decay`; 0 keeps no average."""
    warmup: bool = True
    """Use min(decay, (1 + n) / (10 + n)) at update n."""
    power_stds: tuple[float, ...] = number((), above=0, below=0.2886)
    """Relative widths of extra power-function profiles (EDM2, equation 123), e.g. 0.05, 0.10."""
    snapshot_every: int = number(0, least=0, most=10**12)
    """Steps between stored snapshots of the power-function profiles, for `ldm ema`; 0: none."""


@dataclass(frozen=True)
class DistributedConfig:
    """Ranks and precision. Under torchrun, SLURM or Ray the ranks are taken as given."""

    ranks: int = number(0, least=0, most=10**6)
    """Local ranks that `ldm train` starts by itself; 0: one per visible GPU, or one on a CPU."""
    engine: Literal["deepspeed", "fsdp", "torch"] = "deepspeed"
    """deepspeed: ZeRO; fsdp: torch's fully_shard, cut within nodes and replicated across; torch: plain data
    parallel, for debugging and as the reference in tests."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What deepspeed shards: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""
    shard_ranks: int = number(0, least=0, most=10**6)
    """Ranks over which fsdp cuts weights, gradients and optimizer state; 0: those of one node."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Compute precision; master weights, Adam state and EMA are always fp32."""
    channels_last: bool = True
    """Keep activations in channels-last memory layout."""
    channels_last_kernels: bool = True
    """With channels_last in bf16, keep kernels of convolutions so, too, under zero_stage 1 and the plain
    engine: costs a second copy of them, saves two of three conversions of each per micro-batch."""
    fused_kernels: bool = True
    """On a GPU with channels_last, run norms, activations and residuals as our own fused kernels."""
    compile: bool = False
    """torch.compile the blocks that repeat in the trained network, each kind once."""
    cuda_graphs: bool = False
    """Replay forward and backward as CUDA graphs: pays where launching kernels takes longer than they run,
    as at 256 px or with small micro-batches."""
    cudnn_benchmark: bool = False
    """Let cuDNN time its algorithms for every shape of convolution when it is first met."""
    tf32: Literal["off", "convolutions", "all"] = "convolutions"
    """Which products of fp32 numbers a GPU may round to 10 bits of mantissa: those of convolutions, as torch
    does by itself, or of matrices, too. bf16 has none of either."""
    numa_binding: bool = True
    """Keep each rank, with its loaders, on the cores beside its GPU, of those that its launcher left it."""
    gc_every: int = number(100, least=0, most=10**12)
    """Steps between Python's garbage collections, at the same step on all ranks, so that none waits for
    another's; 0: whenever Python wants."""
    reduce_bucket_elements: int = number(50_000_000, least=1, most=10**12)
    """Gradients per communication bucket (DeepSpeed's 5e8 hardly overlaps at this model size)."""
    overlap_communication: bool = False
    """Send gradients while backward goes on, bucket by bucket; with zero_stage 1 in bf16, those of the last
    micro-batch."""
    reduce_precision: Literal["fp32", "bf16"] = "fp32"
    """In which gradients go from rank to rank with precision=bf16; bf16 halves the bytes and rounds sums over
    ranks, under fsdp also those over micro-batches. zero_stage=0 sends what it computes, bf16."""
    timeout_s: float = number(600.0, least=1, most=10**7)
    """Collective timeout."""
    max_restarts: int = number(3, least=0, most=10**6)
    """How often `ldm train` restarts its local ranks after a retryable fault."""
    watchdog_s: float = number(15.0, least=0, most=10**7)
    """Seconds beyond the expected step time after which a silent rank counts as hung; 0: no watchdog."""
    link_patience_s: float = number(45.0, least=0, most=10**7)
    """Added to watchdog_s where the ranks are on several nodes: NCCL and TCP come back from a lost link by
    themselves, NCCL after 20 s and more."""
    doctor: bool = True
    """Run the checks of `ldm doctor` before training; not again when its ranks are restarted."""

    @property
    def fuses(self) -> bool:
        """Whether a GPU runs our own fused kernels, which take channels-last feature maps."""
        return self.fused_kernels and self.channels_last


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep; checkpoints live under run_dir/checkpoints."""

    every: int = number(5_000, least=0, most=10**12)
    """Steps between checkpoints (the last step is always saved); 0: only the last."""
    keep_last: int = number(2, least=1, most=10**6)
    """Newest checkpoints kept."""
    keep_every: int = number(0, least=0, most=10**12)
    """Also keep, for ever, checkpoints whose step is a multiple of this; 0: none."""
    keep_best: int = number(0, least=0, most=10**6)
    """Also keep this many checkpoints that are the best by best_metric; 0: none."""
    best_metric: str = "loss"
    """loss: recent training loss; or what validation records, such as validation/loss or validation/psnr."""
    asynchronous: bool = True
    """Write from a separate process while training goes on; only the copy to host memory blocks."""


@dataclass(frozen=True)
class HealingConfig:
    """What to do about NaN, Inf and loss spikes."""

    enabled: bool = True
    """Leave out a step whose gradient is not finite; rewind to the last good checkpoint and skip the
    offending samples where that does not help; instead of stopping."""
    spike_zscore: float = number(0.0, least=0, most=10**6)
    """Robust z-score of the loss that counts as a spike; 0: only NaN and Inf count."""
    spike_window: int = number(256, least=1, most=10**6)
    """Steps in the running median and deviation."""
    spike_patience: int = number(3, least=1, most=10**6)
    """Spikes at as many steps in a row make the run rewind; fewer are noted."""
    max_skips: int = number(100, least=0, most=10**6)
    """Steps left out within 100,000 steps before one more makes the run rewind."""
    max_rewinds: int = number(5, least=0, most=10**6)
    """Rewinds within 100,000 steps before the run stops."""


@dataclass(frozen=True)
class ValidationConfig:
    """How the samples of `data.validation` are measured while training goes on."""

    every: int = number(0, least=0, most=10**12)
    """Steps between measurements, one more after the last step; 0: none."""
    samples: int = number(1000, least=2, most=10**7)
    """Held-out samples that are measured, the same ones each time."""
    timesteps: int = number(8, least=1, most=64)
    """Noise levels at which each sample is measured, one of each equal part of what training draws."""
    raw: bool = True
    """Measure the trained weights beside their averages, which doubles the cost."""
    features: Literal["inception", "dinov2", "random"] | None = None
    """Of stage=autoencoder: also R-FID, by this network's features; unset: none. `random` needs no file, and
    what it gives compares with nothing but itself."""
    features_weights: str | None = None
    """Path or URL of the network's file; unset: where torch.hub keeps Inception's."""


@dataclass(frozen=True)
class LoggingConfig:
    """Console, JSONL and W&B."""

    every: int = number(10, least=1, most=10**12)
    """Steps between log records."""
    layer_norms_every: int = number(0, least=0, most=10**12)
    """Steps between records of the norms of each layer's weights and mean gradients; 0: none. One pass over
    the weights and Adam's first moments, which all ranks share. Adafactor has none: no gradients then."""
    wandb: Literal["online", "offline", "disabled"] = "offline"
    """online needs WANDB_API_KEY in the environment; offline writes files for `wandb sync`."""
    wandb_project: str = "latent-diffusion"
    """W&B project."""
    wandb_entity: str | None = None
    """W&B team or user."""
    progress_bar: bool = True
    """Console progress bar on rank 0."""


@dataclass(frozen=True)
class SamplingConfig:
    """Preview pictures during training, and the defaults of `ldm sample`."""

    every: int = number(0, least=0, most=10**12)
    """Steps between preview grids; 0: none."""
    prompts: tuple[str, ...] = ()
    """Preview prompts, beside the other conditions of a batch where there are some; unset: its captions."""
    num_previews: int = number(16, least=1, most=10**5)
    """Pictures per grid (reconstructions for a first stage)."""
    sampler: SamplerName = "ddim"
    """Sampler."""
    steps: int = number(50, least=1, most=10**6)
    """Sampler steps."""
    eta: float = number(0.0, least=0, most=1)
    """DDIM stochasticity: 0 deterministic, 1 DDPM-like."""
    guidance_scale: float = number(7.5, least=0, most=10**4)
    """Classifier-free guidance; 1 switches it off."""
    guidance_rescale: float = number(0.0, least=0, most=1)
    """Rescale the guided prediction's deviation (Lin et al. 2023, section 3.4)."""
    spacing: Spacing = "leading"
    """Which timesteps the sampler visits."""
