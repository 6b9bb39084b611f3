"""The training loop: when to update, log, evaluate, save and stop. Knows no method, no network and no loss.

It drives a `Task` (a distillation or a pretraining), which defines one update. All progress is counted in images seen.
Before every micro-batch the random state is set from (seed, position of its first image in the run). So a resumed run
equals an unbroken one, and two processes equal one process that accumulates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fewstep.evaluation.metrics import deciding, merit, notes_of
from fewstep.system import distributed
from fewstep.system.checkpoint import Checkpoints
from fewstep.system.console import Progress, say, waiting
from fewstep.system.device import training_kernels
from fewstep.system.errors import FileError
from fewstep.system.files import RunLock, remove_leftovers
from fewstep.system.interrupt import stop_signals
from fewstep.system.launch import launched, orphaned
from fewstep.system.tracking import Tracker
from fewstep.training.spec import TrainSpec
from fewstep.training.task import VITAL, Diverged, Micro, Task

__all__ = ["Trainer"]


class _Abandoned(Exception):
    """An evaluation was abandoned because the run is to stop; the resumed run starts with it."""


class Trainer:
    """Trains a task in a run folder, resuming from the folder's newest checkpoint.

    Args:
        task: the task to train.
        spec: settings of the loop.
        folder: the run folder: `checkpoints/`, `stats.jsonl`, `times.jsonl`, `pictures/` and the exported weights.
        describe: title of the progress bar.
    """

    def __init__(self, task: Task, spec: TrainSpec, folder: Path, describe: str = "training") -> None:
        self.task, self.spec, self.folder, self.describe = task, spec, Path(folder), describe
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=spec.keep)
        self.images = 0
        self.scores: dict[str, Any] = {}
        self._clock, self._trained = time.perf_counter(), 0.0  # seconds of training since the last line of times.jsonl
        self._scored_at = -1  # images of the last evaluation: a checkpoint stores only its own score
        self._owed: str | None = None  # "evaluation" or "pictures" abandoned by a signal at these images
        self._saved: int | None = None  # images of the newest checkpoint
        self._sums: dict[str, list[Any]] = {}  # logged numbers since the last line: name -> [sum, count]

    def fit(self, started: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """Train until `spec.images` or a signal; returns the last scores.

        Args:
            started: called on rank 0 once the folder is locked and its checkpoint is read.

        Raises:
            Diverged: a loss, gradient or weight is not finite.
            FileError: the newest checkpoint cannot be read, or is of other data; another process trains in this folder.
            KeyboardInterrupt: after SIGINT or SIGTERM, once the state is saved; at once after a second signal.
        """
        spec = self.spec
        self.folder.mkdir(parents=True, exist_ok=True)
        main = distributed.rank() == 0
        with _maybe(RunLock, main, self.folder), stop_signals(self._answer, self._give_up) as signalled:
            if main:
                remove_leftovers(self.folder, ("student", "teacher", "pipeline"))
                remove_leftovers(self.folder / "pictures", ("",))
                remove_leftovers(self.folder / "best", ("student", "teacher", "pipeline"))

            def stopping() -> bool:
                return signalled() or orphaned()

            resumed = self._resume()
            if main:
                started()
            services = dict(tensorboard=spec.tensorboard, wandb=spec.wandb)
            with _maybe(Tracker, main, self.folder, resume_from=resumed, **services) as self.tracker:
                self._train(resumed, stopping)
        return self.scores

    def _train(self, resumed: int | None, stopping: Callable[[], bool]) -> None:
        """Train from the state that `_resume` restored."""
        spec, main = self.spec, distributed.rank() == 0
        with Progress(self.describe, spec.images, self.images, enabled=main) as self.bar:
            self._clock = time.perf_counter()
            if resumed is not None:
                self.bar.print(f"resuming at {self.images:,} images")
            owed = self._owed
            if owed == "pictures":
                self._scored_at = self.images  # the scores in the checkpoint are of these images
                self._draw(stopping)
            elif owed or (resumed is None and spec.evaluate_every is not None):
                self._evaluate(stopping)
            if owed and not self._left_owing():
                self._save()
            if distributed.any_rank(stopping()) and (self.images < spec.images or self._left_owing()):
                raise KeyboardInterrupt(self._stopped())
            while self.images < spec.images:
                before = self.images
                with training_kernels(spec.torch_device(), spec.bf16(), spec.precision == "tf32"):
                    stats = self.task.update(before, self._micros())
                self.images = before + spec.batch_size
                self._collect(stats)
                if self._due(before, spec.log_every):
                    self._log()
                if self._due(before, spec.evaluate_every):
                    self._evaluate(stopping)
                stop = distributed.any_rank(stopping())
                scored = self._scored_at == self.images
                if stop or scored or self._due(before, spec.checkpoint_every):
                    self._save()
                    stop = distributed.any_rank(
                        stopping()
                    )  # a save may take long: a signal during it needs no second save
                if scored and self.task.health:
                    self.task.health.settle()
                if stop and (self.images < spec.images or self._left_owing()):
                    raise KeyboardInterrupt(self._stopped())
                self.bar.update(self.images, **{c.key: self.scores[c.key] for c in [deciding([self.scores])] if c})

    def _answer(self) -> None:
        """Acknowledge a first signal."""
        if distributed.rank() == 0 and not launched():  # else the launcher has acknowledged it
            kept = "" if self._saved is None else f" (the newest checkpoint is of {self._saved:,} images)"
            say(f"saving; press Ctrl-C again to quit without saving{kept}")

    def _give_up(self) -> str:
        """Return the message for a second signal."""
        kept = "nothing was saved yet" if self._saved is None else f"the newest checkpoint is of {self._saved:,} images"
        return f"stopped at once, without saving: {kept}"

    def _stopped(self) -> str:
        if self._saved is None:
            return "stopped before the first update: nothing is lost"
        left = ", before the evaluation" if self._left_owing() else ""
        return f"stopped and saved at {self._saved:,} images in {self.folder}{left}"

    def _left_owing(self) -> bool:
        """Return whether any process abandoned an evaluation or pictures."""
        return distributed.any_rank(self._owed is not None)

    def _watch(self, stopping: Callable[[], bool], together: bool) -> Callable[[str], None]:
        """Make a callback that shows progress, and raises if this process (`together`: any process) is to stop."""

        def watch(doing: str) -> None:
            self.bar.during(doing)
            if distributed.any_rank(stopping()) if together else stopping():
                raise _Abandoned

        return watch

    def _micros(self) -> list[Micro]:
        size, count = self.spec.micro()
        world, rank = distributed.world_size(), distributed.rank()
        positions = [self.images + (i * world + rank) * size for i in range(count)]
        after = self.images + self.spec.batch_size
        following = [*positions[1:], positions[0] + self.spec.batch_size if after < self.spec.images else None]
        return [Micro(at, size, self.spec.seed, then) for at, then in zip(positions, following, strict=True)]

    def _due(self, before: int, every: int | None) -> bool:
        """Return whether the last update crossed a multiple of `every` or ended the run."""
        return self.images >= self.spec.images or (every is not None and self.images // every > before // every)

    def _collect(self, stats: dict[str, Any]) -> None:
        for name, value in stats.items():
            total = self._sums.setdefault(name, [0.0, 0])
            part, count = value if isinstance(value, tuple) else (value, 1)
            for place, number in enumerate((part, count)):  # tensors: no sync here
                total[place] = total[place] + (number.detach() if isinstance(number, torch.Tensor) else number)

    def _log(self) -> None:
        values = distributed.mean({name: (float(total), int(count)) for name, (total, count) in self._sums.items()})
        self._sums.clear()
        self._check([values])
        undefined = [name for name, value in values.items() if not math.isfinite(value)]
        for name in undefined:
            if self.tracker:
                self.tracker.warn(
                    self.images, "undefined", f"{name} is {values[name]} and omitted from the log; training continues"
                )
            del values[name]
        if self.tracker:
            self.tracker.log(self.images, values)
            self._time()
        if self.tracker or self.task.sharded:
            for code, text in self.task.advise(values):
                if self.tracker:
                    self.tracker.warn(self.images, code, text)

    def _time(self) -> None:
        now = time.perf_counter()
        self.tracker.time(self.images, {"training_seconds": self._trained + now - self._clock})
        self._clock, self._trained = now, 0.0

    def _check(self, parts: Sequence[Mapping[str, float]]) -> None:
        """Stop if a loss, a gradient or a weight is not finite; statistics may be."""
        found = {
            name: f"became {value}"
            for part in parts
            for name, value in part.items()
            if name.partition("/")[0] in VITAL and not math.isfinite(value)
        }
        if (weight := self.task.nonfinite()) is not None:
            found[weight] = "holds NaN or infinity"
        if not found:
            return
        good = self.checkpoints.latest()
        kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        first, *others = sorted(
            found, key=lambda name: name.startswith("gradient")
        )  # name a loss first: it is more informative
        more = f" Also not finite: {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}." if others else ""
        raise Diverged(
            f"{first} {found[first]} at {self.images:,} images; {kept}.{more} {self.task.cure(sorted(found))}"
        )

    def _evaluate(self, stopping: Callable[[], bool]) -> None:
        started = time.perf_counter()
        self._trained += started - self._clock
        first = self.images == 0
        self.bar.during("evaluating before the first update" if first else "evaluating", at_once=first)
        self._owed = "evaluation"
        self.task.watch = self._watch(stopping, together=True)
        try:
            self.scores = self.task.evaluate(self.images)
        except _Abandoned:
            self._clock = time.perf_counter()
            self.bar.during(None)
            return
        finally:
            del self.task.watch
        self._scored_at = self.images
        said = "; ".join(notes_of(self.scores))
        if "warnings" in self.scores:  # joined: lines of stats.jsonl hold numbers and texts
            self.scores = self.scores | {"warnings": said or None}
        if self.tracker:
            self.tracker.log(self.images, self.scores, kind="evaluation")
            found = list(self.task.health.diagnose(self.images >= self.spec.images)) if self.task.health else []
            for code, text in [("evaluation", said)] * bool(said) + found:
                self.tracker.warn(self.images, code, text)
        self._draw(stopping)
        if self.tracker:
            self.tracker.time(self.images, {"evaluation_seconds": time.perf_counter() - started})
        self._clock = time.perf_counter()

    def _draw(self, stopping: Callable[[], bool]) -> None:
        """Draw the pictures of the current state."""
        self._owed, drawn = "pictures", {}
        self.task.watch = self._watch(stopping, together=self.task.sharded)
        try:
            if self.tracker or self.task.sharded:
                drawn = self.task.picture(self.images, self.folder / "pictures")
            self._owed = None
        except _Abandoned:
            return
        finally:
            del self.task.watch
            self.bar.during(None)
        if self.tracker:
            for name, path in drawn.items():
                self.tracker.image(self.images, name, path)

    def _save(self) -> None:
        # one entry per process, so that a resumed run sums in the order of an unbroken one
        pending = distributed.gather({name: [float(total), int(count)] for name, (total, count) in self._sums.items()})
        # checked before saving, to keep the last good checkpoint
        self._check([{name: total for name, (total, _) in part.items()} for part in pending])
        state = {"task": self.task.state_dict(), "images": self.images, "pending": pending, "scores": self.scores}
        state |= {"data": self.task.data, "inputs": dict(self.task.inputs), "owed": self._owed}
        score = merit(self.scores) if self._scored_at == self.images else None
        if distributed.rank() == 0 or self.task.sharded:  # before the checkpoint: a run killed in between exports again
            self.task.export(self.folder, self.images, self.scores if self._scored_at == self.images else {})
            if score is not None and score < self.checkpoints.lowest(math.inf):
                (self.folder / "best").mkdir(exist_ok=True)
                self.task.export(self.folder / "best", self.images, self.scores)
        distributed.barrier()
        self.checkpoints.save(self.images, state, score=score)
        self._saved = self.images

    def _resume(self) -> int | None:
        latest = self.checkpoints.latest()
        if latest is None:
            return None
        self._saved = self.checkpoints.images_of(latest)
        with waiting(f"reading {latest}"):
            return self._restore(latest)

    def _restore(self, latest: Path) -> int:
        """Restore everything from a checkpoint; returns its images."""
        # in place: each process reads only its own part, and the host holds no second copy
        if self.task.sharded or self.spec.offload:
            state = self.checkpoints.load(
                latest,
                into={"task": self.task.state_dict()},
                make=lambda name: self.task.destination(name.split("/")[1:]),
            )
        else:
            state = self.checkpoints.load(latest)
        if (before := state.get("data")) not in (None, self.task.data):
            raise FileError(
                f"{self.folder} was trained on other images (fingerprint {before[:8]}, now {(self.task.data or 'none')[:8]}): a file "
                "was added, removed or changed. Try: restore it, or start a new run with another --out"
            )
        for name, known in state.get("inputs", {}).items():
            if (now := self.task.inputs.get(name, known)) != known:
                raise FileError(
                    f"`{name}` must name what {self.folder} was trained with (sha256 {known[:8]}), got another (sha256 {now[:8]}). "
                    "Try: the original file or folder, or start a new run with another --out"
                )
        self.task.load_state_dict(state["task"])
        self.images, self.scores, pending = state["images"], state["scores"], state["pending"]
        self._owed = state.get("owed")  # checkpoints of earlier versions have no such entry
        world, rank = distributed.world_size(), distributed.rank()
        if world == len(pending):
            self._sums = pending[rank]
        else:  # another number of processes: the same sums, in another order
            for part in pending[rank::world]:
                for name, (total, count) in part.items():
                    mine = self._sums.setdefault(name, [0.0, 0])
                    mine[0], mine[1] = mine[0] + total, mine[1] + count
        return self.images


@contextmanager
def _maybe(context: Callable[..., Any], wanted: bool, *args: Any, **options: Any) -> Iterator[Any]:
    if not wanted:
        yield None
        return
    with context(*args, **options) as made:
        yield made
