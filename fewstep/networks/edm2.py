"""EDM2's U-Net, whose layers preserve magnitudes (Karras et al. 2024, arXiv 2312.02696, config G). Knows no noise schedule.

Written from the paper's equations. Module names, weight layouts and constants are those of the published files; they were looked up
in copies of the published program, whose code is not used here. No published file was at hand to compare outputs with.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from fewstep.networks.base import NetSpec, Normalised

__all__ = ["EDM2Spec", "EDM2UNet", "mp_cat", "mp_silu", "mp_sum", "unit"]

EPS = 1e-4  # in the norms, as in the published program
CLIP = 256.0  # of activations, for float16 (section B.6)


def unit(x: Tensor, dim: tuple[int, ...] | int | None = None) -> Tensor:
    """Divide `x` by its root mean square over `dim`, by default over all but the first dimension, plus 1e-4.

    Pixel norm is `unit` over channels (eq. 30); normalised weights are `unit` over the inputs of each output (eq. 47).
    """
    norm = torch.linalg.vector_norm(
        x, dim=tuple(range(1, x.ndim)) if dim is None else dim, keepdim=True, dtype=torch.float32
    )
    return x / (EPS + norm * math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU divided by its root mean square on unit Gaussian inputs, 0.596 (eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """((1 - t) a + t b) / √((1 - t)² + t²): unit magnitude for independent inputs of unit magnitude (eq. 88)."""
    return torch.lerp(a, b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Concatenate channels [B, C, ...] so that `b` contributes the share t, whatever the channels (eq. 103)."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([scale * (1 - t) / math.sqrt(n_a) * a, scale * t / math.sqrt(n_b) * b], dim=1)


class EDM2Spec(NetSpec):
    """EDM2's U-Net; the default is EDM2-S on the latents of ImageNet-512. Channels: XS 128, S 192, M 256, L 320, XL 384, XXL 448."""

    kind: Literal["edm2-unet"] = "edm2-unet"
    size: int = Field(64, gt=0)
    """Height and width of a sample."""
    channels: int = Field(4, gt=0)
    """Channels of a sample: 4 of a latent, 3 of an image."""
    num_classes: int = Field(1000, ge=0)
    """Number of classes; the index one above them means "no class". 0: unconditional."""
    model_channels: int = Field(192, gt=0)
    """Channels that `channel_mult` multiplies."""
    channel_mult: tuple[PositiveInt, ...] = Field((1, 2, 3, 4), min_length=1)
    """Width of each resolution, from the finest."""
    num_blocks: int = Field(3, gt=0)
    """Residual blocks per resolution; the decoder has one more."""
    attn_resolutions: tuple[PositiveInt, ...] = (16, 8)
    """Heights at which there is attention."""
    channels_per_head: int = Field(64, gt=0)
    """Channels of an attention head."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout inside the residual blocks."""
    logvar_channels: int = Field(128, gt=0)
    """Width of the head that estimates the loss at a noise level."""

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    @property
    def bottleneck(self) -> str:
        """Layer that a GAN head reads: the encoder's last block."""
        side = self.size >> (len(self.channel_mult) - 1)
        return f"enc.{side}x{side}_block{self.num_blocks - 1}"

    def build(self) -> EDM2UNet:
        return EDM2UNet(self)


class MPConv(Normalised):
    """Convolution, or a linear layer without `kernel`, with weights of unit norm for each output and no bias (eq. 47)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn((outputs, inputs, kernel, kernel) if kernel else (outputs, inputs)))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = unit(self.weight.float()) * (gain / math.sqrt(self.weight[0].numel()))
        weight = weight.to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    def normalise_(self) -> None:
        """Set the weights to unit norm, without changing what the layer computes (forced weight normalisation, eq. 66)."""
        self.weight.data.copy_(unit(self.weight.data))


class MPFourier(nn.Module):
    """√2 cos(2 pi (f c + p)) with f standard normal and p uniform, both fixed (eq. 75): [B] -> [B, channels]."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, label: Tensor) -> Tensor:
        angle = label.float()[:, None] * self.freqs.float() + self.phases.float()
        return math.sqrt(2) * angle.cos()


class EDM2Block(nn.Module):
    """Residual block of figure 21: pixel norm (encoder), SiLU, convolution, gain by the embedding, SiLU, convolution, attention.

    Args:
        inputs: channels in.
        outputs: channels out.
        embedding: channels of the embedding.
        spec: the network's record.
        encoder: whether the block is the encoder's.
        resample: whether to halve or double the side.
        attention: whether there is attention.
    """

    def __init__(
        self, inputs: int, outputs: int, embedding: int, spec: EDM2Spec, *, encoder: bool,
        resample: Literal["up", "down"] | None = None, attention: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder, self.resample, self.dropout, self.width = encoder, resample, spec.dropout, outputs
        self.heads = outputs // spec.channels_per_head if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(outputs if encoder else inputs, outputs, 3)
        self.emb_linear = MPConv(embedding, outputs)
        self.conv_res1 = MPConv(outputs, outputs, 3)
        self.conv_skip = MPConv(inputs, outputs, 1) if inputs != outputs else None
        self.attn_qkv = MPConv(outputs, 3 * outputs, 1) if self.heads else None
        self.attn_proj = MPConv(outputs, outputs, 1) if self.heads else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """`x` [B, inputs, H, W], `embedding` [B, embedding] -> [B, outputs, H', W']."""
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        if self.encoder:
            x = unit(x if self.conv_skip is None else self.conv_skip(x), 1)
        y = self.conv_res0(mp_silu(x))
        gain = self.emb_linear(embedding, self.emb_gain) + 1
        y = mp_silu(y * gain[..., None, None].to(y.dtype))
        y = self.conv_res1(F.dropout(y, self.dropout, self.training))
        if not self.encoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, 0.3)
        if self.attn_qkv is not None and self.attn_proj is not None:
            x = mp_sum(x, self.attn_proj(self._attended(self.attn_qkv(x))), 0.3)
        return x.clamp(-CLIP, CLIP)

    def _attended(self, qkv: Tensor) -> Tensor:
        """Cosine attention: queries, keys and values of unit magnitude (eq. 31). Channels are (head, channel, q | k | v)."""
        b, c, height, width = qkv.shape
        parts = unit(qkv.reshape(b, self.heads, c // 3 // self.heads, 3, height * width), 2).unbind(3)
        q, k, v = (part.transpose(-1, -2) for part in parts)
        found = F.scaled_dot_product_attention(q, k, v)
        return found.transpose(-1, -2).reshape(b, c // 3, height, width)


class EDM2UNet(nn.Module):
    """Encoder and decoder of magnitude-preserving blocks; see `EDM2Spec`."""

    def __init__(self, spec: EDM2Spec) -> None:
        super().__init__()
        self.spec = spec
        widths = [spec.model_channels * mult for mult in spec.channel_mult]
        embedding = max(widths)
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(widths[0])
        self.emb_noise = MPConv(widths[0], embedding)
        self.emb_label = MPConv(spec.num_classes, embedding) if spec.num_classes else None
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self.enc[f"{spec.size}x{spec.size}_conv"] = MPConv(spec.channels + 1, widths[0], 3)
        width, skips = widths[0], [widths[0]]
        for level, target in enumerate(widths):
            side = spec.size >> level
            if level:
                self.enc[f"{side}x{side}_down"] = EDM2Block(
                    width, width, embedding, spec, encoder=True, resample="down"
                )
                skips.append(width)
            for index in range(spec.num_blocks):
                attention = side in spec.attn_resolutions
                block = EDM2Block(width, target, embedding, spec, encoder=True, attention=attention)
                self.enc[f"{side}x{side}_block{index}"], width = block, target
                skips.append(width)
        for level, target in reversed(list(enumerate(widths))):
            side = spec.size >> level
            if level == len(widths) - 1:
                self.dec[f"{side}x{side}_in0"] = EDM2Block(width, width, embedding, spec, encoder=False, attention=True)
                self.dec[f"{side}x{side}_in1"] = EDM2Block(width, width, embedding, spec, encoder=False)
            else:
                self.dec[f"{side}x{side}_up"] = EDM2Block(width, width, embedding, spec, encoder=False, resample="up")
            for index in range(spec.num_blocks + 1):
                attention, wide = side in spec.attn_resolutions, width + skips.pop()
                block = EDM2Block(wide, target, embedding, spec, encoder=False, attention=attention)
                self.dec[f"{side}x{side}_block{index}"], width = block, target
        self.out_conv = MPConv(width, spec.channels, 3)
        self.logvar_fourier = MPFourier(spec.logvar_channels)
        self.logvar_linear = MPConv(spec.logvar_channels, 1)

    def forward(self, x: Tensor, label: Tensor, labels: Tensor | None = None) -> Tensor:
        """Run the network.

        Args:
            x: scaled noisy samples [B, C, H, W].
            label: noise label [B] (c_noise = ln(sigma) / 4).
            labels: class of each sample [B], int64; `num_classes` is "no class". None: no class for all.

        Returns:
            The prediction F [B, C, H, W], in the compute dtype.
        """
        embedding = self.emb_noise(self.emb_fourier(label).to(x.dtype))
        if self.emb_label is not None:
            classes = x.new_zeros(len(x), self.spec.num_classes)
            if labels is not None:
                classes = F.one_hot(labels, self.spec.num_classes + 1)[:, :-1].to(x.dtype)
            embedding = mp_sum(embedding, self.emb_label(classes * math.sqrt(self.spec.num_classes)), 0.5)
        embedding = mp_silu(embedding)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # in place of biases
        skips = []
        for layer in self.enc.values():
            x = layer(x, embedding) if isinstance(layer, EDM2Block) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(mp_cat(x, skips.pop(), 0.5) if "_block" in name else x, embedding)
        return self.out_conv(x, self.out_gain)

    def log_variance(self, label: Tensor) -> Tensor:
        """Estimated logarithm [B] of the denoising loss at noise labels [B], u of eq. 21: in the files, and not trained here."""
        return self.logvar_linear(self.logvar_fourier(label))[:, 0]
