"""The library as its users type it: every way to load, sample, score and train, and the mistakes that they make."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep
from fewstep.cli.main import main
from fewstep.diffusion.generator import Generator
from fewstep.formats.model import save_denoiser, save_generator
from fewstep.system.errors import UserError
from fewstep.teachers import NativeTeacher
from tests.support.networks import TINY, randomised

NAMES = ("zero", "one", "two, or three", *(f"class {index}" for index in range(3, 10)))


@pytest.fixture
def run(tmp_path):
    """A run folder with a two-call student of 8x8 grey pictures with ten classes."""
    (tmp_path / "run").mkdir()
    generator = Generator(randomised(TINY["dit"]), [0.7, 0.4])
    save_generator(tmp_path / "run" / "student.safetensors", generator, TINY["dit"], {"class_names": NAMES})
    return tmp_path / "run"


@pytest.fixture
def images(tmp_path):
    """Forty random pictures of the same shape."""
    folder, draw = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for index in range(40):
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def test_import_alone_loads_no_torch():
    program = (
        "import sys, fewstep; assert 'load' in dir(fewstep) and fewstep.__version__; print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"]


def test_every_name_is_there_and_no_other():
    assert all(getattr(fewstep, name).__doc__ for name in fewstep.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        fewstep.lode  # noqa: B018


def test_pictures_of_a_student(run, tmp_path):
    student = fewstep.load(run)
    assert student.is_student and student.calls == 2 and student.shape == (1, 8, 8) and student.classes == NAMES
    assert "2 network calls" in repr(student)
    pictures = student.sample(seeds=range(6), classes="one")
    assert pictures.tensor.shape == (6, 1, 8, 8) and pictures.tensor.dtype == torch.uint8
    assert pictures.seeds == (0, 1, 2, 3, 4, 5) and pictures.labels.tolist() == [1] * 6
    assert len(pictures) == len(pictures.images) == len(list(pictures)) == 6
    assert pictures[-1].size == (8, 8) and len(pictures[2:4]) == 2 and pictures[2:4].names == ("one", "one")
    assert np.array_equal(np.asarray(pictures[1]), pictures.tensor[1, 0])
    shown = Image.open(io.BytesIO(pictures._repr_png_()))
    assert shown.width > 6 * 64 and "6 of 8x8 pixels" in repr(pictures)
    with pytest.raises(IndexError):
        pictures[6]
    assert Image.open(pictures.save(tmp_path / "x.png")).size[0] > 16
    assert np.load(pictures.save(str(tmp_path / "x.npz")))["labels"].tolist() == [1] * 6
    assert len(list(pictures.save(tmp_path / "folder").glob("*.png"))) == 6


def test_the_command_line_draws_the_same(run, tmp_path):
    assert main(["sample", str(run), "--seeds", "3,7", "--classes", "1", "--out", str(tmp_path / "cli.npz")]) == 0
    stored = np.load(tmp_path / "cli.npz")["images"]
    student = fewstep.load(str(run))
    for drawn in (student.sample("3,7", classes=1), student.sample([3, 7], classes=["one"], batch=1)):
        assert np.array_equal(drawn.tensor.permute(0, 2, 3, 1), stored)
    assert np.array_equal(student.sample(7, classes=1).tensor[0], student.sample([3, 7], classes=1).tensor[1])
    assert fewstep.sample(run, 3, classes=1).tensor.equal(student.sample(3, classes=1).tensor)
    assert student.sample(0, classes="two, or three").labels.tolist() == [2]
    assert student.sample(range(12)).labels.tolist() == [*range(10), 0, 1]


def test_noise_instead_of_seeds(run):
    student, noise = fewstep.load(run), torch.randn(2, 3, 1, 8, 8)
    drawn = student.sample(noise=noise, classes=1)
    with torch.no_grad():
        expected = student._found.generator(list(noise), labels=torch.tensor([1, 1, 1]))
    assert drawn.tensor.equal(((expected.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    assert student.sample(noise=noise[0], classes=1, batch=1).tensor.shape == (3, 1, 8, 8)


def test_precision_and_device(run):
    student = fewstep.load(run, device="cpu")
    exact = student.sample(4).tensor.int()
    assert student.to("cpu", torch.bfloat16) is student and "bfloat16" in repr(student)
    rough = student.sample(4).tensor.int()
    assert 0 < (exact - rough).abs().max() < 40
    assert student.to(torch.float32).sample(4).tensor.int().equal(exact)


def test_a_shipped_teacher_and_a_file(tmp_path):
    teacher = fewstep.load("digits")
    assert not teacher.is_student and teacher.classes[3] == "3"
    assert teacher.sample(range(2), classes="3", evaluations=3, guidance=1.5).tensor.shape == (2, 1, 8, 8)
    save_denoiser(tmp_path / "teacher.safetensors", randomised(TINY["dit"]), TINY["dit"], {})
    assert fewstep.load(tmp_path / "teacher.safetensors").sample(0, evaluations=1).tensor.shape == (1, 1, 8, 8)
    noise = torch.randn(2, 1, 8, 8)
    assert len(teacher.sample(noise=noise, evaluations=3)) == 2


def test_scores(run, images):
    scores = fewstep.evaluate(run, reference=images, samples=40, metrics=["fid", "kid"], extractor="pixels")
    assert isinstance(scores, fewstep.Scores) and scores.fid > 0 and scores.n == 40 and scores.recall is None
    assert "pixels" in scores.protocol
    again = fewstep.evaluate(fewstep.load(run), images, samples=40, metrics=("fid",), extractor="pixels")
    assert again.fid == scores.fid


def test_distil_with_keywords(tmp_path):
    small = {"images": 64, "batch_size": 32, "checkpoint_every": 64, "evaluate_every": None, "device": "cpu"}
    spec = TINY["dit"]
    save_denoiser(tmp_path / "t.safetensors", randomised(spec), spec, {})
    out = tmp_path / "student"
    student = fewstep.distill(
        "digits/sid", teacher=tmp_path / "t.safetensors", out=out, train=small, data=None,
        objective={"alpha": 1.2}, **{"evaluation.samples": 0},
    )  # fmt: skip
    assert student.is_student and student.calls == 1
    run = student.provenance["run"]
    assert (
        run["objective"]["alpha"] == 1.2
        and run["train"]["images"] == 64
        and run["teacher"]["path"].endswith("t.safetensors")
    )
    assert fewstep.load(out).sample(1).tensor.equal(student.sample(1).tensor)


def test_another_method_begins_with_its_own_settings():
    from fewstep.library.runs import changed
    from fewstep.run.settings import load_run

    run = changed(
        load_run("digits/sid"), {"objective": {"method": "dmd2", "critic_steps": 3}, "generator.sigmas": [5.0, 1.0]}
    )
    assert run.objective.method == "dmd2" and run.objective.critic_steps == 3 and run.generator.sigmas == (5.0, 1.0)
    assert isinstance(changed(run, {"teacher": NativeTeacher(path="digits")}).teacher, NativeTeacher)


def test_a_student_on_pixels_is_exported_for_others(run, tmp_path):
    student = fewstep.load(run)
    files = student.export(tmp_path / "out", license="cc0-1.0")
    assert [file.name for file in files] == ["student.safetensors", "student.json", "samples.png", "README.md"]
    again = fewstep.load(tmp_path / "out")
    assert again.calls == 2 and again.classes == NAMES and again.sample(5).tensor.equal(student.sample(5).tensor)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: cc0-1.0" in card and "classes='zero'" in card and str(tmp_path) not in card + files[1].read_text()


MISTAKES = {
    "path": (lambda run, _: fewstep.load(run.parent / "rum"), r"must be a run folder.* does not exist.*Did you mean .*run\?"),
    "name": (lambda *_: fewstep.load("digit"), r"Did you mean digits\?"),
    "no checkpoint": (lambda run, _: fewstep.load(_begun(run)), "saved none yet"),
    "class": (lambda run, _: fewstep.load(run).sample(0, classes="clas 3"), r"`classes` must .*got 'clas 3'. Did you mean class 3\?"),
    "prompt": (lambda run, _: fewstep.load(run).sample(prompts="a cat"), r"`prompts` must be left out .*Try: classes='zero'"),
    "both": (lambda run, _: fewstep.load(run).sample(prompts="a", classes=1), "must not be given together"),
    "negative": (lambda run, _: fewstep.load(run).sample(negative_prompt="a"), "`negative_prompt` must come with prompts"),
    "empty prompt": (lambda run, _: fewstep.load(run).sample(prompts=[" "]), "`prompts` must be one or more texts"),
    "seeds": (lambda run, _: fewstep.load(run).sample([0.5]), r"`seeds` must be whole numbers.*got \[0.5\]"),
    "negative seed": (lambda run, _: fewstep.load(run).sample(-1), "`seeds` must be whole numbers of at least 0, got -1"),
    "noise and seeds": (lambda run, _: fewstep.load(run).sample(1, noise=torch.zeros(1, 1, 8, 8)), "together"),
    "noise": (lambda run, _: fewstep.load(run).sample(noise=torch.zeros(3, 8)), r"`noise` must be a tensor \[N, 1, 8, 8\]"),
    "more noise": (lambda run, _: fewstep.load(run).sample(noise=torch.zeros(3, 1, 1, 8, 8)), r"at most 2 call"),
    "endless noise": (lambda run, _: fewstep.load(run).sample(noise=torch.full((1, 1, 8, 8), torch.nan)), "finite"),
    "calls": (lambda run, _: fewstep.load(run).sample(0, evaluations=9), "left out for the few-step student"),
    "size": (lambda run, _: fewstep.load(run).sample(0, size=(8, 8)), "`size` must be left out"),
    "batch": (lambda run, _: fewstep.load(run).sample(0, batch=0), "`batch` must be at least 1"),
    "dtype": (lambda run, _: fewstep.load(run).to(dtype=torch.float16), "`dtype` must be torch.float32 or torch.bfloat16"),
    "device": (lambda run, _: fewstep.load(run).to("gpu"), "`device` must be"),
    "sigma": (lambda run, _: fewstep.load("digits", sigma_init=2.5), "`sigma_init` must be given for published"),
    "ending": (lambda run, _: fewstep.load(run).sample(0).save(run / "x.gif"), "`path` must be a .png"),
    "columns": (lambda run, _: fewstep.load(run).sample(0).grid(0), "`columns` must be at least 1"),
    "none": (lambda run, _: fewstep.load(run).sample([]).grid(), "at least one picture, got none"),
    "export": (lambda run, _: fewstep.load(run).export(run / "x", formats=["lora"]), "must be a text-to-image student"),
    "teacher's export": (lambda run, _: fewstep.load("digits").export(run / "x"), "`export` must be asked of a few-step student"),
    "pipeline": (lambda run, _: fewstep.load(run).pipeline, "must be a text-to-image student"),
    "extractor": (lambda run, images: fewstep.evaluate(run, images, extractor="pixel"), "`extractor` must be"),
    "reference": (lambda run, _: fewstep.evaluate(run, samples=9), "`--reference` must be given"),
    "setting": (lambda *_: fewstep.distill("digits/sid", train={"imags": 1}), r"settings:\n  train.imags: unknown key.*images"),
    "value": (lambda *_: fewstep.distill("digits/sid", **{"objective.alpha": "high"}), r"objective.alpha: "),
    "kind": (lambda *_: fewstep.distill("digits/teacher"), "Try: fewstep.pretrain"),
    "recipe": (lambda *_: fewstep.distill("digits/sib"), "must be a run file or a shipped recipe"),
    "prompts": (lambda run, _: fewstep.distill("digits/sid", prompts=run), "`prompts` must be given for a text-to-image teacher"),
}  # fmt: skip


def _begun(run):
    (run / "student.safetensors").unlink()
    (run / "run.yaml").write_text("kind: distill\n")
    return run


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_explained(name, run, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    do, said = MISTAKES[name]
    with pytest.raises(ValueError, match=f"(?s){said}") as found:
        do(run, images)
    assert (
        isinstance(found.value, UserError) or type(found.value) is ValueError
    )  # what the command line prints as one line


def test_progress_is_shown_only_where_it_takes_long(capsys):
    from fewstep.library.sampling import Patience

    for after, shown in ((60.0, False), (0.0, True)):
        with Patience("sample", 4, after=after) as patience:
            patience.update(2)
            patience.update(4)
        assert ("2/4 images" in capsys.readouterr().err) is shown
