import math

import pytest
import torch
from pydantic import ValidationError

from fewstep.diffusion.noise import (
    Discrete,
    Karras,
    LogNormalNoise,
    RectifiedFlow,
    UniformTime,
    scaled_linear_alphas_cumprod,
)

ZERO_SNR = (*torch.linspace(0.999, 0.01, 99).tolist(), 0.0)
SCHEDULES = [
    Karras(),
    Karras(sigma_min=0.01, sigma_max=20, rho=3),
    Discrete(alphas_cumprod=scaled_linear_alphas_cumprod()),
    Discrete(alphas_cumprod=ZERO_SNR),
    RectifiedFlow(),
    RectifiedFlow(shift=3.0),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.kind)
def test_snr_falls_strictly(schedule):
    alpha, sigma = schedule.alpha_sigma(torch.linspace(0, 1, 333, dtype=torch.float64))
    angle = torch.atan2(sigma.double(), alpha.double())
    assert (angle.diff() > 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.kind)
def test_time_inverts_alpha_sigma(schedule):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    back = schedule.time(sigma.double() / alpha.double())
    torch.testing.assert_close(back, t, atol=2e-5, rtol=0)


def test_karras_grid_is_the_papers():
    """Karras et al. 2022, eq. 5, counted from the smallest sigma as in DMD2's program; SiD's formula for u is the same."""
    n, rho = 1000, 7
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    expected = (0.002 ** (1 / rho) + ramp * (80 ** (1 / rho) - 0.002 ** (1 / rho))) ** rho
    sigma = Karras().alpha_sigma(torch.arange(n).double() / (n - 1))[1]
    torch.testing.assert_close(sigma.double(), expected, rtol=1e-6, atol=0)
    assert Karras().alpha_sigma(torch.tensor([0.8]))[1].item() == pytest.approx(24.4, abs=0.1)


def test_karras_goes_on_below_the_grid():
    """EDM's training noise reaches below sigma_min; the time is then negative and still inverts."""
    sigma = torch.tensor([1e-4])
    t = Karras().time(sigma)
    assert t < 0
    torch.testing.assert_close(Karras().alpha_sigma(t)[1], sigma, rtol=1e-5, atol=0)


def test_discrete_is_exact_on_its_grid():
    table = torch.tensor(scaled_linear_alphas_cumprod(), dtype=torch.float64)
    schedule = Discrete(alphas_cumprod=tuple(table.tolist()))
    index = torch.tensor([0, 249, 399, 499, 749, 999])
    alpha, sigma = schedule.alpha_sigma(index.double() / 999)
    torch.testing.assert_close(alpha.double(), table[index].sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(sigma.double(), (1 - table[index]).sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.label(index.double() / 999), index.float(), atol=1e-3, rtol=0)
    assert 1 / alpha[-1] == pytest.approx(14.65, abs=0.01)  # what an eps-model's error at t = 999 is multiplied by


def test_stable_diffusion_table():
    """The published end points of SD's scaled-linear table."""
    table = scaled_linear_alphas_cumprod()
    assert table[0] == pytest.approx(0.99915, abs=1e-6)
    assert table[-1] == pytest.approx(0.00466, abs=1e-5)


def test_flow_shift():
    alpha, sigma = RectifiedFlow(shift=3.0).alpha_sigma(torch.tensor([0.5]))
    assert sigma.item() == pytest.approx(0.75) and alpha.item() == pytest.approx(0.25)


def test_perturb_has_the_variance_it_says():
    schedule, t = RectifiedFlow(), torch.full((20000,), 0.3)
    x = torch.full((20000, 1), 2.0)
    x_t = schedule.perturb(x, t, torch.randn_like(x))
    assert x_t.mean().item() == pytest.approx(1.4, abs=0.01)
    assert x_t.std().item() == pytest.approx(0.3, abs=0.01)


def test_pure_noise_scale():
    assert Karras().init_scale(1.0) == pytest.approx(80)
    assert Discrete(alphas_cumprod=scaled_linear_alphas_cumprod()).init_scale(399 / 999) == 1.0
    assert RectifiedFlow().init_scale(1.0) == 1.0


def test_uniform_law_covers_both_ends_and_no_more():
    t = UniformTime(low=0.02, high=0.98, steps=1000).draw(200_000, Karras())
    index = (t * 999).round().long()
    assert (index.min(), index.max()) == (20, 980)
    index = (UniformTime(low=0, high=1, steps=10).draw(1000, Karras()) * 9).round().long()
    assert index.unique().tolist() == list(range(10))
    t = UniformTime(low=0.0, high=0.8, steps=None).draw(10_000, Karras())
    assert t.min() >= 0 and t.max() <= 0.8 and t.max() > 0.79


def test_lognormal_law():
    t = LogNormalNoise(mean=-1.2, std=1.2).draw(50_000, Karras())
    log_sigma = Karras().alpha_sigma(t)[1].log()
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.02)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Karras(sigma_min=2, sigma_max=1), "above sigma_min"),
        (lambda: Discrete(alphas_cumprod=(0.5, 0.6)), "fall strictly"),
        (lambda: UniformTime(low=0.5, high=0.5), "above low"),
        (lambda: Karras(sigma_mox=3), "sigma_mox"),
    ],
)
def test_wrong_settings_are_named(make, words):
    with pytest.raises(ValidationError, match=words):
        make()


def test_infinite_ratio_is_the_end_of_a_flow():
    assert RectifiedFlow(shift=2.0).time(torch.tensor([math.inf])).item() == pytest.approx(1.0)
