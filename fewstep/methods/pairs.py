"""Noise-image pairs of a teacher: made by its deterministic sampler, stored in shards, read back for DMD's regression.

A pair set is a folder: shards `pairs-00000.safetensors`, ... (z, y, labels; each with a JSON file that holds its checksum)
and `pairs.json` (teacher and settings). Pair i depends on i alone, so an interrupted run resumes with the next shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.guidance import Rule, plain
from fewstep.diffusion.solvers import Solver
from fewstep.methods.base import Pairs
from fewstep.students.sample import ManyStep, balanced_labels, generate, noise_of
from fewstep.system import distributed
from fewstep.system.bounds import read_json, shown
from fewstep.system.errors import FileError
from fewstep.system.files import atomic_write
from fewstep.system.out_folder import check_out
from fewstep.system.weights import load_weights, save_weights
from fewstep.teachers.base import Conditioner, Teacher

__all__ = ["PairSet", "make_pairs"]

FIRST_SEED = 1_000_000_000  # far from the small seeds of evaluation: a student must not have seen those samples


class PairSet:
    """Pairs on disk, read on demand: a process holds only the labels in memory. Rank 0 checks the files' sha256.

    Args:
        folder: output folder of `make_pairs`.
        teacher: teacher that must have made the pairs.
        guidance: guidance with which they must have been made.

    Attributes:
        labels: class of each pair [count].
        fingerprint: sha256 (hex) of the shards' sha256.

    Raises:
        FileError: no pairs, a damaged shard, or pairs of another teacher, prompts or guidance.
    """

    def __init__(self, folder: Path, teacher: Teacher, guidance: Rule | float | None = None) -> None:
        shards = sorted(folder.glob("pairs-*.safetensors"))
        about = _about(folder) if shards else None
        if about is None:
            raise FileError(
                f"`pairs` must be a folder with pairs, got {folder}. Try: `fewstep pairs RECIPE --out {folder}`"
            )
        if about["teacher_sha256"] != teacher.sha256:
            raise FileError(
                f"pairs must be made with this run's teacher, {teacher.name} ({teacher.sha256[:8]}), got {folder} with teacher "
                f"{shown(about['teacher'], quote=False)} ({shown(about['teacher_sha256'][:8], quote=False)}). Try: make new ones in another folder"
            )
        for what, known, wanted in (
            ("guidance", _scale(about["guidance"]), _scale(plain(guidance))),
            ("prompts", about.get("prompts_sha256", "unknown"), teacher.conditioner.sha256),
            ("noise levels and prediction", about.get("law_sha256", _law(teacher)), _law(teacher)),
        ):
            if wanted and known != wanted:  # classes have no sha256
                raise FileError(
                    f"pairs must be made with this run's {what}, {wanted}, got {folder} with {shown(known, quote=False)}. Try: `fewstep pairs` with this "
                    "run's settings and another --out"
                )
        try:
            loaded = [load_weights(shard, hashes=distributed.rank() == 0) for shard in shards]
        except FileError as error:
            raise FileError(
                f"{error}; delete that shard and run `fewstep pairs` again: it makes only the missing shards"
            ) from None
        for shard, (tensors, _) in zip(shards, loaded, strict=True):
            if (
                not {"z", "y", "labels"} <= tensors.keys()
                or len({len(tensors[name]) for name in ("z", "y", "labels") if tensors[name].ndim}) != 1
            ):
                raise FileError(
                    f"{shard} must hold as many z as y and labels, got {shown(list(tensors))}. Try: delete that shard and run `fewstep pairs` again"
                )
        self.about, self._parts = about, [tensors for tensors, _ in loaded]
        self.fingerprint = hashlib.sha256("".join(card["sha256"] for _, card in loaded).encode()).hexdigest()
        self.labels = torch.cat([part["labels"] for part in self._parts])
        classes = teacher.conditioner.num_classes
        if self.labels.dtype != torch.int64 or (
            len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() <= classes
        ):
            raise FileError(
                f"pairs must have labels of the teacher's {classes} classes, got others in {folder}. Try: make new ones in another folder"
            )
        self._ends = torch.tensor([len(part["labels"]) for part in self._parts]).cumsum(0)
        shapes = {tuple(part[name].shape[1:]) for part in self._parts for name in ("z", "y")}
        if wrong := shapes - {tuple(teacher.shape)}:
            raise FileError(
                f"pairs must have the shape of the teacher's samples, {list(teacher.shape)}, got {folder} with "
                f"{list(wrong.pop())}. Try: make new ones in another folder"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def z(self) -> Tensor:
        """Noise of all pairs [count, ...], in memory."""
        return self._rows("z", torch.arange(len(self)))

    @property
    def y(self) -> Tensor:
        """Samples of all pairs [count, ...], in memory."""
        return self._rows("y", torch.arange(len(self)))

    def _rows(self, name: str, indices: Tensor) -> Tensor:
        """Copies of the rows at these indices [n]."""
        files = torch.bucketize(indices, self._ends, right=True)
        ends = self._ends.tolist()
        rows = [
            self._parts[file][name][index - ends[file]]  # counted from the file's end
            for file, index in zip(files.tolist(), indices.tolist(), strict=True)
        ]
        return torch.stack(rows)

    def batch(self, indices: Tensor, conditioner: Conditioner, device: torch.device) -> Pairs:
        """Pairs at these indices [n]."""
        cond = conditioner.cond(self.labels[indices], len(indices))
        z, y = (self._rows(name, indices).to(device) for name in ("z", "y"))
        return Pairs(z, y, {k: v.to(device) for k, v in cond.items()})


def make_pairs(
    teacher: Teacher,
    folder: Path,
    count: int,
    evaluations: int = 35,
    guidance: Rule | float | None = None,
    solver: Solver = Solver(),  # noqa: B008  (frozen)
    shard: int = 2_500,
    batch: int = 250,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Make the missing ones of `count` pairs, with balanced classes; returns the number of existing pairs.

    Processes take the shards in turn. `progress` receives an estimate of the pairs done by all processes.

    Raises:
        FileError: the folder holds pairs made with other settings or something else, cannot be written to, or a number is
            below 1.
    """
    for name, value in (("count", count), ("evaluations", evaluations), ("shard", shard), ("batch", batch)):
        if value < 1:
            raise FileError(f"`{name}` must be at least 1, got {value}. Try: leave it out to use the default")
    check_out(folder, "pairs")
    about: dict[str, Any] = {
        "teacher": teacher.name,
        "teacher_sha256": teacher.sha256,
        "sampler": "edm-heun" if solver.usual else str(solver),
        "evaluations": evaluations,
        "guidance": plain(guidance),
        "shard": shard,
        "bf16": bf16,
        "law_sha256": _law(teacher),
    }
    if teacher.conditioner.sha256:  # labels are prompt indices
        about["prompts_sha256"] = teacher.conditioner.sha256
    world, rank = distributed.world_size(), distributed.rank()
    present = _about(folder)
    distributed.barrier()  # every process must have read before rank 0 writes
    if present is None:
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            atomic_write(folder / "pairs.json", json.dumps(about, indent=2))
    elif different := [name for name in about if ({"law_sha256": _law(teacher)} | present).get(name) != about[name]]:
        name = different[0]
        raise FileError(
            f"`--out` must be a new folder or hold pairs made with {name} {about[name]}, got {folder} with "
            f"{shown(present.get(name))}. Try: another folder"
        )
    sampler = ManyStep(teacher.guided(guidance), evaluations, device, solver)
    found = 0
    for start in range(rank * shard, count, world * shard):
        size = min(shard, count - start)
        done = start - rank * shard
        path = folder / f"pairs-{start // shard:05d}.safetensors"
        if path.exists() and path.with_suffix(".json").exists() and _count_in(path) >= size:
            found += size  # a larger shard is kept
            progress(min(count, done + world * size))
            continue
        seeds = range(FIRST_SEED + start, FIRST_SEED + start + size)
        y = torch.cat(
            list(
                generate(
                    sampler,
                    seeds,
                    teacher.shape,
                    teacher.conditioner,
                    batch=batch,
                    bf16=bf16,
                    device=device,
                    uint8=False,
                    local=True,
                    progress=lambda n: progress(min(count, done + world * n)),  # noqa: B023  (called within this round)
                )
            )
        )
        labels = balanced_labels(seeds, teacher.conditioner.num_classes)
        tensors = {
            "z": noise_of(seeds, teacher.shape),
            "y": y,
            "labels": torch.zeros(size, dtype=torch.long) if labels is None else labels,
        }
        save_weights(path, tensors, {"first_seed": seeds[0], "count": size})
    return sum(distributed.gather(found))


def _law(teacher: Teacher) -> str:
    """sha256 of the noise schedule and the prediction type, which the weights do not record."""
    if teacher.student_spec is not None:
        return hashlib.sha256(teacher.student_spec.model_dump_json(exclude={"net"}).encode()).hexdigest()
    return hashlib.sha256(teacher.denoiser.schedule.model_dump_json().encode()).hexdigest()


def _scale(guidance: float | str | None) -> float | str:
    """Guidance scale as a number, 1 without guidance; a rule with limits in words."""
    return 1.0 if guidance is None else guidance if isinstance(guidance, str) else float(guidance)


def _count_in(shard: Path) -> int:
    try:
        return load_weights(shard)[1]["count"]
    except FileError as error:
        raise FileError(f"{error}; delete that shard and run the same command again") from None


def _about(folder: Path) -> dict[str, Any] | None:
    path = folder / "pairs.json"
    if not path.exists():
        return None
    about = read_json(path)
    good = isinstance(about, dict) and isinstance(about.get("guidance", ()), str | int | float | None)
    if not good or not all(isinstance(about.get(name), str) for name in ("teacher", "teacher_sha256")):
        raise FileError(f"{path} must describe pairs, got {shown(about)}. Try: make them again in another folder")
    return dict(about)
