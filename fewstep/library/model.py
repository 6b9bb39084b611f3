"""A student or a teacher, loaded once: sample it, move it, export it, use its pipeline of diffusers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.guidance import Rule, plain
from fewstep.evaluation.candidates import (
    TEACHER_CALLS,
    Candidate,
    check_finite,
    check_settings,
)
from fewstep.library.finding import open_model
from fewstep.library.pictures import Pictures
from fewstep.library.sampling import FromNoise, Patience, fitting_batch, prompts_of, seeds_of
from fewstep.students.export import export_student
from fewstep.students.export.facts import Facts
from fewstep.students.export.pipeline import load_pipeline
from fewstep.students.sample import FewStep, ManyStep, Sampler, balanced_labels, generate, parse_classes
from fewstep.students.student import Student
from fewstep.system.device import pick_device
from fewstep.system.errors import SettingsError
from fewstep.system.outside import use
from fewstep.teachers import ClassLabels, Conditioner, DiffusersTeacher, Teacher
from fewstep.teachers.base import NoPrompts
from fewstep.teachers.prompts import Prompts

__all__ = ["Model", "load", "sample"]

DTYPES = (torch.float32, torch.bfloat16)


def load(
    model: Path | str,
    *,
    sigma_init: float | None = None,
    device: torch.device | str = "auto",
    dtype: torch.dtype = torch.float32,
    imports: Sequence[str] = (),
) -> Model:
    """Load a student or a teacher.

    Args:
        model: a run folder, a model's file or its folder, a folder of `fewstep export`, a published .pkl file (EDM's teachers,
            SiD's students), a checkpoint folder of DMD2, a pipeline's folder, or the name of a shipped teacher.
        sigma_init: treat a .pkl file as a one-step generator at this noise level (SiD, SiDA: 2.5), not as a teacher.
        device: auto (the GPU if there is one), cpu, cuda or cuda:N.
        dtype: see `Model.to`.
        imports: Python files and modules with the model's own classes.

    Raises:
        UserError: it does not exist, cannot be read, or a setting is invalid.
    """
    use(imports, Path(), "imports")
    where = pick_device(str(device))
    return Model(str(model), *open_model(str(model), sigma_init, where), where).to(dtype=dtype)


def sample(model: Path | str, seeds: int | str | Iterable[int] | None = None, **options: Any) -> Pictures:
    """Load a model and sample it once: `load(model).sample(seeds, **options)`."""
    return load(model).sample(seeds, **options)


class Model:
    """A few-step student, or a teacher, which samples in many calls.

    Attributes:
        path: its path or name, as given to `load`.
        device: its device.
        dtype: float32 or bfloat16; see `to`.
    """

    def __init__(
        self, path: str, found: Student | Teacher, settings: DiffusersTeacher | None, device: torch.device
    ) -> None:
        """
        Args:
            path: its path or name.
            found: the loaded model.
            settings: settings of its pipeline, for a text-to-image model.
            device: its device.
        """
        self.path, self.device, self.dtype = path, device, torch.float32
        self._found, self._settings = found, settings
        check_finite(path, self._network)

    def __repr__(self) -> str:
        kind = f"student, {self.calls} network call{'s' if self.calls > 1 else ''}" if self.is_student else "teacher"
        size = "x".join(map(str, self.picture_shape))
        return f"<{self.name}: {kind}, {size}, {self.device}, {str(self.dtype).removeprefix('torch.')}>"

    @property
    def name(self) -> str:
        """Last part of its path."""
        return Path(self.path).name if Path(self.path).is_dir() else Path(self.path).stem

    @property
    def is_student(self) -> bool:
        """True for a few-step student, False for a teacher."""
        return isinstance(self._found, Student)

    @property
    def calls(self) -> int:
        """Network calls per picture; of a teacher by default."""
        return self._found.generator.steps if isinstance(self._found, Student) else TEACHER_CALLS

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, and of its noise: a picture, or its latent."""
        return self._found.shape

    @property
    def picture_shape(self) -> tuple[int, ...]:
        """Shape of one picture, (C, H, W)."""
        return self._found.codec.shape if self._found.codec else self._found.shape

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of its classes (numbers if they have no names); empty for a model without classes."""
        if not isinstance(self._found.conditioner, ClassLabels):
            return ()
        return self._found.conditioner.names or tuple(map(str, range(self._found.conditioner.num_classes)))

    @property
    def takes_prompts(self) -> bool:
        """True for a text-to-image model."""
        return isinstance(self._found.conditioner, Prompts | NoPrompts)

    @property
    def provenance(self) -> dict[str, Any]:
        """Settings and origin from its file."""
        return dict(self._found.provenance)

    @property
    def _network(self) -> torch.nn.Module:
        return self._found.generator if isinstance(self._found, Student) else self._found.denoiser

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Model:
        """Move it to a device, and choose the precision of its networks; returns itself.

        Args:
            device: cpu, cuda or cuda:N; None: stay.
            dtype: float32, or bfloat16: the networks compute in bfloat16 (autocast) from weights that stay float32. None: stay.

        Raises:
            SettingsError: no such device, or another dtype.
        """
        if isinstance(device, torch.dtype):  # as in torch: model.to(torch.bfloat16)
            device, dtype = None, device
        if dtype is not None and dtype not in DTYPES:
            raise SettingsError(f"`dtype` must be torch.float32 or torch.bfloat16, got {dtype}. Try: torch.bfloat16")
        if device is not None:
            self.device = pick_device(str(device))
            self.__dict__.pop("_encoder", None)
        self._network.to(self.device)
        self.dtype = self.dtype if dtype is None else dtype
        return self

    def sample(
        self,
        seeds: int | str | Iterable[int] | None = None,
        *,
        classes: str | int | Sequence[str | int] | None = None,
        prompts: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        noise: Tensor | None = None,
        evaluations: int | None = None,
        guidance: Rule | float | None = None,
        size: tuple[int, int] | None = None,
        batch: int | None = None,
    ) -> Pictures:
        """Make pictures. A seed gives the same picture at any batch size, and in `fewstep sample`.

        Args:
            seeds: such as `range(16)`, `[3, 7]`, `"0-63"`, or one number; None: 0 to 15, or one for each prompt.
            classes: by name or number, one or several, repeated over the seeds; None: seed mod number of classes.
            prompts: for a text-to-image model, one or several, repeated over the seeds; None: those it was trained with.
            negative_prompt: what a teacher's guidance contrasts with.
            noise: unit Gaussian noise instead of seeds: [N, *shape], or [calls, N, *shape] for the noise of each call.
            evaluations: network calls of a teacher; None: 35.
            guidance: a teacher's classifier-free guidance: a scale, or a rule of `fewstep.diffusion.guidance`.
            size: width and height of a text-to-image model's pictures, of those that it was trained at.
            batch: pictures per batch; None: by the size of a picture.

        Raises:
            SettingsError: contradicting or invalid settings, or a sample that is not finite.
            EvaluationError, TeacherError: settings that this model does not have.
        """
        if classes is not None and prompts is not None:
            raise SettingsError("`prompts` and `classes` must not be given together. Try: leave one of them out")
        if classes is not None and self.takes_prompts:
            raise SettingsError(f"`classes` must be left out for {self.path}, a text-to-image model. Try: prompts=TEXT")
        if negative_prompt is not None and (prompts is None or guidance in (None, 1)):
            raise SettingsError(
                f"`negative_prompt` must come with prompts and a teacher's guidance, got {negative_prompt!r} without. Try: "
                "guidance=7.5"
            )
        asked = prompts_of(prompts)
        if asked and not self.takes_prompts:
            way = f"classes={self.classes[0]!r}" if self.classes else "leave prompts out"
            raise SettingsError(f"`prompts` must be left out for {self.path}, which knows no text. Try: {way}")
        conditioner = self._encoded(asked, negative_prompt, size) if asked else self._at(size).conditioner
        conditioner.cond(None, 1)  # says so if it lacks prompts
        given = None if noise is None else FromNoise.check(noise, self.shape, self.calls if self.is_student else 1)
        numbers = seeds_of(seeds, given, len(asked) or 16)
        if len(asked) > len(numbers):
            raise SettingsError(
                f"`seeds` must be at least one for each prompt, got {len(numbers)} for {len(asked)} prompts. Try: "
                f"seeds=range({len(asked)})"
            )
        if asked:
            labels: Tensor | None = torch.tensor([index % len(asked) for index in range(len(numbers))])
        else:
            wanted = [classes] if isinstance(classes, int) else classes
            labels = parse_classes(wanted, conditioner, len(numbers))
        if labels is None:
            labels = balanced_labels(numbers, conditioner.num_classes)
        sampler: Sampler = self._sampler(evaluations, guidance, size, conditioner)
        if given is not None:
            assert isinstance(sampler, FewStep | ManyStep)
            sampler = FromNoise(sampler, given, self.device)
        with Patience(f"sample {self.name}", len(numbers)) as patience:
            parts = list(
                generate(
                    sampler,
                    numbers,
                    self._at(size).shape,
                    conditioner,
                    labels=labels,
                    batch=fitting_batch(self.picture_shape) if batch is None else batch,
                    bf16=self.dtype is torch.bfloat16,
                    device=self.device,
                    local=True,
                    progress=patience.update,
                )
            )
        known = conditioner.names or [str(index) for index in range(conditioner.num_classes)]
        names = () if labels is None else tuple(known[label] for label in labels.tolist())
        empty = torch.empty((0, *self.picture_shape), dtype=torch.uint8)
        return Pictures(torch.cat(parts) if parts else empty, tuple(numbers), labels, names)

    def export(
        self,
        out: Path | str,
        *,
        formats: Sequence[str] = (),
        dtype: torch.dtype = torch.float16,
        base_model: str = "",
        base_file: str = "",
        license: str = "other",
    ) -> list[Path]:
        """Write the student for others; returns the files. See `fewstep export`.

        A text-to-image student is written for diffusers, ComfyUI and A1111, one on pixels for `fewstep.load`.

        Raises:
            SettingsError: a teacher, a student of another kind, or a format that does not apply.
            FileError: the folder holds other files, or the student's files cannot be read.
        """
        self._must_be_a_student("export")
        files, notes = export_student(self.path, Path(out), formats, dtype, base_file, license, base_model)
        for sentence in notes:
            print(f"note: {sentence}")
        return files

    @cached_property
    def pipeline(self) -> Any:
        """The student as a pipeline of diffusers, on the model's device: `student.pipeline("a cat", num_inference_steps=4)`.

        Raises:
            SettingsError: not a text-to-image student.
            FileError, TeacherError: its files, or its teacher's, cannot be read.
        """
        self._must_be_a_student("pipeline")
        assert isinstance(self._found, Student)
        if self._found.file is None:
            raise SettingsError(
                f"`pipeline` must be asked of a student's run folder or file, got the export {self.path}. Try: "
                f"diffusers.DiffusionPipeline.from_pretrained({self.path!r})"
            )
        return load_pipeline(Facts.read(self._found.file, self.path)).to(self.device, self.dtype)

    def candidate(self, evaluations: int | None = None, guidance: Rule | float | None = None) -> Candidate:
        """The model as `fewstep.evaluation.compare` takes it."""
        self._found.conditioner.cond(None, 1)
        sampler = self._sampler(evaluations, guidance, None, self._found.conditioner)
        name = self.name + (f", {sampler.calls} evaluations" if not self.is_student else "")
        found = self._found
        return Candidate(
            name, sampler, found.shape, found.conditioner, found.sha256, dict(found.provenance), plain(guidance)
        )

    def _sampler(
        self,
        evaluations: int | None,
        guidance: Rule | float | None,
        size: tuple[int, int] | None,
        conditioner: Conditioner,
    ) -> FewStep | ManyStep:
        check_settings(evaluations, guidance)
        view = self._at(size)
        if isinstance(self._found, Student):
            if evaluations is not None or guidance is not None:
                raise SettingsError(
                    f"`evaluations` and `guidance` must be left out for the few-step student {self.path}. Try: a teacher"
                )
            return FewStep(self._found.generator.eval(), view.codec)
        teacher = replace(self._found, conditioner=conditioner)
        denoiser = teacher.guided(guidance).to(self.device).eval()
        return ManyStep(denoiser, evaluations or TEACHER_CALLS, self.device, codec=view.codec)

    def _at(self, size: tuple[int, int] | None) -> Student | Teacher:
        """Shape, conditioner and codec at a size of pictures."""
        if size is None:
            return self._found
        teacher = self._found.teacher if isinstance(self._found, Student) else self._found
        if teacher is None or not self.takes_prompts:
            raise SettingsError(f"`size` must be left out for {self.path}, not a text-to-image model, got {size}")
        return teacher.at(size[1], size[0])

    @cached_property
    def _encoder(self) -> Any:
        assert self._settings is not None, "only these take prompts"
        return self._settings.encoder(self.device)

    def _encoded(self, prompts: Sequence[str], negative: str | None, size: tuple[int, int] | None) -> Conditioner:
        assert self._settings is not None, "only these take prompts"
        settings, encoder = self._settings, self._encoder
        if negative is not None:
            settings = settings.model_copy(update={"negative_prompt": negative})
            encoder = settings.encoder(self.device)
        before = self._at(size).conditioner
        assert isinstance(before, Prompts | NoPrompts)
        return settings.encode(prompts, encoder).with_constants(before.constants)

    def _must_be_a_student(self, what: str) -> None:
        if not self.is_student:
            raise SettingsError(
                f"`{what}` must be asked of a few-step student, got the teacher {self.path}. Try: fewstep.distill first"
            )
