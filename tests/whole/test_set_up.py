"""What `make` says where it cannot set up `.venv`, and that it completes what an interrupted set-up left."""

import subprocess
import sys
from pathlib import Path

from tests.support.places import ROOT


def set_up(python: object, folder: Path, requirement: str = ".") -> str:
    """What a failing set-up says on stderr."""
    command = ["sh", str(ROOT / "tools" / "set_up.sh"), str(python), str(folder), requirement]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr


def pretend(file: Path, fails: str) -> Path:
    """A Python 3.9 by its own word, all of whose commands succeed but those that contain a word."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'#!/bin/sh\ncase "$*" in --version) echo Python 3.9.18 ;; *"{fails}"*) exit 1 ;; esac\n')
    file.chmod(0o755)
    return file


def test_no_python(tmp_path):
    said = set_up(tmp_path / "python3", tmp_path / "venv")
    assert said == (
        f"fewstep: PYTHON must be a Python that runs, got {tmp_path}/python3. "
        "Try: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3 ...\n"
    )


def test_an_old_python(tmp_path):
    python = pretend(tmp_path / "python3", "version_info")
    said = set_up(python, tmp_path / "venv")
    assert said.startswith(f"fewstep: PYTHON must be Python 3.10 or newer, got {python} (Python 3.9.18). Try: ")
    assert len(said.splitlines()) == 1 and not (tmp_path / "venv").exists()


def test_no_venv(tmp_path):
    said = set_up(pretend(tmp_path / "python3", "ensurepip"), tmp_path / "venv")
    assert said.startswith("fewstep: PYTHON must have its modules venv and ensurepip, ")
    assert "apt-get install python3-venv" in said and len(said.splitlines()) == 1


def test_an_old_environment(tmp_path):
    pretend(tmp_path / "venv" / "bin" / "python", "version_info")
    said = set_up(sys.executable, tmp_path / "venv")
    assert f"{tmp_path}/venv must hold Python 3.10 or newer, got Python 3.9.18. Try: make clean" in said


def test_a_place_that_cannot_be_one(tmp_path):
    (tmp_path / "venv").write_text("a file")
    assert f"fewstep: {tmp_path}/venv cannot be set up (the lines above say why). Try: " in set_up(
        sys.executable, tmp_path / "venv"
    )


def test_an_unfinished_environment_is_completed(tmp_path):
    """One without pip is made again in its place; packages that do not install are said to be missing."""
    unfinished = pretend(tmp_path / "venv" / "bin" / "python", "pip")
    python = pretend(tmp_path / "python3", "pip install")
    text = python.read_text().replace(
        "in --version)", f'in "-m venv {tmp_path}/venv") cp "$0" {unfinished} ;; --version)'
    )
    python.write_text(text)
    said = set_up(python, tmp_path / "venv")
    assert unfinished.read_text() == text
    assert said.startswith("fewstep: the packages are not all installed") and "the same command again" in said
