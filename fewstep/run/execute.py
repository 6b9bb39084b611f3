"""Train a run in its folder, or resume it."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import torch

from fewstep.report.ending import finished
from fewstep.run.paths import PLACES, absent, anchored, placed, value_of
from fewstep.run.pretraining import PretrainRun
from fewstep.run.settings import dump_run, read_settings, validated
from fewstep.run.specs import DistillRun
from fewstep.system import distributed
from fewstep.system.checkpoint import Checkpoints
from fewstep.system.console import say
from fewstep.system.device import hardware
from fewstep.system.errors import FileError, SettingsError
from fewstep.system.out_folder import check_out
from fewstep.system.outside import changed_imports, keep_copies
from fewstep.system.strict_yaml import write_yaml


def execute(run: PretrainRun | DistillRun, folder: Path) -> dict[str, Any]:
    """Train in `folder`, or resume; returns the last scores. A finished run is not changed.

    Settings may change until the first checkpoint is saved. Afterwards only paths may change (`fewstep.run.paths.PLACES`), to
    the same content, and the settings in `EXTENDABLE`.

    Raises:
        SettingsError: the folder holds a run with other settings, or an input of the run was moved or deleted.
        FileError: the folder holds something other than a run, or cannot be written to.
    """
    if run.train.threads:
        torch.set_num_threads(run.train.threads)
    folder, run = Path(folder), anchored(run)
    check_out(folder, "run")
    stored = folder / "run.yaml"
    latest = Checkpoints(folder / "checkpoints").latest()
    kept = run
    if stored.exists() and (latest is not None or not _from_a_start(stored)):
        values = read_settings(stored)
        changed = changed_imports(values.get("imports") or [], run.imports, folder)
        before = run if changed else validated({**values, "imports": run.imports}, stored)
        changed += _changes(before.model_dump(mode="json"), run.model_dump(mode="json"))
        moved = [name for name in PLACES if value_of(before, name) != value_of(run, name)]
        if latest is not None and moved and not _knows_inputs(latest):
            changed += [f"{name} was {value_of(before, name)}, now {value_of(run, name)}" for name in moved]
        if changed:
            raise SettingsError(
                f"{folder} holds a run with other settings ({'; '.join(changed[:3])}). Try: another --out, or the same settings "
                "to resume"
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
        raise SettingsError(
            f"{folder} cannot resume: {lost[0]} {value_of(run, lost[0])} no longer exists ({error}). Try: "
            f"fewstep {run.kind} {folder} --{lost[0].replace('_', '-')} NEW_PLACE; its content must be the same"
        ) from None

    def started() -> None:
        if latest is None:  # remove pictures of a start without a checkpoint, which may have had other settings
            for picture in (folder / "pictures").glob("*-[0-9]*.png"):
                if re.fullmatch(r"(student|panel|samples)-\d{12,}", picture.stem):
                    picture.unlink()
        keep_copies(run.imports, folder / "imports")
        values = read_settings(stored) if stored.exists() else {}
        same = values and tuple(values.get("imports") or ()) == kept.imports and validated(values, stored) == kept
        if not same:  # an equal file may be hand-written: keep it
            dump_run(kept, stored)
        auto = run.train.precision == "auto"
        precision = ("bf16" if run.train.bf16() else "fp32") if auto else run.train.precision
        chosen = ", chosen by `train.precision: auto`" if auto else ""
        say(f"running on {hardware(distributed.world_size())} in {precision}{chosen}")

    return trainer.fit(started)


def _from_a_start(stored: Path) -> bool:
    """Return whether a run folder's run.yaml was written by fewstep rather than by hand."""
    return (stored.parent / "lock").exists() or stored.read_text() == write_yaml(
        validated(read_settings(stored), stored).model_dump(mode="json")
    )


def _knows_inputs(checkpoint: Path) -> bool:
    """Return whether a checkpoint has the fingerprints of its run's inputs (those of earlier versions lack them)."""
    try:
        Checkpoints(checkpoint.parent).load(checkpoint, only=("inputs",), hashes=False)
    except FileError:
        return False
    return True


def _finished(run: PretrainRun | DistillRun, folder: Path) -> tuple[int, dict[str, Any]] | None:
    """Images and last scores of a finished run; None if work is left."""
    checkpoints = Checkpoints(folder / "checkpoints")
    latest = checkpoints.latest()
    if latest is None or checkpoints.images_of(latest) < run.train.images:
        return None
    wanted = ("images", "scores", "owed")
    try:
        state = checkpoints.load(latest, only=wanted, hashes=False)
    except FileError:  # earlier versions have no such entry; a damaged file raises again later
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
    "train.swap_blocks",
    "train.mesh.shard",
    "train.mesh.replicate",
    "train.mesh.teacher",
    "train.tensorboard",
    "train.wandb",
    "health.stop_at_collapse",
}


def _changes(old: Any, new: Any, where: str = "") -> list[str]:
    """Settings that differ and must not change on resume (length and logging may)."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        return [line for name in names for line in _changes(old.get(name), new.get(name), f"{where}.{name}".strip("."))]
    moved = where in PLACES and old is not None and new is not None  # the content's fingerprint decides
    return [] if old == new or where in EXTENDABLE or moved else [f"{where} was {old}, now {new}"]
