"""Long runs of each method on each kind of noise schedule, in float32 or bfloat16: finite to the end, and nearer to the teacher."""

import math

import pytest
import torch

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.noise import Discrete, Karras, RectifiedFlow, scaled_linear_alphas_cumprod
from fewstep.formats.model import load_generator
from fewstep.methods import DMD, DMD2, DPDMD, SCM, TDM, Consistency, FDistill, Regression, SiD, SiDA
from fewstep.students.sample import FewStep
from fewstep.system.tracking import read_stats
from fewstep.teachers import MixtureTeacher
from fewstep.training.distill import Distillation, Setup
from fewstep.training.optim import OptimSpec
from fewstep.training.spec import TrainSpec
from fewstep.training.trainer import Trainer
from tests.support.mixtures import PointPairs, Points, energy_distance, squared

LONG, SHORT, BATCH = 800, 100, 32


def zero_snr(table: tuple[float, ...]) -> tuple[float, ...]:
    """A table shifted and scaled to end without signal (Lin et al. 2023, arXiv 2305.08891, algorithm 1)."""
    alpha = torch.tensor(table, dtype=torch.float64).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return tuple((alpha**2).tolist())


SD = scaled_linear_alphas_cumprod()
SCHEDULES = {
    "karras": (Karras(sigma_max=20.0), "edm"),
    "eps": (Discrete(alphas_cumprod=SD), "eps"),
    "v-zero-snr": (Discrete(alphas_cumprod=zero_snr(SD)), "v"),
    "flow": (RectifiedFlow(), "flow"),
    "flow-shift-3": (RectifiedFlow(shift=3.0), "flow"),
}
# With the noise laws that each has by itself, and the number of steps. DMD2 has two faces: with a GAN, and in several steps, whose
# gradients autocast once lost.
METHODS = {
    "sid": (SiD(), 1),
    "dmd": (DMD(), 1),
    "regression": (Regression(), 1),
    "dmd2-gan": (DMD2(critic_steps=3, share_forward=True), 1),
    "dmd2-2step": (DMD2(critic_steps=3, gan_weight=0), 2),
}
# Every method and every schedule runs in both precisions; all pairs would take twice the time.
IN_BF16 = {
    "sid": ("karras", "v-zero-snr", "flow-shift-3"),
    "dmd": ("eps", "flow"),
    "regression": ("karras", "flow-shift-3"),
    "dmd2-gan": ("eps", "flow"),
    "dmd2-2step": ("karras", "v-zero-snr", "flow"),
}


# Long runs must also come nearer: each method and each schedule has one. All 25 took a quarter of the
# whole test run.
LONG_RUNS = {
    "sid": ("karras", "flow"),
    "dmd": ("eps",),
    "regression": ("flow-shift-3",),
    "dmd2-gan": ("eps", "flow-shift-3"),
    "dmd2-2step": ("v-zero-snr", "flow"),
}

# Matching alone seeks modes. Where the first of two steps starts from a table's end without signal it lost most of the eight in
# all of seven tries (LOG.md, 2026-11-27): this run must stay finite, no more.
COLLAPSES = ("dmd2-2step", "v")


@pytest.fixture(scope="module", params=SCHEDULES)
def mixture(request):
    """The ring of eight under one schedule: spec, methods that run in bfloat16, teacher (the student's start is fitted once), exact samples, pairs."""
    schedule, prediction = SCHEDULES[request.param]
    spec = MixtureTeacher(schedule=schedule, prediction=prediction)
    bf16 = [method for method, schedules in IN_BF16.items() if request.param in schedules]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return spec, bf16, spec.load(), spec.denoiser().sample(6000), PointPairs(spec.denoiser(), 1000)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_updates_stay_finite_and_long_runs_come_nearer(mixture, tmp_path, method):
    spec, bf16, teacher, exact, pairs = mixture
    objective, steps = METHODS[method]
    long = kind(spec) in LONG_RUNS[method]
    updates = LONG if long else SHORT
    high = teacher.denoiser.schedule.time(torch.tensor([2.5 if spec.prediction in ("edm", "eps") else math.inf])).item()
    at = (high, 0.5 * high)[:steps]
    train = TrainSpec(
        images=updates * BATCH,
        batch_size=BATCH,
        precision="bf16" if method in bf16 else "fp32",
        device="cpu",
        ema_half_life=2500,
        evaluate_every=None,
        log_every=20 * BATCH,
        checkpoint_every=updates * BATCH,
    )
    # a critic without momentum follows the last batch, which in several steps is of one step alone
    momentum, rate = (0.9, 2e-4) if steps > 1 else (0.0, 5e-4)
    optims = [OptimSpec(kind="adam", lr=lr, betas=(momentum, 0.999), decay_from=0.4) for lr in (rate, 1e-3)]
    task = Distillation(
        Setup(
            teacher,
            at,
            objective,
            train,
            *optims,
            Points(exact) if objective.needs_real else None,
            pairs if objective.needs_pairs else None,
            squared,
        )
    )

    def distance(generator: Generator) -> float:
        with torch.no_grad():
            return energy_distance(FewStep(generator)(range(1500), (2,)).numpy(), exact[:1500].numpy())

    start = distance(task.nets.generator)
    Trainer(task, train, tmp_path).fit()
    lines = [line for line in read_stats(tmp_path / "stats.jsonl") if line["kind"] == "train"]
    assert len(lines) == updates // 20
    assert not [line for line in read_stats(tmp_path / "stats.jsonl") if line.get("code") == "undefined"]
    end = distance(load_generator(tmp_path / "student.safetensors")[0])
    print(f"{method} {spec.schedule.kind} {spec.prediction}: {start:.4f} -> {end:.4f}")
    if long and (method, spec.prediction) != COLLAPSES:
        assert end < 0.6 * start, f"{start:.4f} -> {end:.4f}"


# The later methods share the parts above; a few updates find a weight that is not finite at an end of a schedule.
LATER = {
    "sida": (SiDA(gan_after=0), 1, "renoise"),
    "f-distill": (FDistill(), 1, "renoise"),
    "tdm": (TDM(), 2, "ode"),
    "dp-dmd": (DPDMD(critic_steps=2), 2, "ode"),
    "consistency": (Consistency(), 1, "renoise"),
    "scm": (SCM(warmup=0), 1, "renoise"),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", LATER)
def test_a_few_updates_of_the_later_methods_stay_finite(mixture, tmp_path, method):
    spec, _, teacher, exact, _ = mixture
    objective, steps, transition = LATER[method]
    train = TrainSpec(
        images=16 * BATCH,
        batch_size=BATCH,
        precision="bf16" if (list(LATER).index(method) + list(SCHEDULES).index(kind(spec))) % 2 else "fp32",
        device="cpu",
        evaluate_every=None,
        log_every=4 * BATCH,
        checkpoint_every=16 * BATCH,
    )
    optims = [OptimSpec(kind="adam", lr=lr, betas=(0.0, 0.999)) for lr in (1e-4, 1e-3)]
    real = Points(exact) if objective.needs_real else None
    task = Distillation(Setup(teacher, (1.0, 0.5)[:steps], objective, train, *optims, real, transition=transition))
    Trainer(task, train, tmp_path).fit()  # a number that is not finite ends it
    lines = [line for line in read_stats(tmp_path / "stats.jsonl") if line["kind"] == "train"]
    assert len(lines) == 4
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    assert not [line for line in read_stats(tmp_path / "stats.jsonl") if line.get("code") == "undefined"]


def kind(spec: MixtureTeacher) -> str:
    return next(name for name, pair in SCHEDULES.items() if pair == (spec.schedule, spec.prediction))
