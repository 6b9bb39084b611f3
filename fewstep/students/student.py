"""A finished student from its file, with what it needs beside its weights: text-to-image students have a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.generator import Generator
from fewstep.formats.dmd2 import dmd2_file
from fewstep.formats.model import DenoiserSpec, holds_generator, load_generator, read_card
from fewstep.networks import DiffusersSpec
from fewstep.system.errors import FileError
from fewstep.teachers import ClassLabels, Codec, Conditioner, DiffusersTeacher, Teacher

__all__ = ["Student", "find_student", "load_student", "pipeline_of"]


@dataclass(frozen=True)
class Student:
    """A few-step generator and its surroundings.

    Attributes:
        generator: the network and its times.
        spec: what the network is.
        card: provenance.
        conditioner: labels or prompts -> conditions.
        codec: samples -> pictures; None if they are.
        pipeline: the teacher's pipeline, for text-to-image students.
    """

    generator: Generator
    spec: DenoiserSpec
    card: dict[str, Any]
    conditioner: Conditioner
    codec: Codec | None = None
    pipeline: DiffusersTeacher | None = None


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


def pipeline_of(card: dict[str, Any]) -> DiffusersTeacher | None:
    """The text-to-image teacher that a student's card names, if it has one."""
    spec = (card.get("run") or {}).get("teacher") or {}
    return DiffusersTeacher(**spec) if spec.get("kind") == "diffusers" else None


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
        FileError, FileError: missing or damaged files.
        TeacherError: a text-to-image student whose teacher's pipeline is not where it was.
    """
    pipeline = pipeline_of(read_card(file)) if file.suffix == ".safetensors" else None
    if pipeline is None:
        generator, spec, card = load_generator(file, sigma_init)
        if isinstance(spec.net, DiffusersSpec):
            raise FileError(f"{file} does not say which pipeline it was distilled from: its card has no run.teacher")
        conditioner = ClassLabels(spec.net.num_classes, tuple(card.get("class_names", ())))
        return Student(generator.to(device), spec, card, conditioner)
    pipeline = pipeline.model_copy(update={"prompts": prompts or pipeline.prompts})
    if original:
        pipeline = pipeline.model_copy(update={"dtype": "float32"})
    teacher: Teacher = pipeline.load()

    def base(_card: dict[str, Any]) -> Denoiser:
        return teacher.denoiser.to(device)

    generator, spec, card = load_generator(file, sigma_init, base)
    return Student(generator.to(device), spec, card, teacher.conditioner, teacher.codec, pipeline)
