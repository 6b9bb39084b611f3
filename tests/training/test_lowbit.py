"""AdamW with moments of 8 bits: near AdamW, a quarter of its memory, and resumed bit for bit."""

import pytest
import torch

from fewstep.system.errors import SettingsError

pytest.importorskip("torchao")

from fewstep.system.checkpoint import Checkpoints
from fewstep.training.optim import OptimSpec, Stepper
from tests.support.runs import BATCH, STOP, Points, assert_same_run, at, fit, optim, times, train_spec


def layer():
    torch.manual_seed(0)
    return torch.nn.Linear(64, 128)


def train(kind, updates=30):
    """Weights after some updates towards a fixed map, and the stepper."""
    module, target = layer(), torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    stepper = Stepper(OptimSpec(kind=kind, lr=3e-3, weight_decay=0.01), [module], 10_000)
    draw = torch.Generator().manual_seed(2)
    for update in range(updates):
        x = torch.randn(32, 64, generator=draw)
        (module(x) - x @ target).square().mean().backward()
        stepper.step(update)
    return module.weight.detach(), stepper


def test_it_is_near_adamw_in_a_quarter_of_the_memory():
    start = layer().weight.detach()
    exact, _ = train("adamw")
    near, stepper = train("adamw8bit")
    moved = (exact - start).norm()
    assert (near - exact).norm() < 0.05 * moved
    state = stepper.state_dict()["state"][0]
    assert state["exp_avg"]["codes"].dtype == torch.uint8 and state["exp_avg"]["codes"].shape == (128, 64)
    taken = sum(
        part.nbytes for name in ("exp_avg", "exp_avg_sq") for part in (state[name]["codes"], state[name]["scale"])
    )
    assert taken < 0.26 * 2 * 4 * near.numel()


def lowbit(**train):
    """DMD2's case of tests/test_resume.py with a network wide enough for codes."""
    from fewstep.diffusion.noise import Karras
    from fewstep.methods import DMD2
    from fewstep.teachers import MixtureTeacher
    from fewstep.training.distill import Distillation, Setup

    teacher = MixtureTeacher(schedule=Karras(sigma_max=20.0), width=64, fit_steps=0).load()
    rates = optim(kind="adamw8bit")
    return Distillation(
        Setup(teacher, times(20.0, 1.0), DMD2(critic_steps=3), train_spec(**train), rates, rates, Points())
    )


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    import os
    import signal

    fit(lowbit(), tmp_path / "whole")
    task = at(STOP - BATCH, lowbit(), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        fit(task, tmp_path / "broken")
    saved = Checkpoints(tmp_path / "broken" / "checkpoints").load()["task"]["generator_optimizer"]["state"]
    assert any(isinstance(values["exp_avg"], dict) for values in saved.values()), "no moment had 8 bits"
    fit(lowbit(), tmp_path / "broken")
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


def test_without_torchao_the_way_out_is_said(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(SettingsError, match=r"pip install 'fewstep\[lowbit\]', or adamw"):
        Stepper(OptimSpec(kind="adamw8bit"), [layer()], 100)
