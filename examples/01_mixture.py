"""Distil a Gaussian mixture into a one-step generator: an explicit training loop with plain library calls.

    python examples/01_mixture.py --plot mixture.png

The teacher is exact, so the energy distance to it is a fair measure. `fewstep distill` runs the same loop, with checkpoints,
logs and mixed precision: 02_your_own_method.py uses the Trainer.
"""

import argparse

import torch

from fewstep.diffusion.generator import Generator
from fewstep.methods import Batch, Nets, SiD
from fewstep.teachers import MixtureTeacher
from fewstep.training.ema import Ema
from fewstep.training.optim import OptimSpec, Stepper


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased: about 0 for equal distributions (Székely & Rizzo 2013)."""
    return (2 * torch.cdist(x, y).mean() - torch.pdist(x).mean() - torch.pdist(y).mean()).item()


def plot(path: str, clouds: dict[str, torch.Tensor]) -> None:
    """Draw the clouds of points side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(clouds), figsize=(4 * len(clouds), 4), sharex=True, sharey=True)
    for axis, (name, points) in zip(axes, clouds.items(), strict=True):
        axis.scatter(*points.T, s=2)
        axis.set_title(name)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200_000, help="samples seen in training")
    parser.add_argument("--plot", metavar="FILE", help="draw teacher and student into this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the networks are tiny

    teacher = MixtureTeacher(width=128).load()  # eight Gaussians on a ring; student and fake score are small MLPs
    objective, batch = SiD(), 512
    time = teacher.denoiser.schedule.time(torch.tensor(2.5)).item()  # G(z) = D(2.5 z, sigma = 2.5)
    generator, critic = Generator(teacher.start(), [time]), objective.make_critic(teacher, teacher.start())
    nets = Nets(generator, teacher.denoiser, critic)
    average = Ema(generator, half_life=10_000)
    optim = OptimSpec(kind="adam", lr=1e-3, betas=(0.0, 0.99), decay_from=0.5)
    train_generator = Stepper(optim, [generator], options.images)
    train_critic = Stepper(optim.model_copy(update={"lr": 2e-3}), [critic], options.images)

    real, z = teacher.denoiser.sample(4_000), torch.randn(4_000, *teacher.shape)
    with torch.no_grad():
        first = generator([z])
    for seen in range(batch, options.images + 1, batch):
        critic.requires_grad_(True)
        with torch.no_grad():
            x = generator([torch.randn(batch, *teacher.shape)])
        sum(objective.critic_loss(nets, x, Batch(cond={})).losses.values()).backward()
        train_critic.step(seen)

        critic.requires_grad_(False)  # gradients still flow through it, into x
        x = generator([torch.randn(batch, *teacher.shape)])
        sum(objective.generator_loss(nets, x, Batch(cond={})).losses.values()).backward()
        train_generator.step(seen)
        average.update(generator, seen, batch)

    with torch.no_grad():
        student = average.module([z])
    print(f"energy distance to the teacher: {energy_distance(first, real):.4f} before", end=", ")
    print(f"{energy_distance(student, real):.4f} after {options.images:,} samples, one network call each")
    if options.plot:
        plot(options.plot, {"teacher": real, "student before": first, "student": student})


if __name__ == "__main__":
    main()
