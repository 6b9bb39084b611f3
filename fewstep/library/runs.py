"""Training runs from Python: a recipe, and settings as keywords."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fewstep.evaluation.candidates import find_teacher
from fewstep.library.model import Model, load
from fewstep.run.execute import execute
from fewstep.run.own import pipeline_run, with_prompts
from fewstep.run.pretraining import PretrainRun
from fewstep.run.recipes import run_place
from fewstep.run.settings import find_pipeline, load_run, validated
from fewstep.run.specs import DistillRun, R
from fewstep.system.errors import SettingsError
from fewstep.teachers.native import shipped_teachers

__all__ = ["changed", "distill", "pretrain", "teacher_settings"]

TAGS = ("kind", "method")  # a part of another kind begins with that kind's defaults


def distill(
    recipe: Path | str,
    *,
    teacher: Path | str | Mapping[str, Any] | None = None,
    prompts: Path | str | None = None,
    steps: int | None = None,
    lora: bool | None = None,
    out: Path | str | None = None,
    imports: Sequence[str] | None = None,
    **settings: Any,
) -> Model:
    """Distil a teacher into a few-step student, or resume that run; returns the student.

    Args:
        recipe: a run file, a run folder, the name of a shipped recipe, or the folder or file of a text-to-image pipeline.
        teacher: path of the teacher instead of the recipe's, or its settings.
        prompts: for text-to-image: a file of prompts, which are encoded once in `<out>-prompts`, or a folder of `fewstep prepare`.
        steps: for a pipeline: network calls of the student; None: 4.
        lora: for a pipeline: train adapters (None, True) or the whole network (False).
        out: run folder; the same folder resumes. None: runs/<recipe>.
        imports: Python files and modules instead of those that the run file names.
        **settings: settings of the run: `train={"images": 1000}`, or `**{"train.images": 1000}`.

    Raises:
        SettingsError: unknown or invalid settings, each named with its path.
        UserError: an input is missing or damaged, or the folder holds another run.
    """
    pipeline = find_pipeline(str(recipe))
    if pipeline is None and (steps is not None or lora is not None):
        raise SettingsError(
            f"`steps` and `lora` must come with a pipeline, got the recipe {recipe}. Try: generator={{...}}"
        )
    if pipeline is not None:
        run = pipeline_run(pipeline, 4 if steps is None else steps, lora is not False)
        folder = Path(out) if out is not None else Path("runs") / Path(recipe).stem
    else:
        run = _loaded(recipe, DistillRun, imports)
        folder = Path(out) if out is not None else run_place(str(recipe))
    if teacher is not None:
        settings = {"teacher": teacher_settings(run, teacher), **settings}
    run = changed(run, settings)
    if prompts is not None:
        run = with_prompts(run, Path(prompts), folder)
    execute(run, folder)
    return load(folder, device=str(run.train.torch_device()))


def pretrain(
    recipe: Path | str, *, out: Path | str | None = None, imports: Sequence[str] | None = None, **settings: Any
) -> Model:
    """Train a teacher, or resume that run; returns the teacher. See `distill` for the arguments.

    Raises:
        SettingsError: unknown or invalid settings, each named with its path.
        UserError: an input is missing or damaged, or the folder holds another run.
    """
    run = changed(_loaded(recipe, PretrainRun, imports), settings)
    folder = Path(out) if out is not None else run_place(str(recipe))
    execute(run, folder)
    return load(folder, device=str(run.train.torch_device()))


def _loaded(recipe: Path | str, kind: type[R], imports: Sequence[str] | None) -> R:
    run = load_run(recipe, imports)
    if not isinstance(run, kind):
        raise SettingsError(f"{recipe} is a {run.kind} run. Try: fewstep.{run.kind}")
    return run


def teacher_settings(run: DistillRun, teacher: Path | str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of another teacher, of the kind that its path is of."""
    if isinstance(teacher, Mapping):
        return teacher
    known = Path(teacher).exists() or str(teacher) in shipped_teachers()  # else it may be a name on the hub
    kind = find_teacher(str(teacher), None).kind if known else run.teacher.kind
    return {"kind": kind, "path": str(teacher)}


def changed(run: R, settings: Mapping[str, Any]) -> R:
    """Change settings of a run: nested mappings are merged into it.

    Args:
        run: the run.
        settings: values by name, or by path (`train.images`).

    Raises:
        SettingsError: unknown or invalid settings.
    """
    values = run.model_dump()
    for name, value in settings.items():
        *path, last = name.split(".")
        nested: dict[str, Any] = {last: value}
        for part in reversed(path):
            nested = {part: nested}
        values = _merged(values, nested)
    made = validated(values, Path("settings"))
    assert isinstance(made, type(run))
    return made


def _merged(old: Any, new: Any) -> Any:
    if isinstance(new, BaseModel):
        return new.model_dump()
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return str(new) if isinstance(new, Path) else new
    if any(tag in new and new[tag] != old.get(tag) for tag in TAGS):
        old = {}
    return {**old, **{name: _merged(old.get(name), value) for name, value in new.items()}}
