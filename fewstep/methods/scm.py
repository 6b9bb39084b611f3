"""sCM: continuous-time consistency distillation (Lu & Song, ICLR 2025, arXiv 2410.11081): a baseline without a fake score."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.noise import LogNormalNoise, NoiseLaw, Schedule, double_device, unsqueeze_as
from fewstep.methods.base import Batch, Nets, Terms
from fewstep.methods.consistency import OnTrajectories

__all__ = ["SCM"]

END = 1e-4  # radians: angles keep this distance from 0 and pi / 2, where F and the tangent divide by zero


class SCM(OnTrajectories):
    """The limit of consistency distillation in which neighbouring points meet, in the coordinates of TrigFlow (section 4.1):

        x_a = cos(a) x + sin(a) sd eps,  tan(a) = sigma_t / (alpha_t sd),  F(x_a, a) = (cos(a) x_a - D(x_t, t)) / (sd sin(a))
        v = sd F_teacher(x_a, a)     the slope of the teacher's trajectory; the student's sample is f = D, its slope df/da
        g = -cos²(a) (sd F - v) - r cos(a) sin(a) (x_a + sd dF/da)     cos(a) df/da; r rises from 0 to 1 over `warmup` images
        L = mean_i w_i mean (F - sg(F + g / (rms(g) + c)))²     algorithm 1

    dF/da is a forward-mode derivative (`torch.func.jvp`) along (v, 1). Departure: the paper learns a weight w(a), whose optimum
    is the reciprocal of the mean loss at that noise; here that mean is taken over groups of neighbours in noise. From memory of
    the paper: the equations; rms where its text has a norm, and the defaults, are those of NVIDIA's FastGen for CIFAR-10.
    """

    method: Literal["scm"] = "scm"
    noise: NoiseLaw = LogNormalNoise(mean=-1.0, std=1.4)
    """Noise levels of training."""
    sigma_data: float = Field(0.5, gt=0)
    """Standard deviation of the data (sd)."""
    warmup: int = Field(5_120_000, ge=0)
    """Images over which the second part of the tangent comes in (10,000 updates of 512)."""
    tangent_constant: float = Field(0.1, gt=0)
    """Constant c of the normalised tangent; tangents far below it keep their size."""
    weight_group: int = Field(16, ge=1)
    """Least number of samples, neighbours in noise, that share a weight."""

    def generator_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        schedule, sd = nets.teacher.schedule, self.sigma_data
        alpha, sigma = schedule.alpha_sigma(self.noise.draw(len(x), schedule).to(double_device(x.device)))
        a = torch.atan2(sigma.double(), sd * alpha.double()).clamp(END, torch.pi / 2 - END)
        cos, sin = (unsqueeze_as(f(a).float(), x) for f in (torch.cos, torch.sin))
        x_a = cos * x + sin * sd * torch.randn_like(x)
        student = nets.generator.denoiser
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
        ):  # the other attention kernels have no forward-mode derivative
            v = sd * self._f(nets.teacher, schedule, x_a, a, batch)
            ways = (cos * sin * v, a.cos() * a.sin())
            turn = torch.func.jvp(lambda x_a, a: self._f(student, schedule, x_a, a, batch), (x_a, a), ways)[1]
        f = self._f(student, schedule, x_a, a, batch)
        ramp = min(1.0, batch.images / self.warmup) if self.warmup else 1.0
        with torch.no_grad():
            g = -(cos**2) * (sd * f - v) - ramp * (cos * sin * x_a + sd * turn)
            rms = unsqueeze_as(g.flatten(1).square().mean(1).sqrt(), x)
            target = f + g / (rms + self.tangent_constant)
        loss = (f - target).square().flatten(1).mean(1)
        groups = [loss[near] for near in a.argsort().to(x.device).chunk(max(1, len(x) // self.weight_group))]
        weighted = torch.cat([part / part.detach().mean().clamp(min=1e-12) for part in groups])
        return Terms({"scm": weighted.mean()}, {"tangent": rms.mean()})

    def _f(self, denoiser: Denoiser, schedule: Schedule, x_a: Tensor, a: Tensor, batch: Batch) -> Tensor:
        """F(x_a, a) of a denoiser under its own schedule, which has sigma / alpha = sd tan(a)."""
        t = schedule.time(self.sigma_data * a.tan())
        alpha, sigma = schedule.alpha_sigma(t)
        x_t = unsqueeze_as(torch.hypot(alpha, sigma / self.sigma_data), x_a) * x_a
        cos, sin = (unsqueeze_as(f(a).float(), x_a) for f in (torch.cos, torch.sin))
        return (cos * x_a - denoiser(x_t, t, **batch.cond)) / (self.sigma_data * sin)
