"""`fewstep init` and `fewstep fetch`: begin with one's own pictures or pipeline; get known weights."""

from __future__ import annotations

import difflib
import shlex
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from fewstep.cli.options import PATH, TEXT, about, at_most_one

__all__ = ["fetch", "init"]


def init(
    place: Positional[
        Annotated[
            Path, about("a folder of pictures, or a text-to-image pipeline (folder or .safetensors)", metavar="PLACE")
        ]
    ],
    out: Annotated[Path | None, PATH, about("run file to write", "<PLACE>.yaml here", "FILE")] = None,
) -> None:
    """Look at your pictures or pipeline, write a run file with comments, and say what to type next."""
    from fewstep.run.recipes import schema_line
    from fewstep.run.settings import find_pipeline
    from fewstep.system.errors import SettingsError
    from fewstep.system.files import atomic_write

    if not place.exists():
        raise SettingsError(f"PLACE must be a folder of pictures or a pipeline, got {place}, which does not exist")
    pipeline = find_pipeline(str(place))
    if pipeline is None and not place.is_dir():
        raise SettingsError(f"PLACE must be a folder of pictures or a pipeline, got the file {place}")
    name = place.resolve().stem
    file = out or Path(f"{name}-{'teacher' if pipeline is None else 'student'}.yaml")
    if file.exists():
        raise SettingsError(f"`--out` must be a new file, got {file}, which exists. Try: --out FILE")
    text, following = _pictures(place, name, file) if pipeline is None else _pipeline(place, name, file)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, schema_line() + text)
    print(f"written: {file}\nnext:\n  " + "\n  ".join(following))


def _pictures(folder: Path, name: str, file: Path) -> tuple[str, list[str]]:
    """Text of a teacher's run file, and the commands that follow."""
    import torch

    from fewstep.data.looking import look_at
    from fewstep.run.own import memory_at_hand, teacher_file
    from fewstep.system.console import Progress

    with Progress("look", 1) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        look = look_at(folder.expanduser(), progress)
    gpu = torch.cuda.is_available()
    print(
        f"{look.count:,} pictures, shorter sides {min(look.sides)} to {max(look.sides)} pixels in {look.shapes:,} sizes, "
        f"{look.grey:,} grey; {f'{len(look.classes)} classes' if look.classes else 'no classes (no sub-folders)'}; {memory_at_hand()}"
    )
    if look.transparent:
        print(
            f"{len(look.transparent):,} with transparent pixels, which are drawn on white: {', '.join(look.transparent[:3])}"
        )
    for odd, why in list(look.unusable.items())[:10]:
        print(f"left out: {odd} ({why})")
    if len(look.unusable) > 10:
        print(f"left out: {len(look.unusable) - 10:,} more; the run file names all")
    if look.loose:
        print(f"left out: {len(look.loose):,} pictures beside the sub-folders, which have no class")
    if look.count < 200:
        print(f"{look.count:,} pictures are few: the teacher will repeat them. A thousand or more give variety.")
    teacher = f"runs/{shlex.quote(name)}-teacher"
    use = f"--teacher.path {teacher}"
    return teacher_file(look, gpu), [
        f"fewstep pretrain {shlex.quote(str(file))} --out {teacher}",
        f"fewstep distill own/sid {use} --out runs/{shlex.quote(name)}-sid      (one step)",
        f"fewstep distill own/dmd2 {use} --out runs/{shlex.quote(name)}-dmd2    (four steps)",
        f"fewstep pairs own/dmd {use}, then fewstep distill own/dmd {use} --out runs/{shlex.quote(name)}-dmd",
    ]


def _pipeline(place: Path, name: str, file: Path) -> tuple[str, list[str]]:
    """Text of a student's run file, and the commands that follow."""
    from fewstep.run.own import memory_at_hand, pipeline_values
    from fewstep.run.settings import find_pipeline
    from fewstep.system.strict_yaml import write_yaml

    pipeline = find_pipeline(str(place.absolute()))
    assert pipeline is not None
    values = pipeline_values(pipeline)
    spec, _ = pipeline.outline()
    factor = pipeline.pixels_a_latent()
    net = spec.net
    width, height = factor * getattr(net, "width", 0), factor * getattr(net, "height", 0)
    print(f"{getattr(net, 'model', '')}, {width} x {height} pixels; {memory_at_hand()}")
    prompts = f"prepared/{name}"
    values["teacher"]["prompts"] = prompts
    head = [
        f"# A 4-step LoRA of {place}, by DMD2 from prompts alone, written by `fewstep init`.",
        f"# This machine: {memory_at_hand()}. Memory and hours of this file: fewstep plan {file}",
        "# generator: the student's calls and adapters; critic: the fake score's adapters; objective.guidance: the teacher's.",
        "# train.images: the longer the better; pictures in the run folder show when it is enough.",
    ]
    given = shlex.quote(str(file))
    return "\n".join(head) + "\n" + write_yaml(values), [
        f"fewstep prepare {given} --prompts prompts.txt --out {prompts}     (a few thousand prompts, one per line)",
        f"fewstep plan {given}",
        f"fewstep distill {given} --out runs/{shlex.quote(name)}-4step",
        f"or all in one: fewstep distill {shlex.quote(str(place))} --steps 4 --lora --prompts prompts.txt",
    ]


def fetch(
    name: Positional[Annotated[str | None, at_most_one("NAME"), about("the weights; none: list them", "")]] = None,
    url: Annotated[
        str | None, TEXT, about("another address of the same file, such as a mirror", "its authors'", "URL")
    ] = None,
) -> None:
    """Download known weights (Inception for FID, VGG-16 for LPIPS) and check their sha256."""
    from fewstep.evaluation.known import KNOWN
    from fewstep.system.console import Progress
    from fewstep.system.errors import SettingsError
    from fewstep.system.fetch import fetch as get

    if name is None:
        for key, known in KNOWN.items():
            here = "is here" if known.place().is_file() else f"{known.size / 2**20:,.0f} MiB"
            print(f"{key:10} {known.about} ({here})")
        print("\nget one: fewstep fetch NAME")
        return
    if name not in KNOWN:
        near = difflib.get_close_matches(name, KNOWN, 1)
        raise SettingsError(
            f"NAME must be of {', '.join(KNOWN)}, got {name}."
            + (f" Did you mean {near[0]}?" if near else " Try: fewstep fetch")
        )
    with Progress(f"fetch {name}", KNOWN[name].size, unit="bytes") as bar:
        new = get(KNOWN[name], url, bar.update)
    print(f"{KNOWN[name].place()} {'is complete: its sha256 is right' if new else 'is there already'}")
