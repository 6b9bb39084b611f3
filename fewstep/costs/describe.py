"""Text of `--dry-run`: the resolved settings, and the cost of an iteration."""

from __future__ import annotations

from torch import nn

from fewstep.costs.measure import measure
from fewstep.costs.outline import outline
from fewstep.run.pretraining import PretrainRun
from fewstep.run.specs import DistillRun
from fewstep.system.strict_yaml import write_yaml

__all__ = ["describe"]


def describe(run: PretrainRun | DistillRun) -> str:
    """Describe the resolved run: YAML, parameter counts, and the operations of an iteration.

    Raises:
        ValueError: a sub-class of it, for a teacher or network that cannot be built.
    """
    lines = [write_yaml(run.model_dump(mode="json"))]
    if isinstance(run, PretrainRun):
        net = run.denoiser.build() if run.pipeline is None else run.pipeline.load().start()
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


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
