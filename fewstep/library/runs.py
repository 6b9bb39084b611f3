"""Training runs from Python: a recipe, and settings as keywords."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fewstep.evaluation.candidates import find_teacher
from fewstep.library.model import Model, load
from fewstep.run.execute import execute
from fewstep.run.pretraining import PretrainRun
from fewstep.run.recipes import run_place
from fewstep.run.settings import load_run, validated
from fewstep.run.specs import DistillRun, R
from fewstep.system.console import note
from fewstep.system.device import pick_device
from fewstep.system.errors import SettingsError
from fewstep.teachers import DiffusersTeacher
from fewstep.teachers.native import shipped_teachers
from fewstep.teachers.prompts import read_prompt_file

__all__ = ["changed", "distill", "pretrain"]

TAGS = ("kind", "method")  # a part of another kind begins with that kind's defaults


def distill(
    recipe: Path | str,
    *,
    teacher: Path | str | Mapping[str, Any] | None = None,
    prompts: Path | str | None = None,
    out: Path | str | None = None,
    imports: Sequence[str] | None = None,
    **settings: Any,
) -> Model:
    """Distil a teacher into a few-step student, or resume that run; returns the student.

    Args:
        recipe: a run file, a run folder, or the name of a shipped recipe.
        teacher: path of the teacher instead of the recipe's, or its settings.
        prompts: for text-to-image: a file of prompts, which are encoded once in `<out>-prompts`, or a folder of `fewstep prepare`.
        out: run folder; the same folder resumes. None: runs/<recipe>.
        imports: Python files and modules instead of those that the run file names.
        **settings: settings of the run: `train={"images": 1000}`, or `**{"train.images": 1000}`.

    Raises:
        SettingsError: unknown or invalid settings, each named with its path.
        UserError: an input is missing or damaged, or the folder holds another run.
    """
    run = _loaded(recipe, DistillRun, imports)
    folder = Path(out) if out is not None else run_place(str(recipe))
    if teacher is not None:
        settings = {"teacher": _teacher(run, teacher), **settings}
    run = changed(run, settings)
    if prompts is not None:
        run = _with_prompts(run, Path(prompts), folder)
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


def _teacher(run: DistillRun, teacher: Path | str | Mapping[str, Any]) -> Mapping[str, Any]:
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


def _with_prompts(run: DistillRun, prompts: Path, folder: Path) -> DistillRun:
    """Use prepared prompts, or prepare a file's beside the run folder."""
    if not isinstance(run.teacher, DiffusersTeacher):
        raise SettingsError(
            f"`prompts` must be given for a text-to-image teacher only, got {prompts} for {run.teacher.kind}. Try: leave it out"
        )
    if not prompts.exists():
        raise SettingsError(
            f"`prompts` must be a file of prompts or a prepared folder, got {prompts}, which does not exist"
        )
    place = prompts
    if prompts.is_file():
        place = folder.with_name(f"{folder.name}-prompts")
        texts = read_prompt_file(prompts)
        encoder = run.teacher.encoder(pick_device("auto"))
        before = run.teacher.prepare(texts, place, encoder)
        note(f"{len(texts):,} prompts in {place} ({before:,} existed already)")
    teacher = run.teacher.model_copy(update={"prompts": place})
    return run.model_copy(update={"teacher": teacher})
