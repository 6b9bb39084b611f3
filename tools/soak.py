"""Kill a training again and again, and show that nothing is lost: at the end its log and weights are those of an unbroken run.

    python tools/soak.py --kills 50 --out runs/soak        # a quarter of an hour on 2 cores

Two processes distil digits by DMD2 with a GAN. Each life ends by `kill -9` of all processes, of one worker (the others must
then stop by themselves) or of the launcher (its workers must notice), at a random moment, within an evaluation, or while a
checkpoint is being written. After each death the newest checkpoint must be readable, and no older than the one before.
One line of JSON a death goes to OUT/soak.jsonl, the verdict to its last line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import yaml

from fewstep.system.checkpoint import Checkpoints
from fewstep.system.device import hardware
from fewstep.system.tracking import read_stats

RUN = {
    "kind": "distill",
    "teacher": {"kind": "native", "path": "digits"},
    "generator": {"sigmas": [10.0, 1.0]},
    "objective": {"method": "dmd2", "critic_steps": 2},
    "data": {"kind": "digits"},
    "optim": {"generator": {"lr": 1e-4}, "critic": {"lr": 3e-4}},
    "train": {"batch_size": 64, "ema_half_life": 2000},
    "evaluation": {"samples": 500},
}
GRACE = 60  # seconds within which the others must stop when one process dies


def main() -> None:
    """Live, die, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument(
        "--images", type=int, default=220_000, help="length of the run; it must not end before the last kill"
    )
    parser.add_argument(
        "--every",
        type=int,
        default=1024,
        help="images between checkpoints; half of it between log lines, four times it between evaluations",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--seed", type=int, default=0, help="of the moments, up to the machine's own timing")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    recipe = options.out / "run.yaml"
    every = options.every
    intervals = {"log_every": every // 2, "evaluate_every": 4 * every, "checkpoint_every": every}
    recipe.write_text(yaml.safe_dump(RUN | {"train": RUN["train"] | {"images": options.images} | intervals}))
    moments = {"any": at_once, "evaluation": partial(in_evaluation, every=4 * every), "checkpoint": in_checkpoint}
    chance, broken = random.Random(options.seed), options.out / "broken"
    log = (options.out / "soak.jsonl").open("w")

    def say(**row: object) -> None:
        print(json.dumps(row), file=log, flush=True)
        print(row, flush=True)

    say(
        date=date.today().isoformat(),
        hardware=hardware(2),
        command=" ".join(["python", *sys.argv]),
        images=options.images,
    )
    last = 0
    for kill in range(options.kills):
        moment, victim = chance.choice(list(moments)), chance.choice(["all", "all", "worker", "launcher"])
        life = start(recipe, broken)
        pause = 0.3 if moment == "any" else 0.02
        reached = wait(life, broken, moments[moment], last + chance.randrange(0, 3) * every, chance.uniform(0, pause))
        if not reached:
            sys.exit(f"the run ended by itself before kill {kill}: give more --images, or fewer --kills")
        stopped = end(life, victim)
        latest = Checkpoints(broken / "checkpoints").latest()
        if latest is not None:
            Checkpoints(broken / "checkpoints").load(latest)  # whole, and as its hashes say
        images = Checkpoints.images_of(latest) if latest else 0
        say(kill=kill, moment=moment, victim=victim, others_stopped_after=round(stopped, 1), checkpoint=images)
        assert images >= last, f"the newest checkpoint went from {last} to {images} images"
        last = images
    for folder in (broken, options.out / "whole"):
        assert start(recipe, folder).wait() == 0, f"the run in {folder} failed"
    same = {
        file: (broken / file).read_bytes() == (options.out / "whole" / file).read_bytes()
        for file in ("stats.jsonl", "student.safetensors")
    }
    say(kills=options.kills, equal_to_an_unbroken_run=same)
    sys.exit(0 if all(same.values()) else "the killed run differs from the unbroken one")


def start(recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    """The command that a person would type, again and again."""
    command = [sys.executable, "-m", "fewstep", "distill", str(recipe), "--out", str(out), "--processes", "2"]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)


def at_once(folder: Path) -> bool:
    """Any moment."""
    return True


def in_evaluation(folder: Path, every: int) -> bool:
    """The log has the line after which an evaluation begins, and not yet that of its scores."""
    lines = read_stats(folder / "stats.jsonl") if (folder / "stats.jsonl").exists() else []
    return bool(lines) and lines[-1]["kind"] == "train" and lines[-1]["images"] % every == 0


def in_checkpoint(folder: Path) -> bool:
    """A checkpoint is half written."""
    return any((folder / "checkpoints").glob(".tmp-*"))


def wait(
    life: subprocess.Popen[bytes], folder: Path, moment: Callable[[Path], bool], images: int, pause: float
) -> bool:
    """Until the run has a checkpoint of more than `images` and the moment has come, and `pause` s more; whether it still lives."""
    while life.poll() is None:
        latest = max((int(p.name) for p in (folder / "checkpoints").glob("0*")), default=0)
        if latest > images and moment(folder):
            time.sleep(pause)
            return life.poll() is None
        time.sleep(0.002)
    return False


def end(life: subprocess.Popen[bytes], victim: str) -> float:
    """Kill all, one worker or the launcher; returns the seconds after which nothing of the run was left."""
    workers = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(life.pid)], capture_output=True).stdout.split()]
    killed = {"all": [life.pid, *workers], "worker": workers[-1:], "launcher": [life.pid]}[victim]
    began = time.monotonic()
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    try:
        life.wait(GRACE)
        while any(alive(pid) for pid in workers):
            assert time.monotonic() - began < GRACE, f"{victim} was killed, the others still live after {GRACE} s"
            time.sleep(0.05)
    except BaseException:
        for pid in (life.pid, *workers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise
    return time.monotonic() - began


def alive(pid: int) -> bool:
    """Return whether a process runs (one that waits for its parent's look does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    main()
