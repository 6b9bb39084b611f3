"""The U-Nets of EDM's published models: DDPM++ and NCSN++ (`SongUNet`), ADM (`DhariwalUNet`). Knows no noise schedule.

Written from the papers: Song et al. 2021 (arXiv 2011.13456, appendix C) and Dhariwal & Nichol 2021 (arXiv 2105.05233)
with the changes of Karras et al. 2022 (arXiv 2206.00364, appendix F). Module names and weight layouts are those of the
published files, which load without conversion; tests compare outputs with those of the published programs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from fewstep.networks.base import NetSpec
from fewstep.networks.edm_layers import Block, Conv, Fourier, group_norm, sinusoids

__all__ = ["DhariwalUNet", "DhariwalUNetSpec", "SongUNet", "SongUNetSpec"]


class _Spec(NetSpec):
    """Fields common to both families."""

    size: int = Field(32, gt=0)
    """Image height and width in pixels."""
    channels: int = Field(3, gt=0)
    """Image channels."""
    num_classes: int = Field(0, ge=0)
    """Number of classes; the index one above them means "no class". 0: unconditional."""
    model_channels: int = Field(128, gt=0, multiple_of=4)
    """Channels that `channel_mult` multiplies."""
    channel_mult: tuple[PositiveInt, ...] = Field((2, 2, 2), min_length=1)
    """Width of each resolution, from the finest."""
    num_blocks: int = Field(4, gt=0)
    """Residual blocks per resolution; the decoder has one more."""
    attn_resolutions: tuple[PositiveInt, ...] = (16,)
    """Image heights at which there is attention."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout inside the residual blocks."""
    augment_dim: int = Field(0, ge=0)
    """Numbers that describe an augmentation (EDM's pipe has 9); 0 for none."""

    @model_validator(mode="after")
    def _halves(self) -> _Spec:
        if self.size % 2 ** (len(self.channel_mult) - 1):
            raise ValueError(
                f"`size` must be a multiple of {2 ** (len(self.channel_mult) - 1)} for {len(self.channel_mult)} entries of "
                f"channel_mult, got {self.size}. Try: fewer entries"
            )
        return self

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.channels, self.size, self.size

    @property
    def bottleneck(self) -> str:
        """Layer that a GAN head reads: the encoder's last block, as in DMD2."""
        side = self.size // 2 ** (len(self.channel_mult) - 1)
        return f"enc.{side}x{side}_block{self.num_blocks - 1}"

    @abstractmethod
    def build(self) -> _UNet:
        """Build the network with newly initialised weights."""


class SongUNetSpec(_Spec):
    """DDPM++ (the defaults: CIFAR-10's) or NCSN++ (`embedding: fourier`, `encoder: residual`, four-tap filter)."""

    kind: Literal["song-unet"] = "song-unet"
    embedding: Literal["positional", "fourier"] = "positional"
    """Embedding of the noise level."""
    encoder: Literal["standard", "residual"] = "standard"
    """residual: a down-sampled copy of the input is added at each resolution."""
    channel_mult_noise: int = Field(1, gt=0)
    """Width of the noise embedding in `model_channels`: 1 for DDPM++, 2 for NCSN++."""
    resample_filter: tuple[PositiveInt, ...] = Field((1, 1), min_length=1)
    """Taps of the filter for halving and doubling: (1, 1) for DDPM++, (1, 3, 3, 1) for NCSN++."""

    def build(self) -> SongUNet:
        return SongUNet(self)


class DhariwalUNetSpec(_Spec):
    """ADM. The published ImageNet-64 model: model_channels 192, channel_mult 1 2 3 4, 3 blocks, attention at 32, 16, 8."""

    kind: Literal["dhariwal-unet"] = "dhariwal-unet"

    def build(self) -> DhariwalUNet:
        return DhariwalUNet(self)


class _UNet(nn.Module, ABC):
    """Encoder and decoder; the families differ in their blocks, their embedding of the condition, and the last layers.

    `enc` and `dec` are dicts of layers in order: "{res}x{res}_conv", "_down", "_aux_residual", "_block{i}" and
    "_in0", "_in1", "_up", "_block{i}". Every decoder "_block" also takes the latest unused output of the encoder.
    """

    def __init__(self, spec: _Spec) -> None:
        super().__init__()
        self.spec = spec
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        widths = [spec.model_channels * mult for mult in spec.channel_mult]
        sides = [spec.size >> level for level in range(len(widths))]
        width = self._stem(widths)
        self.enc[f"{spec.size}x{spec.size}_conv"] = Conv(spec.channels, width, 3)
        outputs, residual_width = [width], spec.channels
        for level, (side, target) in enumerate(zip(sides, widths, strict=True)):
            name = f"{side}x{side}"
            if level:
                self.enc[f"{name}_down"] = self._block(width, width, resample="down")
                residual = self._residual(residual_width, width)
                if residual is not None:
                    self.enc[f"{name}_aux_residual"], residual_width = residual, width
                outputs.append(width)
            for index in range(spec.num_blocks):
                attention = side in spec.attn_resolutions
                self.enc[f"{name}_block{index}"] = self._block(width, target, attention=attention)
                width = target
                outputs.append(width)
        for level, (side, target) in reversed(list(enumerate(zip(sides, widths, strict=True)))):
            name = f"{side}x{side}"
            if level == len(widths) - 1:
                self.dec[f"{name}_in0"] = self._block(width, width, attention=True)
                self.dec[f"{name}_in1"] = self._block(width, width)
            else:
                self.dec[f"{name}_up"] = self._block(width, width, resample="up")
            for index in range(spec.num_blocks + 1):
                attention = side in spec.attn_resolutions and self._attends(index)
                self.dec[f"{name}_block{index}"] = self._block(width + outputs.pop(), target, attention=attention)
                width = target

    @abstractmethod
    def _stem(self, widths: Sequence[int]) -> int:
        """Number of channels after the first convolution."""

    @abstractmethod
    def _block(
        self, inputs: int, outputs: int, *, attention: bool = False, resample: Literal["up", "down"] | None = None
    ) -> Block:
        """A residual block of this family."""

    @abstractmethod
    def _attends(self, index: int) -> bool:
        """Return whether the decoder's block `index` of a resolution with attention has attention."""

    def _residual(self, inputs: int, outputs: int) -> Conv | None:
        """Layer that takes the residual path to the next resolution, if any."""
        return None

    @abstractmethod
    def _embedded(self, label: Tensor, classes: Tensor, augment: Tensor | None) -> Tensor:
        """Embed noise label [B], one-hot classes [B, num_classes] and augmentation [B, 9] as a condition [B, embedding]."""

    @abstractmethod
    def _decoded(self, h: Tensor) -> Tensor:
        """Compute the image [B, C, H, W] from the decoder's last feature."""

    def forward(self, x: Tensor, label: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """Run the network.

        Args:
            x: scaled noisy images [B, C, H, W].
            label: noise label [B] (EDM's c_noise = ln(sigma) / 4).
            labels: class of each image [B], int64; `num_classes` is "no class". None: no class for all.
            augment: augmentation condition [B, augment_dim]; None stands for zeros, without augmentation.

        Returns:
            The prediction F [B, C, H, W], in the compute dtype.
        """
        classes = x.new_zeros(len(x), self.spec.num_classes)
        if labels is not None and self.spec.num_classes:
            classes = F.one_hot(labels, self.spec.num_classes + 1)[:, :-1].to(x.dtype)
        embedding = self._embedded(label, classes, augment)
        outputs: list[Tensor] = []
        residual = x
        for name, layer in self.enc.items():
            if name.endswith("_aux_residual"):
                x = residual = (x + layer(residual)) * math.sqrt(0.5)
                outputs[-1] = x
                continue
            x = layer(x, embedding) if isinstance(layer, Block) else layer(x)
            outputs.append(x)
        for name, layer in self.dec.items():
            if not isinstance(layer, Block):
                continue  # the tail of `_decoded`, kept here by the published files
            x = layer(torch.cat([x, outputs.pop()], dim=1) if "_block" in name else x, embedding)
        return self._decoded(x)


class SongUNet(_UNet):
    """DDPM++ and NCSN++."""

    spec: SongUNetSpec

    def __init__(self, spec: SongUNetSpec) -> None:
        super().__init__(spec)
        noise, embedding = spec.model_channels * spec.channel_mult_noise, 4 * spec.model_channels
        if spec.embedding == "fourier":
            self.map_noise = Fourier(noise)
        self.map_label = nn.Linear(spec.num_classes, noise) if spec.num_classes else None
        self.map_augment = nn.Linear(spec.augment_dim, noise, bias=False) if spec.augment_dim else None
        self.map_layer0 = nn.Linear(noise, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        width = spec.model_channels * spec.channel_mult[0]
        self.dec[f"{spec.size}x{spec.size}_aux_norm"] = group_norm(width, 1e-6)
        self.dec[f"{spec.size}x{spec.size}_aux_conv"] = Conv(width, spec.channels, 3)
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear | Conv) and layer.weight is not None:
                final = name.endswith(("conv1", "proj", "aux_conv"))
                nn.init.xavier_uniform_(layer.weight, gain=1e-5 if final else math.sqrt(0.2) if "qkv" in name else 1.0)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def _stem(self, widths: Sequence[int]) -> int:
        return self.spec.model_channels

    def _block(
        self, inputs: int, outputs: int, *, attention: bool = False, resample: Literal["up", "down"] | None = None
    ) -> Block:
        return Block(
            inputs, outputs, 4 * self.spec.model_channels, heads=int(attention), resample=resample,
            taps=self.spec.resample_filter, scaled=False, project=True, gain=math.sqrt(0.5), eps=1e-6,
            dropout=self.spec.dropout,
        )  # fmt: skip

    def _attends(self, index: int) -> bool:
        return index == self.spec.num_blocks

    def _residual(self, inputs: int, outputs: int) -> Conv | None:
        if self.spec.encoder == "standard":
            return None
        return Conv(inputs, outputs, 3, "down", self.spec.resample_filter, filter_last=True)

    def _embedded(self, label: Tensor, classes: Tensor, augment: Tensor | None) -> Tensor:
        if self.spec.embedding == "fourier":
            cos, sin = self.map_noise(label)
        else:
            cos, sin = sinusoids(label, self.spec.model_channels * self.spec.channel_mult_noise, endpoint=True)
        embedding = torch.cat([sin, cos], dim=1)
        if self.map_label is not None:
            embedding = embedding + self.map_label(classes * math.sqrt(self.spec.num_classes))
        if self.map_augment is not None and augment is not None:
            embedding = embedding + self.map_augment(augment)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))

    def _decoded(self, h: Tensor) -> Tensor:
        name = f"{self.spec.size}x{self.spec.size}_aux"
        return self.dec[f"{name}_conv"](F.silu(self.dec[f"{name}_norm"](h)))


class DhariwalUNet(_UNet):
    """ADM."""

    spec: DhariwalUNetSpec

    def __init__(self, spec: DhariwalUNetSpec) -> None:
        super().__init__(spec)
        embedding = 4 * spec.model_channels
        self.map_augment = nn.Linear(spec.augment_dim, spec.model_channels, bias=False) if spec.augment_dim else None
        self.map_layer0 = nn.Linear(spec.model_channels, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        self.map_label = nn.Linear(spec.num_classes, embedding, bias=False) if spec.num_classes else None
        width = spec.model_channels * spec.channel_mult[0]
        self.out_norm = group_norm(width, 1e-5)
        self.out_conv = Conv(width, spec.channels, 3)
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear | Conv) and layer.weight is not None:
                bound = 1 / math.sqrt(layer.weight[0].numel())
                for weight in (layer.weight, layer.bias):
                    if weight is not None:
                        nn.init.uniform_(weight, -bound, bound)
                if name.endswith(("conv1", "proj", "out_conv")):
                    for weight in layer.parameters():
                        nn.init.zeros_(weight)

    def _stem(self, widths: Sequence[int]) -> int:
        return widths[0]

    def _block(
        self, inputs: int, outputs: int, *, attention: bool = False, resample: Literal["up", "down"] | None = None
    ) -> Block:
        return Block(
            inputs, outputs, 4 * self.spec.model_channels, heads=max(1, outputs // 64) if attention else 0,
            resample=resample, taps=(1, 1), scaled=True, project=False, gain=1.0, eps=1e-5, dropout=self.spec.dropout,
        )  # fmt: skip

    def _attends(self, index: int) -> bool:
        return True

    def _embedded(self, label: Tensor, classes: Tensor, augment: Tensor | None) -> Tensor:
        embedding = torch.cat(sinusoids(label, self.spec.model_channels, endpoint=False), dim=1)
        if self.map_augment is not None and augment is not None:
            embedding = embedding + self.map_augment(augment)
        embedding = self.map_layer1(F.silu(self.map_layer0(embedding)))
        if self.map_label is not None:
            embedding = embedding + self.map_label(classes)
        return F.silu(embedding)

    def _decoded(self, h: Tensor) -> Tensor:
        return self.out_conv(F.silu(self.out_norm(h)))
