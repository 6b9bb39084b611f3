"""Whole runs as typed records: one YAML file in, networks and trainer out. The only module that knows all the others.

A run file is read strictly (an unknown key is an error that names it), overridden from the command line, and stored
resolved beside the results, so that the run folder alone says what was done.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

import fewstep
from fewstep import distributed
from fewstep.augment import AUGMENT_DIM
from fewstep.checkpoint import CheckpointError, Checkpoints, atomic_write
from fewstep.data import AnyData, DataSpec, ImageDataset, Prepared
from fewstep.device import hardware
from fewstep.distill import Distillation
from fewstep.ending import finished
from fewstep.evaluate import Metric, find_reference, reference_for
from fewstep.features import Clip, ExtractorName, extractor_for
from fewstep.generator import calls_at
from fewstep.lora import LoraSpec
from fewstep.model import DenoiserSpec
from fewstep.noise import Discrete, LogNormalNoise, NoiseLaw, Schedule
from fewstep.objectives import ObjectiveSpec, SiD
from fewstep.optim import OptimSpec, check_offload
from fewstep.out_folder import check_out
from fewstep.pairs import PairSet
from fewstep.perceptual import Decoded, Perceptual, perceptual_for
from fewstep.pretrain import Pretraining
from fewstep.run_paths import PLACES, absent, anchored, placed, value_of
from fewstep.score import Scorer
from fewstep.start import read_start
from fewstep.strict_yaml import read_yaml, write_yaml
from fewstep.teachers import ClassLabels, DiffusersTeacher, NativeTeacher, Teacher, TeacherError, TeacherSpec
from fewstep.tracking import say, waiting
from fewstep.trainer import Trainer, TrainSpec

__all__ = [
    "DistillRun",
    "EvaluationSpec",
    "GeneratorSpec",
    "Optimizers",
    "PretrainRun",
    "Run",
    "RunError",
    "dump_run",
    "find_pipeline",
    "find_recipe",
    "list_recipes",
    "load_run",
    "text_to_image_teacher",
]


class RunError(ValueError):
    """A run file or its overrides are wrong."""


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GeneratorSpec(_Spec):
    """Where the generator is called."""

    sigmas: tuple[float, ...] | None = None
    """Noise-to-signal ratio of each call, noisiest first: [80] is DMD's, [2.5] SiD's generator of EDM models."""
    timesteps: tuple[int, ...] | None = None
    """Or the timestep of each call, for models with a table of them: [999, 749, 499, 249] is DMD2's SDXL."""
    times: tuple[float, ...] | None = None
    """Or the normalised time of each call."""
    lora: LoraSpec | None = None
    """Train low-rank adapters on the teacher's own network instead of a copy of it; null for a copy."""

    @model_validator(mode="after")
    def _one(self) -> GeneratorSpec:
        ways = {"sigmas": self.sigmas, "timesteps": self.timesteps, "times": self.times}
        given = {name: levels for name, levels in ways.items() if levels is not None}
        if len(given) != 1:
            raise ValueError(
                "give one of sigmas (such as [2.5]), timesteps (such as [999, 749]) or times (such as [1.0])"
            )
        ((name, levels),) = given.items()
        if not levels or any(later >= earlier for earlier, later in itertools.pairwise(levels)):
            raise ValueError(
                f"{name} must hold a level for each call and fall strictly, got {list(levels)}. Try: [80, 10]"
            )
        return self

    def resolve(self, schedule: Schedule) -> tuple[float, ...]:
        """Normalised times under the teacher's schedule.

        Raises:
            RunError: timesteps of a schedule that has none, or levels that lie outside the grid or do not fall.
        """
        if self.times is not None:
            return self.times
        if self.timesteps is not None:
            if not isinstance(schedule, Discrete):
                raise RunError("generator.timesteps are for models with a table of noise levels: give sigmas or times")
            last = len(schedule.alphas_cumprod) - 1
            if not all(0 < step <= last for step in self.timesteps):
                raise RunError(f"generator.timesteps {list(self.timesteps)} must lie in 1 .. {last}")
            return tuple(step / last for step in self.timesteps)
        assert self.sigmas is not None  # by _one
        try:
            return calls_at(schedule, self.sigmas, "generator.sigmas")
        except ValueError as error:
            raise RunError(str(error)) from None


class CriticSpec(_Spec):
    """The fake score."""

    lora: LoraSpec | None = None
    """Train low-rank adapters on the teacher's own network instead of a copy of it. With `generator.lora` as well, one
    network is in memory instead of three."""


class Optimizers(_Spec):
    """The two players' optimizers."""

    generator: OptimSpec = OptimSpec()
    """The generator's."""
    critic: OptimSpec = OptimSpec()
    """The fake score's, GAN head included."""


class EvaluationSpec(_Spec):
    """How samples are scored during the run."""

    samples: int = Field(5_000, ge=0)
    """Images to make; 0 for no evaluation."""
    metrics: tuple[Metric, ...] = ("fid",)
    """What to compute: fid, kid, precision, recall, isc (Inception score)."""
    extractor: ExtractorName = "auto"
    """Feature extractor; auto chooses by image shape."""
    clip: Path | None = None
    """Folder of a CLIP model: how well pictures agree with their captions (CLIP score, retrieval of the caption among 100)
    and how those of one caption differ; and the features, with `extractor: clip`."""
    reference: str | None = None
    """Statistics of the real images: an .npz file, a folder or .zip of images, or `fashion-mnist`, which ships; null:
    computed from `data`, else what the teacher's card names."""
    evaluations: int = Field(35, gt=0)
    """Network evaluations a sample of the teacher takes (pretraining)."""
    batch: int = Field(250, gt=0)
    """Samples at a time."""

    def scorer(
        self,
        shape: tuple[int, ...],
        dataset: ImageDataset | None,
        card: dict[str, Any],
        device: torch.device,
        bf16: bool,
    ) -> Scorer | None:
        """The scorer this asks for.

        Raises:
            RunError: there is nothing to compare with.
        """
        if self.samples == 0 or len(shape) != 3:
            return None
        with waiting("loading what the evaluation looks with"):
            extractor = extractor_for(shape, self.extractor, device, self.clip)
        name = self.reference or (None if dataset is not None else card.get("reference"))
        if name is None and dataset is None:
            raise RunError(
                "evaluation needs real images or their statistics: set evaluation.reference to an .npz file, add "
                "a data: block, or set evaluation.samples to 0"
            )
        judge = None
        if self.clip is not None:
            judge = extractor if isinstance(extractor, Clip) else Clip(self.clip, device)
        with waiting("statistics of the real images, for the evaluation"):
            reference = reference_for(dataset, extractor) if name is None else find_reference(name, extractor, shape)
        return Scorer(reference, extractor, self.samples, self.metrics, self.batch, bf16, judge=judge)


class PretrainRun(_Spec):
    """Train a teacher."""

    kind: Literal["pretrain"] = "pretrain"
    denoiser: DenoiserSpec = DenoiserSpec()
    """What to train."""
    pipeline: DiffusersTeacher | None = None
    """Train the network of a text-to-image pipeline on, from the weights it has, instead of `denoiser`: on prepared images
    (`data: {kind: prepared}`). The run's folder then holds a whole pipeline."""
    guidance: float | None = Field(None, ge=0)
    """Guidance scale of the sampler, when scoring and drawing; null for none."""
    data: DataSpec
    """Images and labels."""
    noise: NoiseLaw = LogNormalNoise()
    """Noise levels of training."""
    label_dropout: float = Field(0.1, ge=0, le=1)
    """Share of images whose class is hidden, so that the model can be guided."""
    flip: bool = False
    """Mirror half of the images left to right."""
    augment: float = Field(0.0, ge=0, le=1)
    """Probability of EDM's augmentations, for networks with augment_dim 9 (0.12 for CIFAR-10, 0.15 for FFHQ, AFHQv2)."""
    optim: OptimSpec = OptimSpec(lr=1e-3)
    """Its optimizer."""
    train: TrainSpec
    """Length, batch, seed."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """Scoring during the run."""

    def trainer(self, folder: Path) -> Trainer:
        """Everything loaded and built, ready to `fit()`.

        Raises:
            ValueError: one of its sub-classes, for whatever does not fit, with the way out.
        """
        if self.train.offload:
            check_offload(self.optim)
        with waiting("loading the images"):
            dataset = self.data.load()
        if self.pipeline is not None:
            return self._of_pipeline(folder, dataset)
        net = self.denoiser.net
        if tuple(net.sample_shape) != dataset.shape:
            raise RunError(
                f"denoiser.net makes samples of shape {list(net.sample_shape)}, {dataset.name} holds "
                f"{list(dataset.shape)}: set denoiser.net.size and .channels"
            )
        if net.num_classes != dataset.num_classes:
            raise RunError(
                f"denoiser.net.num_classes is {net.num_classes}, {dataset.name} has {dataset.num_classes} "
                "classes: make them equal"
            )
        if self.augment and getattr(net, "augment_dim", 0) != AUGMENT_DIM:
            raise RunError(
                f"augment {self.augment} tells the network {AUGMENT_DIM} numbers: set denoiser.net.augment_dim to "
                f"{AUGMENT_DIM} (EDM's networks have it), or leave augment out"
            )
        scorer = self.evaluation.scorer(dataset.shape, dataset, {}, self.train.torch_device(), self.train.bf16())
        card = provenance(self) | {"data": dataset.name}
        task = Pretraining(
            self.denoiser,
            dataset,
            self.optim,
            self.train,
            self.noise,
            self.label_dropout,
            scorer,
            self.evaluation.evaluations,
            card,
            self.augment,
            self.flip,
            guidance=self.guidance,
        )
        task.inputs = {**task.inputs, **(scorer.inputs if scorer else {})}
        return Trainer(task, self.train, folder, describe="pretrain")

    def _of_pipeline(self, folder: Path, dataset: ImageDataset) -> Trainer:
        """The same for the network of a pipeline."""
        assert self.pipeline is not None
        if not isinstance(self.data, Prepared):
            raise RunError(
                "a pipeline's network is trained on prepared images: `fewstep prepare PIPELINE --images FOLDER --out PREPARED`, "
                "then data: {kind: prepared, path: PREPARED} and pipeline.prompts: PREPARED"
            )
        if self.flip or self.augment or self.denoiser != DenoiserSpec():
            raise RunError(
                "flip, augment and denoiser are for networks that are trained on pixels from scratch, not for a pipeline: leave them out"
            )
        with waiting(f"loading {self.pipeline.path}"):
            teacher = self.pipeline.load()
        check_prepared(teacher, self.pipeline, self.data, dataset)
        device = self.train.torch_device()
        scorer = self.evaluation.scorer(teacher.picture_shape, None, {}, device, self.train.bf16())
        card = provenance(self) | {"data": dataset.name}
        task = Pretraining(
            teacher.student_spec, dataset, self.optim, self.train, self.noise, self.label_dropout, scorer,
            self.evaluation.evaluations, card, pipeline=teacher, guidance=self.guidance,
        )  # fmt: skip
        task.inputs = {**task.inputs, **(scorer.inputs if scorer else {})}
        return Trainer(task, self.train, folder, describe="pretrain")


class DistillRun(_Spec):
    """Distil a teacher into a few-step generator."""

    kind: Literal["distill"] = "distill"
    teacher: TeacherSpec = NativeTeacher()
    """The diffusion model."""
    generator: GeneratorSpec = GeneratorSpec(sigmas=(2.5,))
    """The few-step generator: where it is called."""
    critic: CriticSpec = CriticSpec()
    """The fake score: what it is made of."""
    objective: ObjectiveSpec = SiD()
    """The method."""
    data: Annotated[AnyData | None, Field(discriminator="kind")] = None
    """Real images, for a GAN or for evaluation."""
    flip: bool = False
    """Mirror half of the GAN's real images left to right."""
    pairs: Path | None = None
    """Folder of teacher pairs, for DMD (made by `fewstep pairs`)."""
    perceptual: Literal["auto", "lpips", "small"] = "auto"
    """Distance for the pairs; auto is LPIPS (VGG) where its weights are on the machine."""
    start_from: Path | None = None
    """Begin with the weights of another distillation instead of the teacher's: a run folder (its newest checkpoint,
    averaged weights), one of its checkpoints, a student's file, or a DMD2 checkpoint folder."""
    optim: Optimizers = Optimizers()
    """The two players' optimizers."""
    train: TrainSpec = TrainSpec(images=300_000)
    """Length, batch, seed."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """Scoring during the run."""

    def trainer(self, folder: Path, teacher: Teacher | None = None) -> Trainer:
        """Everything loaded and built, ready to `fit()`.

        Raises:
            ValueError: one of its sub-classes, for whatever does not fit, with the way out.
        """
        if self.train.offload:
            check_offload(self.optim.generator, self.optim.critic)
        if teacher is None:
            with waiting("loading the teacher"):
                teacher = self.teacher.load()
        if getattr(self.objective, "augment", 0) and getattr(teacher.student_spec.net, "augment_dim", 0) != AUGMENT_DIM:
            raise RunError(
                f"objective.augment {self.objective.augment}: the network of {teacher.name} takes no augmentation "
                "numbers, leave it out"
            )
        device = self.train.torch_device()
        with waiting("loading the real images"):
            dataset = self.dataset(teacher)
        pairs = perceptual = None
        if self.objective.needs_pairs:
            if self.pairs is None:
                raise RunError(
                    "this objective regresses on teacher pairs: make them with `fewstep pairs RECIPE --out "
                    "FOLDER` and set `pairs: FOLDER`, or set objective.regression_weight to 0"
                )
            with waiting(f"loading the pairs in {self.pairs}"):
                pairs = PairSet(self.pairs, teacher, self.objective.guidance)
            perceptual = perceptual_for(teacher.picture_shape, self.perceptual, device)
            if teacher.codec is not None:
                perceptual = Decoded(perceptual, teacher.codec.decode)
        scorer = self.evaluation.scorer(teacher.picture_shape, dataset, teacher.card, device, self.train.bf16())
        card = provenance(self) | {
            "teacher": teacher.name,
            "teacher_sha256": teacher.sha256,
            "class_names": list(teacher.conditioner.names) if isinstance(teacher.conditioner, ClassLabels) else [],
        }
        if perceptual is not None:
            card["perceptual"] = perceptual.name
        if "reference" in teacher.card:
            card["reference"] = teacher.card["reference"]
        with waiting("building student and fake score"):
            task = self._task(teacher, dataset, pairs, perceptual, scorer, card)
        task.inputs = {**task.inputs, **(scorer.inputs if scorer else {})}
        if self.start_from is not None and Checkpoints(folder / "checkpoints").latest() is None:
            with waiting(f"reading the weights of {self.start_from}"):
                self._begin(task, self.start_from)
        return Trainer(task, self.train, folder, describe=f"distil ({self.objective.method})")

    def _task(
        self,
        teacher: Teacher,
        dataset: ImageDataset | None,
        pairs: PairSet | None,
        perceptual: Perceptual | None,
        scorer: Scorer | None,
        card: dict[str, Any],
    ) -> Distillation:
        """What the trainer trains."""
        return Distillation(
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
            card,
            self.flip,
            self.generator.lora,
            self.critic.lora,
        )

    def _begin(self, task: Distillation, start: Path) -> None:
        """Give the task the weights that lie at `start`."""
        try:
            task.begin(read_start(start))
        except (RuntimeError, KeyError) as error:
            lines = str(error).splitlines()
            raise RunError(
                f"start_from {start} does not fit teacher {task.teacher.name}: {lines[min(1, len(lines) - 1)].strip()}"
            ) from None

    def dataset(self, teacher: Teacher) -> ImageDataset | None:
        """The real images if the run needs them, checked against the teacher.

        Raises:
            RunError: none given though the method has a GAN, or they do not fit the teacher.
        """
        wanted = self.objective.needs_real or (
            self.evaluation.samples > 0 and self.evaluation.reference is None and "reference" not in teacher.card
        )
        if not wanted:
            return None
        if self.data is None:
            if self.objective.needs_real:
                raise RunError(
                    "this objective's GAN needs real images: add a data: block (such as `data: "
                    "{kind: folder, path: DIR}`), or set objective.gan_weight to 0"
                )
            return None
        dataset = self.data.load()
        if isinstance(self.data, Prepared):
            check_prepared(teacher, self.teacher, self.data, dataset)
            if self.flip and teacher.codec is not None:
                raise RunError(
                    "flip must be false for prepared latents: their mirror is not the latent of a mirrored image"
                )
        if dataset.shape != tuple(teacher.shape):
            raise TeacherError(
                f"teacher {teacher.name} makes samples of shape {list(teacher.shape)}, {dataset.name} holds "
                f"{list(dataset.shape)}: choose data of the teacher's size and channels"
            )
        if (
            self.objective.needs_real
            and teacher.conditioner.num_classes
            and dataset.num_classes != teacher.conditioner.num_classes
        ):
            raise TeacherError(
                f"teacher {teacher.name} knows {teacher.conditioner.num_classes} classes, {dataset.name} has "
                f"{dataset.num_classes}: the GAN compares images of equal class"
            )
        return dataset


def check_prepared(teacher: Teacher, spec: DiffusersTeacher, data: Prepared, dataset: ImageDataset) -> None:
    """Refuse images that were encoded for another model, or whose captions are other prompts.

    Raises:
        RunError: for either.
    """
    encoder, own = data.about()["encoder"], teacher.codec.sha256 if teacher.codec else "pixels"
    if encoder not in (own, "unknown"):
        raise RunError(
            f"the images in {data.path} were encoded by another VAE than teacher {teacher.name} has (sha256 {encoder[:8]}, "
            f"not {own[:8]}): prepare them again in another folder"
        )
    if dataset.class_names != tuple(teacher.conditioner.names):
        raise RunError(
            f"the captions of the images in {data.path} are not the prompts in {spec.prompts}: prepare both in one folder "
            "(`fewstep prepare RECIPE --prompts FILE --images FOLDER`) and set prompts and data.path to it"
        )


Run = Annotated[PretrainRun | DistillRun, Field(discriminator="kind")]
R = TypeVar("R", PretrainRun, DistillRun)


def provenance(run: BaseModel) -> dict[str, Any]:
    """What a model card must say of where a file comes from."""
    return {
        "made_by": f"fewstep {fewstep.__version__}",
        "run": run.model_dump(mode="json", exclude_none=True),
        "hardware": hardware(distributed.world_size()),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def load_run(path: Path | str) -> PretrainRun | DistillRun:
    """Read a run file, a recipe by name, or a run folder.

    Raises:
        RunError: no such file, not YAML, unknown or missing keys, wrong types: each named with its path in the file.
    """
    file = find_recipe(path)
    try:
        values = read_yaml(file.read_bytes())
    except yaml.YAMLError as error:
        raise RunError(f"{file} is not valid YAML: {str(error).splitlines()[0]}{_mark(error)}") from None
    if not isinstance(values, dict):
        raise RunError(f"{file} must hold keys such as `teacher:` and `objective:`, not {type(values).__name__}")
    if "kind" not in values:
        raise RunError(f"{file}: `kind:` is missing: write `kind: distill` or `kind: pretrain`")
    try:
        run: PretrainRun | DistillRun = TypeAdapter(Run).validate_python(values)
    except ValidationError as error:
        raise RunError(f"{file}:\n{explain(error)}") from None
    if odd := [*_switches(values, run.model_dump()), *_endless(run.model_dump())]:
        raise RunError(f"{file}:\n" + "\n".join(odd))
    return run


def _switches(given: Any, read: Any, where: str = "") -> Iterator[str]:
    """Lines about yes, no, on, off, true and false where a number is wanted: pydantic would make them 1 and 0."""
    if isinstance(given, bool) and not isinstance(read, bool) and read is not None:
        yield f"  {where}: must be a number, got {str(given).lower()} (to YAML, yes, no, on and off are true and false)"
    for name, value, other in _inside(given, read):
        yield from _switches(value, other, f"{where}.{name}".strip("."))


def _endless(values: Any, where: str = "") -> Iterator[str]:
    """Lines about numbers that are not finite, which no setting can be."""
    if isinstance(values, float) and not math.isfinite(values):
        yield f"  {where}: must be a finite number, got {values}"
    for name, value, _ in _inside(values, values):
        yield from _endless(value, f"{where}.{name}".strip("."))


def _inside(one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """What two nested values hold at the same names or places."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        yield from ((str(name), value, other[name]) for name, value in one.items() if name in other)
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        yield from ((str(index), *pair) for index, pair in enumerate(zip(one, other, strict=True)))


def find_pipeline(name: str) -> DiffusersTeacher | None:
    """The pipeline whose folder or single file has this name; None for the name of a run."""
    found = (Path(name) / "model_index.json").exists() or Path(name).suffix == ".safetensors"
    return DiffusersTeacher(path=name) if found else None


def text_to_image_teacher(name: str) -> DiffusersTeacher:
    """The text-to-image teacher of a run file or recipe, or of a pipeline's folder or single file.

    Raises:
        RunError: the run has none.
    """
    pipeline = find_pipeline(name)
    if pipeline is not None:
        return pipeline
    run = load_run(name)
    if not isinstance(run, DistillRun) or not isinstance(run.teacher, DiffusersTeacher):
        raise RunError(
            f"{name} has no text-to-image teacher: prompts are for `teacher: {{kind: diffusers, path: ...}}`"
        )
    return run.teacher


def explain(error: ValidationError) -> str:
    """A pydantic error as lines `path: what is wrong`, without the tags of unions in the path."""
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"] if part not in _tags()) or "the file"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = (
                f"unknown key (its value is {problem['input']!r}); known keys: {', '.join(_siblings(problem['loc']))}"
            )
        elif problem["type"] not in ("missing", "value_error", "union_tag_not_found"):
            message += f" (it is {problem['input']!r})"
        lines.append(f"  {where}: {message}")
    return "\n".join(lines)


DISCRIMINATORS = ("kind", "method")  # the fields that say which record of a union is meant


def _records(annotation: Any) -> list[type[BaseModel]]:
    """The record types an annotation can stand for."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [record for argument in typing.get_args(annotation) for record in _records(argument)]


@functools.cache
def _tags() -> frozenset[str]:
    """Every union's tags ("distill", "sid", "dit", ...): pydantic puts them into the paths of its errors."""
    todo, seen = _records(Run), set()
    while todo:
        record = todo.pop()
        if record not in seen:
            seen.add(record)
            todo += [found for field in record.model_fields.values() for found in _records(field.annotation)]
    return frozenset(r.model_fields[name].default for r in seen for name in DISCRIMINATORS if name in r.model_fields)


def _siblings(location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields beside an unknown key, found by walking the record types along its path."""
    found = _records(Run)
    for part in location[:-1]:
        tagged = [
            r for r in found if any(r.model_fields[n].default == part for n in DISCRIMINATORS if n in r.model_fields)
        ]
        if part in _tags() and tagged:
            found = tagged
        else:
            found = [
                record for r in found if part in r.model_fields for record in _records(r.model_fields[part].annotation)
            ] or found
    return sorted({name for record in found for name in record.model_fields})


def _mark(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" (line {mark.line + 1})" if mark else ""


def dump_run(run: BaseModel, path: Path) -> None:
    """Write a resolved run as YAML, in the order of its fields."""
    atomic_write(path, write_yaml(run.model_dump(mode="json")))


def _recipe_folders() -> Sequence[Path]:
    package = Path(str(resources.files("fewstep")))
    return [folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir()]


def list_recipes() -> dict[str, Path]:
    """Shipped recipes: name ("fashion-mnist/sid") -> file."""
    return {
        str(path.relative_to(folder).with_suffix("")): path
        for folder in _recipe_folders()
        for path in sorted(folder.rglob("*.yaml"))
    }


def find_recipe(path: Path | str) -> Path:
    """A run file: a path, a run folder's `run.yaml`, or a shipped recipe with or without `recipes/` and `.yaml`.

    Raises:
        RunError: nothing of that name.
    """
    file = Path(path)
    if file.is_dir() and (file / "run.yaml").exists():
        return file / "run.yaml"
    if file.is_file():
        return file
    name = str(path).removeprefix("recipes/").removesuffix(".yaml")
    recipes = list_recipes()
    if name in recipes:
        return recipes[name]
    raise RunError(
        f"no run file {path} (looked in {Path.cwd()} and among the shipped recipes: {', '.join(recipes) or 'none'})"
    )


def override(run: R, arguments: Sequence[str]) -> R:
    """Apply command-line settings such as `--objective.gan-weight 1e-3`; `--help` prints them all and exits.

    Raises:
        RunError: the resulting run is invalid.
    """
    import tyro

    try:
        changed = tyro.cli(
            type(run),
            default=run,
            args=list(arguments),
            config=(tyro.conf.AvoidSubcommands,),
            prog=f"fewstep {run.kind} RECIPE",
        )
    except ValidationError as error:
        raise RunError(f"command line:\n{explain(error)}") from None
    if odd := list(_endless(changed.model_dump())):
        raise RunError("command line:\n" + "\n".join(odd))
    return changed


def run_name(recipe: str) -> str:
    """The run folder's name for a recipe: `fashion-mnist/sid` -> `fashion-mnist-sid`."""
    file = find_recipe(recipe)
    if file.name == "run.yaml":
        return file.parent.name
    return "-".join(part for part in (file.parent.name, file.stem) if part and part != "recipes")


def run_place(recipe: str) -> Path:
    """The run folder of a command without `--out`: `runs/NAME`; of a run folder that has trained, itself."""
    folder = Path(recipe)
    return folder if (folder / "checkpoints").is_dir() else Path("runs") / run_name(recipe)


def execute(run: PretrainRun | DistillRun, folder: Path) -> dict[str, Any]:
    """Train in `folder`, or resume there; returns the last scores. A run that is finished is left as it is.

    Until the first checkpoint nothing is lost by other settings, and a start that failed or was stopped before does not
    block the folder. Afterwards places may change (`run_paths.PLACES`) if what lies there is the same.

    Raises:
        RunError: the folder holds a run with other settings, or something that the run needs is no longer in its place.
        FolderError: the folder holds something else than a run, or cannot be written to.
    """
    if run.train.threads:
        torch.set_num_threads(run.train.threads)
    folder, run = Path(folder), anchored(run)
    check_out(folder, "run")
    stored = folder / "run.yaml"
    latest = Checkpoints(folder / "checkpoints").latest()
    kept = run
    if stored.exists() and (latest is not None or not _from_a_start(stored)):
        before = load_run(stored)
        changed = _changes(before.model_dump(mode="json"), run.model_dump(mode="json"))
        moved = [name for name in PLACES if value_of(before, name) != value_of(run, name)]
        if latest is not None and moved and not _knows_inputs(latest):
            changed += [f"{name} was {value_of(before, name)}, now {value_of(run, name)}" for name in moved]
        if changed:
            raise RunError(
                f"{folder} holds a run with other settings ({'; '.join(changed[:3])}): give another --out, or the "
                "same settings to resume"
            )
        kept = functools.reduce(lambda kept, name: placed(kept, name, value_of(run, name)), moved, before)
    done = _finished(run, folder)
    if done is not None:
        say(finished(folder, done[0]))
        return done[1]
    try:
        trainer = run.trainer(folder)
    except (ValueError, OSError) as error:
        lost = [name for name in absent(run) if name != "start_from"] if latest is not None else []
        if not lost:
            raise
        raise RunError(
            f"{folder} cannot resume: {lost[0]} {value_of(run, lost[0])} does not exist any more ({error}). Try: "
            f"fewstep {run.kind} {folder} --{lost[0].replace('_', '-')} NEW_PLACE; its content must be the same"
        ) from None

    def started() -> None:
        if latest is None:  # pictures of a start that saved nothing, perhaps with other settings
            for picture in (folder / "pictures").glob("*-[0-9]*.png"):
                if re.fullmatch(r"(student|panel|samples)-\d{12,}", picture.stem):
                    picture.unlink()
        if not (stored.exists() and load_run(stored) == kept):  # else perhaps in somebody's own words
            dump_run(kept, stored)

    return trainer.fit(started)


def _from_a_start(stored: Path) -> bool:
    """Whether fewstep wrote a run folder's run.yaml, and not a person as a recipe."""
    return (stored.parent / "lock").exists() or stored.read_text() == write_yaml(
        load_run(stored).model_dump(mode="json")
    )


def _knows_inputs(checkpoint: Path) -> bool:
    """Whether a checkpoint has the fingerprints of what its run was trained with (those of earlier versions lack them)."""
    try:
        Checkpoints(checkpoint.parent).load(checkpoint, only=("inputs",), hashes=False)
    except CheckpointError:
        return False
    return True


def _finished(run: PretrainRun | DistillRun, folder: Path) -> tuple[int, dict[str, Any]] | None:
    """Images and last scores of a run that has its length already; None while something is left to do."""
    checkpoints = Checkpoints(folder / "checkpoints")
    latest = checkpoints.latest()
    if latest is None or checkpoints.images_of(latest) < run.train.images:
        return None
    wanted = ("images", "scores", "owed")
    try:
        state = checkpoints.load(latest, only=wanted, hashes=False)
    except CheckpointError:  # earlier versions broke nothing off, and do not say so; what is damaged raises again
        state = checkpoints.load(latest, only=wanted[:2], hashes=False) | {"owed": None}
    return None if state["owed"] else (state["images"], state["scores"])


EXTENDABLE = {
    "train.images",
    "train.log_every",
    "train.evaluate_every",
    "train.checkpoint_every",
    "train.keep",
    "train.threads",
    "train.gradient_checkpointing",
    "train.recompute_activations",
    "train.offload",
    "train.mesh.shard",
    "train.mesh.replicate",
    "train.mesh.teacher",
    "train.tensorboard",
    "train.wandb",
}


def _changes(old: Any, new: Any, where: str = "") -> list[str]:
    """Settings that differ and would make another run of it (its length and its logging may change)."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        return [line for name in names for line in _changes(old.get(name), new.get(name), f"{where}.{name}".strip("."))]
    moved = where in PLACES and old is not None and new is not None  # the fingerprint of what is there decides
    return [] if old == new or where in EXTENDABLE or moved else [f"{where} was {old}, now {new}"]


def describe(run: PretrainRun | DistillRun) -> str:
    """The resolved run as YAML, and what it costs: parameters and network passes."""
    lines = [write_yaml(run.model_dump(mode="json"))]
    if isinstance(run, PretrainRun):
        net = run.denoiser.build() if run.pipeline is None else run.pipeline.load().start()
        lines.append(f"# parameters: {count_parameters(net):,}; passes per update: 3 F (forward 1, backward 2)")
    else:
        teacher = run.teacher.load()
        generator = teacher.player(run.generator.lora)
        critic = torch.nn.Module()
        if run.objective.needs_critic:
            critic = run.objective.make_critic(teacher, teacher.player(run.critic.lora))
        steps = len(run.generator.resolve(teacher.denoiser.schedule))
        lines.append(
            f"# generator: {count_parameters(generator):,} parameters to train, {steps} network "
            f"{'call' if steps == 1 else 'calls'} an image"
        )
        lines.append(
            f"# critic: {count_parameters(critic):,} parameters to train; teacher: "
            f"{sum(p.numel() for p in teacher.denoiser.parameters()):,}"
        )
        passes = run.objective.passes(steps)
        lines.append(
            "# passes per iteration, F = one forward: "
            + ", ".join(f"{name} {value:g}" for name, value in passes.items())
            + f"; together {sum(passes.values()):g} F"
        )
    lines.append(
        f"# {run.train.images:,} images in {-(-run.train.images // run.train.batch_size):,} iterations of "
        f"{run.train.batch_size}"
    )
    return "\n".join(lines)


def count_parameters(module: torch.nn.Module) -> int:
    """Number of trainable weights."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
