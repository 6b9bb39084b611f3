"""Golden vectors of tests/golden: published networks with their weights, and noise laws that give stored times."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.noise import Karras
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.methods import Batch, Critic, Nets
from fewstep.methods.heads import ConvHead
from fewstep.networks import DhariwalUNetSpec, SongUNetSpec
from tests.support.places import GOLDEN

CONFIGS = json.loads((GOLDEN / "edm_networks.json").read_text())


def spec_of(name):
    """Our record of a network that the published constructor's arguments describe."""
    c = CONFIGS[name]
    common = dict(
        size=c["img_resolution"], channels=c["img_channels"], num_classes=c["label_dim"], dropout=c["dropout"],
        augment_dim=c["augment_dim"],
        **{key: c[key] for key in ("model_channels", "channel_mult", "num_blocks", "attn_resolutions")},
    )  # fmt: skip
    if c["model_type"] == "DhariwalUNet":
        return DhariwalUNetSpec(**common)
    return SongUNetSpec(
        embedding=c["embedding_type"], encoder=c["encoder_type"], channel_mult_noise=c["channel_mult_noise"],
        resample_filter=c["resample_filter"], **common,
    )  # fmt: skip


def golden(name):
    """The denoiser with the published weights, its arguments, and the file's tensors."""
    file = load_file(GOLDEN / f"{name}.safetensors")
    spec = spec_of(name)
    denoiser = Preconditioned(spec.build(), Karras()).eval()
    state = {key.removeprefix("state.model."): value.float() for key, value in file.items() if key.startswith("state.")}
    denoiser.net.load_state_dict(state, strict=True)
    labels = file["input.class_labels"].argmax(1) if spec.num_classes else None
    arguments = {"x_t": file["input.x"].float(), "t": denoiser.schedule.time(file["input.sigma"])}
    return denoiser, arguments | ({} if labels is None else {"labels": labels}), file


class Stored:
    """A noise law that gives stored times, one tensor a draw."""

    def __init__(self, *times):
        self.times = list(times)

    def draw(self, count, schedule):
        return self.times.pop(0)


def indices(file, name):
    """DMD2's steps as normalised times."""
    return file[name].double() / 999


@pytest.fixture
def stored_noise(monkeypatch):
    """Makes `torch.randn_like` give stored tensors, one a call."""

    def use(*tensors):
        left = list(tensors)
        monkeypatch.setattr(torch, "randn_like", lambda x: left.pop(0).to(x))

    return use


def load(name, network):
    """Nets with the file's weights, and the file."""
    file = {
        key: value.float() if value.is_floating_point() else value for key, value in load_file(GOLDEN / name).items()
    }
    spec = spec_of(network)

    def denoiser(prefix):
        made = Preconditioned(spec.build(), Karras())
        made.net.load_state_dict({k.removeprefix(prefix): v for k, v in file.items() if k.startswith(prefix)})
        return made

    head = None
    if "classifier.0.weight" in file:
        head = ConvHead(64, 8)
        head[1], head[4] = nn.GroupNorm(8, 64), nn.GroupNorm(8, 64)  # the file's tiny head has 8 groups instead of 32
        head.load_state_dict({k.removeprefix("classifier."): v for k, v in file.items() if k.startswith("classifier.")})
    teacher = denoiser("teacher.model.").requires_grad_(False)
    critic = Critic(denoiser("fake_score.model."), head, f"net.{spec.bottleneck}")
    return Nets(Generator(teacher, [1.0]), teacher, critic), file


def batch_of(file):
    """The stored labels, and real images if there are any."""
    batch = Batch({"labels": file["input.labels"].argmax(1)})
    if "input.real_image" in file:
        batch.real, batch.real_cond = file["input.real_image"], {"labels": file["input.real_labels"].argmax(1)}
    return batch
