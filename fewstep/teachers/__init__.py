"""Teacher families, one file each. The union below is the only list of them."""

from typing import Annotated

from pydantic import Field

from fewstep.teachers.base import ClassLabels, Teacher, TeacherError
from fewstep.teachers.mixture import MixtureTeacher
from fewstep.teachers.native import NativeTeacher

__all__ = ["ClassLabels", "MixtureTeacher", "NativeTeacher", "Teacher", "TeacherError", "TeacherSpec"]

TeacherSpec = Annotated[NativeTeacher | MixtureTeacher, Field(discriminator="kind")]
