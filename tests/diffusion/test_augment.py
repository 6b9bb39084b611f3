"""EDM's augmentations: what they do to pictures, what they say of it, and that gradients pass."""

import pytest
import torch
from torch import nn

from fewstep.cli.main import main
from fewstep.diffusion.augment import augment
from fewstep.diffusion.noise import Karras
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.methods import Batch, Critic, Nets, SiD
from fewstep.networks import SongUNetSpec


def test_without_probability_only_mirroring_is_left():
    x = torch.rand(64, 3, 8, 8)
    out, told = augment(x, 0.0)
    mirrored = told[:, 0] > 0
    assert 10 < mirrored.sum() < 54 and (told[:, 1:] == 0).all()
    assert torch.equal(out[~mirrored], x[~mirrored]) and torch.equal(out[mirrored], x[mirrored].flip(-1))


def test_numbers_describe_what_was_done(monkeypatch):
    """A smooth spot right of the middle: a quarter turn takes it above or below, a shift moves it as far as told."""
    axis = torch.arange(32.0)
    x = torch.exp(-((axis[None] - 22) ** 2 + (axis[:, None] - 15.5) ** 2) / 8)[None, None]

    def place(image):
        mass = image[0, 0].clamp(min=0)
        return torch.stack([(mass * axis[None]).sum(), (mass * axis[:, None]).sum()]) / mass.sum() - 15.5

    def with_draws(normal, uniform):
        normals, uniforms = iter(normal), iter(uniform)
        monkeypatch.setattr(torch, "randn", lambda *size: torch.full(size, 0.0) + next(normals))
        monkeypatch.setattr(torch, "rand", lambda *size: torch.full(size, 0.0) + next(uniforms))
        return augment(x, 1.0)

    # draws of `rand`: mirror, over, size's chance, angle, its chance, stretch's chance, direction, its chance, shift's chance
    never, always = 0.99, 0.0
    out, told = with_draws([0, 0, 0], [never, never, never, 0.75, always, always, 0.5, always, always])
    assert told[0, 3:5].tolist() == pytest.approx([-1, 1], abs=1e-6)
    assert place(out).tolist() == pytest.approx([0, -6.5], abs=0.2)

    out, told = with_draws([0, 0, 1.0], [never, never, never, 0.5, always, always, 0.5, always, always])
    assert told[0, 7:].tolist() == [1, 1]
    assert (place(out) - place(x)).tolist() == pytest.approx([4, 4], abs=0.2)  # an eighth of the width

    out, told = with_draws([1.0, 0, 0], [never, never, always, 0.5, always, always, 0.5, always, always])
    assert told[0, 2] == 1
    assert place(out)[0].item() == pytest.approx(6.5 * 2**0.2, abs=0.2)

    out, told = with_draws([0, 1.0, 0], [never, never, never, 0.5, always, always, 0.5, always, always])
    assert told[0, 5:7].tolist() == pytest.approx([1, 0], abs=1e-6)  # direction 0: wider
    assert place(out)[0].item() == pytest.approx(6.5 * 2**0.2, abs=0.2)


def test_gradients_pass_through():
    x = torch.rand(8, 1, 8, 8, requires_grad=True)
    out, told = augment(x, 1.0)
    (out**2).sum().backward()
    assert told.shape == (8, 9) and (told[:, 2:] != 0).any() and (x.grad.flatten(1).norm(dim=1) > 0).all()


def test_a_stretch_lies_along_an_axis_half_of_the_time():
    """aniso_rotate_prob 0.5 of Karras et al. 2022: with direction 0 the second of its two numbers is 0."""
    _, told = augment(torch.zeros(4000, 1, 8, 8), 1.0)
    assert (told[:, 5] != 0).all()
    assert (told[:, 6] == 0).float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_sid_augments_what_trains_the_fake_score_alone():
    """The authors' generator loss has no augmentation; its networks are told of none."""
    spec = SongUNetSpec(
        size=8, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), augment_dim=9
    )
    seen = []

    class Spy(nn.Module):
        def __init__(self, who):
            super().__init__()
            self.who, self.net = who, spec.build()

        def forward(self, x, label, **cond):
            seen.append((self.who, x.detach(), cond.get("augment")))
            return self.net(x, label, **cond)

    teacher, critic = Preconditioned(Spy("teacher"), Karras()), Critic(Preconditioned(Spy("fake"), Karras()))
    nets, x = Nets(None, teacher, critic), torch.randn(4, 3, 8, 8, requires_grad=True)
    objective = SiD(augment=1.0)
    objective.generator_loss(nets, x, Batch({})).losses["sid"].backward()
    assert [(who, told) for who, _, told in seen] == [("teacher", None), ("fake", None)] and x.grad.abs().sum() > 0
    objective.critic_loss(nets, x.detach(), Batch({}))
    who, _, told = seen[2]
    assert who == "fake" and told.shape == (4, 9) and (told[:, 2:] != 0).any(1).all()


def test_a_network_without_augmentation_is_refused(capsys, tmp_path):
    out = ["--out", str(tmp_path / "run"), "--processes", "1"]
    assert main(["pretrain", "digits/teacher", "--augment", "0.1", *out]) == 1
    assert "`denoiser.net.augment_dim` must be 9" in capsys.readouterr().err
    assert main(["distill", "digits/sid", "--objective.augment", "0.1", *out]) == 1
    assert "whose network takes no augmentation" in capsys.readouterr().err
