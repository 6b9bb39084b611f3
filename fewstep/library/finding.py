"""Find and open the model that a path or a name means."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import cast

import torch
from pydantic import ValidationError

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.evaluation.candidates import find_teacher, takes_sigma_init
from fewstep.formats.model import Header
from fewstep.networks.diffusers_net import DiffusersNet
from fewstep.students.student import Student, find_student, load_student
from fewstep.system.errors import FileError, SettingsError
from fewstep.system.out_folder import MARKER, marker
from fewstep.teachers import DiffusersTeacher, Teacher
from fewstep.teachers.native import shipped_teachers

__all__ = ["open_model"]


def open_model(
    path: str, sigma_init: float | None, device: torch.device
) -> tuple[Student | Teacher, DiffusersTeacher | None]:
    """Open a student or a teacher; returns it, and the settings of its pipeline if it is a text-to-image model.

    Raises:
        UserError: nothing is there, or it cannot be read.
    """
    place = Path(path).expanduser()
    _must_exist(path, place)
    if sigma_init is not None and not takes_sigma_init(str(place)):
        raise SettingsError(
            f"`sigma_init` must be given for published one-step generators only, got {path}. Try: leave it out"
        )
    if marker(place).get("kind") == "export" and not (place / "student.safetensors").exists():
        student = _exported(place, device)
        return student, student.pipeline
    file = find_student(place, sigma_init)
    if file is not None:
        student = load_student(file, sigma_init, device=device)
        return student, student.pipeline
    if (place / "run.yaml").exists() and not any(
        (place / name).exists() for name in ("teacher.safetensors", "pipeline")
    ):
        raise FileError(
            f"`model` must be a run with a checkpoint, got {path}, which has saved none yet. Try: fewstep distill {path}"
        )
    spec = find_teacher(str(place) if place.exists() else path, None)
    return spec.load(), spec if isinstance(spec, DiffusersTeacher) else None


def _must_exist(path: str, place: Path) -> None:
    known = shipped_teachers()
    if place.exists() or path in known:
        return
    beside = [entry.name for entry in place.parent.iterdir()] if place.parent.is_dir() else []
    near = [str(place.parent / name) for name in difflib.get_close_matches(place.name, beside, 1)]
    near += difflib.get_close_matches(path, known, 1)
    raise SettingsError(
        f"`model` must be a run folder, a model's file, an export, or one of {', '.join(known)}, got {path}, which does not "
        f"exist (looked in {Path.cwd()})" + (f". Did you mean {near[0]}?" if near else ". Try: its full path")
    )


def _exported(folder: Path, device: torch.device) -> Student:
    """Open a folder of `fewstep export` by its diffusers pipeline and the student's times, which its marker holds."""
    about = marker(folder).get("student")
    if about is None or not (folder / "model_index.json").is_file():
        raise FileError(
            f"{folder} must hold an export with a diffusers folder and the student's times, got one without. Try: load the run "
            "folder, or export it again"
        )
    try:
        header = Header.model_validate(about)
        assert header.denoiser is not None and header.times
        settings = DiffusersTeacher.model_validate(about.get("teacher", {}) | {"path": str(folder)})
    except (ValidationError, AssertionError) as error:
        lines = str(error).splitlines() or ["it names no network"]
        raise FileError(f"{folder / MARKER}: student: {lines[0]}. Try: export the student again") from None
    settings = settings.of_an_export()
    teacher = settings.load()
    net = cast(DiffusersNet, cast(Preconditioned, teacher.denoiser).net)
    with torch.device("meta"):
        denoiser = header.denoiser.build()
    cast(DiffusersNet, denoiser.net).model = net.model
    generator = Generator(denoiser.requires_grad_(False).eval(), header.times, header.transition).to(device)
    sha256 = str(marker(folder).get("student_sha256", ""))
    return Student(
        generator, header.denoiser, {}, sha256, teacher.conditioner, teacher.shape,
        teacher.codec, settings, teacher,
    )  # fmt: skip
