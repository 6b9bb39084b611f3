"""Regression on teacher pairs alone: the warm-up of DMD2's one-step SDXL (Yin et al. 2024, arXiv 2405.14867, appendix)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fewstep.methods.base import Batch, Nets, Objective, Terms

__all__ = ["Regression"]


class Regression(Objective):
    """Perceptual distance of the generator's sample to the teacher's from the same noise. No critic, no real images.

        L_G = E[LPIPS(G(z_ref), y_ref)]      arXiv 2311.18828, eq. 9

    A generator needs this warm-up if its teacher never saw pure noise at the generator's timestep (SDXL's 399).
    """

    method: Literal["regression"] = "regression"

    @property
    def needs_pairs(self) -> bool:
        return True

    @property
    def starts_from(self) -> Literal["pairs"]:
        return "pairs"

    @property
    def needs_critic(self) -> bool:
        return False

    def generator_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        assert batch.pairs is not None and nets.perceptual is not None
        distance = nets.perceptual(x, batch.pairs.y).mean()
        return Terms({"regression": distance}, {"regression_distance": distance.detach()})

    def critic_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        raise AssertionError("regression has no critic")
