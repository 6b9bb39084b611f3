"""Complete runs as typed records, which build networks, data and scorer for the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field
from tyro.conf import Suppress

from fewstep.data import Buckets, DataSpec, ImageDataset, Prepared
from fewstep.diffusion.augment import AUGMENT_DIM
from fewstep.evaluation.perceptual import Decoded, PerceptualName, perceptual_for
from fewstep.methods import Objective
from fewstep.methods.pairs import PairSet
from fewstep.methods.shipped import SiD
from fewstep.networks.lora import LoraSpec
from fewstep.run.frozen import check_frozen
from fewstep.run.generator import GeneratorSpec
from fewstep.run.prepared import prepared_images
from fewstep.run.pretraining import PretrainRun
from fewstep.run.provenance import provenance_of
from fewstep.run.scoring import EvaluationSpec
from fewstep.students.student import part_of
from fewstep.system.checkpoint import Checkpoints
from fewstep.system.console import note, waiting
from fewstep.system.errors import SettingsError, TeacherError
from fewstep.system.record import Record
from fewstep.teachers import ClassLabels, DiffusersTeacher, NativeTeacher, Teacher, TeacherSpec
from fewstep.training.distill import Distillation, Setup
from fewstep.training.health import HealthSpec
from fewstep.training.optim import OptimSpec, check_offload
from fewstep.training.spec import TrainSpec
from fewstep.training.start import read_start
from fewstep.training.trainer import Trainer

__all__ = [
    "DistillRun",
    "Optimizers",
    "Run",
]


class CriticSpec(Record):
    """The fake score."""

    lora: LoraSpec | None = None
    """Train low-rank adapters on the teacher's own network instead of a copy of it. With `generator.lora`, memory holds one
    network instead of three."""


class Optimizers(Record):
    """The two players' optimizers."""

    generator: OptimSpec = OptimSpec()
    """The generator's."""
    critic: OptimSpec = OptimSpec()
    """Optimizer of the fake score and the GAN head."""


class DistillRun(Record):
    """Distil a teacher into a few-step generator."""

    kind: Literal["distill"] = "distill"
    imports: Annotated[tuple[str, ...], Suppress] = ()  # no override: the command reads `--imports` before the run
    """Python files (relative to this one) and modules that add methods, teachers, networks and data sets: [my_method.py]."""
    teacher: TeacherSpec = NativeTeacher()
    """The diffusion model."""
    generator: GeneratorSpec = GeneratorSpec(sigmas=(2.5,))
    """The few-step generator."""
    critic: CriticSpec = CriticSpec()
    """The fake score."""
    objective: Objective = SiD()
    """The method."""
    data: DataSpec | None = None
    """Real images, for a GAN or for evaluation."""
    flip: bool = False
    """Mirror half of the GAN's real images left to right."""
    pairs: Path | None = None
    """Folder of teacher pairs, for DMD (made by `fewstep pairs`)."""
    perceptual: PerceptualName = "auto"
    """Distance for the pairs; auto is LPIPS (VGG) if its weights are on the machine, else small for 28x28 grey images, else l2."""
    start_from: Path | None = None
    """Start with the weights of another distillation instead of the teacher's: a run folder (its newest checkpoint,
    averaged weights), one of its checkpoints, a student's file, or a DMD2 checkpoint folder."""
    optim: Optimizers = Optimizers()
    """The two players' optimizers."""
    train: TrainSpec = TrainSpec(images=300_000)
    """Length, batch, seed."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """Scoring during the run."""
    health: HealthSpec = HealthSpec()
    """The probe: a few dozen samples compared with the teacher's at each evaluation."""

    def trainer(self, folder: Path, teacher: Teacher | None = None) -> Trainer:
        """Load and build everything for `fit()`.

        Raises:
            ValueError: a sub-class of it, with a remedy, for settings or inputs that do not fit.
        """
        self.objective.check(self.generator.steps, self.generator.transition)
        if self.train.offload:
            check_offload(self.optim.generator, self.optim.critic)
        check_frozen(self.teacher, self.adapters(), self.train)
        if teacher is None:
            with waiting("loading the teacher"):
                teacher = self.teacher.load()
        net = teacher.student_spec.net if teacher.student_spec else None
        if (share := getattr(self.objective, "augment", 0)) and getattr(net, "augment_dim", 0) != AUGMENT_DIM:
            raise SettingsError(
                f"`objective.augment` must be 0 for {teacher.name}, whose network takes no augmentation, got {share}. Try: leave it out"
            )
        negative = self.teacher.negative_prompt if isinstance(self.teacher, DiffusersTeacher) else None
        scales = [getattr(self.objective, name, None) for name in ("guidance", "critic_guidance", "fake_guidance")]
        if negative is not None and all(scale in (None, 1) for scale in scales):
            raise SettingsError(
                f"teacher.negative_prompt must come with guidance, got {negative!r} and no objective.guidance. Try: 7.5, or "
                "leave the negative prompt out"
            )
        device = self.train.torch_device()
        with waiting("loading the real images"):
            dataset = self.dataset(teacher)
        pairs = perceptual = None
        if self.objective.needs_pairs:
            if teacher.sizes:
                raise SettingsError(
                    "teacher.buckets must be left out for an objective that regresses on pairs, which are of one size, got "
                    f"{len(teacher.sizes)} sizes. Try: teacher.resolution alone"
                )
            if self.pairs is None:
                raise SettingsError(
                    "`pairs` must be given for this objective. Try: `fewstep pairs RECIPE --out FOLDER` and `pairs: FOLDER`, or set "
                    "objective.regression_weight to 0"
                )
            with waiting(f"loading the pairs in {self.pairs}"):
                pairs = PairSet(self.pairs, teacher, self.objective.guidance_with)
            perceptual = perceptual_for(teacher.picture_shape, self.perceptual, device)
            if teacher.codec is not None:
                perceptual = Decoded(perceptual, teacher.codec.decode)
        whole = dataset if isinstance(dataset, ImageDataset) else None
        scorer = self.evaluation.scorer(teacher.picture_shape, whole, teacher.provenance, device, self.train.bf16())
        provenance = provenance_of(self) | {
            "teacher": teacher.name,
            "teacher_sha256": teacher.sha256,
            "class_names": list(teacher.conditioner.names) if isinstance(teacher.conditioner, ClassLabels) else [],
        }
        if perceptual is not None:
            provenance["perceptual"] = perceptual.name
        taught: Any = teacher.provenance.get("run")
        if self.data is None and isinstance(taught, dict) and taught.get("data"):
            provenance["teacher_data"] = taught["data"]
        if "reference" in teacher.provenance:
            provenance["reference"] = teacher.provenance["reference"]
        drawn = self.evaluation.drawn(self.teacher, teacher, device)
        with waiting("building student and fake score"):
            task = Distillation(
                Setup(
                    teacher,
                    self.generator.resolve(teacher.denoiser.schedule),
                    self.objective,
                    self.train,
                    self.optim.generator,
                    self.optim.critic,
                    dataset if self.objective.needs_real else None,
                    pairs,
                    perceptual,
                    scorer,
                    provenance,
                    self.flip,
                    self.generator.lora,
                    self.critic.lora,
                    self.generator.transition,
                    self.health,
                    drawn,
                )
            )
        task.inputs = {**task.inputs, **(scorer.inputs if scorer else {})}
        if self.start_from is not None and Checkpoints(folder / "checkpoints").latest() is None:
            with waiting(f"reading the weights of {self.start_from}"):
                self._begin(task, self.start_from)
        return Trainer(task, self.train, folder, describe=f"distil ({self.objective.method})")

    def adapters(self) -> dict[str, LoraSpec | None]:
        """Adapters of each trained network by their setting; None for whole weights."""
        found = {"generator.lora": self.generator.lora}
        return found | ({"critic.lora": self.critic.lora} if self.objective.needs_critic else {})

    def _begin(self, task: Distillation, start: Path) -> None:
        """Load the weights at `start` into the task."""
        try:
            task.begin(read_start(start))
        except (RuntimeError, KeyError) as error:
            lines = str(error).splitlines()
            raise SettingsError(
                f"start_from {start} does not fit teacher {task.teacher.name}: {lines[min(1, len(lines) - 1)].strip()}"
            ) from None

    def dataset(self, teacher: Teacher) -> ImageDataset | Buckets | None:
        """Load the real images if the run needs them, and check them against the teacher.

        Raises:
            SettingsError: none are given although the method has a GAN, or they do not fit the teacher.
        """
        wanted = self.objective.needs_real or (
            self.evaluation.samples > 0 and self.evaluation.reference is None and "reference" not in teacher.provenance
        )
        if not wanted:
            return None
        data = self.data
        if data is None and teacher.codec is None:
            data = part_of(teacher.provenance, "data", DataSpec)  # type: ignore[type-abstract]
            if data is not None:
                note(f"real images: those that the teacher was trained on ({getattr(data, 'path', data.kind)})")
        if data is None:
            if self.objective.needs_real:
                raise SettingsError(
                    "`data` must be given for this objective's GAN. Try: `data: {kind: folder, path: DIR}`, or set "
                    "objective.gan_weight to 0"
                )
            return None
        if isinstance(data, Prepared):
            prompts = self.teacher.prompts if isinstance(self.teacher, DiffusersTeacher) else None
            dataset = prepared_images(teacher, prompts, data)
            if self.flip and teacher.codec is not None:
                raise SettingsError(
                    "`flip` must be false for prepared latents: a mirrored latent is not the latent of a mirrored image"
                )
            if isinstance(dataset, Buckets):
                return dataset
        elif teacher.sizes and self.objective.needs_real:
            raise SettingsError(
                f"data must be prepared images where teacher.buckets has several sizes, got {data.kind}. Try: data: {{kind: "
                "prepared, path: FOLDER} after `fewstep prepare RUN --images FOLDER`"
            )
        else:
            dataset = data.load()
        if dataset.shape != tuple(teacher.shape):
            raise TeacherError(
                f"`data` must have the shape of teacher {teacher.name}, {list(teacher.shape)}, got {dataset.name} with "
                f"{list(dataset.shape)}. Try: data of the teacher's size and channels"
            )
        if (
            self.objective.needs_real
            and teacher.conditioner.num_classes
            and dataset.num_classes != teacher.conditioner.num_classes
        ):
            raise TeacherError(
                f"`data` must have the classes of teacher {teacher.name}, {teacher.conditioner.num_classes}, got {dataset.name} with "
                f"{dataset.num_classes}: the GAN compares images of equal class"
            )
        return dataset


Run = Annotated[PretrainRun | DistillRun, Field(discriminator="kind")]
R = TypeVar("R", PretrainRun, DistillRun)
