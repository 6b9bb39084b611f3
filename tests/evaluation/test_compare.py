import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fewstep.evaluation.compare
from fewstep.cli.main import main
from fewstep.data import Digits, ImageDataset
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.solvers import Churn, Solver
from fewstep.evaluation.candidates import expand, load_candidate
from fewstep.evaluation.compare import compare, footnotes, table_of
from fewstep.evaluation.features import extractor_for
from fewstep.evaluation.reference import Reference
from fewstep.evaluation.small_features import Pixels
from fewstep.formats.model import save_denoiser, save_generator
from fewstep.students.sample import FewStep, ManyStep
from fewstep.system.errors import EvaluationError, FileError, SettingsError
from tests.support.console import unboxed
from tests.support.networks import TINY, randomised


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
    stochastic = expand([str(folder / "run")], [1], solver=Solver(churn=Churn(40.0)))
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
    with pytest.raises(EvaluationError, match="must be left out for a few-step generator"):
        load_candidate(str(folder / "run"), evaluations=5)
    bare = folder / "bare.safetensors"
    save_denoiser(bare, TINY["dit"].build(), TINY["dit"], {})
    with pytest.raises(EvaluationError, match="--reference"):
        compare([load_candidate(str(bare))], 10)
    with pytest.raises(EvaluationError, match="`repeat` and `samples` must be at least 1, got 0 and 10"):
        compare([load_candidate(str(bare))], 10, repeat=0)
    with pytest.raises(EvaluationError, match="must have one shape"):
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
    good = type(candidate)("good", Fixed(x), candidate.shape, candidate.conditioner, "a" * 64, candidate.provenance)
    bad = type(candidate)(
        "bad", Fixed(torch.randn_like(x)), candidate.shape, candidate.conditioner, "b" * 64, candidate.provenance
    )
    rows = compare([good, bad], 1797, bf16=False)
    assert rows[0]["fid"] < 0.01 < rows[1]["fid"]


@pytest.mark.parametrize(("factor", "warned"), [(1.0, False), (0.4, True)])
def test_a_student_beside_its_teacher_is_compared_with_it(folder, factor, warned):
    """Diversity and sharpness are ratios to the teacher's own samples; without its own teacher there are none."""
    student = load_candidate(str(folder / "run"))
    x = torch.randn(64, *student.shape) * 0.3

    def model(kind, sha256, scale, provenance):
        sampler = kind.__new__(kind)
        sampler.codec, sampler.calls, sampler.solver = None, 1, Solver()
        sampler.generator = type("Times", (), {"times": (1.0,)})()
        made = type(
            "Fixed", (kind,), {"__call__": lambda self, seeds, shape, **cond: scale * x[[s % 64 for s in seeds]]}
        )
        sampler.__class__ = made
        return type(student)(sha256, sampler, student.shape, student.conditioner, sha256, provenance)

    teacher, other = (model(ManyStep, name * 64, 1.0, {}) for name in "ab")
    shrunk = model(FewStep, "c" * 64, factor, student.provenance | {"teacher_sha256": "a" * 64})
    rows = compare([shrunk, teacher, other], 20, extractor="pixels", reference=None, metrics=("fid",))
    assert rows[0]["probe_diversity"] == pytest.approx(factor, abs=0.01)
    assert rows[0]["probe_sharpness"] == pytest.approx(factor, abs=0.02)
    assert ("diversity" in " ".join(rows[0]["warnings"])) == warned
    assert not any("probe_diversity" in row for row in rows[1:])
    assert not any(
        "probe_diversity" in row for row in compare([shrunk, other], 20, extractor="pixels", metrics=("fid",))
    )


def calls_of(candidates, out, **how):
    """Which models were sampled: a kept row says so instead."""
    made, notes = [], []
    rows = compare(candidates, 20, out, progress=lambda name, done: made.append(name), note=notes.append, **how)
    return sorted(set(made)), notes, rows


@pytest.mark.parametrize(
    "other",
    [
        {"metrics": ("kid",)},
        {"metrics": ("fid", "kid")},
        {"bf16": True},
        {"repeat": 2},
        {"extractor": "other weights"},
        {"reference": "other.npz"},
    ],
    ids=lambda how: next(iter(how)),
)
def test_a_row_is_kept_only_if_everything_that_changes_it_is_equal(folder, monkeypatch, other):
    monkeypatch.chdir(folder)
    if "extractor" in other:
        other = {"reference": "other-weights.npz"}
        weights = Pixels((1, 8, 8))
        weights.sha256 = "0" * 64
        Reference.from_dataset(Digits().load(), weights).save(folder / "other-weights.npz")
        real = fewstep.evaluation.compare.extractor_for
        chosen = lambda *given: weights if extractor_changed else real(*given)  # noqa: E731
        monkeypatch.setattr(fewstep.evaluation.compare, "extractor_for", chosen)
    if other.get("reference") == "other.npz":
        half = Digits().load()
        half = ImageDataset(name="half", images=half.images[::2])
        Reference.from_dataset(half, Pixels(half.shape)).save(folder / "other.npz")
    student, out, extractor_changed = expand([str(folder / "run")], []), folder / "r.json", False
    base = {"metrics": ("fid",)}
    assert calls_of(student, out, **base)[:2] == (["run"], [])
    made, (note,), _ = calls_of(student, out, **base)
    assert made == [] and note.startswith(f"run: kept from {out}, made 20")
    extractor_changed = True
    made, notes, rows = calls_of(student, out, **base | other)
    assert (made, notes) == (["run"], []), "measured differently, or another thing"
    assert calls_of(student, out, **base | other)[2] == rows
    assert len(json.loads(out.read_text())["rows"]) == 2


def test_another_level_of_the_same_weights_is_another_row(folder):
    """As a published generator's at another --sigma-init."""
    out = folder / "r.json"
    first = expand([str(folder / "run")], [])
    calls_of(first, out, metrics=("fid",))
    times = first[0].sampler.generator.times
    first[0].sampler.generator.times = (0.9, *times[1:])
    made, _, rows = calls_of(first, out, metrics=("fid",))
    assert made == ["run"] and rows[0]["times"] == [0.9, *times[1:]]


def test_warnings_stand_below_the_table_and_in_the_file(folder):
    rows = compare(expand([str(folder / "run")], [1]), 10, folder / "r.json", metrics=["fid", "kid"])
    warnings = json.loads((folder / "r.json").read_text())["rows"][0]["warnings"]
    assert [text.split(":")[0] for text in warnings] == [
        "10 images for 64 features",
        "KID on subsets of 10 instead of 1000",
    ]
    header, cells = table_of(rows)
    assert header[:4] == ["model", "calls", "FID", "KID × 10³"]
    assert [row[0] for row in cells] == ["teacher, 1 evaluation [1] [2]", "run [1] [2]"]
    notes = footnotes(rows)
    assert notes[0] == f"[1] warning: {warnings[0]}" and notes[1] == f"[2] warning: {warnings[1]}"
    assert notes[2:] == [f"protocol: {rows[0]['protocol']}"]


def test_warnings_of_all_repetitions_are_kept(folder, monkeypatch):
    from fewstep.evaluation import scorer as score

    texts = iter(["first", "second", "second"])
    real = score.evaluate
    monkeypatch.setattr(score, "evaluate", lambda *a, **k: replace(real(*a, **k), warnings=(next(texts),)))
    (row,) = compare(expand([str(folder / "run")], []), 100, metrics=["fid"], repeat=3)
    assert row["warnings"] == ["first", "second"]


def test_a_teacher_that_is_not_there_is_said(folder):
    notes = []
    (folder / "teacher.safetensors").rename(folder / "moved.safetensors")
    assert [c.name for c in expand([str(folder / "run")], [3], note=notes.append)] == ["run"]
    assert notes == [
        f"{folder / 'run'}: no row for its teacher, because {folder / 'teacher.safetensors'} is not on this machine"
    ]
    notes.clear()
    expand([str(folder / "run")], [], note=notes.append)
    assert notes == [], "none was asked for"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"evaluations": 0}, "`evaluations` must be at least 1, got 0"),
        ({"evaluations": -3}, "`evaluations` must be at least 1, got -3"),
        ({"guidance": -1.0}, "`guidance` must be a number of at least 0, got -1.0"),
        ({"guidance": math.nan}, "`guidance` must be a number of at least 0, got nan"),
        ({"sigma_init": 2.5}, "`sigma_init` must be given for published one-step generators only"),
        ({"prompts": Path("p")}, "takes no prompts, because it is not a text-to-image model"),
    ],
)
def test_settings_of_a_teacher_are_used_or_refused(folder, how, message):
    with pytest.raises(EvaluationError, match=message):
        load_candidate(str(folder / "teacher.safetensors"), **how)


@pytest.mark.parametrize(
    ("paths", "evaluations", "how", "message"),
    [
        (["run", "run"], [3], {}, "named once, got .*run twice"),
        (["run"], [], {"guidance": 2.0}, "`guidance` must be given with a teacher only"),
        (["run"], [], {"solver": Solver(churn=Churn(40.0))}, "`sampler` must be given with a teacher only"),
        (
            ["run"],
            [3],
            {"sigma_init": 2.5},
            "`sigma_init` must be given for published one-step generators only, got none",
        ),
        (["run"], [3], {"prompts": Path("p")}, "takes no prompts, because it is not a text-to-image model"),
        (["teacher.safetensors"], [], {}, "`evaluations` must be above 0 to score the teacher .*, got 0"),
        (["run", "teacher.safetensors"], [], {}, "to score the teacher"),
    ],
)
def test_settings_of_a_comparison_are_used_or_refused(folder, paths, evaluations, how, message):
    with pytest.raises(EvaluationError, match=message):
        expand([str(folder / path) for path in paths], evaluations, **how)


def test_guidance_zero_is_not_taken_for_none(folder):
    (teacher, _) = expand([str(folder / "run")], [1], guidance=0.0)
    assert teacher.guidance == 0.0 and teacher.name == "teacher, 1 evaluation, guidance 0"


def test_weights_that_are_not_finite_are_refused_by_name(folder):
    denoiser, spec = randomised(TINY["dit"]), TINY["dit"]
    generator = Generator(denoiser, [0.7])
    with torch.no_grad():
        next(generator.parameters()).flatten()[3] = math.nan
    file = folder / "broken.safetensors"
    save_generator(file, generator, spec, {})
    with pytest.raises((EvaluationError, FileError), match=r"broken.safetensors must hold finite weights"):
        load_candidate(str(file))


def test_samples_that_are_not_finite_are_refused_by_name(folder):
    (candidate,) = expand([str(folder / "run")], [])
    sound = candidate.sampler

    class Overflows(type(sound)):
        def __call__(self, seeds, shape, **cond):
            samples = super().__call__(seeds, shape, **cond)
            samples[torch.tensor([seed == 13 for seed in seeds])] = math.inf
            return samples

    broken = replace(candidate, sampler=Overflows(sound.generator))
    with pytest.raises(SettingsError, match=r"run: the sample of seed 13 is not finite \(NaN or infinity\)"):
        compare([broken], 20, metrics=["fid"])


def test_points_are_no_pictures_to_score():
    with pytest.raises(EvaluationError, match=r"samples must be pictures to be scored, got shape \[2\]"):
        extractor_for((2,))


def test_models_that_name_different_references_are_refused(folder):
    denoiser, spec = randomised(TINY["dit"]), TINY["dit"]
    save_generator(folder / "a.safetensors", Generator(denoiser, [0.7]), spec, {"reference": "other.npz"})
    both = [load_candidate(str(folder / "run")), load_candidate(str(folder / "a.safetensors"))]
    with pytest.raises(EvaluationError, match=r"one reference, got .*digits.npz, other.npz. Try: --reference"):
        compare(both, 20)
    compare(both, 20, reference=str(folder / "digits.npz"), metrics=["fid"])


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": 3}', '{"rows": [1]}', "{}"])
def test_a_file_that_holds_no_results_is_not_overwritten(folder, content):
    (folder / "notes.json").write_text(content)
    with pytest.raises(EvaluationError, match=r"notes.json is not a file of results.*Try: another --out"):
        compare(expand([str(folder / "run")], []), 20, folder / "notes.json")
    assert (folder / "notes.json").read_text() == content
    with pytest.raises(EvaluationError, match="got the folder"):
        compare(expand([str(folder / "run")], []), 20, folder)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"samples": 1}, "`samples` must be at least 2 for fid, got 1"),
        ({"samples": 3, "metrics": ["fid", "recall"]}, "`samples` must be at least 4 for recall, got 3"),
        ({"metrics": []}, "must name at least one"),
        ({"metrics": ["fid", "fid"]}, "must name each metric once, got fid twice"),
        ({"metrics": ["fid", "FID"]}, "must be of fid, kid, precision, recall, isc, density, coverage, got 'FID'"),
        ({"metrics": ["isc"]}, "must be inception for the Inception score"),
        ({"batch": 0}, "`batch` must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_sampling(folder, how, message):
    def sampled(name, done):
        raise AssertionError("sampled")

    with pytest.raises(EvaluationError, match=message):
        compare(expand([str(folder / "run")], []), **{"samples": 20} | how, progress=sampled)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--evaluations", "abc"], "each at least 1, got 'abc'"),
        (["--evaluations", "5,0"], "got '0' in '5,0'"),
        (["--evaluations=-1"], "got '-1'"),
        (["--evaluations", "3.5"], "got '3.5'"),
        (["--evaluations", "3,3"], "got 3 twice"),
        (["--evaluations", ""], "got ''"),
        (["--samples", "0"], "at least 1, got '0'"),
        (["--samples", "many"], "got 'many'"),
        (["--batch", "0"], "at least 1, got '0'"),
        (["--repeat", "0"], "at least 1, got '0'"),
        (["--guidance", "nan"], "must be a number of at least 0, got 'nan'"),
    ],
)
def test_options_of_eval_that_make_no_sense(folder, capsys, option, said):
    with pytest.raises(SystemExit):
        main(["eval", str(folder / "run"), "--processes", "1", "--out", str(folder / "r.json"), *option])
    assert said in unboxed(capsys.readouterr().err) and not (folder / "r.json").exists()


@pytest.mark.parametrize(
    "option", [["--evaluations", "0"], ["--evaluations", "abc"], ["--batch", "0"], ["--columns", "0"], ["--scale", "0"]]
)
def test_options_of_sample_that_make_no_sense(folder, capsys, option):
    with pytest.raises(SystemExit):
        main(["sample", str(folder / "teacher.safetensors"), "--out", str(folder / "s.png"), *option])
    assert "must be a whole number of at least 1, got" in capsys.readouterr().err and not (folder / "s.png").exists()


def test_eval_without_a_teacher_and_again(folder, capsys):
    command = [
        "eval",
        str(folder / "run"),
        "--processes",
        "1",
        "--samples",
        "20",
        "--metrics",
        "fid",
        "--out",
        str(folder / "r.json"),
    ]
    assert main([*command, "--evaluations", "0"]) == 0
    assert [row["name"] for row in json.loads((folder / "r.json").read_text())["rows"]] == ["run"]
    assert "[1] warning: 20 images for 64 features: the covariance is singular" in capsys.readouterr().out
    assert main([*command, "--evaluations", "2"]) == 0
    printed = capsys.readouterr().out
    assert "teacher, 2 evaluations" in printed and "run: kept from" in printed


def test_a_sampler_has_rows_of_its_own(folder, tmp_path, capsys):
    """From the command line: another sampler and range are other rows, named and kept apart."""
    out = tmp_path / "r.json"
    command = [
        "eval",
        str(folder / "teacher.safetensors"),
        "--samples",
        "50",
        "--metrics",
        "fid",
        "--evaluations",
        "3",
        "--out",
        str(out),
        "--processes",
        "1",
    ]
    assert main(command) == 0
    assert main([*command, "--sampler", "dpmpp-2m,0.03,40,7"]) == 0
    capsys.readouterr()
    rows = json.loads(out.read_text())["rows"]
    assert [row.get("sampler") for row in rows] == [None, "dpmpp-2m,0.03,40,7"]
    assert rows[1]["name"].endswith("3 evaluations, dpmpp-2m,0.03,40,7")
    for text, words in (
        ("dpm", "must be one of heun, euler, dpmpp-2m, unipc-2, unipc-3"),
        ("euler,a", "must have numbers"),
        ("euler,9,3", "sigma_min < sigma_max"),
    ):
        with pytest.raises(SystemExit):
            main([*command, "--sampler", text])
        assert words in unboxed(capsys.readouterr().err)
    assert main([*command, "--sampler", "euler", "--churn", "40"]) == 1
    assert "`churn` must come with the sampler `heun`" in capsys.readouterr().err
    assert main([*command, "--sampler", "euler,0.0001,40"]) == 1
    assert "within the model's 0.002 to 80" in capsys.readouterr().err
