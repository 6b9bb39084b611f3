import json

import pytest
import torch

from fewstep.compare import compare, expand, load_candidate, table_of
from fewstep.data import Digits
from fewstep.evaluate import EvaluationError, Reference
from fewstep.features import Pixels
from fewstep.generator import Generator
from fewstep.model import save_denoiser, save_generator
from fewstep.sampler import Churn
from tests.test_model import TINY, randomised


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("sklearn")
    digits = Digits().load()
    Reference.from_dataset(digits, Pixels(digits.shape)).save(tmp_path / "digits.npz")
    denoiser, spec = randomised(TINY["dit"]), TINY["dit"]
    card = {"reference": str(tmp_path / "digits.npz")}
    save_denoiser(tmp_path / "teacher.safetensors", denoiser, spec, card)
    (tmp_path / "run").mkdir()
    card = card | {"teacher": str(tmp_path / "teacher.safetensors")}
    save_generator(tmp_path / "run" / "student.safetensors", Generator(denoiser, [0.7, 0.4]), spec, card)
    return tmp_path


def test_teacher_and_student_stand_in_one_table(folder):
    candidates = expand([str(folder / "run")], [3, 1])
    assert [(c.name, c.sampler.calls) for c in candidates] == [
        ("teacher, 3 evaluations", 3),
        ("teacher, 1 evaluation", 1),
        ("run", 2),
    ]
    rows = compare(candidates, 100, folder / "results.json", batch=30, bf16=False)
    assert len({row["protocol"] for row in rows}) == 1
    assert all(row["fid"] > 0 and row["images_per_second"] > 0 and row["n"] == 100 for row in rows)
    assert [cells[1] for cells in table_of(rows)[1]] == ["3", "1", "2"]
    assert json.loads((folder / "results.json").read_text())["rows"] == rows


def test_numbers_do_not_depend_on_the_batch(folder):
    candidates = expand([str(folder / "run")], [])
    a, b = (compare(candidates, 60, batch=size, bf16=False)[0] for size in (60, 7))
    assert a["fid"] == pytest.approx(b["fid"], rel=1e-3)


def test_finished_rows_are_kept_and_others_made(folder):
    made = []
    candidates = expand([str(folder / "run")], [1])
    first = compare(candidates, 50, folder / "r.json", progress=lambda name, done: made.append(name))
    assert set(made) == {"teacher, 1 evaluation", "run"}
    made.clear()
    assert compare(candidates, 50, folder / "r.json", progress=lambda name, done: made.append(name)) == first
    assert made == []
    compare(candidates, 51, folder / "r.json", progress=lambda name, done: made.append(name))
    assert set(made) == {"teacher, 1 evaluation", "run"}, "another protocol is another row"
    assert len(json.loads((folder / "r.json").read_text())["rows"]) == 4
    stochastic = expand([str(folder / "run")], [1], churn=Churn(40.0))
    rows = compare(stochastic, 50, folder / "r.json")
    assert rows[0]["name"] == "teacher, 1 evaluation, stochastic" and rows[0]["churn"][0] == 40
    assert rows[0]["fid"] != first[0]["fid"] and rows[1] == first[1]
    assert len(json.loads((folder / "r.json").read_text())["rows"]) == 5


def test_repeated_scores_are_mean_and_spread_over_other_seeds(folder):
    student = expand([str(folder / "run")], [])
    (once,) = compare(student, 40, folder / "r.json")
    done = []
    (row,) = compare(student, 40, folder / "r.json", repeat=3, progress=lambda name, count: done.append(count))
    assert row["fid_each"][0] == once["fid"] and len(set(row["fid_each"])) == 3
    assert row["fid"] == pytest.approx(sum(row["fid_each"]) / 3) and row["seeds"] == "0..119" and max(done) == 120
    assert table_of([row])[1][0][2] == f"{row['fid']:.2f} ± {row['fid_spread']:.2f}"
    assert len(json.loads((folder / "r.json").read_text())["rows"]) == 2


def test_what_cannot_be_compared(folder):
    with pytest.raises(EvaluationError, match="a teacher's setting"):
        load_candidate(str(folder / "run"), evaluations=5)
    bare = folder / "bare.safetensors"
    save_denoiser(bare, TINY["dit"].build(), TINY["dit"], {})
    with pytest.raises(EvaluationError, match="--reference"):
        compare([load_candidate(str(bare))], 10)
    with pytest.raises(EvaluationError, match="0 x 10 samples"):
        compare([load_candidate(str(bare))], 10, repeat=0)
    with pytest.raises(EvaluationError, match="different shapes"):
        compare([load_candidate(str(bare)), load_candidate("fashion-mnist")], 10)


def test_without_a_reference_the_images_of_training_are_it(folder):
    """A run's own data block; Fashion-MNIST by name at the size of the samples."""
    denoiser, spec = randomised(TINY["dit"]), TINY["dit"]
    generator = Generator(denoiser, [0.7])
    save_generator(folder / "student.safetensors", generator, spec, {"run": {"data": {"kind": "digits"}}})
    (row,) = compare([load_candidate(str(folder / "student.safetensors"))], 20, extractor="pixels")
    given = compare([load_candidate(str(folder / "run"))], 20)[0]
    assert row["protocol"].split("/")[1:] == given["protocol"].split("/")[1:]
    save_generator(
        folder / "prepared.safetensors", generator, spec, {"run": {"data": {"kind": "prepared", "path": "p"}}}
    )
    with pytest.raises(EvaluationError, match="--reference"):
        compare([load_candidate(str(folder / "prepared.safetensors"))], 20)


def test_a_better_model_scores_better(folder):
    """Against the digits, a generator that returns noise must lose to one that returns the data's mean and spread."""
    digits = Digits().load()
    x, _ = digits.batch(torch.arange(1797))

    class Fixed:
        def __init__(self, images):
            self.images, self.calls, self.codec = images, 1, None

        def __call__(self, seeds, shape, **cond):
            return self.images[list(seeds)]

    candidate = load_candidate(str(folder / "run"))
    good = type(candidate)("good", Fixed(x), candidate.shape, candidate.conditioner, "a" * 64, candidate.card)
    bad = type(candidate)(
        "bad", Fixed(torch.randn_like(x)), candidate.shape, candidate.conditioner, "b" * 64, candidate.card
    )
    rows = compare([good, bad], 1797, bf16=False)
    assert rows[0]["fid"] < 0.01 < rows[1]["fid"]
