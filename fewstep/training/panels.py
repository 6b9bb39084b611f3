"""Pictures of a distillation: student and teacher samples from the same seeds, and the predictions of both scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data import to_uint8
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.noise import double_device
from fewstep.methods.base import Nets
from fewstep.students.sample import FewStep, ManyStep, generate, noise_of
from fewstep.system import distributed
from fewstep.system.pictures import save_grid
from fewstep.teachers.base import Conditioner, Teacher

__all__ = ["Panels"]

COLUMNS = 10
TEACHER_CALLS = 35  # network calls of a teacher's picture


class Panels:
    """Draws the pictures of one distillation.

    Args:
        teacher: the diffusion model.
        nets: the networks of the distillation.
        device: the networks' device.
        bf16: run the networks under bfloat16 autocast, because their weights are rounded; else in float32.
        drawn: prompts to draw instead of the first that the run trains with.
    """

    def __init__(
        self, teacher: Teacher, nets: Nets, device: torch.device, bf16: bool, drawn: Conditioner | None = None
    ) -> None:
        self.teacher, self.nets, self.device, self.bf16 = teacher, nets, device, bf16
        self.conditioner = drawn or teacher.conditioner
        self._teacher_samples: Tensor | None = None  # not decoded

    @torch.no_grad()
    def save(self, generator: Generator, images: int, folder: Path, watch: Callable[[str], None]) -> dict[str, Path]:
        """Draw the student, and once the teacher; returns name -> PNG on rank 0, an empty dict elsewhere.

        Args:
            generator: with averaged weights.
            images: images seen so far; part of the file names.
            folder: output folder.
            watch: called with a progress text; may raise to abandon.
        """
        drawn = {"student": self._draw(FewStep(generator), "the student", watch), "panel": self._panel()}
        first = self._teacher_samples is None  # an existing file may be of an earlier start with another teacher
        teacher = self.teacher_samples(watch)
        if distributed.rank() != 0:
            return {}
        if first:
            save_grid(self._pictures(teacher), folder / "teacher.png", COLUMNS)
        return {
            name: save_grid(self._pictures(samples), folder / f"{name}-{images:012d}.png", COLUMNS)
            for name, samples in drawn.items()
        }

    def teacher_samples(self, watch: Callable[[str], None]) -> Tensor:
        """Teacher samples [n, *shape] from the same seeds and classes, drawn once."""
        if self._teacher_samples is None:
            sampler = ManyStep(self.nets.teacher, TEACHER_CALLS, self.device)
            self._teacher_samples = self._draw(sampler, f"the teacher in {TEACHER_CALLS} calls", watch)
        return self._teacher_samples

    def _pictures(self, samples: Tensor) -> Tensor:
        """Convert samples [n, *shape] to uint8 pictures, decoding a few at a time."""
        codec = self.teacher.codec
        if codec is None:
            return to_uint8(samples)
        # a decoder's features are many times its pictures
        few = max(1, min(8, 2**22 // math.prod(self.teacher.picture_shape)))
        return torch.cat([to_uint8(codec.decode(part.to(self.device)).cpu()) for part in samples.split(few)])

    def _labels(self, count: int) -> Tensor | None:
        """Class or prompt of each of `count` pictures; a column has one."""
        classes = self.conditioner.num_classes
        return torch.arange(count) % COLUMNS % classes if classes else None

    def _draw(self, sampler: FewStep | ManyStep, whose: str, watch: Callable[[str], None]) -> Tensor:
        """Draw a sampler's samples from the fixed seeds and classes in this process: eighty, or fewer large ones."""
        rows = max(1, min(8, 2**21 // math.prod(self.teacher.picture_shape) // COLUMNS))
        seeds = range(COLUMNS * rows)
        drawn = generate(
            sampler,
            seeds,
            self.teacher.shape,
            self.conditioner,
            labels=self._labels(len(seeds)),
            device=self.device,
            local=True,
            uint8=False,
            bf16=self.bf16,
            batch=2 * COLUMNS,  # a large teacher takes minutes
            progress=lambda done: watch(f"drawing {whose}, {done} of {len(seeds)} pictures"),
        )
        return torch.cat(list(drawn))

    def _panel(self) -> Tensor:
        """Rows of a panel: the student's x; then, at three noise levels, noised x and both scores' predictions."""
        seeds = range(COLUMNS)
        shape, schedule = self.teacher.shape, self.nets.teacher.schedule
        cond = self.conditioner.cond(self._labels(COLUMNS), COLUMNS)
        cond = {name: value.to(self.device) for name, value in cond.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            x = FewStep(self.nets.generator)(seeds, shape, **cond)
            rows = [x]
            for ratio in (0.3, 1.0, 3.0):
                t = schedule.time(torch.full((COLUMNS,), ratio)).to(double_device(self.device))
                x_t = schedule.perturb(x, t, noise_of(seeds, shape, step=1000).to(self.device))
                rows += [x_t, self.nets.teacher(x_t, t, **cond)]
                if self.nets.learned is not None:
                    rows.append(self.nets.critic(x_t, t, cond))
        return torch.cat([row.float() for row in rows]).cpu()
