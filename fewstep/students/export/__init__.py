"""Students as files that other programs load: a diffusers folder, LoRA files, a single UNet, a ComfyUI workflow, a card.

One entry, `export_student`. What is written for whom is in the table of `FORMATS`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

import fewstep
from fewstep.diffusion.noise import RectifiedFlow
from fewstep.formats.lora_reading import read_lora
from fewstep.networks import FAMILIES
from fewstep.networks.lora import Adapted, merged
from fewstep.students.export.card import model_card
from fewstep.students.export.comfyui import workflow
from fewstep.students.export.lora import kohya_tensors, peft_config, peft_tensors
from fewstep.students.export.pipeline import save_pipeline
from fewstep.students.student import Student, find_student, load_student
from fewstep.system.console import quiet
from fewstep.system.errors import SettingsError
from fewstep.system.files import atomic_write
from fewstep.system.out_folder import check_out, marker, write_marker
from fewstep.teachers.encoding import TextOptions
from fewstep.teachers.facts import zero_snr

__all__ = ["FORMATS", "export_student"]

FORMATS = {
    "diffusers": "a folder for DiffusionPipeline.from_pretrained",
    "lora": "the adapters, for diffusers (PEFT) and for ComfyUI and A1111 (kohya)",
    "unet": "the whole UNet in one file, for ComfyUI's models/diffusion_models",
    "comfyui": "a workflow with the right sampler, scheduler and steps",
}


def export_student(
    path: Path | str,
    out: Path,
    formats: Sequence[str] = (),
    dtype: torch.dtype = torch.float16,
    base_file: str = "",
    license: str = "other",
) -> tuple[list[Path], list[str]]:
    """Write a text-to-image student; returns what was written, and notes that a user must read.

    Args:
        path: a run folder, or a student's file.
        out: folder to write.
        formats: of `FORMATS`; empty: all that apply.
        dtype: of the weights.
        base_file: name of the base model's file in ComfyUI, for the workflow.
        license: for the card; the base model's own binds whoever passes it on.

    Raises:
        SettingsError: not a student, not of text-to-image, or a form that does not apply.
        FileError, TeacherError: its files, or its teacher's pipeline, cannot be read.
    """
    check_out(out, "export")
    unknown = set(formats) - FORMATS.keys()
    if unknown:
        raise SettingsError(f"unknown formats {', '.join(sorted(unknown))}: choose from {', '.join(FORMATS)}")
    file = find_student(path)
    if file is None:
        raise SettingsError(
            f"{path} holds no few-step student: give the folder of a `fewstep distill` run that has saved"
        )
    student = load_student(file, whole=not formats or bool({"diffusers", "unet"} & set(formats)))
    if student.pipeline is None or not FAMILIES[student.net.model].encode:
        raise SettingsError(
            f"{path} is no text-to-image student, and export is for those: {file} and its .json are its files already, `fewstep sample` and "
            "fewstep.formats.model.load_generator read them"
        )
    if student.generator.transition == "ode" and student.generator.steps > 1:
        raise SettingsError(
            f"an exported student must have the setting `generator.transition: renoise`, got {path} with `ode`: the schedulers that "
            "are written add fresh noise between its calls, and its pictures would be others. Try: `fewstep sample`"
        )
    adapted = student.generator.denoiser if isinstance(student.generator.denoiser, Adapted) else None
    if "lora" in formats and adapted is None:
        raise SettingsError(
            f"{path} was trained whole, it has no adapters: leave lora out, or train with generator.lora"
        )
    unet = student.net.model == "UNet2DConditionModel"
    if not unet and (odd := {"unet", "comfyui"} & set(formats)):
        raise SettingsError(
            f"{', '.join(sorted(odd))}: only for UNets; ComfyUI loads the LoRA file of a {student.net.model} as it is"
        )
    possible = {"diffusers"} | ({"lora"} if adapted else set()) | ({"unet", "comfyui"} if unet else set())
    wanted = list(formats) or [name for name in FORMATS if name in possible]
    out, name = Path(out), Path(path).resolve().name if Path(path).is_dir() else file.stem
    sha256 = student.sha256
    if (before := marker(out).get("student_sha256", sha256)) != sha256:
        raise SettingsError(
            f"--out {out} must hold an export of this student ({sha256[:8]}), got one of another, or of an earlier checkpoint "
            f"({before[:8]}). Try: another --out, or delete that folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_marker(out, "export", {"student_sha256": sha256, "made_by": f"fewstep {fewstep.__version__}"})
    weights: dict[str, Tensor] = {}
    if {"diffusers", "unet"} & set(wanted):
        state = merged(adapted) if adapted is not None else student.generator.denoiser.state_dict()
        weights = {key.removeprefix("net.model."): value for key, value in state.items()}
    written: list[Path] = []
    notes: list[str] = []
    call = _call(student)
    usual = True
    if "diffusers" in wanted:
        usual = save_pipeline(student, weights, out, dtype)
        written.append(out / "model_index.json")
        if not usual:
            notes.append(
                f"the scheduler does not visit this student's times by itself in {student.generator.steps} step(s), and no "
                f"configuration can store them: pass `{call}` to the pipeline (the card says so too)"
            )
    if "lora" in wanted:
        assert adapted is not None, "by the check of formats"
        written += _write_lora(student, adapted, out, name, dtype, kohya=unet)
    if (tuned := student.settings.lora) is not None and {"lora", "unet", "comfyui"} & set(wanted):
        strength = f"strength {student.settings.lora_scale:g}"
        if adapted is not None and {"lora", "comfyui"} & set(wanted):
            notes.append(
                f"the adapters were trained on {student.settings.path} with {tuned} merged at {strength}: load both"
            )
        elif read_lora(tuned).text_keys:
            notes.append(
                f"prompts were encoded with the text encoders' part of {tuned}, which a file of the network does not hold: in ComfyUI "
                f"load that LoRA too, with strength_clip {student.settings.lora_scale:g} and strength_model 0"
            )
    if "unet" in wanted:
        single = out / f"{name}_unet.safetensors"
        tensors = {key: value.detach().to("cpu", dtype).contiguous() for key, value in weights.items()}
        save_file(tensors, single, {"format": "pt"})
        written.append(single)
    if "comfyui" in wanted:
        timesteps = _timesteps(student)
        kind: Literal["lora", "unet"] = "lora" if adapted else "unet"
        used = f"{name}_{kind}.safetensors"
        _, height, width = student.codec.shape if student.codec else student.shape
        nodes = workflow(
            kind, used, base_file or f"{Path(student.settings.path).stem}.safetensors", len(timesteps), (width, height),
            student.prediction, student.conditioner.names[0] if student.conditioner.names else "a photograph",
            zero_snr(student.generator.denoiser.schedule), _clip_layer(student),
        )  # fmt: skip
        written.append(out / f"{name}_comfyui.json")
        atomic_write(written[-1], json.dumps(nodes, indent=2))
        simple = _comfyui_timesteps(len(timesteps))
        if simple != timesteps:
            notes.append(f"ComfyUI's scheduler `simple` visits {simple}, this student was trained at {timesteps}")
        if not _usual_table(student):
            notes.append(
                "ComfyUI has one noise table for this kind of model (beta from 0.00085 to 0.012, scaled linear), and this student "
                "was trained with another: the workflow cannot say so, use the diffusers folder"
            )
    if zero_snr(student.generator.denoiser.schedule) and {"lora", "unet", "comfyui"} & set(wanted):
        notes.append(
            "this student predicts with zero terminal SNR: in ComfyUI the node ModelSamplingDiscrete says so (zsnr, as in the "
            "workflow), in A1111 and Forge the setting `Noise schedule for sampling: Zero Terminal SNR`"
        )
    if student.pipeline.resolution is not None and student.codec is not None:
        _, height, width = student.codec.shape
        notes.append(
            f"this student draws {width} x {height} pixels: pass width and height to the pipeline (the card says so too)"
        )
    if student.pipeline.text != TextOptions():
        notes.append(
            f"prompts were encoded with {_options(student)}: pass the same to the pipeline (the card says so too)"
        )
    written.append(out / "README.md")
    atomic_write(
        written[-1],
        model_card(student, name, wanted, license, f"num_inference_steps={student.generator.steps}" if usual else call),
    )
    return written, notes


def _write_lora(
    student: Student, adapted: Adapted, out: Path, name: str, dtype: torch.dtype, kohya: bool
) -> list[Path]:
    """PEFT's file, which ComfyUI reads too if the network is a transformer; and kohya's for UNets."""
    import diffusers

    peft, component = out / "pytorch_lora_weights.safetensors", FAMILIES[student.net.model].component
    layers = {
        f"{component}_lora_layers": peft_tensors(adapted, dtype),
        f"{component}_lora_adapter_metadata": peft_config(adapted),
    }
    with quiet():
        # the file is the same for all pipelines of a kind, also for those without a loader of their own (PixArt)
        kinds = {"unet": diffusers.StableDiffusionXLPipeline, "transformer": diffusers.StableDiffusion3Pipeline}
        kinds[component].save_lora_weights(out, **layers)
    if not kohya:
        return [peft]
    other = out / f"{name}_lora.safetensors"
    save_file(kohya_tensors(adapted, dtype), other, {"format": "pt", "ss_network_dim": str(adapted.spec.rank)})
    return [peft, other]


def _call(student: Student) -> str:
    """The pipeline's argument that makes it visit the student's times."""
    if isinstance(student.generator.denoiser.schedule, RectifiedFlow):
        return f"sigmas={[round(time, 6) for time in student.generator.times]}"  # the scheduler shifts them
    return f"timesteps={_timesteps(student)}"


def _clip_layer(student: Student) -> int | None:
    """ComfyUI's count of CLIP's layers: -1 is the last; SDXL reads the one before by itself."""
    skipped = student.settings.text.clip_skip
    sdxl = student.net.config.get("addition_embed_type") == "text_time"
    return None if skipped is None else -(skipped + (2 if sdxl else 1))


def _usual_table(student: Student) -> bool:
    """Return whether the noise table is Stable Diffusion's, rescaled or not."""
    import diffusers

    rescaled = zero_snr(student.generator.denoiser.schedule)
    usual = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=rescaled
    )
    table = torch.tensor(student.table.alphas_cumprod)
    return len(table) == len(usual.alphas_cumprod) and torch.allclose(table, usual.alphas_cumprod, atol=1e-5)


def _options(student: Student) -> str:
    """Return how prompts were encoded, as arguments of the pipeline's call."""
    return ", ".join(f"{name}={value!r}" for name, value in student.settings.text.model_dump(exclude_none=True).items())


def _timesteps(student: Student) -> list[int]:
    last = len(student.table.alphas_cumprod) - 1
    return [round(time * last) for time in student.generator.times]


def _comfyui_timesteps(steps: int) -> list[int]:
    """Return the levels that ComfyUI's `simple_scheduler` picks from 1,000, from the noisiest."""
    return [999 - int(step * 1000 / steps) for step in range(steps)]
