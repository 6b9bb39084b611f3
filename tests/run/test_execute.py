"""A run folder resumes from any place, moves with what it was trained with, and is not blocked by a start that failed."""

import dataclasses
import json
import shutil

import pytest
import yaml

from fewstep.cli.main import main
from fewstep.diffusion.noise import Karras
from fewstep.formats.model import save_denoiser
from fewstep.methods.pairs import PairSet, make_pairs
from fewstep.run.paths import PLACES, anchored, value_of
from fewstep.run.settings import load_run
from fewstep.system.checkpoint import Checkpoints
from fewstep.system.errors import FileError, SettingsError
from fewstep.teachers import NativeTeacher
from tests.support.networks import TINY, randomised

RUN = {
    "kind": "distill",
    "teacher": {"kind": "native", "path": "teachers/one"},
    "generator": {"sigmas": [2.5]},
    "objective": {"method": "sid"},
    "train": {
        "images": 8, "batch_size": 4, "precision": "fp32", "device": "cpu", "evaluate_every": None, "log_every": 4,
        "checkpoint_every": 4, "threads": 1,
    },
    "evaluation": {"samples": 0},
}  # fmt: skip


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A working directory with two teachers and a run file."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / "teachers" / name).mkdir(parents=True)
        save_denoiser(tmp_path / "teachers" / name / "teacher.safetensors", randomised(TINY["dit"]), TINY["dit"], {})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RUN))
    return tmp_path


def distil(*arguments):
    return main(["distill", *map(str, arguments), "--processes", "1"])


def images(folder):
    return Checkpoints.images_of(Checkpoints(folder / "checkpoints").latest())


def test_a_run_resumes_from_any_working_directory(world, monkeypatch):
    assert distil("recipe.yaml", "--out", "run") == 0
    assert load_run(world / "run").teacher.path == str(world / "teachers" / "one")
    (world / "elsewhere").mkdir()
    monkeypatch.chdir(world / "elsewhere")
    assert distil("../run", "--out", "../run", "--train.images", "12") == 0
    assert images(world / "run") == 12
    assert distil("../run", "--train.images", "16") == 0, "a run folder that has trained is its own --out"
    assert images(world / "run") == 16 and not (world / "elsewhere" / "runs").exists()


def test_what_was_moved_is_named_and_its_new_place_accepted(world, capsys):
    assert distil("recipe.yaml", "--out", "run") == 0
    shutil.move(world / "run", world / "moved")
    shutil.move(world / "teachers" / "one", world / "teachers" / "uno")
    assert distil("moved", "--train.images", "12") == 1
    said = capsys.readouterr().err
    assert f"teacher.path {world / 'teachers' / 'one'} no longer exists" in said
    assert "--teacher.path NEW_PLACE" in said
    assert distil("moved", "--train.images", "12", "--teacher.path", "teachers/two") == 1
    assert "`teacher.path` must name what moved was trained with" in capsys.readouterr().err
    assert images(world / "moved") == 8
    assert distil("moved", "--train.images", "12", "--teacher.path", "teachers/uno") == 0
    assert images(world / "moved") == 12
    assert load_run(world / "moved").teacher.path == str(world / "teachers" / "uno"), "the next start finds it"
    assert load_run(world / "moved").train.images == 8, "run.yaml keeps the first length"


def test_another_teacher_in_the_same_place_is_refused(world, capsys):
    assert distil("recipe.yaml", "--out", "run") == 0
    shutil.rmtree(world / "teachers" / "one")
    shutil.copytree(world / "teachers" / "two", world / "teachers" / "one")
    assert distil("recipe.yaml", "--out", "run", "--train.images", "12") == 1
    assert "got another (sha256" in capsys.readouterr().err
    assert images(world / "run") == 8


def test_a_start_that_failed_does_not_block_the_folder(world, capsys):
    assert distil("recipe.yaml", "--out", "run", "--teacher.path", "teachers/none") == 1
    assert not (world / "run" / "run.yaml").exists()
    assert distil("recipe.yaml", "--out", "run") == 0


def test_a_start_without_a_checkpoint_does_not_block_the_folder(world):
    """Killed before the first checkpoint: run.yaml, a log, a lock and pictures are there."""
    assert distil("recipe.yaml", "--out", "run", "--objective.alpha", "0.5") == 0
    shutil.rmtree(world / "run" / "checkpoints")
    pictures = world / "run" / "pictures"
    for name in ("student-000000000999.png", "mine.png"):
        (pictures / name).touch()
    assert distil("recipe.yaml", "--out", "run") == 0
    assert load_run(world / "run").objective.alpha == 1.0 and images(world / "run") == 8
    assert (pictures / "mine.png").exists() and (pictures / "student-000000000008.png").exists()
    assert not (pictures / "student-000000000999.png").exists()


def test_a_folder_with_a_recipe_of_the_users_own_is_not_overwritten(world, capsys):
    (world / "mine").mkdir()
    text = "# my own notes\n" + yaml.safe_dump(RUN)
    (world / "mine" / "run.yaml").write_text(text)
    assert distil("recipe.yaml", "--out", "mine", "--objective.alpha", "0.5") == 1
    assert "holds a run with other settings (objective.alpha" in capsys.readouterr().err
    assert (world / "mine" / "run.yaml").read_text() == text


def test_settings_still_may_not_change_after_a_checkpoint(world, capsys):
    assert distil("recipe.yaml", "--out", "run") == 0
    assert distil("recipe.yaml", "--out", "run", "--objective.alpha", "0.5") == 1
    assert "objective.alpha was 1.0, now 0.5" in capsys.readouterr().err


def test_every_place_is_anchored_and_names_are_not(world):
    for name in ("prompts", "pairs", "photos", "clip"):
        (world / name).mkdir()
    run = load_run("recipe.yaml").model_copy(
        update={"pairs": world.__class__("pairs"), "start_from": world.__class__("nowhere")}
    )
    found = anchored(run)
    assert value_of(found, "pairs") == world / "pairs" and str(value_of(found, "start_from")) == "nowhere"
    assert value_of(found, "teacher.path") == str(world / "teachers/one")
    shipped = run.model_copy(update={"teacher": NativeTeacher(path="digits")})
    assert value_of(anchored(shipped), "teacher.path") == "digits"
    assert {"teacher.path", "teacher.prompts", "data.path", "evaluation.reference"} <= set(PLACES)


# ----------------------------------------------------------------------------------------------------------- run files


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("evaluation: {samples: no}", "evaluation.samples: must be a number, got false"),
        ("generator: {sigmas: [on]}", "generator.sigmas.0: must be a number, got true"),
        ("objective: {method: sid, alpha: .nan}", "objective.alpha: must be a finite number, got nan"),
        ("generator: {sigmas: [.inf]}", "generator.sigmas.0: must be a finite number, got inf"),
        ("generator: {sigmas: [1, 2]}", "sigmas must hold a level for each call and fall strictly"),
        ("generator: {sigmas: []}", "sigmas must hold a level for each call and fall strictly"),
        ("train: {images: 010}", "YAML reads 010 as 8"),
        ("train: {images: 8}\nkind: distill", "given once, got it in lines"),
    ],
)
def test_run_files_that_say_something_else_are_refused(tmp_path, change, words):
    (tmp_path / "run.yaml").write_text("kind: distill\n" + change + "\n")
    with pytest.raises(SettingsError, match=words):
        load_run(tmp_path / "run.yaml")


def test_exponents_are_numbers_in_run_files(tmp_path):
    (tmp_path / "run.yaml").write_text("kind: distill\ntrain: {images: 1e3}\noptim: {critic: {lr: 1e-4}}\n")
    run = load_run(tmp_path / "run.yaml")
    assert run.train.images == 1000 and run.optim.critic.lr == 1e-4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--objective.alpha", "nan"], "must be a finite number"),
        (
            ["--generator.sigmas", "81"],
            r"generator.sigmas must lie between the model's sigma_min 0.002 and sigma_max 80, got 81",
        ),
        (["--generator.sigmas", "0.001"], "got 0.001"),
    ],
)
def test_settings_on_the_command_line_are_not_clamped(tmp_path, capsys, arguments, words):
    assert main(["distill", "digits/sid", "--out", str(tmp_path / "r"), "--processes", "1", *arguments]) == 1
    assert words.replace("\\", "") in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- pairs


def test_pairs_of_other_guidance_and_too_few_of_them(world):
    teacher = NativeTeacher(path="teachers/one").load()
    make_pairs(teacher, world / "p", 6, evaluations=1, guidance=1.5, shard=4)
    for guidance in (None, 1.0, 3.0):
        with pytest.raises(FileError, match="must be made with this run's guidance"):
            PairSet(world / "p", teacher, guidance)
    before = {path.name: path.read_bytes() for path in (world / "p").iterdir()}
    assert make_pairs(teacher, world / "p", 2, evaluations=1, guidance=1.5, shard=4) == 2
    assert {path.name: path.read_bytes() for path in (world / "p").iterdir()} == before, "fewer leave what is there"
    assert len(PairSet(world / "p", teacher, 1.5)) == 6
    about = json.loads((world / "p" / "pairs.json").read_text())
    assert "prompts_sha256" not in about
    (world / "p" / "pairs.json").write_text(json.dumps(about | {"guidance": None}))
    PairSet(world / "p", teacher, 1.0)  # no guidance and a scale of one are the same
    spec = teacher.student_spec.model_copy(update={"schedule": Karras(sigma_max=50.0)})  # the same weights, other noise
    other = dataclasses.replace(teacher, student_spec=spec)
    with pytest.raises(FileError, match="must be made with this run's noise levels and prediction"):
        PairSet(world / "p", other)
    with pytest.raises(FileError, match="hold pairs made with"):
        make_pairs(other, world / "p", 6, evaluations=1, shard=4)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"count": -3}, {"evaluations": 0}, {"shard": 0}, {"batch": 0}])
def test_numbers_of_pairs_below_one(world, wrong):
    teacher = NativeTeacher(path="teachers/one").load()
    with pytest.raises(FileError, match=f"`{next(iter(wrong))}` must be at least 1"):
        make_pairs(teacher, world / "p", **{"count": 2, "evaluations": 1} | wrong)
    assert not (world / "p").exists()
