"""Search for a teacher's best sampler at each number of calls: a coarse grid on few samples, then a finer one on all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from fewstep.data import DataSpec, ImageDataset
from fewstep.data.dataset import shuffled_indices
from fewstep.diffusion.guidance import Rule, plain
from fewstep.diffusion.noise import Karras
from fewstep.diffusion.solvers import Method, Solver, edm_view
from fewstep.evaluation.scorer import Scorer
from fewstep.students.sample import ManyStep
from fewstep.system import distributed
from fewstep.system.errors import EvaluationError
from fewstep.system.files import atomic_write
from fewstep.teachers import Teacher
from fewstep.teachers.samplers import FORMAT, as_record, from_record, read_samplers

__all__ = ["Search", "coarse", "finer", "validation_part"]

SHARE = 6  # the validation part is one image of so many
MOST = 10_000  # images of it
PROMOTED = 2  # samplers of the coarse grid that are scored on all samples
FEW = 4  # the coarse grid takes one sample of so many


def _forwards(progress: Callable[[str, int], None], name: str, before: int, calls: int, images: int) -> None:
    """Report images as forwards of the network, added to those before."""
    progress(name, before + calls * images)


def validation_part(spec: DataSpec, seed: int = 0) -> ImageDataset:
    """A seeded sixth of the images, at most 10,000, on which settings are chosen.

    Raises:
        EvaluationError: the images are a test set.
        DataError: they cannot be loaded.
    """
    if getattr(spec, "split", "train") == "test":
        raise EvaluationError("settings must be chosen on training images, got the test set. Try: --reference")
    data = spec.load()
    chosen = shuffled_indices(len(data), 0, min(MOST, max(2, len(data) // SHARE)), seed).sort().values
    labels = None if data.labels is None else data.labels[chosen]
    source = f"{data.source}/validation-{seed}" if data.source else ""
    return replace(
        data, name=f"{data.name}-validation", images=data.images[chosen], labels=labels, frames=None, source=source
    )


def coarse(calls: int, least: float, most: float) -> list[Solver]:
    """Samplers to begin with, for a model with noise levels from least to most."""
    methods: tuple[Method, ...] = ("dpmpp-2m", "unipc-2", "unipc-3")
    if calls <= 2:
        methods = ("euler", "unipc-2") if calls == 2 else ("euler",)
    elif calls >= 9:
        methods = (*methods, "heun")
    lows: tuple[float, ...] = (0.3, 1.0) if calls < 4 else (0.03, 0.1) if calls < 18 else (least, 0.03)
    if calls == 1:
        return [Solver("euler", sigma_max=most / part) for part in (1, 2, 4, 8) if most / part > least]
    fitting = dict.fromkeys(low for low in lows if least <= low < most / 2) or [least]
    return [Solver(method, low, high) for method in methods for low in fitting for high in (most, most / 2)]


def finer(best: Solver, calls: int, least: float, most: float) -> list[Solver]:
    """Neighbours of a sampler in each setting of its grid that matters, within the model's noise levels."""
    low, high = best.sigma_min or least, best.sigma_max or most
    highs = [value for value in (high / 1.5, high * 1.5) if low < value <= most]
    found = [replace(best, sigma_max=value) for value in highs]
    if calls > 1:
        lows = [value for value in (low / 1.8, low * 1.8) if least <= value < high]
        found += [replace(best, sigma_min=value) for value in lows]
    return found + ([replace(best, rho=rho) for rho in (4.0, 10.0)] if calls > 2 else [])


@dataclass
class Search:
    """Search for a teacher's best samplers, kept in a file after each try, so that it resumes.

    Attributes:
        teacher: the teacher.
        scorer: FID of all samples against the validation part.
        few: the same of fewer samples, for the coarse grid.
        out: the file.
        guidance: scale or rule of classifier-free guidance.
        device: of the networks.
    """

    teacher: Teacher
    scorer: Scorer
    few: Scorer
    out: Path
    guidance: Rule | float | None = None
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self.about = {
            "teacher": self.teacher.name,
            "sha256": self.teacher.sha256,
            "guidance": plain(self.guidance),
            "reference": self.scorer.reference.id,
            "precision_of_networks": "bf16" if self.scorer.bf16 else "fp32",
        }
        self.tries: list[dict[str, Any]] = []
        self.best: dict[str, dict[str, Any]] = {}
        self.denoiser = self.teacher.guided(self.guidance).to(self.device).eval()
        schedule = cast(Karras, edm_view(self.denoiser).schedule)
        self.least, self.most = schedule.sigma_min, schedule.sigma_max
        if self.out.exists():
            file = read_samplers(self.out)
            if other := [
                key for key, value in self.about.items() if key != "teacher" and file["about"].get(key) != value
            ]:
                raise EvaluationError(
                    f"`out` must be of the same {other[0]}, {self.about[other[0]]}, got {self.out} of "
                    f"{file['about'].get(other[0])}. Try: remove it, or another --out"
                )
            self.tries, self.best = file["tries"], file["best"]

    def work(self, calls: Sequence[int]) -> int:
        """Upper bound of the network's forwards, guidance not counted twice."""
        forwards = 0
        for count in calls:
            first = len(coarse(count, self.least, self.most))
            last = PROMOTED + 6 if count > 2 else PROMOTED + 4
            forwards += count * (first * self.few.samples + last * self.scorer.samples)
        return forwards

    def run(self, calls: Sequence[int], progress: Callable[[str, int], None] = lambda name, done: None) -> None:
        """Find the best sampler for each number of calls.

        Args:
            calls: numbers of network calls.
            progress: called with the sampler at work and the forwards done.
        """
        done = 0
        for count in calls:
            results: list[tuple[float, Solver]] = []
            for solver, scorer in self._wanted(count, results):
                shown = partial(_forwards, progress, f"{solver} at {count}", done, count)
                fid = self._fid(solver, count, scorer, shown)
                done += count * scorer.samples
                progress(f"{solver} at {count}", done)
                results.append((fid, solver))
            fid, solver = min(results[len(coarse(count, self.least, self.most)) :], key=lambda found: found[0])
            self.best[str(count)] = as_record(solver) | {"fid": fid, "samples": self.scorer.samples}
            self._save()

    def _wanted(self, calls: int, results: list[tuple[float, Solver]]) -> Iterator[tuple[Solver, Scorer]]:
        """Samplers to try, chosen by the results so far."""
        first = coarse(calls, self.least, self.most)
        for solver in first:
            yield solver, self.few
        promoted = sorted(results, key=lambda found: found[0])[:PROMOTED]
        for _, solver in promoted:
            yield solver, self.scorer
        winner = min(results[len(first) :], key=lambda found: found[0])[1]
        for solver in finer(winner, calls, self.least, self.most):
            if solver not in [other for _, other in promoted]:
                yield solver, self.scorer

    def _fid(self, solver: Solver, calls: int, scorer: Scorer, progress: Callable[[int], None]) -> float:
        for row in self.tries:
            if (row["calls"], row["samples"]) == (calls, scorer.samples) and from_record(row) == solver:
                return float(row["fid"])
        sampler = ManyStep(self.denoiser, calls, self.device, solver, self.teacher.codec)
        scores = scorer.score(sampler, self.teacher.shape, self.teacher.conditioner, self.device, progress)
        self.tries.append(as_record(solver) | {"calls": calls, "samples": scorer.samples, "fid": scores["fid"]})
        self._save()
        return float(scores["fid"])

    def _save(self) -> None:
        if distributed.rank() == 0:
            best = dict(sorted(self.best.items(), key=lambda item: -int(item[0])))
            content = {"format": FORMAT, "about": self.about, "best": best, "tries": self.tries}
            self.out.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self.out, json.dumps(content, indent=2))
