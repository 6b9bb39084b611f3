"""Teacher families, one file each. Importing a record here adds it to the choices of `teacher.kind`."""

from fewstep.teachers.base import ClassLabels, Codec, Conditioner, Teacher, TeacherSpec
from fewstep.teachers.diffusers import DiffusersTeacher
from fewstep.teachers.latent import LatentTeacher
from fewstep.teachers.mixture import MixtureTeacher
from fewstep.teachers.native import NativeTeacher

__all__ = [
    "ClassLabels",
    "Codec",
    "Conditioner",
    "DiffusersTeacher",
    "LatentTeacher",
    "MixtureTeacher",
    "NativeTeacher",
    "Teacher",
    "TeacherSpec",
]
