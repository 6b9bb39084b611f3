"""EDM's networks against numbers made by the published programs (tests/golden), and what training them needs."""

import pytest
import torch

from fewstep.diffusion.denoiser import tap
from fewstep.networks import SongUNetSpec
from tests.support.golden import CONFIGS, golden, spec_of


def close(ours, theirs):
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_the_published_programs(name):
    denoiser, arguments, file = golden(name)
    with torch.no_grad(), tap(denoiser.net, denoiser.net.spec.bottleneck) as features:
        close(denoiser(**arguments), file["output.denoised"])
        if "output.bottleneck" in file:
            close(features[0], file["output.bottleneck"])
        if "output.denoised_augmented" in file:
            augment = file["input.augment_labels"].float()
            close(denoiser(**arguments, augment=augment), file["output.denoised_augmented"])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_is_used_and_no_class_is_a_row_of_zeros(name):
    denoiser, arguments, _ = golden(name)
    extra = {"augment": torch.ones(4, 9)} if denoiser.net.spec.augment_dim else {}
    if denoiser.net.spec.num_classes:
        count = denoiser.net.spec.num_classes
        without = denoiser(**arguments | {"labels": torch.full((4,), count)})
        torch.testing.assert_close(without, denoiser(arguments["x_t"], arguments["t"]))
        assert not torch.allclose(without, denoiser(**arguments))
        repeat = {"x_t": arguments["x_t"].repeat(3, 1, 1, 1), "t": arguments["t"].repeat(3)}
        arguments, extra = repeat | {"labels": torch.arange(12) % count}, {k: v.repeat(3, 1) for k, v in extra.items()}
    denoiser(**arguments, **extra).square().sum().backward()
    assert [n for n, p in denoiser.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fresh_network_predicts_almost_nothing_and_learns(name):
    """EDM's initialisation: F is close to 0 at first, so that D is c_skip x."""
    torch.manual_seed(0)
    net = spec_of(name).build()
    x, label = torch.randn(4, 3, 16, 16), torch.linspace(-1.5, 1.0, 4)
    first = net(x, label)
    assert first.abs().max() < 1e-3
    (first - x).square().mean().backward()
    assert sum(p.grad.norm() for p in net.parameters() if p.grad is not None) > 0


def test_a_side_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match="`size` must be a multiple of 4 for 3 entries of channel_mult, got 30"):
        SongUNetSpec(size=30, channel_mult=(1, 2, 2))
