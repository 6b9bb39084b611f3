"""Weights in the host's memory: the run is the same, to the bit where nothing but their place differs."""

import pytest
import torch
from torch import nn

from fewstep.cli import main as cli
from fewstep.networks.placement import narrow
from fewstep.system.checkpoint import Checkpoints
from fewstep.system.errors import SettingsError
from fewstep.training.optim import OptimSpec, Stepper
from fewstep.training.task import Micro
from tests.support.runs import assert_equal, at, dmd2, fit, pretraining, sid

DISTILLED = {"sid": sid, "dmd2": dmd2}


def final(folder):
    return Checkpoints(folder / "checkpoints").load(Checkpoints(folder / "checkpoints").latest())


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, precision", [(sid, "fp32"), (dmd2, "fp32"), (pretraining, "fp32"), (pretraining, "bf16")]
)
def test_an_offloaded_run_is_the_run(task, precision, tmp_path):
    """Loss by loss and weight by weight; evaluations and pictures are drawn on the way. In bfloat16 a distillation's gradients of
    several backward passes add up in it: see below."""
    for offload in (False, True):
        fit(task(offload=offload, precision=precision, micro_batch=8), tmp_path / str(offload))
    assert (tmp_path / "True/stats.jsonl").read_text() == (tmp_path / "False/stats.jsonl").read_text()
    assert_equal(final(tmp_path / "True"), final(tmp_path / "False"))


@pytest.mark.parametrize("name", DISTILLED)
def test_with_bf16_weights_on_the_device_the_first_losses_are_the_same_bits(name):
    """And the host's weights stay float32: after twenty updates they are near those of a run that keeps all on the device."""
    steps, ends = 20, []
    start = torch.cat([p.detach().reshape(-1).clone() for p in DISTILLED[name]().nets.generator.parameters()])
    states = []
    for offload in (False, True):
        task = DISTILLED[name](offload=offload, precision="bf16")
        weights = {p.dtype for p in task.nets.generator.parameters()}
        assert weights == ({torch.float32, torch.bfloat16} if offload else {torch.float32})
        for number in range(steps):
            stats = task.update(8 * number, [Micro(8 * number, 8, 0)])
            if number == 0:
                states.append({k: float(v) for k, v in stats.items() if k.startswith("loss/")})
        state = task.state_dict()
        assert all(value.dtype == torch.float32 for value in state["generator"].values())
        ends.append(torch.cat([state["generator"][n].reshape(-1) for n, _ in task.nets.generator.named_parameters()]))
    first, other = states
    # whoever has its turn first reads the very weights, the other what an update made of them
    ahead = "critic" if name == "sid" else "generator"
    same = [key for key in first if ahead in key]
    assert same and first.keys() == other.keys() and all(first[key] == other[key] for key in same)
    moved = (ends[0] - start).norm()
    assert moved > 0 and (ends[1] - ends[0]).norm() < 0.1 * moved


@pytest.mark.slow
def test_an_offloaded_run_goes_on_without_offloading_and_back(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(dmd2(), whole)
    for images, offload in ((88, True), (128, False), (200, True)):
        task = dmd2(offload=offload, images=200)

        def stop():
            raise KeyboardInterrupt

        if images < 200:
            with pytest.raises(KeyboardInterrupt):
                fit(at(images, task, stop), parts)
        else:
            fit(task, parts)
    assert (parts / "stats.jsonl").read_text() == (whole / "stats.jsonl").read_text()
    assert_equal(final(parts), final(whole))


def test_what_autocast_casts_is_what_is_rounded():
    """Same outputs and gradients, bit for bit, of layers of every kind; the rest keeps float32."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.inner = nn.Embedding(5, 8), nn.Linear(8, 8)
            self.norm, self.conv = nn.LayerNorm(8), nn.Conv2d(1, 2, 3)
            self.scale = nn.Parameter(torch.randn(8, 8))

        def forward(self, labels):
            h = self.norm(self.inner(self.embed(labels))) @ self.scale
            return self.conv(h[None, None]).float().square().mean()

    wide, rounded = Net(), Net()
    rounded.load_state_dict(wide.state_dict())
    narrow(rounded)
    assert {n for n, p in rounded.named_parameters() if p.dtype == torch.bfloat16} == {"inner.weight", "conv.weight"}
    losses = []
    for net in (wide, rounded):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(net(torch.tensor([0, 3, 1, 4])))
        losses[-1].backward()
    assert torch.equal(*losses)
    for (name, a), b in zip(wide.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad.float()), name


def test_the_device_keeps_weights_alone_and_lends_their_place_to_the_average():
    task = dmd2(offload=True, precision="bf16")
    task.update(0, [Micro(0, 8, 0)])
    stepper, live = task.generator.stepper, list(task.nets.generator.parameters())
    assert not {id(p) for p in live} & {id(p) for group in stepper.optimizer.param_groups for p in group["params"]}
    assert all(p.grad is None for p in live)
    kinds = {
        type(m) for m in task.nets.generator.modules() if any(p.dtype == torch.bfloat16 for p in m.parameters(False))
    }
    assert nn.Linear in kinds and nn.Embedding not in kinds
    for parameter in task.generator.average.parameters():
        parameter.fill_(0.25)
    before = [p.clone() for p in live]
    with task.generator.averaged() as generator:
        assert generator is task.nets.generator and not generator.training and all((p == 0.25).all() for p in live)
    assert all(torch.equal(p, old) for p, old in zip(live, before, strict=True))


@pytest.mark.slow
def test_the_command_goes_on_with_and_without(tmp_path, capsys):
    """Through the command line: offloading is no other run."""
    common = [
        "distill",
        "mixture/sid",
        "--out",
        str(tmp_path / "run"),
        "--processes",
        "1",
        "--train.checkpoint-every",
        "512",
    ]
    assert cli.main([*common, "--train.images", "512", "--train.offload"]) == 0
    assert cli.main([*common, "--train.images", "1024"]) == 0
    assert cli.main([*common, "--train.images", "1536", "--train.offload"]) == 0
    assert "resuming at 1,024 images" in capsys.readouterr().err


def test_several_processes_and_8_bits_are_refused(monkeypatch):
    with pytest.raises(SettingsError, match=r"must be false with kind adamw8bit.*kind adamw"):
        Stepper(OptimSpec(kind="adamw8bit"), [nn.Linear(2, 2)], 10, offload_from=torch.device("cpu"))
    monkeypatch.setattr("fewstep.system.distributed.world_size", lambda: 2)
    with pytest.raises(SettingsError, match=r"several processes.*train\.mesh\.shard"):
        Stepper(OptimSpec(), [nn.Linear(2, 2)], 10, offload_from=torch.device("cpu"))
