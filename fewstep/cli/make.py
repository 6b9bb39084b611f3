"""`fewstep pairs`, `prepare` and `import`: the inputs of a training run."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from fewstep.cli.options import (
    COUNT,
    PATH,
    STEPS,
    TEXT,
    Device,
    Imports,
    Line,
    Processes,
    Recipe,
    SamplerOption,
    Settings,
    SigmaInit,
    about,
    count_processes,
    several,
    solver_of,
)
from fewstep.cli.train import load

__all__ = ["import_", "pairs", "prepare"]


def pairs(
    recipe: Recipe = None,
    out: Annotated[
        Path | None, PATH, about("folder of the pairs; the same command resumes", "the run's pairs", "FOLDER")
    ] = None,
    count: Annotated[int, COUNT, about("number of pairs")] = 10_000,
    evaluations: Annotated[int, COUNT, about("network calls per pair")] = 35,
    sampler: SamplerOption = None,
    batch: Annotated[int, COUNT, about("pairs per batch in a process")] = 250,
    processes: Processes = "auto",
    imports: Imports = (),
    settings: Settings = (),
    line: Line = (),
) -> int:
    """Make noise-image pairs of a teacher, for DMD's regression.

    Any setting of the run can be changed, as in `fewstep distill`: `--teacher.path runs/my-teacher`.
    """
    from fewstep.methods.pairs import make_pairs
    from fewstep.run.specs import DistillRun
    from fewstep.system import distributed
    from fewstep.system.console import Progress, duration, waiting
    from fewstep.system.errors import SettingsError
    from fewstep.system.out_folder import check_out
    from fewstep.teachers.samplers import Best

    started = time.monotonic()
    run = load(recipe, DistillRun, settings, processes, imports)
    assert recipe is not None  # by load
    out = out or run.pairs
    if out is None:
        raise SettingsError("`--out` must be given, since the run names no pairs. Try: --out FOLDER")
    check_out(out, "pairs")
    device = run.train.torch_device()
    code = several(line, count_processes(processes, device.type == "cuda"))
    if code is not None:
        return code
    with distributed.process_group():
        main = distributed.rank() == 0
        with waiting("loading the teacher"):
            teacher = run.teacher.load()
        solver = solver_of(sampler, None)
        if isinstance(solver, Best):
            solver = solver.of(teacher, evaluations, run.objective.guidance_with)
        with Progress("pairs", count, unit="pairs", enabled=main) as bar:
            found = make_pairs(
                teacher, out, count, evaluations, run.objective.guidance_with, solver,
                batch=batch, device=device, bf16=run.train.bf16(), progress=bar.update,
            )  # fmt: skip
    if main:
        print(
            f"finished: {max(count, found):,} pairs in {out} ({found:,} existed already), "
            f"in {duration(time.monotonic() - started)}\n"
            f"next:\n  {shlex.join(['fewstep', 'distill', recipe, *settings, '--pairs', str(out)])}"
        )
    return 0


def prepare(
    recipe: Positional[
        Annotated[
            str,
            about(
                "a run file with a teacher of kind diffusers, a recipe's name, or a pipeline's folder", metavar="RECIPE"
            ),
        ]
    ],
    prompts: Annotated[
        Path | None, PATH, about("a .txt file (one per line), .jsonl, .csv, .tsv, .parquet, or DMD2's .pkl", "", "FILE")
    ] = None,
    images: Annotated[
        Path | None,
        PATH,
        about(
            "for a GAN: a folder of images with captions.jsonl or .txt files, WebDataset .tar files, a saved dataset, "
            "or DMD2's LMDB",
            "",
        ),
    ] = None,
    caption_column: Annotated[
        str | None, TEXT, about("key or column of the captions", "caption, text or prompt", "NAME")
    ] = None,
    several_captions: Annotated[
        Literal["refuse", "first", "longest"], about("which caption to use if a row has several")
    ] = "refuse",
    missing_captions: Annotated[
        Literal["refuse", "skip"], about("how to treat rows and images without a caption")
    ] = "refuse",
    max_malformed: Annotated[
        float,
        about("share of items that may be malformed: they are left out and named in skipped.jsonl", metavar="SHARE"),
    ] = 0.01,
    out: Annotated[Path | None, PATH, about("folder to write", "the run's teacher.prompts", "FOLDER")] = None,
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32"], about("of the stored embeddings and latents")
    ] = "float16",
    batch: Annotated[int, COUNT, about("prompts or images per batch")] = 16,
    device: Device = "auto",
    dry_run: Annotated[bool, about("print the size on disk, write nothing", "")] = False,
) -> None:
    """Encode prompts and captioned images for a text-to-image teacher; training then runs without the encoders."""
    import torch

    from fewstep.data import CaptionRule, Prepared, Tolerance
    from fewstep.run.settings import find_pipeline, text_to_image_teacher
    from fewstep.system.console import Progress, duration, note, waiting
    from fewstep.system.device import pick_device
    from fewstep.system.out_folder import check_out
    from fewstep.teachers.prepare import Material, prepare_images

    started = time.monotonic()
    teacher = text_to_image_teacher(recipe)
    folder = out or teacher.prompts
    if folder is None:
        raise ValueError("`--out` must be given, since the run names no prompts. Try: --out FOLDER")
    check_out(folder, "prepared")
    where, kept = pick_device(device), getattr(torch, dtype)
    rule, bad = CaptionRule(caption_column, several_captions, missing_captions), Tolerance(max_malformed)
    with waiting("reading prompts and images"):
        material = Material.gather(teacher, prompts, images, rule, bad)
    with waiting(f"loading the text encoders of {teacher.path}"):
        texts, pictures, encoder = material.prompts, material.images, teacher.encoder(where)
    captions = pictures.captions if pictures else []
    for count, what, size in zip(
        (len(texts), len(captions)), ("prompts", "images"), material.needs(encoder, kept, where), strict=True
    ):
        if count:
            print(f"{count:,} {what}, about {size / 2**20:,.1f} MiB in {folder}")
    if dry_run:
        return
    with Progress("prepare", len(texts), unit="prompts") as bar:
        found = teacher.prepare(texts, folder, encoder, kept, batch, bar.update)
    made = f"finished: {len(texts):,} prompts ({found:,} existed already)"
    del encoder  # free the text encoders' memory before the VAE runs
    try:
        if pictures is not None:
            seen = len(bad.items)
            with Progress("prepare", len(captions)) as bar:
                found = prepare_images(
                    folder,
                    pictures,
                    texts,
                    material.codec,
                    kept,
                    batch=batch,
                    device=where,
                    progress=bar.update,
                    bad=bad,
                    sizes=material.sizes,
                )
            made += f", {len(captions) - len(bad.items) + seen:,} images ({found:,} existed already)"
    finally:
        bad.write(folder / "skipped.jsonl")
    if bad.items:
        note(
            f"{len(bad.items):,} malformed item(s) were left out: {folder / 'skipped.jsonl'} names them, the first {bad.items[0][0]}"
        )
    if material.sizes:
        buckets = Prepared(path=folder).load_buckets()
        for (height, width), part in zip(buckets.sizes, buckets.parts, strict=True):
            print(f"  {width:>5} x {height:<5} {len(part):>9,} images")
    run = "" if find_pipeline(recipe) is None else "RECIPE --teacher.path "
    use = f"fewstep distill {run}{shlex.quote(recipe)} --teacher.prompts {shlex.quote(str(folder))}"
    print(f"{made} in {folder}, in {duration(time.monotonic() - started)}\nnext:\n  {use}")
    if pictures is not None:
        print(f"  in the run file, for its GAN: data: {{kind: prepared, path: {folder}}}")


def import_(
    file: Positional[
        Annotated[Path, about("such as edm-cifar10-32x32-cond-vp.pkl, or a DMD2 checkpoint folder", metavar="FILE")]
    ],
    out: Annotated[Path, about("folder to write", metavar="FOLDER")],
    pipeline: Annotated[
        str | None,
        TEXT,
        about(
            "base pipeline of a text-to-image student (a UNet or a LoRA, such as DMD2's; a file or a folder): "
            "folder, hub name or file",
            "",
            "PIPELINE",
        ),
    ] = None,
    timesteps: Annotated[list[int] | None, STEPS, about("timesteps of that student", "999,749,499,249")] = None,
    sigma_init: SigmaInit = None,
) -> None:
    """Turn a published EDM, SiD or DMD2 model into safetensors and JSON; nothing in it is executed."""
    from fewstep.formats.model import import_model
    from fewstep.system.out_folder import check_out

    if pipeline is not None and sigma_init is not None:
        raise ValueError("--sigma-init must be given for .pkl files only, got --pipeline as well. Try: --timesteps")
    if pipeline is None and timesteps is not None:
        raise ValueError("--timesteps must be given with --pipeline. Try: add --pipeline, or leave it out")
    if not file.exists():
        raise ValueError(f"FILE must be a downloaded file or folder, got {file}, which does not exist")
    check_out(out, "import")
    place = shlex.quote(str(out))
    if pipeline is not None:
        from fewstep.students.published import import_student
        from fewstep.teachers import DiffusersTeacher

        teacher = DiffusersTeacher.model_validate({"path": pipeline})
        path, notes = import_student(file, teacher, timesteps or [999, 749, 499, 249], out)
        for sentence in notes:
            print(f"note: {sentence}", file=sys.stderr)
        print(f"finished: {path} and its JSON\nnext:\n  fewstep sample {place} --prompt TEXT --out samples.png")
        print(f"  fewstep export {place} --out {place}-export\n  fewstep distill RECIPE --start-from {place}")
        return
    path = import_model(file, out, sigma_init)
    train = "--start-from" if path.stem == "student" else "--teacher.path"
    print(f"finished: {path} and its JSON\nnext:\n  fewstep sample {place} --out samples.png")
    print(f"  fewstep eval {place} --reference REAL_IMAGES\n  fewstep distill RECIPE {train} {place}")
