"""Noise-image pairs of a teacher: made by its deterministic sampler, kept in shards, read back for DMD's regression.

A pair set is a folder: `pairs-00000.safetensors`, ... (z, y, labels, each shard with its checksum in a JSON beside
it) and `pairs.json` (what made them). Pair i is a function of i alone, so that a killed run goes on with the next
shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.methods.base import Pairs
from fewstep.students.sample import ManyStep, balanced_labels, generate, noise_of
from fewstep.system import distributed
from fewstep.system.errors import FileError
from fewstep.system.files import atomic_write
from fewstep.system.out_folder import check_out
from fewstep.system.weights import load_weights, save_weights
from fewstep.teachers.base import Conditioner, Teacher

__all__ = ["PairSet", "make_pairs"]

FIRST_SEED = 1_000_000_000  # evaluation samples have small seeds: a student must not have been shown their answers


class PairSet:
    """Pairs in their files, read as they are needed: a process holds the labels alone. Rank 0 checks the files' sha256.

    Args:
        folder: where `make_pairs` wrote.
        teacher: whose they must be.
        guidance: the run's, under which they must have been made.

    Attributes:
        labels: class of each pair [count].
        fingerprint: sha256 (hex) of the files' own.

    Raises:
        FileError: no pairs, a damaged shard, or pairs of another teacher, of other prompts or under other guidance.
    """

    def __init__(self, folder: Path, teacher: Teacher, guidance: float | None = None) -> None:
        about, shards = _about(folder), sorted(folder.glob("pairs-*.safetensors"))
        if about is None or not shards:
            raise FileError(f"{folder} holds no pairs: make them with `fewstep pairs RECIPE --out {folder}`")
        if about["teacher_sha256"] != teacher.sha256:
            raise FileError(
                f"the pairs in {folder} are of teacher {about['teacher']} ({about['teacher_sha256'][:8]}), not of "
                f"{teacher.name} ({teacher.sha256[:8]}): make new ones in another folder"
            )
        for what, known, wanted in (
            ("guidance", _scale(about["guidance"]), _scale(guidance)),
            ("prompts", about.get("prompts_sha256", "unknown"), teacher.conditioner.sha256),
            ("noise levels and prediction", about.get("law_sha256", _law(teacher)), _law(teacher)),
        ):
            if wanted and known != wanted:  # classes have no sha256
                raise FileError(
                    f"pairs must be made with this run's {what}, {wanted}, got {folder} with {known}. Try: `fewstep pairs` with this "
                    "run's settings and another --out"
                )
        try:
            loaded = [load_weights(shard, hashes=distributed.rank() == 0) for shard in shards]
        except FileError as error:
            raise FileError(
                f"{error}; delete that shard and run `fewstep pairs` again: it makes only what is missing"
            ) from None
        self.about, self._parts = about, [tensors for tensors, _ in loaded]
        self.fingerprint = hashlib.sha256("".join(card["sha256"] for _, card in loaded).encode()).hexdigest()
        self.labels = torch.cat([part["labels"] for part in self._parts])
        self._ends = torch.tensor([len(part["labels"]) for part in self._parts]).cumsum(0)
        shapes = {tuple(part[name].shape[1:]) for part in self._parts for name in ("z", "y")}
        if wrong := shapes - {tuple(teacher.shape)}:
            raise FileError(
                f"the pairs in {folder} are of shape {list(wrong.pop())}, the teacher's samples {list(teacher.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def z(self) -> Tensor:
        """The noise of all pairs [count, ...], in memory."""
        return self._rows("z", torch.arange(len(self)))

    @property
    def y(self) -> Tensor:
        """The samples of all pairs [count, ...], in memory."""
        return self._rows("y", torch.arange(len(self)))

    def _rows(self, name: str, indices: Tensor) -> Tensor:
        """Copies of the rows of these indices [n]."""
        files = torch.bucketize(indices, self._ends, right=True)
        ends = self._ends.tolist()
        rows = [
            self._parts[file][name][index - ends[file]]  # counted from the file's end
            for file, index in zip(files.tolist(), indices.tolist(), strict=True)
        ]
        return torch.stack(rows)

    def batch(self, indices: Tensor, conditioner: Conditioner, device: torch.device) -> Pairs:
        """The pairs of these indices [n]."""
        cond = conditioner.cond(self.labels[indices], len(indices))
        z, y = (self._rows(name, indices).to(device) for name in ("z", "y"))
        return Pairs(z, y, {k: v.to(device) for k, v in cond.items()})


def make_pairs(
    teacher: Teacher,
    folder: Path,
    count: int,
    evaluations: int = 35,
    guidance: float | None = None,
    shard: int = 2_500,
    batch: int = 250,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Make what is missing of `count` pairs, classes balanced; returns how many were already there.

    Several processes make every so many-th shard each; `progress` is called with the pairs done by all, as far as one
    of them can tell.

    Raises:
        FileError: the folder holds pairs made in another way, or a number is below 1.
        FileError: the folder holds something else, or cannot be written to.
    """
    for name, value in (("count", count), ("evaluations", evaluations), ("shard", shard), ("batch", batch)):
        if value < 1:
            raise FileError(f"{name} must be at least 1, got {value}. Try: the default, by leaving it out")
    check_out(folder, "pairs")
    about: dict[str, Any] = {
        "teacher": teacher.name,
        "teacher_sha256": teacher.sha256,
        "sampler": "edm-heun",
        "evaluations": evaluations,
        "guidance": guidance,
        "shard": shard,
        "bf16": bf16,
        "law_sha256": _law(teacher),
    }
    if teacher.conditioner.sha256:  # labels are numbers of prompts
        about["prompts_sha256"] = teacher.conditioner.sha256
    world, rank = distributed.world_size(), distributed.rank()
    present = _about(folder)
    distributed.barrier()  # all have looked before one writes
    if present is None:
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            atomic_write(folder / "pairs.json", json.dumps(about, indent=2))
    elif different := [name for name in about if ({"law_sha256": _law(teacher)} | present).get(name) != about[name]]:
        name = different[0]
        raise FileError(
            f"{folder} holds pairs made with {name} {present.get(name)}, not {about[name]}: choose another folder"
        )
    sampler = ManyStep(teacher.guided(guidance), evaluations, device)
    found = 0
    for start in range(rank * shard, count, world * shard):
        size = min(shard, count - start)
        done = start - rank * shard
        path = folder / f"pairs-{start // shard:05d}.safetensors"
        if path.exists() and path.with_suffix(".json").exists() and _count_in(path) >= size:
            found += size  # a shard that holds more than is asked for is kept
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
    """sha256 of what the weights alone do not say: noise levels and what the network predicts."""
    if teacher.student_spec is not None:
        return hashlib.sha256(teacher.student_spec.model_dump_json(exclude={"net"}).encode()).hexdigest()
    return hashlib.sha256(teacher.denoiser.schedule.model_dump_json().encode()).hexdigest()


def _scale(guidance: float | None) -> float:
    """A guidance scale; without guidance it is 1."""
    return 1.0 if guidance is None else float(guidance)


def _count_in(shard: Path) -> int:
    try:
        return load_weights(shard)[1]["count"]
    except FileError as error:
        raise FileError(f"{error}; delete that shard and run the same command again") from None


def _about(folder: Path) -> dict[str, Any] | None:
    path = folder / "pairs.json"
    return json.loads(path.read_text()) if path.exists() else None
