import math

import pytest
import torch
from torch import nn

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.noise import Discrete, Karras, RectifiedFlow, scaled_linear_alphas_cumprod
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.formats.model import DenoiserSpec
from fewstep.networks import DiTSpec
from fewstep.teachers import MixtureTeacher


class Recorder(Denoiser):
    """Halves its input and remembers what it was given."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.scale, self.calls = schedule, nn.Parameter(torch.tensor(0.5)), []

    def forward(self, x_t, t, **cond):
        self.calls.append((x_t.detach().clone(), t, torch.is_grad_enabled()))
        return self.scale * x_t


def test_one_step_starts_from_exactly_pure_noise():
    schedule = Karras()
    time = schedule.time(torch.tensor([2.5])).item()
    denoiser = Recorder(schedule)
    z = torch.randn(3, 1, 4, 4)
    x = Generator(denoiser, [time])([z])
    torch.testing.assert_close(denoiser.calls[0][0], 2.5 * z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x, 1.25 * z, rtol=1e-5, atol=1e-6)


def test_backward_simulation_renoises_the_students_own_samples():
    denoiser = Recorder(RectifiedFlow())
    generator = Generator(denoiser, [1.0, 0.75, 0.5])
    z = [torch.randn(2, 3) for _ in range(3)]
    generator(z)
    inputs = [call[0] for call in denoiser.calls]
    torch.testing.assert_close(inputs[0], z[0])
    torch.testing.assert_close(inputs[1], 0.25 * 0.5 * inputs[0] + 0.75 * z[1])
    torch.testing.assert_close(inputs[2], 0.5 * 0.5 * inputs[1] + 0.5 * z[2])


def test_gradient_flows_through_the_last_call_only():
    denoiser = Recorder(RectifiedFlow())
    generator = Generator(denoiser, [1.0, 0.75, 0.5])
    z = [torch.randn(2, 3) for _ in range(3)]
    x = generator(z[:2])
    assert [call[2] for call in denoiser.calls] == [False, True]
    x.sum().backward()
    torch.testing.assert_close(denoiser.scale.grad, denoiser.calls[1][0].sum())


def test_fewer_noises_stop_early():
    denoiser = Recorder(RectifiedFlow())
    generator = Generator(denoiser, [1.0, 0.75, 0.5, 0.25])
    for s in range(1, 5):
        denoiser.calls.clear()
        generator([torch.randn(1, 2)] * s)
        assert len(denoiser.calls) == s
        assert denoiser.calls[-1][1].item() == generator.times[s - 1]


@pytest.mark.parametrize("times", [[], [0.5, 0.7], [1.2], [0.5, 0.5], [0.0]])
def test_bad_times_are_refused(times):
    with pytest.raises(ValueError, match="fall strictly"):
        Generator(Recorder(Karras()), times)


@pytest.mark.parametrize("transition", ["renoise", "ode"])
def test_a_rollout_names_the_call_that_made_its_samples(transition):
    denoiser = Recorder(RectifiedFlow())
    generator = Generator(denoiser, [1.0, 0.75, 0.5, 0.25], transition)
    z = [torch.randn(2, 3) for _ in range(4)]
    for s in range(1, 5):
        denoiser.calls.clear()
        made = generator.rollout(z[:s])
        assert made.step == s - 1 and made.t.tolist() == [generator.times[s - 1]] * 2
        assert torch.equal(made.x_t, denoiser.calls[-1][0]) and not made.x_t.requires_grad and made.x.requires_grad
        assert torch.equal(made.x, generator(z[:s]))


SCHEDULES = [Karras(sigma_max=20.0), RectifiedFlow(shift=3.0), Discrete(alphas_cumprod=scaled_linear_alphas_cumprod())]


def gaussian(schedule, mean=0.7, std=0.4):
    """The exact denoiser of N(mean, std²) in one dimension."""
    return MixtureTeacher(means=((mean,),), stds=(std,), schedule=schedule).denoiser().double()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
def test_an_ode_rollout_of_a_gaussian_is_ddims_closed_form(schedule, mean=0.7, std=0.4):
    """With y = x_t - alpha mean and v = alpha² std² + sigma² a step is y' = (alpha alpha' std² + sigma sigma') / v y, and the last
    sample mean + alpha std² / v y: DDIM's eq. 12 without noise, with the exact E[x | x_t] put in."""
    times = [0.95, 0.7, 0.4, 0.15]
    z = [torch.randn(50, 1, dtype=torch.float64) for _ in times]
    found = Generator(gaussian(schedule), times, "ode")(z)
    alpha, sigma = (c.double() for c in schedule.alpha_sigma(torch.tensor(times, dtype=torch.float64)))
    v = alpha**2 * std**2 + sigma**2
    y = schedule.init_scale(times[0]) * z[0] - alpha[0] * mean
    for i in range(len(times) - 1):
        y = (alpha[i] * alpha[i + 1] * std**2 + sigma[i] * sigma[i + 1]) / v[i] * y
    torch.testing.assert_close(found.double(), mean + alpha[-1] * std**2 / v[-1] * y, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, Generator(gaussian(schedule), times)(z), atol=0.05), "no other than renoising"


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
def test_many_ode_steps_follow_the_probability_flow(schedule, mean=0.7, std=0.4):
    """The exact ODE keeps a sample's quantile: x = mean + std (x_t - alpha mean) / √v."""
    times = torch.linspace(0.95, 0.002, 400).tolist()
    z = torch.randn(50, 1, dtype=torch.float64)
    with torch.no_grad():
        found = Generator(gaussian(schedule), times, "ode")([z] * len(times))
    alpha, sigma = (c.item() for c in schedule.alpha_sigma(torch.tensor(times[:1], dtype=torch.float64)))
    quantile = (schedule.init_scale(times[0]) * z - alpha * mean) / math.sqrt(alpha**2 * std**2 + sigma**2)
    torch.testing.assert_close(found.double(), mean + std * quantile, rtol=0, atol=0.02)


class Cached(torch.nn.Module):
    """A layer that behaves as autocast did before torch 2.10: a cast made without gradients serves later calls with them."""

    def __init__(self, cache):
        super().__init__()
        self.weight, self.cache = nn.Parameter(torch.tensor(0.5)), cache

    def forward(self, x, label, **cond):
        if "weight" not in self.cache:
            self.cache["weight"] = self.weight.bfloat16()
        return self.cache["weight"].float() * x


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_last_call_trains_where_autocast_keeps_casts_made_without_gradients(monkeypatch, steps):
    """PyTorch issues 112583, 142234, 158232, mended by pull request 165068."""
    cache, clear = {}, torch.clear_autocast_cache

    def clearing():
        cache.clear()
        clear()

    monkeypatch.setattr(torch, "clear_autocast_cache", clearing)
    net = Cached(cache)
    generator = Generator(Preconditioned(net, RectifiedFlow(), "flow"), [1.0, 0.75, 0.5])
    generator([torch.randn(2, 3) for _ in range(steps)]).sum().backward()
    assert net.weight.grad is not None and net.weight.grad != 0


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_every_parameter_has_a_gradient_at_every_step_in_bf16(steps):
    spec = DenoiserSpec(
        net=DiTSpec(size=8, channels=1, patch=4, width=32, depth=2, heads=2, num_classes=3),
        schedule=RectifiedFlow(),
        prediction="flow",
    )
    generator = Generator(spec.build(), [1.0, 0.75, 0.5, 0.25])
    for parameter in generator.parameters():  # what starts at zero would hide what comes before it
        nn.init.normal_(parameter, std=0.1)
    labels = torch.tensor([0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        x = generator([torch.randn(2, 1, 8, 8) for _ in range(steps)], labels=labels)
    x.square().sum().backward()
    missing = [name for name, p in generator.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing
