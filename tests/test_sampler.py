import math

import pytest
import torch

from fewstep.noise import Discrete, Karras, scaled_linear_alphas_cumprod
from fewstep.sampler import edm_view, heun
from fewstep.teachers import MixtureTeacher


def solution(z, mean, std, sigma_max):
    """The probability-flow ODE of one Gaussian: (x - mean) scales as √(std² + sigma²)."""
    return mean + (sigma_max * z - mean) * std / math.sqrt(std**2 + sigma_max**2)


def error(evaluations, std=0.5, mean=0.3):
    teacher = MixtureTeacher(means=((mean,),), stds=(std,), schedule=Karras(sigma_max=20.0))
    z = torch.randn(200, 1)
    return (
        (heun(teacher.denoiser().double(), z, evaluations).double() - solution(z.double(), mean, std, 20.0))
        .abs()
        .max()
        .item()
    )


def test_second_order():
    """Twice the steps, a quarter of the error (the last, uncorrected step is to sigma_min = 0.002 and negligible)."""
    torch.manual_seed(1)
    coarse = error(2 * 16 - 1)
    torch.manual_seed(1)
    fine = error(2 * 32 - 1)
    assert 3.2 < coarse / fine < 5.5
    assert fine < 0.03


@pytest.mark.parametrize("evaluations", [1, 2, 5, 9, 18, 35])
def test_takes_exactly_the_evaluations_asked_for(evaluations):
    denoiser = MixtureTeacher().denoiser()
    calls = []
    denoiser.register_forward_hook(lambda *a: calls.append(1))
    heun(denoiser, torch.randn(3, 2), evaluations)
    assert len(calls) == evaluations


def test_zero_evaluations_are_refused():
    with pytest.raises(ValueError, match="35"):
        heun(MixtureTeacher().denoiser(), torch.randn(3, 2), 0)


def test_samples_of_the_mixture_lie_on_its_ring():
    x = heun(MixtureTeacher().denoiser(), torch.randn(2000, 2), 35)
    distance = torch.cdist(x, MixtureTeacher().denoiser().means).min(1)
    assert (distance.values < 0.4).float().mean() > 0.99
    assert torch.bincount(distance.indices, minlength=8).min() > 150


def test_a_vp_model_samples_through_its_ve_view():
    vp = MixtureTeacher(schedule=Discrete(alphas_cumprod=scaled_linear_alphas_cumprod())).denoiser()
    assert isinstance(edm_view(vp).schedule, Karras)
    x = heun(vp, torch.randn(1000, 2), 35)
    assert (torch.cdist(x, vp.means).min(1).values < 0.4).float().mean() > 0.98
