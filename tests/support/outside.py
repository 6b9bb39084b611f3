"""Code of somebody who uses fewstep: a method, a teacher family, a network and a data set, as files that a run imports."""

from pathlib import Path

METHOD = '''
"""Diff-Instruct (Luo et al. 2023, arXiv 2305.18455)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from fewstep.diffusion.denoiser import denoising_loss
from fewstep.diffusion.noise import NoiseLaw, UniformTime, unsqueeze_as
from fewstep.methods import Objective, Terms
from fewstep.methods.losses import inject_gradient


class DiffInstruct(Objective):
    """The gradient of the KL divergence between noised marginals."""

    method: Literal["diff-instruct"] = "diff-instruct"
    power: float = Field(2.0, ge=0)
    """How strongly noisy times count."""
    noise: NoiseLaw = UniformTime(low=0.02, high=0.98, steps=None)
    """Noise levels of both losses."""

    def generator_loss(self, nets, x, batch):
        schedule = nets.teacher.schedule
        t = self.noise.draw(len(x), schedule).to(x.device)
        with torch.no_grad():
            x_t = schedule.perturb(x, t, torch.randn_like(x))
            difference = nets.critic(x_t, t, batch.cond) - nets.teacher(x_t, t, **batch.cond)
            alpha_t, sigma_t = schedule.alpha_sigma(t)
            gradient = unsqueeze_as((alpha_t / sigma_t) ** (2 - self.power), x) * difference
        return Terms({"kl": inject_gradient(x, gradient)})

    def critic_loss(self, nets, x, batch):
        t = self.noise.draw(len(x), nets.teacher.schedule).to(x.device)
        return Terms({"denoising": denoising_loss(nets.critic.denoiser, x, t, torch.randn_like(x), batch.cond)})
'''

TEACHER = '''
"""A plain DDPM: a state dict of a convolutional network that predicts the noise at integer timesteps."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.diffusion.noise import Discrete
from fewstep.system.errors import TeacherError
from fewstep.teachers import ClassLabels, Teacher, TeacherSpec


class EpsNet(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.noise = nn.Linear(1, width)
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x, timestep):
        hidden = self.first(x) + self.noise(timestep[:, None] / 100)[..., None, None]
        return self.last(nn.functional.silu(self.middle(nn.functional.silu(hidden))))


class PlainDDPM(TeacherSpec):
    """A DDPM in a .pt file."""

    kind: Literal["plain-ddpm"] = "plain-ddpm"
    path: Path
    """The state dict."""
    width: int = Field(8, gt=0)
    """Channels inside."""
    steps: int = Field(100, gt=1)
    """Timesteps of the noise table."""

    def load(self):
        if not self.path.exists():
            raise TeacherError(f"teacher.path {self.path} must be a state dict, got no file. Try: train_ddpm.py")
        net = EpsNet(self.width)
        net.load_state_dict(torch.load(self.path, weights_only=True))
        betas = torch.linspace(1e-4, 0.1, self.steps, dtype=torch.float64)
        schedule = Discrete(alphas_cumprod=tuple((1 - betas).cumprod(0).tolist()))
        denoiser = Preconditioned(net, schedule, prediction="eps").requires_grad_(False).eval()
        return Teacher(
            name=str(self.path),
            denoiser=denoiser,
            shape=(1, 8, 8),
            conditioner=ClassLabels(0),
            start=lambda: copy.deepcopy(denoiser).requires_grad_(True).train(),
            bottleneck="middle",
            sha256=hashlib.sha256(self.path.read_bytes()).hexdigest(),
        )
'''

NETWORK = '''
"""A plain convolutional network."""

from typing import Literal

from pydantic import Field
from torch import nn

from fewstep.networks import NetSpec


class TinyConvSpec(NetSpec):
    """Shape of a plain convolutional network."""

    kind: Literal["tiny-conv"] = "tiny-conv"
    width: int = Field(8, gt=0)
    """Channels inside."""

    @property
    def sample_shape(self):
        return 1, 8, 8

    @property
    def bottleneck(self):
        return "middle"

    def build(self):
        return TinyConv(self)


class TinyConv(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.noise = nn.Linear(1, spec.width)
        self.first = nn.Conv2d(1, spec.width, 3, padding=1)
        self.middle = nn.Conv2d(spec.width, spec.width, 3, padding=1)
        self.last = nn.Conv2d(spec.width, 1, 3, padding=1)

    def forward(self, x, label):
        hidden = nn.functional.silu(self.first(x) + self.noise(label[:, None])[..., None, None])
        return self.last(nn.functional.silu(self.middle(hidden)))
'''

DATA = '''
"""Pictures of one white square each."""

from typing import Literal

import torch
from pydantic import Field

from fewstep.data import DataSpec, ImageDataset


class Squares(DataSpec):
    """White squares on black."""

    kind: Literal["squares"] = "squares"
    count: int = Field(64, gt=0)
    """Number of pictures."""

    def load(self):
        images = torch.zeros(self.count, 1, 8, 8, dtype=torch.uint8)
        for index in range(self.count):
            row, column = index % 5, index // 5 % 5
            images[index, :, row : row + 4, column : column + 4] = 255
        return ImageDataset("squares", images)
'''

TRAIN = {
    "images": 64, "batch_size": 8, "precision": "fp32", "device": "cpu", "evaluate_every": None, "log_every": 8,
    "checkpoint_every": 8, "threads": 1,
}  # fmt: skip
EVALUATION = {"samples": 16, "extractor": "pixels", "metrics": ["fid"]}
DISTILL = {
    "kind": "distill",
    "imports": ["my_method.py", "my_teacher.py", "my_data.py"],
    "teacher": {"kind": "plain-ddpm", "path": "ddpm.pt"},
    "generator": {"times": [0.6]},
    "objective": {"method": "diff-instruct", "power": 1.5},
    "data": {"kind": "squares", "count": 32},
    "train": TRAIN,
    "evaluation": EVALUATION,
}
PRETRAIN = {
    "kind": "pretrain",
    "imports": ["my_network.py", "my_data.py"],
    "denoiser": {"net": {"kind": "tiny-conv", "width": 6}},
    "data": {"kind": "squares"},
    "train": TRAIN,
    "evaluation": EVALUATION,
}


def write(folder: Path) -> None:
    """Put the four files into a folder."""
    for name, text in (("method", METHOD), ("teacher", TEACHER), ("network", NETWORK), ("data", DATA)):
        (folder / f"my_{name}.py").write_text(text.lstrip())
