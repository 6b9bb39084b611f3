"""Export of students for other programs: a diffusers folder, LoRA files, whole networks, a ComfyUI workflow, a model card.

The entry point is `export_student`; `FORMATS` lists the formats. Weights are written one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

import fewstep
from fewstep.diffusion.noise import Discrete
from fewstep.formats.lora_reading import read_lora
from fewstep.formats.original_checkpoint import original_checkpoint
from fewstep.students.export.calls import FOLDER, LORA, BaseModel, lora_loader
from fewstep.students.export.card import model_card
from fewstep.students.export.comfyui import NO_CLASS, OTHER_NAMES, READS_NETWORK, Kind, obstacle, workflow
from fewstep.students.export.facts import Facts, is_hub_name
from fewstep.students.export.lora import kohya_entries, peft_config, peft_entries
from fewstep.students.export.lowbit import measure_rounding
from fewstep.students.export.pipeline import is_custom, save_pipeline, save_scheduler
from fewstep.students.export.pixels import export_pixels, stands_alone
from fewstep.students.export.schedulers import scheduler_of
from fewstep.students.export.weights import Weights
from fewstep.students.student import find_student
from fewstep.system.device import pick_device
from fewstep.system.errors import FileError, SettingsError
from fewstep.system.files import atomic_write, file_sha256
from fewstep.system.out_folder import check_out, marker, write_marker
from fewstep.system.tensors import write_entries
from fewstep.teachers.encoding import TextOptions
from fewstep.teachers.facts import zero_snr

__all__ = ["FORMATS", "export_student"]

FORMATS = {
    "diffusers": "a folder for DiffusionPipeline.from_pretrained",
    "lora": "the adapters, for diffusers (PEFT) and for ComfyUI and A1111 (kohya)",
    "unet": "the whole network in one file, for ComfyUI's models/diffusion_models",
    "fp8": "the same with the weights of its blocks in float8 (e4m3fn)",
    "comfyui": "a workflow with the right sampler, scheduler and steps",
    "checkpoint": "network, VAE and text encoders in one file, for ComfyUI's models/checkpoints, A1111 and Forge",
}
_ASKED_FOR = ("fp8", "checkpoint")  # written only on request: gigabytes that the other files already contain


def export_student(
    path: Path | str,
    out: Path,
    formats: Sequence[str] = (),
    dtype: torch.dtype = torch.float16,
    base_file: str = "",
    license: str = "other",
    base_model: str = "",
    probes: int = 0,
    place: str = "",
) -> tuple[list[Path], list[str]]:
    """Write a student; returns the written files, and notes for the user.

    A student on pixels becomes a folder for `fewstep.load` with a model card and samples.

    Args:
        path: a run folder, or a student's file.
        out: output folder.
        formats: formats of `FORMATS`; empty: all that apply except `checkpoint`.
        dtype: dtype of the weights.
        base_file: file name of the base model in ComfyUI, for the workflow.
        license: licence for the model card; the base model's licence applies too.
        base_model: name of the base model on the hub, for the model card; empty: the teacher's, unless that is on this machine.
        probes: number of samples for measuring the error with 8-bit weights, for the model card; 0: do not measure.
        place: the export's future name on the hub, for the model card's code; empty: a placeholder.

    Raises:
        SettingsError: not a student, not text-to-image, or a format that does not apply.
        FileError, TeacherError: its files, or its teacher's pipeline, cannot be read.
        WriteError: the disk is full.
    """
    check_out(out, "export")
    if unknown := set(formats) - FORMATS.keys():
        raise SettingsError(f"`--formats` must be of {', '.join(FORMATS)}, got {', '.join(sorted(unknown))}")
    if base_model and not is_hub_name(base_model):
        raise SettingsError(f"--base-model must be a name on the hub (owner/name), got {base_model!r}")
    file = find_student(path)
    if file is None:
        raise SettingsError(
            f"STUDENT must be a few-step student, got {path}. Try: the folder of a `fewstep distill` run with a checkpoint"
        )
    if not formats and stands_alone(file):
        return export_pixels(file, out, license)
    facts = Facts.read(file, path)
    wanted = _wanted(facts, path, formats)
    name = Path(path).resolve().name if Path(path).is_dir() else file.stem
    if (before := marker(out).get("student_sha256", facts.sha256)) != facts.sha256:
        raise SettingsError(
            f"--out {out} must hold an export of this student ({facts.sha256[:8]}), got one of another, or of an earlier checkpoint "
            f"({before[:8]}). Try: another --out, or delete that folder"
        )
    if file_sha256(file) != facts.sha256:
        raise FileError(f"{file} does not have the sha256 that its JSON says. Try: copy both again, or save them again")
    rounded = measure_rounding(facts, probes, pick_device("auto")) if probes else None
    weights = Weights(facts)
    part = weights.whole if weights.folder is None else facts.settings.pipeline("scheduler")
    scheduler = scheduler_of(facts, part.scheduler)
    out.mkdir(parents=True, exist_ok=True)
    about = {"student_sha256": facts.sha256, "made_by": f"fewstep {fewstep.__version__}", "student": facts.portable()}
    write_marker(out, "export", about)
    written: list[Path] = []
    if "diffusers" in wanted:
        save_pipeline(weights, scheduler, out, dtype)
        written.append(out / "model_index.json")
    if "lora" in wanted:
        if "diffusers" not in wanted:
            save_scheduler(scheduler, out / "scheduler")  # the card's call for the LoRA reads it
        written += _write_lora(weights, out / LORA, name, dtype)
    if "unet" in wanted:
        written.append(out / f"{name}_{facts.family.component}.safetensors")
        write_entries(written[-1], weights.network(), dtype, facts.metadata)
    if "fp8" in wanted:
        written.append(out / f"{name}_{facts.family.component}_fp8.safetensors")
        write_entries(written[-1], weights.in_float8(dtype), metadata=facts.metadata)
    if "checkpoint" in wanted:
        written.append(out / f"{name}.safetensors")
        _write_checkpoint(weights, written[-1], dtype)
    if "comfyui" in wanted:
        nodes = workflow(facts, *_used_by_comfyui(facts, name, wanted), base_file)
        written.append(out / f"{name}_comfyui.json")
        atomic_write(written[-1], json.dumps(nodes, indent=2))
    written.append(out / "README.md")
    base = base_model or (facts.settings.path if is_hub_name(facts.settings.path) else "")
    found = BaseModel(base, weights.absent | set(facts.settings.without), weights.variant)
    card = model_card(facts, name, wanted, license, is_custom(scheduler), found, rounded)
    atomic_write(written[-1], card.replace(FOLDER, place or FOLDER))
    return written, _notes(facts, formats, wanted, is_custom(scheduler))


def _wanted(facts: Facts, path: Path | str, formats: Sequence[str]) -> list[str]:
    """Formats to write.

    Raises:
        SettingsError: a format does not apply.
    """
    if facts.header.transition == "ode" and facts.steps > 1:
        raise SettingsError(
            f"an exported student must have the setting `generator.transition: renoise`, got {path} with `ode`: the schedulers that "
            "are written add fresh noise between its calls, and its pictures would be others. Try: `fewstep sample`"
        )
    if "lora" in formats and facts.lora is None:
        raise SettingsError(
            f"`--formats` lora must be left out for {path}, which has no adapters. Try: train with generator.lora"
        )
    whole_file = next((form for form in ("unet", "fp8") if form in formats), None)
    if whole_file is not None and facts.net.model not in READS_NETWORK:
        raise SettingsError(
            f"--formats {whole_file} is for networks whose file ComfyUI loads, got a {facts.net.model}. Try: diffusers or lora"
        )
    if "checkpoint" in formats and not facts.unet:
        raise SettingsError(
            f"--formats checkpoint is for Stable Diffusion 1 and SDXL, got a {facts.net.model}. Try: diffusers or unet"
        )
    why = obstacle(facts)
    if "comfyui" in formats and why:
        raise SettingsError(f"--formats comfyui cannot be written: {why}. Try: --formats diffusers")
    possible = {"diffusers"}
    possible |= {"lora"} if facts.lora else set()
    # a LoRA student of a transformer is used as its LoRA: its network is ten or twenty gigabytes
    possible |= {"unet"} if facts.net.model in READS_NETWORK and (facts.unet or not facts.lora) else set()
    possible |= {"comfyui"} if why is None else set()
    return list(formats) or [name for name in FORMATS if name in possible]


def _used_by_comfyui(facts: Facts, name: str, wanted: Sequence[str]) -> tuple[Kind, str]:
    """Kind and name of the file that the workflow loads: one that is written, if any is."""
    lora = f"{name}_lora.safetensors" if facts.unet else "pytorch_lora_weights.safetensors"
    files: dict[str, tuple[Kind, str]] = {
        "lora": ("lora", lora),
        "unet": ("network", f"{name}_{facts.family.component}.safetensors"),
        "fp8": ("network", f"{name}_{facts.family.component}_fp8.safetensors"),
        "checkpoint": ("checkpoint", f"{name}.safetensors"),
    }
    usual = "unet" if facts.lora is None else "lora"
    return files[next((kind for kind in files if kind in wanted), usual)]


def _write_lora(weights: Weights, folder: Path, name: str, dtype: torch.dtype) -> list[Path]:
    """Write PEFT's file, which ComfyUI also reads for transformers, and kohya's file for UNets."""
    facts, adapters = weights.facts, weights.adapters()
    component = facts.family.component
    folder.mkdir(parents=True, exist_ok=True)
    peft = folder / "pytorch_lora_weights.safetensors"
    about = json.dumps(peft_config(adapters, facts.lora, component), sort_keys=True)
    metadata = facts.metadata | {"lora_adapter_metadata": about}
    write_entries(peft, peft_entries(adapters, facts.lora, component), dtype, metadata)
    if not facts.unet:
        return [peft]
    kohya = folder / f"{name}_lora.safetensors"
    metadata = facts.metadata | {"ss_network_dim": str(facts.lora.rank), "ss_network_alpha": f"{facts.lora.alpha:g}"}
    write_entries(kohya, kohya_entries(adapters, facts.lora, facts.outline(), dtype), dtype, metadata)
    return [peft, kohya]


def _write_checkpoint(weights: Weights, file: Path, dtype: torch.dtype) -> None:
    facts = weights.facts
    names = ["vae", "text_encoder", *(["text_encoder_2"] if facts.sdxl else [])]
    parts = {name: weights.component(name) for name in names} | {"unet": weights.network()}
    v_prediction, zero = facts.prediction == "v", zero_snr(facts.schedule)
    metadata = facts.metadata | {"modelspec.prediction_type": "v" if v_prediction else "epsilon"}
    write_entries(file, original_checkpoint(facts.outline(), parts, v_prediction, zero), dtype, metadata)


def _notes(facts: Facts, formats: Sequence[str], wanted: Sequence[str], custom: bool) -> list[str]:
    """Notes for the user that no file can state."""
    notes = []
    settings, for_others = facts.settings, set(wanted) - {"diffusers"}
    if custom and "diffusers" in wanted:
        notes.append(
            f"no scheduler of diffusers visits {facts.times_argument} by itself: the folder brings one, and loads with "
            "trust_remote_code=True (see the model card)"
        )
    if not formats and (why := obstacle(facts)) is not None and (facts.unet or facts.net.model in READS_NETWORK):
        notes.append(f"no ComfyUI workflow was written: {why}. Try: the diffusers folder")
    loader = lora_loader(facts)
    if "lora" in wanted and loader not in (None, "load_lora_weights"):
        notes.append(f"{facts.pipeline.__name__} of diffusers cannot load a LoRA, its network can: see the model card")
    elif "lora" in wanted and loader is None:
        notes.append(f"{facts.pipeline.__name__} of diffusers cannot load a LoRA: that file is for ComfyUI")
    elif "lora" in wanted and facts.net.model in NO_CLASS:
        notes.append(f"ComfyUI has no class for a {facts.net.model}: the LoRA is for diffusers alone")
    elif "lora" in wanted and facts.net.model in OTHER_NAMES:
        notes.append(
            f"ComfyUI does not know the layers of a {facts.net.model} by these names: the LoRA is for diffusers alone"
        )
    if settings.lora is not None and for_others:
        strength = f"strength {settings.lora_scale:g}"
        if facts.lora is not None and {"lora", "comfyui"} & set(wanted):
            notes.append(
                f"the adapters were trained on {settings.path} with {settings.lora} merged at {strength}: load both"
            )
        elif "checkpoint" not in wanted and read_lora(settings.lora).text_keys:
            notes.append(
                f"prompts were encoded with the text encoders' part of {settings.lora}, which a file of the network does not hold: in "
                f"ComfyUI load that LoRA too, with strength_clip {settings.lora_scale:g} and strength_model 0"
            )
    if zero_snr(facts.schedule) and for_others:
        notes.append(
            "this student predicts with zero terminal SNR: in ComfyUI the node ModelSamplingDiscrete says so (zsnr, as in the "
            "workflow), in A1111 and Forge the setting `Noise schedule for sampling: Zero Terminal SNR`"
        )
    if isinstance(facts.schedule, Discrete):
        own = [time * (len(facts.schedule.alphas_cumprod) - 1) for time in facts.times]
        if any(abs(step - round(step)) > 1e-3 for step in own):
            notes.append(
                f"this student was trained at {[round(step, 2) for step in own]}, between timesteps of its table: other programs call it "
                f"at {facts.timesteps}"
            )
    if not facts.usual_size:
        height, width = facts.picture
        notes.append(
            f"this student draws {width} x {height} pixels: pass width and height to the pipeline (see the model card)"
        )
    if settings.text != TextOptions():
        options = settings.text.model_dump(exclude_none=True)
        said = ", ".join(f"{name}={value!r}" for name, value in options.items())
        notes.append(f"prompts were encoded with {said}: pass the same to the pipeline (see the model card)")
    return notes
