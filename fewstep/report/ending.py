"""Summary of a finished run: its files, scores, duration, and the next commands.

Reads the run folder; imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from fewstep.evaluation.metrics import columns_of, notes_of, number, text_of
from fewstep.report.run_folder import RunFolder
from fewstep.system.console import duration

__all__ = ["ending", "finished"]


def finished(folder: Path, images: int) -> str:
    """Message for a run that is already finished."""
    return f"{folder} is finished ({images:,} images): nothing to train. To train longer: --train.images {2 * images}"


def ending(folder: Path) -> str:
    """Lines for the terminal, from the files of a finished run."""
    run = RunFolder(folder, folder.name, 0)
    took = max((number(line.get("seconds")) or 0.0 for line in run.times), default=0.0)
    scoring = sum(number(line.get("evaluation_seconds")) or 0.0 for line in run.times)
    lines = [
        f"finished: {run.images:,} images in {duration(took)}, including {duration(scoring)} for evaluation and pictures"
    ]
    pipeline = folder / "pipeline"
    made = {
        "teacher" if run.pretraining else "student": pipeline if pipeline.is_dir() else run.file,
        "best": best if (best := folder / "best" / "student.safetensors").exists() else None,
        "pictures": next((path for _, path in reversed(run.drawn("samples" if run.pretraining else "student"))), None),
        "checkpoint": max((folder / "checkpoints").glob("[0-9]*"), default=None),
        "log": folder / "stats.jsonl",
    }
    lines += [f"{name + ':':12}{path}" for name, path in made.items() if path is not None and path.exists()]
    lines += _scores(run)
    if run.problems:
        lines += [f"{'problem:':12}{problem}" for problem in run.problems]
    return "\n".join([*lines, "next:", *(f"  {command}" for command in _next(run))])


def _scores(run: RunFolder) -> list[str]:
    """Last evaluation, with its protocol and warnings."""
    if not run.lines("evaluation"):
        return []
    last = run.lines("evaluation")[-1]
    found = [f"{column.header} {text_of(last, column)}" for column in columns_of([last])]
    if not found:
        return []
    lines = [f"{'score:':12}{', '.join(found)}"]
    if last.get("protocol"):
        lines.append(f"{'protocol:':12}{last['protocol']}")
    lines += [f"{'warning:':12}{text}" for text in notes_of(last)]
    if run.best and run.best[0] < last["images"]:
        lines.append(f"{'best:':12}{run.measure.header} {run.measure.form(run.best[1])} at {run.best[0]:,} images")
    return lines


def _next(run: RunFolder) -> list[str]:
    """Next commands for this folder."""
    commands = []
    pictures = not run.points_only
    text = run.get("pipeline") is not None or run.get("teacher", "kind") == "diffusers"
    if pictures:
        what = '--prompt "A PROMPT" --seeds 0-3' if text else "--seeds 0-63"
        commands.append(f"fewstep sample {run.path} {what} --out samples.png")
        scored = any(line.get("protocol") for line in run.lines("evaluation"))
        commands.append(f"fewstep eval {run.path}" + ("" if scored else " --reference FOLDER_OF_REAL_IMAGES"))
    commands.append(f"fewstep report {run.path}")
    if run.pretraining:
        place = f"{run.path}/pipeline" if text else run.path
        commands.append(f"fewstep distill RECIPE --teacher.path {place}    (fewstep recipes lists them)")
    elif pictures:
        if text or run.get("teacher", "kind") == "native":
            commands.append(f"fewstep export {run.path} --out {run.path}-export")
        commands.append(f"fewstep ui {run.path}")
    if run.images:
        commands.append(f"the same command with --train.images {2 * run.images} to train longer")
    return commands
