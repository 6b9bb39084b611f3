"""The probe's numbers against closed forms of Gaussians."""

import math

import pytest
import torch

from fewstep.evaluation.probe import compared, explained, look


def sets(spread=1.0, shift=0.0, count=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return look([shift + spread * torch.randn(2 * count, 3, generator=generator)], 2, False)


def test_equal_laws_are_at_no_distance_and_one_sample_set_at_exactly_none():
    found = compared(sets(seed=1), sets(seed=2))
    assert abs(found["probe_distance"]) < 0.01 and found["probe_diversity"] == pytest.approx(1, abs=0.05)
    assert compared(sets(), sets()) == {"probe_distance": 0, "probe_diversity": 1}


def test_distance_and_diversity_of_gaussians_are_their_closed_forms():
    """E|x - y| of N(0, s² I) in three dimensions is 2 sqrt(2/pi) times the deviation of x - y."""
    found = compared(sets(spread=0.5, seed=1), sets(seed=2))
    mean = 2 * math.sqrt(2 / math.pi)
    across, own, other = (mean * math.sqrt(a**2 + b**2) for a, b in ((0.5, 1), (0.5, 0.5), (1, 1)))
    assert found["probe_diversity"] == pytest.approx(0.5, rel=0.05)
    assert found["probe_distance"] == pytest.approx((2 * across - own - other) / other, abs=0.01)
    assert compared(sets(shift=3.0, seed=1), sets(seed=2))["probe_distance"] > 1


def test_variants_are_compared_under_their_own_condition():
    """Two far conditions: exchanged, each is far from its own; the pooled sets would be equal."""
    a = look([torch.cat([torch.randn(50, 2), 9 + torch.randn(50, 2)])], 2, False)
    b = look([torch.cat([9 + torch.randn(50, 2), torch.randn(50, 2)])], 2, False)
    assert compared(a, b)["probe_distance"] > 5


def test_colour_and_sharpness_are_ratios_of_pictures():
    pictures = torch.rand(8, 3, 96, 80) - 0.5
    grey = pictures.mean(1, keepdim=True)
    whole, pale = look(pictures.split(3), 2, True), look([(grey + 0.5 * (pictures - grey))], 2, True)
    assert whole.reduced.shape == (2, 4, 3 * 64 * 64)
    assert compared(pale, whole)["probe_chroma"] == pytest.approx(0.5, rel=1e-4)
    stripes = torch.zeros(4, 1, 8, 8)
    stripes[..., ::2] = 0.5
    found = look([stripes], 1, True)
    assert found.chroma is None and found.sharpness == pytest.approx(0.25)  # ½ across, none down
    assert "probe_chroma" not in compared(found, found)


def test_a_denoiser_explains_what_the_signal_is_of_the_whole():
    x = torch.randn(4000, 2)
    noisy = x + 0.5 * torch.randn(4000, 2)
    assert explained(x, noisy / 1.25) == pytest.approx(0.8, abs=0.01)  # 1 / (1 + sigma²)
    assert explained(x, noisy / 2) < explained(x, noisy / 1.25) > explained(x, noisy)
    assert explained(x, -noisy) < 0
