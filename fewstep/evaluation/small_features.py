"""Feature extractors for small images that ship with the package, and raw pixels."""

import hashlib
import json
import math
from importlib import resources
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from fewstep.evaluation.extractor import Extractor
from fewstep.system.errors import EvaluationError

ASSETS = resources.files("fewstep") / "assets" / "features"


class SmallNet(nn.Sequential):
    """The classifier behind `SmallFeatures`: four convolutions with batch norm, 64 ReLU features, 10 classes.

    Takes float [B, 1, 28, 28] in [-1, 1]. The 7x7 map is flattened, not pooled, so that the features keep
    spatial information.
    """

    def __init__(self) -> None:
        def block(c_in: int, c_out: int, stride: int) -> list[nn.Module]:
            return [
                nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(),
            ]

        layers = [*block(1, 24, 1), *block(24, 48, 2), *block(48, 64, 2), *block(64, 32, 1)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10))


class SmallFeatures(Extractor):
    """64 penultimate ReLU features of a small Fashion-MNIST classifier that ships with fewstep, for grey images.

    Made for 28x28; other sizes are resized to that (bilinear, antialiased), as Inception resizes to 299x299.
    Trained by `tools/train_features.py features`; its model card describes the training and its accuracy. Distances
    are comparable only with each other, never with an Inception FID.

    Args:
        device: the network's device.

    Raises:
        EvaluationError: the shipped weights do not match their model card.
    """

    dim = 64

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.name = "small64"
        self.device = torch.device(device)
        weights, self.card = load_asset("small64")
        self.sha256 = self.card["sha256"]
        net = SmallNet()
        net.load_state_dict(weights)
        without_head = nn.Sequential(*list(net)[:-1])
        self.net = without_head.eval().requires_grad_(False).to(self.device)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if shape[0] != 1:
            raise EvaluationError(
                f"{self.name} takes grey images [1, H, W], got {list(shape)}. Try: use the extractor "
                "'inception', or 'pixels' for tiny images"
            )

    def _features(self, images: Tensor) -> Tensor:
        images = images.float() / 127.5 - 1
        if images.shape[2:] != (28, 28):
            images = nn.functional.interpolate(images, size=(28, 28), mode="bilinear", antialias=True)
        features: Tensor = self.net(images)
        return features


class Pixels(Extractor):
    """Pixels in [0, 1], flattened over C, H, W, for images as tiny as 8x8 digits.

    Args:
        shape: (C, H, W) of the images.
        device: the device of the (trivial) computation.
    """

    # the name of version 0.1.0, so that results stay comparable across versions
    sha256 = hashlib.sha256(b"fewstep.features.Pixels: uint8 / 255, flattened C, H, W").hexdigest()

    def __init__(self, shape: tuple[int, ...], device: str | torch.device = "cpu") -> None:
        self.shape = tuple(shape)
        self.dim = math.prod(shape)
        self.name = f"pixels{self.dim}"
        self.device = torch.device(device)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if shape != self.shape:
            raise EvaluationError(f"images must have the shape of {self.name}, {list(self.shape)}, got {list(shape)}")

    def _features(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() / 255


def load_asset(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load a shipped network: weights and model card (JSON), checked against each other.

    Raises:
        EvaluationError: the weights do not match the model card.
    """
    content = (ASSETS / f"{name}.safetensors").read_bytes()
    card = json.loads((ASSETS / f"{name}.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(content).hexdigest()
    if digest != card["sha256"]:
        raise EvaluationError(
            f"{ASSETS}/{name}.safetensors has sha256 {digest}, its card says {card['sha256']}. Try: reinstall "
            "fewstep, or train it again with tools/train_features.py"
        )
    return load(content), card
