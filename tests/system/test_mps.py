"""Apple's MPS knows no float64. Here the meta device stands for it: no tensor of that type may come to be there."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.diffusion import noise
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.guidance import Guided
from fewstep.diffusion.noise import Discrete, Karras, RectifiedFlow, scaled_linear_alphas_cumprod
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.diffusion.solvers import Churn, Solver
from fewstep.methods import DMD2, SiD
from fewstep.methods.base import Batch, Critic, Nets
from fewstep.networks import DiTSpec

SCHEDULES = {
    "edm": Karras(),
    "eps": Discrete(alphas_cumprod=scaled_linear_alphas_cumprod()),
    "flow": RectifiedFlow(shift=3.0),
}


class NoDouble(TorchDispatchMode):
    """Refuses float64 on the meta device; what is copied from there to the CPU is zeros."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and str(kwargs.get("device", "meta")) == "cpu":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="cpu")
        made = func(*args, **kwargs)
        for value in made if isinstance(made, tuple | list) else [made]:
            if isinstance(value, torch.Tensor) and value.is_meta:
                assert value.dtype != torch.float64, func
        return made


@pytest.fixture
def without_double(monkeypatch):
    monkeypatch.setattr(noise, "_WITHOUT_DOUBLE", ("meta",))


def denoiser(prediction):
    with torch.device("meta"):
        net = DiTSpec(size=8, channels=1, patch=4, width=16, depth=1, heads=2, num_classes=3).build()
    return Preconditioned(net, SCHEDULES[prediction], prediction)


@pytest.mark.parametrize("prediction", SCHEDULES)
@pytest.mark.parametrize("transition", ["renoise", "ode"])
def test_no_double_on_such_a_device(prediction, transition, without_double):
    """Rollouts, guided sampling of a teacher, and the losses of two methods."""
    teacher = denoiser(prediction)
    generator = Generator(denoiser(prediction), [1.0, 0.5], transition)
    x = torch.zeros(2, 1, 8, 8, device="meta")
    cond = {"labels": torch.zeros(2, dtype=torch.long, device="meta")}
    guided = Guided(teacher, dict, 2.0)
    with NoDouble():
        made = generator([x, x], **cond)
        assert made.is_meta
        assert Solver()(guided, x, 4, **cond).is_meta
        assert Solver(churn=Churn(40))(guided, x, 3, lambda step: torch.zeros(2, 1, 8, 8), **cond).is_meta
        nets = Nets(generator, guided, Critic(denoiser(prediction)))
        for method in (DMD2(gan_weight=0), SiD()):
            sum(method.generator_loss(nets, generator([x, x], **cond), Batch(cond)).losses.values()).backward()
            sum(method.critic_loss(nets, made.detach(), Batch(cond)).losses.values()).backward()


def test_the_rule_can_fail():
    x = torch.zeros(2, 1, 8, 8, device="meta")
    with NoDouble(), pytest.raises(AssertionError):
        Generator(denoiser("edm"), [1.0])([x])
