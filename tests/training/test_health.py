"""A run's health: known faults trained on purpose are named by the run's own warnings, collapse ends it, the best stays."""

import json

import pytest

from fewstep.run.overriding import override
from fewstep.run.settings import load_run
from fewstep.students.student import load_student
from fewstep.system.tracking import read_stats
from fewstep.training.health import Collapsed, Health, HealthSpec
from tests.support.faults import FAULTS, train
from tests.support.runs import assert_same_run

CODES = {fault.code for fault in FAULTS.values() if fault.code}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_by_the_run_itself(name, tmp_path):
    said = {line["code"] for line in train(name, tmp_path) if line["kind"] == "warning"}
    assert said & CODES == ({FAULTS[name].code} if FAULTS[name].code else set()), said


def judged(*history, **spec):
    health = Health.__new__(Health)
    health.spec, health.count = HealthSpec(**spec), 64
    health.history = [{"images": 1000 * i, **line} for i, line in enumerate(history)]
    return health


def diversity(*values):
    return [{"probe_diversity": value} for value in values]


def test_a_number_that_comes_nearer_is_no_warning_before_the_end():
    assert not dict(judged(*diversity(0.2)).diagnose(last=False)), "before training"
    assert not dict(judged(*diversity(0.2, 0.4)).diagnose(last=False))
    assert "variety-lost" in dict(judged(*diversity(0.2, 0.4)).diagnose(last=True))
    assert "variety-lost" in dict(judged(*diversity(0.8, 0.6)).diagnose(last=False))
    assert not dict(judged(*diversity(0.8, 0.8)).diagnose(last=True))
    colours = judged({}, {"probe_chroma": 1.5, "probe_sharpness": 0.5}).diagnose(last=True)
    assert {"over-saturated", "blurred"} == {code for code, _ in colours}


def test_a_rising_distance_is_named_with_the_best_so_far():
    health = judged({"probe_distance": 0.5}, {"probe_distance": 0.1}, {"probe_distance": 0.4})
    assert "0.40, and was 0.10 at 1,000 images" in dict(health.diagnose(last=False))["away-from-teacher"]
    assert not dict(judged({"probe_distance": 0.5}, {"probe_distance": 0.1}).diagnose(last=True))


def test_collapse_ends_a_run_only_if_that_is_set():
    collapsed = diversity(0.9, 0.25, 0.1)
    judged(*collapsed).settle()
    judged(*diversity(0.9, 0.8, 0.1), stop_at_collapse=True).settle()  # once is chance
    judged(*diversity(0.1, 0.12, 0.15), stop_at_collapse=True).settle()  # it only begins so
    with pytest.raises(
        Collapsed, match=r"stopped at 2,000 images: .* is 0.10 times the teacher's, after 0.25, and was 0.90"
    ):
        judged(*collapsed, stop_at_collapse=True).settle()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A run of points: no pictures, no data set, no features."""
    place = tmp_path_factory.mktemp("health")
    return place, override(
        load_run("mixture/sid"),
        ["--train.images", "512", "--train.batch-size", "64", "--train.log-every", "128", "--train.evaluate-every", "128",
         "--train.checkpoint-every", "128", "--train.device", "cpu", "--train.precision", "fp32", "--health.evaluations", "9"],
    )  # fmt: skip


@pytest.mark.slow
def test_the_best_student_is_kept_and_a_resumed_run_is_the_same(mixture, tmp_path):
    place, run = mixture
    run.trainer(place / "whole").fit()
    stats = read_stats(place / "whole" / "stats.jsonl")
    distances = {line["images"]: line["probe_distance"] for line in stats if line["kind"] == "evaluation"}
    assert list(distances) == [0, 128, 256, 384, 512]
    saved = {images: value for images, value in distances.items() if images}
    best = json.loads((place / "whole" / "best" / "student.json").read_bytes())["metadata"]["card"]
    assert best["images"] == min(saved, key=saved.get) and best["scores"]["probe_distance"] == min(saved.values())
    assert load_student(place / "whole" / "best" / "student.safetensors").generator.steps == 1

    trainer = run.trainer(tmp_path / "halves")
    update = trainer.task.update

    def interrupted(images, micros):
        if images == 192:
            raise InterruptedError
        return update(images, micros)

    trainer.task.update = interrupted
    with pytest.raises(InterruptedError):
        trainer.fit()
    run.trainer(tmp_path / "halves").fit()
    assert_same_run(tmp_path / "halves", place / "whole")


def test_without_a_probe_nothing_is_drawn(mixture, tmp_path):
    run = override(mixture[1], ["--health.samples", "0", "--train.images", "128"])
    trainer = run.trainer(tmp_path)
    trainer.fit()
    assert not any("probe" in key for line in read_stats(tmp_path / "stats.jsonl") for key in line)
    assert "health" not in trainer.task.state_dict() and not (tmp_path / "best").exists()
