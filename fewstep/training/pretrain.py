"""Training a teacher: EDM's denoising loss on images. One `Task` for the trainer; knows nothing about distillation.

Karras et al. 2022 (arXiv 2206.00364), eq. 2 with the weighting and log-normal noise of table 1. Labels are dropped at
random for classifier-free guidance (Ho & Salimans 2022).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fewstep.data import Buckets, BucketStream, Draw, ImageDataset, Stream
from fewstep.diffusion.augment import augment
from fewstep.diffusion.denoiser import Denoiser, denoising_loss
from fewstep.diffusion.guidance import Guided
from fewstep.diffusion.noise import double_device
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.evaluation.scorer import Scorer, scored
from fewstep.formats.model import DenoiserSpec, save_denoiser
from fewstep.students.sample import ManyStep, generate
from fewstep.system import distributed
from fewstep.system.files import atomic_write, replace_folder
from fewstep.system.pictures import save_grid
from fewstep.teachers.base import ClassLabels, Conditioner, Teacher
from fewstep.training.optim import OptimSpec
from fewstep.training.player import Player, place
from fewstep.training.spec import TrainSpec
from fewstep.training.task import Micro, Task, cure

__all__ = ["Pretraining"]


class Pretraining(Task):
    """Train a denoiser on a dataset from scratch.

    Args:
        spec: the denoiser to build.
        dataset: images and labels; in buckets if the pipeline has several sizes.
        optim: optimizer settings.
        train: run settings.
        noise: law of the training noise levels (an object with `draw(count, schedule)`).
        label_dropout: share of images whose class is hidden.
        scorer: evaluates samples.
        evaluations: network evaluations of the sampler when scoring.
        provenance: provenance for the exported file.
        augment: probability of EDM's augmentations; the network must accept them as a condition.
        flip: mirror half of the images, without conditioning the network on it.
        pipeline: text-to-image teacher whose network is trained further, instead of a new one.
        guidance: guidance scale of the sampler, when scoring and drawing.
        drawn: prompts that the pictures show; None: the first that the run trains with.
    """

    def __init__(
        self,
        spec: DenoiserSpec,
        dataset: ImageDataset | Buckets,
        optim: OptimSpec,
        train: TrainSpec,
        noise: Any,
        label_dropout: float,
        scorer: Scorer | None,
        evaluations: int,
        provenance: dict[str, Any],
        augment: float = 0.0,
        flip: bool = False,
        pipeline: Teacher | None = None,
        guidance: float | None = None,
        drawn: Conditioner | None = None,
    ) -> None:
        self.augment, self.pipeline, self.guidance = augment, pipeline, guidance
        self.stream: Stream | BucketStream
        self.views: tuple[Teacher | None, ...] = (pipeline,)
        if isinstance(dataset, Buckets):
            assert pipeline is not None, "buckets of a network without a pipeline"
            self.views = tuple(pipeline.at(*size) for size in dataset.sizes)
            draw = Draw([len(part) for part in dataset.parts], train.seed)
            self.stream = BucketStream(dataset, draw, train.batch_size, train.seed)
        else:
            self.stream = Stream(dataset, train.seed, flip)
        self.spec, self.dataset, self.train, self.noise, self.provenance = spec, dataset, train, noise, provenance
        self.data = getattr(dataset, "fingerprint", None)
        self.label_dropout, self.scorer, self.evaluations = label_dropout, scorer, evaluations
        self.inputs = pipeline.inputs("pipeline") if pipeline else {}
        self.device, self.bf16 = train.torch_device(), train.bf16()
        self.conditioner: Conditioner = ClassLabels(dataset.num_classes, dataset.class_names)
        if pipeline is not None:
            self.conditioner = pipeline.conditioner
        self.drawn = drawn or self.conditioner
        self.sharded = train.mesh.splits
        torch.manual_seed(train.seed)
        denoiser = spec.build() if pipeline is None else pipeline.start()
        self.player = Player("denoiser", denoiser, optim, train, averaged=True, optimizer_name="optimizer")
        self.denoiser = self.player.module
        place([self.player], None, train)

    def update(self, images: int, micros: list[Micro]) -> dict[str, Tensor]:
        loss = torch.zeros((), device=self.device)
        for micro in micros:
            micro.reseed("denoiser")
            x, labels = self.stream.batch(micro.position, micro.size, micro.then)
            if labels is not None:
                hidden = torch.rand(len(labels)) < self.label_dropout
                labels = labels.masked_fill(hidden, self.conditioner.num_classes)
            cond = {name: value.to(self.device) for name, value in self._conditions(micro, labels).items()}
            if self.augment:
                x, numbers = augment(x, self.augment)
                cond["augment"] = numbers.to(self.device)
            t = self.noise.draw(len(x), self.denoiser.schedule).to(double_device(self.device))
            x, eps = x.to(self.device), torch.randn_like(x).to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                part = denoising_loss(self.denoiser, x, t, eps, cond) / len(micros)
            part.backward()
            loss += part.detach()
        norm = self.player.step(images + self.train.batch_size, self.train.batch_size)
        return {"loss": loss, "gradient_norm": norm}

    def _conditions(self, micro: Micro, labels: Tensor | None) -> dict[str, Tensor]:
        """Conditions of a batch of real images, for SDXL with each image's own size and crop."""
        bucket = self.stream.place(micro.position)[0] if isinstance(self.stream, BucketStream) else 0
        view = self.views[bucket]
        if view is None:
            return self.conditioner.cond(labels, micro.size)
        cond, frames = view.conditioner.cond(labels, micro.size), self.stream.frames(micro.position, micro.size)
        return cond | (view.framed(frames) if view.framed and frames is not None else {})

    def nonfinite(self) -> str | None:
        return self.player.nonfinite()

    def cure(self, names: Sequence[str]) -> str:
        return cure({"optim": self.player.optim}, self.bf16) + ", and start a new run with another --out"

    def evaluate(self, images: int) -> dict[str, Any]:
        if self.scorer is None or images == 0:
            return {}
        with self.player.averaged() as denoiser:
            sampler = self._sampler(denoiser)
            return scored(self.scorer, self.watch, sampler, self.shape, self.conditioner, self.device)

    def picture(self, images: int, folder: Path) -> dict[str, Path]:
        labels = None
        if self.drawn.num_classes:
            labels = torch.arange(80) % 10 % self.drawn.num_classes  # a column has one class or prompt
        with self.player.averaged() as denoiser:
            drawn = generate(
                self._sampler(denoiser),
                range(80),
                self.shape,
                self.drawn,
                labels=labels,
                device=self.device,
                local=True,
                bf16=self.bf16
                and (self.sharded or self.train.offload),  # split or offloaded networks compute only in bfloat16
                batch=20,  # the pictures of a large network take minutes
                progress=lambda done: self.watch(f"drawing, {done} of 80 pictures"),
            )
            samples = torch.cat(list(drawn))
        if distributed.rank() != 0:
            return {}
        return {"samples": save_grid(samples, folder / f"samples-{images:012d}.png", columns=10)}

    def _sampler(self, denoiser: Denoiser) -> ManyStep:
        if self.guidance not in (None, 1):
            denoiser = Guided(denoiser, self.conditioner.null, self.guidance)
        return ManyStep(denoiser, self.evaluations, self.device, codec=self.pipeline.codec if self.pipeline else None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a sample that is scored and drawn."""
        if self.pipeline is not None:
            return self.pipeline.shape
        assert isinstance(self.dataset, ImageDataset), "buckets of a network without a pipeline"
        return self.dataset.shape

    def state_dict(self) -> dict[str, Any]:
        return self.player.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.player.load_state_dict(state)

    def destination(self, path: Sequence[str]) -> Tensor | None:
        return self.player.destination(path)

    def export(self, folder: Path, images: int, scores: dict[str, Any]) -> None:
        provenance = self.provenance | {"images": images, "scores": scores}
        if self.pipeline is not None:
            assert self.pipeline.save is not None, "a pipeline that cannot be saved"
            weights = distributed.whole(self.player.average.state_dict())
            if distributed.rank() != 0:
                return
            unfinished = folder / ".tmp-pipeline"
            self.pipeline.save(unfinished, weights)
            atomic_write(unfinished / "fewstep.json", json.dumps(provenance, indent=2))
            replace_folder(unfinished, folder / "pipeline")
            return
        provenance["class_names"] = list(self.dataset.class_names)
        save_denoiser(folder / "teacher.safetensors", cast(Preconditioned, self.player.average), self.spec, provenance)
