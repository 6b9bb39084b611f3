"""The mixture of Gaussians as material for tests: points in place of a dataset, pairs in place of a folder, a distance."""

import numpy as np
import torch

from fewstep.diffusion.solvers import Solver
from fewstep.methods import Pairs


class Points:
    """Exact samples of the mixture in place of a dataset."""

    def __init__(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> None:
        self.x, self.labels = x, labels

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: torch.Tensor, flip=None):
        return self.x[indices], None if self.labels is None else self.labels[indices]


class PointPairs:
    """Noise and what the exact teacher's sampler makes of it, in place of a folder of pairs."""

    def __init__(self, denoiser, count: int) -> None:
        self.z = torch.randn(count, 2)
        with torch.no_grad():
            self.y = Solver()(denoiser, self.z, 35)

    def __len__(self) -> int:
        return len(self.z)

    def batch(self, indices, conditioner, device) -> Pairs:
        return Pairs(self.z[indices], self.y[indices], {})


def squared(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x - y).square().sum(1)


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| over all pairs (Székely & Rizzo 2013): 0 for equal laws only."""

    def mean_distance(a, b):
        return np.sqrt(np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0)).mean()

    return 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)
