"""Teachers in files: trained with `fewstep pretrain`, shipped with this package, or published with EDM."""

from __future__ import annotations

import copy
from importlib import resources
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.formats.dmd2 import dmd2_file
from fewstep.formats.edm import published_network
from fewstep.formats.model import DenoiserSpec, load_denoiser, weights_sha256
from fewstep.networks import EDM2Spec
from fewstep.system.errors import TeacherError
from fewstep.teachers.base import ClassLabels, Teacher, TeacherSpec

__all__ = ["NativeTeacher", "shipped_teachers"]

EDM_MODELS = {
    "edm-": "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained",
    "edm2-": "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions",
}


class NativeTeacher(TeacherSpec):
    """A model in a file, in fewstep's own format or that of the EDM, EDM2 (of pixels) and SiD papers."""

    students_stand_alone: ClassVar[bool] = True
    latents: ClassVar[bool] = False

    kind: Literal["native"] = "native"
    path: str = "fashion-mnist"
    """A .safetensors file, a run folder of `fewstep pretrain`, a published EDM .pkl file, or the name of a shipped
    teacher (`fashion-mnist`, `digits`)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of student and fake score while they are trained, for EDM's networks (SiD keeps the teacher's: 0.13 for
    CIFAR-10, 0.05 for FFHQ and AFHQv2, 0.1 for ImageNet-64; DMD2 has none)."""

    def load(self) -> Teacher:
        """Read the model.

        Raises:
            TeacherError: no such file and no shipped teacher of that name.
            FileError: the file is damaged.
        """
        path = self.file()
        denoiser, spec, provenance = load_denoiser(path)
        denoiser.requires_grad_(False).eval()
        if self.dropout and not hasattr(spec.net, "dropout"):
            raise TeacherError(
                f"`teacher.dropout` must be left out for {self.path}, whose network has no dropout, got {self.dropout}"
            )
        if isinstance(spec.net, EDM2Spec) and spec.net.channels == 4 and not self.latents:
            raise TeacherError(
                f"teacher.path {self.path} must be a model of pixels for kind `native`, got EDM2's model of latents. Try: teacher: "
                "{kind: edm2-latents, path: FILE, vae: FOLDER}"
            )
        num_classes = spec.net.num_classes

        def start() -> Preconditioned:
            return self.with_dropout(copy.deepcopy(denoiser).requires_grad_(True).train())

        names = tuple(provenance.get("class_names", ()))
        return Teacher(
            name=self.path,
            denoiser=denoiser,
            shape=tuple(spec.net.sample_shape),
            conditioner=ClassLabels(num_classes, names),
            student_spec=spec,
            start=start,
            bottleneck=spec.net.bottleneck,
            sha256=weights_sha256(path, provenance),
            images=len(spec.net.sample_shape) == 3,
            provenance=provenance,
        )

    def with_dropout(self, denoiser: Preconditioned) -> Preconditioned:
        """Set the dropout of a trained network, and return the network."""
        for module in denoiser.modules():
            if hasattr(module, "dropout"):
                setattr(module, "dropout", self.dropout)  # noqa: B010  (a number, which modules do not declare)
        return denoiser

    def outline(self) -> tuple[DenoiserSpec, dict[str, Tensor]]:
        """Describe the network and the condition of one sample (without storage); EDM's published files need not exist.

        Raises:
            TeacherError, FileError: as `load`.
        """
        net = published_network(Path(self.path).name)
        spec = DenoiserSpec(net=net) if net and not Path(self.path).exists() else load_denoiser(self.file())[1]
        labels = {"labels": torch.zeros(1, dtype=torch.int64, device="meta")} if spec.net.num_classes else {}
        return spec, labels

    def file(self) -> Path:
        """Find the file of the weights."""
        path = Path(self.path)
        if path.is_dir():
            if (path / "teacher.safetensors").exists():
                return path / "teacher.safetensors"
            if (path / "student.safetensors").exists():
                return path / "student.safetensors"  # the reader reports a student and its teacher
            if dmd2_file(path):
                raise TeacherError(
                    f"teacher.path {path} must be a teacher, got DMD2's checkpoint of a one-step generator. Try: EDM's teacher, or "
                    "set start_from to begin with its weights"
                )
            raise TeacherError(
                f"{path} holds no teacher.safetensors: is it the --out folder of a `fewstep pretrain` run that "
                "has saved once?"
            )
        if path.suffix in (".safetensors", ".pkl"):
            if not path.exists():
                place = next((url for name, url in EDM_MODELS.items() if path.name.startswith(name)), None)
                fetch = f": fetch {place}/{path.name}" if place else ""
                raise TeacherError(f"teacher {path} does not exist (looked in {path.absolute().parent}){fetch}")
            return path
        shipped = resources.files("fewstep") / "assets" / "teachers" / f"{self.path}.safetensors"
        if not shipped.is_file():
            raise TeacherError(
                f"no teacher {self.path!r}. Try: give a .safetensors or .pkl file, a run folder, or one of "
                f"{', '.join(shipped_teachers())}"
            )
        return Path(str(shipped))


def shipped_teachers() -> list[str]:
    """Names of the teachers inside this package."""
    folder = Path(str(resources.files("fewstep") / "assets" / "teachers"))
    return sorted(path.stem for path in folder.glob("*.safetensors"))
