"""A finished student from its file, with what it needs beside its weights: text-to-image students have a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.generator import Generator
from fewstep.formats.dmd2 import dmd2_file
from fewstep.formats.model import DenoiserSpec, holds_generator, load_generator, read_card
from fewstep.networks import DiffusersSpec
from fewstep.networks.lora import LoraSpec
from fewstep.system.choices import choices
from fewstep.system.errors import FileError
from fewstep.teachers import ClassLabels, Codec, Conditioner, DiffusersTeacher, TeacherSpec

__all__ = ["Student", "find_student", "load_student", "pipeline_of", "teacher_of"]


@dataclass(frozen=True)
class Student:
    """A few-step generator and its surroundings.

    Attributes:
        generator: the network and its times.
        spec: what the network is; None if its teacher alone can tell.
        card: provenance.
        conditioner: labels or prompts -> conditions.
        shape: of one sample.
        codec: samples -> pictures; None if they are.
        pipeline: the teacher's pipeline, for text-to-image students.
    """

    generator: Generator
    spec: DenoiserSpec | None
    card: dict[str, Any]
    conditioner: Conditioner
    shape: tuple[int, ...]
    codec: Codec | None = None
    pipeline: DiffusersTeacher | None = None

    @property
    def net(self) -> DiffusersSpec:
        """The network of a text-to-image student."""
        assert self.spec is not None and isinstance(self.spec.net, DiffusersSpec), "not of text-to-image"
        return self.spec.net


def find_student(path: Path | str, sigma_init: float | None = None) -> Path | None:
    """The file of the few-step generator at a path, if that is what is there.

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


def teacher_of(card: dict[str, Any]) -> TeacherSpec | None:
    """The teacher that a student's card names, if its file is not enough to rebuild it.

    Raises:
        FileError: the card names none that is known here, or in other settings than it has.
    """
    named = (card.get("run") or {}).get("teacher")
    family = choices(TeacherSpec).get(str((named or {}).get("kind")))
    if not named or (family is not None and family.students_stand_alone):
        return None
    try:
        return TeacherSpec.model_validate(named)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["run.teacher", *map(str, first["loc"])])
        raise FileError(f"the student's card, {where}: {first['msg'].removeprefix('Value error, ')}") from None


def pipeline_of(card: dict[str, Any]) -> DiffusersTeacher | None:
    """The text-to-image teacher that a student's card names, if it has one."""
    teacher = teacher_of(card)
    return teacher if isinstance(teacher, DiffusersTeacher) else None


def load_student(
    file: Path,
    sigma_init: float | None = None,
    prompts: Path | None = None,
    device: torch.device | str = "cpu",
    original: bool = False,
) -> Student:
    """Read a student.

    Args:
        file: from `find_student`.
        sigma_init: see `fewstep.formats.model.load_generator`.
        prompts: folder of prepared prompts instead of those it was trained with.
        device: where to put it.
        original: with the pipeline's weights in float32, as its files have them, not as `teacher.dtype` rounds them:
            what adapters are merged into.

    Raises:
        FileError: missing or damaged files.
        TeacherError: a student that its teacher rebuilds, whose teacher is not where it was.
    """
    named = teacher_of(read_card(file)) if file.suffix == ".safetensors" else None
    if named is None:
        generator, spec, card = load_generator(file, sigma_init)
        if spec is None or isinstance(spec.net, DiffusersSpec):
            raise FileError(f"{file} does not say which pipeline it was distilled from: its card has no run.teacher")
        conditioner = ClassLabels(spec.net.num_classes, tuple(card.get("class_names", ())))
        return Student(generator.to(device), spec, card, conditioner, spec.net.sample_shape)
    if isinstance(named, DiffusersTeacher):
        named = named.model_copy(update={"prompts": prompts or named.prompts})
        if original:
            named = named.model_copy(update={"dtype": "float32"})
    teacher = named.load()

    def player(lora: LoraSpec | None) -> Denoiser:
        teacher.denoiser.to(device)
        return teacher.player(lora)

    generator, spec, card = load_generator(file, sigma_init, player)
    pipeline = named if isinstance(named, DiffusersTeacher) else None
    return Student(generator.to(device), spec, card, teacher.conditioner, teacher.shape, teacher.codec, pipeline)
