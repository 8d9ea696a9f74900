"""PatchGAN discriminator (Isola et al. 2017) as VQGAN uses it: batch normalisation, one logit per patch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.first_stage.networks import match_parameters

MAX_MULTIPLIER = 8
NORM_EPS = 1e-5


class BatchNorm(nn.Module):
    """Batch normalisation by the statistics of the pictures at hand, without running averages.

    The discriminator is only ever used in training, so running averages would have no reader; without
    them there are no buffers that drift apart between ranks or miss from checkpoints. Statistics are
    taken over one rank's micro-batch, never across ranks: micro_batch_size is part of the maths of
    this network, the number of ranks is not.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, parts: int) -> Tensor:
        """[B, C, H, W]; each of `parts` equal runs of the batch has statistics of its own."""
        normalised = [
            F.batch_norm(part, None, None, self.weight, self.bias, training=True, eps=NORM_EPS)
            for part in x.chunk(parts)
        ]
        return normalised[0] if parts == 1 else torch.cat(normalised)


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches: [B, 3, H, W] -> logits [B, 1, H', W']; high means real."""

    def __init__(self, *, channels: int, num_layers: int) -> None:
        """`num_layers` strided convolutions, then two of stride one; weights drawn as in DCGAN."""
        super().__init__()
        widths = [channels * min(2**i, MAX_MULTIPLIER) for i in range(num_layers + 1)]
        self.conv_in = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            self.convs.append(nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False))
            self.norms.append(BatchNorm(widths[i]))
        self.conv_out = nn.Conv2d(widths[-1], 1, 4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, BatchNorm):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, pixels: Tensor, parts: int = 1) -> Tensor:
        """Logits in float32.

        Real and reconstructed pictures go through together, concatenated, with parts=2: one forward
        per backward, which every engine handles, yet separate batch statistics as in the original.
        """
        x = F.leaky_relu(self.conv_in(match_parameters(pixels, self)), 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x), parts), 0.2)
        return self.conv_out(x).float()
