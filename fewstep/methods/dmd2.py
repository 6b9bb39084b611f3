"""DMD2: Improved Distribution Matching Distillation (Yin et al., NeurIPS 2024, arXiv 2405.14867)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from fewstep.diffusion.noise import NoiseLaw, UniformTime
from fewstep.methods.base import Batch, Nets, Terms
from fewstep.methods.gan import Adversarial
from fewstep.methods.losses import distribution_matching

__all__ = ["DMD2"]


class DMD2(Adversarial):
    """Distribution matching without regression: two time scales, a GAN on real images, one or several steps.

        L_G = ½ mean (x - sg(x - g))² + w_g mean softplus(-h(x_t))        eq. 2 and eq. 4
        L_D = mean residual² + w_d [mean softplus(h(x_t)) + mean softplus(-h(x_real_t))]

    with g of `dm_gradient`, the head's logit h and the weights of `Adversarial`. The GAN term has the authors' non-saturating
    form. The critic is updated `critic_steps` times as often as the generator (section 4.2).

    For several steps (backward simulation, section 4.4) give the generator more times. Defaults are the paper's for
    ImageNet-64; `share_forward: true` is a departure.
    """

    method: Literal["dmd2"] = "dmd2"
    critic_steps: int = Field(5, ge=1)
    """Critic updates per generator update (section 4.2: 5 on ImageNet and SDXL, 10 on SD1.5)."""
    noise: NoiseLaw = UniformTime(low=0.02, high=0.98, steps=1000)
    """Noise levels at which the two scores are compared."""

    def generator_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        return self.add_gan(distribution_matching(nets, x, batch, self.noise), nets, x, batch)
