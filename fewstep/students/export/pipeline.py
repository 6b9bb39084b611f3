"""A student as a pipeline of the diffusers library: its folder loads and samples with no argument but the step count.

The teacher's folder is copied, its weights a tensor at a time in another dtype. Names of folders on this machine, which
the library keeps in its configurations, are left out.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from fewstep.students.export.facts import Facts
from fewstep.students.export.schedulers import CUSTOM, scheduler_of
from fewstep.students.export.weights import Weights
from fewstep.system.bounds import read_json, shown
from fewstep.system.console import quiet
from fewstep.system.errors import FileError
from fewstep.system.files import atomic_write
from fewstep.system.tensors import Entry, write_entries
from fewstep.teachers.loading import components_of
from fewstep.teachers.pipelines import is_single_file

__all__ = ["is_custom", "load_pipeline", "save_pipeline", "save_scheduler"]

_WEIGHTS = (".safetensors", ".bin", ".msgpack", ".h5", ".onnx", ".pb", ".ckpt", ".pt", ".pth")


def is_custom(scheduler: Any) -> bool:
    """Return whether a scheduler's class is custom, so that the folder must contain it."""
    return type(scheduler).__module__ == f"fewstep.students.export.{CUSTOM}"


def save_scheduler(scheduler: Any, folder: Path) -> list[str]:
    """Write a scheduler, with its class if that is custom; returns its entry of model_index.json."""
    with quiet():
        scheduler.save_pretrained(folder)
    (folder / f"{CUSTOM}.py").unlink(missing_ok=True)
    if is_custom(scheduler):
        source = Path(__file__).with_name(f"{CUSTOM}.py").read_text(encoding="utf-8")
        atomic_write(folder / f"{CUSTOM}.py", source)
    return [CUSTOM if is_custom(scheduler) else "diffusers", type(scheduler).__name__]


def load_pipeline(facts: Facts) -> Any:
    """Build the student's pipeline in memory: the teacher's, with the student's network, and a scheduler that visits its times.

    Raises:
        FileError, TeacherError: files are missing or damaged.
    """
    weights = Weights(facts)
    pipeline = weights.whole
    network = getattr(pipeline, facts.family.component)
    network.load_state_dict({name: entry.make() for name, entry in weights.network().items()})
    scheduler = scheduler_of(facts, pipeline.scheduler)
    with quiet():
        pipeline.register_modules(scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=None)
    return pipeline


def save_pipeline(weights: Weights, scheduler: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write the pipeline.

    Args:
        weights: of the student.
        scheduler: that visits its times.
        folder: where to write.
        dtype: of all weights.

    Raises:
        FileError: weights that are missing, damaged, or do not fit `dtype`.
        WriteError: the disk is full.
    """
    facts = weights.facts
    if is_single_file(facts.settings.path):
        index = _save_parts(weights, folder)
    else:
        assert weights.folder is not None
        index = dict(weights.index)
        for name, kind in components_of(weights.index).items():
            if name in weights.absent:
                index[name] = [None, None]
            elif kind[0] is not None and name != "scheduler":
                _copy(weights.folder / name, folder / name)
    component = facts.family.component
    index["scheduler"] = save_scheduler(scheduler, folder / "scheduler")
    index[component] = ["diffusers", facts.net.model]
    for name, kind in index.items():
        if name not in components_of(index) or not (folder / name / "config.json").is_file():
            continue
        if _has_weights(weights, name):
            entries = weights.network() if name == component else weights.component(name)
            _write(folder / name, entries, dtype, "model" if kind[0] == "transformers" else "diffusion_pytorch_model")
        _rewrite_config(facts, name, folder / name / "config.json", of_transformers=kind[0] == "transformers")
    index = {name: value for name, value in index.items() if name != "_name_or_path"}
    atomic_write(folder / "model_index.json", json.dumps(index, indent=2) + "\n")


def _has_weights(weights: Weights, name: str) -> bool:
    if weights.folder is None:
        return isinstance(getattr(weights.whole, name), torch.nn.Module)
    return any(file.suffix in (".safetensors", ".bin") for file in (weights.folder / name).iterdir())


def _save_parts(weights: Weights, folder: Path) -> dict[str, Any]:
    """Write all but the weights of a pipeline that was read from a single file."""
    pipeline = weights.whole
    parts: dict[str, Any] = pipeline.components
    with quiet():
        for name, part in parts.items():
            if isinstance(part, torch.nn.Module):
                module: Any = part
                save = getattr(module, "save_config", None) or module.config.save_pretrained  # diffusers, transformers
                save(folder / name)
            elif part is not None and name != "scheduler":
                part.save_pretrained(folder / name)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in dict(pipeline.config).items()} | {
        "_class_name": type(pipeline).__name__
    }


def _copy(source: Path, target: Path) -> None:
    """Copy a component's files but its weights."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix not in _WEIGHTS and ".index." not in file.name:
            shutil.copyfile(file, target / file.name)


def _write(folder: Path, entries: dict[str, Entry], dtype: torch.dtype, stem: str) -> None:
    for old in folder.glob(f"{stem}*.safetensors*"):
        old.unlink()
    write_entries(folder / f"{stem}.safetensors", entries, dtype)


def _rewrite_config(facts: Facts, name: str, file: Path, of_transformers: bool) -> None:
    config = read_json(file)
    if not isinstance(config, dict):
        raise FileError(
            f"{file} must hold a component's configuration, got {shown(config)}. Try: fetch the pipeline again"
        )
    if name == facts.family.component:
        config |= facts.net.config | {"_class_name": facts.net.model}
    if name == "vae":
        config |= facts.settings.latents.config()
    config.pop("_name_or_path", None)
    if of_transformers:
        # diffusers loads its own parts in float32 by default, transformers in what its configuration says:
        # with float16 there, a pipeline loaded without a dtype would stop at its first product
        config.pop("torch_dtype", None)
        config["dtype"] = "float32"
    atomic_write(file, json.dumps(config, indent=2) + "\n")
