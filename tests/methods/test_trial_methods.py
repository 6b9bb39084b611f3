"""Three methods that fewstep does not ship, each in one short class without code of its own for GANs or rollouts.

SiDA: a GAN beside SiD. f-distill: DMD2 with a weight read off the discriminator. DP-DMD: the first step of an ODE rollout
regressed on the teacher's trajectory.
"""

import inspect
from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import denoising_loss
from fewstep.diffusion.generator import ddim_step
from fewstep.diffusion.noise import Karras, LogNormalNoise, NoiseLaw, UniformTime
from fewstep.methods import Batch, Critic, Nets, Objective, SiD, Terms
from fewstep.methods.gan import Adversarial
from fewstep.methods.losses import distribution_matching, dm_gradient, inject_gradient
from fewstep.teachers import MixtureTeacher
from fewstep.training.distill import Distillation, Setup
from fewstep.training.optim import OptimSpec
from fewstep.training.spec import TrainSpec
from fewstep.training.task import Micro
from tests.support.mixtures import Points

SCHEDULE = Karras(sigma_max=20.0)
BATCH = 64


class Mean(nn.Module):
    """The mean of the bottleneck as the logit: no parameters of its own."""

    def forward(self, feature: Tensor) -> Tensor:
        return feature.flatten(1).mean(1)


class SiDA(Adversarial):
    """Half SiD and half a GAN whose discriminator is the fake score's encoder (Zhou et al. 2024, arXiv 2410.14919)."""

    method: Literal["sida"] = "sida"
    sid: SiD = SiD()
    critic_noise: NoiseLaw = LogNormalNoise()
    gan_weight: float = 0.5
    discriminator_weight: float = 1.0

    def make_critic(self, teacher, denoiser) -> Critic:
        return Critic(denoiser, Mean(), f"net.{teacher.bottleneck}")

    def generator_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        terms = self.sid.generator_loss(nets, x, batch)
        terms.losses["sid"] = 0.5 * terms.losses["sid"]
        return self.add_gan(terms, nets, x, batch)


class FDistill(Adversarial):
    """Jensen-Shannon: the matching gradient times h(r) = r / (1 + r), r = exp(logit) (Xu et al. 2025, arXiv 2502.15681)."""

    method: Literal["f-distill"] = "f-distill"
    noise: NoiseLaw = UniformTime(low=0.02, high=0.98, steps=1000)

    def generator_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        t = self.noise.draw(len(x), nets.teacher.schedule).to(x.device)
        with torch.no_grad():
            x_t = nets.teacher.schedule.perturb(x, t, torch.randn_like(x))
            d_real = nets.teacher(x_t, t, **batch.cond)
            d_fake, logits = nets.critic.denoised_and_logits(x_t, t, batch.cond)
            weight = logits.sigmoid() / logits.sigmoid().mean()
            gradient = weight.reshape(-1, *[1] * (x.ndim - 1)) * dm_gradient(x, d_real, d_fake)
        probe = {"t": t, "x": x, "x_t": x_t, "d_real": d_real, "d_fake": d_fake}
        terms = Terms({"f": inject_gradient(x, gradient)}, {"weight": weight.max()}, probe)
        return self.add_gan(terms, nets, x, batch)


class FirstStep(Objective):
    """The first step ends where the teacher's ODE does, later ones match distributions (DP-DMD, arXiv 2602.03139)."""

    method: Literal["first-step"] = "first-step"
    noise: NoiseLaw = UniformTime(low=0.02, high=0.98, steps=1000)
    critic_noise: NoiseLaw = LogNormalNoise()
    teacher_steps: int = 8

    def generator_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        if batch.step > 0:
            return distribution_matching(nets, x, batch, self.noise)
        schedule, (first, second, *_) = nets.teacher.schedule, nets.generator.times
        times = [t.expand(len(x)) for t in torch.linspace(first, second, self.teacher_steps + 1, dtype=torch.float64)]
        target = batch.x_t
        with torch.no_grad():
            for t, to in pairwise(times):
                target = ddim_step(schedule, nets.teacher(target, t, **batch.cond), target, t, to)
        reached = ddim_step(schedule, x, batch.x_t, times[0], times[-1])
        return Terms({"first": (reached - target).square().mean()})

    def critic_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        t = self.critic_noise.draw(len(x), nets.teacher.schedule).to(x.device)
        return Terms({"denoising": denoising_loss(nets.critic.denoiser, x, t, torch.randn_like(x), batch.cond)})


@pytest.fixture(scope="module")
def mixture():
    """The ring of eight, and exact samples of it."""
    spec = MixtureTeacher(schedule=SCHEDULE, fit_steps=300)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return spec.load(), spec.denoiser().sample(4000)


def distillation(mixture, objective, sigmas, transition="renoise") -> Distillation:
    teacher, exact = mixture
    times = tuple(SCHEDULE.time(torch.tensor(sigmas, dtype=torch.float64)).tolist())
    train = TrainSpec(images=100 * BATCH, batch_size=BATCH, precision="fp32", device="cpu", evaluate_every=None)
    optim = OptimSpec(kind="adam", lr=1e-3, betas=(0.0, 0.999))
    real = Points(exact) if objective.needs_real else None
    return Distillation(Setup(teacher, times, objective, train, optim, optim, real, transition=transition))


def train(task: Distillation, updates: int) -> list[dict]:
    return [task.update(i * BATCH, [Micro(i * BATCH, BATCH, 0)]) for i in range(updates)]


@pytest.mark.parametrize(("objective", "own"), [(SiDA(), "sid"), (FDistill(), "f"), (FDistill(gan_ratio=0.5), "f")])
def test_a_method_with_a_gan_trains_with_both_terms(mixture, objective, own):
    task = distillation(mixture, objective, [2.5, 1.0])
    before = [p.detach().clone() for p in task.nets.generator.parameters()]
    stats = train(task, 30)
    assert all(
        torch.isfinite(torch.as_tensor(v)).all() for line in stats for v in line.values() if not isinstance(v, tuple)
    )
    assert all(torch.isfinite(p).all() for p in task.nets.critic.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(task.nets.generator.parameters(), before, strict=True))
    assert {"accuracy_real", "logit_fake", "loss/critic_gan"} <= stats[-1].keys()

    x = task.nets.generator([torch.randn(BATCH, 2)] * 2)
    terms = objective.generator_loss(task.nets, x, Batch({}))
    assert terms.losses.keys() == {own, "gan"}
    weights = list(task.nets.generator.parameters())
    for loss in terms.losses.values():
        gradients = torch.autograd.grad(loss, weights, retain_graph=True)
        assert all(torch.isfinite(g).all() for g in gradients) and any(g.abs().sum() > 0 for g in gradients)


def test_the_gan_is_balanced_against_the_methods_own_term(mixture):
    (stats, *_) = train(distillation(mixture, FDistill(gan_ratio=0.5, critic_steps=1), [2.5]), 1)
    assert stats["x_gradient/f"] > 0
    assert stats["x_gradient/gan"].item() == pytest.approx(0.5 * stats["x_gradient/f"].item(), rel=1e-4)
    said = dict(FDistill().advise({"x_gradient/f": 1.0, "x_gradient/gan": 100.0}))
    assert "1e+02 times that of the term f." in said["gan-weight"]


def test_an_exact_first_step_has_no_loss(mixture):
    """An x from which DDIM reaches the teacher's own point: (target - (sigma_2 / sigma_1) x_t) / (1 - sigma_2 / sigma_1)."""
    task = distillation(mixture, FirstStep(teacher_steps=1), [10.0, 1.0], "ode")
    made = task.nets.generator.rollout([torch.randn(BATCH, 2)])
    exact = task.nets.teacher(made.x_t, made.t)
    assert (
        FirstStep(teacher_steps=1).generator_loss(task.nets, exact, Batch({}, made.step, made.x_t)).losses["first"]
        < 1e-10
    )
    assert (
        FirstStep(teacher_steps=8).generator_loss(task.nets, exact, Batch({}, made.step, made.x_t)).losses["first"]
        > 1e-3
    )


def test_a_loss_on_the_first_step_of_an_ode_rollout_trains(mixture):
    task = distillation(mixture, FirstStep(critic_steps=1), [10.0, 1.0], "ode")
    stats = train(task, 80)
    first = [line["loss/generator_first"].item() for line in stats if "loss/generator_first" in line]
    assert len(first) + sum("loss/generator_dm" in line for line in stats) == 80 and 20 < len(first) < 60
    assert sum(first[-5:]) < 0.5 * sum(first[:5]), first


def test_each_is_one_short_class():
    for method in (SiDA, FDistill, FirstStep):
        assert len(inspect.getsource(method).splitlines()) <= 30
