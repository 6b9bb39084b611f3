"""Teacher families, one file each. The union below is the only list of them."""

from typing import Annotated

from pydantic import Field

from fewstep.teachers.base import ClassLabels, Codec, Conditioner, Teacher
from fewstep.teachers.diffusers import DiffusersTeacher
from fewstep.teachers.mixture import MixtureTeacher
from fewstep.teachers.native import NativeTeacher

__all__ = [
    "ClassLabels",
    "Codec",
    "Conditioner",
    "DiffusersTeacher",
    "MixtureTeacher",
    "NativeTeacher",
    "Teacher",
    "TeacherSpec",
]

TeacherSpec = Annotated[NativeTeacher | DiffusersTeacher | MixtureTeacher, Field(discriminator="kind")]
