"""Your own diffusion model as a teacher: any nn.Module and its noise table, distilled into one network call.

    python examples/03_your_own_teacher.py --out runs/example-03

The model here is a small DDPM that predicts eps at integer timesteps of a table of alphas_cumprod, trained on two moons
with a few lines of plain torch, without fewstep. `TwoMoons` is the part to copy: in a run file,

    imports: [03_your_own_teacher.py]
    teacher: {kind: two-moons, path: runs/example-03/ddpm.pt}

distils it with any method.
"""

import argparse
import copy
import hashlib
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.diffusion.noise import Discrete
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.diffusion.solvers import Solver
from fewstep.formats.model import load_generator
from fewstep.methods import SiD
from fewstep.system.errors import TeacherError
from fewstep.teachers import ClassLabels, Teacher, TeacherSpec
from fewstep.training.distill import Distillation, Setup
from fewstep.training.optim import OptimSpec
from fewstep.training.spec import TrainSpec
from fewstep.training.trainer import Trainer

STEPS = 100
ALPHAS_CUMPROD = (1 - torch.linspace(1e-4, 0.1, STEPS, dtype=torch.float64)).cumprod(0)


class EpsNet(nn.Module):
    """A third-party network: noisy points [B, 2] and timesteps [B] in 0..99 -> predicted noise."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.lift = nn.Linear(2 + 16, width)
        self.hidden = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        angles = timestep[:, None] / STEPS * torch.pi * 2.0 ** torch.arange(-1, 7)
        return self.out(self.hidden(self.lift(torch.cat([x, angles.cos(), angles.sin()], dim=1))))


def two_moons(count: int) -> Tensor:
    """Points [count, 2] on two interleaved half circles."""
    angle, second = torch.rand(count) * torch.pi, torch.rand(count) < 0.5
    moon = torch.stack([angle.cos(), angle.sin()], dim=1)
    moon[second] = torch.tensor([1.0, 0.4]) - moon[second]
    return moon - torch.tensor([0.5, 0.2]) + 0.05 * torch.randn(count, 2)


def train_ddpm(updates: int) -> EpsNet:
    """Train the network (Ho et al. 2020, algorithm 1)."""
    net = EpsNet()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - update / updates)
        x, eps, timestep = two_moons(512), torch.randn(512, 2), torch.randint(STEPS, (512,))
        signal = ALPHAS_CUMPROD[timestep, None].float()
        loss = (net(signal.sqrt() * x + (1 - signal).sqrt() * eps, timestep) - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


class TwoMoons(TeacherSpec):
    """A teacher family: its settings, and how to load the teacher."""

    kind: Literal["two-moons"] = "two-moons"
    path: Path
    """The state dict."""

    def load(self) -> Teacher:
        if not self.path.exists():
            raise TeacherError(f"teacher.path {self.path} must be a state dict, got no file. Try: run this example")
        net = EpsNet()
        net.load_state_dict(torch.load(self.path, weights_only=True))
        denoiser = Preconditioned(net, Discrete(alphas_cumprod=tuple(ALPHAS_CUMPROD.tolist())), prediction="eps")
        denoiser.requires_grad_(False).eval()
        return Teacher(
            name=str(self.path),
            denoiser=denoiser,
            shape=(2,),
            conditioner=ClassLabels(0),  # no classes: the network is called without `labels`
            start=lambda: copy.deepcopy(denoiser).requires_grad_(True),
            bottleneck="hidden",  # read by a GAN head, if the method has one
            sha256=hashlib.sha256(self.path.read_bytes()).hexdigest(),  # a resumed run refuses other weights
            images=False,
        )


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|: about 0 for equal distributions."""
    return (2 * torch.cdist(x, y).mean() - torch.pdist(x).mean() - torch.pdist(y).mean()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000, help="samples seen in distillation")
    parser.add_argument("--updates", type=int, default=2_000, help="updates that train the DDPM")
    parser.add_argument("--out", type=Path, default=Path("runs/example-03"), help="run folder")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the networks are tiny

    options.out.mkdir(parents=True, exist_ok=True)
    torch.save(train_ddpm(options.updates).state_dict(), options.out / "ddpm.pt")
    spec = TwoMoons(path=options.out / "ddpm.pt")
    teacher = spec.load()
    real, z = two_moons(2_000), torch.randn(2_000, 2)
    with torch.no_grad():
        print(
            f"teacher, 35 network calls: energy distance {energy_distance(Solver()(teacher.denoiser, z, 35), real):.4f}"
        )
        print(
            f"teacher,  1 network call:  energy distance {energy_distance(Solver()(teacher.denoiser, z, 1), real):.4f}"
        )

    times = (teacher.denoiser.schedule.time(torch.tensor(2.5)).item(),)
    train = TrainSpec(
        images=options.images, batch_size=256, precision="fp32", device="cpu", ema_half_life=5_000,
        log_every=5_120, evaluate_every=None, checkpoint_every=51_200,
    )  # fmt: skip
    optim = OptimSpec(kind="adam", lr=5e-4, betas=(0.0, 0.999), decay_from=0.5)
    provenance = {
        "run": {"teacher": spec.model_dump(mode="json")}
    }  # the student's file names the teacher that rebuilds it
    critic_optim = optim.model_copy(update={"lr": 1e-3})
    task = Distillation(Setup(teacher, times, SiD(), train, optim, critic_optim, provenance=provenance))
    Trainer(task, train, options.out, describe="sid").fit()

    student, _, _ = load_generator(options.out / "student.safetensors", player=teacher.player)
    with torch.no_grad():
        print(f"student,  1 network call:  energy distance {energy_distance(student([z]), real):.4f}")


if __name__ == "__main__":
    main()
