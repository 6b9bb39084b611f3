"""Perceptual distances: zero at identity, growing with noise, with gradients to train on."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.data import ImageDataset
from fewstep.evaluation.perceptual import LPIPS, VGG_URL, PerceptualNet, SmallPerceptual, perceptual_for, vgg_path
from fewstep.evaluation.small_features import SmallFeatures, SmallNet
from fewstep.system.errors import EvaluationError


@pytest.fixture
def eight(clothes: ImageDataset) -> Tensor:
    """Eight test images, float [8, 1, 28, 28] in [-1, 1]."""
    images, _ = clothes.batch(torch.arange(8))
    return images


def noise_like(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def no_vgg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path


def test_small_is_zero_at_identity_and_grows_with_noise(eight: Tensor) -> None:
    distance = SmallPerceptual()
    assert torch.equal(distance(eight, eight), torch.zeros(8))
    steps = [distance(eight + level * noise_like(eight), eight) for level in (0.01, 0.03, 0.1, 0.3, 1.0)]
    for smaller, larger in pairwise(steps):
        assert (smaller < larger).all()
    assert steps[0].dtype == torch.float32 and steps[0].shape == (8,)


def test_small_tells_another_garment_from_a_little_shift(eight: Tensor) -> None:
    distance = SmallPerceptual()
    shifted = distance(eight.roll(1, dims=3), eight)
    other = distance(eight.roll(1, dims=0), eight)
    assert shifted.mean() < other.mean()


def test_small_is_the_formula_of_the_paper(eight: Tensor) -> None:
    distance = SmallPerceptual()
    x, y = eight[:1], eight[1:2]
    total = 0.0
    for f, g in zip(distance.net.features(x), distance.net.features(y), strict=True):
        *_, height, width = f.shape
        for i in range(height):
            for j in range(width):
                u, v = f[0, :, i, j].double(), g[0, :, i, j].double()
                difference = u / u.norm().clamp_min(1e-30) - v / v.norm().clamp_min(1e-30)
                total += (difference @ difference).item() / (height * width)
    assert distance(x, y).item() == pytest.approx(total, rel=1e-3)


def test_small_has_gradients_for_the_first_argument_and_frozen_weights(eight: Tensor) -> None:
    distance = SmallPerceptual()
    x = (eight + 0.1 * noise_like(eight)).requires_grad_()
    distance(x, eight).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    assert (x.grad.flatten(1).norm(dim=1) > 1e-3).all()
    assert not any(p.requires_grad for p in distance.net.parameters())
    moved = (x - 1e-3 * x.grad).detach()
    assert (distance(moved, eight) < distance(x, eight)).all()


def test_small_gradient_equals_finite_differences(eight: Tensor) -> None:
    distance = SmallPerceptual()
    distance.net.double()
    y = eight[:2].double()
    x = (y + 0.1 * noise_like(y)).requires_grad_()
    (gradient,) = torch.autograd.grad(distance._distance(x, y).sum(), x)
    direction, h = noise_like(y).double(), 1e-6
    change = distance._distance(x + h * direction, y) - distance._distance(x - h * direction, y)
    assert (gradient * direction).sum().item() == pytest.approx(change.sum().item() / (2 * h), rel=1e-4)


def test_small_gradient_is_finite_at_identity_and_on_blank_images(eight: Tensor) -> None:
    distance = SmallPerceptual()
    for image in (eight, torch.full_like(eight, -1), torch.zeros_like(eight)):
        x = image.clone().requires_grad_()
        distance(x, eight).sum().backward()
        assert x.grad is not None and torch.isfinite(x.grad).all()


def test_small_ignores_autocast(eight: Tensor) -> None:
    distance = SmallPerceptual()
    expected = distance(eight.flip(0), eight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distance(eight.flip(0), eight), expected)


def test_the_network_that_scores_is_not_the_network_of_the_loss() -> None:
    evaluating, training = SmallFeatures(), SmallPerceptual()
    assert evaluating.sha256 != training.sha256
    assert evaluating.card["architecture"] != training.card["architecture"]
    assert evaluating.card["training"]["seed"] != training.card["training"]["seed"]
    augmentation = ("mirror", "noise", "erase")
    assert all(evaluating.card["training"][key] != training.card["training"][key] for key in augmentation)

    def shapes(net: torch.nn.Module) -> set[tuple[int, ...]]:
        return {tuple(p.shape) for p in net.parameters() if p.ndim == 4}  # convolutions

    assert not shapes(SmallNet()) & shapes(PerceptualNet())


def test_what_does_not_fit_is_refused(eight: Tensor, no_vgg: Path) -> None:
    distance = SmallPerceptual()
    with pytest.raises(EvaluationError, match="one shape"):
        distance(eight, eight[:1])
    with pytest.raises(EvaluationError, match="28x28"):
        distance(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))
    with pytest.raises(EvaluationError, match="must be auto, lpips, small or l2, got 'ssim'"):
        perceptual_for((1, 28, 28), "ssim")  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="28x28"):
        perceptual_for((3, 32, 32), "small")


def test_auto_without_vgg_is_small_for_28x28_and_lpips_says_what_it_needs(no_vgg: Path) -> None:
    chosen = perceptual_for((1, 28, 28))
    assert isinstance(chosen, SmallPerceptual) and chosen.name.startswith("small-perceptual-")
    with pytest.raises(EvaluationError) as error:
        perceptual_for((1, 28, 28), "lpips")
    for part in (str(vgg_path()), "https://", "fewstep fetch vgg16", "small"):
        assert part in str(error.value)
    assert not any(no_vgg.iterdir())


def test_damaged_vgg_weights_are_refused_and_not_replaced_by_the_small_net(no_vgg: Path) -> None:
    vgg_path().parent.mkdir(parents=True)
    vgg_path().write_bytes(b"half a download")
    with pytest.raises(EvaluationError, match="is damaged"):
        perceptual_for((1, 28, 28))


def test_the_vgg_file_is_the_one_that_torchvision_loads() -> None:
    models = pytest.importorskip("torchvision.models")
    assert models.VGG16_Weights.DEFAULT.url == VGG_URL


def test_lpips_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image.lpips", None)
    with pytest.raises(EvaluationError, match=r"fewstep\[lpips\]"):
        LPIPS(pretrained=False)


@pytest.mark.slow
def test_lpips_with_random_weights_is_torchmetrics_on_upsampled_colour() -> None:
    from torch.nn.functional import interpolate

    pytest.importorskip("torchmetrics")
    torch.manual_seed(0)
    distance = LPIPS(pretrained=False)
    assert distance.name == "lpips-vgg16-random"
    y = 2 * torch.rand(2, 1, 28, 28) - 1
    x = (y + 0.3 * noise_like(y)).requires_grad_()
    values = distance(x, y)
    large = [interpolate(z, (224, 224), mode="bilinear").repeat(1, 3, 1, 1) for z in (x.detach(), y)]
    torch.testing.assert_close(values.detach(), distance.net(*large).flatten(), rtol=1e-4, atol=1e-7)
    assert values.shape == (2,) and (values > 0).all()
    values.sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.abs().max() > 0
    assert torch.equal(distance(y, y), torch.zeros(2))
    assert not any(p.requires_grad for p in distance.net.parameters())
