"""Folders that commands write: never one with the user's own files, nor one of another kind."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from fewstep.cli.main import main
from fewstep.formats.model import DenoiserSpec, import_model, save_denoiser
from fewstep.networks import SongUNetSpec
from fewstep.system.errors import FileError
from fewstep.system.files import atomic_write
from fewstep.system.out_folder import MARKER, check_out, marker, write_marker
from fewstep.system.tensors import entries_of, write_entries
from fewstep.system.weights import load_weights
from fewstep.teachers import NativeTeacher
from tests.support.networks import TINY, randomised
from tests.support.published import write_published

SONG = DenoiserSpec(
    net=SongUNetSpec(
        size=8, channels=1, num_classes=3, model_channels=32, channel_mult=(1,), num_blocks=1, attn_resolutions=()
    )
)
KINDS = ("run", "pairs", "prepared", "export", "samples", "import")


@pytest.fixture
def pictures(tmp_path):
    """A folder of somebody's own pictures, one named as a sample is."""
    folder = tmp_path / "holiday"
    folder.mkdir()
    for name in ("beach.png", "000001.png"):
        Image.new("L", (28, 28), 7).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A published one-step generator in our own format."""
    folder = tmp_path_factory.mktemp("student")
    write_published(folder / "s.pkl", randomised(SONG))
    return import_model(folder / "s.pkl", folder / "imported", 2.5)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_other_things_are_refused(pictures, tmp_path, kind):
    with pytest.raises(FileError, match=r"must be new, empty, .* got other files \(000001.png, beach.png\)"):
        check_out(pictures, kind)
    for other in KINDS:
        folder = tmp_path / other
        folder.mkdir(exist_ok=True)
        write_marker(folder, other)
        if other == kind:
            check_out(folder, kind)
        else:
            with pytest.raises(FileError, match="must be new, empty"):
                check_out(folder, kind)


def test_new_and_empty_folders_are_fine_and_nothing_is_created(tmp_path):
    check_out(tmp_path / "new" / "deep", "run")
    check_out(tmp_path, "run")
    (tmp_path / ".DS_Store").touch()
    check_out(tmp_path, "run")
    assert [path.name for path in tmp_path.iterdir()] == [".DS_Store"]


def test_files_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=r"`--out` must be a folder, got the file .*/file\."):
        check_out(tmp_path / "file", "run")
    with pytest.raises(FileError, match=r"got the file .*, so .*below cannot be made"):
        check_out(tmp_path / "file" / "below", "run")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    with pytest.raises(FileError, match="must be a folder"):
        check_out(tmp_path / "dangling", "run")


def test_a_place_that_may_not_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda place, mode: False)
    with pytest.raises(FileError, match="must be writable"):
        check_out(tmp_path / "new", "run")


def test_a_marker_of_somebody_else_is_none(tmp_path):
    (tmp_path / MARKER).write_text("[1, 2")
    assert marker(tmp_path) == {}
    with pytest.raises(FileError, match="got other files"):
        check_out(tmp_path, "export")


@pytest.mark.parametrize(
    "command",
    [
        ("distill", "mixture/sid", "--processes", "1"),
        ("pretrain", "digits/teacher", "--processes", "1"),
        ("demo", "--processes", "1"),
        ("pairs", "digits/sid", "--count", "1", "--evaluations", "1", "--processes", "1"),
        ("sample", "digits", "--seeds", "0-1", "--evaluations", "1"),
    ],
    ids=lambda command: command[0],
)
def test_commands_leave_other_folders_alone(pictures, command, capsys):
    before = content(pictures)
    assert main([*command, "--out", str(pictures)]) == 1
    assert "must be new, empty" in capsys.readouterr().err
    assert content(pictures) == before


def test_samples_may_be_added_to_samples(tmp_path):
    for seeds in ("0-1", "2"):
        assert main(["sample", "digits", "--seeds", seeds, "--evaluations", "1", "--out", str(tmp_path / "s")]) == 0
    assert sorted(path.name for path in (tmp_path / "s").glob("*.png")) == [f"{n:06d}.png" for n in range(3)]


def test_imports_and_exports_leave_other_folders_alone(pictures, student, tmp_path, capsys):
    published = student.parent.parent / "s.pkl"
    assert main(["import", str(published), "--sigma-init", "2.5", "--out", str(pictures)]) == 1
    assert main(["export", str(student), "--out", str(pictures)]) == 1
    assert capsys.readouterr().err.count("must be new, empty") == 2
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("kind: distill")
    assert main(["import", str(published), "--sigma-init", "2.5", "--out", str(tmp_path / "run")]) == 1
    assert "got a run" in capsys.readouterr().err


def test_an_import_never_replaces_another_model(student, tmp_path):
    published = student.parent.parent / "s.pkl"
    again = import_model(published, student.parent, 2.5)
    assert again == student
    write_published(tmp_path / "other.pkl", randomised(SONG))
    before = load_weights(student)[1]["sha256"]
    with pytest.raises(ValueError, match=r"must be new or an import of other.pkl, got a model of s.pkl"):
        import_model(tmp_path / "other.pkl", student.parent, 2.5)
    assert load_weights(student)[1]["sha256"] == before


def test_settings_that_a_file_has_no_use_for_are_refused(student, tmp_path, capsys):
    assert main(["import", str(student), "--sigma-init", "2.5", "--out", str(tmp_path / "a")]) == 1
    assert "`sigma_init` must be left out for" in capsys.readouterr().err
    assert main(["import", str(student), "--timesteps", "999", "--out", str(tmp_path / "a")]) == 1
    assert "--timesteps must be given with --pipeline" in capsys.readouterr().err


def test_a_student_is_no_teacher_and_a_teacher_no_student(student, tmp_path, capsys):
    for path in (student, student.parent):
        with pytest.raises(ValueError, match=r"must be a teacher .*, got a few-step student"):
            NativeTeacher(path=str(path)).load()
        with pytest.raises(ValueError, match=r"must be a teacher .*, got a few-step student"):
            NativeTeacher(path=str(path)).outline()
    for command in ("distill", "plan"):
        arguments = ["--teacher.path", str(student), "--processes", "1", "--out", str(tmp_path / "r")]
        assert main([command, "digits/sid", *arguments]) == 1
        assert "got a few-step student" in capsys.readouterr().err
    assert not (tmp_path / "r" / "run.yaml").exists()
    save_denoiser(tmp_path / "teacher.safetensors", randomised(TINY["dit"]), TINY["dit"], {})
    assert json.loads((tmp_path / "teacher.json").read_text())["metadata"]["kind"] == "denoiser"
    for command in (["export"], ["ui"]):
        assert (
            main(
                [
                    *command,
                    str(tmp_path / "teacher.safetensors"),
                    *(["--out", str(tmp_path / "e")] if command == ["export"] else []),
                ]
            )
            == 1
        )
        assert "must be a few-step student" in capsys.readouterr().err


def test_a_write_removes_what_a_killed_process_left_of_the_same_file(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [
        tmp_path / f".tmp-a.json-{gone.pid}",
        tmp_path / f".tmp-b.json-{gone.pid}",
        tmp_path / f".tmp-a.json-{os.getppid()}",
    ]
    for file in left:
        file.write_text("half")
    atomic_write(tmp_path / "a.json", "{}")
    # another file's is not looked for, and a process that lives may still be writing
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([left[1].name, left[2].name, "a.json"])
    (tmp_path / f".tmp-w.safetensors-{gone.pid}").write_text("half")
    write_entries(tmp_path / "w.safetensors", entries_of({"x": torch.zeros(1)}))
    assert not (tmp_path / f".tmp-w.safetensors-{gone.pid}").exists()
