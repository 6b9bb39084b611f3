import json

import pytest
import torch

from fewstep.cli.main import main
from fewstep.data import Digits, FashionMNIST
from fewstep.diffusion.solvers import Solver
from fewstep.evaluation.scorer import Scorer
from fewstep.evaluation.tuning import coarse, finer, validation_part
from fewstep.formats.model import save_denoiser
from fewstep.system.errors import EvaluationError
from tests.support.networks import TINY, randomised

SEARCH = ["--calls", "3,1", "--samples", "24", "--processes", "1"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A teacher of digits and the file of its samplers, from the command line."""
    pytest.importorskip("sklearn")
    file = tmp_path_factory.mktemp("tuned") / "teacher.safetensors"
    run = {"kind": "pretrain", "data": {"kind": "digits"}}
    save_denoiser(file, randomised(TINY["dit"]), TINY["dit"], {"run": run})
    assert main(["tune-sampler", str(file), *SEARCH]) == 0
    return file


def record(teacher):
    return json.loads(teacher.with_suffix(".samplers.json").read_text())


def copied(teacher, folder):
    for file in teacher.parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder / teacher.name


def test_the_best_is_the_least_of_those_scored_on_all_samples(tuned):
    found = record(tuned)
    assert "digits-validation-299" in found["about"]["reference"] and list(found["best"]) == ["3", "1"]
    for calls, best in found["best"].items():
        tries = [row for row in found["tries"] if str(row["calls"]) == calls]
        whole = [row["fid"] for row in tries if row["samples"] == 24]
        assert best["fid"] == min(whole) and len(whole) >= 3
        assert len([row for row in tries if row["samples"] == 6]) == len(coarse(int(calls), 0.002, 80.0))


def test_a_killed_search_resumes_and_ends_as_an_unbroken_one(tuned, tmp_path, monkeypatch, capsys):
    expected = record(tuned)
    teacher = copied(tuned, tmp_path)
    teacher.with_suffix(".samplers.json").unlink()
    score, made = Scorer.score, []

    def counted(self, *arguments, **options):
        if len(made) == 9:
            raise KeyboardInterrupt
        made.append(score(self, *arguments, **options))
        return made[-1]

    monkeypatch.setattr(Scorer, "score", counted)
    assert main(["tune-sampler", str(teacher), *SEARCH]) == 130
    assert len(record(teacher)["tries"]) == 9 and not record(teacher)["best"]
    made[:9] = [None] * 10
    assert main(["tune-sampler", str(teacher), *SEARCH]) == 0
    assert len(made) - 10 == len(expected["tries"]) - 9
    assert [record(teacher)[key] for key in ("tries", "best")] == [expected[key] for key in ("tries", "best")]
    assert "3,1" in capsys.readouterr().out


def test_the_best_sampler_is_used_and_named(tuned, tmp_path, capsys):
    best = Solver(**{k: v for k, v in record(tuned)["best"]["3"].items() if k not in ("fid", "samples")})
    command = [str(tuned), "--evaluations", "3"]
    for name, sampler in (
        ("a", "best"),
        ("b", ",".join([best.method, *(repr(v) if v else "model" for v in best.range)])),
    ):
        out = str(tmp_path / f"{name}.npz")
        assert main(["sample", *command, "--seeds", "0-3", "--sampler", sampler, "--out", out]) == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    said = capsys.readouterr()
    assert f"the best sampler of {tuned} at 3 call(s) is {best}" in said.err and str(best) in said.out
    out = tmp_path / "r.json"
    scored = ["--samples", "20", "--metrics", "fid", "--processes", "1", "--out", str(out), "--sampler", "best"]
    assert main(["eval", *command, *scored]) == 0
    assert json.loads(out.read_text())["rows"][0]["sampler"] == str(best)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda file: None, ["--evaluations", "2"], "must be known for 2 calls, got"),
        (lambda file: file.unlink(), ["--evaluations", "3"], "must be found before it is the best"),
        (lambda file: file.write_text("{"), ["--evaluations", "3"], "cannot be read as JSON"),
        (lambda file: file.write_text("[]"), ["--evaluations", "3"], "must hold fewstep samplers 1"),
        (
            lambda file: file.write_text(file.read_text().replace('"sha256": "', '"sha256": "0')),
            ["--evaluations", "3"],
            "must be of a teacher with sha256",
        ),
        (lambda file: None, ["--evaluations", "3", "--guidance", "2"], "must be of a teacher with guidance 2"),
        (lambda file: None, ["--evaluations", "3", "--churn", "40"], "`churn` must come with the sampler `heun`"),
    ],
)
def test_a_best_sampler_that_is_not_known_is_refused(tuned, tmp_path, capsys, change, options, words):
    teacher = copied(tuned, tmp_path)
    change(teacher.with_suffix(".samplers.json"))
    assert main(["sample", str(teacher), "--sampler", "best", *options, "--out", str(tmp_path / "s.png")]) == 1
    assert words in capsys.readouterr().err


def test_another_reference_is_another_search(tuned, capsys):
    assert main(["tune-sampler", str(tuned), *SEARCH, "--extractor", "small"]) == 1
    assert "must be of the same reference" in capsys.readouterr().err
    assert main(["tune-sampler", str(tuned), "--calls", "3,3"]) == 1
    assert "must name each number once" in capsys.readouterr().err


def test_the_validation_part_is_a_seeded_part_and_no_test_set():
    pytest.importorskip("sklearn")
    data, part = Digits().load(), validation_part(Digits())
    assert part.fingerprint == validation_part(Digits()).fingerprint != validation_part(Digits(), 1).fingerprint
    assert len(part) == 299 and part.labels is not None and part.labels.bincount().min() > 15
    whole = {image.numpy().tobytes() for image in data.images}
    assert all(image.numpy().tobytes() in whole for image in part.images)
    with pytest.raises(EvaluationError, match="got the test set"):
        validation_part(FashionMNIST(split="test"))


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 9, 35])
@pytest.mark.parametrize("ends", [(0.002, 80.0), (0.03, 14.6), (0.002, 1000.0)])
def test_every_sampler_of_the_search_is_one_of_the_model(calls, ends):
    first = coarse(calls, *ends)
    every = [*first, *(near for solver in first for near in finer(solver, calls, *ends))]
    assert 0 < len(set(first)) == len(first) <= 16
    for solver in every:
        low, high, _ = solver.range
        assert ends[0] <= (low or ends[0]) < (high or ends[1]) <= ends[1]
    assert torch.tensor([len(finer(solver, calls, *ends)) for solver in first]).max() <= 6
