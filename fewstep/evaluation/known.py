"""Weights that evaluation and regression use and that do not ship with fewstep, for `fewstep fetch`."""

from __future__ import annotations

from pathlib import Path

import torch

from fewstep.evaluation.features import INCEPTION_FILE, INCEPTION_SHA256
from fewstep.evaluation.perceptual import VGG_URL, vgg_path
from fewstep.system.fetch import Known

__all__ = ["KNOWN"]


def _inception() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


KNOWN = {
    "inception": Known(
        "Inception-v3 of 2015-12-05: FID, KID, precision and recall as published",
        f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}",
        INCEPTION_SHA256,
        95_628_359,
        _inception,
    ),
    "vgg16": Known(
        "VGG-16 of torchvision: LPIPS, the distance of DMD's pairs",
        VGG_URL,
        VGG_URL.rpartition("-")[2].removesuffix(".pth"),
        553_433_881,
        vgg_path,
    ),
}
