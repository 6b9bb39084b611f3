"""A GAN alone: the baseline that shows what distribution matching adds. The diffusion GAN of DMD2, without matching."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from fewstep.methods.base import Batch, Nets, Terms
from fewstep.methods.gan import Adversarial

__all__ = ["GAN"]


class GAN(Adversarial):
    """The GAN term of DMD2 and nothing else:

        L_G = w_g mean softplus(-h(x_t))     arXiv 2405.14867, eq. 4

    The discriminator's trunk is still trained as a fake score.
    """

    method: Literal["gan"] = "gan"
    gan_weight: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _alone(self) -> GAN:
        if self.gan_ratio is not None:
            raise ValueError(f"gan_ratio must be null for method `gan`, which has no other term, got {self.gan_ratio}")
        return self

    def generator_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        return self.add_gan(Terms({}), nets, x, batch)
