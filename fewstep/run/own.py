"""Runs for one's own pictures and pipelines: a run file after a look at the folder, a LoRA or whole student of a pipeline."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
import yaml

from fewstep.data.looking import Look
from fewstep.networks import FAMILIES
from fewstep.run.recipes import find_recipe
from fewstep.run.settings import read_settings, validated
from fewstep.run.specs import DistillRun
from fewstep.system.console import note
from fewstep.system.device import pick_device
from fewstep.system.errors import SettingsError
from fewstep.teachers import DiffusersTeacher
from fewstep.teachers.prompts import read_prompt_file

__all__ = ["MODELS", "memory_at_hand", "pipeline_run", "pipeline_values", "teacher_file", "with_prompts"]

MODELS = {  # class of a pipeline's network -> the recipe whose settings suit it
    "UNet2DConditionModel": "sdxl/lora-24gb",
    "SD3Transformer2DModel": "sd35/dmd2-4step-lora",
    "FluxTransformer2DModel": "flux/lora-24gb",
    "Flux2Transformer2DModel": "flux2/dmd2-4step-lora",
    "ZImageTransformer2DModel": "z-image/dmd2-4step-lora",
    "QwenImageTransformer2DModel": "qwen-image/lora-24gb",
    "LongCatImageTransformer2DModel": "longcat/dmd2-4step-lora",
}
GUIDED = {
    "Flux2Transformer2DModel": "flux2/dev-lora-24gb"
}  # the same for networks that take their guidance as an input
VIEWS = 2_000  # times that a teacher sees each picture
LEAST, MOST = 400_000, 10_000_000  # images of a teacher's training


def memory_at_hand() -> str:
    """Name the memory of this machine's GPU, or of its processor."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} with {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return f"no GPU, {os.cpu_count()} cores"
    return f"no GPU, {os.cpu_count()} cores, {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"


def teacher_file(look: Look, gpu: bool) -> str:
    """Text of the run file that trains a teacher on the pictures: `own/teacher`, with what was seen as comments."""
    size, images = look.size(gpu), min(MOST, max(LEAST, VIEWS * look.count))
    widths = [64, 128, 256] if size >= 64 else [48, 96]
    shorter, longest = min(look.sides), max(look.sides)
    classes = ", ".join(f"{name} ({count:,})" for name, count in list(look.classes.items())[:10])
    lines = [
        f"# A teacher for the {look.count:,} pictures in {look.folder}, written by `fewstep init`.",
        f"# Seen: shorter sides of {shorter} to {longest} pixels in {look.shapes:,} sizes; {look.grey:,} grey; "
        + (f"{len(look.classes)} classes: {classes}." if look.classes else "no sub-folders, so no classes."),
        f"# This machine: {memory_at_hand()}.",
        "kind: pretrain",
        "data:",
        "  kind: folder",
        f"  path: {_quoted(str(look.folder.absolute()))}",
        f"  size: {size}   # each picture is cut to its central square and resized; {', '.join(map(str, (16, 32, 64, 128)))} fit the network",
        f"  channels: {look.channels}   # 3: colour, 1: grey",
    ]
    if look.transparent:
        lines.append(
            f"  background: white   # behind transparent pixels, in {len(look.transparent):,} of them; or black, grey"
        )
    left_out = {**look.unusable, **dict.fromkeys(look.loose, "lies beside the classes' folders")}
    if left_out:
        lines.append(f"  leave_out:   # not used: {len(left_out):,} file(s)")
        lines += [f"    - {_quoted(name)}   # {_reason(why)}" for name, why in sorted(left_out.items())]
    lines += [
        "fit_network: true   # size, channels and classes of the network are the data's",
        "denoiser:",
        f"  net: {{kind: unet, size: {size}, channels: {look.channels}, widths: {widths}, num_classes: {len(look.classes)}}}",
        "noise: {kind: lognormal, mean: -1.0, std: 1.2}",
        "label_dropout: 0.1",
        "flip: false   # true if a mirrored picture is as good: not for letters",
        "optim: {kind: adamw, lr: 1.0e-3, betas: [0.9, 0.99], weight_decay: 0.01, warmup: 10000, decay_from: 0.5, clip: 1.0}",
        "train:",
        f"  images: {images}   # each picture is seen some {images // look.count:,} times",
        "  batch_size: 64",
        "  ema_half_life: 60000",
        "  evaluate_every: 100000   # images between pictures",
        "  checkpoint_every: 50000",
        "  log_every: 6400",
        "evaluation: {samples: 0}   # no score while it trains; see `fewstep fetch inception`",
    ]
    text = "\n".join(lines) + "\n"
    validated(yaml.safe_load(text), Path("the run file"))  # what is written can be run
    return text


def _quoted(text: str) -> str:
    return str(yaml.safe_dump(text, default_style="'", width=10_000, allow_unicode=True)).strip()


def _reason(text: str) -> str:
    return " ".join(text.split("/")[-1].split())[:100]


def pipeline_values(teacher: DiffusersTeacher, steps: int = 4, lora: bool = True) -> dict[str, Any]:
    """Settings of a run file that distil a text-to-image pipeline by DMD2 from prompts alone, after the recipe for its kind (`MODELS`).

    Args:
        teacher: settings of the pipeline.
        steps: network calls of the student.
        lora: train adapters; False trains a whole copy of the network, which takes several times the memory.

    Raises:
        SettingsError: no recipe for this kind of network, or a number of steps outside 1 to 8.
        TeacherError: the pipeline cannot be read, or is a few-step model itself.
    """
    if not 1 <= steps <= 8:
        raise SettingsError(f"`steps` must be 1 to 8, got {steps}. Try: 4")
    teacher.check_few_step()
    spec, _ = teacher.outline()
    model = getattr(spec.net, "model", "")
    recipe = MODELS.get(model)
    if recipe is not None and FAMILIES[model].guided_inside(cast(Any, spec.net).config):
        recipe = GUIDED.get(model, recipe)
    if recipe is None:
        raise SettingsError(
            f"{teacher.path} must be a pipeline that a recipe suits ({', '.join(MODELS)}), got a {model}. Try: a run "
            "file (docs/text_to_image.md)"
        )
    values = read_settings(find_recipe(recipe))
    values["teacher"] |= {"path": teacher.path, "prompts": None}
    generator = values["generator"]
    if "timesteps" in generator:
        generator["timesteps"] = [1000 * (steps - index) // steps - 1 for index in range(steps)]
    else:
        generator["times"] = [(steps - index) / steps for index in range(steps)]
    if not lora:
        values["critic"] = {}
        generator["lora"] = None
        values["teacher"].pop("quantize", None)
    note(
        f"settings of {recipe} (`fewstep recipes {recipe}`) with {steps} step(s), {'a LoRA' if lora else 'the whole network'}"
    )
    return values


def pipeline_run(teacher: DiffusersTeacher, steps: int = 4, lora: bool = True) -> DistillRun:
    """The run of `pipeline_values`."""
    run = validated(pipeline_values(teacher, steps, lora), Path(teacher.path))
    assert isinstance(run, DistillRun)
    return run


def with_prompts(run: DistillRun, prompts: Path, folder: Path, encode: bool = True) -> DistillRun:
    """Use prepared prompts, or encode a file's once, beside the run folder.

    Args:
        run: the run.
        prompts: a file of prompts, or a folder of `fewstep prepare`.
        folder: the run's folder; a file's prompts are encoded in `<folder>-prompts`.
        encode: False if another process has encoded them.

    Raises:
        SettingsError: the teacher takes no prompts, or nothing is there.
        DataError: the file cannot be read, or the folder holds other prompts.
    """
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
        if encode:
            texts = read_prompt_file(prompts)
            before = run.teacher.prepare(texts, place, run.teacher.encoder(pick_device("auto")))
            note(f"{len(texts):,} prompts in {place} ({before:,} existed already)")
    return run.model_copy(update={"teacher": run.teacher.model_copy(update={"prompts": place})})
