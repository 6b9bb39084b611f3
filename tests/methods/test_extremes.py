"""Losses of the later methods at the ends of a schedule, t = 0 and t = 1, where a weight may divide by zero."""

import pytest
import torch

from fewstep.diffusion.guidance import Guided
from fewstep.diffusion.noise import Discrete, LogNormalNoise, RectifiedFlow, UniformTime, scaled_linear_alphas_cumprod
from fewstep.methods import DPDMD, GAN, SCM, TDM, Batch, Consistency, DecoupledDMD, FDistill, SiDA
from fewstep.teachers import MixtureTeacher
from fewstep.training.distill import Distillation, Setup
from fewstep.training.optim import OptimSpec
from fewstep.training.spec import TrainSpec
from tests.support.mixtures import Points

COUNT = 16
SD = scaled_linear_alphas_cumprod()
SCHEDULES = {
    "flow": (RectifiedFlow(shift=3.0), "flow"),
    "whole-table": (Discrete(alphas_cumprod=(1.0, *SD[:-1], 0.0)), "v"),  # both ends: without noise, without signal
}
METHODS = {
    "sida": (SiDA(gan_after=0), 1, "renoise"),
    "f-distill": (FDistill(), 1, "renoise"),
    "tdm": (TDM(), 1, "ode"),
    "tdm-2": (TDM(), 2, "ode"),
    "dp-dmd": (DPDMD(gan_weight=3e-3), 2, "ode"),
    "consistency": (Consistency(levels=2), 1, "renoise"),  # both intervals touch an end
    "scm": (SCM(warmup=0), 1, "renoise"),
    "decoupled-dmd": (DecoupledDMD(gan_weight=3e-3), 1, "renoise"),
    "gan": (GAN(), 1, "renoise"),
}


@pytest.fixture(scope="module", params=SCHEDULES)
def teacher(request):
    schedule, prediction = SCHEDULES[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        teacher = MixtureTeacher(schedule=schedule, prediction=prediction, fit_steps=20).load()
        teacher.start()  # fits the student, before any law is replaced
        return teacher


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_are_finite_at_the_ends(teacher, monkeypatch, method, end, bf16):
    objective, steps, transition = METHODS[method]
    for law in (UniformTime, LogNormalNoise):
        monkeypatch.setattr(law, "draw", lambda self, count, schedule: torch.full((count,), end, dtype=torch.float64))
    if method.startswith("tdm"):  # draws its own times, within [0, 1)
        monkeypatch.setattr(torch, "rand", lambda count, dtype: torch.full((count,), end, dtype=dtype))
    points = Points(torch.randn(64, 2)) if objective.needs_real else None
    train = TrainSpec(images=COUNT, batch_size=COUNT, precision="fp32", device="cpu", evaluate_every=None)
    optims = [OptimSpec(kind="adam", lr=1e-4)] * 2
    unguided = objective.model_copy(update={"guidance": None})  # a mixture has no classes
    nets = Distillation(
        Setup(teacher, (1.0, 0.5)[:steps], unguided, train, *optims, points, transition=transition)
    ).nets
    if isinstance(objective, DecoupledDMD):
        nets.teacher = Guided(teacher.denoiser, dict, 4.0)
    batches = [Batch({}, step, torch.randn(COUNT, 2), torch.randn(COUNT, 2)) for step in range(steps)]
    trained = {"generator": nets.generator, **({"critic": nets.critic} if objective.needs_critic else {})}
    for batch in batches:
        for side, module in trained.items():
            x = torch.randn(COUNT, 2, requires_grad=side == "generator")
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                terms = getattr(objective, f"{side}_loss")(nets, x, batch)
            loss = sum(terms.losses.values())
            wanted = [p for p in module.requires_grad_(True).parameters()] + [x] * x.requires_grad
            found = [g for g in torch.autograd.grad(loss, wanted, allow_unused=True) if g is not None]
            assert loss.isfinite() and found and all(g.isfinite().all() for g in found), (side, batch.step, loss)
            if end == 0:  # t = 1 has no signal to learn from
                assert any(g.any() for g in found), f"{side}: no gradient at all"
