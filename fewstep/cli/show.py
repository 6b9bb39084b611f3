"""`fewstep sample`, `eval`, `report`, `ui`, `export` and `recipes`: use finished models and list recipes."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction

from fewstep.cli.options import (
    CALLS,
    CHURN,
    COUNT,
    GUIDANCE,
    INTERVAL,
    METRICS,
    NAMES,
    PATH,
    PORT,
    SHARE,
    SIZE,
    TEXT,
    AsJson,
    Batch,
    Device,
    Imports,
    Line,
    Processes,
    SamplerOption,
    SigmaInit,
    about,
    as_json,
    at_least_one,
    at_most_one,
    bring,
    count_processes,
    guidance_of,
    several,
    solver_of,
)
from fewstep.evaluation.metrics import ASKED
from fewstep.evaluation.metrics import METRICS as USUAL

if TYPE_CHECKING:
    from fewstep.diffusion.solvers import Churn
    from fewstep.evaluation.metrics import Metric
else:  # tyro needs only their parsers; the real types would import torch
    Churn = Metric = Any

__all__ = ["eval_", "export", "recipes", "report", "sample", "ui"]

Guidance = Annotated[float | None, GUIDANCE, about("a teacher's classifier-free guidance", "none")]
GuidanceInterval = Annotated[
    tuple[float, float] | None,
    INTERVAL,
    about("noise levels sigma/alpha at which a teacher's guidance acts, such as 0.3,5: keeps variety", "all"),
]
GuidanceRescale = Annotated[
    float, SHARE, about("share of guidance's gain in contrast taken back, such as 0.7: against over-saturation")
]
Prompts = Annotated[
    Path | None,
    PATH,
    about("prompts of a text-to-image model: a folder of `fewstep prepare`", "the run's", "FOLDER"),
]
Stochastic = Annotated[
    Churn | None,
    CHURN,
    about(
        "sample a teacher stochastically with EDM's S_churn, S_min, S_max, S_noise, such as 40,0.05,50,1.003", "none"
    ),
]
Student = Positional[Annotated[str, about("a run folder of `fewstep distill`, or a student's file", metavar="STUDENT")]]


def sample(
    model: Positional[
        Annotated[str, about("a run folder, a model file, or a shipped teacher's name", metavar="MODEL")]
    ],
    seeds: Annotated[str, about("such as 0-63 or 3,7,100-120", metavar="SEEDS")] = "0-63",
    classes: Annotated[
        str | None,
        TEXT,
        about("classes of the seeds in turn, by number or name: 3 or 0,1,2", "seed mod classes", "CLASS,..."),
    ] = None,
    out: Annotated[Path, about("a .png (grid), a .npz, or a folder of PNGs", metavar="PATH")] = Path("samples.png"),
    evaluations: Annotated[int | None, COUNT, about("network calls of a teacher", "35")] = None,
    prompt: UseAppendAction[
        Annotated[list[str], about("a prompt of a text-to-image model; may be given several times", "", "TEXT")]
    ] = [],  # noqa: B006
    guidance: Guidance = None,
    guidance_interval: GuidanceInterval = None,
    guidance_rescale: GuidanceRescale = 0.0,
    negative_prompt: Annotated[
        str | None, TEXT, about("prompt that a teacher's guidance contrasts with", "the model's empty one", "TEXT")
    ] = None,
    prompts: Prompts = None,
    size: Annotated[
        tuple[int, int] | None,
        SIZE,
        about("width and height of a text-to-image model's pictures, such as 1344x768", "its own"),
    ] = None,
    sampler: SamplerOption = None,
    churn: Stochastic = None,
    sigma_init: SigmaInit = None,
    columns: Annotated[int, COUNT, about("columns of the grid")] = 8,
    scale: Annotated[int, COUNT, about("enlargement of each pixel in the grid")] = 2,
    batch: Batch = 250,
    device: Device = "auto",
    imports: Imports = (),
) -> None:
    """Make images with a student or a teacher."""
    from fewstep.evaluation.candidates import encode_prompts, load_candidate
    from fewstep.students.sample import parse_classes, parse_seeds, write_samples
    from fewstep.system.device import pick_device
    from fewstep.system.errors import SettingsError

    bring(imports)
    if prompt and classes is not None:
        raise SettingsError("`--prompt` and `--classes` must not be given together. Try: leave one of them out")
    if prompt and prompts is not None:
        raise SettingsError("`--prompt` and `--prompts` must not be given together. Try: leave one of them out")
    if negative_prompt is not None and (not prompt or guidance in (None, 1)):
        raise SettingsError(
            f"--negative-prompt must come with --prompt and --guidance of a teacher, got {negative_prompt!r} without. Try: "
            "--guidance 7.5"
        )
    where = pick_device(device)
    given = encode_prompts(model, prompt, where, negative_prompt) if prompt else prompts
    guided = guidance_of(guidance, guidance_interval, guidance_rescale)
    found = load_candidate(model, evaluations, where, sigma_init, solver_of(sampler, churn), guided, given, size)
    numbers = parse_seeds(seeds)
    # prompts in order, whatever the seeds
    wanted = ",".join(map(str, range(len(prompt)))) if prompt else classes
    labels = parse_classes(wanted, found.conditioner, len(numbers))
    try:
        count = write_samples(
            found.sampler, numbers, found.shape, found.conditioner, out, labels=labels, batch=batch,
            device=where, columns=columns, scale=scale,
        )  # fmt: skip
    except SettingsError as error:
        raise SettingsError(f"{model}: {error}") from None
    print(f"{count} images of {found.name} ({found.sampler.calls} network call(s) each) in {out}")


def eval_(
    models: Positional[
        Annotated[
            tuple[str, ...],
            at_least_one(str, "MODEL"),
            about("run folders, model files or shipped teachers; a student's teacher is added", ""),
        ]
    ],
    samples: Annotated[int | None, COUNT, about("images per model", "50000, or the protocol's number")] = None,
    protocol: Annotated[
        str | None,
        TEXT,
        about(
            "score text-to-image models as papers do: coco-30k (SD1.5), sdxl-10k (with patch FID); --reference is the "
            "folder of COCO's images, --clip OpenCLIP ViT-g-14; options that contradict the protocol are refused",
            "",
            "NAME",
        ),
    ] = None,
    evaluations: Annotated[
        Sequence[int], CALLS, about("a teacher's network calls, such as 35,18,9,5,1; 0: no teacher", "35")
    ] = (35,),
    guidance: Guidance = None,
    guidance_interval: GuidanceInterval = None,
    guidance_rescale: GuidanceRescale = 0.0,
    prompts: Prompts = None,
    repeat: Annotated[int, COUNT, about("number of scorings with different seeds: mean and spread (SiD: 10)")] = 1,
    sampler: SamplerOption = None,
    churn: Stochastic = None,
    sigma_init: SigmaInit = None,
    reference: Annotated[
        str | None,
        TEXT,
        about(
            "real images to compare with: statistics .npz, a folder, a .zip, fashion-mnist, or held out: fashion-mnist-test, digits-test",
            "the model's own, else its training images",
            "PATH",
        ),
    ] = None,
    extractor: Annotated[str, about("auto, inception, clip, small or pixels", metavar="NAME")] = "auto",
    clip: Annotated[
        str | None,
        TEXT,
        about(
            "folder of a CLIP model: adds CLIP score, retrieval of captions, diversity for one caption, and chroma",
            "",
            "FOLDER",
        ),
    ] = None,
    metrics: Annotated[
        Sequence[Metric],
        METRICS,
        about(f"of {', '.join(ASKED)} (Inception score)", ",".join(USUAL)),
    ] = USUAL,
    out: Annotated[
        Path | None,
        PATH,
        about(
            "results file; existing rows with the same protocol are kept",
            "results.json in the first run folder",
            "FILE",
        ),
    ] = None,
    precision: Annotated[
        Literal["auto", "bf16", "fp32"], about("auto: bf16 if the hardware supports it natively")
    ] = "auto",
    batch: Batch = 250,
    device: Device = "auto",
    processes: Processes = "auto",
    imports: Imports = (),
    json: AsJson = False,
    line: Line = (),
) -> int:
    """Score students and teachers: FID, KID, precision, recall, speed."""
    from fewstep.system import distributed
    from fewstep.system.device import pick_device, use_bf16

    bring(imports)
    where = pick_device(device)
    code = several(line, count_processes(processes, where.type == "cuda"))
    if code is not None:
        return code
    from fewstep.evaluation.candidates import expand
    from fewstep.evaluation.compare import compare, footnotes, table_of
    from fewstep.evaluation.protocols import find_protocol
    from fewstep.system.console import Progress, table
    from fewstep.system.console import results as stdout

    if samples is None:
        samples = find_protocol(protocol).samples if protocol else 50_000
    notes: list[str] = []
    with distributed.process_group():
        candidates = expand(
            models,
            evaluations,
            where,
            sigma_init,
            solver_of(sampler, churn),
            guidance_of(guidance, guidance_interval, guidance_rescale),
            prompts,
            notes.append,
        )
        first = Path(models[0])
        file = out or (first / "results.json" if first.is_dir() else Path("results.json"))
        with Progress("evaluate", samples * repeat * len(candidates), enabled=distributed.rank() == 0) as bar:

            def progress(name: str, done: int) -> None:
                bar.description = name
                bar.update(done)

            rows = compare(
                candidates, samples, file, protocol=protocol, reference=reference, extractor=extractor,
                metrics=metrics, batch=batch, bf16=use_bf16(precision, where), repeat=repeat, clip=clip,
                device=where, command="fewstep " + " ".join(line), progress=progress, note=notes.append,
            )  # fmt: skip
        if distributed.rank() == 0:
            if json:
                as_json({"rows": rows, "notes": notes, "file": file})
                return 0
            times = f"{repeat} x " if repeat > 1 else ""
            stdout.print(table(f"{times}{samples:,} samples each", *table_of(rows)))
            for text in [*footnotes(rows), *notes, f"kept in {file}"]:
                stdout.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def report(
    folders: Positional[Annotated[tuple[Path, ...], at_least_one(Path, "FOLDER"), about("run folders", "")]],
    out: Annotated[Path | None, PATH, about("the page", "report.html in the first folder", "FILE")] = None,
) -> None:
    """Write one HTML page about one run folder, or comparing several."""
    from fewstep.report.page import write_report

    print(write_report(folders, out or folders[0] / "report.html"))


def ui(
    students: Positional[
        Annotated[
            tuple[str, ...],
            at_least_one(str, "STUDENT"),
            about("run folders or files of students of one teacher, drawn beside each other", ""),
        ]
    ],
    port: Annotated[int | None, PORT, about("port of the page", "the first free one from 7860")] = None,
    host: Annotated[
        str,
        about("address to listen on; 0.0.0.0 serves other machines and needs FEWSTEP_UI_PASSWORD", metavar="ADDRESS"),
    ] = "127.0.0.1",
    device: Device = "auto",
    imports: Imports = (),
) -> None:
    """Open a page in the browser to try students and compare them with their teacher."""
    from fewstep.report.web import make_page, serve
    from fewstep.system.device import pick_device

    bring(imports)
    serve(make_page(students, pick_device(device)), host, port, os.environ.get("FEWSTEP_UI_PASSWORD"))


def export(
    student: Student,
    out: Annotated[Path, about("folder to write", metavar="FOLDER")],
    formats: Annotated[
        Sequence[str],
        NAMES,
        about(
            "of diffusers, lora, unet, fp8, comfyui, checkpoint, separated by commas",
            "all that apply but fp8, checkpoint",
        ),
    ] = (),
    dtype: Annotated[Literal["float16", "bfloat16", "float32"], about("of the weights")] = "float16",
    base_file: Annotated[str, about("name of the base model's file in ComfyUI, for the workflow", "", "NAME")] = "",
    base_model: Annotated[
        str, about("name of the base model on the hub, for the card", "the teacher's, unless that is a folder", "NAME")
    ] = "",
    license: Annotated[str, about("for the model card; the base model's binds you too", metavar="NAME")] = "other",
    probes: Annotated[
        int | None,
        COUNT,
        about("samples that measure the error with float8 and int8 weights, for the card", "no measure"),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        TEXT,
        about("upload the folder to this repository of the Hugging Face hub", "no upload", "OWNER/NAME"),
    ] = None,
    public: Annotated[bool, about("make a new repository public instead of private", "")] = False,
    imports: Imports = (),
) -> None:
    """Write a student for others: text-to-image for diffusers, ComfyUI and A1111, pixels for `fewstep.load`."""
    import torch

    from fewstep.students.export import export_student
    from fewstep.students.export.hub import Repository
    from fewstep.system.errors import SettingsError

    bring(imports)
    if public and push_to_hub is None:
        raise SettingsError("--public is for a repository on the hub. Try: give --push-to-hub too, or leave it out")
    # made first: a login that is missing is known before gigabytes are written
    repository = Repository(push_to_hub, public) if push_to_hub is not None else None
    written, notes = export_student(
        student, out, formats, getattr(torch, dtype), base_file, license, base_model, probes or 0, push_to_hub or ""
    )
    for file in written:
        print(file)
    for sentence in notes:
        print(f"note: {sentence}", file=sys.stderr)
    if repository is not None:
        print(repository.push(out))


def recipes(
    name: Positional[Annotated[str | None, at_most_one("NAME"), about("the recipe to show", "list all")]] = None,
    json: AsJson = False,
) -> None:
    """List the shipped recipes by teacher with length, hardware and what was measured, or show one."""
    from fewstep.run.recipes import find_recipe, list_recipes, summary

    if name:
        file = find_recipe(name)
        text = file.read_text(encoding="utf-8")
        if (shipped := file.parents[1] / "run.schema.json").exists():  # a copy of the recipe lies elsewhere
            text = text.replace("$schema=../run.schema.json", f"$schema={shipped}")
        print(text, end="")
        return
    found = {recipe: summary(path) for recipe, path in list_recipes().items()}
    if json:
        as_json(found)
        return
    for group, members in itertools.groupby(found, lambda recipe: recipe.partition("/")[0]):
        print(f"\n{group}")
        for recipe in members:
            print(f"  {recipe:28} {found[recipe]['about']}")
            if result := found[recipe]["result"]:
                print(f"  {'':28} {result}")
            print(f"  {'':28} {'; '.join(filter(None, (found[recipe]['images'], found[recipe]['hardware'])))}")
    print("\nshow one: fewstep recipes NAME    run one: fewstep distill NAME   (or fewstep pretrain NAME)")
