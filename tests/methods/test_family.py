"""The later methods: identities with the earlier ones, closed forms, and a fall of the distance on the mixture."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.guidance import Guided
from fewstep.diffusion.noise import (
    Discrete,
    Karras,
    LogNormalNoise,
    RectifiedFlow,
    UniformTime,
    ddim_step,
    scaled_linear_alphas_cumprod,
    unsqueeze_as,
)
from fewstep.methods import (
    DMD2,
    DPDMD,
    GAN,
    SCM,
    TDM,
    Batch,
    Consistency,
    Critic,
    DecoupledDMD,
    FDistill,
    Nets,
    SiD,
    SiDA,
)
from fewstep.methods.dp_dmd import anchor_loss
from fewstep.methods.f_distill import WEIGHTS
from fewstep.methods.losses import dm_gradient, sid_loss
from fewstep.students.sample import FewStep
from fewstep.teachers import MixtureTeacher
from fewstep.training.distill import Distillation, Setup
from fewstep.training.optim import OptimSpec
from fewstep.training.spec import TrainSpec
from fewstep.training.task import Micro
from tests.support.mixtures import Points, energy_distance

SCHEDULE = Karras(sigma_max=20.0)
BATCH = 64


class Linear(Denoiser):
    """D(x_t) = k x_t + shift: what a Gaussian's denoiser is at one noise level."""

    def __init__(self, k=0.5, schedule=SCHEDULE, shift=0.0):
        super().__init__()
        self.k = torch.nn.Parameter(torch.tensor(k))
        self.schedule, self.shift = schedule, shift

    def forward(self, x_t, t, **cond):
        return self.k * x_t + self.shift


@pytest.fixture(scope="module")
def mixture():
    """The ring of eight, and exact samples of it."""
    spec = MixtureTeacher(schedule=SCHEDULE, fit_steps=300)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return spec.load(), spec.denoiser().sample(4000)


def distillation(mixture, objective, sigmas, transition="renoise", lr=1e-3) -> Distillation:
    teacher, exact = mixture
    times = tuple(SCHEDULE.time(torch.tensor(sigmas, dtype=torch.float64)).tolist())
    train = TrainSpec(
        images=1000 * BATCH, batch_size=BATCH, precision="fp32", device="cpu", evaluate_every=None, ema_half_life=2000
    )
    optims = [OptimSpec(kind="adam", lr=rate, betas=(0.0, 0.999)) for rate in (lr / 2, lr)]
    real = Points(exact) if objective.needs_real else None
    return Distillation(Setup(teacher, times, objective, train, *optims, real, transition=transition))


def losses_of(objective, nets, x, batch, seed=3):
    """Both losses of an objective with their gradients on x and on the fake score."""
    found = {}
    for side in ("generator", "critic"):
        torch.manual_seed(seed)
        leaf = x.clone().requires_grad_(side == "generator")
        terms = getattr(objective, f"{side}_loss")(nets, leaf, batch)
        loss = sum(terms.losses.values())
        wanted = [leaf] if side == "generator" else [p for p in nets.critic.denoiser.parameters() if p.requires_grad]
        found[side] = (loss, torch.autograd.grad(loss, wanted, allow_unused=True))
    return found


def same(one, other):
    for side in one:
        torch.testing.assert_close(one[side], other[side], rtol=0, atol=0)


# -- identities ------------------------------------------------------------------------------------------------------


@pytest.fixture
def nets(mixture) -> Nets:
    task = distillation(mixture, DMD2(), [2.5])
    x = task.nets.generator([torch.randn(BATCH, 2)])
    assert x.isfinite().all()
    with torch.no_grad():
        for parameter in task.nets.critic.denoiser.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return task.nets


def test_sida_without_its_gan_is_sid(nets):
    x, batch = torch.randn(BATCH, 2), Batch({})
    same(losses_of(SiDA(gan_weight=0), nets, x, batch), losses_of(SiD(), nets, x, batch))


def test_sida_is_sid_before_its_gan_begins_and_half_of_it_after(mixture):
    task = distillation(mixture, SiDA(gan_after=100), [2.5])
    x = torch.randn(BATCH, 2, requires_grad=True)
    terms = {}
    for images in (99, 100):
        torch.manual_seed(0)
        terms[images] = SiDA(gan_after=100).generator_loss(task.nets, x, Batch({}, images=images)).losses
    assert terms[99].keys() == {"sid"} and terms[100].keys() == {"sid", "gan"}
    torch.testing.assert_close(terms[100]["sid"], terms[99]["sid"] / 2)


def test_sidas_terms_are_those_of_the_authors_program(mixture):
    """½ · 100 Σ_pixels sid + ½ · 0.01 N mean(1 / mean|x - D_r|) BCE, the logits a mean over channels, clipped to ±10."""
    task = distillation(mixture, SiDA(gan_after=0), [2.5])
    nets, x = task.nets, torch.randn(BATCH, 2)
    torch.manual_seed(5)
    found = SiDA(gan_after=0).generator_loss(nets, x, Batch({})).losses
    torch.manual_seed(5)
    t = SiDA().noise.draw(BATCH, SCHEDULE)
    x_t = SCHEDULE.perturb(x, t, torch.randn_like(x))
    d_real, d_fake = nets.teacher(x_t, t), nets.critic(x_t, t, {})
    omega = 1 / (x - d_real).abs().mean(1)
    features = []
    layer = nets.critic.denoiser.get_submodule(nets.critic.bottleneck)
    handle = layer.register_forward_hook(lambda _, __, output: features.append(output))
    nets.critic(x_t, t, {})
    handle.remove()
    logits = features[0].mean(-1).clamp(-10, 10)
    cross = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
    delta = d_real - d_fake
    sid = (omega[:, None] * delta * ((d_real - x) - delta)).sum() / BATCH
    torch.testing.assert_close(found["sid"], 50 * sid)
    torch.testing.assert_close(found["gan"], 0.005 * 2 * omega.mean() * cross)


def test_the_reverse_kl_is_dmd2(nets):
    x, batch = torch.randn(BATCH, 2), Batch({})
    same(
        losses_of(FDistill(divergence="reverse-kl", gan_weight=0), nets, x, batch),
        losses_of(DMD2(gan_weight=0), nets, x, batch),
    )


F = {
    "reverse-kl": lambda r: -r.log(),
    "forward-kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "softened-reverse-kl": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    "jensen-shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "squared-hellinger": lambda r: 1 - r.sqrt(),
}


@pytest.mark.parametrize("name", F)
def test_weights_are_second_derivatives_of_the_divergence(name):
    """h(r) = f''(r) r², by automatic differentiation of f."""
    assert F.keys() == WEIGHTS.keys()
    r = torch.logspace(-2, 2, 41, dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(F[name](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(WEIGHTS[name](r).detach(), (second * r**2).detach())


def test_ratios_have_mean_one_in_each_range_of_noise():
    method, t = FDistill(ratio_bins=4, ratio_clip=10.0), torch.rand(200, dtype=torch.float64)
    ratio = method.ratio(3 * torch.randn(200), t)
    for low in (0.0, 0.25, 0.5, 0.75):
        part = ratio[(t >= low) & (t < low + 0.25)]
        assert part.mean().item() == pytest.approx(1, rel=1e-5) and part.max() / part.min() <= 100.001
    torch.testing.assert_close(FDistill().ratio(torch.zeros(3), torch.tensor([0.1, 0.1, 1.0])), torch.ones(3))


def test_decoupled_terms_add_up_to_guided_matching():
    """At one time and one noise, with the weight taken out: (D_f - D_c) - (s - 1) (D_c - D_0) = D_f - D_guided."""
    x_t, x = torch.randn(16, 2), torch.randn(16, 2)
    conditional, unconditional, fake = (torch.randn(16, 2) for _ in range(3))
    weight = 1 / (x - conditional).abs().mean(1, keepdim=True)
    matching = dm_gradient(x, conditional, fake)
    guidance = (3.0 - 1) * dm_gradient(x, conditional, unconditional)
    guided = unconditional + 3.0 * (conditional - unconditional)
    torch.testing.assert_close(matching + guidance, weight * (fake - guided))

    class Two(Linear):
        def forward(self, x_t, t, **cond):
            return super().forward(x_t, t) + cond["labels"][:, None]

    teacher = Guided(Two(0.3), lambda cond: {"labels": torch.zeros_like(cond["labels"])}, 3.0)
    nets = Nets(Generator(Linear(), [0.9, 0.4]), teacher, Critic(Linear(0.4)))
    batch = Batch({"labels": torch.ones(16)}, step=0, x_t=x_t)
    found = DecoupledDMD(guidance=3.0).generator_loss(nets, x.requires_grad_(), batch)
    assert found.losses.keys() == {"dm", "guidance"}
    (gradient,) = torch.autograd.grad(found.losses["guidance"], x)
    # D_c - D_0 is 1 everywhere, so the gradient is -(s - 1) omega / (B N), of equal numbers in a sample
    assert (gradient < 0).all() and torch.allclose(gradient[:, 0], gradient[:, 1])


def test_guidance_keeps_above_the_next_time():
    seen = []

    class Watched(Linear):
        def forward(self, x_t, t, **cond):
            seen.append(t)
            return super().forward(x_t, t)

    teacher = Guided(Watched(0.3), lambda cond: dict(cond), 2.0)
    nets = Nets(Generator(Linear(), [0.9, 0.4]), teacher, Critic(Linear(0.4)))
    method = DecoupledDMD(guidance=2.0, noise=UniformTime(low=0.0, high=0.1, steps=None))
    for step, low in ((0, 0.4), (1, 0.0)):
        seen.clear()
        method.generator_loss(nets, torch.randn(500, 2), Batch({}, step, torch.randn(500, 2)))
        matching, guidance = seen
        assert matching.max() <= 0.1 and low <= guidance.min() < low + 0.05 and guidance.max() > 0.9


def trajectory(step: int, times=(0.9, 0.5), schedule=SCHEDULE):
    nets = Nets(
        Generator(Linear(schedule=schedule), times, "ode"), Linear(0.3, schedule), Critic(Linear(0.4, schedule))
    )
    return nets, Batch({}, step, torch.randn(4000, 2))


def test_tdm_in_one_interval_is_dmds_matching():
    nets, batch = trajectory(0, times=(1.0,))
    x = torch.randn(4000, 2, requires_grad=True)
    torch.manual_seed(2)
    (gradient,) = torch.autograd.grad(TDM().generator_loss(nets, x, batch).losses["tdm"], x)
    torch.manual_seed(2)
    at = TDM._noised(nets, x.detach(), batch)
    torch.testing.assert_close(at.x_u, SCHEDULE.perturb(x.detach(), at.u, at.eps))
    expected = dm_gradient(x.detach(), nets.teacher(at.x_u, at.u), nets.critic(at.x_u, at.u, {}))
    torch.testing.assert_close(gradient, expected / x.numel())


@pytest.mark.parametrize("schedule", [SCHEDULE, RectifiedFlow()])
def test_tdms_noise_takes_a_point_of_the_trajectory_to_its_interval(schedule):
    """x_u has the marginal of x_s noised on: mean a x_s, variance sigma_u² - a² sigma_s² beyond it."""
    nets, batch = trajectory(0, schedule=schedule)
    x = torch.randn(4000, 2)
    at = TDM._noised(nets, x, batch)
    assert at.u.min() > 0.5 and at.u.max() < 0.9
    t, s = torch.full((4000,), 0.9, dtype=torch.float64), torch.full((4000,), 0.5, dtype=torch.float64)
    x_s = ddim_step(schedule, x, batch.x_t, t, s)
    (alpha_u, sigma_u), (alpha_s, sigma_s) = schedule.alpha_sigma(at.u), schedule.alpha_sigma(s)
    a = alpha_u / alpha_s
    assert torch.allclose(at.b**2 + (a * sigma_s) ** 2, sigma_u**2, rtol=1e-4)
    torch.testing.assert_close(at.x_u, a[:, None] * x_s + at.b[:, None] * at.eps)


def test_tdms_fake_score_is_least_at_the_score_of_its_samples():
    """Gaussian points x_s of variance v: s_f = -x_u / (a² v + b²) leaves a mean squared error of 1 - b² / (a² v + b²)."""
    nets, batch = trajectory(0)
    x = 0.7 * torch.randn(4000, 2)
    torch.manual_seed(4)
    at = TDM._noised(nets, x, batch)
    x_s = at.x_u - at.b[:, None] * at.eps  # alpha is 1: a is too
    variance = x_s.var() + at.b**2

    class Exact(Denoiser):
        schedule = SCHEDULE

        def __init__(self, off):
            super().__init__()
            self.off = off

        def forward(self, x_t, t, **cond):
            sigma = SCHEDULE.alpha_sigma(t)[1]
            return x_t - self.off * (sigma**2 / variance)[:, None] * x_t

    losses = {}
    for off in (0.8, 1.0, 1.2):
        torch.manual_seed(4)
        losses[off] = TDM().critic_loss(replace(nets, learned=Critic(Exact(off))), x, batch).losses["denoising"].item()
    assert losses[1.0] == pytest.approx((1 - at.b**2 / variance).mean().item(), rel=0.05)
    assert losses[1.0] < min(losses[0.8], losses[1.2])


def test_an_exact_first_step_of_dp_dmd_has_no_loss(mixture):
    task = distillation(mixture, DPDMD(teacher_steps=1), [10.0, 1.0], "ode")
    made = task.nets.generator.rollout([torch.randn(BATCH, 2)])
    exact, batch = task.nets.teacher(made.x_t, made.t), Batch({}, made.step, made.x_t)
    assert DPDMD(teacher_steps=1).generator_loss(task.nets, exact, batch).losses["first"] < 1e-10
    assert DPDMD(teacher_steps=8).generator_loss(task.nets, exact, batch).losses["first"] > 1e-3


def test_the_anchor_is_dp_dmds_first_step_and_in_one_step_the_teachers_sample(mixture):
    task = distillation(mixture, DPDMD(teacher_steps=3), [10.0, 1.0], "ode")
    made = task.nets.generator.rollout([torch.randn(BATCH, 2)])
    batch = Batch({}, made.step, made.x_t)
    first = DPDMD(teacher_steps=3, first_weight=2.0).generator_loss(task.nets, made.x, batch).losses["first"]
    torch.testing.assert_close(first, 2 * anchor_loss(task.nets, made.x, batch, 1.0, 3))

    task = distillation(mixture, DMD2(gan_weight=0), [20.0])
    x_t = 20 * torch.randn(BATCH, 2)
    x = x_t
    times = torch.linspace(1, 0, 5, dtype=torch.float64)
    for t, s in pairwise(times):
        x = ddim_step(SCHEDULE, task.nets.teacher(x, t.expand(BATCH)), x, t.expand(BATCH), s.expand(BATCH))
    assert anchor_loss(task.nets, x, Batch({}, 0, x_t), 1.0, 4) < 1e-4  # sigma 0.002 is left at time 0
    half = torch.cat([x[: BATCH // 2], x[BATCH // 2 :] + 1])
    assert (
        anchor_loss(task.nets, half, Batch({}, 0, x_t), 0.5, 4)
        < 1e-4
        < anchor_loss(task.nets, half, Batch({}, 0, x_t), 1.0, 4)
    )


def test_the_anchor_is_a_term_of_the_first_step_alone(mixture):
    task = distillation(mixture, DMD2(gan_weight=0, critic_steps=1, anchor=0.5), [10.0, 1.0])
    lines = [task.update(i * BATCH, [Micro(i * BATCH, BATCH, 0)]) for i in range(12)]
    steps = [task.steps(i * BATCH) for i in range(12)]
    assert [("loss/generator_anchor" in line) for line in lines] == [step == 1 for step in steps] and {1, 2} == set(
        steps
    )
    assert all(line["x_gradient/anchor"] > 0 for line in lines if "x_gradient/anchor" in line)
    plain = distillation(mixture, DMD2(gan_weight=0, critic_steps=1), [10.0, 1.0])
    assert "loss/generator_anchor" not in plain.update(0, [Micro(0, BATCH, 0)])


def test_a_consistent_network_has_no_consistency_loss():
    """Of data at one point all trajectories end there: the constant is consistent, and no other function is."""

    class Constant(Denoiser):
        schedule = SCHEDULE

        def __init__(self, value):
            super().__init__()
            self.value = torch.nn.Parameter(torch.tensor(value))

        def forward(self, x_t, t, **cond):
            return self.value * torch.ones_like(x_t)

    x = torch.full((256, 2), 1.5)
    for value, close in ((1.5, True), (1.4, False)):
        nets = Nets(Generator(Constant(value), [1.0]), Constant(1.5), None)
        loss = Consistency().generator_loss(nets, x, Batch({})).losses["consistency"]
        # at s = 0 the target is x_s itself, whose noise of sigma 0.002 is left
        assert (loss < 0.002) == close


class Gauss(Denoiser):
    """Data N(0, std² I): the exact denoiser, or the exact consistency function, the end of the teacher's trajectory."""

    def __init__(self, schedule, std, end=False):
        super().__init__()
        self.schedule, self.std, self.end = schedule, std, end
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, x_t, t, **cond):
        alpha, sigma = self.schedule.alpha_sigma(t)
        variance = alpha**2 * self.std**2 + sigma**2
        factor = self.std / variance.sqrt() if self.end else alpha * self.std**2 / variance
        return self.scale * unsqueeze_as(factor, x_t) * x_t


SCHEDULES = [SCHEDULE, RectifiedFlow(shift=3.0), Discrete(alphas_cumprod=scaled_linear_alphas_cumprod())]
LEVELS = LogNormalNoise(mean=-0.5, std=0.7)  # within all three


def scm_on(schedule, student, sd, seed=0, count=256, **settings):
    method = SCM(**{"warmup": 0, "noise": LEVELS, "sigma_data": sd, **settings})
    nets = Nets(Generator(student, [1.0]), Gauss(schedule, 0.7), None)
    torch.manual_seed(seed)
    return method.generator_loss(nets, 0.7 * torch.randn(count, 3), Batch({}))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
def test_the_exact_consistency_function_is_a_fixed_point_of_scm(schedule):
    """Of the sample at the end of its trajectory no point of that trajectory changes the prediction: the tangent is zero."""
    for sd in (0.5, 0.7):
        assert scm_on(schedule, Gauss(schedule, 0.7, end=True), sd).stats["tangent"] < 2e-4
        assert scm_on(schedule, Gauss(schedule, 0.6, end=True), sd).stats["tangent"] > 0.02


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
def test_scms_tangent_of_a_teacher_is_the_closed_form(schedule):
    """Data of deviation sd in TrigFlow: D = cos(a) x_a, so F = 0, and g = -r cos(a) sin(a) x_a. The loss moves F along g."""
    student = Gauss(schedule, 0.7)
    found = scm_on(schedule, student, 0.7, count=4096)
    torch.manual_seed(0)
    x = 0.7 * torch.randn(4096, 3)
    alpha, sigma = schedule.alpha_sigma(LEVELS.draw(4096, schedule))
    a = torch.atan2(sigma, 0.7 * alpha)[:, None]
    x_a = a.cos() * x + a.sin() * 0.7 * torch.randn(4096, 3)
    g = -a.cos() * a.sin() * x_a
    rms = g.square().mean(1, keepdim=True).sqrt()
    assert found.stats["tangent"].item() == pytest.approx(rms.mean().item(), rel=2e-3)
    assert scm_on(schedule, student, 0.7, warmup=1, count=64).stats["tangent"] < 1e-5  # r = 0, and F is the teacher's

    # d loss / d F = -2 w g / (rms + c) / N, and dF / d scale = -cos(a) x_a / (sd sin(a))
    (gradient,) = torch.autograd.grad(found.losses["scm"], student.scale)
    step = g / (rms + 0.1)
    weight = torch.empty(4096)
    for near in a[:, 0].argsort().chunk(4096 // 16):
        weight[near] = 1 / step[near].square().mean()
    expected = (weight[:, None] * -2 * step * -a.cos().square() / a.sin() * x_a / 0.7 / a.cos()).mean()
    assert gradient.item() == pytest.approx(expected.item(), rel=0.02)


def test_sid_may_weigh_by_the_signal(nets):
    x = torch.randn(8, 2)
    d_real, d_fake = torch.randn(8, 2), torch.randn(8, 2)
    one = sid_loss(x, d_real, d_fake, 1.0, torch.full((8,), 0.25))
    torch.testing.assert_close(one, 0.25 * ((d_real - d_fake) * (d_fake - x)).sum(1))
    torch.manual_seed(0)
    flow = Nets(
        Generator(Linear(schedule=RectifiedFlow()), [1.0]),
        Linear(0.3, RectifiedFlow()),
        Critic(Linear(0.2, RectifiedFlow())),
    )
    weighted = SiD(weight="signal", loss_scale=1.0).generator_loss(flow, x, Batch({}))
    probe = weighted.probe
    expected = sid_loss(x, probe["d_real"], probe["d_fake"], 1.0, (1 - probe["t"]).float()).mean()
    torch.testing.assert_close(weighted.losses["sid"], expected)


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FDistill(gan_weight=0), "gan_weight must be above 0 for divergence `jensen-shannon`"),
        (lambda: DecoupledDMD(guidance=1.0), "guidance must be above 1"),
        (lambda: DecoupledDMD(guidance=None), "guidance must be above 1"),
        (lambda: Consistency(anchor=1.0), "anchor must be 0 for method `consistency`"),
        (lambda: GAN(gan_ratio=0.5), "gan_ratio must be null for method `gan`"),
        (
            lambda: DPDMD().check(1, "ode"),
            "must have two steps or more and generator.transition `ode`, got 1 and `ode`",
        ),
        (lambda: DPDMD().check(2, "renoise"), "got 2 and `renoise`"),
        (lambda: TDM().check(2, "renoise"), "generator.transition must be `ode` for method `tdm`, got `renoise`"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "sigmas", "transition"),
    [
        (SiDA(gan_after=20 * BATCH), [2.5], "renoise"),
        (SiD(weight="signal"), [10.0, 2.0], "renoise"),
        (FDistill(critic_steps=2), [2.5], "renoise"),
        (FDistill(critic_steps=2, divergence="forward-kl", gan_ratio=0.5), [2.5], "renoise"),
        (GAN(critic_steps=2, discriminator_weight=1.0), [2.5], "renoise"),
        (DPDMD(critic_steps=2), [20.0, 2.0], "ode"),
        (TDM(), [20.0, 2.0], "ode"),
        (Consistency(), [20.0], "renoise"),
        (SCM(warmup=20 * BATCH, noise=LogNormalNoise(mean=0.0, std=1.8)), [20.0], "renoise"),
    ],
    ids=lambda value: value.method if hasattr(value, "method") else "",
)
def test_each_comes_nearer_to_the_mixture(mixture, objective, sigmas, transition):
    _, exact = mixture
    task = distillation(mixture, objective, sigmas, transition)

    def distance() -> float:
        with torch.no_grad():
            return energy_distance(FewStep(task.nets.generator)(range(1000), (2,)).numpy(), exact[:1000].numpy())

    before = distance()
    for i in range(400):
        stats = task.update(i * BATCH, [Micro(i * BATCH, BATCH, 0)])
    assert all(torch.isfinite(torch.as_tensor(value).detach()).all() for value in stats.values())
    after = distance()
    print(f"{objective.method}: {before:.4f} -> {after:.4f}")
    assert after < 0.6 * before, f"{before:.4f} -> {after:.4f}"


def test_the_gan_is_balanced_against_the_methods_own_term(mixture):
    task = distillation(mixture, FDistill(gan_ratio=0.5, critic_steps=1), [2.5])
    stats = task.update(0, [Micro(0, BATCH, 0)])
    assert stats["x_gradient/f"] > 0
    assert stats["x_gradient/gan"].item() == pytest.approx(0.5 * stats["x_gradient/f"].item(), rel=1e-4)
    said = dict(FDistill().advise({"x_gradient/f": 1.0, "x_gradient/gan": 100.0}))
    assert "1e+02 times that of the term f." in said["gan-weight"]


def test_a_loss_on_the_first_step_of_an_ode_rollout_trains(mixture):
    task = distillation(mixture, DPDMD(critic_steps=1), [10.0, 1.0], "ode", lr=2e-3)
    stats = [task.update(i * BATCH, [Micro(i * BATCH, BATCH, 0)]) for i in range(80)]
    first = [line["loss/generator_first"].item() for line in stats if "loss/generator_first" in line]
    assert len(first) + sum("loss/generator_dm" in line for line in stats) == 80 and 20 < len(first) < 60
    assert sum(first[-5:]) < 0.5 * sum(first[:5]), first
