"""Models to compare: run folders, files and shipped teachers, loaded with their samplers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.data import DataSpec, Prepared
from fewstep.diffusion.guidance import Rule, guidance_rule, plain
from fewstep.diffusion.solvers import Solver
from fewstep.formats.dmd2 import dmd2_file
from fewstep.formats.model import read_provenance
from fewstep.students.sample import FewStep, ManyStep, Sampler
from fewstep.students.student import OpenTeachers, Student, find_student, load_student, part_of, pipeline_of, teacher_of
from fewstep.system.bounds import read_json
from fewstep.system.errors import EvaluationError
from fewstep.teachers import Conditioner, DiffusersTeacher, NativeTeacher, Teacher, TeacherSpec
from fewstep.teachers.native import shipped_teachers
from fewstep.teachers.prompts import Prompts
from fewstep.teachers.samplers import Best

__all__ = [
    "Candidate",
    "check_finite",
    "check_settings",
    "encode_prompts",
    "expand",
    "find_teacher",
    "learnt",
    "load_candidate",
    "takes_sigma_init",
]


TEACHER_CALLS = 35  # default network calls of a teacher


@dataclass(frozen=True)
class Candidate:
    """A model ready to sample.

    Attributes:
        name: name in tables.
        sampler: seeds and conditions -> samples.
        shape: shape of one sample.
        conditioner: labels -> conditions.
        sha256: hash of its weights.
        provenance: provenance from its file.
        guidance: guidance scale of a teacher, if it is guided, or its rule in words.
    """

    name: str
    sampler: Sampler
    shape: tuple[int, ...]
    conditioner: Conditioner
    sha256: str
    provenance: dict[str, Any]
    guidance: float | str | None = None

    @property
    def picture_shape(self) -> tuple[int, ...]:
        """Shape of a picture: of a decoded sample, if samples are decoded."""
        return self.sampler.codec.shape if self.sampler.codec else self.shape


def load_candidate(
    path: str,
    evaluations: int | None = None,
    device: torch.device | str = "cpu",
    sigma_init: float | None = None,
    solver: Solver | Best = Solver(),  # noqa: B008  (frozen)
    guidance: Rule | float | None = None,
    prompts: Path | Prompts | None = None,
    size: tuple[int, int] | None = None,
) -> Candidate:
    """Load a student or a teacher from a weights file, a run folder, a pipeline's folder, or a shipped teacher's name.

    Args:
        path: the model. A teacher is sampled with EDM's solver, a student with its few calls.
        evaluations: network calls of a teacher; None is 35. Not for students.
        device: the model's device.
        sigma_init: treat a .pkl file as a one-step generator at this noise level.
        solver: a teacher's sampler, or the best that was found for its number of calls.
        guidance: scale or rule of a teacher's classifier-free guidance. Not for students, which have learnt the guided teacher.
        prompts: encoded prompts (`encode_prompts`) or a folder of prepared ones, for text-to-image models; None: those the
            student was trained with.
        size: width and height of the pictures of a text-to-image model; None: its own. A student makes those it was trained at.
    Raises:
        FileError, FileError, TeacherError: it cannot be found or read.
        EvaluationError: an invalid setting, one that this model does not have, or weights that are not finite.
    """
    check_settings(evaluations, guidance)
    if sigma_init is not None and not takes_sigma_init(path):
        raise EvaluationError(
            f"`sigma_init` must be given for published one-step generators only, got {path}. Try: leave it out"
        )
    if (file := find_student(path, sigma_init)) is not None:
        if evaluations is not None or guidance is not None or solver != Solver():
            raise EvaluationError(
                f"evaluations, guidance, sampler and churn must be left out for a few-step generator, got {path}. Try: a "
                "teacher"
            )
        return _student(path, file, load_student(file, sigma_init, prompts, device), prompts is not None, size)
    spec = find_teacher(path, prompts if isinstance(prompts, Path) else None)
    if size is not None:
        if not isinstance(spec, DiffusersTeacher):
            raise EvaluationError(f"`size` is for text-to-image models, got {path}. Try: leave it out")
        spec = spec.model_copy(update={"resolution": size})
    _check_takes_prompts(path, spec, prompts)
    teacher = OpenTeachers().load(spec, prompts if isinstance(prompts, Prompts) else None)
    return _taught(teacher, TEACHER_CALLS if evaluations is None else evaluations, device, solver, guidance)


def _student(path: str, file: Path, student: Student, prompted: bool, size: tuple[int, int] | None = None) -> Candidate:
    if prompted and student.pipeline is None:
        raise EvaluationError(
            f"{path} takes no prompts, because it is not a text-to-image model. Try: leave --prompts out"
        )
    student.conditioner.cond(None, 1)  # refuses a model without prompts before the real images are read
    check_finite(path, student.generator)
    name = Path(path).name if Path(path).is_dir() else file.stem
    shape, conditioner, codec = student.shape, student.conditioner, student.codec
    if size is not None:
        if student.teacher is None:
            raise EvaluationError(f"`size` is for text-to-image models, got {path}. Try: leave it out")
        view = student.teacher.at(size[1], size[0])
        shape, conditioner, codec = view.shape, view.conditioner, view.codec
    sampler = FewStep(student.generator.eval(), codec)
    return Candidate(name, sampler, shape, conditioner, student.sha256, student.provenance)


def _described(solver: Solver) -> str:
    plain = replace(solver, churn=None)
    return ("" if plain.usual else f", {plain}") + (", stochastic" if solver.churn else "")


def _taught(
    teacher: Teacher, calls: int, device: torch.device | str, solver: Solver | Best, guidance: Rule | float | None
) -> Candidate:
    """Load a teacher with a number of network calls."""
    teacher.conditioner.cond(None, 1)  # as above
    if isinstance(solver, Best):
        solver = solver.of(teacher, calls, guidance)
    check_finite(teacher.name, teacher.denoiser)
    place = Path(teacher.name)
    of_a_run = place.name == "pipeline" and place.parent.name  # a pretrained pipeline is named after its run
    name = place.parent.name if of_a_run else place.stem
    name += f", {calls} evaluation{'s' if calls > 1 else ''}"
    name += (
        "" if guidance is None else f", guidance {guidance if isinstance(guidance, Rule) else format(guidance, 'g')}"
    ) + _described(solver)
    sampler = ManyStep(teacher.guided(guidance).to(device).eval(), calls, device, solver, teacher.codec)
    return Candidate(
        name, sampler, teacher.shape, teacher.conditioner, teacher.sha256, dict(teacher.provenance), plain(guidance)
    )


def _check_takes_prompts(path: str, spec: TeacherSpec, prompts: Path | Prompts | None) -> None:
    if prompts is not None and not isinstance(spec, DiffusersTeacher):
        raise EvaluationError(
            f"{path} takes no prompts, because it is not a text-to-image model. Try: leave --prompts out"
        )


def takes_sigma_init(path: str) -> bool:
    """Return whether a path names a published generator whose file does not state its noise level."""
    return Path(path).suffix == ".pkl" or dmd2_file(Path(path)) is not None


def check_settings(evaluations: int | None, guidance: Rule | float | None) -> None:
    """Refuse invalid settings of a teacher.

    Raises:
        EvaluationError: fewer than one network call, or a scale that is negative or not finite.
    """
    if evaluations is not None and evaluations < 1:
        raise EvaluationError(f"`evaluations` must be at least 1, got {evaluations}. Try: {TEACHER_CALLS}")
    if isinstance(guidance, float | int) and not (math.isfinite(guidance) and guidance >= 0):
        raise EvaluationError(f"`guidance` must be a number of at least 0, got {guidance}. Try: 7.5, or leave it out")


def check_finite(path: str, module: nn.Module) -> None:
    """Refuse weights that are not finite, which would draw black pictures."""
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise EvaluationError(
                f"{path} must hold finite weights, got NaN or infinity in {name}. Try: an earlier checkpoint of its run, or "
                "download the file again"
            )


def find_teacher(path: str, prompts: Path | None) -> TeacherSpec:
    """Find the teacher that a path names."""
    place = Path(path)
    if (place / "pipeline" / "model_index.json").exists():  # a run that trained a pipeline's network
        place = place / "pipeline"
        provenance = read_json(place / "fewstep.json") if (place / "fewstep.json").exists() else {}
        own = provenance.get("run", {}).get("pipeline", {}).get("prompts")
        prompts = prompts or (Path(own) if own else None)  # those of its training
    single_file = place.suffix == ".safetensors" and place.exists() and not place.with_suffix(".json").exists()
    if (place / "model_index.json").exists() or single_file:
        return DiffusersTeacher(path=str(place), prompts=prompts)
    return NativeTeacher(path=path)


def encode_prompts(
    path: str, prompts: Sequence[str], device: torch.device | str = "cpu", negative: str | None = None
) -> Prompts:
    """Prompts for a text-to-image teacher or student, encoded by its pipeline.

    Args:
        path: see `load_candidate`.
        prompts: one or more.
        device: where the encoders run.
        negative: prompt that guidance contrasts with, instead of the teacher's own.

    Raises:
        EvaluationError: the model takes no prompts.
        TeacherError: its pipeline is not where it was.
    """
    file = find_student(path)
    if file is None:
        teacher: TeacherSpec | None = find_teacher(path, None)
    else:
        teacher = pipeline_of(read_provenance(file)) if file.suffix == ".safetensors" else None
    if not isinstance(teacher, DiffusersTeacher):
        raise EvaluationError(
            f"prompts must be left out for a model without text, got {path}. Try: --classes, if it has classes"
        )
    if negative is not None:
        teacher = teacher.model_copy(update={"negative_prompt": negative})
    return teacher.encode(prompts, teacher.encoder(device))


def expand(
    paths: Sequence[str],
    evaluations: Sequence[int],
    device: torch.device | str = "cpu",
    sigma_init: float | None = None,
    solver: Solver | Best = Solver(),  # noqa: B008  (frozen)
    guidance: Rule | float | None = None,
    prompts: Path | Prompts | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> list[Candidate]:
    """Load the models of a comparison: teachers first, at each number of evaluations, then the students.

    Each student's teacher is added from the student's provenance, by default with the guidance of the student's training. A
    teacher is loaded once, however many rows and students it has.

    Args:
        paths: see `load_candidate`.
        evaluations: network calls of teachers; empty: no teachers.
        device: the models' device.
        sigma_init: see `load_candidate`.
        solver: see `load_candidate`.
        guidance: see `load_candidate`.
        prompts: see `load_candidate`.
        note: called with a text for each missing row: a student's teacher that is not on this machine.

    Raises:
        EvaluationError: nothing to score, a model named twice, or settings that no model of the comparison has.
    """
    if twice := [path for index, path in enumerate(paths) if path in paths[:index]]:
        raise EvaluationError(f"each model must be named once, got {twice[0]} twice")
    if sigma_init is not None and not any(map(takes_sigma_init, paths)):
        raise EvaluationError(
            "`sigma_init` must be given for published one-step generators only, got none. Try: leave it out"
        )
    for calls in evaluations:
        check_settings(calls, guidance)
    students: list[Candidate] = []
    teachers: dict[tuple[str, Rule | float | None], TeacherSpec] = {}
    opened = OpenTeachers()
    for path in paths:
        start = sigma_init if takes_sigma_init(path) else None
        file = find_student(path, start)
        if file is None:
            teachers[path, guidance] = spec = find_teacher(path, prompts if isinstance(prompts, Path) else None)
            _check_takes_prompts(path, spec, prompts)
            continue
        student = load_student(file, start, prompts, device, teachers=opened)
        students.append(_student(path, file, student, prompts is not None))
        if not evaluations:
            continue
        named, run = student.provenance.get("teacher"), student.provenance.get("run") or {}
        taught = learnt(run.get("objective") or {}) if guidance is None else guidance
        own = student.pipeline or teacher_of(student.provenance)  # the teacher that rebuilt the student
        if isinstance(named, str) and (own is not None or named in shipped_teachers() or Path(named).exists()):
            teachers[named, taught] = own or find_teacher(named, None)
        else:
            where = f"{named} is not on this machine" if named else "its file names none"
            note(f"{path}: no row for its teacher, because {where}")
    if not evaluations and (named_too := [path for path, _ in teachers]):
        raise EvaluationError(
            f"`evaluations` must be above 0 to score the teacher {named_too[0]}, got 0. Try: --evaluations {TEACHER_CALLS}"
        )
    for name, given in (("guidance", guidance is not None), ("sampler", solver != Solver())):
        if given and not (teachers and evaluations):
            raise EvaluationError(f"`{name}` must be given with a teacher only, got no teacher. Try: leave it out")
    encoded = prompts if isinstance(prompts, Prompts) else None
    return [
        _taught(opened.load(spec, encoded), calls, device, solver, scale)
        for (_, scale), spec in teachers.items()
        for calls in evaluations
    ] + students


def learnt(objective: Mapping[str, Any]) -> Rule | float | None:
    """Guidance of a student's training, from the record of its method."""
    scale, interval = objective.get("guidance"), objective.get("guidance_interval")
    rescale = objective.get("guidance_rescale") or 0.0
    if scale is None or not (interval or rescale):
        return scale
    return guidance_rule(scale, tuple(interval) if interval else None, rescale)


def data_of(provenance: Mapping[str, Any]) -> DataSpec | None:
    """Find the images of a model's run, or of its teacher's, if they can serve as a reference.

    Raises:
        FileError: they are of an unknown kind.
    """
    found = part_of(provenance, "data", DataSpec)  # type: ignore[type-abstract]
    if found is None and (named := provenance.get("teacher_data")):
        found = part_of({"run": {"data": named}}, "data", DataSpec)  # type: ignore[type-abstract]
    return None if isinstance(found, Prepared) else found
