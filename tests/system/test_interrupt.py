"""Ctrl-C as a person presses it: real processes, real signals, at every moment of a run."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fewstep.data import Digits
from fewstep.diffusion.noise import LogNormalNoise
from fewstep.formats.model import DenoiserSpec
from fewstep.networks import DiTSpec
from fewstep.system.checkpoint import Checkpoints
from fewstep.system.interrupt import stop_signals, uninterrupted
from fewstep.system.tracking import read_stats
from fewstep.system.weights import load_weights
from fewstep.training.optim import OptimSpec
from fewstep.training.pretrain import Pretraining
from fewstep.training.spec import TrainSpec
from tests.support.runs import assert_same_run, environment

pytestmark = pytest.mark.slow  # each is short, together they are long

RUN = {
    "kind": "distill",
    "teacher": {"kind": "native"},
    "objective": {"method": "sid"},
    "data": {"kind": "digits"},
    "optim": {"generator": {"kind": "adam", "lr": 1e-4}, "critic": {"kind": "adam", "lr": 1e-4}},
    "train": {
        "images": 96, "batch_size": 16, "precision": "fp32", "device": "cpu", "threads": 1, "log_every": 16,
        "evaluate_every": 48, "checkpoint_every": 32,
    },
    "health": {"samples": 0},  # its samples would be counted with those of the evaluation
    "evaluation": {"samples": 60, "batch": 10, "extractor": "pixels"},
}  # fmt: skip

# Forks a command for each line it reads, with torch imported once. One part of a run is slow, and says when it is reached.
ZYGOTE = """
import json, os, sys, tempfile, time
import torch
import fewstep.evaluation.features, fewstep.run.specs
from fewstep.cli import main as cli
from fewstep.training import distill, panels
import fewstep.report.ending
from fewstep.system import interrupt
from fewstep.run import specs as run
from fewstep.students import sample
from fewstep.system.checkpoint import Checkpoints
with tempfile.TemporaryDirectory() as warm_up:  # lazy imports, once for all children
    Checkpoints(warm_up).save(1, {"weight": torch.ones(1)})
    Checkpoints(warm_up).load()

def slowed(owner, name, after=0):
    call, count = getattr(owner, name), [0]
    def slow(*args, **kwargs):
        count[0] += 1
        if count[0] > after:
            print(f"reached {count[0] - after}", file=sys.stderr, flush=True)
            while not interrupt.interrupted():
                time.sleep(0.01)
            for _ in range(patience):
                time.sleep(0.01)
        return call(*args, **kwargs)
    setattr(owner, name, slow)

PLACES = {
    "loading": lambda: slowed(run.NativeTeacher, "load"),
    "first evaluation": lambda: slowed(sample.FewStep, "__call__", after=1),
    "update": lambda: slowed(distill.Distillation, "update", after=3),
    "evaluation": lambda: slowed(sample.FewStep, "__call__", after=11),  # six batches and five of pictures before it
    "pictures": lambda: slowed(panels.Panels, "_panel", after=1),
    "saving": lambda: slowed(distill.Distillation, "export"),
    "last evaluation": lambda: slowed(sample.FewStep, "__call__"),
    "nowhere": lambda: None,
}
for line in sys.stdin:
    arguments, place, said, patience = json.loads(line)
    child = os.fork()
    if child == 0:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        PLACES[place]()
        code = cli.main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A transformer of a few thousand weights, hardly trained."""
    folder = tmp_path_factory.mktemp("teacher")
    spec = DenoiserSpec(net=DiTSpec(size=8, channels=1, patch=4, width=16, depth=1, heads=2, num_classes=10))
    task = Pretraining(
        spec, Digits().load(), OptimSpec(), TrainSpec(images=8, device="cpu"), LogNormalNoise(), 0.1, None, 5, {}
    )
    task.export(folder, 0, {})
    return str(folder)


@pytest.fixture(scope="module")
def begin(teacher):
    """Start `fewstep distill` in a process of its own, one at a time."""
    zygote = subprocess.Popen(
        [sys.executable, "-c", ZYGOTE], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def begin(folder: Path, place: str = "nowhere", settings: dict = RUN, patience: int = 10) -> Life:
        return Life(zygote, folder, place, patience, settings | {"teacher": {"kind": "native", "path": teacher}})

    yield begin
    zygote.stdin.close()
    zygote.wait()


class Life:
    """One process of a run."""

    def __init__(self, zygote: subprocess.Popen, folder: Path, place: str, patience: int, settings: dict) -> None:
        recipe, self.file, self.zygote = folder.parent / "recipe.yaml", folder.parent / "said", zygote
        recipe.write_text(yaml.safe_dump(settings))
        self.file.write_text("")
        self.arguments = ["distill", str(recipe), "--out", str(folder), "--processes", "1"]
        zygote.stdin.write(json.dumps([self.arguments, place, str(self.file), patience]) + "\n")
        zygote.stdin.flush()
        self.pid = int(zygote.stdout.readline())

    @property
    def said(self) -> str:
        return self.file.read_text()

    def until(self, words: str) -> None:
        deadline = time.monotonic() + 100
        while words not in self.said:
            assert time.monotonic() < deadline, self.said
            time.sleep(0.005)

    def press(self, number: int = signal.SIGINT) -> None:
        os.kill(self.pid, number)

    def end(self) -> int:
        return int(self.zygote.stdout.readline())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, begin) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    life = begin(folder)
    assert life.end() == 0, life.said
    return folder


PLACES = ["loading", "first evaluation", "update", "evaluation", "pictures", "saving"]


@pytest.mark.parametrize(
    ("place", "number"), [*((place, signal.SIGINT) for place in PLACES), ("update", signal.SIGTERM)]
)
def test_ctrl_c_is_answered_at_once_wherever_a_run_is(begin, unbroken, tmp_path, place, number):
    """It leaves what it is doing with code 130 and the command to go on; the resumed run equals an unbroken one."""
    folder = tmp_path / "run"
    life = begin(folder, place)
    life.until("reached 1")
    life.press(number)
    assert life.end() == 130, life.said
    said = life.said
    assert "reached 2" not in said, "an evaluation is left after the samples at hand"
    if place != "loading":
        assert said.count("saving; press Ctrl-C again to quit without saving") == 1
    assert f"To resume: fewstep {shlex.join(life.arguments)}\n" in said and "Traceback" not in said
    saved = Checkpoints(folder / "checkpoints").latest()
    if place in ("loading", "first evaluation"):
        assert saved is None and not (folder / "student.safetensors").exists()
    else:
        assert f"stopped and saved at {int(saved.name)} images" in said
        load_weights(folder / "student.safetensors")
    if place == "evaluation":
        assert int(saved.name) == 48 and "before the evaluation" in said
        assert not [line for line in read_stats(folder / "stats.jsonl") if line["images"] == 48 and "fid" in line]
    assert begin(folder).end() == 0
    assert_same_run(folder, unbroken)
    for picture in (unbroken / "pictures").iterdir():
        assert (folder / "pictures" / picture.name).read_bytes() == picture.read_bytes()


@pytest.mark.parametrize("place", ["update", "evaluation", "saving"])
def test_a_second_ctrl_c_quits_at_once_and_spoils_nothing(begin, unbroken, tmp_path, place):
    folder = tmp_path / "run"
    life = begin(folder, place, patience=6000)
    life.until("reached 1")
    life.press()
    life.until("press Ctrl-C again to quit without")
    life.press()
    assert life.end() == 130, life.said
    said = life.said
    assert "stopped at once, without saving: " in said and "To resume: fewstep" in said and "Traceback" not in said
    assert "stopped and saved" not in said and "reached 2" not in said
    if Checkpoints(folder / "checkpoints").latest() is not None:
        Checkpoints(folder / "checkpoints").load()
        load_weights(folder / "student.safetensors")
    assert begin(folder).end() == 0
    assert_same_run(folder, unbroken)
    assert not list(folder.rglob(".tmp-*")), "what was unfinished is gone"


def test_a_run_whose_last_evaluation_was_broken_off_is_not_finished(begin, tmp_path):
    """It is resumed with that evaluation; started once more, it says that it is finished and touches nothing."""
    folder, settings = tmp_path / "run", RUN | {"train": RUN["train"] | {"images": 48, "evaluate_every": None}}
    life = begin(folder, "last evaluation", settings)
    life.until("reached 1")
    life.press()
    assert life.end() == 130 and "saved at 48 images" in life.said and "before the evaluation" in life.said, life.said
    life = begin(folder, settings=settings)
    assert life.end() == 0 and "is finished" not in life.said, life.said
    assert [line["images"] for line in read_stats(folder / "stats.jsonl") if "fid" in line] == [48]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    life = begin(folder, settings=settings)
    assert life.end() == 0
    assert "is finished (48 images): nothing to train. To train longer: --train.images 96" in life.said
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize(("wait", "presses"), [(0.3, 2), (1.5, 1)])
def test_ctrl_c_while_two_processes_start(teacher, tmp_path, wait, presses):
    """Python starting, torch being imported, the teacher being read: no traceback, nobody left behind."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            RUN | {"teacher": {"kind": "native", "path": teacher}, "train": RUN["train"] | {"images": 100_000}}
        )
    )
    command = [sys.executable, "-m", "fewstep", "distill", str(recipe), "--out", str(tmp_path / "run")]
    process = subprocess.Popen([*command, "--processes", "2"], env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while len(workers := workers_of(process)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(wait)
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert all(gone(worker) for worker in workers)


def workers_of(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


@pytest.mark.slow
@pytest.mark.parametrize(("place", "presses"), [("updates", 1), ("evaluation", 1), ("evaluation", 2)])
def test_two_processes_answer_and_stop(teacher, tmp_path, place, presses):
    """One command, two processes: one answer, one message, code 130, nobody left; whether they save or not."""
    folder, recipe, first = tmp_path / "run", tmp_path / "recipe.yaml", place == "updates"
    train = RUN["train"] | {"images": 20_000, "evaluate_every": None if first else 20_000}
    evaluation = RUN["evaluation"] | {"samples": 0 if first else 20_000}  # the first one is long enough to be hit
    recipe.write_text(
        yaml.safe_dump(RUN | {"teacher": {"kind": "native", "path": teacher}, "train": train, "evaluation": evaluation})
    )
    command = ["distill", str(recipe), "--out", str(folder), "--processes", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fewstep", *command], env=environment(), stderr=subprocess.PIPE, text=True
    )
    sign = (lambda: any((folder / "checkpoints").glob("0*"))) if first else (folder / "stats.jsonl").exists
    deadline = time.monotonic() + 100
    while not sign():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    workers = workers_of(process)
    assert len(workers) == 2
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert all(gone(worker) for worker in workers)
    assert said.count("saving; press Ctrl-C again to quit without saving") == 1 and "Traceback" not in said, said
    assert ("quitting at once" in said) == (presses == 2)
    latest = Checkpoints(folder / "checkpoints").latest()
    if first:
        assert said.count(f"stopped and saved at {int(latest.name):,} images") == 1
        Checkpoints(folder / "checkpoints").load(latest)
        load_weights(folder / "student.safetensors")
    else:
        assert latest is None
    if presses == 1:
        assert said.count(f"To resume: fewstep {shlex.join(command)}") == 1
    for name in ("stats.jsonl", "times.jsonl"):
        read_stats(folder / name)


@pytest.mark.slow
def test_under_torchrun_it_saves_too(teacher, tmp_path):
    """torchrun passes the signal on once and waits for its processes; its own exit code is its own affair."""
    folder, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    train = RUN["train"] | {"images": 20_000, "evaluate_every": None}
    recipe.write_text(
        yaml.safe_dump(
            RUN | {"teacher": {"kind": "native", "path": teacher}, "train": train, "evaluation": {"samples": 0}}
        )
    )
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fewstep"]
    process = subprocess.Popen(
        [sys.executable, *command, "distill", str(recipe), "--out", str(folder)],
        env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while not any((folder / "checkpoints").glob("0*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    images = Checkpoints.images_of(Checkpoints(folder / "checkpoints").latest())
    assert said.count("saving; press Ctrl-C again to quit without saving") == 1, said
    assert f"stopped and saved at {images:,} images" in said
    assert "To resume: the same torchrun line, with -m fewstep distill" in said


# ------------------------------------------------------------------------------------------------- in one process


def test_a_signal_waits_until_what_must_be_whole_is_done():
    done = []
    with stop_signals(lambda: None, lambda: "twice") as stopping:
        signal.raise_signal(signal.SIGINT)
        assert stopping()
        with pytest.raises(KeyboardInterrupt, match="twice"):
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
                done.append("all")
            raise AssertionError("the signal was lost")
    assert done == ["all"]


def test_windows_simulated_lists_its_recipes():
    """deepspeedai/DeepSpeed#1921: no module that Windows lacks may be imported where nothing needs it."""
    hidden = "import sys\nfor name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'): sys.modules[name] = None\n"
    for body in (
        "from fewstep.cli.main import main; sys.exit(main(['recipes']))",
        "import fewstep.costs.bench, fewstep.run.specs",
    ):
        done = subprocess.run([sys.executable, "-c", hidden + body], capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
