"""The GAN shared by the methods: its losses, settings and warnings. The discriminators are in `heads`.

A method inherits all of it from `Adversarial` and writes only its own generator loss, which ends with
`return self.add_gan(terms, nets, x, batch)`. Symbols: h(x_t) the head's logit (positive: looks real), w_g `gan_weight`, w_d
`discriminator_weight`, x_t = alpha_t x + sigma_t eps with t from `gan_noise`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser, denoising_loss
from fewstep.diffusion.noise import LogNormalNoise, NoiseLaw, UniformTime, double_device
from fewstep.methods.base import Batch, Critic, Nets, Objective, Terms

if TYPE_CHECKING:
    from fewstep.teachers.base import Teacher

__all__ = ["Adversarial", "discriminator_loss", "discriminator_stats", "gan_generator_loss"]

MOST_WEIGHT = 1000.0  # largest GAN weight under `gan_ratio`; a healthy head needs about 1


def gan_generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating generator loss mean softplus(-h(x_t)) of logits [B] (Goodfellow et al. 2014, arXiv 1406.2661, section 3)."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Discriminator loss mean softplus(h(fake)) + mean softplus(-h(real)) of logits [B]: the cross entropies of both classes.

    Yin et al. 2024 (arXiv 2405.14867), eq. 4, with log D = -softplus(-h) and log (1 - D) = -softplus(h).
    """
    return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()


def discriminator_stats(real_logits: Tensor, fake_logits: Tensor) -> dict[str, Tensor]:
    """Mean logits and accuracies of both classes, for the log."""
    real, fake = real_logits.detach(), fake_logits.detach()
    return {
        "logit_real": real.mean(), "logit_fake": fake.mean(), "accuracy_real": (real > 0).float().mean(),
        "accuracy_fake": (fake < 0).float().mean(),
    }  # fmt: skip


class Adversarial(Objective):
    """A method with a GAN on real images in addition to its own generator loss.

    The discriminator is a head on the fake score's bottleneck and sees noised images (a "diffusion GAN"). Each pass draws its
    own noise (Yin et al. 2024, arXiv 2405.14867, section 4.3, eq. 4):

        generator:  w_g mean softplus(-h(x_t))                                  added to the method's own terms
        critic:     denoising loss + w_d [mean softplus(h(x_t)) + mean softplus(-h(x_real_t))]

    The second gradient alone trains the critic, including the fake score's encoder half.
    """

    critic_noise: NoiseLaw = UniformTime(low=0.0, high=1.0, steps=1000)
    """Noise levels at which the fake score is trained."""
    gan_weight: float = Field(3e-3, ge=0)
    """Weight of the GAN term for the generator (w_g); 0 trains without real images."""
    gan_ratio: float | None = Field(None, gt=0)
    """Scale the GAN's gradient on the samples to this multiple of the norm of the method's own gradient, in each forward,
    instead of weighting it by `gan_weight` (which must still be above 0). A departure: the discriminator cannot dominate. The
    resulting weight stays below 1000, so that the gradient of an untrained head is not amplified."""
    discriminator_weight: float = Field(1e-2, gt=0)
    """Weight of the GAN term for the critic (w_d)."""
    gan_noise: Annotated[UniformTime | LogNormalNoise | None, Field(discriminator="kind")] = UniformTime(
        low=0.0, high=1.0, steps=1000
    )
    """Noise levels of the GAN head's inputs (a "diffusion GAN"); null: images without noise, at the cleanest level."""
    share_forward: bool = False
    """Let the head read the forward that trains the fake score instead of a separate one. Saves a third of the critic's
    passes. Off in the authors' program. Needs equal `gan_noise` and `critic_noise`."""

    @model_validator(mode="after")
    def _equal_noise(self) -> Adversarial:
        if self.share_forward and self.needs_real and self.gan_noise != self.critic_noise:
            # otherwise the head could tell fake from real images by their noise level
            raise ValueError(
                "`share_forward` must have equal gan_noise (of real images) and critic_noise (of fakes), got different laws. "
                "Try: make them equal, or turn share_forward off"
            )
        return self

    @property
    def needs_real(self) -> bool:
        return self.gan_weight > 0

    def make_critic(self, teacher: Teacher, denoiser: Denoiser) -> Critic:
        if not self.needs_real:
            return Critic(denoiser)
        from fewstep.methods.heads import make_head  # networks load when they are built

        layer = f"net.{teacher.bottleneck}"
        # a head takes larger pictures than it was made for, not smaller ones
        least = min((teacher, *teacher.sizes), key=lambda view: min(view.shape[1:], default=0))
        return Critic(denoiser, make_head(denoiser, layer, least.shape, least.conditioner), layer)

    def add_gan(self, terms: Terms, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        """Add the generator's GAN term, w_g mean softplus(-h(x_t)), to the method's own terms; none if `gan_weight` is 0.

        Args:
            terms: the method's own terms; `gan_ratio` refers to the first.
            nets: the networks.
            x: samples [B, ...].
            batch: their condition.

        Returns:
            `terms`, with the loss "gan" and the stat "logit_generator".
        """
        if self.needs_real:
            logits = nets.critic.logits(*self._noised(nets, x), batch.cond)
            if self.gan_ratio is not None:
                terms.balance["gan"] = (next(iter(terms.losses)), self.gan_ratio, MOST_WEIGHT / self.gan_weight)
            terms.losses["gan"] = self.gan_weight * gan_generator_loss(logits)
            terms.stats["logit_generator"] = logits.detach().mean()
        return terms

    def critic_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        t = self.critic_noise.draw(len(x), nets.teacher.schedule).to(double_device(x.device))
        eps = torch.randn_like(x)
        if not self.needs_real:
            return Terms({"denoising": denoising_loss(nets.critic.denoiser, x, t, eps, batch.cond)})
        assert batch.real is not None
        real_t, real_time = self._noised(nets, batch.real)
        if self.share_forward:
            residual, fake = nets.critic.residual_and_logits(x, t, eps, batch.cond)
            denoising = residual.square().mean()
        else:
            denoising = denoising_loss(nets.critic.denoiser, x, t, eps, batch.cond)
            fake = nets.critic.logits(*self._noised(nets, x), batch.cond)
        real = nets.critic.logits(real_t, real_time, batch.real_cond)
        losses = {"denoising": denoising, "gan": self.discriminator_weight * discriminator_loss(real, fake)}
        return Terms(losses, discriminator_stats(real, fake))

    def _noised(self, nets: Nets, x: Tensor) -> tuple[Tensor, Tensor]:
        """Noise samples for the head; return them with their times. Without `gan_noise`: the samples themselves and time 0."""
        if self.gan_noise is None:
            return x, torch.zeros(len(x), dtype=torch.float64, device=double_device(x.device))
        t = self.gan_noise.draw(len(x), nets.teacher.schedule).to(double_device(x.device))
        return nets.teacher.schedule.perturb(x, t, torch.randn_like(x)), t

    def advise(self, stats: dict[str, Any]) -> Iterator[tuple[str, str]]:
        if min(stats.get("accuracy_real", 0), stats.get("accuracy_fake", 0)) > 0.98:
            yield (
                "gan-saturated",
                "the discriminator tells real from fake almost always. Try: lower objective.discriminator-weight, or raise "
                "objective.gan-noise.low so that it sees noisier images",
            )
        if self.gan_weight * stats.get("balance/gan", 0.0) > MOST_WEIGHT / 10:
            yield (
                "gan-idle",
                "the discriminator's gradient on the samples nearly vanishes, so objective.gan-ratio would amplify noise: the head is "
                "untrained, or its learning rate is too high. Try: lower optim.critic.lr",
            )
        norms = {name.removeprefix("x_gradient/"): n for name, n in stats.items() if name.startswith("x_gradient/")}
        gan = norms.pop("gan", None)
        own, norm = next(iter(norms.items()), ("", 0.0))
        if gan == 0:  # no weight can balance such a head
            yield (
                "gan-idle",
                "the discriminator has no gradient on the samples. If this persists, try: lower optim.critic.lr",
            )
        elif gan is not None and norm and self.gan_ratio is None and not 0.03 < gan / norm < 3:
            yield (
                "gan-weight",
                f"the GAN's gradient on x is {gan / norm:.2g} times that of the term {own}. Try: objective.gan-weight "
                f"{self.gan_weight * norm / gan:.1g} makes them equal, as DMD2's authors advise",
            )
