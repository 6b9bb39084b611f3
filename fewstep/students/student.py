"""A finished student, loaded from its file; a text-to-image student comes with its pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.noise import Discrete
from fewstep.diffusion.preconditioned import Prediction
from fewstep.formats.dmd2 import dmd2_file
from fewstep.formats.model import DenoiserSpec, holds_generator, load_generator, read_provenance, weights_sha256
from fewstep.networks import DiffusersSpec
from fewstep.networks.lora import LoraSpec
from fewstep.system.choices import choices
from fewstep.system.console import note
from fewstep.system.errors import FileError
from fewstep.system.tagged import Tagged
from fewstep.teachers import ClassLabels, Codec, Conditioner, DiffusersTeacher, Teacher, TeacherSpec
from fewstep.teachers.prompts import Prompts

__all__ = ["OpenTeachers", "Student", "find_student", "load_student", "part_of", "pipeline_of", "teacher_of"]


T = TypeVar("T", bound=Tagged)


@dataclass(frozen=True)
class Student:
    """A few-step generator with its conditioning, decoder and provenance.

    Attributes:
        generator: the network and its times.
        spec: the network's record; None if only its teacher defines it.
        provenance: provenance from its file.
        sha256: hash of its weights.
        conditioner: labels or prompts -> conditions.
        shape: shape of one sample.
        codec: samples -> pictures; None if samples are pictures.
        pipeline: settings of the teacher's pipeline, for text-to-image students.
        teacher: the teacher that rebuilt the student, if its file was not enough.
        file: its file; None for an export.
    """

    generator: Generator
    spec: DenoiserSpec | None
    provenance: dict[str, Any]
    sha256: str
    conditioner: Conditioner
    shape: tuple[int, ...]
    codec: Codec | None = None
    pipeline: DiffusersTeacher | None = None
    teacher: Teacher | None = None
    file: Path | None = None

    @property
    def net(self) -> DiffusersSpec:
        """Network of a text-to-image student."""
        assert self.spec is not None and isinstance(self.spec.net, DiffusersSpec), "not of text-to-image"
        return self.spec.net

    @property
    def settings(self) -> DiffusersTeacher:
        """Settings of the pipeline of a text-to-image student."""
        assert self.pipeline is not None, "not of text-to-image"
        return self.pipeline

    @property
    def prediction(self) -> Prediction:
        """Prediction type of a text-to-image student's network."""
        assert self.spec is not None, "not of text-to-image"
        return self.spec.prediction

    @property
    def table(self) -> Discrete:
        """Noise table of a student that has one."""
        schedule = self.generator.denoiser.schedule
        assert isinstance(schedule, Discrete), "a flow has no table"
        return schedule


class OpenTeachers:
    """Cache of loaded teachers, so that none is loaded twice."""

    def __init__(self) -> None:
        self._open: list[tuple[TeacherSpec, Teacher]] = []

    def load(self, spec: TeacherSpec, prompts: Prompts | None = None) -> Teacher:
        """Load the teacher of these settings, with a text-to-image model's prompts, or return the loaded one."""
        teacher = next((teacher for known, teacher in self._open if known == spec), None)
        if teacher is None:
            teacher = spec.load(prompts) if isinstance(spec, DiffusersTeacher) else spec.load()
            self._open.append((spec, teacher))
        return teacher


def find_student(path: Path | str, sigma_init: float | None = None) -> Path | None:
    """Find the file of the few-step generator at a path, if there is one. Reads no weights.

    Args:
        path: a run folder, a file of ours, a published .pkl file (with `sigma_init`), or a DMD2 checkpoint folder.
        sigma_init: see `fewstep.formats.model.load_generator`.

    Raises:
        FileError: missing or damaged files.
    """
    file = dmd2_file(Path(path)) or Path(path) / "student.safetensors"
    if not file.exists():
        file = Path(path)
    ours = file.suffix != ".safetensors" or file.with_suffix(".json").exists()
    return file if file.is_file() and ours and holds_generator(file, sigma_init) else None


def part_of(provenance: Mapping[str, Any], name: str, interface: type[T]) -> T | None:
    """Read a part of the run from a model's provenance, such as its `data`; None if there is none.

    Raises:
        FileError: it is of an unknown kind, or has unknown settings.
    """
    named = (provenance.get("run") or {}).get(name)
    try:
        return interface.model_validate(named) if named else None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["run", name, *map(str, first["loc"])])
        raise FileError(f"the model's JSON, card.{where}: {first['msg'].removeprefix('Value error, ')}") from None


def teacher_of(provenance: Mapping[str, Any]) -> TeacherSpec | None:
    """Find the teacher in a student's provenance, if its file is not enough to rebuild it.

    Raises:
        FileError: see `part_of`.
    """
    named = (provenance.get("run") or {}).get("teacher") or {}
    family = choices(TeacherSpec).get(str(named.get("kind")))
    if family is not None and family.students_stand_alone:
        return None
    return part_of(provenance, "teacher", TeacherSpec)  # type: ignore[type-abstract]


def pipeline_of(provenance: Mapping[str, Any]) -> DiffusersTeacher | None:
    """Find the text-to-image teacher in a student's provenance, if it has one."""
    teacher = teacher_of(provenance)
    return teacher if isinstance(teacher, DiffusersTeacher) else None


def load_student(
    file: Path,
    sigma_init: float | None = None,
    prompts: Path | Prompts | None = None,
    device: torch.device | str = "cpu",
    teachers: OpenTeachers | None = None,
) -> Student:
    """Read a student.

    Args:
        file: from `find_student`.
        sigma_init: see `fewstep.formats.model.load_generator`.
        prompts: encoded prompts, or a folder of prepared ones, instead of those it was trained with.
        device: the student's device.
        teachers: cache of loaded teachers, to which the student's is added.

    Raises:
        FileError: missing or damaged files.
        TeacherError: the student needs its teacher, which no longer exists at its path.
    """
    named = teacher_of(read_provenance(file)) if file.suffix == ".safetensors" else None
    if named is None:
        generator, spec, provenance = load_generator(file, sigma_init)
        if spec is None or isinstance(spec.net, DiffusersSpec):
            raise FileError(
                f"{file} must name the pipeline that it was distilled from, got a JSON without card.run.teacher"
            )
        conditioner = ClassLabels(spec.net.num_classes, tuple(provenance.get("class_names", ())))
        sha256 = weights_sha256(file, provenance)
        return Student(generator.to(device), spec, provenance, sha256, conditioner, spec.net.sample_shape, file=file)
    pipeline = named if isinstance(named, DiffusersTeacher) else None
    if prompts is None and pipeline is not None and pipeline.prompts and not pipeline.prompts.exists():
        note(f"{file}: its prepared prompts {pipeline.prompts} are not on this machine")
        named = pipeline = pipeline.model_copy(update={"prompts": None})
    if isinstance(prompts, Path) and pipeline is not None:
        named = pipeline = pipeline.model_copy(update={"prompts": prompts})
    teacher = (teachers or OpenTeachers()).load(named, prompts if isinstance(prompts, Prompts) else None)

    def player(lora: LoraSpec | None) -> Denoiser:
        teacher.denoiser.to(device)
        return teacher.player(lora)

    generator, spec, provenance = load_generator(file, sigma_init, player)
    return Student(
        generator.to(device), spec, provenance, weights_sha256(file, provenance), teacher.conditioner, teacher.shape, teacher.codec, pipeline,
        teacher, file,
    )  # fmt: skip
