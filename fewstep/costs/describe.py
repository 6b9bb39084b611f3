"""Text of `--dry-run`: the resolved settings and the cost of an iteration. A plan's numbers for other programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from fewstep.costs.machines import GPUS
from fewstep.costs.measure import measure
from fewstep.costs.outline import outline
from fewstep.costs.plan import CONTEXT, Plan
from fewstep.run.pretraining import PretrainRun
from fewstep.run.specs import DistillRun
from fewstep.system.strict_yaml import write_yaml

__all__ = ["describe", "facts"]


def describe(run: PretrainRun | DistillRun) -> str:
    """Describe the resolved run: YAML, parameter counts, and the operations of an iteration.

    Raises:
        ValueError: a sub-class of it, for a teacher or network that cannot be built.
    """
    lines = [write_yaml(run.model_dump(mode="json"))]
    if isinstance(run, PretrainRun):
        spec = run.fitted(run.data.load()) if run.fit_network else run.denoiser
        net = spec.build() if run.pipeline is None else run.pipeline.load().start()
        lines.append(f"# parameters: {_count(net):,}; an update: 3 F (forward 1, backward 2)")
    else:
        teacher = run.teacher.load()
        steps = len(run.generator.resolve(teacher.denoiser.schedule))
        planned = outline(run)
        work = measure(planned, run.train.micro_batch or run.train.batch_size).work
        task = planned.task
        lines.append(
            f"# generator: {_count(task.generator.module):,} parameters to train, {steps} network "
            f"{'call' if steps == 1 else 'calls'} per image"
        )
        lines.append(
            f"# critic: {_count(task.critic.module) if task.critic else 0:,} parameters to train; teacher: "
            f"{_count(teacher.denoiser):,}"
        )
        lines.append(
            f"# an iteration: {work.passes:.2f} F per image; 1 F, one forward of an image: {work.forward / 1e6:,.1f} MFLOP"
        )
    lines.append(
        f"# {run.train.images:,} images in {-(-run.train.images // run.train.batch_size):,} iterations of "
        f"{run.train.batch_size}"
    )
    return "\n".join(lines)


def facts(plan: Plan) -> dict[str, Any]:
    """All numbers of a plan: its fields, and what follows from them for each GPU."""
    gpus = {
        name: {"fits": plan.fits(gpu), "seconds_an_iteration": plan.step(gpu).seconds, "gpu_hours": plan.hours(gpu)}
        for name, gpu in GPUS.items()
    }
    return {**asdict(plan), "memory": plan.memory, "with_driver": plan.memory + CONTEXT, "gpus": gpus}


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
