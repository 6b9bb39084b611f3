"""SiDA: Adversarial Score identity Distillation (Zhou et al., ICLR 2025, arXiv 2410.14919). SiD and a GAN on real images."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser, denoising_loss
from fewstep.diffusion.noise import LogNormalNoise, NoiseLaw, UniformTime, double_device
from fewstep.methods.base import Batch, Critic, Nets, Objective, Terms
from fewstep.methods.gan import discriminator_loss, discriminator_stats, gan_generator_loss
from fewstep.methods.losses import augmented, sid_loss, sid_weight

__all__ = ["SiDA"]


class SiDA(Objective):
    """SiD whose fake score is a discriminator too: its bottleneck's mean over channels is a map of logits h, without new weights.

        L_G = ½ loss_scale mean_i L_i + ½ w_g N mean_i omega_i mean softplus(-clip(h(x_t), ±10))     L_i of `sid_loss`
        L_f = N mean residual(D_f, sg(x))² + w_d mean_i lambda(t_i) ½ [mean softplus(h(x_t)) + mean softplus(-h(x_real_t))]

    with lambda = 1/s² + 1/0.5², s = sigma_t / alpha_t; real images get the samples' noise. All as in the authors' program, but
    for lambda's s of at least 0.002, EDM's cleanest level: a flow's t = 0 has s = 0.
    """

    method: Literal["sida"] = "sida"
    critic_first: bool = True
    share_rollout: bool = False
    alpha: float = 1.0
    noise: NoiseLaw = UniformTime(low=0.0, high=0.8, steps=None)
    critic_noise: NoiseLaw = LogNormalNoise(mean=-1.2, std=1.2)  # EDM's
    loss_scale: float = Field(100.0, gt=0)
    augment: float = Field(0.0, ge=0, le=1)
    """Probability of EDM's augmentations in the fake score's and the discriminator's training."""
    gan_weight: float = Field(0.01, ge=0)
    """Weight of the generator's GAN term (w_g); 0 is SiD, without real images."""
    gan_after: int = Field(200_000, ge=0)
    """Images after which the generator gets its GAN term; SiD's loss before."""
    discriminator_weight: float = Field(1.0, gt=0)
    """Weight of the fake score's GAN term (w_d)."""

    @property
    def needs_real(self) -> bool:
        return self.gan_weight > 0

    def make_critic(self, teacher: Any, denoiser: Denoiser) -> Critic:
        from fewstep.methods.heads import MeanHead  # networks load when they are built

        return Critic(denoiser, MeanHead(), f"net.{teacher.bottleneck}") if self.needs_real else Critic(denoiser)

    def generator_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        t = self.noise.draw(len(x), nets.teacher.schedule).to(double_device(x.device))
        x_t = nets.teacher.schedule.perturb(x, t, torch.randn_like(x))
        d_real = nets.teacher(x_t, t, **batch.cond)
        if not self.needs_real or batch.images < self.gan_after:
            d_fake = nets.critic(x_t, t, batch.cond)
            losses = {"sid": self.loss_scale * sid_loss(x, d_real, d_fake, self.alpha).mean()}
        else:
            d_fake, logits = nets.critic.denoised_and_logits(x_t, t, batch.cond)
            losses = {"sid": self.loss_scale / 2 * sid_loss(x, d_real, d_fake, self.alpha).mean()}
            weight = self.gan_weight / 2 * x[0].numel() * sid_weight(x, d_real).mean()
            losses["gan"] = weight * gan_generator_loss(logits.clamp(-10, 10))
        probe = {"t": t, "x": x, "x_t": x_t, "d_real": d_real, "d_fake": d_fake}
        return Terms(losses, probe={name: value.detach() for name, value in probe.items()}, one_graph=True)

    def critic_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        schedule, (x, cond) = nets.teacher.schedule, augmented(x, batch.cond, self.augment)
        t, eps = self.critic_noise.draw(len(x), schedule).to(double_device(x.device)), torch.randn_like(x)
        if batch.real is None:
            return Terms({"denoising": x[0].numel() * denoising_loss(nets.critic.denoiser, x, t, eps, cond)})
        y, real_cond = augmented(batch.real, batch.real_cond, self.augment)
        residual, fake = nets.critic.residual_and_logits(x, t, eps, cond)
        real = nets.critic.logits(schedule.perturb(y, t, eps), t, real_cond)
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        weight = self.discriminator_weight * ((alpha_t / sigma_t).clamp(max=500) ** 2 + 4).mean() / 2
        losses = {"denoising": x[0].numel() * residual.square().mean(), "gan": weight * discriminator_loss(real, fake)}
        return Terms(losses, discriminator_stats(real, fake))
