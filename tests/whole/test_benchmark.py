"""A race of methods: its file, what its differences mean, and a whole small one by the command."""

import json
import math
import shutil

import pytest
import yaml

from fewstep.benchmark.page import Line, least_ratio
from fewstep.benchmark.race import Race, Student
from fewstep.benchmark.spec import read_benchmark
from fewstep.cli.main import main
from fewstep.system.errors import EvaluationError, FileError, SettingsError
from tests.support.places import ROOT

SMALL = {
    "kind": "benchmark", "title": "Small", "teacher": "digits", "calls": [3, 1], "tuned_on": 64, "seeds": [0], "samples": 64,
    "reference": "digits-test", "extractors": ["pixels"], "metrics": ["fid", "recall"],
    "shared": {"train": {"images": 64, "batch_size": 32, "evaluate_every": None, "checkpoint_every": 64, "device": "cpu"},
               "evaluation": {"samples": 0}, "health": {"samples": 0}},
    "students": {"sid": {"recipe": "digits/sid"}, "bad": {"recipe": "digits/sid", "settings": {"start_from": "nowhere.safetensors"}}},
    "notes": ["nothing is to be learnt from this"],
}  # fmt: skip


def written(path, **changes):
    path.write_text(yaml.safe_dump(SMALL | changes))
    return path


def test_a_student_is_the_recipe_then_what_is_shared_then_its_own(tmp_path):
    own = {"recipe": "digits/sid", "settings": {"train.images": 96, "objective.alpha": 1.2}}
    spec = read_benchmark(written(tmp_path / "race.yaml", students={"sid": own}))
    run = spec.run("sid", 7)
    assert (run.train.images, run.train.batch_size, run.train.seed) == (96, 32, 7)
    assert (run.objective.alpha, run.teacher.path, run.evaluation.samples) == (1.2, "digits", 0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seeds": [0, 0]}, "seeds"),
        ({"metrics": ["recall"]}, "metrics"),
        ({"students": {"A b": {"recipe": "digits/sid"}}}, "A b"),
        ({"students": {}}, "students"),
        ({"extractors": ["clip"]}, "extractors"),
        ({"turns": 3}, "turns"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, changes, named):
    with pytest.raises(SettingsError, match=named):
        read_benchmark(written(tmp_path / "race.yaml", **changes))


def test_a_wrong_student_is_refused_before_anything_is_trained(tmp_path):
    spec = read_benchmark(
        written(tmp_path / "race.yaml", students={"x": {"recipe": "digits/sid", "settings": {"a": 1}}})
    )
    with pytest.raises(SettingsError, match=r"students\.x"):
        Race(spec, tmp_path / "out")
    with pytest.raises(EvaluationError, match="nobody"):
        Race(read_benchmark(written(tmp_path / "race.yaml")), tmp_path / "out", only=["nobody"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("world", sorted((ROOT / "benchmarks" / "worlds").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_world_is_valid(world):
    spec = read_benchmark(world)
    assert len(spec.seeds) >= 3
    assert [spec.run(name, seed).train.seed for name in spec.students for seed in (0, 1)] == [0, 1] * len(spec.students)


def student(name, *fids):
    return Line(name, "student", 1, {("pixels", "fid"): list(fids)})


def test_students_differ_beyond_the_pooled_spread():
    # two students, three seeds each, log FID with variance d^2 each: t(4 degrees of freedom) = 2.78, so 2.78 d sqrt(2 / 3)
    d = 0.1
    lines = [student("a", math.exp(-d), 1.0, math.exp(d)), student("b", 5 * math.exp(-d), 5.0, 5 * math.exp(d))]
    assert math.log(least_ratio(lines, "pixels")) == pytest.approx(2.78 * d * math.sqrt(2 / 3))
    assert least_ratio([student("a", 1.0), student("b", 2.0)], "pixels") is None
    teacher = Line("teacher", "teacher", 9, {("pixels", "fid"): [1.0, 100.0]})
    assert least_ratio([*lines, teacher], "pixels") == least_ratio(lines, "pixels")  # other lines add nothing to it


@pytest.mark.slow
@pytest.mark.timeout(900)  # five processes, which share the cores with other tests
def test_a_race_resumes_and_its_page_has_every_line(tmp_path, capsys):
    teacher = tmp_path / "teacher.safetensors"  # its samplers are written beside it
    for suffix in (".safetensors", ".json"):
        shutil.copy(ROOT / f"fewstep/assets/teachers/digits{suffix}", teacher.with_suffix(suffix))
    file, out = written(tmp_path / "race.yaml", teacher=str(teacher)), tmp_path / "out"
    assert main(["benchmark", str(file), "--out", str(out), "--device", "cpu"]) == 0
    assert "bad-seed0 failed" in capsys.readouterr().err
    page = (out / "README.md").read_text()
    for words in (
        "64 real training images",
        "teacher, 3 calls",
        "teacher, 1 call",
        "| sid | 1 |",
        "Not trained to its end: bad-seed0: fewstep distill: nothing to start from",
        "nothing is to be",
    ):
        assert words in page, words
    assert "nowhere.safetensors" in page
    fids = {
        line["name"]: line["scores"]["pixels/fid"] for line in json.loads((out / "results.json").read_text())["lines"]
    }
    assert fids["64 real training images"][0] < fids["sid"][0]
    assert (out / "samples.png").exists() and (out / "figures.png").exists()
    assert (out / "logs" / "sid-seed0" / "stats.jsonl").exists()
    race = Race(read_benchmark(file), out)
    assert race.finished(Student("sid", 0)) and not race.finished(Student("bad", 0))
    longer = SMALL["shared"] | {"train": SMALL["shared"]["train"] | {"images": 128}}
    assert not Race(read_benchmark(written(file, teacher=str(teacher), shared=longer)), out).finished(Student("sid", 0))
    with pytest.raises(FileError, match="samples 64, now 32"):
        Race(read_benchmark(written(file, teacher=str(teacher), samples=32)), out).run()
