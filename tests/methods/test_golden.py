"""Losses, gradients and samples against numbers made by the programs of the EDM, SiD and DMD2 papers (tests/golden).

Times and noise are the stored ones, handed to the objectives in the order in which they draw.
"""

import pytest
import torch
from safetensors.torch import load_file

from fewstep.diffusion.noise import Karras
from fewstep.diffusion.solvers import Solver
from fewstep.methods import DMD2, SiD
from tests.support.golden import Stored, batch_of, golden, indices, load
from tests.support.places import GOLDEN

SCHEDULE = Karras()


def close(ours, theirs, tolerance=1e-5):
    assert (ours.double() - theirs.double()).norm() / theirs.double().norm() < tolerance


def gradient_norm(module):
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_sid_generator(stored_noise, alpha):
    nets, file = load("sid_edm.safetensors", "edm_ddpmpp")
    part = f"sid_alpha{alpha}"
    time = SiD().noise.high * file[f"{part}.uniform"].double()
    close(SCHEDULE.alpha_sigma(time)[1], file[f"{part}.sigma"])
    objective = SiD.model_construct(alpha=alpha, noise=Stored(time))
    stored_noise(file[f"{part}.noise"])
    nets.critic.requires_grad_(False)
    x = file["input.image"].requires_grad_()
    loss = objective.generator_loss(nets, x, batch_of(file)).losses["sid"]
    loss.backward()
    close(loss, file[f"{part}.loss_scaled"])
    close(x.grad, file[f"{part}.grad_image"], 1e-4)


def test_sid_fake_score(stored_noise):
    nets, file = load("sid_edm.safetensors", "edm_ddpmpp")
    sigma = (-1.2 + 1.2 * file["fake.standard_normal"]).exp()
    close(sigma, file["fake.sigma"])
    stored_noise(file["fake.noise"])
    objective = SiD.model_construct(critic_noise=Stored(SCHEDULE.time(sigma)))
    loss = objective.critic_loss(nets, file["input.image"], batch_of(file)).losses["denoising"]
    loss.backward()
    close(loss, file["fake.loss"])
    close(gradient_norm(nets.critic), file["fake.grad_norm"], 1e-4)


def test_dmd2_grid():
    _, file = load("dmd2_edm.safetensors", "edm_adm")
    close(SCHEDULE.alpha_sigma(torch.arange(1000) / 999)[1], file["karras_sigmas"])


def test_dmd2_distribution_matching(stored_noise):
    nets, file = load("dmd2_edm.safetensors", "edm_adm")
    stored_noise(file["dm.noise"])
    objective = DMD2.model_construct(gan_weight=0.0, noise=Stored(indices(file, "dm.timesteps")))
    x = file["input.image"].requires_grad_()
    loss = objective.generator_loss(nets, x, batch_of(file)).losses["dm"]
    loss.backward()
    close(loss, file["dm.loss"])
    close(x.grad, file["dm.grad_image"], 1e-4)


def test_dmd2_fake_score(stored_noise):
    nets, file = load("dmd2_edm.safetensors", "edm_adm")
    stored_noise(file["fake.noise"])
    objective = DMD2.model_construct(gan_weight=0.0, critic_noise=Stored(indices(file, "fake.timesteps")))
    loss = objective.critic_loss(nets, file["input.image"], batch_of(file)).losses["denoising"]
    loss.backward()
    close(loss, file["fake.loss"])
    close(gradient_norm(nets.critic.denoiser), file["fake.grad_norm"], 1e-4)


@pytest.mark.parametrize("kind", ["diffusion_gan", "clean_gan"])
def test_dmd2_gan_generator(stored_noise, kind):
    nets, file = load("dmd2_edm.safetensors", "edm_adm")
    x = file["input.image"].requires_grad_()
    noised = kind == "diffusion_gan"
    stored_noise(file["dm.noise"], *([file[f"{kind}.generator.noise"]] if noised else []))
    times = Stored(indices(file, f"{kind}.generator.timesteps")) if noised else None
    objective = DMD2.model_construct(gan_weight=1.0, noise=Stored(indices(file, "dm.timesteps")), gan_noise=times)
    nets.critic.requires_grad_(False)
    loss = objective.generator_loss(nets, x, batch_of(file)).losses["gan"]
    loss.backward()
    close(loss, file[f"{kind}.generator.loss"])
    close(x.grad, file[f"{kind}.generator.grad_image"], 1e-4)


@pytest.mark.parametrize("kind", ["diffusion_gan", "clean_gan"])
def test_dmd2_gan_critic(stored_noise, kind):
    nets, file = load("dmd2_edm.safetensors", "edm_adm")
    x = file["input.image"]
    whose = ("real", "fake") if kind == "diffusion_gan" else ()
    stored_noise(file["fake.noise"], *(file[f"{kind}.critic.{who}_noise"] for who in whose))
    times = Stored(*(indices(file, f"{kind}.critic.{who}_timesteps") for who in whose)) if whose else None
    objective = DMD2.model_construct(
        discriminator_weight=1.0, critic_noise=Stored(indices(file, "fake.timesteps")), gan_noise=times
    )  # fmt: skip
    terms = objective.critic_loss(nets, x, batch_of(file))
    terms.losses["gan"].backward()
    close(terms.losses["gan"], file[f"{kind}.critic.loss"])
    close(gradient_norm(nets.critic), file[f"{kind}.critic.grad_norm"], 1e-4)


@pytest.mark.parametrize(("steps", "evaluations"), [(5, 9), (18, 35)])
def test_deterministic_sampler(steps, evaluations):
    denoiser, _, _ = golden("edm_ddpmpp")
    file = load_file(GOLDEN / "edm_sampler.safetensors")
    with torch.no_grad():
        x = Solver()(denoiser, file["input.latents"].float(), evaluations, labels=file["input.class_labels"].argmax(1))
    close(x, file[f"output.heun_{steps}"], 1e-4)
