"""Your own distillation method in one file, trained by the Trainer on the Gaussian mixture.

    python examples/02_your_own_method.py --out runs/example-02

The method is Diff-Instruct (Luo et al. 2023, arXiv 2305.18455): the gradient of the KL divergence between noised
marginals, integrated over noise levels with a weight w(t). It is DMD's gradient with a weight that depends only on the
time, not on each sample's error. The same command resumes a stopped run.

A run file in this folder can use the method like fewstep's own:

    imports: [02_your_own_method.py]
    objective: {method: diff-instruct, power: 1.5}
"""

import argparse
from pathlib import Path
from typing import Any, Literal

import torch

from fewstep.diffusion.denoiser import denoising_loss
from fewstep.diffusion.noise import LogNormalNoise, NoiseLaw, UniformTime, unsqueeze_as
from fewstep.methods import Batch, Nets, Objective, Terms
from fewstep.methods.losses import inject_gradient
from fewstep.students.sample import generate
from fewstep.system.tracking import read_stats
from fewstep.teachers import MixtureTeacher
from fewstep.training.distill import Distillation, Setup
from fewstep.training.optim import OptimSpec
from fewstep.training.spec import TrainSpec
from fewstep.training.trainer import Trainer


class DiffInstruct(Objective):
    """Gradient on x: w(t) (s_fake - s_real) dx_t/dx with w(t) = (sigma_t / alpha_t)^power."""

    method: Literal["diff-instruct"] = "diff-instruct"
    power: float = 2.0
    """0 is the KL divergence itself, which clean times dominate; 2 weights x0 errors equally."""
    noise: NoiseLaw = UniformTime(low=0.02, high=0.98, steps=None)
    """Noise levels at which the two scores are compared."""
    critic_noise: NoiseLaw = LogNormalNoise()
    """Noise levels at which the fake score is trained."""

    def generator_loss(self, nets: Nets, x: torch.Tensor, batch: Batch) -> Terms:
        schedule = nets.teacher.schedule
        t = self.noise.draw(len(x), schedule).to(x.device)
        with torch.no_grad():
            x_t = schedule.perturb(x, t, torch.randn_like(x))
            d_real = nets.teacher(x_t, t, **batch.cond)
            d_fake = nets.critic(x_t, t, batch.cond)
            alpha_t, sigma_t = schedule.alpha_sigma(t)
            # s_fake - s_real = alpha_t (D_f - D_r) / sigma_t², and dx_t/dx = alpha_t
            gradient = unsqueeze_as((alpha_t / sigma_t) ** (2 - self.power), x) * (d_fake - d_real)
        probe = {"t": t, "x": x, "x_t": x_t, "d_real": d_real, "d_fake": d_fake}  # for the log's gaps by noise level
        return Terms({"kl": inject_gradient(x, gradient)}, probe=probe)

    def critic_loss(self, nets: Nets, x: torch.Tensor, batch: Batch) -> Terms:
        t = self.critic_noise.draw(len(x), nets.teacher.schedule).to(x.device)
        return Terms({"denoising": denoising_loss(nets.critic.denoiser, x, t, torch.randn_like(x), batch.cond)})


class EnergyDistance:
    """A scorer: any object with this method can evaluate a run."""

    def __init__(self, real: torch.Tensor) -> None:
        self.real = real

    def score(self, sampler: Any, shape: Any, conditioner: Any, device: Any = "cpu") -> dict[str, float]:
        x = torch.cat(list(generate(sampler, range(len(self.real)), shape, conditioner, device=device, uint8=False)))
        y = self.real
        distance = 2 * torch.cdist(x, y).mean() - torch.pdist(x).mean() - torch.pdist(y).mean()
        return {"energy_distance": distance.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=150_000, help="samples seen in training")
    parser.add_argument("--out", type=Path, default=Path("runs/example-02"), help="run folder")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the networks are tiny

    teacher = MixtureTeacher().load()
    torch.manual_seed(1)
    times = (teacher.denoiser.schedule.time(torch.tensor(2.5)).item(),)
    train = TrainSpec(
        images=options.images, batch_size=256, precision="fp32", device="cpu", ema_half_life=5_000,
        log_every=5_120, evaluate_every=25_600, checkpoint_every=51_200,
    )  # fmt: skip
    optim = OptimSpec(kind="adam", lr=5e-4, betas=(0.0, 0.999), decay_from=0.5)
    task = Distillation(Setup(
        teacher, times, DiffInstruct(critic_steps=2), train,
        generator_optim=optim, critic_optim=optim.model_copy(update={"lr": 1e-3}),
        scorer=EnergyDistance(teacher.denoiser.sample(2_000)),  # type: ignore[arg-type]
    ))  # fmt: skip
    Trainer(task, train, options.out, describe="diff-instruct").fit()

    scores = [line for line in read_stats(options.out / "stats.jsonl") if line["kind"] == "evaluation"]
    for line in (scores[0], scores[-1]):
        print(f"energy distance to the teacher after {line['images']:,} samples: {line['energy_distance']:.4f}")


if __name__ == "__main__":
    main()
