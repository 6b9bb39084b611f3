"""Small stand-ins for the networks and distances of the shipped recipes."""

import torch

from fewstep.evaluation.perceptual import Perceptual
from fewstep.formats.model import DenoiserSpec
from fewstep.networks import DhariwalUNetSpec, EDM2Spec, SongUNetSpec


def tiny(name: str) -> DenoiserSpec:
    """A small network with every property of the published one that a recipe can trip over."""
    shared = dict(size=8, model_channels=8, num_blocks=1, attn_resolutions=(4,), dropout=0.1)
    if name.startswith("imagenet-512"):
        return DenoiserSpec(net=EDM2Spec(**shared, channels=3, channel_mult=(1, 2), num_classes=1000))
    if name.startswith("imagenet"):
        return DenoiserSpec(net=DhariwalUNetSpec(**shared, channel_mult=(1, 2), num_classes=1000))
    classes = 10 if name.startswith("cifar10-cond") else 0
    return DenoiserSpec(net=SongUNetSpec(**shared, channel_mult=(1, 2), num_classes=classes, augment_dim=9))


class PictureDistance(Perceptual):
    """Stands for LPIPS."""

    name, device = "mean square", torch.device("cpu")

    def _check_shape(self, shape):
        assert shape == (3, 16, 16)

    def _distance(self, x, y):
        return ((x - y) ** 2).flatten(1).mean(1)


class Distance(torch.nn.Module):
    """Stands for LPIPS."""

    name = "mean square"

    def forward(self, x, y):
        return ((x - y) ** 2).flatten(1).mean(1)
