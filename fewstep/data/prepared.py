"""Captioned images that `fewstep prepare` wrote: latents (or pixels) with the number of their prompt, in shards."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.data.dataset import DataSpec, ImageDataset
from fewstep.data.text import written_lines
from fewstep.system.errors import DataError

__all__ = ["Prepared", "shard_name"]

_WAY_OUT = "run `fewstep prepare` with --images"


@final
class Prepared(DataSpec):
    """Images that `fewstep prepare` has encoded for one teacher, with their captions as prompts."""

    kind: Literal["prepared"] = "prepared"
    path: Path
    """The folder; the run's teacher.prompts must be the same."""

    def load(self) -> ImageDataset:
        """Latents float [N, C, H, W] (uint8 pixels where the teacher has no VAE), read when they are needed; labels
        are numbers of prompts.

        Its fingerprint covers the captions' numbers and the content of every shard.

        Raises:
            DataError: nothing prepared there, or a part is missing or damaged.
        """
        folder = self.path.expanduser()
        about = self.about()
        prompts = written_lines(folder / "prompts.jsonl")
        rows = _Rows(folder, about)
        return ImageDataset(
            name=folder.resolve().name,
            images=rows,
            labels=rows.labels,
            num_classes=len(prompts),
            class_names=tuple(prompts),
            source=hashlib.sha256(json.dumps([about, rows.hashes]).encode()).hexdigest(),
        )

    def about(self) -> dict[str, Any]:
        """Read how the folder was made: `encoder` names the VAE that the teacher must have.

        Raises:
            DataError: nothing prepared there.
        """
        file = self.path.expanduser() / "latents.json"
        if not file.exists():
            raise DataError(f"data.path {self.path} holds no prepared images: {_WAY_OUT}")
        about: dict[str, Any] = json.loads(file.read_text())
        return about


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"latents-{number:05d}.safetensors"


class _Rows:
    """Shards, indexed like one tensor along the first axis."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder = folder
        count, *shape = about["shape"]  # of the images that were given: malformed ones were left out
        size = int(about["shard"])
        self.hashes: list[str] = []
        """sha256 of each shard, as it was written."""
        ends = [0]
        for number in range(-(-count // size)):
            if not (folder / shard_name(number)).exists():
                raise DataError(
                    f"{folder / shard_name(number)} is missing: {_WAY_OUT} again, it makes only what is missing"
                )
            file = (folder / shard_name(number)).with_suffix(".json")
            try:
                record = json.loads(file.read_text())
                self.hashes.append(str(record["sha256"]))
                rows = int(record["metadata"].get("rows", min(size, count - number * size)))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{file} cannot be read ({error}): delete it and {_WAY_OUT} again") from None
            ends.append(ends[-1] + rows)
        self.shape = torch.Size((ends[-1], *shape))
        self._ends = torch.tensor(ends[1:])
        self._positions = torch.arange(self.shape[0])
        self._file = lru_cache(maxsize=256)(self._opened)  # a million images are a thousand files

    @cached_property
    def labels(self) -> Tensor:
        """Number of each image's prompt [N]."""
        return torch.cat([self._file(number).get_tensor("prompt") for number in range(len(self._ends))])

    def __getitem__(self, indices: Tensor | slice | int) -> Tensor:
        chosen = self._positions[indices]
        flat = chosen.reshape(-1)
        numbers = torch.bucketize(flat, self._ends, right=True)
        rows = []
        for number, index in zip(numbers.tolist(), flat.tolist(), strict=True):
            row = index - (int(self._ends[number - 1]) if number else 0)
            try:
                rows.append(self._file(number).get_slice("latents")[row])
            except SafetensorError as error:
                raise self._damaged(number, error) from None
        stacked = torch.stack(rows) if rows else torch.empty(0, *self.shape[1:])
        return stacked.reshape(*chosen.shape, *self.shape[1:])

    def _opened(self, number: int) -> Any:
        try:
            return safe_open(self.folder / shard_name(number), "pt")
        except (SafetensorError, OSError) as error:
            raise self._damaged(number, error) from None

    def _damaged(self, number: int, error: Exception) -> DataError:
        return DataError(f"{self.folder / shard_name(number)} cannot be read ({error}): delete it and {_WAY_OUT} again")
