"""What the networks are: UNet, first stage, conditionings. Torch-free, frozen, one docstring per field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_pipeline.config import CONDITIONS, number

RANDOM = "random"
"""The word for a network with seeded random weights in the place of a trained one: for demos and tests. A
file of that name is ./random."""
TOWERS = ("openclip", "openclip_second")
"""Sections of ConditioningConfig that are frozen text towers."""
FROM_PIXELS = ("low_resolution", "masked_image")
"""Sections of ConditioningConfig whose condition is made from the picture itself."""


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser. Input channels, context width and class count are derived, never written here."""

    model_channels: int = number(320, least=1, most=2**16)
    """Channels of the first level; level i has model_channels * channel_multipliers[i]."""
    channel_multipliers: tuple[int, ...] = number((1, 2, 4, 4), least=1, most=1024)
    """One entry per resolution level."""
    num_res_blocks: int = number(2, least=1, most=64)
    """Residual blocks per level on the way down (one more on the way up)."""
    attention_factors: tuple[int, ...] = number((4, 2, 1), least=1, most=2**16)
    """Downsampling factors (not feature-map sizes) at which attention blocks follow residual blocks."""
    attention: Literal["transformer", "plain"] = "transformer"
    """transformer: self- and cross-attention with a feed-forward part; plain: one self-attention (ADM)."""
    num_heads: int | None = number(None, least=1, most=4096)
    """Attention heads, the same at every level; exactly one of num_heads and head_dim is set."""
    head_dim: int | None = number(64, least=1, most=2**16)
    """Channels per attention head; exactly one of num_heads and head_dim is set."""
    transformer_depth: tuple[int, ...] = number((1,), least=0, most=1024)
    """Transformer blocks per attention layer: one number for all levels, or one per level."""
    middle_transformer_depth: int | None = number(None, least=0, most=1024)
    """Transformer blocks in the middle; unset: the depth of the last level."""
    projection: Literal["conv", "linear"] = "linear"
    """How a transformer projects its input: 1x1 convolution (SD1) or linear layer (SD2)."""
    cross_attention_only: tuple[bool, ...] = ()
    """Per level, replace self-attention by a second cross-attention (x4 upscaler); empty: nowhere."""
    scale_shift_norm: bool = False
    """The timestep embedding scales and shifts the normalised features instead of being added."""
    resblock_updown: bool = False
    """Resample inside residual blocks instead of with a strided or nearest+3x3 convolution."""
    num_groups: int = number(32, least=1, most=2**16)
    """Groups of every group normalisation."""
    res_block_groups: int | None = number(None, least=1, most=2**16)
    """Groups inside residual blocks where they differ (MLPerf uses 16); unset: num_groups."""
    dropout: float = number(0.0, least=0, below=1)
    """Dropout inside residual blocks and feed-forward parts."""
    activation_checkpointing: bool = False
    """Recompute residual and attention blocks in backward: less memory, about a quarter slower."""


@dataclass(frozen=True)
class FirstStageConfig:
    """The autoencoder between pixels and latents (LDM paper, section 3.1)."""

    name: Literal["kl", "vq", "identity"] = "kl"
    """KL-regularised, vector-quantised, or none at all (pixel space)."""
    weights: str | None = None
    """URL of exported weights (safetensors file or `ldm export` folder); needed to train a second stage."""
    base_channels: int = number(128, least=1, most=2**16)
    """Channels of the first encoder level."""
    channel_multipliers: tuple[int, ...] = number((1, 2, 4, 4), least=1, most=1024)
    """One entry per level; the downsampling factor is 2 ** (levels - 1)."""
    num_res_blocks: int = number(2, least=1, most=64)
    """Residual blocks per encoder level (one more per decoder level)."""
    latent_channels: int = number(4, least=1, most=2**16)
    """z: channels of the latent."""
    attention_factors: tuple[int, ...] = number((), least=1, most=2**16)
    """Downsampling factors of levels with attention (CompVis lists feature-map sizes at 256 px)."""
    middle_attention: bool = True
    """Attention in the middle of encoder and decoder."""
    codebook_size: int = number(8192, least=1, most=2**31)
    """Entries of the codebook (vq)."""
    dropout: float = number(0.0, least=0, below=1)
    """Dropout inside residual blocks."""
    num_groups: int | None = number(None, least=1, most=2**16)
    """Groups of every group normalisation; unset: 32, or base_channels / 4 where that is fewer."""
    latent_scale: float | None = number(None, above=0, most=10**6)
    """Multiplies latents before diffusion (SD: 0.18215); unset: the value stored with the weights."""
    input_range: Literal["-1..1", "0..1"] = "-1..1"
    """Range of the pixels that a second stage's encoder is shown. 0..1 is wrong for every published VAE and
    exists to repeat the MLPerf Stable Diffusion benchmark, which forgot to normalise; decoding undoes it."""
    tile_pixels: int = number(0, least=0, most=10**6)
    """Encode and decode in overlapping tiles of this edge length; 0: whole images."""
    encode_chunk: int = number(0, least=0, most=10**6)
    """Images per encoder call inside a micro-batch, to bound memory; 0: all at once."""
    cache: str | None = None
    """Folder or URL that keeps what the frozen encoder gives for each picture, filled as training streams:
    from then on the picture is neither read nor decoded nor encoded. Unset: encoded at each visit."""
    cache_dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of what is kept, and of what is encoded live beside it; a bf16 encoder gives bf16."""
    cache_variants: int = number(0, least=0, most=1024)
    """Random crops and flips of each picture, of which every visit draws one, with a cache or without; 0: a
    new one at every visit, which cannot be cached."""
    cache_bytes: int = number(0, least=0, most=10**18)
    """Size bound of the cache folder, all first stages together: once it is full nothing is added, and what
    is there stays. 0: none."""

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell along one edge: f in the paper."""
        return 1 if self.name == "identity" else 2 ** (len(self.channel_multipliers) - 1)

    @property
    def channels(self) -> int:
        """Channels that the UNet sees."""
        return 3 if self.name == "identity" else self.latent_channels


@dataclass(frozen=True)
class OpenCLIPConfig:
    """Frozen OpenCLIP text tower (cross-attention context)."""

    model: str = "ViT-H-14"
    """Any architecture name of open_clip."""
    pretrained: str | None = None
    """A tag of open_clip, a weights file or URL, or the word random: seeded random weights, for demos and
    tests. Training and sampling refuse a tower without any of them."""
    layer: Literal["last", "penultimate"] = "penultimate"
    """Which hidden states become the context (SD2: penultimate, then the final layer norm)."""
    final_norm: bool = True
    """Apply the tower's final layer norm to the penultimate layer (SD2: yes; SDXL: no)."""
    padding: Literal["zero", "end"] = "zero"
    """Token after the end of a caption: 0 (open_clip, SD2) or the end token again (SD1's CLIP ViT-L)."""
    width: int | None = number(None, least=1, most=2**16)
    """Shrink the tower: text width (with `layers` and `heads`), for small runs with `pretrained: random`."""
    layers: int | None = number(None, least=1, most=1024)
    """Shrink the tower: number of transformer layers."""
    heads: int | None = number(None, least=1, most=4096)
    """Shrink the tower: number of heads."""
    context_length: int | None = number(None, least=1, most=2**16)
    """Shrink the tower: tokens per caption, longer ones are cut."""
    pooled: bool = False
    """Also pass the pooled text embedding on as a vector condition (SDXL)."""
    null: Literal["empty", "zeros"] = "empty"
    """The unconditional form: the encoded empty prompt (SD) or zeros; sampling uses the same."""
    drop_probability: float = number(0.1, least=0, most=1)
    """Probability of replacing a sample's condition by its null form in training."""


@dataclass(frozen=True)
class TextTransformerConfig:
    """Text transformer trained jointly with the UNet (the paper's tau, appendix E.2.1)."""

    width: int = number(1280, least=1, most=2**16)
    """Token width, and the context width."""
    layers: int = number(32, least=1, most=1024)
    """Transformer layers."""
    heads: int = number(8, least=1, most=4096)
    """Attention heads."""
    head_dim: int = number(64, least=1, most=2**16)
    """Channels per head."""
    max_tokens: int = number(77, least=1, most=2**16)
    """Tokens per caption."""
    tokenizer: Literal["wordpiece", "clip"] = "clip"
    """wordpiece: a BERT vocabulary file (`vocabulary`); clip: open_clip's byte-pair encoding."""
    vocabulary: str | None = None
    """URL of the WordPiece vocabulary file (one token per line)."""
    drop_probability: float = number(0.1, least=0, most=1)
    """Probability of the empty caption in training."""


@dataclass(frozen=True)
class ClassLabelConfig:
    """A class index, as one context token (LDM) or added to the timestep embedding (ADM, DiT)."""

    num_classes: int = number(1000, least=1, most=10**9)
    """Number of real classes; one more index is the null class."""
    width: int = number(512, least=1, most=2**16)
    """Embedding width."""
    inject: Literal["context", "timestep"] = "context"
    """Where the embedding enters the UNet."""
    drop_probability: float = number(0.1, least=0, most=1)
    """Probability of the null class in training."""


@dataclass(frozen=True)
class LayoutConfig:
    """Bounding boxes with labels as tokens of a jointly trained transformer (paper, section 4.3.1)."""

    num_labels: int = number(600, least=1, most=10**6)
    """Object labels."""
    max_boxes: int = number(30, least=1, most=10_000)
    """Boxes per image, the largest where there are more; each is one label token and two corner tokens."""
    grid: int = number(64, least=1, most=2**12)
    """Corners are quantised to grid x grid cells."""
    width: int = number(512, least=1, most=2**16)
    """Token width, and the context width."""
    layers: int = number(16, least=1, most=1024)
    """Transformer layers."""
    heads: int = number(8, least=1, most=4096)
    """Attention heads."""
    head_dim: int = number(64, least=1, most=2**16)
    """Channels per head."""
    dropout: float = number(0.0, least=0, below=1)
    """Dropout inside the transformer."""
    drop_probability: float = number(0.1, least=0, most=1)
    """Probability of the empty layout in training."""


@dataclass(frozen=True)
class SemanticMapConfig:
    """A label map, one-hot, reduced to latent resolution and concatenated (paper, section 4.3.2)."""

    num_labels: int = number(182, least=1, most=255)
    """Labels; the map holds indices 0 .. num_labels - 1, and 255 for unlabelled."""
    channels: int = number(3, least=1, most=2**16)
    """Channels after the learned 1x1 reduction."""
    drop_probability: float = number(0.0, least=0, most=1)
    """Probability of the null (all-zero) map in training."""


@dataclass(frozen=True)
class LowResolutionConfig:
    """Super-resolution: the low-resolution image is concatenated (paper, section 4.4)."""

    factor: int = number(4, least=1, most=1024)
    """Edge-length ratio of high to low resolution; must match the first stage's downsampling."""
    degradation: Literal["bicubic", "bsr_light"] = "bicubic"
    """How the low-resolution image is made from the original."""
    max_noise_level: int = number(0, least=0, most=10**6)
    """Noise augmentation of the condition up to this timestep (x4 upscaler: 350); 0: none."""
    noise_num_timesteps: int = number(1000, least=2, most=10**6)
    """Length of the noise-level schedule and number of noise-level classes."""
    noise_beta_start: float = number(1e-4, above=0, below=1)
    """First beta of the (linear) noise-level schedule."""
    noise_beta_end: float = number(2e-2, above=0, below=1)
    """Last beta of the noise-level schedule."""
    drop_probability: float = number(0.0, least=0, most=1)
    """Probability of the null (all-zero) image in training."""


@dataclass(frozen=True)
class MaskedImageConfig:
    """Inpainting: mask and encoded masked image are concatenated (paper, section 4.5; SD2 inpainting)."""

    form: Literal["sd", "ldm"] = "sd"
    """How it is shown. sd: hidden pixels grey, the mask 0 or 1 (SD, diffusers); ldm: hidden pixels black, the
    mask -1 or 1, as LDM's published inpainting model has them. `ldm import` and `ldm export --layout compvis`
    order the channels of such a model: theirs are latents, masked picture, mask."""
    mask_channels: int = number(1, least=1, most=2**16)
    """Channels of the mask: 1 (SD, big-lama style)."""
    full_mask_probability: float = number(0.25, least=0, most=1)
    """Probability of hiding everything, so that the model stays a generator (SD2 inpainting: 0.25)."""
    drop_probability: float = number(0.0, least=0, most=1)
    """Probability of the null (all-zero) condition in training."""


@dataclass(frozen=True)
class DepthConfig:
    """An extra image-like condition with one channel, normalised to [-1, 1] (SD2 depth)."""

    channels: int = number(1, least=1, most=2**16)
    """Channels of the condition."""
    drop_probability: float = number(0.0, least=0, most=1)
    """Probability of the null (all-zero) condition in training."""


@dataclass(frozen=True)
class ImageSizeConfig:
    """Original size, crop corner and target size as Fourier features in the vector condition (SDXL)."""

    width: int = number(256, least=1, most=2**16)
    """Fourier features per number; six numbers."""
    drop_probability: float = number(0.0, least=0, most=1)
    """Probability of zeros in training."""


@dataclass(frozen=True)
class ConditioningConfig:
    """Each section that is present is one condition; any combination may be present."""

    openclip: OpenCLIPConfig | None = None
    """Frozen OpenCLIP text tower."""
    openclip_second: OpenCLIPConfig | None = None
    """A second text tower, concatenated along the context width (SDXL)."""
    text_transformer: TextTransformerConfig | None = None
    """Jointly trained text transformer."""
    class_label: ClassLabelConfig | None = None
    """Class index."""
    layout: LayoutConfig | None = None
    """Bounding boxes with labels."""
    semantic_map: SemanticMapConfig | None = None
    """Label map."""
    low_resolution: LowResolutionConfig | None = None
    """Low-resolution image."""
    masked_image: MaskedImageConfig | None = None
    """Mask and masked image."""
    depth: DepthConfig | None = None
    """Depth-like extra channels."""
    image_size: ImageSizeConfig | None = None
    """Size and crop numbers (SDXL)."""
    drop_all_probability: float = number(0.0, least=0, most=1)
    """Probability that a sample loses all conditions that guidance drops, beside each section's own. With
    several of them guidance needs it: three dropped 10 % each are all missing in 0.1 % of the samples."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that samples must carry for these conditions, beside picture and caption."""
        return tuple(name for name in CONDITIONS if getattr(self, name, None) is not None)

    @property
    def text_only(self) -> bool:
        """Whether prompts alone say everything, so that pictures can be drawn without other fields."""
        others = (
            self.class_label,
            self.layout,
            self.semantic_map,
            self.low_resolution,
            self.masked_image,
            self.depth,
        )
        return all(section is None for section in others)
