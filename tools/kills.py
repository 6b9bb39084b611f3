"""Kill every command that writes, again and again, and fill its disk: it must end as if nothing had happened.

    python tools/kills.py --kills 200 --out docs/results/kills.jsonl         # an hour of two cores; a full disk needs root

Commands: pretrain, pairs, prepare, distill (LoRA; with one process also offload), export, eval. Each runs once unbroken. Then
lives of it end by `kill -9` at a random moment; in half of them every write to the disk is slow, so that more of them die in
one. When a life reaches its end, its files must equal the unbroken ones, and nothing unfinished may be left; then the command starts
anew in an empty folder. Last, the command runs on disks too small for it: one message, exit code 1, and the same command
with more room must end equal. `tools/soak.py` kills single processes of a training.

One line of JSON a kill, a full disk and a verdict goes to the log.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OLD = ROOT / "tests" / "files-0.1.0"
SLOW = 0.15  # seconds at most that a slow disk takes for a write
UNEQUAL = {
    "times.jsonl",
    "lock",
    "lock-holder",
    "results.json",
    "run.yaml",
}  # seconds, dates, places: compared otherwise or not
NOT_A_RESULT = {"seconds", "date", "command", "hardware", "n_seconds", "images_per_second"}


@dataclass(frozen=True)
class Command:
    """A command that writes.

    Attributes:
        words: command line; OUT stands for the folder that it writes into.
        processes: of it.
    """

    words: tuple[str, ...]
    processes: int = 1


RUNS = {
    "pretrain.yaml": """
kind: pretrain
data: {kind: folder, path: images, channels: 1}
denoiser: {net: {kind: dit, size: 28, channels: 1, patch: 7, width: 8, depth: 1, heads: 2, num_classes: 2}}
optim: {lr: 1.0e-2}
evaluation: {samples: 16, metrics: [fid], extractor: small, evaluations: 3}
train: {images: 3200, batch_size: 8, precision: fp32, device: cpu, threads: 1, log_every: 64, evaluate_every: 640, checkpoint_every: 128, keep: 2}
""",
    "lora.yaml": (OLD / "lora.yaml")
    .read_text()
    .replace("images: 16", "images: 480")
    .replace("checkpoint_every: 32, keep: 1", "checkpoint_every: 32, keep: 2"),
    "pairs.yaml": (OLD / "mixture.yaml").read_text().replace("{method: sid}", "{method: dmd}") + "pairs: pairs\n",
}


def commands() -> dict[str, Command]:
    """All of them by name."""
    one = {
        "pretrain": Command(("pretrain", "pretrain.yaml", "--out", "OUT")),
        "pairs": Command(("pairs", "pairs.yaml", "--out", "OUT", "--count", "20000", "--evaluations", "8")),
        "prepare": Command(("prepare", "pipeline", "--prompts", "many.txt", "--images", "captioned", "--out", "OUT", "--device", "cpu")),
        "distill": Command(("distill", "lora.yaml", "--out", "OUT", "--train.offload")),
        "export": Command(("export", "lora-imported", "--out", "OUT")),
        "eval": Command(("eval", "teacher", "--samples", "64", "--evaluations", "5", "--metrics", "fid", "--extractor", "small", "--reference", "images", "--out", "OUT/results.json")),
    }  # fmt: skip
    two = {f"{name}, two processes": one[name] for name in ("pretrain", "pairs", "eval")}
    two["distill, two processes"] = Command(("distill", "lora.yaml", "--out", "OUT"))
    counted = {"prepare", "export"}  # without the setting
    return {
        **{name: Command(c.words if name in counted else (*c.words, "--processes", "1")) for name, c in one.items()},
        **{name: Command((*c.words, "--processes", "2"), 2) for name, c in two.items()},
    }


def main() -> None:
    """Kill, fill, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=200, help="of all commands together; a tenth each for two processes"
    )
    parser.add_argument("--disks", type=int, default=4, help="full disks a command of one process; 0 without root")
    parser.add_argument("--only", nargs="*", default=[], help="commands; all if none is given")
    parser.add_argument("--out", type=Path, default=Path("runs/kills.jsonl"))
    parser.add_argument("--seed", type=int, default=0, help="of the moments, up to the machine's own timing")
    options = parser.parse_args()
    known = commands()
    if odd := set(options.only) - known.keys():
        parser.error(f"--only must name commands, got {', '.join(sorted(odd))}. Known: {', '.join(known)}")
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    sys.path.insert(0, str(ROOT))
    _import_all()
    from fewstep.system.device import hardware

    options.out.parent.mkdir(parents=True, exist_ok=True)
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch, options.out.open("a") as log:
        work = Path(scratch) / "work"
        shutil.copytree(OLD, work)
        for name, text in RUNS.items():
            (work / name).write_text(text)
        (work / "many.txt").write_text("".join(f"a picture of the number {n}\n" for n in range(1200)))
        os.chdir(work)

        def say(**row: Any) -> None:
            nonlocal wrong
            wrong += row.get("wrong", "") != ""
            print(json.dumps(row), file=log, flush=True)
            print(row, flush=True)

        say(
            date=date.today().isoformat(),
            hardware=hardware(1),
            command=" ".join(["python", *sys.argv]),
            seed=options.seed,
        )
        for name, command in known.items():
            if not options.only or name in options.only:
                kills = options.kills // (20 if command.processes > 1 else 7)
                endure(name, command, kills, Path(scratch), random.Random(f"{name} {options.seed}"), say)
                if command.processes == 1:
                    fill(name, command, options.disks, Path(scratch), say)
    sys.exit(f"{wrong} were amiss" if wrong else 0)


def _import_all() -> None:
    """Import what the commands import, so that a life can begin by a fork."""
    import torch

    torch.set_num_threads(1)
    import transformers  # noqa: F401

    import fewstep.cli.main
    import fewstep.evaluation.compare
    import fewstep.run.execute
    import fewstep.students.export
    import fewstep.teachers.prepare  # noqa: F401


def _run(command: Command, out: Path, slow: float, seed: int) -> int:
    """Run a command in this process, a group of its own."""
    os.setsid()
    os.environ["FEWSTEP_CACHE"] = str(out / ".cache") if "eval" in command.words else str(out.parent / "cache")
    if slow:
        _slow_disk(slow, random.Random(seed))
    import fewstep.cli.main

    return fewstep.cli.main.main([word.replace("OUT", str(out)) for word in command.words])


class Life:
    """A command that runs in a process of its own, forked from this one."""

    def __init__(self, command: Command, out: Path, slow: float = 0.0, seed: int = 0) -> None:
        self.said = tempfile.TemporaryFile()  # noqa: SIM115
        self.pid = os.fork()
        if self.pid == 0:
            from tests.support.forked import leave_after

            leave_after(lambda: _run(command, out, slow, seed), self.said)
        self.code: int | None = None

    def wait(self, seconds: float) -> bool:
        """Whether it ended by itself within these seconds."""
        end = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                return True
            if time.monotonic() > end:
                return False
            time.sleep(0.002)

    def kill(self) -> None:
        """Kill it and its workers at once."""
        children = subprocess.run(["pgrep", "-P", str(self.pid)], capture_output=True, text=True).stdout.split()
        for pid in (self.pid, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        while any(_lives(int(pid)) for pid in children):
            time.sleep(0.01)

    def message(self) -> str:
        self.said.seek(0)
        return self.said.read().decode(errors="replace")


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _slow_disk(most: float, draw: random.Random) -> None:
    """Make what a write ends with take long, as on a disk in the network."""
    for name in ("fsync", "replace", "rename"):
        real = getattr(os, name)

        def late(*given: Any, real: Any = real, **more: Any) -> Any:
            time.sleep(draw.uniform(0, most))
            done = real(*given, **more)
            time.sleep(draw.uniform(0, most))
            return done

        setattr(os, name, late)


def content(folder: Path) -> dict[str, str]:
    """What a finished command left, by file: sha256, or the results without seconds and dates."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if name.startswith("checkpoints/") or name.endswith(
            ".jsonl.old"
        ):  # hold seconds; what was before the first checkpoint
            continue
        if file.name == "results.json":
            rows = json.loads(file.read_text())["rows"]
            kept = [{key: value for key, value in row.items() if key not in NOT_A_RESULT} for row in rows]
            found[name] = json.dumps(kept, sort_keys=True)
        elif file.name not in UNEQUAL and file.suffix != ".lock":
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def difference(found: dict[str, str], wanted: dict[str, str]) -> str:
    """In words; empty for none."""
    odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    return "" if not odd else f"{len(odd)} files differ from an unbroken command's: {', '.join(odd[:4])}"


def unfinished(folder: Path) -> str:
    """Name what a killed command left and no later one removed."""
    odd = [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.name.startswith((".tmp", ".replaced-")) or path.suffix == ".tmp"
    ]
    return f"left behind: {', '.join(odd[:4])}" if odd else ""


def unbroken(name: str, command: Command, out: Path) -> tuple[dict[str, str], float]:
    """Content of a command that was never killed, and the seconds of it."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    life = Life(command, out)
    assert life.wait(600) and life.code == 0, f"{name}: {life.code} {life.message()}"
    return content(out), time.monotonic() - began


def endure(name: str, command: Command, kills: int, scratch: Path, draw: random.Random, say: Any) -> None:
    """Kill a command; whenever a life ends, compare."""
    out = scratch / name.replace(", ", "-").replace(" ", "-")
    wanted, seconds = unbroken(name, command, out)
    shutil.rmtree(out)
    killed = ends = lives = newest = 0
    wrong = ""
    while killed < kills or (lives and not wrong):  # the last round goes to its end
        slow = SLOW if draw.random() < 0.5 else 0.0
        patience = draw.uniform(0, 1.1 * seconds) if killed < kills else 600.0
        life = Life(command, out, slow, draw.randrange(2**31))
        lives += 1
        if not life.wait(patience):
            life.kill()
            killed += 1
            reached = max((int(path.name) for path in (out / "checkpoints").glob("0*")), default=0)
            wrong = f"the newest checkpoint went from {newest} to {reached} images" if reached < newest else ""
            newest = reached
            say(
                name=name,
                kill=killed,
                after_seconds=round(patience, 2),
                slow_disk=bool(slow),
                checkpoint=reached or None,
                wrong=wrong,
            )
            continue
        if life.code != 0:
            wrong = f"exit code {life.code}: {life.message()[-600:]}"
        else:
            wrong = difference(content(out), wanted) or unfinished(out)
        ends += 1
        say(name=name, end_after_lives=lives, equal=not wrong, wrong=wrong)
        shutil.rmtree(out)
        lives = newest = 0
    say(name=name, kills=killed, ends=ends, unbroken_seconds=round(seconds, 1))


@contextlib.contextmanager
def disk(place: Path, size: int) -> Iterator[None]:
    """A disk of a size in bytes, in memory."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(name: str, command: Command, disks: int, scratch: Path, say: Any) -> None:
    """Run a command on disks that are too small, then with room."""
    if not disks:
        return
    place = scratch / "disk"
    out = place / "out"
    with disk(place, 1 << 30):
        wanted, _ = unbroken(name, command, out)
        needed = sum(-(-path.stat().st_size // 4096) * 4096 for path in out.rglob("*") if path.is_file())
    for number in range(disks):
        size = max(4096, int(needed * (number + 0.5) / disks) // 4096 * 4096)
        with disk(place, size):
            life = Life(command, out)
            assert life.wait(600), f"{name} hangs on a full disk"
            said = life.message()
            message = next((line for line in reversed(said.splitlines()) if line.startswith("fewstep ")), "")
            wrong = ""
            if "Traceback" in said or life.code not in (0, 1) or (life.code == 1 and not message):
                wrong = f"exit code {life.code}: {said[-600:]}"
            subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
            again = Life(command, out)
            assert again.wait(600)
            if again.code != 0:
                wrong = wrong or f"with room: exit code {again.code}: {again.message()[-600:]}"
            wrong = wrong or difference(content(out), wanted) or unfinished(out)
            say(
                name=name,
                disk_bytes=size,
                needed_bytes=needed,
                code=life.code,
                said=message[-160:],
                equal=not wrong,
                wrong=wrong,
            )


if __name__ == "__main__":
    main()
