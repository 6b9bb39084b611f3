"""Perceptual distances for regression losses: LPIPS, a small stand-in for 28x28 grey images, and L2.

Knows pairs of images and frozen networks; knows nothing about diffusion, and never uses an evaluation network.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.evaluation.extractor import file_sha256
from fewstep.evaluation.small_features import load_asset
from fewstep.system.console import note
from fewstep.system.errors import EvaluationError

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # torchvision's VGG16_Weights.DEFAULT

PerceptualName = Literal["auto", "lpips", "small", "l2"]


class Perceptual(ABC):
    """A distance between images with frozen weights, differentiable in both arguments.

    Attributes:
        name: name for a run's results.
    """

    name: str
    device: torch.device

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the distance of each pair.

        Args:
            x: float [B, C, H, W] in [-1, 1] (not clamped), on this object's device.
            y: the same shape; detach it if it needs no gradient.

        Returns:
            float32 [B], 0 where x equals y.

        Raises:
            EvaluationError: the shapes differ, or are not supported by this distance.
        """
        if x.shape != y.shape or x.ndim != 4:
            raise EvaluationError(
                f"{self.name} compares two batches [B, C, H, W] of one shape, got {list(x.shape)} and {list(y.shape)}"
            )
        self._check_shape(tuple(x.shape[1:]))
        with torch.autocast(self.device.type, enabled=False):
            return self._distance(x.float(), y.float())

    @abstractmethod
    def _check_shape(self, shape: tuple[int, ...]) -> None: ...

    @abstractmethod
    def _distance(self, x: Tensor, y: Tensor) -> Tensor: ...


class Decoded(Perceptual):
    """A distance between samples, such as latents, measured on their decoded pictures.

    Args:
        perceptual: the distance between pictures.
        decode: samples -> pictures in [-1, 1], differentiable.
    """

    def __init__(self, perceptual: Perceptual, decode: Callable[[Tensor], Tensor]) -> None:
        self.perceptual, self.decode = perceptual, decode
        self.name, self.device = f"{perceptual.name} of decoded samples", perceptual.device

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        pass  # the inner distance checks the decoded shape

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.decode(y)
        return self.perceptual(self.decode(x), wanted)


class LPIPS(Perceptual):
    """LPIPS with VGG-16, as in DMD's regression loss; images smaller than 224 pixels are upsampled to 224.

    Network and learned channel weights are torchmetrics'. Zhang et al. 2018,
    https://arxiv.org/abs/1801.03924, equation 1; Yin et al. 2024 (DMD), https://arxiv.org/abs/2311.18828, for
    the upsampling. Grey images are repeated to three channels.

    Args:
        device: the network's device.
        pretrained: False gives a random VGG, for tests only (no weights file needed; `name` says so).

    Raises:
        EvaluationError: VGG-16's weights are not in the torch hub cache; never downloaded silently.
        EvaluationError: the file in the cache is damaged, or torchmetrics or torchvision is not installed.
    """

    size = 224

    def __init__(self, device: str | torch.device = "cpu", *, pretrained: bool = True) -> None:
        if pretrained:
            _check_vgg(vgg_path())
        try:
            import torchvision  # noqa: F401  (an undeclared requirement of torchmetrics)
            from torchmetrics.functional.image.lpips import _LPIPS
        except ImportError as error:
            raise EvaluationError(
                f"LPIPS needs the package {error.name}: pip install 'fewstep[lpips]', or choose the perceptual "
                "distance 'small' for 28x28 grey images"
            ) from error

        self.name = "lpips-vgg16" if pretrained else "lpips-vgg16-random"
        self.device = torch.device(device)
        net = _LPIPS(net="vgg", pnet_rand=not pretrained)
        self.net = net.eval().requires_grad_(False).to(self.device)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if shape[0] not in (1, 3):
            raise EvaluationError(f"{self.name} takes images of 1 or 3 channels, got shape {list(shape)}")

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        distance: Tensor = self.net(self._prepared(x), self._prepared(y))
        return distance.flatten()

    def _prepared(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        return x.expand(-1, 3, -1, -1)


def vgg_path() -> Path:
    """Path of VGG-16's weights: torchvision's file in the torch hub cache (`$TORCH_HOME`)."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(VGG_URL).name


def _check_vgg(file: Path) -> None:
    if not file.is_file():
        raise EvaluationError(
            f"LPIPS needs torchvision's VGG-16 weights at {file}. Try: download {VGG_URL} (528 MB) to there, with `fewstep fetch vgg16`. "
            "fewstep never downloads it by itself. Or choose the perceptual distance l2, or small for 28x28 grey images."
        )
    prefix = file.stem.rpartition("-")[2]
    digest = file_sha256(file)
    if not digest.startswith(prefix):
        raise EvaluationError(
            f"{file} is damaged: its sha256 begins {digest[:8]}, its name says {prefix}. Try: download {VGG_URL} again"
        )


class PerceptualNet(nn.Module):
    """The network behind `SmallPerceptual`: a small VGG, two convolutions at each of 28, 14 and 7 pixels.

    Takes float [B, 1, 28, 28] in [-1, 1]. Average pooling instead of maximum, for smoother gradients.
    """

    def __init__(self) -> None:
        super().__init__()

        def stage(c_in: int, c_out: int, kernel: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2),
                nn.ReLU(),
                nn.Conv2d(c_out, c_out, 3, padding=1),
                nn.ReLU(),
            )

        self.stages = nn.ModuleList([stage(1, 16, 5), stage(16, 32, 3), stage(32, 64, 3)])
        self.head = nn.Linear(64, 10)

    def features(self, x: Tensor) -> list[Tensor]:
        """Activations after each stage: [B, 16, 28, 28], [B, 32, 14, 14], [B, 64, 7, 7]."""
        out = []
        for i, stage in enumerate(self.stages):
            x = stage(x if i == 0 else F.avg_pool2d(x, 2))
            out.append(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Class logits [B, 10]."""
        logits: Tensor = self.head(self.features(x)[-1].mean((2, 3)))
        return logits


class SmallPerceptual(Perceptual):
    """LPIPS' formula on a small network that ships with fewstep, for grey 28x28 images.

    Zhang et al. 2018, https://arxiv.org/abs/1801.03924, equation 1 with all channel weights 1: the squared
    difference of unit-normalised activations, averaged over space, summed over channels and the three stages.
    Its scale is not LPIPS': a weight tuned for one does not carry over to the other.

    The network (`tools/train_features.py perceptual`) differs from the evaluation network (`SmallFeatures`)
    in architecture, seed and augmentation, so that a student does not train on its evaluation metric.

    Args:
        device: where the network runs.

    Raises:
        EvaluationError: the shipped weights do not match their model card.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        weights, self.card = load_asset("perceptual")
        self.sha256 = self.card["sha256"]
        self.name = f"small-perceptual-{self.sha256[:8]}"
        net = PerceptualNet()
        net.load_state_dict(weights)
        self.net = net.eval().requires_grad_(False).to(self.device)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if shape != (1, 28, 28):
            raise EvaluationError(f"{self.name} takes grey 28x28 images, got {list(shape)}. Try: use 'lpips'")

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        total = x.new_zeros(len(x))
        for f, g in zip(self.net.features(x), self.net.features(y), strict=True):
            total = total + (_unit(f) - _unit(g)).square().sum(1).mean((1, 2))
        return total


class L2(Perceptual):
    """Mean squared difference of pixels: the distance that needs no network. Students regress to blurred averages under it.

    Args:
        device: device of the images.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.name, self.device = "l2", torch.device(device)
        self.net = nn.Identity()

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        pass

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().flatten(1).mean(1)


def _unit(features: Tensor) -> Tensor:
    # the small constant (inside the root, as in torchmetrics) keeps gradients finite if all channels are 0
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + 1e-8)


def perceptual_for(
    shape: tuple[int, ...], name: PerceptualName = "auto", device: str | torch.device = "cpu"
) -> Perceptual:
    """Make the perceptual distance for images of a shape; write its `name` into the run's results.

    `auto` means LPIPS if VGG-16's weights are on this machine, else `SmallPerceptual` for grey 28x28 images, else `L2` with a
    line that says so.

    Args:
        shape: (C, H, W).
        name: "auto", "lpips", "small" or "l2".
        device: the network's device.

    Raises:
        EvaluationError: an unknown name, a distance that does not take this shape, a missing package, or LPIPS without its
            weights on this machine.
    """
    perceptual: Perceptual
    auto, name = name == "auto", _chosen(shape, name)
    if name == "small":
        perceptual = SmallPerceptual(device)
    elif name == "lpips":
        perceptual = LPIPS(device)
    elif name == "l2":
        perceptual = L2(device)
        if auto:
            note(
                "the distance of pairs is L2 (mean squared pixels), because LPIPS' weights are not on this machine: `fewstep fetch "
                "vgg16` gets them for a sharper student"
            )
    else:
        raise EvaluationError(f"`perceptual` must be auto, lpips, small or l2, got {name!r}")
    perceptual._check_shape(tuple(shape))
    return perceptual


def perceptual_outline(shape: tuple[int, int, int], name: PerceptualName = "auto") -> SmallPerceptual | LPIPS | L2:
    """Make the distance of `perceptual_for` on the meta device, for counting its cost; with `auto` LPIPS where it could be used.

    Raises:
        EvaluationError: a package is missing.
    """
    found: SmallPerceptual | LPIPS | L2
    chosen = _chosen(shape, name)
    if name == "auto" and chosen == "l2":  # the machine that trains may have the weights
        chosen = "lpips"
    if chosen == "small":
        found = SmallPerceptual("meta")
    elif chosen == "l2":
        found = L2("meta")
    else:
        with torch.device("meta"), warnings.catch_warnings():
            # torchmetrics reads its channel weights from a file; the values do not matter here
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
            found = LPIPS("meta", pretrained=False)
    return found


def _chosen(shape: tuple[int, ...], name: PerceptualName) -> PerceptualName:
    """Resolve `auto` on this machine."""
    if name != "auto":
        return name
    if vgg_path().is_file():
        return "lpips"
    return "small" if tuple(shape) == (1, 28, 28) else "l2"
