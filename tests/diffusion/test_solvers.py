import math

import pytest
import torch

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.noise import Discrete, Karras, scaled_linear_alphas_cumprod, unsqueeze_as
from fewstep.diffusion.solvers import Churn, Solver, edm_view
from fewstep.teachers import MixtureTeacher


def solution(z, mean, std, sigma_max):
    """The probability-flow ODE of one Gaussian: (x - mean) scales as √(std² + sigma²)."""
    return mean + (sigma_max * z - mean) * std / math.sqrt(std**2 + sigma_max**2)


def error(evaluations, std=0.5, mean=0.3):
    teacher = MixtureTeacher(means=((mean,),), stds=(std,), schedule=Karras(sigma_max=20.0))
    z = torch.randn(200, 1)
    return (
        (Solver()(teacher.denoiser().double(), z, evaluations).double() - solution(z.double(), mean, std, 20.0))
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
    Solver()(denoiser, torch.randn(3, 2), evaluations)
    assert len(calls) == evaluations


def test_zero_evaluations_are_refused():
    with pytest.raises(ValueError, match="35"):
        Solver()(MixtureTeacher().denoiser(), torch.randn(3, 2), 0)


def test_samples_of_the_mixture_lie_on_its_ring():
    x = Solver()(MixtureTeacher().denoiser(), torch.randn(2000, 2), 35)
    distance = torch.cdist(x, MixtureTeacher().denoiser().means).min(1)
    assert (distance.values < 0.4).float().mean() > 0.99
    assert torch.bincount(distance.indices, minlength=8).min() > 150


def test_a_vp_model_samples_through_its_ve_view():
    vp = MixtureTeacher(schedule=Discrete(alphas_cumprod=scaled_linear_alphas_cumprod())).denoiser()
    assert isinstance(edm_view(vp).schedule, Karras)
    x = Solver()(vp, torch.randn(1000, 2), 35)
    assert (torch.cdist(x, vp.means).min(1).values < 0.4).float().mean() > 0.98


def test_no_churn_is_the_deterministic_way():
    denoiser, z = MixtureTeacher().denoiser(), torch.randn(5, 2)
    assert torch.equal(Solver()(denoiser, z, 9), Solver(churn=Churn(0.0))(denoiser, z, 9))


def test_churn_keeps_the_distribution():
    """Noise added and removed again: the samples of one Gaussian stay its samples, but no longer follow from the start."""
    torch.manual_seed(0)
    denoiser = MixtureTeacher(means=((0.3,),), stds=(0.5,), schedule=Karras(sigma_max=20.0)).denoiser()
    z = torch.randn(20_000, 1)
    still = Solver()(denoiser, z, 127)
    x = Solver(churn=Churn(20.0))(denoiser, z, 127, lambda step: torch.randn(20_000, 1))
    assert x.mean().item() == pytest.approx(0.3, abs=0.02) and x.std().item() == pytest.approx(0.5, rel=0.03)
    assert torch.corrcoef(torch.stack([x[:, 0], still[:, 0]]))[0, 1] < 0.5
    inflated = Solver(churn=Churn(20.0, inflate=1.2))(denoiser, z, 127, lambda step: torch.randn(20_000, 1))
    assert inflated.std() > x.std() * 1.02


def test_churn_follows_algorithm_2():
    """One step from sigma by hand, and noise only between the two limits."""
    denoiser = MixtureTeacher(means=((0.3,),), stds=(0.5,), schedule=Karras()).denoiser()
    z, eps, asked = torch.randn(3, 1), torch.randn(3, 1), []

    def fresh(step):
        asked.append(step)
        return eps

    Solver(churn=Churn(40.0, low=0.05, high=50.0))(denoiser, z, 35, fresh)
    grid = denoiser.schedule.alpha_sigma(denoiser.schedule.times(18))[1]
    assert asked == [i for i, sigma in enumerate(grid) if 0.05 <= sigma <= 50]
    higher = 80 * math.sqrt(2)  # 1 + 40 / 1 steps, bounded
    x_hat = 80 * z.double() + math.sqrt(higher**2 - 80**2) * 1.1 * eps.double()
    clean = (0.25 * x_hat + higher**2 * 0.3) / (0.25 + higher**2)  # E[x | x_hat] of N(0.3, 0.5²)
    expected = x_hat + (0 - higher) * (x_hat - clean) / higher
    torch.testing.assert_close(Solver(churn=Churn(40.0, inflate=1.1))(denoiser, z, 1, fresh), expected.float())


class Gaussian(Denoiser):
    """Of data N(0, s²), whose ODE has the solution x(sigma) = x(sigma_0) √(s² + sigma²) / √(s² + sigma_0²)."""

    def __init__(self, spread: float, schedule=Karras()):  # noqa: B008
        super().__init__()
        self.spread, self.schedule, self.calls = spread, schedule, 0

    def forward(self, x_t, t, **cond):
        self.calls += 1
        sigma = unsqueeze_as(self.schedule.alpha_sigma(t)[1], x_t)
        return x_t * self.spread**2 / (self.spread**2 + sigma**2)


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("dpmpp-2m", 2), ("heun", 2), ("unipc-2", 3), ("unipc-2-bh1", 3)]
)
def test_errors_fall_with_the_order_of_the_method(method, order):
    solver = Solver(method, sigma_min=0.02, sigma_max=20.0)
    noise, spread = torch.randn(64, 2), 0.5

    def error(evaluations: int) -> float:
        found = solver(Gaussian(spread), noise, evaluations)
        # the last step, to 0, takes D of the last level
        exact = 20.0 * noise * spread**2 / ((spread**2 + 0.02**2) * (spread**2 + 20.0**2)) ** 0.5
        return (found - exact).abs().max().item()

    coarse, fine = (error(n) for n in ((41, 81) if method == "heun" else (20, 40)))
    assert 0.8 * 2**order < coarse / fine < 1.5 * 2**order
    assert fine < (0.1 if order == 1 else 0.01)


@pytest.mark.parametrize("method", ["euler", "dpmpp-2m", "unipc-2", "unipc-3-bh1"])
@pytest.mark.parametrize("evaluations", [1, 2, 5])
def test_one_evaluation_a_step(method, evaluations):
    denoiser = Gaussian(0.5)
    Solver(method)(denoiser, torch.randn(4, 2), evaluations)
    assert denoiser.calls == evaluations


@pytest.mark.parametrize("method", ["euler", "dpmpp-2m", "heun", "unipc-2", "unipc-3", "unipc-2-bh1", "unipc-3-bh1"])
def test_a_point_is_reached_in_any_number_of_steps(method):
    class Point(Gaussian):
        def forward(self, x_t, t, **cond):
            return torch.full_like(x_t, 0.7)

    found = Solver(method, sigma_max=40.0)(Point(0.0), torch.randn(4, 2), 5)
    torch.testing.assert_close(found, torch.full((4, 2), 0.7))


class Curved(Gaussian):
    """A denoiser that is not linear, for comparisons with the library's own loops."""

    def __init__(self, weight):
        super().__init__(0.0)
        self.weight = weight

    def forward(self, x_t, t, **cond):
        sigma = unsqueeze_as(self.schedule.alpha_sigma(t)[1], x_t)
        return torch.tanh(x_t @ self.weight / (1 + sigma)) + 0.1 * sigma.log()


@pytest.mark.parametrize(
    ("method", "name"), [("dpmpp-2m", "EDMDPMSolverMultistepScheduler"), ("euler", "EDMEulerScheduler")]
)
def test_equal_to_the_scheduler_of_diffusers(method, name):
    """The same network under the same grid, through the library's own loop."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(sigma_min=0.05, sigma_max=20.0, sigma_data=0.5, rho=7.0)
    scheduler.set_timesteps(8)
    torch.manual_seed(0)
    weight, noise = torch.randn(2, 2), torch.randn(16, 2)

    x = noise * scheduler.sigmas[0]
    for sigma, t in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        clean = torch.tanh(x @ weight / (1 + sigma)) + 0.1 * sigma.log()
        # the library computes D = c_skip x + c_out F itself: F that gives this D
        total = sigma**2 + 0.25
        output = (clean - 0.25 / total * x) * total.sqrt() / (0.5 * sigma)
        x = scheduler.step(output, t, x).prev_sample
    found = Solver(method, sigma_min=0.05, sigma_max=20.0)(Curved(weight), noise, 8)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("kind", ["bh1", "bh2"])
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_unipc_is_that_of_diffusers(order, kind, steps):
    """The library's scheduler in its variance-preserving form, at the same noise levels."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="sample", solver_order=order, solver_type=kind, final_sigmas_type="zero"
    )
    method = f"unipc-{order}" + ("-bh1" if kind == "bh1" else "")
    solver = Solver(method, sigma_min=0.05, sigma_max=20.0)
    scheduler.set_timesteps(steps)
    levels = solver.grid(Karras(), steps)[1]
    scheduler.sigmas = torch.cat([levels, torch.zeros(1)])
    torch.manual_seed(0)
    weight, noise = torch.randn(2, 2), torch.randn(16, 2)

    alphas = (1 + levels**2).rsqrt()
    x = noise.double() * levels[0] * alphas[0]
    for sigma, alpha, t in zip(levels, alphas, scheduler.timesteps, strict=True):
        clean = torch.tanh((x / alpha).float() @ weight / (1 + sigma.float())) + 0.1 * sigma.log()
        x = scheduler.step(clean.double(), t, x).prev_sample
    if kind == "bh1":  # the library computes infinity times 0 in its last step, to noise 0, which by order 1 is D
        assert x.isnan().all()
        x = clean
    torch.testing.assert_close(solver(Curved(weight), noise, steps), x.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Solver("dpmpp-2m", 40.0, 0.03), "0 < sigma_min < sigma_max"),
        (lambda: Solver("dpmpp-2m", 0.0, 40.0), "0 < sigma_min"),
        (lambda: Solver("dpmpp-2m", rho=0.0), "rho above 0"),
        (lambda: Solver("euler", churn=Churn(40.0)), "`churn` must come with the sampler `heun`, got `euler`"),
        (
            lambda: Solver("euler", 0.001)(Gaussian(0.5), torch.randn(1, 2), 3),
            "within the model's 0.002 to 80, got 0.001 to 80",
        ),
        (lambda: Solver("euler")(Gaussian(0.5), torch.randn(1, 2), 0), "`evaluations` must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_solver_says_what_it_is():
    assert str(Solver()) == "heun" and Solver().usual
    assert str(Solver("dpmpp-2m", 0.03, 40.0, 7.0)) == "dpmpp-2m,0.03,40,7"
    assert str(Solver("euler", sigma_max=40.0)) == "euler,model,40,model"
