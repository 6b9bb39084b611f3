"""Sampling: an image is its seed's, whatever the batch, the other seeds and the number of processes."""

from pathlib import Path

import pytest
import torch

from fewstep.cli.main import main
from fewstep.data import Digits, to_uint8
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.noise import LogNormalNoise
from fewstep.diffusion.solvers import Churn, Solver
from fewstep.formats.model import DenoiserSpec
from fewstep.networks import DiTSpec
from fewstep.students.sample import (
    FewStep,
    ManyStep,
    balanced_labels,
    generate,
    noise_of,
    parse_calls,
    parse_classes,
    parse_seeds,
    write_samples,
)
from fewstep.system import distributed
from fewstep.system.errors import SettingsError, TeacherError
from fewstep.teachers import ClassLabels, NativeTeacher
from fewstep.training.optim import OptimSpec
from fewstep.training.pretrain import Pretraining
from fewstep.training.spec import TrainSpec
from fewstep.training.trainer import Trainer
from tests.support.console import unboxed
from tests.support.processes import ranks

SHAPE = (1, 8, 8)
TEN = ClassLabels(10, tuple("0123456789"))


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> Path:
    """A tiny transformer pretrained on a few hundred digits, as a file."""
    folder = tmp_path_factory.mktemp("teacher")
    spec = DenoiserSpec(net=DiTSpec(size=8, channels=1, patch=2, width=32, depth=2, heads=2, num_classes=10))
    train = TrainSpec(images=640, batch_size=32, precision="fp32", device="cpu", evaluate_every=None, ema_half_life=50)
    task = Pretraining(spec, Digits().load(), OptimSpec(lr=4e-3), train, LogNormalNoise(), 0.1, None, 5, {})
    Trainer(task, train, folder).fit()
    return folder


def samplers_of(folder: Path) -> dict:
    """A one-step, a three-step and the teacher's own sampler."""
    denoiser = NativeTeacher(path=str(folder)).load().denoiser
    at = denoiser.schedule.time(torch.tensor([80.0, 5.0, 1.0])).clamp(max=1).tolist()
    return {
        "one": FewStep(Generator(denoiser, at[1:2])),
        "three": FewStep(Generator(denoiser, at)),
        "many": ManyStep(denoiser, 9),
        "stochastic": ManyStep(denoiser, 9, solver=Solver(churn=Churn(9.0))),
    }


@pytest.fixture(scope="session")
def samplers(teacher_folder):
    return samplers_of(teacher_folder)


class Echo:
    """Pixels that tell the seed and the class; remembers how many it was asked for at a time."""

    calls, codec = 1, None

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, seeds, shape, labels=None):
        self.batches.append(len(seeds))
        label = torch.zeros(len(seeds)) if labels is None else labels.float()
        return (
            torch.tensor(seeds, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, *shape)
            + label.view(-1, 1, 1, 1) / 100
        )


# ------------------------------------------------------------------------------------------------------------- noise


def test_noise_is_a_function_of_seed_and_step():
    torch.manual_seed(123)
    a = noise_of([5, 7, 6], SHAPE)
    state = torch.get_rng_state()
    torch.manual_seed(456)
    assert torch.equal(noise_of([5, 7, 6], SHAPE), a)
    torch.manual_seed(123)
    assert torch.equal(torch.get_rng_state(), state), "the global random state is left alone"
    assert torch.equal(noise_of(range(5, 8), SHAPE), a[[0, 2, 1]]), "whatever the other seeds"
    assert not torch.equal(noise_of([5], SHAPE, step=1), a[:1])
    assert torch.equal(noise_of([5], SHAPE, step=1), noise_of([5], SHAPE, step=1))


def test_image_1234_stays_image_1234():
    """The first draws of two seeds, written down: another law of seeds would change everybody's images."""
    assert noise_of([0, 1234], (3,)).flatten().tolist() == pytest.approx(
        [0.468355, -0.148138, -0.319264, 2.488188, 0.033806, 0.736675], abs=1e-5
    )


def test_noise_is_standard_and_independent():
    draws = torch.cat([noise_of(range(1000), (8,)), noise_of(range(1000), (8,), step=1)], dim=1)
    assert draws.mean().abs() < 0.03 and draws.std().item() == pytest.approx(1, abs=0.03)
    assert (torch.corrcoef(draws.T) - torch.eye(16)).abs().max() < 0.15
    assert (torch.corrcoef(draws[:40]) - torch.eye(40)).abs().max() < 0.95


# ------------------------------------------------------------------------------------------------------- one image


@pytest.mark.parametrize("name", ["one", "three", "many", "stochastic"])
def test_a_seed_is_the_same_image_at_any_batch_size_and_in_any_company(samplers, name):
    def draw(seeds, batch, labels=None) -> torch.Tensor:
        return torch.cat(list(generate(samplers[name], seeds, SHAPE, TEN, batch=batch, labels=labels, uint8=False)))

    everything = draw(range(23), 250)
    for batch in (1, 4, 23):
        torch.testing.assert_close(draw(range(23), batch), everything, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(draw([17, 3], 2), everything[[17, 3]], rtol=0, atol=1e-5)
    assert (everything[1:] - everything[:-1]).abs().flatten(1).amax(1).min() > 0.05, (
        "different seeds are different images"
    )


def test_pixels_are_those_of_the_samples(samplers):
    exact = torch.cat(list(generate(samplers["one"], range(12), SHAPE, TEN, batch=5, uint8=False)))
    pixels = torch.cat(list(generate(samplers["one"], range(12), SHAPE, TEN, batch=5)))
    assert pixels.dtype == torch.uint8 and exact.dtype == torch.float32
    assert torch.equal(pixels, to_uint8(exact))


def test_few_steps_are_the_rollout_of_the_seeds_noise(samplers):
    sampler = samplers["three"]
    assert sampler.calls == 3
    cond = {"labels": torch.tensor([1, 2])}
    with torch.no_grad():
        expected = sampler.generator([noise_of([8, 9], SHAPE, step) for step in range(3)], **cond)
        assert torch.equal(sampler([8, 9], SHAPE, **cond), expected)
        shorter = sampler.generator([noise_of([8, 9], SHAPE, step) for step in range(2)], **cond)
    assert not torch.allclose(expected, shorter, atol=1e-3)


def test_many_steps_are_the_teachers_solver(samplers):
    sampler = samplers["many"]
    assert sampler.calls == 9
    cond = {"labels": torch.tensor([1, 2])}
    with torch.no_grad():
        assert torch.equal(
            sampler([8, 9], SHAPE, **cond), Solver()(sampler.denoiser, noise_of([8, 9], SHAPE), 9, **cond)
        )


def test_teacher_and_student_start_from_the_same_noise(samplers):
    """So that pictures side by side are of the same noise."""
    denoiser = samplers["many"].denoiser
    one = FewStep(Generator(denoiser, [1.0]))
    with torch.no_grad():
        torch.testing.assert_close(one([3], SHAPE), ManyStep(denoiser, 1)([3], SHAPE), rtol=0, atol=1e-5)


def test_nothing_is_kept_for_gradients(samplers):
    assert not any(
        batch.requires_grad for batch in generate(samplers["one"], range(3), SHAPE, TEN, batch=2, uint8=False)
    )


# ----------------------------------------------------------------------------------------------- order and conditions


def test_batches_come_in_the_order_of_the_seeds():
    echo, done = Echo(), []
    seeds = [9, 2, 7, 7, 0, 30, 1]
    batches = list(generate(echo, seeds, SHAPE, ClassLabels(0), batch=3, uint8=False, progress=done.append))
    assert [len(batch) for batch in batches] == [3, 3, 1] and echo.batches == [3, 3, 1]
    assert torch.cat(batches)[:, 0, 0, 0].tolist() == seeds
    assert done == [3, 6, 7]


def test_batches_are_made_when_they_are_asked_for():
    echo = Echo()
    batches = generate(echo, range(100), SHAPE, ClassLabels(0), batch=10)
    assert echo.batches == []
    next(batches)
    assert echo.batches == [10]


def test_no_seeds_make_no_images():
    assert list(generate(Echo(), [], SHAPE, TEN)) == []


def test_classes_are_balanced_by_seed_unless_given():
    def classes(**settings) -> list[int]:
        pixels = torch.cat(
            list(generate(Echo(), [4, 13, 22], SHAPE, ClassLabels(10), batch=2, uint8=False, **settings))
        )[:, 0, 0, 0]
        return ((pixels - torch.tensor([4, 13, 22])) * 100).round().int().tolist()

    assert classes() == [4, 3, 2]
    assert classes(labels=torch.tensor([7, 0, 9])) == [7, 0, 9]
    assert balanced_labels(range(8, 12), 10).tolist() == [8, 9, 0, 1]
    assert balanced_labels(range(3), 0) is None
    assert torch.bincount(balanced_labels(range(100, 150), 10)).tolist() == [5] * 10


def test_the_class_changes_the_image_and_the_noise_stays(samplers):
    def draw(label: int) -> torch.Tensor:
        return torch.cat(list(generate(samplers["one"], [5], SHAPE, TEN, labels=torch.tensor([label]), uint8=False)))

    assert not torch.allclose(draw(3), draw(4), atol=1e-3)
    assert torch.equal(draw(3), draw(3))


@pytest.mark.parametrize(("labels", "bad"), [([3, 11], 11), ([-1, 3], -1)])
def test_a_class_that_does_not_exist_is_refused_with_those_that_do(labels, bad):
    with pytest.raises(TeacherError, match=rf"`classes` must be of 0 zero, 1 one.* got {bad}"):
        list(generate(Echo(), [0, 1], SHAPE, ClassLabels(10, ("zero", "one")), labels=torch.tensor(labels)))
    with pytest.raises(TeacherError, match=rf"`classes` must be of 0 to 9, got {bad}"):
        ClassLabels(10).cond(torch.tensor(labels), 2)


def test_a_condition_is_drawn_uniformly_and_can_be_emptied():
    drawn = ClassLabels(4).draw(4000)["labels"]
    assert torch.bincount(drawn).tolist() == pytest.approx([1000] * 4, abs=120)
    assert ClassLabels(4).null({"labels": drawn})["labels"].unique().tolist() == [4]
    assert ClassLabels(4).cond(None, 3)["labels"].tolist() == [4, 4, 4]
    assert ClassLabels(0).draw(5) == {} and ClassLabels(0).cond(None, 5) == {}


# ------------------------------------------------------------------------------------------------------ two processes


def rank_draws(teacher: Path, out: Path) -> None:
    """In each of two processes: what `test_two_processes_make_the_same_images` compares."""
    with distributed.process_group():
        found = {}
        for name, sampler in samplers_of(teacher).items():
            batches = list(generate(sampler, range(100, 123), SHAPE, TEN, batch=7, uint8=False))
            found[name] = torch.cat(batches)
            found[f"{name} sizes"] = torch.tensor([len(batch) for batch in batches])
        echo = Echo()
        found["order"] = torch.cat(list(generate(echo, [9, 2, 7, 7, 0], SHAPE, TEN, batch=3, uint8=False)))
        found["share"] = torch.tensor(echo.batches)
        local = Echo()
        found["local"] = torch.cat(list(generate(local, [9, 2, 7], SHAPE, TEN, batch=3, uint8=False, local=True)))
        assert local.batches == [3]
        rank = distributed.rank()
        found["gathered"] = distributed.gather_images(torch.tensor([[rank], [2 + rank], [4 + rank]]))
        assert distributed.any_rank(rank == 1) is True and distributed.any_rank(False) is False
        sums = {"both": (1.0 + rank, 1 + rank)} | ({"one": (6.0, 3)} if rank == 1 else {})
        assert distributed.mean(sums) == {"both": 1.0, "one": 2.0}
        weight = torch.nn.Parameter(torch.zeros(2))
        bias, unused = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
        weight.grad, bias.grad = torch.tensor([1.0, 2.0]) * (1 + rank), torch.tensor([10.0 * rank])
        distributed.average_gradients([weight, unused, bias])
        assert weight.grad.tolist() == [1.5, 3.0] and bias.grad.tolist() == [5.0] and unused.grad is None
        torch.save(found, f"{out}-{rank}.pt")


@pytest.mark.slow
def test_two_processes_make_the_same_images(teacher_folder, samplers, tmp_path):
    """Each makes half of every batch, both get all; a seed's image is that of one process."""
    ranks(rank_draws, teacher_folder, tmp_path / "drawn")
    first, second = (torch.load(tmp_path / f"drawn-{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys()
    for name in samplers:
        alone = torch.cat(list(generate(samplers[name], range(100, 123), SHAPE, TEN, batch=250, uint8=False)))
        # samples reach 3, and kernels differ by the size of a batch
        torch.testing.assert_close(first[name], alone, rtol=1e-5, atol=1e-5)
        assert torch.equal(first[name], second[name])
        assert first[f"{name} sizes"].tolist() == [7, 7, 7, 2]
    assert first["order"][:, 0, 0, 0].tolist() == pytest.approx([9.09, 2.02, 7.07, 7.07, 0.0])
    assert first["share"].tolist() == second["share"].tolist() == [2, 1], "half of a batch, rounded up"
    assert first["local"][:, 0, 0, 0].tolist() == pytest.approx([9.09, 2.02, 7.07])
    assert first["gathered"].flatten().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "text", ["x", "0", "-3", "1,2,3,4,5", "", "nan", "inf", "40,80,1", "40,-1", "40,0,nan", "40,0,50,0", "40,1,1"]
)
def test_churn_that_makes_no_sense(text, capsys):
    with pytest.raises(SystemExit):
        main(["sample", "digits", f"--churn={text}"])
    assert "Try: 40,0.05,50,1.003" in unboxed(capsys.readouterr().err)


@pytest.mark.parametrize(("text", "calls"), [("35", [35]), ("35, 18,9", [35, 18, 9]), ("0", []), (" 1 ", [1])])
def test_numbers_of_calls_are_read(text, calls):
    assert parse_calls(text) == calls


@pytest.mark.parametrize(
    "text", ["", "abc", "0,5", "5,0", "-1", "3.5", "1e3", "5,,3", "5,5", "²", "+3", "0x10", "none"]
)
def test_numbers_of_calls_that_make_no_sense(text):
    with pytest.raises(SettingsError, match=r"`evaluations` must .*Try: 35"):
        parse_calls(text)


@pytest.mark.parametrize("text", ["3-", "-3", "²", "1-2-3", "", "1,,2", "1.5", "5-3"])
def test_seeds_that_make_no_sense(text):
    with pytest.raises(SettingsError, match="must be numbers and rising ranges"):
        parse_seeds(text)


def test_seeds_that_no_array_keeps():
    """numpy would keep them as floats, or as objects that `numpy.load` refuses."""
    assert parse_seeds("9223372036854775807") == [2**63 - 1]
    for text in ("9223372036854775808", "0,18446744073709551615", "5-99999999999999999999"):
        with pytest.raises(SettingsError, match=r"`seeds` must be below 2\*\*63, got"):
            parse_seeds(text)


def test_more_classes_than_seeds_are_refused():
    with pytest.raises(SettingsError, match=r"must be at most one per seed, got 3 for 2 seeds"):
        parse_classes("0,1,2", TEN, 2)


def test_a_seed_given_twice_has_no_file_of_its_own(tmp_path):
    with pytest.raises(SettingsError, match=r"must not be a folder \(one file per seed\) if a seed is given twice"):
        write_samples(Echo(), [3, 3], SHAPE, TEN, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("uint8", [True, False])
def test_samples_that_are_not_finite_are_refused(bad, uint8):
    class Broken(Echo):
        def __call__(self, seeds, shape, **cond):
            samples = super().__call__(seeds, shape, **cond).clone()
            samples[seeds.index(5) if 5 in seeds else 0, 0, 0, 0] *= bad if 5 in seeds else 1
            return samples

    with pytest.raises(SettingsError, match=r"the sample of seed 5 is not finite \(NaN or infinity\)"):
        list(generate(Broken(), range(1, 9), SHAPE, TEN, batch=2, uint8=uint8))


def test_batches_and_labels_must_fit():
    with pytest.raises(SettingsError, match="`batch` must be at least 1, got 0"):
        list(generate(Echo(), [1], SHAPE, TEN, batch=0))
    with pytest.raises(SettingsError, match="`labels` must be one for each of 2 seeds, got 1"):
        list(generate(Echo(), [1, 2], SHAPE, TEN, labels=torch.tensor([1])))
