"""Teacher families, one file each. A record belongs to the choices once it is imported here."""

from fewstep.teachers.base import ClassLabels, Codec, Conditioner, Teacher, TeacherSpec
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
