"""SiD: Score identity Distillation (Zhou et al., ICML 2024, arXiv 2404.04057). Data-free."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser, denoising_loss
from fewstep.diffusion.guidance import Guided
from fewstep.diffusion.noise import LogNormalNoise, NoiseLaw, UniformTime, double_device
from fewstep.methods.base import Batch, Nets, Objective, Terms
from fewstep.methods.losses import augmented, sid_loss

__all__ = ["SiD"]


class SiD(Objective):
    """A Fisher divergence between noised marginals, rewritten by score identities; gradients flow through both networks.

        L_G = loss_scale mean omega (D_r - D_f)·[(D_r - x) - alpha (D_r - D_f)]      `sid_loss`, eq. 23
        L_f = N mean residual(D_f, sg(x))²                                           `denoising_loss`

    Defaults are the paper's. The paper's generator starts at sigma = 2.5: set `generator.sigmas: [2.5]`.

    Few steps (arXiv 2505.12674) and flows (arXiv 2509.25127), checked against their abstracts alone: the loss on the output of a
    step drawn uniformly. Uncertain: later inputs (renoised), `weight: signal`, noise laws. Not here: Anti-CFG, a GAN (see SiDA).
    """

    method: Literal["sid"] = "sid"
    critic_first: bool = True
    """Train the fake score first in each iteration (algorithm 1)."""
    share_rollout: bool = False
    """Use one set of samples for both updates: a forward of eleven less. Else fresh ones without dropout, as in the paper."""
    alpha: float = 1.0
    """Weight of the second identity (1.0 or 1.2 in the paper; 0.5 is half the difference of squares)."""
    noise: NoiseLaw = UniformTime(low=0.0, high=0.8, steps=None)
    """Noise levels of the generator's loss: t_max = 800 of 1000."""
    critic_noise: NoiseLaw = LogNormalNoise(mean=-1.2, std=1.2)
    """Noise levels at which the fake score is trained."""
    augment: float = Field(0.0, ge=0, le=1)
    """Probability of EDM's augmentations in the fake score's training, which receives them as a condition (0.12 for CIFAR-10,
    0.15 for FFHQ and AFHQv2). EDM's networks only. The generator's loss has none, as in the authors' program."""
    loss_scale: float = Field(100.0, gt=0)
    """Factor on the generator's loss (Adam cancels it, up to its epsilon)."""
    weight: Literal["inverse-l1", "signal"] = "inverse-l1"
    """Weight of a sample: 1 / mean|x - D_r|, or alpha_t (1 - sigma_t of a flow: arXiv 2509.25127; from memory)."""
    critic_guidance: float | None = Field(None, ge=0)
    """Guidance scale of the fake score in its own training (arXiv 2406.01561, long-short guidance: kappa 1); null for none."""
    fake_guidance: float | None = Field(None, ge=0)
    """Guidance scale of the fake score in the generator's loss; null for none."""

    def generator_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        t = self.noise.draw(len(x), nets.teacher.schedule).to(double_device(x.device))
        x_t = nets.teacher.schedule.perturb(x, t, torch.randn_like(x))
        d_real = nets.teacher(x_t, t, **batch.cond)
        d_fake = self._fake_score(nets, self.fake_guidance)(x_t, t, **batch.cond)
        omega = nets.teacher.schedule.alpha_sigma(t)[0] if self.weight == "signal" else None
        loss = sid_loss(x, d_real, d_fake, self.alpha, omega).mean()
        probe = {"t": t, "x": x, "x_t": x_t, "d_real": d_real, "d_fake": d_fake}
        return Terms({"sid": self.loss_scale * loss}, probe={name: value.detach() for name, value in probe.items()})

    def critic_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        x, cond = augmented(x, batch.cond, self.augment)
        t = self.critic_noise.draw(len(x), nets.teacher.schedule).to(double_device(x.device))
        loss = denoising_loss(self._fake_score(nets, self.critic_guidance), x, t, torch.randn_like(x), cond)
        # a sum over pixels: Adam's epsilon then acts as in the authors' program
        return Terms({"denoising": x[0].numel() * loss})

    @staticmethod
    def _fake_score(nets: Nets, scale: float | None) -> Denoiser:
        """D_f, guided or not."""
        if scale is None or scale == 1:
            return nets.critic.denoiser
        assert nets.null is not None, "guidance needs the empty condition"
        return Guided(nets.critic.denoiser, nets.null, scale)
