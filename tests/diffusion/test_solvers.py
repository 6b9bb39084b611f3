import math

import pytest
import torch

from fewstep.diffusion.noise import Discrete, Karras, scaled_linear_alphas_cumprod
from fewstep.diffusion.solvers import Churn, edm_view, heun
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


def test_no_churn_is_the_deterministic_way():
    denoiser, z = MixtureTeacher().denoiser(), torch.randn(5, 2)
    assert torch.equal(heun(denoiser, z, 9), heun(denoiser, z, 9, Churn(0.0)))


def test_churn_keeps_the_distribution():
    """Noise added and removed again: the samples of one Gaussian stay its samples, but no longer follow from the start."""
    torch.manual_seed(0)
    denoiser = MixtureTeacher(means=((0.3,),), stds=(0.5,), schedule=Karras(sigma_max=20.0)).denoiser()
    z = torch.randn(20_000, 1)
    still = heun(denoiser, z, 127)
    x = heun(denoiser, z, 127, Churn(20.0), lambda step: torch.randn(20_000, 1))
    assert x.mean().item() == pytest.approx(0.3, abs=0.02) and x.std().item() == pytest.approx(0.5, rel=0.03)
    assert torch.corrcoef(torch.stack([x[:, 0], still[:, 0]]))[0, 1] < 0.5
    inflated = heun(denoiser, z, 127, Churn(20.0, inflate=1.2), lambda step: torch.randn(20_000, 1))
    assert inflated.std() > x.std() * 1.02


def test_churn_follows_algorithm_2():
    """One step from sigma by hand, and noise only between the two limits."""
    denoiser = MixtureTeacher(means=((0.3,),), stds=(0.5,), schedule=Karras()).denoiser()
    z, eps, asked = torch.randn(3, 1), torch.randn(3, 1), []

    def fresh(step):
        asked.append(step)
        return eps

    heun(denoiser, z, 35, Churn(40.0, low=0.05, high=50.0), fresh)
    grid = denoiser.schedule.alpha_sigma(denoiser.schedule.times(18))[1]
    assert asked == [i for i, sigma in enumerate(grid) if 0.05 <= sigma <= 50]
    higher = 80 * math.sqrt(2)  # 1 + 40 / 1 steps, bounded
    x_hat = 80 * z.double() + math.sqrt(higher**2 - 80**2) * 1.1 * eps.double()
    clean = (0.25 * x_hat + higher**2 * 0.3) / (0.25 + higher**2)  # E[x | x_hat] of N(0.3, 0.5²)
    expected = x_hat + (0 - higher) * (x_hat - clean) / higher
    torch.testing.assert_close(heun(denoiser, z, 1, Churn(40.0, inflate=1.1), fresh), expected.float())
