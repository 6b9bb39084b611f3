"""What is planned on the meta device is what PyTorch counts on a CPU: operations of an iteration, for any method."""

import math
from typing import Literal

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fewstep.costs.bench import measure as bench
from fewstep.costs.describe import describe
from fewstep.costs.measure import measure
from fewstep.costs.outline import outline
from fewstep.costs.plan import plan
from fewstep.data import Digits
from fewstep.diffusion.denoiser import denoising_loss
from fewstep.diffusion.noise import UniformTime
from fewstep.methods import DMD2, Batch, Nets, Objective, SiD, Terms
from fewstep.methods.dmd import DMD
from fewstep.methods.pairs import make_pairs
from fewstep.methods.regression import Regression
from fewstep.networks.lora import LoraSpec
from fewstep.run.generator import GeneratorSpec
from fewstep.run.settings import load_run
from fewstep.run.specs import CriticSpec
from fewstep.system.errors import SettingsError
from fewstep.teachers import MixtureTeacher
from fewstep.training.task import Micro

SIZE = 4


class FirstStep(Objective):
    """Runs the teacher and the student again after the first call alone, and trains its critic twice."""

    method: Literal["first-step"] = "first-step"
    critic_steps: int = 3

    def generator_loss(self, nets: Nets, x: torch.Tensor, batch: Batch) -> Terms:
        t = torch.full((len(x),), 0.5, dtype=torch.float64)
        noised = nets.teacher.schedule.perturb(x, t.to(x.device), torch.randn_like(x))
        losses = {"critic": (x - nets.critic(noised, t.to(x.device), batch.cond)).square().mean()}
        if batch.step == 0:
            with torch.no_grad():
                wanted = nets.teacher(noised, t.to(x.device), **batch.cond)
            again = nets.generator.denoiser(noised.detach(), t.to(x.device), **batch.cond)
            losses["first"] = (again - wanted).square().mean()
        if float(losses["critic"].detach()) < 0:  # a value that is read, as methods do for their logs
            raise AssertionError
        return Terms(losses)

    def critic_loss(self, nets: Nets, x: torch.Tensor, batch: Batch) -> Terms:
        t = UniformTime().draw(len(x), nets.teacher.schedule).to(x.device)
        twice = [denoising_loss(nets.critic.denoiser, x, t, torch.randn_like(x), batch.cond) for _ in range(2)]
        return Terms({"denoising": sum(twice)})


LORA = LoraSpec(rank=2, targets=("qkv", "out", "fc1", "fc2"))
EQUAL = DMD2().critic_noise
CASES = {
    "sid": (SiD(), {}),
    "sid shared": (SiD(share_rollout=True), {}),
    "sid guided": (SiD(guidance=2.0, fake_guidance=2.0, critic_guidance=1.5), {}),
    "sid critic steps": (SiD(critic_steps=2), {}),
    "dmd2": (DMD2(critic_steps=3, gan_weight=0), {}),
    "dmd2 gan": (DMD2(critic_steps=2, guidance=2.0), {"data": Digits()}),
    "dmd2 gan shared": (DMD2(critic_steps=2, share_forward=True, gan_noise=EQUAL), {"data": Digits()}),
    "dmd2 4 steps": (
        DMD2(critic_steps=3, gan_weight=0),
        {"generator": GeneratorSpec(sigmas=(80.0, 20.0, 5.0, 1.0))},
    ),
    "dmd without pairs": (DMD(regression_weight=0, guidance=2.0), {}),
    "first step": (FirstStep(), {"generator": GeneratorSpec(sigmas=(80.0, 20.0, 5.0, 1.0))}),
    "recomputed": (SiD(), {"train": {"gradient_checkpointing": True}}),
    "activations": (SiD(), {"train": {"recompute_activations": True}}),
}


def run_of(objective, train=None, **changes):
    run = load_run("digits/sid")
    settings = {"batch_size": SIZE, "precision": "fp32", "device": "cpu"} | (train or {})
    train = run.train.model_copy(update=settings)
    evaluation = run.evaluation.model_copy(update={"samples": 0})
    return run.model_copy(update={"objective": objective, "train": train, "evaluation": evaluation, **changes})


def counted(run, folder) -> float:
    """Operations of a sample in an iteration: all iterations of a cycle, in all numbers of steps, by PyTorch's counter."""
    task = run.trainer(folder).task
    calls, period = task.nets.generator.steps, task.objective.critic_steps if task.objective.needs_critic else 1
    size, total = run.train.batch_size, 0
    for steps in range(1, calls + 1):
        for place in range(period):
            images = next(n * size for n in range(place, 10**4, period) if task.steps(n * size) == steps)
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                task.update(images, [Micro(images, size, 0)])
            total += counter.get_total_flops()
    return total / calls / period / size


@pytest.mark.parametrize("name", CASES)
def test_planned_operations_are_those_of_a_real_update(name, tmp_path):
    objective, changes = CASES[name]
    run = run_of(objective, **changes)
    found = measure(outline(run), SIZE).work
    assert found.iteration == pytest.approx(counted(run, tmp_path), rel=0.01)


@pytest.mark.parametrize("objective", [DMD(), Regression()], ids=lambda objective: objective.method)
def test_pairs_are_counted_with_their_distance(objective, tmp_path):
    run = load_run("fashion-mnist/dmd")
    make_pairs(run.teacher.load(), tmp_path / "pairs", SIZE, evaluations=1)
    run = run_of(objective, teacher=run.teacher, pairs=tmp_path / "pairs", perceptual="small")
    found = measure(outline(run), SIZE).work
    assert found.iteration == pytest.approx(counted(run, tmp_path / "run"), rel=0.01)


def test_a_teacher_that_no_configuration_describes_is_loaded(tmp_path, capsys):
    run = run_of(SiD(), teacher=MixtureTeacher(fit_steps=0), generator=GeneratorSpec(sigmas=(2.5,)))
    found = measure(outline(run), SIZE).work
    assert "loading the teacher (kind mixture) to plan the run" in capsys.readouterr().err
    assert found.iteration == pytest.approx(counted(run, tmp_path), rel=0.01)
    assert found.forward == pytest.approx(
        2 * sum(p.numel() for p in run.teacher.load().start().parameters() if p.ndim == 2), rel=0.01
    )


def test_plan_bench_and_dry_run_say_the_same(tmp_path):
    run = run_of(DMD2(critic_steps=3, gan_weight=0), generator=GeneratorSpec(sigmas=(80.0, 20.0, 1.0)))
    planned, measured = plan(run).work, bench(run, cycles=1).work
    assert planned.passes == pytest.approx(measured.passes, rel=0.01) and planned.forward == measured.forward
    assert f"# an iteration: {planned.passes:.2f} F per image" in describe(run)


def test_adapters_share_one_network(tmp_path):
    run = run_of(SiD(), generator=GeneratorSpec(sigmas=(2.5,), lora=LORA), critic=CriticSpec(lora=LORA))
    planned = outline(run)
    found = measure(planned, SIZE)
    assert found.work.iteration == pytest.approx(counted(run, tmp_path), rel=0.01)
    assert len(found.gathered) == 1, "teacher, student and fake score"


def test_weights_take_no_memory_and_draws_are_left_alone():
    state = torch.random.get_rng_state()
    planned = outline(run_of(SiD()))
    measure(planned, SIZE)
    assert all(p.is_meta for player in planned.task.players for p in player.module.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


def test_masks_choose_all_and_other_values_are_refused():
    """EDM's augmentations move chosen images; a method that needs numbers is named."""
    run = load_run("cifar10-uncond/sid")
    assert run.objective.augment > 0
    assert measure(outline(run), 2).work.passes == pytest.approx(11, abs=0.05)

    class Lists(SiD):
        def critic_loss(self, nets, x, batch):
            assert x.mean().reshape(1).tolist()
            return super().critic_loss(nets, x, batch)

    with pytest.raises(SettingsError, match=r"got Lists, where PyTorch says.*fewstep bench"):
        measure(outline(run_of(Lists())), 2)


def test_autocast_halves_products_and_keeps_norms_wide():
    """On the meta device as on a GPU: results of products have two bytes, of norms four."""
    from fewstep.costs.meta import as_on_a_gpu

    linear, norm = torch.nn.Linear(8, 8, device="meta"), torch.nn.LayerNorm(8, device="meta")
    x = torch.zeros(2, 8, device="meta")
    with as_on_a_gpu(), torch.autocast("meta", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16 and norm(linear(x)).dtype == torch.float32
        with torch.autocast("meta", enabled=False):
            assert linear(x).dtype == torch.float32
    assert linear(x).dtype == torch.float32 and math.prod(linear(x).shape) == 16
