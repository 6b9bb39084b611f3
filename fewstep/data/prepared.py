"""Captioned images from `fewstep prepare`: latents (or pixels) with the index of their prompt, in shards."""

from __future__ import annotations

import hashlib
import itertools
import json
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.data.buckets import Buckets
from fewstep.data.dataset import DataSpec, ImageDataset
from fewstep.data.text import written_lines
from fewstep.system.bounds import read_json, reading, regular_file, shown
from fewstep.system.errors import DataError

__all__ = ["Prepared", "bucket_key", "shard_name"]

_WAY_OUT = "run `fewstep prepare` with --images"


@final
class Prepared(DataSpec):
    """Images encoded by `fewstep prepare` for one teacher, with their captions as prompts."""

    kind: Literal["prepared"] = "prepared"
    path: Path
    """The folder; must equal the run's teacher.prompts."""

    def load(self) -> ImageDataset:
        """Latents float [N, C, H, W] (uint8 pixels where the teacher has no VAE), read when they are needed; labels
        are numbers of prompts.

        Its fingerprint covers the captions' numbers and the content of every shard.

        Raises:
            DataError: nothing prepared there, images of several sizes, or a part is missing or damaged.
        """
        about = self.about()
        if "buckets" in about:
            raise DataError(
                f"data.path {self.path} must hold images of one size, got buckets of several. Try: teacher.buckets, as they were "
                "prepared with"
            )
        folder = self.path.expanduser()
        with reading(folder / "latents.json", DataError):
            rows = _Rows(folder, about, about["shape"], "")
            return self._part(about, rows, tuple(written_lines(folder / "prompts.jsonl")))

    def load_buckets(self) -> Buckets:
        """The images of a folder that was prepared with buckets, as `load` gives them for each; empty ones are left out.

        Raises:
            DataError: nothing prepared there, images of one size, or a part is missing or damaged.
        """
        about = self.about()
        if "buckets" not in about:
            raise DataError(
                f"data.path {self.path} must hold images in buckets, got all of one size. Try: prepare them again with this run's "
                "teacher.buckets, in another folder"
            )
        folder, parts = self.path.expanduser(), {}
        prompts = tuple(written_lines(folder / "prompts.jsonl"))
        with reading(folder / "latents.json", DataError):
            for height, width, shape in about["buckets"]:
                rows = _Rows(folder, about, [about["shape"][0], *shape], bucket_key(height, width))
                if rows.shape[0]:
                    parts[height, width] = self._part(about, rows, prompts)
        return Buckets(folder.resolve().name, tuple(parts.values()), tuple(parts))

    def _part(self, about: dict[str, Any], rows: _Rows, prompts: tuple[str, ...]) -> ImageDataset:
        return ImageDataset(
            name=self.path.expanduser().resolve().name,
            images=rows,
            labels=rows.labels,
            num_classes=len(prompts),
            class_names=prompts,
            frames=rows.frames,
            source=hashlib.sha256(
                json.dumps([about, rows.hashes, *([rows.key] if rows.key else [])]).encode()
            ).hexdigest(),
        )

    def about(self) -> dict[str, Any]:
        """Read the folder's manifest; its `encoder` identifies the VAE that the teacher must have.

        Raises:
            DataError: nothing prepared there.
        """
        file = self.path.expanduser() / "latents.json"
        if not file.exists():
            raise DataError(f"data.path {self.path} holds no prepared images: {_WAY_OUT}")
        about = read_json(file)
        if not isinstance(about, dict) or not _is_shape(about.get("shape")) or not _is_count(about.get("shard")):
            raise DataError(f"{file} must describe prepared images, got other JSON: {_WAY_OUT} again")
        return about


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**40


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and 1 < len(value) <= 8 and value[0] != 0 and all(map(_is_count, value))


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"latents-{number:05d}.safetensors"


def bucket_key(height: int, width: int) -> str:
    """Return the suffix of the names of a bucket's tensors in a shard."""
    return f" {width}x{height}"


class _Rows:
    """Shards, indexed like one tensor along the first axis.

    Args:
        folder: where they are.
        about: of `Prepared.about`.
        form: shape of all samples; its first number is of the images that were given, malformed ones too.
        key: which bucket; empty without buckets.
    """

    def __init__(self, folder: Path, about: dict[str, Any], form: list[int], key: str) -> None:
        self.folder, self.key = folder, key
        count, *shape = form
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
                record = read_json(file)
                self.hashes.append(str(record["sha256"]))
                rows = record["metadata"].get("rows", min(size, count - number * size))
                ends.append(ends[-1] + int(rows.get(key, 0) if isinstance(rows, dict) else rows))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{file} cannot be read ({shown(str(error), quote=False)}): delete it and {_WAY_OUT} again"
                ) from None
        self.shape = torch.Size((ends[-1], *shape))
        if (order := sorted(ends)) != ends:
            raise ValueError(f"the numbers of rows end at {shown(order)}")
        self._lengths = [last - first for first, last in itertools.pairwise(ends)]
        self._ends = torch.tensor(ends[1:])
        self._filled = [number for number in range(len(ends) - 1) if ends[number + 1] > ends[number]]
        self._positions = torch.arange(self.shape[0])
        self._file = lru_cache(maxsize=256)(self._opened)  # a million images are a thousand files

    @cached_property
    def labels(self) -> Tensor:
        """Index of each image's prompt [N]."""
        return self._all(f"prompt{self.key}", torch.zeros(0, dtype=torch.int64))

    @cached_property
    def frames(self) -> Tensor | None:
        """Frame [N, 4] of each prepared picture; None in files of older versions, which did not keep it."""
        name = f"frame{self.key}"
        if not all(name in self._file(number).keys() for number in self._filled):  # noqa: SIM118  (no mapping)
            return None
        return self._all(name, torch.zeros(0, 4, dtype=torch.int32))

    def _all(self, name: str, none: Tensor) -> Tensor:
        parts = [none]
        for number in self._filled:
            with reading(self.folder / shard_name(number), DataError):
                parts.append(self._file(number).get_tensor(name))
                if len(parts[-1]) != self._lengths[number] or parts[-1].dtype != none.dtype:
                    raise ValueError(
                        f"{name} is {parts[-1].dtype} {list(parts[-1].shape)}, of {self._lengths[number]:,} rows"
                    )
        return torch.cat(parts)

    def __getitem__(self, indices: Tensor | slice | int) -> Tensor:
        chosen = self._positions[indices]
        flat = chosen.reshape(-1)
        numbers = torch.bucketize(flat, self._ends, right=True)
        rows = []
        for number, index in zip(numbers.tolist(), flat.tolist(), strict=True):
            row = index - (int(self._ends[number - 1]) if number else 0)
            try:
                rows.append(self._file(number).get_slice(f"latents{self.key}")[row])
                if rows[-1].shape != self.shape[1:]:
                    raise IndexError(f"a latent is {list(rows[-1].shape)}, not {list(self.shape[1:])}")
            except (SafetensorError, IndexError, RuntimeError) as error:
                raise self._damaged(number, error) from None
        stacked = torch.stack(rows) if rows else torch.empty(0, *self.shape[1:])
        return stacked.reshape(*chosen.shape, *self.shape[1:])

    def _opened(self, number: int) -> Any:
        try:
            return safe_open(regular_file(self.folder / shard_name(number)), "pt")
        except (SafetensorError, OSError) as error:
            raise self._damaged(number, error) from None

    def _damaged(self, number: int, error: Exception) -> DataError:
        return DataError(
            f"{self.folder / shard_name(number)} cannot be read ({shown(str(error), quote=False)}): delete it and {_WAY_OUT} again"
        )
