import pytest
import torch
from torch import nn

from fewstep.denoiser import Denoiser
from fewstep.generator import Generator
from fewstep.noise import Karras, RectifiedFlow


class Recorder(Denoiser):
    """Halves its input and remembers what it was given."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.scale, self.calls = schedule, nn.Parameter(torch.tensor(0.5)), []

    def forward(self, x_t, t, **cond):
        self.calls.append((x_t.detach().clone(), t, torch.is_grad_enabled()))
        return self.scale * x_t

    def loss_weight(self, t):
        return torch.ones_like(t)


def test_one_step_starts_from_exactly_pure_noise():
    schedule = Karras()
    time = schedule.time(torch.tensor([2.5])).item()
    denoiser = Recorder(schedule)
    z = torch.randn(3, 1, 4, 4)
    x = Generator(denoiser, [time]).rollout([z])
    torch.testing.assert_close(denoiser.calls[0][0], 2.5 * z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x, 1.25 * z, rtol=1e-5, atol=1e-6)


def test_backward_simulation_renoises_the_students_own_samples():
    denoiser = Recorder(RectifiedFlow())
    generator = Generator(denoiser, [1.0, 0.75, 0.5])
    z = [torch.randn(2, 3) for _ in range(3)]
    generator.rollout(z)
    inputs = [call[0] for call in denoiser.calls]
    torch.testing.assert_close(inputs[0], z[0])
    torch.testing.assert_close(inputs[1], 0.25 * 0.5 * inputs[0] + 0.75 * z[1])
    torch.testing.assert_close(inputs[2], 0.5 * 0.5 * inputs[1] + 0.5 * z[2])


def test_gradient_flows_through_the_last_call_only():
    denoiser = Recorder(RectifiedFlow())
    generator = Generator(denoiser, [1.0, 0.75, 0.5])
    z = [torch.randn(2, 3) for _ in range(3)]
    x = generator.rollout(z[:2])
    assert [call[2] for call in denoiser.calls] == [False, True]
    x.sum().backward()
    torch.testing.assert_close(denoiser.scale.grad, denoiser.calls[1][0].sum())


def test_fewer_noises_stop_early():
    denoiser = Recorder(RectifiedFlow())
    generator = Generator(denoiser, [1.0, 0.75, 0.5, 0.25])
    for s in range(1, 5):
        denoiser.calls.clear()
        generator.rollout([torch.randn(1, 2)] * s)
        assert len(denoiser.calls) == s
        assert denoiser.calls[-1][1].item() == generator.times[s - 1]


@pytest.mark.parametrize("times", [[], [0.5, 0.7], [1.2], [0.5, 0.5], [0.0]])
def test_bad_times_are_refused(times):
    with pytest.raises(ValueError, match="fall strictly"):
        Generator(Recorder(Karras()), times)
