"""Distillation: each method reaches the exact mixture, whose turn it is, what an update costs; and the command's errors."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fewstep.cli import main as cli
from fewstep.data import shuffled_indices
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.noise import Karras
from fewstep.formats.model import DenoiserSpec, load_generator, save_denoiser
from fewstep.methods import DMD, DMD2, Batch, Pairs, SiD
from fewstep.networks import MLPSpec
from fewstep.students.sample import FewStep
from fewstep.system.checkpoint import Checkpoints
from fewstep.system.files import RunLock
from fewstep.system.tracking import read_stats
from fewstep.system.weights import load_weights
from fewstep.teachers import ClassLabels, MixtureTeacher, NativeTeacher
from fewstep.training.diagnostics import by_noise_level
from fewstep.training.distill import Distillation, Setup
from fewstep.training.optim import OptimSpec
from fewstep.training.spec import TrainSpec
from fewstep.training.task import Micro, derived_seed
from fewstep.training.trainer import Trainer
from tests.support.mixtures import PointPairs, Points, energy_distance, squared

SCHEDULE = Karras(sigma_max=20.0)


def times(*sigmas: float) -> tuple[float, ...]:
    return tuple(SCHEDULE.time(torch.tensor(sigmas, dtype=torch.float64)).clamp(max=1).tolist())


# --------------------------------------------------------------------------------------------- methods, end to end


@pytest.fixture(scope="module")
def mixture():
    """The ring of eight: its spec, the teacher (the student's start is fitted once), exact samples."""
    spec = MixtureTeacher(schedule=SCHEDULE)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return spec, spec.load(), spec.denoiser().sample(20_000)


METHODS = {
    "sid": (SiD(), times(2.5)),
    "dmd2": (DMD2(gan_weight=0, critic_steps=2), times(2.5)),
    "dmd2-gan": (DMD2(critic_steps=2), times(2.5)),
    "dmd": (DMD(), times(2.5)),
    "dmd2-2step": (DMD2(gan_weight=0, critic_steps=2), times(2.5, 1.0)),
}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_reaches_the_mixture(mixture, tmp_path, name):
    """From a distance of 0.42 (one step) or 0.19 (two) to some 0.005; two sets of exact samples have 0.001."""
    spec, teacher, exact = mixture
    objective, at = METHODS[name]
    batch, images = 256, 250 * 256
    train = TrainSpec(
        images=images, batch_size=batch, precision="fp32", device="cpu", ema_half_life=2500, evaluate_every=None
    )
    optims = [OptimSpec(kind="adam", lr=lr, betas=(0.0, 0.999), decay_from=0.4) for lr in (1e-3, 2e-3)]
    real = Points(exact) if objective.needs_real else None
    pairs = PointPairs(spec.denoiser(), 2000) if objective.needs_pairs else None
    task = Distillation(Setup(teacher, at, objective, train, *optims, real, pairs, squared))

    def distance(generator: Generator) -> float:
        with torch.no_grad():
            return energy_distance(FewStep(generator)(range(2000), (2,)).numpy(), exact[:2000].numpy())

    start = distance(task.nets.generator)
    Trainer(task, train, tmp_path).fit()
    end = distance(load_generator(tmp_path / "student.safetensors")[0])
    assert energy_distance(exact[2000:4000].numpy(), exact[:2000].numpy()) < 0.002
    assert end < min(start / 3, 0.02), f"{start:.4f} -> {end:.4f}"


# --------------------------------------------------------------------------------------------------- whose turn it is


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A teacher with weights and three classes, in the plane: random, as no one judges its samples here."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    spec = DenoiserSpec(net=MLPSpec(width=16, depth=3, num_classes=3), schedule=SCHEDULE)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        save_denoiser(path, spec.build(), spec, {"class_names": ["a", "b", "c"]})
    return NativeTeacher(path=str(path))


def distillation(labelled, objective, at=(2.5,), batch=8, micro=None, **train) -> Distillation:
    settings = TrainSpec(
        images=100 * batch, batch_size=batch, micro_batch=micro, precision="fp32", device="cpu", **train
    )
    optim = OptimSpec(lr=1e-2)
    torch.manual_seed(3)
    real = Points(torch.randn(50, 2), torch.arange(50) % 3)
    pairs = PointPairs(MixtureTeacher(schedule=SCHEDULE).denoiser(), 20) if objective.needs_pairs else None
    if pairs:
        pairs.batch = lambda i, conditioner, device: Pairs(pairs.z[i], pairs.y[i], conditioner.cond(i % 3, len(i)))
    task = Distillation(Setup(labelled.load(), times(*at), objective, settings, optim, optim, real, pairs, squared))
    with torch.no_grad():  # at its start the critic is the teacher, and their difference no gradient
        for parameter in task.nets.critic.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return task


def batch_of(task: Distillation, micro: Micro) -> Batch:
    """What the objective gets for one micro-batch."""
    return task._batch(micro, *task._rollout(micro, "critic rollout", 1, gradient=False), images=micro.position)


def run_updates(task: Distillation, count: int, first: int = 0, micros: int = 1) -> list[dict]:
    batch, size = task.train.batch_size, task.train.batch_size // micros
    return [
        task.update(i * batch, [Micro(i * batch + j * size, size, 0) for j in range(micros)])
        for i in range(first, first + count)
    ]


def flat(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten().clone() for tensor in module.state_dict().values()])


ALL = [
    SiD(),
    SiD(share_rollout=True),
    SiD(critic_steps=2),
    DMD(),
    DMD(regression_weight=0, share_rollout=False),
    DMD2(critic_steps=3),
    DMD2(critic_steps=3, critic_first=True),
    DMD2(critic_steps=3, gan_weight=0),
    DMD2(critic_steps=2, share_forward=True),
    SiD(guidance=2.0),
    DMD2(critic_steps=2, guidance=2.0),
]


def name_of(objective) -> str:
    return (
        ",".join(f"{name}={getattr(objective, name)}" for name in sorted(objective.model_fields_set))
        + f"({objective.method})"
    )


@pytest.mark.parametrize("objective", ALL, ids=name_of)
def test_each_player_moves_in_its_own_turn_only(labelled, objective):
    """At its step a player has gradients and moves; nobody else has gradients or moves; the teacher never does."""
    task = distillation(labelled, objective)
    nets, turns = task.nets, []
    players = {"generator": nets.generator, "critic": nets.critic}
    teacher = flat(nets.teacher)
    last = {name: flat(module) for name, module in players.items()}

    def watch(name: str, stepper) -> None:
        step = stepper.step

        def watched(images: int):
            (other,) = players.keys() - {name}
            assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in players[name].parameters())
            assert all(p.grad is None for p in players[other].parameters()), f"{other} got gradients in {name}'s turn"
            norm = step(images)
            assert torch.equal(flat(players[other]), last[other]), f"{other} moved in {name}'s turn"
            assert not torch.equal(flat(players[name]), last[name])
            last[name] = flat(players[name])
            turns.append(name)
            return norm

        stepper.step = watched

    watch("generator", task.generator.stepper)
    watch("critic", task.critic.stepper)
    run_updates(task, 2 * objective.critic_steps)
    both = ["critic", "generator"] if objective.critic_first else ["generator", "critic"]
    assert turns == 2 * (both + ["critic"] * (objective.critic_steps - 1))
    assert torch.equal(flat(nets.teacher), teacher) and all(p.grad is None for p in nets.teacher.parameters())


def test_a_resumed_run_keeps_the_rhythm(labelled):
    """Iteration 3 of critic_steps 3 is a generator's, iterations 4 and 5 are not, wherever the run was started."""
    task = distillation(labelled, DMD2(critic_steps=3, gan_weight=0))
    moved = []
    for first in (5, 3, 4, 6):
        before = flat(task.nets.generator)
        run_updates(task, 1, first)
        moved.append(not torch.equal(flat(task.nets.generator), before))
    assert moved == [False, True, False, True]


def test_the_head_is_trained_with_the_fake_score(labelled):
    task = distillation(labelled, DMD2())
    before = flat(task.nets.critic.head)
    run_updates(task, 1)
    assert not torch.equal(flat(task.nets.critic.head), before)


def test_the_average_counts_the_images_of_all_critic_turns(labelled):
    """A generator update of critic_steps 4 stands for 4 batches: a half-life of 32 images is over after one of 8 each."""
    task = distillation(labelled, DMD2(critic_steps=4, gan_weight=0), ema_half_life=32, ema_ramp=None)
    start = flat(task.nets.generator)
    run_updates(task, 4)
    torch.testing.assert_close(flat(task.generator.average), (start + flat(task.nets.generator)) / 2)


# ------------------------------------------------------------------------------------------------- what an update costs


@pytest.mark.parametrize("objective", [SiD(), DMD2(critic_steps=2)], ids=name_of)
def test_accumulation_costs_no_more(labelled, objective):
    operations = []
    for micros in (1, 4):
        task = distillation(labelled, objective, micro=8 // micros)
        with FlopCounterMode(display=False) as counter:
            run_updates(task, objective.critic_steps, micros=micros)
        operations.append(counter.get_total_flops())
    assert operations[0] == operations[1] > 0


@pytest.mark.parametrize(("share", "rollouts"), [(True, 1), (False, 2)])
@pytest.mark.parametrize("critic_first", [True, False])
def test_rollouts_of_an_iteration(labelled, share, rollouts, critic_first):
    task = distillation(labelled, SiD(share_rollout=share, critic_first=critic_first))
    samples = []
    task.nets.generator.denoiser.register_forward_hook(lambda module, args, output: samples.append(output.detach()))
    run_updates(task, 1)
    assert len(samples) == rollouts
    if rollouts == 2:
        assert not torch.equal(*samples), "fresh samples, not the same twice"


def test_steps_of_a_rollout_are_uniform_and_one_number_for_the_iteration(labelled):
    """Backward simulation: s is drawn once for all samples, every s equally often; only a K-step generator draws."""
    task = distillation(labelled, SiD(), at=(20.0, 5.0, 1.0), micro=2)
    steps = [task.steps(8 * i) for i in range(3000)]
    assert [steps.count(s) / 3000 for s in (1, 2, 3)] == pytest.approx([1 / 3] * 3, abs=0.04)
    assert steps[:50] == [task.steps(8 * i) for i in range(50)], "a function of the images seen"
    calls = []
    task.nets.generator.denoiser.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    run_updates(task, 1, first=7, micros=4)
    assert calls == [2] * (4 * 2 * steps[7])  # four micro-batches of two, one rollout for each player
    assert {distillation(labelled, SiD()).steps(8 * i) for i in range(20)} == {1}


# --------------------------------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("objective", [SiD(), SiD(share_rollout=True), DMD(), DMD2(critic_steps=1)], ids=name_of)
def test_accumulated_gradients_are_the_mean_over_micro_batches(labelled, objective):
    task = distillation(labelled, objective, micro=4)
    gradients = {"generator": [], "critic": []}

    def record(name, stepper):
        def keep(images):
            gradients[name].append(torch.cat([p.grad.flatten() for p in stepper.parameters if p.grad is not None]))
            stepper.optimizer.zero_grad()
            return gradients[name][-1].norm()

        stepper.step = keep

    record("generator", task.generator.stepper)
    record("critic", task.critic.stepper)
    halves = [Micro(0, 4, 0), Micro(4, 4, 0)]
    stats = [task.update(0, micros) for micros in ([halves[0]], [halves[1]], halves)]
    for first, second, together in gradients.values():
        torch.testing.assert_close(together, (first + second) / 2, rtol=1e-4, atol=1e-6)
        assert (first - second).norm() > 0.1 * first.norm(), "the halves differ, so that a sum or a part would show"
    for name in stats[0]:
        if name.startswith("loss/"):
            assert stats[2][name].item() == pytest.approx((stats[0][name] + stats[1][name]).item() / 2, rel=1e-4)


def test_real_images_and_pairs_follow_the_images_seen(labelled):
    """Each in an order of its own: micro-batches at 8 and 12 get what a batch at 8 gets."""
    task = distillation(labelled, DMD2())
    order = shuffled_indices(50, 8, 8, derived_seed(0, "real"))
    batches = [batch_of(task, Micro(position, 4, 0)) for position in (8, 12)]
    assert torch.equal(torch.cat([b.real for b in batches]), task.setup.dataset.x[order])
    assert torch.equal(torch.cat([b.real_cond["labels"] for b in batches]), order % 3)
    task = distillation(labelled, DMD())
    order = shuffled_indices(20, 8, 8, derived_seed(0, "pairs"))
    batches = [batch_of(task, Micro(position, 4, 0)) for position in (8, 12)]
    assert torch.equal(torch.cat([b.pairs.z for b in batches]), task.pairs.z[order])
    assert torch.equal(torch.cat([b.pairs.y for b in batches]), task.pairs.y[order])


# ------------------------------------------------------------------------------------------------------ what is logged


def test_numbersby_noise_level():
    probe = {
        "t": torch.tensor([0.1, 0.2, 0.6, 1.0]),
        "x": torch.zeros(4, 2),
        "d_real": torch.tensor([[1.0, -1.0], [3.0, 3.0], [0.0, 8.0], [-2.0, 0.0]]),
        "d_fake": torch.tensor([[1.0, 1.0], [3.0, 3.0], [0.0, 4.0], [0.0, 0.0]]),
    }
    found = by_noise_level(probe)
    stats = {name: value[0].item() if isinstance(value, tuple) else value.item() for name, value in found.items()}
    nobody = [name for name, value in found.items() if isinstance(value, tuple) and not value[1]]
    assert nobody == [name for name in stats if name.endswith("t0.25")]  # counted as no mean at all
    stats = {name: value for name, value in stats.items() if name not in nobody}
    assert stats == {
        "gap_real": (1 + 3 + 4 + 1) / 4, "gap_real/t0.00": 2.0, "gap_real/t0.50": 4.0, "gap_real/t0.75": 1.0,
        "gap_fake": (1 + 3 + 2 + 0) / 4, "gap_fake/t0.00": 2.0, "gap_fake/t0.50": 2.0, "gap_fake/t0.75": 0.0,
        "gap_scores": (1 + 0 + 2 + 1) / 4, "gap_scores/t0.00": 0.5, "gap_scores/t0.50": 2.0, "gap_scores/t0.75": 1.0,
    }  # fmt: skip


def test_every_update_says_how_it_is_doing(labelled):
    task = distillation(labelled, DMD2(critic_steps=2))
    turn, other = run_updates(task, 2)
    both = {
        "loss/critic_denoising",
        "loss/critic_gan",
        "gradient_norm/critic",
        "logit_real",
        "logit_fake",
        "accuracy_real",
        "accuracy_fake",
    }
    assert other.keys() == both
    assert turn.keys() >= both | {
        "loss/generator_dm", "loss/generator_gan", "x_gradient/dm", "x_gradient/gan", "gradient_norm/generator",
        "logit_generator", "gap_real", "gap_fake", "gap_scores", "x_mean", "x_spread",
    }  # fmt: skip
    assert all(torch.isfinite(torch.as_tensor(value).detach()).all() for value in turn.values())


def test_each_terms_gradient_on_x_is_its_own(labelled):
    """Ten times the GAN weight is ten times its gradient on x, and nothing to the other term's."""
    stats = [run_updates(distillation(labelled, DMD2(gan_weight=weight)), 1)[0] for weight in (1e-3, 1e-2)]
    assert stats[1]["x_gradient/gan"].item() == pytest.approx(10 * stats[0]["x_gradient/gan"].item(), rel=1e-3)
    assert stats[1]["x_gradient/dm"].item() == pytest.approx(stats[0]["x_gradient/dm"].item(), rel=1e-5)


def test_a_balanced_gan_pulls_a_fixed_number_of_times_as_hard(labelled):
    """`gan_ratio` sets the norm of the GAN's gradient on x, whatever its weight, and leaves its direction."""
    runs = [
        distillation(labelled, DMD2(gan_weight=weight, gan_ratio=ratio))
        for weight, ratio in ((1e-3, 0.5), (1e-1, 0.5), (1e-3, 1))
    ]
    stats = [run_updates(run, 1)[0] for run in runs]
    for found, ratio in zip(stats, (0.5, 0.5, 1), strict=True):
        assert found["x_gradient/gan"].item() == pytest.approx(ratio * found["x_gradient/dm"].item(), rel=1e-4)
    weights = [run.nets.generator.state_dict() for run in runs]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(weights[2][name], value) for name, value in weights[0].items())
    assert stats[1]["balance/gan"].item() == pytest.approx(stats[0]["balance/gan"].item() / 100, rel=1e-3)
    assert list(DMD2(gan_ratio=5).advise({"x_gradient/gan": 100.0, "x_gradient/dm": 1.0})) == []


def test_a_head_that_says_nothing_is_not_blown_up(labelled):
    """With a dead head `gan_ratio` stops at an effective weight of 1000, and the run says so."""
    run = distillation(labelled, DMD2(gan_weight=0.2, gan_ratio=5))
    with torch.no_grad():
        for parameter in run.nets.critic.head.parameters():
            parameter *= 1e-4
    (stats,) = run_updates(run, 1)
    assert stats["balance/gan"].item() == pytest.approx(1000 / 0.2)
    assert stats["x_gradient/gan"] < 0.1 * stats["x_gradient/dm"]
    said = dict(DMD2(gan_weight=0.2, gan_ratio=5).advise({"balance/gan": 501.0}))
    assert "lower optim.critic.lr" in said["gan-idle"]


def test_a_scorer_is_any_object_with_the_documented_method(labelled):
    class Zero:
        def score(self, sampler, shape, conditioner, device):
            return {"zero": 0.0}

    task = distillation(labelled, SiD())
    task.scorer = Zero()
    assert task.evaluate(0) == {"zero": 0.0}


@pytest.mark.parametrize(
    ("stats", "codes"),
    [
        ({"gap_real": 1.0, "gap_fake": 0.9}, []),
        ({"gap_real": 1.0, "gap_fake": 1.2}, ["critic-lags"]),
        ({"accuracy_real": 1.0, "accuracy_fake": 0.99}, ["gan-saturated"]),
        ({"accuracy_real": 1.0, "accuracy_fake": 0.5}, []),
        ({"x_gradient/gan": 1.0, "x_gradient/dm": 1.0}, []),
        ({"x_gradient/gan": 100.0, "x_gradient/dm": 1.0}, ["gan-weight"]),
    ],
)
def test_numbers_that_call_for_advice(labelled, stats, codes):
    assert [code for code, _ in distillation(labelled, DMD2()).advise(stats)] == codes


def test_the_empty_class_leaves_augmentation_numbers_alone():
    cond = {"labels": torch.tensor([1, 4]), "augment": torch.randn(2, 9)}
    null = ClassLabels(10).null(cond)
    assert null["labels"].tolist() == [10, 10] and torch.equal(null["augment"], cond["augment"])
    assert torch.equal(ClassLabels(0).null({"augment": cond["augment"]})["augment"], cond["augment"])


@pytest.mark.parametrize("transition", ["renoise", "ode"])
@pytest.mark.parametrize("share", [False, True])
def test_objectives_see_which_step_made_their_samples(labelled, monkeypatch, share, transition):
    """The step is the number of the rollout's noises less one; x_t is the input of that call."""
    task, made, seen = distillation(labelled, SiD(share_rollout=share), at=(5.0, 2.0, 1.0)), [], []
    task.nets.generator.transition = transition
    rollout = Generator.rollout

    def noted(self, noise, **cond):
        result = rollout(self, noise, **cond)
        made.append((len(noise) - 1, result.x_t))
        return result

    monkeypatch.setattr(Generator, "rollout", noted)
    for name in ("generator_loss", "critic_loss"):
        loss = getattr(SiD, name)
        monkeypatch.setattr(
            SiD, name, lambda self, nets, x, batch, loss=loss: (seen.append(batch), loss(self, nets, x, batch))[1]
        )
    run_updates(task, 8)
    made = [rolled for rolled in made for _ in range(2 if share else 1)]
    assert [batch.step for batch in seen] == [step for step, _ in made] and {batch.step for batch in seen} == {0, 1, 2}
    assert all(torch.equal(batch.x_t, x_t) for batch, (_, x_t) in zip(seen, made, strict=True))


@pytest.mark.parametrize(("share", "modes"), [(False, [False, True]), (True, [True])])
def test_samples_for_the_fake_score_alone_are_drawn_without_dropout(labelled, share, modes):
    """SiD's program: the generator is in eval mode while the fake score trains, and in train mode in its own turn."""
    task, seen = distillation(labelled, SiD(share_rollout=share)), []
    task.nets.generator.denoiser.register_forward_hook(lambda module, *_: seen.append(module.training))
    run_updates(task, 1)
    assert seen == modes


def test_the_spread_is_that_of_the_whole_batch_and_left_out_for_one_sample(labelled):
    four = distillation(labelled, SiD(), batch=4, micro=1)
    drawn = []
    rollout = four._rollout

    def noted(micro, phase, steps, gradient):
        made, cond = rollout(micro, phase, steps, gradient)
        if gradient:
            drawn.append(made.x.detach())
        return made, cond

    four._rollout = noted
    (stats,) = run_updates(four, 1, micros=4)
    assert stats["x_spread"].item() == pytest.approx(torch.cat(drawn).std(0).mean().item(), rel=1e-5)
    (alone,) = run_updates(distillation(labelled, SiD(), batch=1), 1)
    assert "x_spread" not in alone and torch.isfinite(alone["x_mean"])


# ------------------------------------------------------------------------------------------------------- not a number


def test_a_poisoned_run_stops_keeps_its_last_checkpoint_and_says_what_to_do(run_file, tmp_path, monkeypatch, capsys):
    """Weights that become NaN at 64 images: exit code 1, one line, checkpoint and student of 64 images intact."""
    update = Distillation.update

    def poisoned(self, images, micros):
        if images == 64:
            next(self.nets.generator.parameters()).data.fill_(torch.nan)
        return update(self, images, micros)

    monkeypatch.setattr(Distillation, "update", poisoned)
    out = tmp_path / "run"
    assert command(run_file({"train": {"checkpoint_every": 32, "log_every": 48}}), "--out", out) == 1
    message = only_line(capsys)
    assert re.search(
        r"fewstep distill: .* became nan at \d+ images; the last good checkpoint is .*000000000064", message
    )
    assert "learning rate optim.generator.lr (now" in message and "optim.critic.clip 10" in message
    assert "fp32" not in message, "the run is in float32 already"
    state = Checkpoints(out / "checkpoints").load()
    assert state["images"] == 64
    assert all(torch.isfinite(tensor).all() for tensor in state["task"]["generator"].values())
    assert all(torch.isfinite(tensor).all() for tensor in load_weights(out / "student.safetensors")[0].values())
    assert all("nan" not in str(line) for line in read_stats(out / "stats.jsonl"))


def test_a_learning_rate_far_too_high_is_found_by_itself(run_file, tmp_path, capsys):
    settings = {"optim": {"generator": {"lr": 1e30}}, "train": {"images": 3200, "log_every": 64}}
    assert command(run_file(settings), "--out", tmp_path / "run") == 1
    assert re.search(r"became (nan|-?inf) at", only_line(capsys))


# -------------------------------------------------------------------------------------------------------- the command

RUN = {
    "kind": "distill",
    "teacher": {"kind": "mixture", "fit_steps": 0, "width": 8},
    "objective": {"method": "sid"},
    "train": {
        "images": 128, "batch_size": 16, "precision": "fp32", "device": "cpu", "log_every": 64,
        "evaluate_every": None, "checkpoint_every": 64,
    },
    "evaluation": {"samples": 0},
}  # fmt: skip


@pytest.fixture
def run_file(tmp_path):
    """Writes a small run, with changes, as a YAML file."""
    import yaml

    def merged(old, new):
        return {k: merged(old.get(k) or {}, v) if isinstance(v, dict) else v for k, v in {**old, **new}.items()}

    def write(changes: dict | None = None, name: str = "small.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(merged(RUN, changes or {})))
        return path

    return write


def command(*arguments: object, name: str = "distill") -> int:
    return cli.main(
        [name, *map(str, arguments), "--processes", "1"]
        if "--processes" not in arguments
        else [name, *map(str, arguments)]
    )


def only_line(capsys) -> str:
    """What the command said: one line (after the bar's), no traceback."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    found = [
        line
        for line in text.splitlines()
        if line.strip() and not line.startswith(("distil (", "pretrain:", "running on "))
    ]
    assert len(found) == 1, text
    return found[0]


def test_a_run_from_a_file_writes_what_it_is_and_what_it_made(run_file, tmp_path):
    out = tmp_path / "run"
    assert command(run_file(), "--out", out, "--objective.alpha", "1.2") == 0
    assert "alpha: 1.2" in (out / "run.yaml").read_text()
    generator, _, provenance = load_generator(out / "student.safetensors")
    assert generator.times == pytest.approx(times(2.5)) and provenance["run"]["objective"]["alpha"] == 1.2
    assert [line["images"] for line in read_stats(out / "stats.jsonl") if line["kind"] == "train"] == [64, 128]


def test_a_run_with_ode_steps_makes_a_student_that_samples_with_them(run_file, tmp_path):
    settings = {"generator": {"sigmas": [20, 2.5], "transition": "ode"}}
    assert command(run_file(settings), "--out", tmp_path / "run") == 0
    generator = load_generator(tmp_path / "run/student.safetensors")[0]
    z = torch.randn(4, 2)
    with torch.no_grad():
        assert torch.equal(generator([z, torch.zeros(4, 2)]), generator([z, torch.randn(4, 2)]))
        generator.transition = "renoise"
        assert not torch.equal(generator([z, torch.zeros(4, 2)]), generator([z, torch.randn(4, 2)]))


def test_the_mixture_recipe_runs_to_its_end(tmp_path):
    """Its length, like that of any run, need not be a multiple of the batch."""
    arguments = ["--teacher.fit-steps", "0", "--train.images", "1000"]
    assert command("recipes/mixture/sid.yaml", "--out", tmp_path / "run", *arguments) == 0
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest().name == "000000001024"


WRONG = {
    "unknown key": ({"objectiv": {"method": "sid"}}, r"objectiv: unknown key .* known keys: .*\bobjective\b"),
    "unknown key below": (
        {"train": {"batchsize": 3}},
        r"train\.batchsize: unknown key .* known keys: batch_size, .*seed",
    ),
    "unknown key in a union": (
        {"objective": {"method": "dmd2", "gan_wight": 1}},
        r"objective\.gan_wight: unknown key \(its value is 1\); known keys: (?!.*\balpha\b).*\bgan_weight\b",
    ),
    "wrong type": ({"train": {"images": "many"}}, r"train\.images: must be a whole number, got 'many'"),
    "wrong method": (
        {"objective": {"method": "sidd"}},
        r"objective: .*must be one of .*dmd, dmd2,.* sid, .*got 'sidd'",
    ),
    "out of range": ({"train": {"batch_size": 0}}, r"train\.batch_size: must be above 0, got 0"),
    "does not divide": (
        {"train": {"micro_batch": 5}},
        r"train: `batch_size` must be a multiple of micro_batch 5, got 16",
    ),
    "both sigmas and times": (
        {"generator": {"sigmas": [1], "times": [1.0]}},
        r"generator: one of sigmas.* and times must be given",
    ),
    "no kind": ({"kind": None}, r"kind"),
    "unknown kind": ({"kind": "evaluate"}, r"'pretrain', 'distill', got 'evaluate'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_run_file_is_refused_by_the_name_of_the_key(run_file, capsys, case):
    changes, pattern = WRONG[case]
    assert command(run_file(changes)) == 1
    text = capsys.readouterr().err
    assert re.search(pattern, text), text
    assert "small.yaml" in text and "Traceback" not in text
    assert len(text.splitlines()) <= 2, "the file, and one line for the one thing wrong"


FITS_NOT = {
    "times that rise": (
        {"generator": {"sigmas": [1.0, 5.0]}},
        r"generator: sigmas must hold a level for each call and fall strictly",
    ),
    "a GAN without images": (
        {"objective": {"method": "dmd2"}},
        r"`data` must be given for this objective's GAN.*gan_weight",
    ),
    "regression without pairs": ({"objective": {"method": "dmd"}}, r"fewstep pairs .*regression_weight to 0"),
    "no such pairs": (
        {"objective": {"method": "dmd"}, "pairs": "/nowhere"},
        r"must be a folder with pairs, got /nowhere. Try: `fewstep pairs",
    ),
    "guidance without classes": (
        {"objective": {"guidance": 2.0}},
        r"`guidance` must be left out for mixture-8, which has no classes, got 2",
    ),
    "data of another shape": (
        {"objective": {"method": "dmd2"}, "data": {"kind": "digits"}},
        r"shape of teacher mixture-8, \[2\], got digits with \[1, 8, 8\]",
    ),
    "a means without a std": (
        {"teacher": {"means": [[0.0, 1.0]], "stds": [1.0, 2.0]}},
        r"`stds` must be one for each of 1 means, got 2",
    ),
}


@pytest.mark.parametrize("case", FITS_NOT)
def test_what_does_not_fit_is_refused_with_the_way_out(run_file, tmp_path, capsys, case):
    changes, pattern = FITS_NOT[case]
    assert command(run_file(changes), "--out", tmp_path / "run") == 1
    text = capsys.readouterr().err
    assert re.search(pattern, text), text
    assert "Traceback" not in text and len(text.splitlines()) <= 2
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("teacher", "pattern"),
    [
        ("nowhere.safetensors", r"teacher nowhere.safetensors does not exist \(looked in /"),
        (
            "fashion-mnits",
            r"no teacher 'fashion-mnits'. Try: give a .safetensors or .pkl file, a run folder, or one of",
        ),
        ("{empty}", r"holds no teacher.safetensors"),
        ("{damaged}", r"damaged.safetensors has \d+ bytes, damaged.json says \d+"),
    ],
)
def test_a_teacher_that_cannot_be_had(run_file, tmp_path, capsys, labelled, teacher, pattern):
    (tmp_path / "empty").mkdir()
    whole = Path(labelled.path)
    (tmp_path / "damaged.safetensors").write_bytes(whole.read_bytes()[:-100])
    (tmp_path / "damaged.json").write_bytes(whole.with_suffix(".json").read_bytes())
    path = teacher.format(empty=tmp_path / "empty", damaged=tmp_path / "damaged.safetensors")
    file = tmp_path / "small.yaml"
    file.write_text(f"kind: distill\nteacher: {{kind: native, path: {path}}}\nevaluation: {{samples: 0}}\n")
    assert command(file, "--out", tmp_path / "run") == 1
    assert re.search(pattern, only_line(capsys))


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("", r"must hold keys such as `teacher:`"),
        ("- a\n- b\n", r"must hold keys such as .* got list"),
        ("kind: distill\ntrain: [\n", r"is not valid YAML: .* \(line 3\)"),
        ("teacher: {kind: mixture}\n", r"`kind:` is missing. Try: `kind: distill` or `kind: pretrain`"),
        pytest.param(
            b"\x80\x81\x82\x00",
            r"file.yaml",
        ),
    ],
    ids=["empty", "a list", "not YAML", "no kind", "not text"],
)
def test_a_file_that_is_no_run(tmp_path, capsys, content, pattern):
    path = tmp_path / "file.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert command(path) == 1
    assert re.search(pattern, only_line(capsys))


@pytest.mark.parametrize("recipe", ["nowhere.yaml", "mixture/sidd", "recipes/mixture/sidd.yaml"])
def test_a_recipe_that_does_not_exist(capsys, recipe):
    assert command(recipe) == 1
    assert re.search(rf"shipped recipe, got {recipe} .*Recipes: .*mixture/sid\b", only_line(capsys))


def test_a_pretraining_given_to_distill_and_the_other_way(run_file, tmp_path, capsys):
    assert command(run_file(), name="pretrain") == 1
    assert re.search(r"is a distill run. Try: `fewstep distill`", only_line(capsys))
    path = tmp_path / "teacher.yaml"
    path.write_text("kind: pretrain\ndata: {kind: digits}\ntrain: {images: 100}\n")
    assert command(path) == 1
    assert re.search(r"is a pretrain run. Try: `fewstep pretrain`", only_line(capsys))


def test_a_network_that_does_not_fit_the_data(tmp_path, capsys):
    path = tmp_path / "teacher.yaml"
    text = "kind: pretrain\ndata: {kind: digits}\ntrain: {images: 100, device: cpu}\nevaluation: {samples: 0}\n"
    path.write_text(text)
    assert command(path, "--out", tmp_path / "run", name="pretrain") == 1
    assert re.search(r"shape of digits, \[1, 8, 8\], got \[1, 28, 28\]. Try: set denoiser.net.size", only_line(capsys))
    path.write_text(text + "denoiser: {net: {kind: dit, size: 8, patch: 2, num_classes: 3}}\n")
    assert command(path, "--out", tmp_path / "run", name="pretrain") == 1
    assert re.search(r"num_classes` must be that of digits, 10, got 3", only_line(capsys))


def test_a_run_folder_keeps_its_settings(run_file, tmp_path, capsys):
    """Other settings would be another run; its length and its logging may change."""
    file, out = run_file(), tmp_path / "run"
    assert command(file, "--out", out) == 0
    capsys.readouterr()
    assert command(file, "--out", out, "--objective.alpha", "0.5", "--train.seed", "3") == 1
    assert re.search(
        r"objective\.alpha was 1\.0, now 0\.5; train\.seed was 0, now 3\). Try: another --out", only_line(capsys)
    )
    assert command(file, "--out", out, "--train.images", "192", "--train.log-every", "32") == 0
    assert Checkpoints(out / "checkpoints").latest().name.endswith("192")
    assert load_weights(out / "student.safetensors")[1]["card"]["images"] == 192


@pytest.mark.parametrize("wanted", ["x", "0", "-1", "1.5"])
def test_processes_must_be_a_number(run_file, capsys, wanted):
    assert command(run_file(), "--processes", wanted) == 1
    assert re.search(
        f"--processes must be a number of at least 1, or auto, got '{re.escape(wanted)}'", only_line(capsys)
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--objective.gan-wight", "1"], "objective.gan_wight: unknown key"),
        (["--train.images", "many"], "train.images: must be a whole number, got 'many'"),
        (["--train.images"], "--train.images"),
        (["--nonsense"], "nonsense: unknown key"),
        (["stray"], "stray"),
    ],
)
def test_a_wrong_override_is_named(run_file, capsys, arguments, named):
    try:
        code = command(run_file(), *arguments)
    except SystemExit as stopped:  # an option without its value
        code = stopped.code
    assert code in (1, 2)
    captured = capsys.readouterr()
    text = captured.err + captured.out
    assert named in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--train.batch-size", "0"], "train.batch_size: must be above 0"),
        (["--train.micro-batch", "5"], "train: `batch_size` must be a multiple of micro_batch 5, got 16"),
    ],
)
def test_an_override_that_the_run_refuses(run_file, capsys, arguments, pattern):
    """Checked by the same records as the file; said by whoever reads the command line."""
    assert command(run_file(), *arguments) == 1
    captured = capsys.readouterr()
    assert re.search(pattern, captured.err) and "Traceback" not in captured.err and not captured.out, captured


@pytest.mark.parametrize(
    "device",
    [
        "gpu",
        pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")),
    ],
)
def test_a_device_that_is_not_there(run_file, tmp_path, capsys, device):
    assert command(run_file(), "--out", tmp_path / "run", "--train.device", device) == 1
    assert device in only_line(capsys)


def test_a_damaged_checkpoint_is_refused_and_named(run_file, tmp_path, capsys):
    file, out = run_file(), tmp_path / "run"
    assert command(file, "--out", out) == 0
    shard = next((out / "checkpoints" / "000000000128").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    capsys.readouterr()
    assert command(file, "--out", out, "--train.images", "192") == 1
    assert re.search(r"000000000128/shard.* Delete the folder .* to resume from 000000000064", only_line(capsys))


def test_an_out_that_is_a_file(run_file, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert command(run_file(), "--out", tmp_path / "taken") == 1
    assert "taken" in only_line(capsys)


def test_a_second_process_in_a_folder_is_refused(run_file, tmp_path, capsys):
    with RunLock(tmp_path / "run"):
        assert command(run_file(), "--out", tmp_path / "run") == 1
    assert re.search(
        r"run is in use by process \d+ on .*. Try: wait for that run, stop it, or use another folder", only_line(capsys)
    )
    assert command(run_file(), "--out", tmp_path / "run") == 0


def test_a_dry_run_prints_the_run_and_its_cost_and_trains_nothing(run_file, tmp_path, capsys):
    assert command(run_file(), "--dry-run", "--out", tmp_path / "run", "--objective.alpha", "1.2") == 0
    text = capsys.readouterr().out
    parameters = sum(p.numel() for p in MLPSpec(width=8).build().parameters())
    assert "alpha: 1.2" in text and f"{parameters:,} parameters to train, 1 network call per image" in text
    found = re.search(r"# an iteration: ([\d.]+) F per image", text)  # 11 for networks; this teacher is a formula
    assert found and 8 < float(found[1]) < 9
    assert "128 images in 8 iterations of 16" in text
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_the_last_iteration(run_file, capsys):
    assert command(run_file({"train": {"images": 130}}), "--dry-run") == 0
    assert "130 images in 9 iterations of 16" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "recipe"), [("distill", "mixture/sid"), ("pretrain", "fashion-mnist/teacher")])
def test_help_with_and_without_a_recipe(capsys, name, recipe):
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert (
        re.search(rf"usage: fewstep {name} \[-h\] (\[OPTIONS\] )?\[RECIPE\]", text)
        and "--dry-run" in text
        and recipe in text
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, recipe, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--train.batch-size" in text and "Images in one update, over all processes" in " ".join(
        re.sub("[│|]", " ", text).split()
    )


def test_the_command_alone(capsys):
    for arguments, code in [(["--help"], 0), ([], 0), (["distil"], 2)]:
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == code
    text = capsys.readouterr()
    assert "distill" in text.out and "invalid choice: 'distil'" in text.err
    assert cli.main(["distill"]) == 1
    assert "RECIPE must be given" in capsys.readouterr().err
