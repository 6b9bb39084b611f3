"""DMD2: Improved Distribution Matching Distillation (Yin et al., NeurIPS 2024, arXiv 2405.14867)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser, denoising_loss
from fewstep.diffusion.noise import LogNormalNoise, NoiseLaw, UniformTime
from fewstep.methods.base import ENCODER, Batch, Critic, Nets, Objective, Terms
from fewstep.methods.discriminator import make_head
from fewstep.methods.dmd import distribution_matching
from fewstep.methods.losses import discriminator_loss, gan_generator_loss
from fewstep.teachers.base import Teacher

__all__ = ["DMD2"]

MOST_WEIGHT = 1000.0  # of the GAN under `gan_ratio`; a healthy head needs about 1


class DMD2(Objective):
    """Distribution matching without regression: two time scales, a GAN on real images, one or several steps.

    Several steps (backward simulation) are the generator's business: give it more times. Defaults are the paper's for
    ImageNet-64; `share_forward` is a departure if switched on.
    """

    method: Literal["dmd2"] = "dmd2"
    critic_steps: int = Field(5, ge=1)
    """Critic updates per generator update (section 4.2: 5 on ImageNet and SDXL, 10 on SD1.5)."""
    noise: NoiseLaw = UniformTime(low=0.02, high=0.98, steps=1000)
    """Noise levels at which the two scores are compared."""
    critic_noise: NoiseLaw = UniformTime(low=0.0, high=1.0, steps=1000)
    """Noise levels the fake score is trained at."""
    gan_weight: float = Field(3e-3, ge=0)
    """Weight of the GAN term for the generator (w_g); 0 trains without real images."""
    gan_ratio: float | None = Field(None, gt=0)
    """Scale the GAN's gradient on the samples to this many times the norm of the matching one, in each forward, instead of
    by `gan_weight` (which must still be above 0). A departure: the discriminator then cannot run away from the generator. What
    a head that knows nothing says is not blown up: the weight that this amounts to stays below 1000."""
    discriminator_weight: float = Field(1e-2, gt=0)
    """Weight of the GAN term for the critic (w_d)."""
    gan_noise: Annotated[UniformTime | LogNormalNoise | None, Field(discriminator="kind")] = UniformTime(
        low=0.0, high=1.0, steps=1000
    )
    """Noise levels of what the GAN head sees (a "diffusion GAN"); null: images as they are, at the cleanest level."""
    share_forward: bool = False
    """Let the head read the forward that trains the fake score, instead of one with noise of its own: the same law of
    noise, a third of the critic's passes saved. Off in the authors' program. Needs equal `gan_noise` and `critic_noise`."""

    @model_validator(mode="after")
    def _equal_noise(self) -> DMD2:
        if self.share_forward and self.needs_real and self.gan_noise != self.critic_noise:
            # the head would see fakes at critic_noise and real images at gan_noise: it learns to read the noise level
            raise ValueError(
                "share_forward shows the head fakes at critic_noise and real images at gan_noise: make them equal, or turn "
                "share_forward off"
            )
        return self

    @property
    def needs_real(self) -> bool:
        return self.gan_weight > 0

    def make_critic(self, teacher: Teacher, denoiser: Denoiser) -> Critic:
        if not self.needs_real:
            return Critic(denoiser)
        layer = f"net.{teacher.bottleneck}"
        return Critic(denoiser, make_head(denoiser, layer, teacher.shape, teacher.conditioner), layer)

    def generator_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        terms = distribution_matching(nets, x, batch, self.noise)
        if self.needs_real:
            logits = nets.critic.logits(*self._noised(nets, x), batch.cond)
            terms.losses["gan"] = self.gan_weight * gan_generator_loss(logits)
            terms.stats["logit_generator"] = logits.detach().mean()
            if self.gan_ratio is not None:
                terms.balance["gan"] = ("dm", self.gan_ratio, MOST_WEIGHT / self.gan_weight)
        return terms

    def critic_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        t = self.critic_noise.draw(len(x), nets.teacher.schedule).to(x.device)
        eps = torch.randn_like(x)
        if not self.needs_real:
            return Terms({"denoising": denoising_loss(nets.critic.denoiser, x, t, eps, batch.cond)})
        assert batch.real is not None
        real_t, real_time = self._noised(nets, batch.real)
        if self.share_forward:
            residual, fake = nets.critic.judge_residual(x, t, eps, batch.cond)
            denoising = residual.square().mean()
        else:
            denoising = denoising_loss(nets.critic.denoiser, x, t, eps, batch.cond)
            fake = nets.critic.logits(*self._noised(nets, x), batch.cond)
        real = nets.critic.logits(real_t, real_time, batch.real_cond)
        losses = {"denoising": denoising, "gan": self.discriminator_weight * discriminator_loss(real, fake)}
        stats = {
            "logit_real": real.detach().mean(),
            "logit_fake": fake.detach().mean(),
            "accuracy_real": (real.detach() > 0).float().mean(),
            "accuracy_fake": (fake.detach() < 0).float().mean(),
        }
        return Terms(losses, stats)

    def _noised(self, nets: Nets, x: Tensor) -> tuple[Tensor, Tensor]:
        """Samples with fresh noise of the head's law, and their times; the samples themselves and 0 if it has none."""
        if self.gan_noise is None:
            return x, torch.zeros(len(x), dtype=torch.float64, device=x.device)
        t = self.gan_noise.draw(len(x), nets.teacher.schedule).to(x.device)
        return nets.teacher.schedule.perturb(x, t, torch.randn_like(x)), t

    def generator_cost(self) -> dict[str, float]:
        return {"scores": 1.0 + self.teacher_cost} | ({"generator GAN": 2 * ENCODER} if self.needs_real else {})

    def critic_cost(self) -> dict[str, float]:
        gan = (3.0 if self.share_forward else 6.0) * ENCODER
        return {"fake score": 3.0} | ({"critic GAN": gan} if self.needs_real else {})

    def advise(self, stats: dict[str, Any]) -> Iterator[tuple[str, str]]:
        if min(stats.get("accuracy_real", 0), stats.get("accuracy_fake", 0)) > 0.98:
            yield (
                "gan-saturated",
                "the discriminator tells real from fake almost always: lower objective.discriminator-weight, or raise "
                "objective.gan-noise.low so that it sees noisier images",
            )
        if self.gan_weight * stats.get("balance/gan", 0.0) > MOST_WEIGHT / 10:
            yield (
                "gan-idle",
                "the discriminator's gradient on the samples nearly vanishes, so that objective.gan-ratio would blow up noise: it has "
                "learnt nothing, or died of its learning rate: lower optim.critic.lr",
            )
        gan, dm = stats.get("x_gradient/gan"), stats.get("x_gradient/dm")
        if gan == 0:  # a head that died: no weight would balance it
            yield ("gan-idle", "the discriminator has no gradient on the samples: if that stays, lower optim.critic.lr")
        elif gan is not None and dm and self.gan_ratio is None and not 0.03 < gan / dm < 3:
            yield (
                "gan-weight",
                f"the GAN's gradient on x is {gan / dm:.2g} times the distribution matching one: objective.gan-weight "
                f"{self.gan_weight * dm / gan:.1g} would make them equal (the authors' advice)",
            )
