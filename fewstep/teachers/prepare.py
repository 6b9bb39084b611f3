"""Prepare the inputs of a text-to-image run once: prompts with the text encoders, captioned images with the VAE.

Writes one folder, which is both `teacher.prompts` and `data: {kind: prepared}`. Shards are written one by one, so an
interrupted preparation resumes. Each encoder's memory is freed when it is done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data import Captioned, CaptionRule, TextLatents, captioned_images, text_latents, to_unit
from fewstep.data.image_files import Picture, Size
from fewstep.data.malformed import Malformed, Tolerance
from fewstep.data.prepared import bucket_key, shard_name
from fewstep.system.bounds import read_json
from fewstep.system.errors import DataError
from fewstep.system.files import atomic_write
from fewstep.system.weights import load_metadata, save_weights
from fewstep.teachers.base import Codec
from fewstep.teachers.diffusers import DiffusersTeacher, Encoder
from fewstep.teachers.prompts import read_prompt_file

__all__ = ["Material", "prepare_images"]


@dataclass(frozen=True)
class Material:
    """Prompts to be encoded for a teacher, and captioned images if the method has a GAN.

    Attributes:
        teacher: the teacher.
        prompts: those given, then the images' captions, each once.
        images: pictures of the teacher's size, or latents that are encoded already.
        codec: the teacher's VAE, if there are pictures to encode by it.
        sizes: height and width of each bucket of pictures; empty: one size.
        bad: omitted items.
    """

    teacher: DiffusersTeacher
    prompts: list[str]
    images: Captioned | TextLatents | None = None
    codec: Codec | None = None
    sizes: tuple[Size, ...] = ()
    bad: Tolerance = field(default_factory=Tolerance)

    @classmethod
    def gather(
        cls,
        teacher: DiffusersTeacher,
        prompts: Path | None,
        images: Path | None,
        rule: CaptionRule = CaptionRule(),  # noqa: B008  (it is frozen)
        bad: Tolerance | None = None,
    ) -> Material:
        """Read a prompt file, and look through a place with images; one of the two may be None.

        `rule` says which column holds the caption, and what to make of missing captions and of lists; `bad` how many malformed
        items are left out.

        Raises:
            DataError, DataError, TeacherError: there is neither, or one of them cannot be read.
        """
        bad = bad or Tolerance()
        if prompts is None and images is None:
            raise DataError(
                "`--prompts` or `--images` must be given, got neither. Try: --prompts FILE, --images FOLDER, or both"
            )
        given = read_prompt_file(prompts, rule, bad) if prompts else []
        if images is None:
            return cls(teacher, given, bad=bad)
        if (images / "data.mdb").exists():
            if teacher.buckets:
                raise DataError(
                    f"teacher.buckets must be left out for latents, which {images} holds: they are of one size. Try: pictures"
                )
            latents = text_latents(images)
            return cls(teacher, list(dict.fromkeys([*given, *latents.captions])), latents, bad=bad)
        codec, sizes = teacher.codec_and_sizes()
        _, height, width = codec.shape if codec else teacher.load().shape
        pictures = captioned_images(images, (height, width), rule, bad)
        return cls(teacher, list(dict.fromkeys([*given, *pictures.captions])), pictures, codec, sizes, bad)

    def needs(self, encoder: Encoder, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[int, int]:
        """Estimate the bytes of prompts and images on disk, from encoding one of each."""
        prompt = sum(value.numel() for value in encoder(self.prompts[:1])[0].values()) * dtype.itemsize
        if self.images is None:
            return prompt * len(self.prompts), 0
        return prompt * len(self.prompts), _blank(self.images, self.codec, dtype, device).nbytes * len(
            self.images.captions
        )


def prepare_images(
    folder: Path,
    images: Captioned | TextLatents,
    prompts: Sequence[str],
    codec: Codec | None,
    dtype: torch.dtype = torch.float16,
    shard: int = 1_000,
    batch: int = 8,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda done: None,
    bad: Tolerance | None = None,
    sizes: Sequence[Size] = (),
) -> int:
    """Encode the missing ones of `images`; returns the number of existing ones.

    Args:
        folder: where the prompts were prepared.
        images: pictures, or latents that are encoded already.
        prompts: of that folder; every caption is one of them.
        codec: the teacher's codec; None: store pixels.
        dtype: dtype of stored latents.
        shard: images per file; a file with malformed images has fewer.
        batch: images per batch.
        device: the VAE's device.
        progress: called with the images done.
        bad: records images that cannot be decoded, which are omitted; None: the first is an error.
        sizes: height and width of each bucket; an image goes to the one of the nearest shape. None: all have one size.

    Raises:
        DataError: the folder holds other images, or latents of another VAE.
        DataError: an image that cannot be read, or too many.
    """
    bad = bad or Tolerance()
    number = {prompt: index for index, prompt in enumerate(prompts)}
    labels = torch.tensor([number[caption] for caption in images.captions])
    count, before = len(labels), len(bad.items)
    blank = _blank(images, codec, dtype, device)
    about: dict[str, Any] = {
        "encoder": "unknown" if isinstance(images, TextLatents) else codec.sha256 if codec else "pixels",
        "dtype": str(blank.dtype).removeprefix("torch."),
        "images": images.name,
        "content": images.fingerprint,
        "shape": [count, *blank.shape[1:]],
        "shard": shard,
    }
    if sizes:
        assert isinstance(images, Captioned), "latents have one size"
        about["buckets"] = [[*size, list(_blank(images, codec, dtype, device, size).shape[1:])] for size in sizes]
    if shard < 1 or batch < 1:
        raise DataError(f"shard and batch must be at least 1, got {shard} and {batch}. Try: leave them out")
    manifest = folder / "latents.json"
    if manifest.exists() and (present := read_json(manifest)) != about:
        name = next(name for name in about if present.get(name) != about[name])
        raise DataError(
            f"{folder} holds images prepared with {name} {present.get(name)}, not {about[name]}: choose another folder"
        )
    if not manifest.exists():  # before the first shard: an interrupted preparation resumes only with these images
        if any(folder.glob(shard_name(0).replace("00000", "*"))):
            raise DataError(f"{folder} holds shards of images that latents.json does not describe. Try: another folder")
        atomic_write(manifest, json.dumps(about, indent=2))
    found = 0
    for start in range(0, count, shard):
        path, stop = folder / shard_name(start // shard), min(start + shard, count)
        if path.exists() and path.with_suffix(".json").exists():
            found += stop - start
            bad.items += [(name, problem) for name, problem in load_metadata(path).get("malformed", ())]
        else:
            known, made = len(bad.items), Rows(images, labels, codec, dtype, device, batch, sizes)
            for begin in range(start, stop, batch):
                made.add(range(begin, min(begin + batch, stop)), bad)
                bad.check(count + before)
                progress(min(begin + batch, stop))
            tensors = made.tensors()
            rows = made.counts if sizes else sum(made.counts.values())
            save_weights(path, tensors, {"rows": rows, "malformed": bad.items[known:]})
        progress(stop)
    bad.check(count + before)
    return found


class Rows:
    """Samples of one shard with the numbers of their prompts and the frames of their pictures.

    Args:
        images: pictures, or latents that are encoded already.
        labels: number of each image's prompt.
        codec: encodes the pictures.
        dtype: of the latents.
        device: of the codec.
        batch: pictures encoded at once.
        sizes: of the buckets; empty for the images' own.

    Attributes:
        counts: samples by the names of their buckets; without buckets there is one with an empty name.
    """

    def __init__(
        self,
        images: Captioned | TextLatents,
        labels: Tensor,
        codec: Codec | None,
        dtype: torch.dtype,
        device: torch.device | str,
        batch: int,
        sizes: Sequence[Size],
    ) -> None:
        self.images, self.labels, self.codec, self.dtype = images, labels, codec, dtype
        self.device, self.batch, self.sizes = device, batch, sizes
        self.counts: dict[str, int] = {}
        self._tensors: dict[str, list[Tensor]] = {}
        self._waiting: dict[Size, list[tuple[int, Picture]]] = {}

    def add(self, indices: range, bad: Tolerance) -> None:
        """Encode these images; malformed ones are left out."""
        if isinstance(self.images, TextLatents):
            part = slice(indices.start, indices.stop)
            self._keep("", latents=self.images.images[part], prompt=self.labels[part])
            return
        _, _, height, width = self.images.images.shape
        found = self.images.images.attempt(indices, self.sizes or [(height, width)])
        for index, picture in zip(indices, found, strict=True):
            with bad.item(self.images.name_of(index)):
                if isinstance(picture, Malformed):
                    raise picture
                _, down, across = picture.pixels.shape
                self._waiting.setdefault((down, across), []).append((index, picture))
        for size, waiting in self._waiting.items():
            while len(waiting) >= self.batch:
                self._encode(size, waiting[: self.batch])
                del waiting[: self.batch]

    def _encode(self, size: Size, chosen: list[tuple[int, Picture]]) -> None:
        pixels = torch.from_numpy(np.stack([picture.pixels for _, picture in chosen]))
        self._keep(
            bucket_key(*size) if self.sizes else "",
            latents=_encoded(pixels, self.codec, self.dtype, self.device),
            prompt=self.labels[[index for index, _ in chosen]],
            frame=torch.tensor([picture.frame for _, picture in chosen], dtype=torch.int32),
        )

    def _keep(self, key: str, **tensors: Tensor) -> None:
        self.counts[key] = self.counts.get(key, 0) + len(tensors["latents"])
        for name, value in tensors.items():
            self._tensors.setdefault(f"{name}{key}", []).append(value)

    def tensors(self) -> dict[str, Tensor]:
        """Everything taken, by the names in a shard's file."""
        for size, waiting in self._waiting.items():
            if waiting:
                self._encode(size, waiting)
        self._waiting = {}
        return {name: torch.cat(parts) for name, parts in self._tensors.items()}


def _blank(
    images: Captioned | TextLatents,
    codec: Codec | None,
    dtype: torch.dtype,
    device: torch.device | str,
    size: Size | None = None,
) -> Tensor:
    """A sample of the images' form [1, ...], or of another size of pictures, from no image."""
    if isinstance(images, TextLatents):
        return images.images[:1]
    channels, height, width = images.images.shape[1:]
    return _encoded(torch.zeros(1, channels, *(size or (height, width)), dtype=torch.uint8), codec, dtype, device)


@torch.no_grad()
def _encoded(pixels: Tensor, codec: Codec | None, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return pixels if codec is None else codec.encode(to_unit(pixels).to(device)).to("cpu", dtype)
