"""Guidance and its limits against closed forms: a linear denoiser, and the exact mixture."""

import pytest
import torch

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.guidance import Guided, Interval, Rescaled, Scale, as_rule, guidance_rule, plain
from fewstep.diffusion.noise import Karras, RectifiedFlow
from fewstep.diffusion.solvers import Solver

SCHEDULE = Karras(sigma_max=20.0)


class Two(Denoiser):
    """Gaussian classes of mean c and variance v, and for class 0 the mixture's stand-in: one wide Gaussian around 0."""

    def __init__(self, schedule=SCHEDULE):
        super().__init__()
        self.schedule, self.rows = schedule, []

    def forward(self, x_t, t, **cond):
        self.rows.append(len(x_t))
        alpha, sigma = (value.to(x_t)[:, None] for value in self.schedule.alpha_sigma(t))
        mean = cond["labels"][:, None].to(x_t)
        variance = torch.where(mean == 0, 4.0, 0.25)
        return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x_t - alpha * mean)


def null(cond):
    return {"labels": torch.zeros_like(cond["labels"])}


def at(schedule, *ratios):
    return schedule.time(torch.tensor(ratios, dtype=torch.float64))


@pytest.mark.parametrize("schedule", [SCHEDULE, RectifiedFlow()])
def test_guidance_acts_within_its_interval_alone(schedule):
    network, labels = Two(schedule), torch.ones(4, dtype=torch.int64)
    t, x_t = at(schedule, 0.1, 0.5, 1.9, 8.0), torch.randn(4, 3)
    inside = torch.tensor([False, True, True, False])[:, None]
    conditional = network(x_t, t, labels=labels)
    guided = Guided(network, null, 3.0)(x_t, t, labels=labels)
    found = Guided(network, null, Interval(Scale(3.0), 0.3, 2.0))(x_t, t, labels=labels)
    torch.testing.assert_close(found, torch.where(inside, guided, conditional))
    assert not torch.allclose(guided, conditional, atol=1e-3)


def test_outside_its_interval_guidance_costs_no_call_of_its_own():
    network, labels = Two(), torch.ones(5, dtype=torch.int64)
    limited = Guided(network, null, Interval(Scale(3.0), 0.3, 2.0))
    Solver("euler")(limited, torch.randn(5, 2), 12, labels=labels)
    sigmas = Solver("euler").grid(SCHEDULE, 12)[1]
    assert network.rows == [10 if 0.3 < sigma <= 2.0 else 5 for sigma in sigmas.tolist()]
    assert {5, 10} == set(network.rows)


def test_an_interval_keeps_the_spread_that_guidance_takes():
    """Class 1 has deviation ½. Guidance narrows it; guidance without the high noise narrows it less and moves it less."""
    spread, mean, labels = {}, {}, torch.ones(2000, dtype=torch.int64)
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1))
    for name, rule in (("none", None), ("all", Scale(4.0)), ("interval", Interval(Scale(4.0), 0.1, 0.5))):
        network = Two() if rule is None else Guided(Two(), null, rule)
        x = Solver("dpmpp-2m")(network, noise, 20, labels=labels)
        spread[name], mean[name] = x.std(0).mean().item(), x.mean().item()
    assert spread["none"] == pytest.approx(0.5, rel=0.05) and mean["none"] == pytest.approx(1, abs=0.05)
    assert spread["all"] < 0.8 * spread["interval"] and mean["all"] > mean["interval"] > mean["none"], (spread, mean)


def test_rescaling_keeps_the_contrast_of_the_conditional_prediction():
    conditional, unconditional, ratio = torch.randn(6, 3, 4, 4), torch.randn(6, 3, 4, 4), torch.ones(6)
    guided = Scale(5.0)(conditional, unconditional, ratio)

    def contrast(x):
        return x.flatten(1).std(1)

    whole = Rescaled(Scale(5.0), 1.0)(conditional, unconditional, ratio)
    torch.testing.assert_close(contrast(whole), contrast(conditional))
    torch.testing.assert_close(whole / guided, (whole / guided)[:, :1, :1, :1].expand_as(whole))
    share = Rescaled(Scale(5.0), 0.7)(conditional, unconditional, ratio)
    torch.testing.assert_close(share, 0.7 * whole + 0.3 * guided)
    torch.testing.assert_close(contrast(share), 0.7 * contrast(conditional) + 0.3 * contrast(guided))


def test_limits_wrap_each_other():
    rule = guidance_rule(3.0, (0.3, 5.0), 0.7)
    assert rule == Rescaled(Interval(Scale(3.0), 0.3, 5.0), 0.7) and rule.scale == 3.0
    assert plain(rule) == "3 within 0.3..5 rescaled 0.7" and plain(Scale(2.0)) == 2.0 and plain(None) is None
    conditional, unconditional = torch.randn(2, 8), torch.randn(2, 8)
    found = rule(conditional, unconditional, torch.tensor([0.1, 1.0]))
    torch.testing.assert_close(found[0], conditional[0])
    assert guidance_rule(None) is guidance_rule(1.0) is as_rule(1.0) is None and as_rule(2.0) == Scale(2.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((-1.0,), "`guidance` must be a number of at least 0, got -1.0"),
        ((2.0, (5.0, 0.3)), r"`guidance_interval` must be two rising noise levels of at least 0, got \[5.0, 0.3\]"),
        ((2.0, None, 1.5), "`guidance_rescale` must be between 0 and 1, got 1.5"),
        ((None, (0.3, 5.0)), "`guidance_interval` must come with `guidance` other than 1"),
        ((1.0, None, 0.7), "`guidance_rescale` must come with `guidance` other than 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        guidance_rule(*settings)
