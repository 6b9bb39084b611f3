"""DMD2's SDXL losses, gradients and backward simulation against numbers made by the paper's program (tests/golden)."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("diffusers")

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.guidance import Guided
from fewstep.diffusion.noise import Discrete
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.methods import DMD2, Batch, Critic, Nets
from fewstep.networks import DiffusersSpec
from tests.support.golden import Stored, indices
from tests.support.places import GOLDEN

TIMESTEPS = (999, 749, 499, 249)


def zeros(cond):
    """SDXL's empty prompt: zeros, at the same sizes and crops."""
    return {name: value if name == "time_ids" else torch.zeros_like(value) for name, value in cond.items()}


@pytest.fixture(scope="module")
def sdxl():
    """The file, its nets with the teacher under guidance 8, and the batch."""
    file = {
        k: v.float() if v.is_floating_point() else v for k, v in load_file(GOLDEN / "dmd2_sdxl.safetensors").items()
    }
    spec = DiffusersSpec(config=json.loads((GOLDEN / "sdxl_tiny_unet.json").read_text()), height=8, width=8)
    schedule = Discrete(alphas_cumprod=tuple(file["alphas_cumprod"].double().tolist()))

    def denoiser(prefix):
        made = Preconditioned(spec.build(), schedule, "eps")
        weights = {k.removeprefix(prefix): v for k, v in file.items() if k.startswith(prefix)}
        made.net.model.load_state_dict(weights)
        return made

    head = nn.Sequential(
        nn.Conv2d(32, 32, 4, stride=2, padding=1), nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 1, 2), nn.Flatten(0)
    )
    head.load_state_dict({k.removeprefix("classifier."): v for k, v in file.items() if k.startswith("classifier.")})
    teacher = Guided(denoiser("teacher."), zeros, 8.0).requires_grad_(False)
    critic = Critic(denoiser("fake_score."), head, "net.model.mid_block")
    generator = Generator(denoiser("generator."), [t / 999 for t in TIMESTEPS])
    cond = {
        "text": file["input.text_embedding"],
        "pooled": file["input.pooled_text_embedding"],
        "time_ids": file["input.time_ids"],
    }
    return file, Nets(generator, teacher, critic), Batch(cond)


def close(found, wanted, tolerance=1e-5):
    assert (found - wanted).norm() <= tolerance * wanted.norm()


def gradient_on(x, loss):
    return torch.autograd.grad(loss, x)[0]


def test_distribution_matching_under_guidance(sdxl, stored_noise):
    file, nets, batch = sdxl
    x = file["input.latents"].clone().requires_grad_()
    stored_noise(file["dm.noise"])
    objective = DMD2.model_construct(gan_weight=0.0, noise=Stored(indices(file, "dm.timesteps")))
    loss = objective.generator_loss(nets, x, batch).losses["dm"]
    close(loss.detach(), file["dm.loss"])
    close(gradient_on(x, loss), file["dm.grad_latents"], 1e-4)


def test_the_fake_scores_loss_is_the_error_of_eps(sdxl, stored_noise):
    file, nets, batch = sdxl
    stored_noise(file["fake.noise"])
    objective = DMD2.model_construct(gan_weight=0.0, critic_noise=Stored(indices(file, "fake.timesteps")))
    loss = objective.critic_loss(nets, file["input.latents"], batch).losses["denoising"]
    close(loss.detach(), file["fake.loss"])
    weights = list(nets.critic.denoiser.parameters())
    norm = torch.stack([g.norm() for g in torch.autograd.grad(loss, weights)]).norm()
    close(norm, file["fake.grad_norm"], 1e-4)


def test_the_gans_loss_for_the_generator(sdxl, stored_noise):
    file, nets, batch = sdxl
    x = file["input.latents"].clone().requires_grad_()
    stored_noise(file["dm.noise"], file["gan_generator.noise"])
    objective = DMD2.model_construct(
        gan_weight=1.0,
        noise=Stored(indices(file, "dm.timesteps")),
        gan_noise=Stored(indices(file, "gan_generator.timesteps")),
    )
    loss = objective.generator_loss(nets, x, batch).losses["gan"]
    close(loss.detach(), file["gan_generator.loss"])
    close(gradient_on(x, loss), file["gan_generator.grad_latents"], 1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_backward_simulation(sdxl, steps):
    """The program's sample for step s is what s calls of the student make of the stored noises."""
    file, nets, batch = sdxl
    noise = [file[f"backsim.{steps}.initial_noise"], *(file[f"backsim.{steps}.renoise{i}"] for i in range(steps))]
    assert file[f"backsim.{steps}.timesteps"].tolist() == [TIMESTEPS[steps]] * 2
    with torch.no_grad():
        clean = nets.generator(noise[:steps], **batch.cond)
    close(clean, file[f"backsim.{steps}.clean_images"])
