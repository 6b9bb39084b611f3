"""`fewstep doctor` and `fewstep schema`: the machine that you have, and the form of run files."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Annotated

from fewstep.cli.options import PATH, AsJson, Imports, about, as_json, bring

__all__ = ["doctor", "schema"]

EXTRAS = {
    "digits": "the 8x8 digits of the tutorial",
    "lpips": "DMD's regression on colour images",
    "lmdb": "DMD2's image databases",
    "captions": "prompts and captions in Parquet and datasets",
    "t2i": "text-to-image teachers and exports",
    "lowbit": "Adam in 8 bits, int8 and float8 bases",
    "nf4": "NF4 bases",
    "ui": "`fewstep ui`",
    "tensorboard": "`train.tensorboard`",
    "wandb": "`train.wandb`",
}


def doctor(json: AsJson = False) -> None:
    """Report versions, devices, memory, disk, and what is missing for what."""
    found = {**_versions(), **_machine(), **_extras()}
    if json:
        as_json(found)
        return
    for name, value in found.items():
        print(f"{name:22} {value}")


def schema(
    out: Annotated[Path | None, PATH, about("file to write", "print it", "FILE")] = None, imports: Imports = ()
) -> None:
    """Write the JSON schema of run files, by which editors complete and check them.

    Name it in a run file's first line: `# yaml-language-server: $schema=run.schema.json`.
    """
    import json

    from fewstep.run.schema import run_schema
    from fewstep.system.files import atomic_write

    bring(imports)
    text = json.dumps(run_schema(), indent=1, ensure_ascii=False) + "\n"
    if out is None:
        print(text, end="")
        return
    atomic_write(out, text.encode())
    print(out)


def _versions() -> dict[str, str]:
    import torch

    from fewstep import __version__

    return {
        "fewstep": f"{__version__} in {Path(__file__).parents[1]}",
        "Python": f"{platform.python_version()} in {sys.prefix}",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "torch": torch.__version__,
    }


def _machine() -> dict[str, str]:
    import torch

    from fewstep.system.device import hardware, pick_device, use_bf16

    device = pick_device("auto")
    gib = 2**30
    found = {"runs on": f"{hardware(1)}, `train.precision: auto` is {'bf16' if use_bf16('auto', device) else 'fp32'}"}
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found[f"GPU {index}"] = f"{torch.cuda.get_device_name(index)}, {free / gib:.1f} of {total / gib:.1f} GiB free"
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        found["GPU"] = f"none ({built})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found["cores"] = f"{cores}, {torch.get_num_threads()} threads a process"
    if (memory := Path("/proc/meminfo")).exists():
        sizes = dict(re.findall(r"^(\w+): +(\d+) kB", memory.read_text(), re.MULTILINE))
        found["memory"] = f"{int(sizes['MemAvailable']) / 2**20:.1f} of {int(sizes['MemTotal']) / 2**20:.1f} GiB free"
    for name, place in (("disk here", Path.cwd()), ("shared memory", Path("/dev/shm"))):
        if place.exists():
            usage = shutil.disk_usage(place)
            found[name] = f"{usage.free / gib:.1f} of {usage.total / gib:.1f} GiB free in {place}"
    return found


def _extras() -> dict[str, str]:
    """Extras of the package: installed, or what is missing, what it is for, and the command that installs it."""
    needed: dict[str, list[str]] = {extra: [] for extra in EXTRAS}
    for line in importlib.metadata.requires("fewstep") or []:
        match = re.fullmatch(r"([\w.-]+).*extra == ['\"](\w+)['\"]", line)
        if match and match[2] in needed:
            needed[match[2]].append(match[1])
    return {
        f"extra {extra}": "installed"
        if not (absent := [name for name in needed[extra] if not _installed(name)])
        else f"missing {', '.join(absent)} for {use}: pip install 'fewstep[{extra}]'"
        for extra, use in EXTRAS.items()
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
