"""The methods against closed forms: a Gaussian generator and teacher, whose scores and divergences are known."""

import itertools

import numpy as np
import pytest
import torch

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.noise import Karras, UniformTime
from fewstep.methods import DMD, DMD2, Batch, Critic, Nets, SiD
from fewstep.methods.gan import discriminator_loss, gan_generator_loss
from fewstep.methods.heads import ConvHead
from fewstep.methods.losses import dm_gradient, inject_gradient, mean_abs, sid_loss
from fewstep.teachers import MixtureTeacher

SCHEDULE = Karras(sigma_max=20.0)


def gaussian(mean, std):
    """An exact one-dimensional Gaussian denoiser, in float64."""
    return MixtureTeacher(means=((mean,),), stds=(std,), schedule=SCHEDULE).denoiser().double()


def quadrature(nodes=60):
    """Gauss-Hermite nodes and weights for two independent unit Gaussians (z and eps)."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / weights.sum()
    z, eps = (torch.tensor(v).reshape(-1, 1) for v in zip(*itertools.product(points, points), strict=True))
    return z, eps, torch.tensor([a * b for a, b in itertools.product(weights, weights)])


MU, S = 0.7, 0.4  # the teacher's Gaussian
M, STD = -0.2, 0.9  # the generator's


@pytest.mark.parametrize("sigma", [0.1, 0.7, 5.0])
def test_dm_gradient_is_the_exact_reverse_kl_gradient(sigma):
    """E[alpha (s_fake - s_real) dx/dtheta] is the gradient of KL(generator || teacher) of the noised marginals.

    dm_gradient divides by mean|x - D_r|; times that and alpha²/sigma² it is the difference of scores.
    """
    z, eps, weight = quadrature()
    x = M + STD * z
    t = SCHEDULE.time(torch.full((len(x),), sigma, dtype=torch.float64))
    sigma_t = SCHEDULE.alpha_sigma(t)[1].double()
    x_t = x + sigma_t[:, None] * eps
    d_real, d_fake = gaussian(MU, S)(x_t, t), gaussian(M, STD)(x_t, t)
    gradient = dm_gradient(x, d_real, d_fake) * mean_abs(x - d_real)[:, None] / sigma**2
    by_mean = (weight[:, None] * gradient).sum().item()
    by_std = (weight[:, None] * gradient * z).sum().item()
    # KL(N(m, s² + sigma²) || N(mu, S² + sigma²)) differentiated by m and s
    assert by_mean == pytest.approx((M - MU) / (S**2 + sigma**2), rel=1e-5)
    assert by_std == pytest.approx(STD / (S**2 + sigma**2) - STD / (STD**2 + sigma**2), rel=1e-5)


def test_injected_gradient_arrives_per_batch_and_element():
    x = torch.randn(4, 3, 2, requires_grad=True)
    g = torch.randn(4, 3, 2)
    inject_gradient(x, g).backward()
    torch.testing.assert_close(x.grad, g / x.numel())


def mixture_pair():
    """Two different mixtures in the plane, exact, float64."""
    real = MixtureTeacher(schedule=SCHEDULE).denoiser().double()
    fake = MixtureTeacher(means=((0.3, 0.1), (-0.5, 0.8)), stds=(0.3, 0.5), schedule=SCHEDULE).denoiser().double()
    return real, fake


def sid_setting():
    real, fake = mixture_pair()
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    eps = torch.randn(6, 2, dtype=torch.float64)
    t = torch.linspace(0.1, 0.8, 6, dtype=torch.float64)
    return real, fake, x, eps, t


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_gradient_is_its_closed_form(alpha):
    """dL/dx = omega [-δ + J_r'(a + (1 - 2 alpha) δ) - J_f'(a - 2 alpha δ)] (written out from arXiv 2404.04057, eq. 23)."""
    real, fake, x, eps, t = sid_setting()
    x_t = SCHEDULE.perturb(x, t, eps)
    d_real, d_fake = real(x_t, t), fake(x_t, t)
    sid_loss(x, d_real, d_fake, alpha).sum().backward()

    for i in range(len(x)):
        point = x_t[i].detach()
        j_real = torch.autograd.functional.jacobian(lambda p, i=i: real(p[None], t[i : i + 1])[0], point)
        j_fake = torch.autograd.functional.jacobian(lambda p, i=i: fake(p[None], t[i : i + 1])[0], point)
        a, delta = (d_real[i] - x[i]).detach(), (d_real[i] - d_fake[i]).detach()
        omega = 1 / a.abs().mean()
        expected = omega * (-delta + j_real.T @ (a + (1 - 2 * alpha) * delta) - j_fake.T @ (a - 2 * alpha * delta))
        torch.testing.assert_close(x.grad[i], expected, rtol=1e-6, atol=1e-9)


def test_sid_without_the_jacobians_is_dmd():
    real, fake, x, eps, t = sid_setting()
    x_t = SCHEDULE.perturb(x, t, eps).detach()
    d_real, d_fake = real(x_t, t), fake(x_t, t)
    sid_loss(x, d_real, d_fake, 1.0).sum().backward()
    torch.testing.assert_close(x.grad, dm_gradient(x, d_real, d_fake).detach())


def test_sid_alpha_half_is_half_the_difference_of_squares():
    real, fake, x, eps, t = sid_setting()
    x_t = SCHEDULE.perturb(x, t, eps)
    d_real, d_fake = real(x_t, t), fake(x_t, t)
    a, b = d_real - x, d_fake - x
    expected = ((a**2).sum(1) - (b**2).sum(1)) / 2 / mean_abs(x - d_real)
    torch.testing.assert_close(sid_loss(x, d_real, d_fake, 0.5), expected)


def test_sid_identity_needs_no_score_of_the_generator():
    """E[δ·(D_r - x)] = E|δ|² if the fake score is exact: what makes alpha = 1 a loss whose expectation says nothing."""
    z, eps, weight = quadrature()
    x = M + STD * z
    t = SCHEDULE.time(torch.full((len(x),), 0.8, dtype=torch.float64))
    x_t = x + SCHEDULE.alpha_sigma(t)[1].double()[:, None] * eps
    d_real, d_fake = gaussian(MU, S)(x_t, t), gaussian(M, STD)(x_t, t)
    delta = d_real - d_fake
    projected = (weight[:, None] * delta * (d_real - x)).sum().item()
    squared = (weight[:, None] * delta**2).sum().item()
    assert projected == pytest.approx(squared, rel=1e-5)


def test_gan_losses_at_known_logits():
    zero = torch.zeros(3)
    assert gan_generator_loss(zero).item() == pytest.approx(np.log(2))
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * np.log(2))
    assert discriminator_loss(torch.tensor([50.0]), torch.tensor([-50.0])).item() == pytest.approx(0, abs=1e-6)


def test_a_sample_without_a_finite_weight_gets_no_gradient():
    """x = D_r: the weight is infinite, and the largest float would be a step of any size. The other sample keeps its own."""
    x = torch.ones(2, 3)
    d_real = torch.stack([x[0], x[1] + 2])
    assert dm_gradient(x, d_real, d_real + 1).tolist() == [[0, 0, 0], [0.5, 0.5, 0.5]]
    barely = x.clone().double() * 1e-310
    assert dm_gradient(torch.zeros_like(barely), barely, barely + 1).tolist() == [[0, 0, 0]] * 2
    assert torch.isfinite(sid_loss(x, x, x + 1, 1.0)).all()


@pytest.mark.parametrize("objective", [DMD(regression_weight=0), DMD2(gan_weight=0)])
def test_samples_without_a_weight_are_counted_and_equal_scores_are_not(objective):
    """A run begins with a fake score equal to the teacher: no gradient, and nothing to warn of."""
    _, nets = nets_for(objective)
    nets = Nets(nets.generator, Counting(nets.critic.denoiser), nets.critic)
    x = torch.randn(8, 2)
    terms = objective.generator_loss(nets, x, Batch({}))
    assert torch.equal(terms.probe["d_real"], terms.probe["d_fake"])
    assert terms.stats["dm_unweighted"] == 0

    answers = x + torch.arange(8)[:, None].clamp(max=1)  # the first sample equals the teacher's answer
    nets.teacher.forward = lambda x_t, t, **cond: answers
    assert objective.generator_loss(nets, x, Batch({})).stats["dm_unweighted"] == 1 / 8


def test_a_fake_score_that_is_not_finite_is_seen():
    x = torch.ones(2, 3)
    assert dm_gradient(x, x + 1, torch.full_like(x, torch.nan)).isnan().all()


def test_the_head_computes_in_float32_under_autocast():
    """As in the authors' program; the network before it runs in bfloat16."""
    _, nets = nets_for(DMD2())
    x_t, t, given = torch.randn(4, 2), torch.full((4,), 0.5), []
    nets.critic.head.register_forward_hook(lambda head, inputs, output: given.append((inputs[0], output)))
    with torch.autocast("cpu", torch.bfloat16):
        narrow = [
            nets.critic.logits(x_t, t, {}),
            nets.critic.denoised_and_logits(x_t, t, {})[1],
            nets.critic.residual_and_logits(x_t, t, torch.randn(4, 2), {})[1],
        ]
    assert all(logits.dtype == torch.float32 for logits in narrow)
    for feature, output in list(given):
        assert feature.dtype == torch.float32
        assert torch.equal(output, nets.critic.head(feature)), "the head itself was rounded"


class Counting(torch.nn.Module):
    """A denoiser that counts its forwards, wrapped around another."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.schedule, self.forwards = inner, inner.schedule, 0

    def forward(self, x_t, t, **cond):
        self.forwards += 1
        return self.inner(x_t, t, **cond)


def nets_for(objective):
    teacher = MixtureTeacher(schedule=SCHEDULE, fit_steps=0).load()
    critic = objective.make_critic(teacher, teacher.start())
    return teacher, Nets(Generator(teacher.start(), [0.7]), Counting(teacher.denoiser), critic)


@pytest.mark.parametrize(
    "objective", [DMD(regression_weight=0), DMD2(), DMD2(gan_weight=0), DMD2(share_forward=True), SiD()]
)
def test_losses_are_finite_and_each_term_reaches_x(objective):
    _, nets = nets_for(objective)
    x = torch.randn(16, 2, requires_grad=True)
    batch = Batch({}, real=torch.randn(16, 2))
    terms = objective.generator_loss(nets, x, batch)
    for loss in terms.losses.values():
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    assert {"t", "x", "d_real", "d_fake"} <= terms.probe.keys()
    critic_terms = objective.critic_loss(nets, x.detach(), batch)
    sum(critic_terms.losses.values()).backward()
    assert all(p.grad is not None for p in nets.critic.denoiser.net.out.parameters())
    assert nets.teacher.forwards == 1, "the teacher is needed once, in the generator's loss"


def test_dm_gradient_runs_through_neither_network():
    _, nets = nets_for(DMD2(gan_weight=0))
    x = torch.randn(4, 2, requires_grad=True)
    terms = DMD2(gan_weight=0).generator_loss(nets, x, Batch({}))
    terms.losses["dm"].backward()
    assert all(p.grad is None for p in nets.critic.parameters())


def test_sharing_the_forward_gives_the_same_expected_losses():
    """The head reads the denoising forward: other draws, the same law. Compared on the mean over many samples."""
    plain, shared = DMD2(), DMD2(share_forward=True)
    _, nets = nets_for(plain)
    x, real = torch.randn(20_000, 2), torch.randn(20_000, 2)
    with torch.no_grad():
        a = plain.critic_loss(nets, x, Batch({}, real=real)).losses
        b = shared.critic_loss(nets, x, Batch({}, real=real)).losses
    assert a["gan"].item() == pytest.approx(b["gan"].item(), rel=0.02)
    assert a["denoising"].item() == pytest.approx(b["denoising"].item(), rel=0.1)


def test_a_shared_forward_needs_one_law_of_noise():
    """Else the head tells fakes from real images by how noisy they are."""
    narrow = UniformTime(low=0.0, high=0.6)
    with pytest.raises(ValueError, match="make them equal, or turn"):
        DMD2(share_forward=True, gan_noise=narrow)
    assert DMD2(share_forward=True, gan_noise=narrow, critic_noise=narrow).gan_noise == narrow
    assert DMD2(share_forward=True, gan_weight=0, gan_noise=narrow).share_forward


def test_defaults_are_the_papers():
    assert DMD().regression_weight == 0.25 and DMD().critic_steps == 1
    assert DMD2().critic_steps == 5 and DMD2().gan_weight == 3e-3 and DMD2().discriminator_weight == 1e-2
    for method in (DMD(), DMD2()):
        assert method.noise == UniformTime(low=0.02, high=0.98, steps=1000)
    sid = SiD()
    assert (sid.alpha, sid.noise.high, sid.loss_scale, sid.critic_first) == (1.0, 0.8, 100.0, True)
    assert (sid.critic_noise.mean, sid.critic_noise.std) == (-1.2, 1.2)
    assert isinstance(Critic(torch.nn.Identity()).head, type(None))


@pytest.mark.parametrize("channels", [4, 8, 16, 32, 64, 96, 1280])
def test_a_gan_head_learns_from_a_single_sample_whatever_its_channels(channels):
    """A group of one number at one pixel is normalised to nothing: no gradient, and in a micro-batch of one an error."""
    feature = torch.randn(1, channels, 4, 4, requires_grad=True)
    ConvHead(channels, 4)(feature).sum().backward()
    assert feature.grad.norm() > 1e-6


def test_a_gan_without_a_gradient_is_advised_on_and_not_divided_by():
    assert [code for code, _ in DMD2(gan_weight=1e-3).advise({"x_gradient/gan": 0.0, "x_gradient/dm": 1.0})] == [
        "gan-idle"
    ]
