"""The `fewstep` command: arguments to calls, errors to one line. No logic of its own; imports what a command needs."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.system.console import note
from fewstep.system.errors import UserError
from fewstep.system.interrupt import INTERRUPTED, command_signals, interrupted

if TYPE_CHECKING:
    from fewstep.diffusion.solvers import Churn

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for what the user can mend, 130 after Ctrl-C."""
    whole_process = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="fewstep", description="Distil diffusion models into generators of one to four network calls."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (add, _) in COMMANDS.items():
        add(commands.add_parser(name, help=add.__doc__, description=add.__doc__, add_help=name not in SETTINGS))
    _once(parser, arguments)
    options, rest = parser.parse_known_args(arguments)
    note.cache_clear()
    if rest and options.command not in SETTINGS:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    with command_signals(whole_process):
        try:
            return COMMANDS[options.command][1](options, rest, arguments) or 0
        except KeyboardInterrupt as stop:
            return _stopped(str(stop), arguments)
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            if interrupted() and not _is_ours(error):
                if isinstance(error, ImportError):  # an import that was cut off
                    return _stopped("", arguments)
                if isinstance(error, RuntimeError) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                    # most likely a peer that is gone already
                    return _stopped(f"stopped without saving ({str(error).splitlines()[0]})", arguments)
            if not _is_ours(error):
                if "FEWSTEP_PARENT" not in os.environ:
                    raise
                traceback.print_exc()
                return 3  # fewstep.system.launch.UNEXPLAINED: perhaps only another process's failure, which that one explains
            print(f"fewstep {options.command}: {error}", file=sys.stderr)
            return 1


def _once(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Refuse an option or a setting that is given twice: the last would win without a word."""
    given: set[str] = set()
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        path, _, last = name.removeprefix("--").rpartition(".")
        name = f"{path}.{last.removeprefix('no-')}"
        if argument.startswith("--") and name != ".prompt":
            if name in given:
                parser.error(f"{argument.partition('=')[0]} is given twice: keep one of them")
            given.add(name)


def _stopped(said: str, arguments: list[str]) -> int:
    """Say how to go on after Ctrl-C."""
    if os.environ.get("RANK", "0") == "0":
        again = f"fewstep {shlex.join(arguments)}"
        if "TORCHELASTIC_RUN_ID" in os.environ:
            again = f"the same torchrun line, with -m {again}"
        print(f"\n{said or 'stopped; what was complete is kept'}\nTo go on: {again}", file=sys.stderr)
    return INTERRUPTED


def _is_ours(error: BaseException) -> bool:
    """Whether the message was written for users: this package's errors, and what the system says of files."""
    return isinstance(error, (UserError, OSError, ModuleNotFoundError)) or type(error) is ValueError


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="a run file, a run folder, or the name of a shipped recipe")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/<recipe>); the same folder resumes")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run and its cost, train nothing")
    _processes_option(parser)
    parser.add_argument("-h", "--help", action="store_true", help="show this, and every setting that can be overridden")


def _add_pretrain(parser: argparse.ArgumentParser) -> None:
    """train a teacher"""
    _run_options(parser)


def _add_distill(parser: argparse.ArgumentParser) -> None:
    """distil a teacher into a few-step generator"""
    _run_options(parser)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    """print what a run will take, before anything is loaded: memory by part, work, messages, hours"""
    _run_options(parser)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    """measure what a distillation costs: network passes, operations, memory, images a second"""
    _run_options(parser)
    parser.add_argument("--cycles", type=_positive, default=3, help="how many cycles of updates to time (default 3)")


def _train(options: argparse.Namespace, rest: list[str], arguments: list[str]) -> int:
    from fewstep.run.execute import describe, execute
    from fewstep.run.recipes import find_recipe, list_recipes, run_place
    from fewstep.run.settings import load_run, override
    from fewstep.run.specs import DistillRun, PretrainRun
    from fewstep.system import distributed
    from fewstep.system.errors import SettingsError

    kind = PretrainRun if options.command == "pretrain" else DistillRun  # bench measures distillations
    if options.recipe is None:
        if options.help:
            print(
                f"usage: fewstep {options.command} RECIPE [--out FOLDER] [--dry-run] [--processes N] [--SETTING "
                "VALUE ...]\n"
            )
            print(
                "Recipes: "
                + ", ".join(list_recipes())
                + f"\nSettings of a recipe: fewstep {options.command} RECIPE --help"
            )
            return 0
        raise SettingsError(f"which run? give a file or a recipe's name: {', '.join(list_recipes())}")
    run: Any = load_run(options.recipe)
    _count(options.processes, False)  # refused before anything is loaded, and in a dry run too
    if not isinstance(run, kind):
        raise SettingsError(f"{options.recipe} is a {run.kind} run: use `fewstep {run.kind}`")
    if rest or options.help:
        run = override(run, rest + (["--help"] if options.help else []))
    out = options.out or run_place(options.recipe)
    if options.dry_run:
        print(describe(run))
        return 0
    if options.command == "plan":
        from fewstep.costs.machines import published
        from fewstep.costs.plan import plan

        found = plan(run, None if options.processes == "auto" else _count(options.processes, False))
        recipe = published(find_recipe(options.recipe).read_text(encoding="utf-8"))
        print(found if recipe is None else f"{found}\n{found.beside(recipe)}")
        return 0
    processes = _processes(options.processes, run)
    if processes > 1 and "RANK" not in os.environ:
        from fewstep.system.launch import relaunch

        return relaunch(arguments, processes, *([] if options.command == "bench" else [SAVING]))
    with distributed.process_group():
        if options.command == "bench":
            from fewstep.costs.bench import measure

            cost = measure(run, options.cycles)
            if distributed.rank() == 0:
                print(cost)
        else:
            from fewstep.report.ending import ending

            execute(run, out)
            if distributed.rank() == 0:
                print(ending(out))
    return 0


def _processes(wanted: str, run: Any) -> int:
    count = _count(wanted, run.train.torch_device().type == "cuda")
    while wanted == "auto" and run.train.batch_size % (count * (run.train.micro_batch or 1)):
        count -= 1
    return count


def _add_pairs(parser: argparse.ArgumentParser) -> None:
    """make noise-image pairs of a teacher, for DMD's regression"""
    parser.add_argument("recipe", help="a distillation run whose teacher (and guidance) to use")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pairs; the same command resumes")
    parser.add_argument("--count", type=_positive, default=10_000, help="number of pairs (default 10000)")
    parser.add_argument("--evaluations", type=_positive, default=35, help="network calls of each (default 35)")
    parser.add_argument("--batch", type=_positive, default=250, help="pairs at a time in a process (default 250)")
    _processes_option(parser)


def _pairs(options: argparse.Namespace, rest: list[str], arguments: list[str]) -> int:
    from fewstep.methods.pairs import make_pairs
    from fewstep.run.settings import load_run
    from fewstep.system import distributed
    from fewstep.system.console import Progress, duration, waiting
    from fewstep.system.errors import SettingsError
    from fewstep.system.out_folder import check_out

    started = time.monotonic()
    run: Any = load_run(options.recipe)
    if run.kind != "distill":
        raise SettingsError(f"{options.recipe} is a {run.kind} run: pairs need a distill run, which names a teacher")
    check_out(options.out, "pairs")
    device = run.train.torch_device()
    processes = _count(options.processes, device.type == "cuda")
    if processes > 1 and "RANK" not in os.environ:
        from fewstep.system.launch import relaunch

        return relaunch(arguments, processes)
    with distributed.process_group():
        main = distributed.rank() == 0
        with waiting("loading the teacher"):
            teacher = run.teacher.load()
        with Progress("pairs", options.count, unit="pairs", enabled=main) as bar:
            found = make_pairs(
                teacher, options.out, options.count, options.evaluations, run.objective.guidance,
                batch=options.batch, device=device, bf16=run.train.bf16(), progress=bar.update,
            )  # fmt: skip
    if main:
        print(
            f"finished: {max(options.count, found):,} pairs in {options.out} ({found:,} were there), "
            f"in {duration(time.monotonic() - started)}\n"
            f"next:\n  {shlex.join(['fewstep', 'distill', options.recipe, '--pairs', str(options.out)])}"
        )
    return 0


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    """encode prompts and captioned images for a text-to-image teacher, whose encoders are not needed afterwards"""
    parser.add_argument(
        "recipe", help="a run file with a teacher of kind diffusers, a recipe's name, or a pipeline's folder"
    )
    parser.add_argument("--prompts", type=Path, help="a .txt file (one a line), .jsonl, .parquet, or DMD2's .pkl")
    parser.add_argument(
        "--images",
        type=Path,
        help="for a GAN: a folder of images with captions.jsonl or .txt files, WebDataset .tar files, a saved dataset, or DMD2's LMDB",
    )
    parser.add_argument("--caption-column", help="key or column of the captions (default: caption, text or prompt)")
    parser.add_argument(
        "--several-captions",
        default="refuse",
        choices=("refuse", "first", "longest"),
        help="what to take where a row has a list of captions (default: refuse)",
    )
    parser.add_argument(
        "--missing-captions",
        default="refuse",
        choices=("refuse", "skip"),
        help="what to do with rows and images without a caption (default: refuse)",
    )
    parser.add_argument("--out", type=Path, help="folder to write (default: the run's teacher.prompts)")
    parser.add_argument(
        "--dtype", default="float16", choices=("float16", "bfloat16", "float32"), help="of what is kept"
    )
    parser.add_argument("--batch", type=_positive, default=16, help="prompts or images at a time")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dry-run", action="store_true", help="print how much it will take on disk, write nothing")


def _prepare(options: argparse.Namespace, rest: list[str], arguments: list[str]) -> None:
    import torch

    from fewstep.data import CaptionRule
    from fewstep.run.settings import find_pipeline, text_to_image_teacher
    from fewstep.system.console import Progress, duration, waiting
    from fewstep.system.device import pick_device
    from fewstep.system.out_folder import check_out
    from fewstep.teachers.prepare import Material, prepare_images

    started = time.monotonic()
    teacher = text_to_image_teacher(options.recipe)
    folder = options.out or teacher.prompts
    if folder is None:
        raise ValueError("nowhere to write: give --out FOLDER")
    check_out(folder, "prepared")
    device, dtype = pick_device(options.device), getattr(torch, options.dtype)
    rule = CaptionRule(options.caption_column, options.several_captions, options.missing_captions)
    with waiting("reading prompts and images"):
        material = Material.gather(teacher, options.prompts, options.images, rule)
    with waiting(f"loading the text encoders of {teacher.path}"):
        prompts, images, encoder = material.prompts, material.images, teacher.encoder(device)
    captions = images.captions if images else []
    for count, what, size in zip(
        (len(prompts), len(captions)), ("prompts", "images"), material.sizes(encoder, dtype, device), strict=True
    ):
        if count:
            print(f"{count:,} {what}, about {size / 2**20:,.1f} MiB in {folder}")
    if options.dry_run:
        return
    with Progress("prepare", len(prompts), unit="prompts") as bar:
        found = teacher.prepare(prompts, folder, encoder, dtype, options.batch, bar.update)
    made = f"finished: {len(prompts):,} prompts ({found:,} were there)"
    del encoder  # the text encoders leave memory before the VAE works
    if images is not None:
        with Progress("prepare", len(captions)) as bar:
            found = prepare_images(
                folder, images, prompts, material.codec, dtype, batch=options.batch, device=device, progress=bar.update
            )
        made += f", {len(captions):,} images ({found:,} were there)"
    recipe = "" if find_pipeline(options.recipe) is None else "RECIPE --teacher.path "
    use = f"fewstep distill {recipe}{shlex.quote(options.recipe)} --teacher.prompts {shlex.quote(str(folder))}"
    print(f"{made} in {folder}, in {duration(time.monotonic() - started)}\nnext:\n  {use}")
    if images is not None:
        print(f"  in the run file, for its GAN: data: {{kind: prepared, path: {folder}}}")


def _published_generators(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sigma-init",
        type=_level,
        help="a .pkl file is a one-step generator called at this noise level (SiD, SiDA: 2.5), not a teacher",
    )


def _solver(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--churn",
        type=_churn,
        metavar="S[,LOW,HIGH,INFLATE]",
        help="sample a teacher stochastically with EDM's S_churn, S_min, S_max, S_noise, such as 40,0.05,50,1.003",
    )


def _conditions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--guidance", type=_guidance, help="a teacher's classifier-free guidance (default: none)")
    parser.add_argument(
        "--prompts",
        type=Path,
        help="prompts of a text-to-image model: a folder of `fewstep prepare` (default: the run's)",
    )


def _positive(text: str) -> int:
    """An option that is a whole number of at least 1."""
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _calls(text: str) -> list[int]:
    """Numbers of network calls; 0 is none."""
    from fewstep.students.sample import parse_calls
    from fewstep.system.errors import SettingsError

    try:
        return parse_calls(text)
    except SettingsError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _guidance(text: str) -> float:
    from fewstep.evaluation.candidates import check_settings
    from fewstep.system.errors import EvaluationError

    try:
        check_settings(None, value := float(text))
    except (ValueError, EvaluationError):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}. Try: 7.5") from None
    return value


def _listed(text: str) -> list[str]:
    """An option that is names separated by commas, at least one and each once."""
    names = [name.strip() for name in text.split(",")]
    if "" in names or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"must be names separated by commas, each once, got {text!r}")
    return names


def _timesteps(text: str) -> list[int]:
    return [_positive(part.strip()) for part in text.split(",")]


def _port(text: str) -> int:
    if not _positive(text) < 2**16:
        raise argparse.ArgumentTypeError(f"must be 1 to 65535, got {text!r}")
    return int(text)


def _level(text: str) -> float:
    """An option that is a noise level."""
    try:
        level = float(text)
    except ValueError:
        level = math.nan
    if not 0 < level < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}. Try: 2.5")
    return level


def _processes_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", default="auto", help="processes on this machine; auto: one a core without a GPU")


def _churn(text: str) -> Churn:
    from fewstep.diffusion.solvers import Churn

    try:
        churn = Churn(*map(float, text.split(",")))
    except (ValueError, TypeError):
        churn = Churn(0.0)
    if not (0 < churn.amount < math.inf and 0 <= churn.low < churn.high and 0 < churn.inflate < math.inf):
        raise argparse.ArgumentTypeError(
            f"must be S, or S,LOW,HIGH,INFLATE, with S and INFLATE above 0 and LOW below HIGH, got {text!r}. Try: 40,0.05,50,1.003"
        )
    return churn


def _add_sample(parser: argparse.ArgumentParser) -> None:
    """make images with a student or a teacher"""
    parser.add_argument("model", help="a run folder, a model file, or a shipped teacher's name")
    parser.add_argument("--seeds", default="0-63", help="such as 0-63 or 3,7,100-120 (default 0-63)")
    parser.add_argument(
        "--classes", help="class of every seed, by number or name, cycled: 3 or 0,1,2 (default: seed mod classes)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("samples.png"), help="a .png (grid), a .npz, or a folder of PNGs"
    )
    parser.add_argument("--evaluations", type=_positive, help="network calls of a teacher (default 35)")
    parser.add_argument(
        "--prompt", action="append", help="a prompt of a text-to-image model; may be given several times"
    )
    _conditions(parser)
    _solver(parser)
    _published_generators(parser)
    parser.add_argument("--columns", type=_positive, default=8, help="columns of the grid")
    parser.add_argument("--scale", type=_positive, default=2, help="size of a pixel in the grid")
    parser.add_argument("--batch", type=_positive, default=250, help="images at a time; changes no image")
    parser.add_argument("--device", default="auto")


def _sample(options: argparse.Namespace, rest: list[str], arguments: list[str]) -> None:
    from tempfile import TemporaryDirectory

    from fewstep.evaluation.candidates import encode_prompts, load_candidate
    from fewstep.students.sample import parse_classes, parse_seeds, write_samples
    from fewstep.system.device import pick_device
    from fewstep.system.errors import SettingsError

    if options.prompt and options.classes is not None:
        raise SettingsError("--prompt and --classes both say what to draw: give one of them")
    if options.prompt and options.prompts is not None:
        raise SettingsError("--prompt and --prompts both say what to draw: give one of them")
    device = pick_device(options.device)
    with TemporaryDirectory() as scratch:
        prompts = options.prompts
        if options.prompt:
            prompts = encode_prompts(options.model, options.prompt, Path(scratch), device)
        model = load_candidate(
            options.model, options.evaluations, device, options.sigma_init, options.churn, options.guidance, prompts
        )
        seeds = parse_seeds(options.seeds)
        # prompts by their numbers, in turn whatever the seeds are
        classes = ",".join(map(str, range(len(options.prompt)))) if options.prompt else options.classes
        labels = parse_classes(classes, model.conditioner, len(seeds))
        try:
            count = write_samples(
                model.sampler, seeds, model.shape, model.conditioner, options.out, labels=labels, batch=options.batch,
                device=device, columns=options.columns, scale=options.scale,
            )  # fmt: skip
        except SettingsError as error:
            raise SettingsError(f"{options.model}: {error}") from None
    print(f"{count} images of {model.name} ({model.sampler.calls} network call(s) each) in {options.out}")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    """score students and teachers: FID, KID, precision, recall, speed"""
    parser.add_argument(
        "models", nargs="+", help="run folders, model files or shipped teachers; a student's teacher is added"
    )
    parser.add_argument("--samples", type=_positive, help="images of each (default 50000, or what the protocol says)")
    parser.add_argument(
        "--protocol",
        help="score text-to-image models as papers do: coco-30k (SD1.5), sdxl-10k (with patch FID); --reference is the folder of COCO's "
        "images, --clip OpenCLIP ViT-g-14; what contradicts the protocol is refused",
    )
    parser.add_argument(
        "--evaluations",
        type=_calls,
        default="35",
        help="a teacher's network calls, such as 35,18,9,5,1 (default 35); 0: no teacher",
    )
    _conditions(parser)
    parser.add_argument(
        "--repeat",
        type=_positive,
        default=1,
        help="score so often, with other seeds each time: mean and spread (SiD: 10)",
    )
    _solver(parser)
    _published_generators(parser)
    parser.add_argument(
        "--reference",
        help="real images to compare with: statistics .npz, a folder, a .zip, or fashion-mnist (default: what the card names, else the images of training)",
    )
    parser.add_argument("--extractor", default="auto", help="auto, inception, clip, small or pixels")
    parser.add_argument(
        "--clip",
        help="folder of a CLIP model: adds CLIP score, retrieval of captions, diversity for one caption, and chroma",
    )
    parser.add_argument(
        "--metrics",
        type=_metrics,
        default="fid,kid,precision,recall",
        help="of fid, kid, precision, recall, isc (Inception score)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="results file (default: results.json in the first run folder); rows measured in the same way are kept",
    )
    parser.add_argument(
        "--precision", default="auto", choices=("auto", "bf16", "fp32"), help="auto: bf16 where it is fast"
    )
    parser.add_argument("--batch", type=_positive, default=250, help="images at a time")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--processes", default="auto", help="processes on this machine; auto: one a core without a GPU")


def _metrics(text: str) -> list[str]:
    """Names of metrics; whether they exist is checked where they are known."""
    return [part.strip() for part in text.split(",")] if text.strip() else []


def _eval(options: argparse.Namespace, rest: list[str], arguments: list[str]) -> int:
    from fewstep.system import distributed
    from fewstep.system.device import pick_device, use_bf16

    device = pick_device(options.device)
    processes = _count(options.processes, device.type == "cuda")
    if processes > 1 and "RANK" not in os.environ:
        from fewstep.system.launch import relaunch

        return relaunch(arguments, processes)
    from fewstep.evaluation.candidates import expand
    from fewstep.evaluation.compare import compare, footnotes, table_of
    from fewstep.evaluation.protocols import find_protocol
    from fewstep.system.console import Progress, table
    from fewstep.system.console import results as stdout

    published = find_protocol(options.protocol).samples if options.protocol else 50_000
    samples = published if options.samples is None else options.samples
    notes: list[str] = []
    with distributed.process_group():
        candidates = expand(
            options.models, options.evaluations, device, options.sigma_init, options.churn, options.guidance,
            options.prompts, notes.append,
        )  # fmt: skip
        first = Path(options.models[0])
        out = options.out or (first / "results.json" if first.is_dir() else Path("results.json"))
        with Progress("evaluate", samples * options.repeat * len(candidates), enabled=distributed.rank() == 0) as bar:

            def progress(name: str, done: int) -> None:
                bar.description = name
                bar.update(done)

            rows = compare(
                candidates, samples, out, protocol=options.protocol, reference=options.reference, extractor=options.extractor,
                metrics=options.metrics, batch=options.batch, bf16=use_bf16(options.precision, device),
                repeat=options.repeat, clip=options.clip, device=device, command="fewstep " + " ".join(arguments), progress=progress,
                note=notes.append,
            )  # fmt: skip
        if distributed.rank() == 0:
            times = f"{options.repeat} x " if options.repeat > 1 else ""
            stdout.print(table(f"{times}{samples:,} samples each", *table_of(rows)))
            for line in [*footnotes(rows), *notes, f"kept in {out}"]:
                stdout.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def _add_import(parser: argparse.ArgumentParser) -> None:
    """turn a published EDM, SiD or DMD2 model into safetensors and JSON; nothing in it is executed"""
    parser.add_argument("file", type=Path, help="such as edm-cifar10-32x32-cond-vp.pkl, or a DMD2 checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--pipeline",
        help="a text-to-image student (a UNet or a LoRA, such as DMD2's; a file or a folder) is one of this pipeline: folder, hub name or file",
    )
    parser.add_argument("--timesteps", type=_timesteps, help="where that student is called (default 999,749,499,249)")
    _published_generators(parser)


def _import(options: argparse.Namespace, rest: list[str], arguments: list[str]) -> None:
    from fewstep.formats.model import import_model
    from fewstep.system.out_folder import check_out

    if options.pipeline is not None and options.sigma_init is not None:
        raise ValueError("--sigma-init is for .pkl files: a student of a --pipeline is called at --timesteps")
    if options.pipeline is None and options.timesteps is not None:
        raise ValueError("--timesteps is for a student of a --pipeline: name that too, or leave it out")
    if not Path(options.file).exists():
        raise ValueError(f"nothing to import at {options.file}: give the file or folder that was downloaded")
    check_out(options.out, "import")
    if options.pipeline is not None:
        from fewstep.students.published import import_student
        from fewstep.teachers import DiffusersTeacher

        steps = options.timesteps or [999, 749, 499, 249]
        path, notes = import_student(options.file, DiffusersTeacher(path=options.pipeline), steps, options.out)
        for sentence in notes:
            print(f"note: {sentence}", file=sys.stderr)
        place = shlex.quote(str(options.out))
        print(f"finished: {path} and its JSON\nnext:\n  fewstep sample {place} --prompt TEXT --out samples.png")
        print(f"  fewstep export {place} --out {place}-export\n  fewstep distill RECIPE --start-from {place}")
        return
    path = import_model(options.file, options.out, options.sigma_init)
    place = shlex.quote(str(options.out))
    train = "--start-from" if path.stem == "student" else "--teacher.path"
    print(f"finished: {path} and its JSON\nnext:\n  fewstep sample {place} --out samples.png")
    print(f"  fewstep eval {place} --reference REAL_IMAGES\n  fewstep distill RECIPE {train} {place}")


def _add_export(parser: argparse.ArgumentParser) -> None:
    """write a text-to-image student as files for diffusers, ComfyUI and A1111"""
    parser.add_argument("student", help="a run folder of `fewstep distill`, or a student's file")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--formats",
        type=_listed,
        help="of diffusers, lora, unet, comfyui, separated by commas (default: all that apply)",
    )
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"), help="of the weights")
    parser.add_argument("--base-file", default="", help="name of the base model's file in ComfyUI, for the workflow")
    parser.add_argument("--license", default="other", help="for the model card; the base model's binds you too")


def _export(options: argparse.Namespace, rest: list[str], arguments: list[str]) -> None:
    import torch

    from fewstep.students.export import export_student

    written, notes = export_student(
        options.student,
        options.out,
        options.formats or (),
        getattr(torch, options.dtype),
        options.base_file,
        options.license,
    )
    for file in written:
        print(file)
    for sentence in notes:
        print(f"note: {sentence}", file=sys.stderr)


def _add_ui(parser: argparse.ArgumentParser) -> None:
    """open a page in the browser to try a student, its teacher beside it"""
    parser.add_argument("student", help="a run folder of `fewstep distill`, or a student's file")
    parser.add_argument("--port", type=_port, help="default: the first free one from 7860")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 shows the page to other machines")
    parser.add_argument("--device", default="auto")


def _ui(options: argparse.Namespace, rest: list[str], arguments: list[str]) -> None:
    from fewstep.report.web import make_page
    from fewstep.system.device import pick_device

    make_page(options.student, pick_device(options.device)).launch(server_name=options.host, server_port=options.port)


def _add_report(parser: argparse.ArgumentParser) -> None:
    """write a run folder, or several beside each other, as one HTML page"""
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the first folder)")


def _report(options: argparse.Namespace, rest: list[str], arguments: list[str]) -> None:
    from fewstep.report.page import write_report

    print(write_report(options.folders, options.out or options.folders[0] / "report.html"))


def _add_recipes(parser: argparse.ArgumentParser) -> None:
    """list the shipped recipes, or show one"""
    parser.add_argument("name", nargs="?")


def _recipes(options: argparse.Namespace, rest: list[str], arguments: list[str]) -> None:
    from fewstep.run.recipes import find_recipe, list_recipes

    if options.name:
        print(find_recipe(options.name).read_text(encoding="utf-8"), end="")
        return
    for name, path in list_recipes().items():
        lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
        text = " ".join(line.removeprefix("#").strip() for line in lines)
        print(f"{name:28} {re.split(r'(?<=[.]) ', text)[0]}")
    print("\nshow one: fewstep recipes NAME    run one: fewstep distill NAME   (or fewstep pretrain NAME)")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    """distil the shipped Fashion-MNIST teacher in a few minutes, and look at the result"""
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="run folder (default runs/demo); the same folder resumes"
    )
    parser.add_argument("--images", type=_positive, help="length of the training in images")
    parser.add_argument("--samples", type=_positive, default=2_000, help="images of each row of the final table")
    _processes_option(parser)


def _demo(options: argparse.Namespace, rest: list[str], arguments: list[str]) -> int:
    from fewstep.system import distributed
    from fewstep.system.device import pick_device

    processes = _count(options.processes, pick_device("auto").type == "cuda")
    if processes > 1 and "RANK" not in os.environ:
        from fewstep.system.launch import relaunch

        return relaunch(arguments, processes, SAVING)
    from fewstep.cli.demo import demo

    with distributed.process_group():
        demo(options.out, options.images, options.samples)
    return 0


def _count(wanted: str, cuda: bool) -> int:
    from fewstep.system.launch import default_processes

    if wanted == "auto":
        return default_processes(cuda)
    try:
        return _positive(wanted)
    except argparse.ArgumentTypeError:
        raise ValueError(f"--processes must be a number of at least 1, or auto, got {wanted!r}") from None


SAVING = "saving, once more to quit without"  # the answer to Ctrl-C of several processes that train
SETTINGS = ("pretrain", "distill", "bench", "plan")  # commands whose further arguments are settings of a run

COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[..., int | None]]] = {
    "demo": (_add_demo, _demo),
    "pretrain": (_add_pretrain, _train),
    "distill": (_add_distill, _train),
    "prepare": (_add_prepare, _prepare),
    "pairs": (_add_pairs, _pairs),
    "bench": (_add_bench, _train),
    "plan": (_add_plan, _train),
    "sample": (_add_sample, _sample),
    "eval": (_add_eval, _eval),
    "import": (_add_import, _import),
    "export": (_add_export, _export),
    "ui": (_add_ui, _ui),
    "report": (_add_report, _report),
    "recipes": (_add_recipes, _recipes),
}
