"""The loop, the optimizer and the average, on tasks small enough to work out by hand; and pretraining through them."""

import copy
import math
import os
import signal

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fewstep.data import Digits, shuffled_indices
from fewstep.diffusion.noise import LogNormalNoise
from fewstep.formats.model import DenoiserSpec, load_denoiser
from fewstep.networks import DiTSpec
from fewstep.system import distributed
from fewstep.system.checkpoint import Checkpoints
from fewstep.system.errors import FileError
from fewstep.system.files import RunLock
from fewstep.system.tracking import read_stats
from fewstep.training.ema import Ema
from fewstep.training.optim import OptimSpec, Stepper
from fewstep.training.player import Player
from fewstep.training.pretrain import Pretraining
from fewstep.training.spec import TrainSpec
from fewstep.training.task import Diverged, Micro, Task, derived_seed, seed_all
from fewstep.training.trainer import Trainer

# ------------------------------------------------------------------------------------------------------- average


def scalar(value: float) -> nn.Linear:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, value)
    return module


@pytest.mark.parametrize("batch", [10, 100, 1000])
def test_after_a_half_life_half_of_the_old_weight_is_left(batch):
    """Whatever the batch: 1 -> 0 after 1,000 images of half-life 1,000 gives 0.5, after 3,000 an eighth."""
    ema, target = Ema(scalar(1.0), half_life=1000, ramp=None), scalar(0.0)
    for images in range(0, 1000, batch):
        ema.update(target, images, batch)
    assert ema.module.weight.item() == pytest.approx(0.5, rel=1e-5)
    for images in range(1000, 3000, batch):
        ema.update(target, images, batch)
    assert ema.module.weight.item() == pytest.approx(0.125, rel=1e-5)


def test_the_half_life_ramps_up_with_the_images_seen():
    """At 1,000 images a ramp of 0.05 means a half-life of 50, above 100,000 the full 5,000."""
    ema = Ema(scalar(1.0), half_life=5000, ramp=0.05)
    ema.update(scalar(0.0), 1000, 50)
    assert ema.module.weight.item() == pytest.approx(0.5, rel=1e-6)
    ema.update(scalar(0.0), 200_000, 5000)
    assert ema.module.weight.item() == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize(("half_life", "ramp", "images", "host"), [(0, None, 500, True), (5000, 0.05, 0, False)])
def test_no_half_life_is_a_copy(half_life, ramp, images, host):
    ema = Ema(scalar(1.0), half_life, ramp, host)
    ema.update(scalar(0.3), images, 10)
    assert ema.module.weight.item() == pytest.approx(0.3, rel=1e-6)


def test_without_an_average_there_is_no_copy():
    module = scalar(1.0).train()
    ema = Ema(module, half_life=0)
    ema.update(module, 100, 10)
    assert ema.module is module and module.training and module.weight.requires_grad


def test_a_network_without_an_average_is_shown_as_it_will_be_used():
    """In eval mode, and then each part as before: adapters share a frozen network that is never in training."""
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1)).train()
    module[1].eval()
    train = TrainSpec(images=100, ema_half_life=0, device="cpu")
    player = Player("module", module, OptimSpec(), train, averaged=True, optimizer_name="optimizer")
    player.stepper = Stepper(OptimSpec(), [module], 100)
    with pytest.raises(KeyboardInterrupt), player.averaged() as shown:
        assert shown is module and not module.training and not module[0].training
        raise KeyboardInterrupt
    assert module.training and module[0].training and not module[1].training


def test_the_average_is_a_frozen_copy_and_takes_buffers_as_they_are():
    module = nn.BatchNorm1d(2)
    ema = Ema(module, half_life=1000)
    assert (
        ema.module is not module
        and not any(p.requires_grad for p in ema.module.parameters())
        and not ema.module.training
    )
    assert module.weight.requires_grad and module.training
    with torch.no_grad():
        module.running_mean.fill_(7.0)
        module.num_batches_tracked.fill_(3)
    ema.update(module, 100, 10)
    assert ema.module.running_mean.tolist() == [7.0, 7.0] and ema.module.num_batches_tracked.item() == 3


# ----------------------------------------------------------------------------------------------------- optimizer


def stepper_on(gradient: list[float], total: int = 1000, **settings) -> tuple[Stepper, nn.Parameter]:
    """A stepper over one parameter of ones whose gradient is given."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(len(gradient)))
    stepper = Stepper(OptimSpec(**settings), [module], total)
    module.weight.grad = torch.tensor(gradient)
    return stepper, module.weight


def test_learning_rate_rises_over_the_warm_up_and_falls_after_decay_from():
    spec = OptimSpec(lr=2.0, warmup=100, decay_from=0.6)
    factors = {images: spec.factor(images, 1000) for images in (0, 25, 100, 101, 600, 700, 800, 1000, 1064)}
    assert factors == pytest.approx({0: 0, 25: 0.25, 100: 1, 101: 1, 600: 1, 700: 0.75, 800: 0.5, 1000: 0, 1064: 0})
    assert OptimSpec(warmup=800, decay_from=0.5).factor(600, 1000) == pytest.approx(0.75 * 0.8)
    assert OptimSpec().factor(0, 1000) == 1
    assert OptimSpec(decay_from=0).factor(250, 1000) == 0.75


def test_a_run_may_end_above_its_length():
    """100,000 images are no multiple of a batch of 256: the last update reaches 100,096."""
    assert OptimSpec().factor(100_096, 100_000) == 1
    assert OptimSpec(decay_from=0.5).factor(100_096, 100_000) == 0


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_the_learning_rate_of_a_step_is_the_factors(kind):
    """Adam's first step has length lr in each element, whatever the gradient."""
    stepper, weight = stepper_on([3.0, -0.001], kind=kind, lr=0.1, warmup=100, eps=1e-12)
    stepper.step(25)
    assert weight.tolist() == pytest.approx([1 - 0.025, 1 + 0.025], rel=1e-5)


def test_gradients_are_clipped_and_their_norm_told_as_it_was():
    stepper, weight = stepper_on([3.0, 4.0], clip=1.0, betas=(0.9, 0.999))
    norm = stepper.step(64)
    assert norm.item() == pytest.approx(5.0)
    first_moment = stepper.optimizer.state[weight]["exp_avg"]  # 0.1 times the gradient that was used
    assert first_moment.tolist() == pytest.approx([0.06, 0.08], rel=1e-4)
    assert weight.grad is None, "gradients are cleared"


@pytest.mark.parametrize("clip", [None, 10.0])
def test_short_gradients_stay_as_they_are(clip):
    stepper, weight = stepper_on([3.0, 4.0], clip=clip)
    assert stepper.step(64).item() == pytest.approx(5.0)
    assert stepper.optimizer.state[weight]["exp_avg"].tolist() == pytest.approx([0.3, 0.4], rel=1e-6)


def test_clipping_and_norm_are_over_all_modules_of_a_player():
    first, second = scalar(1.0), scalar(1.0)
    stepper = Stepper(OptimSpec(clip=1.0), [first, second], 100)
    first.weight.grad, second.weight.grad = torch.tensor([[3.0]]), torch.tensor([[4.0]])
    assert stepper.step(8).item() == pytest.approx(5.0)
    assert stepper.optimizer.state[second.weight]["exp_avg"].item() == pytest.approx(0.08, rel=1e-4)


def test_parameters_without_a_gradient_are_left_alone():
    used, unused = scalar(1.0), scalar(1.0)
    stepper = Stepper(OptimSpec(lr=0.1, weight_decay=0.5), [used, unused], 100)
    used.weight.grad = torch.ones(1, 1)
    stepper.step(8)
    assert unused.weight.item() == 1.0, "nor decayed"
    assert used.weight.item() == pytest.approx(1 - 0.1 * 0.5 - 0.1, rel=1e-5)


def test_a_restored_stepper_goes_on_to_the_bit():
    def steps(stepper, weight, count):
        for i in range(count):
            weight.grad = torch.tensor([0.1 * i, 1.0, -2.0])
            stepper.step(8 * i)

    stepper, weight = stepper_on([0.0, 0.0, 0.0], lr=0.01)
    steps(stepper, weight, 3)
    other, copied = stepper_on([0.0, 0.0, 0.0], lr=0.01)
    copied.data.copy_(weight.data)
    other.load_state_dict(copy.deepcopy(stepper.state_dict()))
    steps(stepper, weight, 4)
    steps(other, copied, 4)
    assert torch.equal(weight, copied)


# --------------------------------------------------------------------------------------------------- random state


@pytest.mark.parametrize(("kind", "weight_decay"), [("adam", 0.0), ("adam", 0.1), ("adamw", 0.1)])
def test_without_a_first_moment_the_steps_are_adams(kind, weight_decay):
    """beta1 = 0: PyTorch's Adam and RMSprop with its settings take the same steps, also from a restored state."""
    common = dict(kind=kind, lr=0.01, betas=(0.0, 0.9), weight_decay=weight_decay, clip=1.0, warmup=20)
    both = []
    for first_moment in (True, False):
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        stepper = Stepper(OptimSpec(first_moment=first_moment, **common), [module], 1000)
        for number in range(6):
            if number == 3:
                saved = stepper.state_dict()
                stepper = Stepper(OptimSpec(first_moment=first_moment, **common), [module], 1000)
                stepper.load_state_dict(saved)
            (module(torch.randn(4, 3)) ** 2).sum().backward()
            stepper.step(8 * number + 8)
        both.append((module, stepper.state_dict()["state"][0].keys()))
    (adam, has), (ours, lacks) = both
    for mine, theirs in zip(ours.parameters(), adam.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    assert "exp_avg" in has and lacks == {"step", "square_avg"}


@pytest.mark.parametrize("settings", [{}, {"kind": "adamw8bit", "betas": (0.0, 0.9)}])
def test_a_first_moment_that_is_needed_cannot_be_left_out(settings):
    with pytest.raises(
        ValueError, match="first_moment must be true unless kind is adam or adamw with a first beta of 0"
    ):
        OptimSpec(first_moment=False, **settings)


def test_seeds_depend_on_every_part_and_on_nothing_else():
    seeds = [
        derived_seed(*parts) for parts in [(0, "critic", 8), (1, "critic", 8), (0, "generator", 8), (0, "critic", 16)]
    ]
    assert len(set(seeds)) == 4 and all(0 <= seed < 2**63 for seed in seeds)
    draws = []
    for _ in range(2):
        torch.rand(3)  # whatever was drawn before
        seed_all(0, "critic", 8)
        draws.append(torch.rand(3))
    assert torch.equal(*draws)


def test_a_micro_batch_draws_by_its_position():
    def draw(position: int, phase: str = "critic", seed: int = 0) -> torch.Tensor:
        Micro(position, 4, seed).reseed(phase)
        return torch.rand(3)

    assert torch.equal(draw(8), draw(8))
    assert not torch.equal(draw(8), draw(12))
    assert not torch.equal(draw(8), draw(8, phase="generator"))
    assert not torch.equal(draw(8), draw(8, seed=1))


@pytest.mark.parametrize(("world", "micro_batch"), [(1, None), (1, 4), (2, None), (2, 4), (4, 2), (8, 1)])
def test_micro_batches_tile_the_batch_whoever_computes_them(monkeypatch, tmp_path, world, micro_batch):
    spec = TrainSpec(images=64, batch_size=16, micro_batch=micro_batch, seed=3)
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    trainer = Trainer(Toy(), spec, tmp_path)
    trainer.images = 32
    seen = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        micros = trainer._micros()
        assert len(micros) * world * micros[0].size == 16 and {m.seed for m in micros} == {3}
        seen += [image for micro in micros for image in range(micro.position, micro.position + micro.size)]
    assert sorted(seen) == list(range(32, 48))


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    with pytest.raises(
        ValueError,
        match=r"train.batch_size` must divide over 8 processes x micro-batches of 4, got 100. Try: a multiple of 32",
    ):
        TrainSpec(images=1000, batch_size=100, micro_batch=4).micro()
    with pytest.raises(ValidationError, match="`batch_size` must be a multiple of micro_batch 8, got 100"):
        TrainSpec(images=1000, batch_size=100, micro_batch=8)


# ------------------------------------------------------------------------------------------------------- the loop


class Toy(Task):
    """Its loss is the number of images before the update; `on` does something at a number of images."""

    def __init__(self, loss=float, score=lambda images: {}, on=None):
        self.loss, self.score, self.on = loss, score, on or {}
        self.updates, self.evaluated, self.exported, self.total = [], [], [], 0

    def update(self, images, micros):
        if images in self.on:
            self.on[images]()
        self.updates.append(images)
        self.total += images
        return {"loss": torch.tensor(self.loss(images)), "plain": 1.0}

    def evaluate(self, images):
        self.evaluated.append(images)
        return self.score(images)

    def picture(self, images, folder):
        return {}

    def state_dict(self):
        return {"total": self.total, "weight": torch.tensor([float(self.total)])}

    def load_state_dict(self, state):
        self.total = state["total"]
        assert state["weight"].item() == self.total

    def export(self, folder, images, scores):
        self.exported.append((images, scores))


def spec(**changes) -> TrainSpec:
    settings = dict(images=64, batch_size=8, log_every=20, evaluate_every=None, checkpoint_every=1000, device="cpu")
    return TrainSpec(**settings | changes)


def lines(folder, kind: str) -> list[dict]:
    return [line for line in read_stats(folder / "stats.jsonl") if line["kind"] == kind]


def test_a_line_for_every_multiple_crossed_with_the_mean_since_the_last(tmp_path):
    task = Toy()
    Trainer(task, spec(), tmp_path).fit()
    assert task.updates == list(range(0, 64, 8))
    found = [(line["images"], line["loss"], line["plain"]) for line in lines(tmp_path, "train")]
    assert found == [(24, 8.0, 1.0), (40, 28.0, 1.0), (64, 48.0, 1.0)]
    timed = [line["images"] for line in read_stats(tmp_path / "times.jsonl") if line.get("training_seconds", -1) >= 0]
    assert timed == [24, 40, 64]


@pytest.mark.parametrize(
    "said", [["the covariance is singular", "few images"], "the covariance is singular; few images"]
)
def test_warnings_of_an_evaluation_are_printed_and_logged(tmp_path, capsys, said):
    """Beside the number in the log, and as a warning of the run; once, not at every evaluation."""
    task = Toy(score=lambda images: {"fid": 1.0, "warnings": said})
    Trainer(task, spec(evaluate_every=20), tmp_path).fit()
    text = "the covariance is singular; few images"
    assert [line["warnings"] for line in lines(tmp_path, "evaluation")] == [text] * 4
    assert [(line["code"], line["text"]) for line in lines(tmp_path, "warning")] == [("evaluation", text)]
    assert f"Warning at 0 images (evaluation): {text}" in " ".join(capsys.readouterr().err.split())
    assert task.exported[-1][1]["warnings"] == text


def test_an_evaluation_without_warnings_says_none(tmp_path):
    Trainer(Toy(score=lambda images: {"fid": 1.0, "warnings": []}), spec(), tmp_path).fit()
    assert lines(tmp_path, "evaluation")[-1]["warnings"] is None and lines(tmp_path, "warning") == []


def test_the_last_update_may_go_above_the_length_of_the_run(tmp_path):
    task = Toy()
    Trainer(task, spec(images=30), tmp_path).fit()
    assert task.updates == [0, 8, 16, 24]
    assert Checkpoints(tmp_path / "checkpoints").latest().name == "000000000032"


def test_evaluations_at_the_start_on_schedule_and_at_the_end(tmp_path):
    task = Toy(score=lambda images: {"fid": 100.0 - images})
    scores = Trainer(task, spec(evaluate_every=24), tmp_path).fit()
    assert task.evaluated == [0, 24, 48, 64]
    assert [(line["images"], line["fid"]) for line in lines(tmp_path, "evaluation")] == [
        (i, 100.0 - i) for i in task.evaluated
    ]
    assert scores == {"fid": 36.0} and task.exported[-1] == (64, {"fid": 36.0})


def test_without_a_schedule_the_only_evaluation_is_at_the_end(tmp_path):
    """`evaluate_every: null` is documented as "none before the end"."""
    task = Toy(score=lambda images: {"fid": 100.0 - images})
    scores = Trainer(task, spec(evaluate_every=None), tmp_path).fit()
    assert task.evaluated == [64] and scores == {"fid": 36.0}


def test_newest_checkpoints_and_the_best_are_kept(tmp_path):
    fids = {0: 9.0, 8: 8.0, 16: 2.0, 24: 5.0, 32: 6.0, 40: 7.0, 48: 7.5, 56: 7.6, 64: 7.7}
    task = Toy(score=lambda images: {"fid": fids[images]})
    trainer = Trainer(task, spec(evaluate_every=8, checkpoint_every=8, keep=2), tmp_path)
    trainer.fit()
    assert sorted(path.name[-2:] for path in (tmp_path / "checkpoints").iterdir()) == ["16", "56", "64"]
    assert trainer.checkpoints.best().name.endswith("16")


def test_where_higher_is_better_the_best_checkpoint_is_the_highest(tmp_path):
    recalls = {0: 0.1, 32: 0.7, 64: 0.4}
    task = Toy(score=lambda images: {"recall": recalls[images]})
    trainer = Trainer(task, spec(evaluate_every=32, checkpoint_every=32, keep=9), tmp_path)
    trainer.fit()
    assert trainer.checkpoints.best().name.endswith("32")


def test_a_checkpoint_has_only_the_score_of_its_own_weights(tmp_path):
    """Evaluated at 0, 32 and 64, and rising: neither 24 nor 48 has the score of 0 or of 32."""
    task = Toy(score=lambda images: {"fid": float(images)})
    trainer = Trainer(task, spec(evaluate_every=32, checkpoint_every=24, keep=9), tmp_path)
    trainer.fit()
    assert trainer.checkpoints.best().name.endswith("32")


def test_the_file_for_people_has_only_the_score_of_its_own_weights(tmp_path):
    task = Toy(score=lambda images: {"fid": float(images)})
    Trainer(task, spec(evaluate_every=32, checkpoint_every=24), tmp_path).fit()
    assert {images: scores.get("fid") for images, scores in task.exported} == {24: None, 32: 32.0, 48: None, 64: 64.0}


def test_a_finished_run_does_nothing_more(tmp_path):
    Trainer(Toy(score=lambda images: {"fid": 1.0}), spec(evaluate_every=64), tmp_path).fit()
    before = (tmp_path / "stats.jsonl").read_bytes()
    again = Toy()
    assert Trainer(again, spec(evaluate_every=64), tmp_path).fit() == {"fid": 1.0}
    assert again.updates == [] and (tmp_path / "stats.jsonl").read_bytes() == before


def test_a_longer_run_goes_on_where_the_shorter_ended(tmp_path):
    Trainer(Toy(), spec(images=32), tmp_path).fit()
    task = Toy()
    Trainer(task, spec(images=64), tmp_path).fit()
    assert task.updates == [32, 40, 48, 56] and task.total == sum(range(0, 64, 8))


def test_a_run_killed_before_its_export_exports_when_run_again(tmp_path):
    """Between the last checkpoint and the weights for people there is a moment to die in."""
    task = Toy()

    def die(*_):
        raise SystemExit("killed")

    task.export = die
    with pytest.raises(SystemExit):
        Trainer(task, spec(), tmp_path).fit()
    again = Toy()
    Trainer(again, spec(), tmp_path).fit()
    assert [images for images, _ in again.exported] == [64]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_same_command_goes_on(tmp_path, number):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    task = Toy(on={24: lambda: os.kill(os.getpid(), number)})
    with pytest.raises(KeyboardInterrupt, match="stopped and saved at 32 images in "):
        Trainer(task, spec(), tmp_path).fit()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert task.updates[-1] == 24 and task.exported, "the update under way is finished, the weights are written"
    again = Toy()
    Trainer(again, spec(), tmp_path).fit()
    assert again.updates == [32, 40, 48, 56] and again.total == sum(range(0, 64, 8))
    assert [(line["images"], line["loss"]) for line in lines(tmp_path, "train")] == [(24, 8.0), (40, 28.0), (64, 48.0)]


def test_a_signal_in_the_last_update_is_no_interruption(tmp_path):
    task = Toy(on={56: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    Trainer(task, spec(), tmp_path).fit()
    assert Checkpoints(tmp_path / "checkpoints").latest().name.endswith("64")


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    task = Toy(on={24: twice})
    try:
        with pytest.raises(KeyboardInterrupt) as stopped:
            Trainer(task, spec(), tmp_path).fit()
    finally:
        signal.signal(signal.SIGINT, before)
    assert "without saving: nothing was saved yet" in str(stopped.value) and task.updates == [0, 8, 16]
    assert Checkpoints(tmp_path / "checkpoints").latest() is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stops_the_run_and_is_never_saved(tmp_path, value):
    """At 48 the loss goes; the checkpoint due at 56 must not take the place of the one of 40."""
    task = Toy(loss=lambda images: value if images == 48 else 1.0)
    trainer = Trainer(task, spec(log_every=1000, checkpoint_every=8, keep=1), tmp_path)
    with pytest.raises(Diverged) as stopped:
        trainer.fit()
    text = str(stopped.value)
    assert "loss became" in text and "56 images" in text and "learning rate" in text and "\n" not in text
    latest = trainer.checkpoints.latest()
    assert latest.name.endswith("48") and str(latest) in text
    assert Checkpoints(tmp_path / "checkpoints").load()["images"] == 48
    assert task.exported[-1][0] == 48


def test_what_is_not_finite_is_found_when_logged(tmp_path):
    task = Toy(loss=lambda images: math.nan if images >= 8 else 1.0)
    with pytest.raises(Diverged, match="24 images; there is no checkpoint yet"):
        Trainer(task, spec(log_every=24), tmp_path).fit()


def test_a_statistic_that_is_undefined_is_left_out_and_said_and_training_goes_on(tmp_path):
    class Spreadless(Toy):
        def update(self, images, micros):
            return super().update(images, micros) | {"x_spread": torch.tensor(math.nan)}

    Trainer(Spreadless(), spec(log_every=32), tmp_path).fit()
    training = lines(tmp_path, "train")
    assert [line["images"] for line in training] == [32, 64] and all("x_spread" not in line for line in training)
    assert "x_spread is nan" in lines(tmp_path, "warning")[0]["text"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, value):
    """Losses and gradients are finite, the weight is not: an optimizer's overflow."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    class Overflowing(Toy):
        def nonfinite(self):
            return distributed.nonfinite(module)

    def overflow():
        with torch.no_grad():
            module[1].weight[0, 1] = value

    task = Overflowing(on={24: overflow})
    with pytest.raises(
        Diverged, match=r"1\.weight holds NaN or infinity at 32 images; the last good checkpoint is .*24"
    ):
        Trainer(task, spec(log_every=1000, checkpoint_every=8), tmp_path).fit()
    assert Checkpoints(tmp_path / "checkpoints").load()["images"] == 24


def test_finite_weights_are_finite():
    assert distributed.nonfinite(nn.Linear(3, 3)) is None and distributed.nonfinite(nn.ReLU()) is None
    huge = scalar(1e38)
    assert distributed.nonfinite(nn.ModuleList([scalar(3e38), scalar(3e38), huge])) is None


def test_a_folder_in_use_is_refused_and_nothing_in_it_changes(tmp_path):
    Trainer(Toy(), spec(images=32), tmp_path).fit()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"}
    with RunLock(tmp_path), pytest.raises(FileError, match="in use by process"):
        Trainer(Toy(), spec(images=64), tmp_path).fit()
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"}
    assert after == before
    Trainer(Toy(), spec(images=64), tmp_path).fit()


def test_warnings_of_the_task_are_logged_once_in_a_while(tmp_path):
    task = Toy()
    task.advise = lambda stats: iter([("high", f"the loss is {stats['loss']:g}: lower it")])
    Trainer(task, spec(), tmp_path).fit()
    assert [(line["images"], line["text"]) for line in lines(tmp_path, "warning")] == [(24, "the loss is 8: lower it")]


def test_auto_chooses_a_device_and_names_are_taken():
    assert TrainSpec(images=1, device="cpu").torch_device() == torch.device("cpu")
    assert TrainSpec(images=1, device="auto").torch_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


# ----------------------------------------------------------------------------------------------------- pretraining


SMALL = DenoiserSpec(net=DiTSpec(size=8, channels=1, patch=2, width=32, depth=2, heads=2, num_classes=10))


def pretraining(train: TrainSpec, label_dropout: float = 0.1) -> Pretraining:
    optim = OptimSpec(lr=1e-2, betas=(0.9, 0.99))
    noise = LogNormalNoise()
    return Pretraining(SMALL, Digits().load(), optim, train, noise, label_dropout, None, 5, {"data": "digits"})


def test_pretraining_lowers_the_denoising_loss_and_writes_the_teacher(tmp_path):
    train = TrainSpec(
        images=3840,
        batch_size=32,
        precision="fp32",
        device="cpu",
        log_every=640,
        evaluate_every=None,
        ema_half_life=200,
    )
    task = pretraining(train)
    x, labels = Digits().load().batch(torch.arange(256))
    t = SMALL.schedule.time(torch.full((256,), 0.5))
    x_t = SMALL.schedule.perturb(x, t, torch.randn(x.shape))

    def error(denoiser) -> float:
        with torch.no_grad():
            return (denoiser(x_t, t, labels=labels) - x).square().mean().item()

    before = error(task.denoiser)
    Trainer(task, train, tmp_path).fit()
    losses = [line["loss"] for line in lines(tmp_path, "train")]
    assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]
    denoiser, denoiser_spec, provenance = load_denoiser(tmp_path / "teacher.safetensors")
    assert denoiser_spec == SMALL and provenance["images"] == 3840 and provenance["class_names"] == list("0123456789")
    assert error(denoiser) < 0.8 * before, "the averaged weights denoise"


@pytest.mark.parametrize("label_dropout", [0.0, 0.5, 1.0])
def test_labels_are_those_of_the_images_or_hidden(label_dropout):
    task = pretraining(TrainSpec(images=512, batch_size=256, device="cpu"), label_dropout)
    shown = []
    task.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: shown.append(kwargs["labels"].clone()), with_kwargs=True
    )
    task.update(256, [Micro(256, 256, 0)])
    labels = Digits().load().labels[shuffled_indices(1797, 256, 256, 0)]
    hidden = shown[0] == 10
    assert torch.equal(shown[0][~hidden], labels[~hidden])
    assert hidden.float().mean().item() == pytest.approx(label_dropout, abs=0.12)


def test_pretraining_accumulates_to_the_mean_gradient():
    task = pretraining(TrainSpec(images=512, batch_size=16, micro_batch=8, precision="fp32", device="cpu"))
    gradients = []
    task.player.stepper.step = lambda images: (
        gradients.append(torch.cat([p.grad.flatten() for p in task.denoiser.parameters()]))
        or task.player.stepper.optimizer.zero_grad()
    )
    halves = [Micro(0, 8, 0), Micro(8, 8, 0)]
    for micros in ([halves[0]], [halves[1]], halves):
        task.update(0, micros)
    torch.testing.assert_close(gradients[2], (gradients[0] + gradients[1]) / 2)
    assert not torch.allclose(gradients[0], gradients[1])
