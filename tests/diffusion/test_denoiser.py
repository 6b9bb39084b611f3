import pytest
import torch
from torch import nn

from fewstep.diffusion.denoiser import denoising_loss, feature_of, score, tap
from fewstep.diffusion.guidance import Guided
from fewstep.diffusion.noise import Discrete, Karras, RectifiedFlow, scaled_linear_alphas_cumprod, unsqueeze_as
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.diffusion.solvers import View
from fewstep.teachers import MixtureTeacher

VP = Discrete(alphas_cumprod=scaled_linear_alphas_cumprod())


class Oracle(nn.Module):
    """A network that predicts exactly what it is asked for, knowing x and eps."""

    def __init__(self, target):
        super().__init__()
        self.target = target

    def forward(self, x, label, **cond):
        return self.target


@pytest.mark.parametrize(
    "prediction, schedule, target",
    [
        ("eps", VP, lambda x, e, a, s: e),
        ("v", VP, lambda x, e, a, s: a * e - s * x),
        ("x0", VP, lambda x, e, a, s: x),
        ("flow", RectifiedFlow(shift=3), lambda x, e, a, s: e - x),
        (
            "edm",
            Karras(),
            lambda x, e, a, s: (x - 0.25 / (s**2 + 0.25) * (x + s * e)) * (s**2 + 0.25).sqrt() / (0.5 * s),
        ),
    ],
)
def test_every_prediction_becomes_x0(prediction, schedule, target):
    x, eps = torch.randn(7, 3, 4, 4), torch.randn(7, 3, 4, 4)
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    alpha, sigma = (unsqueeze_as(c, x) for c in schedule.alpha_sigma(t))
    denoiser = Preconditioned(Oracle(target(x, eps, alpha, sigma)), schedule, prediction)
    torch.testing.assert_close(denoiser(schedule.perturb(x, t, eps), t), x, atol=2e-4, rtol=2e-4)


def test_edm_coefficients_are_table_1():
    sigma = torch.tensor([0.01, 0.5, 2.0, 80.0])
    denoiser = Preconditioned(nn.Identity(), Karras(), "edm")
    c_skip, c_out, c_in = denoiser.coefficients(Karras().time(sigma))
    torch.testing.assert_close(c_skip, 0.25 / (sigma**2 + 0.25), rtol=1e-5, atol=0)
    torch.testing.assert_close(c_out, 0.5 * sigma / (sigma**2 + 0.25).sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(c_in, 1 / (sigma**2 + 0.25).sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(denoiser.loss_weight(Karras().time(sigma)), 1 / sigma**2 + 4, rtol=1e-4, atol=0)


CLEAN_START = Discrete(alphas_cumprod=(1.0, 0.9, 0.5, 0.1))
ZERO_SNR = Discrete(alphas_cumprod=(0.999, 0.5, 0.1, 0.0))


@pytest.mark.parametrize(
    "prediction, schedule",
    [
        ("edm", Karras()), ("eps", VP), ("v", VP), ("x0", VP), ("eps", CLEAN_START), ("v", ZERO_SNR),
        ("flow", RectifiedFlow()), ("flow", RectifiedFlow(shift=3)),
    ],
)  # fmt: skip
def test_the_residual_is_the_error_of_x0_over_c_out(prediction, schedule):
    denoiser = Preconditioned(nn.Conv2d(3, 3, 1), schedule, prediction)
    denoiser.net.forward = lambda x, label, _forward=denoiser.net.forward: _forward(x)
    x, eps = torch.randn(7, 3, 4, 4), torch.randn(7, 3, 4, 4)
    t = torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    residual = denoiser.residual(x, t, eps)
    c_out = unsqueeze_as(denoiser.coefficients(t)[1], x)
    torch.testing.assert_close(residual, (denoiser(schedule.perturb(x, t, eps), t) - x) / c_out, atol=2e-4, rtol=2e-4)
    weight = unsqueeze_as(denoiser.loss_weight(t), x)
    expected = (weight * (denoiser(schedule.perturb(x, t, eps), t) - x) ** 2).mean()
    torch.testing.assert_close(denoising_loss(denoiser, x, t, eps, {}), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("wrapped", ["plain", "guided", "view"])
@pytest.mark.parametrize(
    "prediction, schedule",
    [("flow", RectifiedFlow(shift=3)), ("eps", CLEAN_START), ("v", CLEAN_START), ("v", ZERO_SNR), ("x0", ZERO_SNR)],
)
def test_the_denoising_loss_is_finite_at_both_ends_of_time(prediction, schedule, wrapped):
    """sigma is 0 at t = 0 of a flow and of some tables, alpha at t = 1 of others: nothing may be divided by either."""

    class Net(nn.Linear):
        def forward(self, x, label, **cond):
            return super().forward(x)

    net = Net(3, 3)
    denoiser = Preconditioned(net, schedule, prediction)
    if wrapped == "guided":
        denoiser = Guided(denoiser, lambda cond: cond, 3.0)
    elif wrapped == "view":
        denoiser = View(denoiser, schedule)
    x, eps = torch.randn(4, 3), torch.randn(4, 3)
    loss = denoising_loss(denoiser, x, torch.tensor([0.0, 0.0, 1.0, 1.0]), eps, {"labels": torch.zeros(4)})
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(net.weight.grad).all() and net.weight.grad.abs().sum() > 0


def test_guided_residual_is_the_guided_x0s():
    """Guidance is affine: guiding the residuals is guiding x0."""

    class Net(nn.Module):
        def forward(self, x, label, labels):
            return 0.1 * x + labels.float().reshape(-1, 1)

    guided = Guided(Preconditioned(Net(), VP, "v"), lambda cond: {"labels": 0 * cond["labels"]}, 3.0)
    x, eps, t, labels = torch.randn(5, 2), torch.randn(5, 2), torch.linspace(0.2, 0.8, 5).double(), torch.arange(5)
    sigma = unsqueeze_as(VP.alpha_sigma(t)[1], x)
    expected = (guided(VP.perturb(x, t, eps), t, labels=labels) - x) / -sigma
    torch.testing.assert_close(guided.residual(x, t, eps, labels=labels), expected, atol=1e-4, rtol=1e-4)


def test_eps_without_signal_is_refused():
    with pytest.raises(ValueError, match=r"prediction `eps` must have signal left.*Try: prediction `v`"):
        Preconditioned(nn.Identity(), ZERO_SNR, "eps")


@pytest.mark.parametrize("schedule, own", [(Karras(), "edm"), (VP, "v"), (RectifiedFlow(shift=3), "flow")])
@pytest.mark.parametrize("prediction", ["edm", "v", "flow"])
def test_a_prediction_under_the_schedule_of_another_is_refused(schedule, own, prediction):
    """Its coefficients would give c x instead of x of a perfect network: a teacher pretrained so is wrong without a word."""
    if prediction == own:
        x, eps, t = torch.randn(4, 3), torch.randn(4, 3), torch.linspace(0.1, 0.9, 4).double()
        perfect = Preconditioned(nn.Identity(), schedule, prediction)
        perfect.net = Oracle(perfect.target(x, t, eps))
        torch.testing.assert_close(perfect(schedule.perturb(x, t, eps), t), x, atol=1e-4, rtol=1e-4)
        return
    with pytest.raises(
        ValueError, match=rf"prediction `{prediction}` must have its own schedule.*Try: prediction `{own}`"
    ):
        Preconditioned(nn.Identity(), schedule, prediction)


def test_the_mixtures_x0_is_its_score():
    """Tweedie: the score from D equals the gradient of the exact log density."""
    for schedule in (Karras(sigma_max=20.0), VP, RectifiedFlow()):
        exact = MixtureTeacher(schedule=schedule).denoiser().double()
        t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
        x_t = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
        exact.log_density(x_t, t).sum().backward()
        alpha, sigma = (c.double() for c in schedule.alpha_sigma(t))
        torch.testing.assert_close(score(exact(x_t, t), x_t, alpha, sigma), x_t.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("other", [VP, RectifiedFlow(shift=2.0)], ids=["vp", "flow"])
def test_views_of_one_model_agree(other):
    """The VE model seen through a VP or flow schedule is the exact model of that schedule, and back again."""
    ve, direct = MixtureTeacher(schedule=Karras(sigma_max=20.0)).denoiser(), MixtureTeacher(schedule=other).denoiser()
    t = torch.linspace(0.1, 0.9, 20, dtype=torch.float64)
    x_t = torch.randn(20, 2)
    torch.testing.assert_close(View(ve, other)(x_t, t), direct(x_t, t), atol=1e-4, rtol=1e-4)
    sigma_t = Karras(sigma_max=20.0).time(torch.linspace(0.1, 5, 20))
    torch.testing.assert_close(
        View(direct, Karras(sigma_max=20.0))(x_t, sigma_t), ve(x_t, sigma_t), atol=1e-3, rtol=1e-3
    )


def test_guidance_combines_both_halves_in_one_call():
    calls = []

    class Net(nn.Module):
        def forward(self, x, label, labels):
            calls.append(len(x))
            return labels.float().reshape(-1, 1).expand_as(x)

    denoiser = Preconditioned(Net(), VP, "x0")
    guided = Guided(denoiser, lambda cond: {"labels": torch.full_like(cond["labels"], 10)}, 3.0)
    out = guided(torch.zeros(2, 1), torch.full((2,), 0.5), labels=torch.tensor([1, 4]))
    assert out.flatten().tolist() == [10 + 3 * (1 - 10), 10 + 3 * (4 - 10)]
    assert calls == [4]


def test_tap_reads_a_layer_and_leaves_no_hook():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    x = torch.randn(5, 2)
    with tap(net, "0") as features:
        net(x)
        net(x)
    assert [tuple(f.shape) for f in features] == [(5, 3), (5, 3)]
    net(x)
    assert len(features) == 2
    with pytest.raises(ValueError, match="no layer 'middle'"), tap(net, "middle"):
        pass


def test_a_feature_alone_is_the_taps_and_nothing_after_it_runs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.unused = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(3, 3)

        def forward(self, x):
            return self.second(self.first(x))

    net, ran = Net(), []
    net.second.register_forward_hook(lambda *_: ran.append("second"))
    x = torch.randn(6, 3, requires_grad=True)
    with tap(net, "first") as features:
        net(x)
    ran.clear()
    feature = feature_of(net, "first", x)
    assert torch.equal(feature, features[0]) and ran == []
    gradients = [torch.autograd.grad(f.square().sum(), x)[0] for f in (feature, features[0])]
    torch.testing.assert_close(*gradients)
    net(x)
    assert ran == ["second"], "a hook is left"
    with pytest.raises(ValueError, match="no layer 'middle'"):
        feature_of(net, "middle", x)
    with pytest.raises(ValueError, match="does not pass through its layer 'unused'"):
        feature_of(net, "unused", x)
