"""Interface of feature extractors: fixed maps from images to vectors, computed in exact float32."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fewstep.system.errors import EvaluationError


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Use exact float32 arithmetic: no autocast, no TF32, no bf16 inside float32 matmuls and convolutions.

    A trainer that enables fast matmuls (`torch.set_float32_matmul_precision("medium")`) would otherwise silently
    change the features, and with them every FID.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class Extractor(ABC):
    """A fixed map from images to feature vectors; the same image gives the same vector in any batch.

    Attributes:
        name: short name, part of the protocol id of every number.
        sha256: hash of the weights, to refuse statistics made with other weights.
        dim: length of one feature vector.
        classifier: float32 [classes, dim], from features to the logits of an Inception score; None without one.
    """

    name: str
    sha256: str
    dim: int
    device: torch.device
    classifier: Tensor | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Compute the features of a batch.

        Args:
            images: uint8 [B, C, H, W], values 0..255, on any device.

        Returns:
            float32 [B, dim] on the CPU.

        Raises:
            EvaluationError: not uint8, not four-dimensional, or of a shape that this extractor does not take.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise EvaluationError(
                f"{self.name} takes uint8 images [B, C, H, W], got {images.dtype} {list(images.shape)}: "
                "convert images in [-1, 1] with fewstep.data.to_uint8"
            )
        self._check_shape(tuple(images.shape[1:]))
        with exact_float32(self.device):
            return self._features(images.to(self.device)).float().cpu()

    @abstractmethod
    def _check_shape(self, shape: tuple[int, ...]) -> None: ...

    @abstractmethod
    def _features(self, images: Tensor) -> Tensor: ...

    def _of_fractions(self, images: Tensor) -> Tensor:
        """Features of resized pictures: float32 [B, 3, H, W] in 0..255."""
        return self._features(images.round().to(torch.uint8))


def file_sha256(file: Path) -> str:
    """Compute the sha256 (hex) of a file of any size."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()
