"""Everything a text-to-image run reads, encoded once: prompts by the text encoders, captioned images by the VAE.

Writes one folder, which is both `teacher.prompts` and `data: {kind: prepared}`. Shards are written one by one, so that a
killed preparation goes on. The encoders leave memory when each is done.
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
from fewstep.data.image_files import Picture
from fewstep.data.malformed import Malformed, Tolerance
from fewstep.data.prepared import shard_name
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
        teacher: whose encoders.
        prompts: those given, then the images' captions, each once.
        images: pictures of the teacher's size, or latents that are encoded already.
        codec: the teacher's VAE, if there are pictures to encode by it.
        bad: items that were left out.
    """

    teacher: DiffusersTeacher
    prompts: list[str]
    images: Captioned | TextLatents | None = None
    codec: Codec | None = None
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
            raise DataError("nothing to prepare: give --prompts FILE, --images PLACE, or both")
        given = read_prompt_file(prompts, rule, bad) if prompts else []
        if images is None:
            return cls(teacher, given, bad=bad)
        if (images / "data.mdb").exists():
            latents = text_latents(images)
            return cls(teacher, list(dict.fromkeys([*given, *latents.captions])), latents, bad=bad)
        codec = teacher.codec()
        _, height, width = codec.shape if codec else teacher.load().shape
        pictures = captioned_images(images, (height, width), rule, bad)
        return cls(teacher, list(dict.fromkeys([*given, *pictures.captions])), pictures, codec, bad)

    def sizes(self, encoder: Encoder, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[int, int]:
        """Bytes that prompts and images will take on disk, from encoding one of each."""
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
) -> int:
    """Encode what is missing of `images`; returns how many were already there.

    Args:
        folder: where the prompts were prepared.
        images: pictures, or latents that are encoded already.
        prompts: of that folder; every caption is one of them.
        codec: the teacher's; None: pixels are kept as they are.
        dtype: how latents are kept.
        shard: images a file; one with malformed images has fewer.
        batch: images at a time.
        device: where the VAE runs.
        progress: called with the images done.
        bad: told of images that cannot be decoded, which are left out; None: the first is an error.

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
    if shard < 1 or batch < 1:
        raise DataError(f"shard and batch must be at least 1, got {shard} and {batch}. Try: leave them out")
    manifest = folder / "latents.json"
    if manifest.exists() and (present := json.loads(manifest.read_text())) != about:
        name = next(name for name in about if present.get(name) != about[name])
        raise DataError(
            f"{folder} holds images prepared with {name} {present.get(name)}, not {about[name]}: choose another folder"
        )
    if not manifest.exists():  # before the first shard: a preparation that was stopped goes on with these images only
        if any(folder.glob(shard_name(0).replace("00000", "*"))):
            raise DataError(
                f"{folder} holds shards of images of which latents.json says nothing: choose another folder"
            )
        atomic_write(manifest, json.dumps(about, indent=2))
    found = 0
    for start in range(0, count, shard):
        path, stop = folder / shard_name(start // shard), min(start + shard, count)
        if path.exists() and path.with_suffix(".json").exists():
            found += stop - start
            bad.items += [(name, problem) for name, problem in load_metadata(path).get("malformed", ())]
        else:
            known, made = len(bad.items), Rows(images, labels, codec, dtype, device, batch)
            for begin in range(start, stop, batch):
                made.add(range(begin, min(begin + batch, stop)), bad)
                bad.check(count + before)
                progress(min(begin + batch, stop))
            save_weights(path, made.tensors(), {"rows": made.count, "malformed": bad.items[known:]})
        progress(stop)
    bad.check(count + before)
    return found


class Rows:
    """Samples of one shard with the numbers of their prompts and the frames of their pictures.

    Args:
        images: pictures, or latents that are encoded already.
        labels: number of each image's prompt.
        codec, dtype, device, batch: see `prepare_images`.
    """

    def __init__(
        self,
        images: Captioned | TextLatents,
        labels: Tensor,
        codec: Codec | None,
        dtype: torch.dtype,
        device: torch.device | str,
        batch: int,
    ) -> None:
        self.images, self.labels, self.codec, self.dtype, self.device, self.batch = (
            images, labels, codec, dtype, device, batch,
        )  # fmt: skip
        self.count = 0
        self._samples: list[Tensor] = []
        self._prompts: list[Tensor] = []
        self._frames: list[Tensor] = []
        self._waiting: list[tuple[int, Picture]] = []

    def add(self, indices: range, bad: Tolerance) -> None:
        """Take these images, of which malformed ones are left out."""
        if isinstance(self.images, TextLatents):
            self._samples.append(self.images.images[indices.start : indices.stop])
            self._prompts.append(self.labels[indices.start : indices.stop])
            self.count += len(indices)
            return
        size = self.images.images.shape[2], self.images.images.shape[3]
        for index, picture in zip(indices, self.images.images.attempt(indices, [size]), strict=True):
            with bad.item(self.images.name_of(index)):
                if isinstance(picture, Malformed):
                    raise picture
                self._waiting.append((index, picture))
        while len(self._waiting) >= self.batch:
            self._encode()

    def _encode(self) -> None:
        chosen, self._waiting = self._waiting[: self.batch], self._waiting[self.batch :]
        pixels = torch.from_numpy(np.stack([picture.pixels for _, picture in chosen]))
        self._samples.append(_encoded(pixels, self.codec, self.dtype, self.device))
        self._prompts.append(self.labels[[index for index, _ in chosen]])
        self._frames.append(torch.tensor([picture.frame for _, picture in chosen], dtype=torch.int32))
        self.count += len(chosen)

    def tensors(self) -> dict[str, Tensor]:
        """Everything taken, by the names in a shard's file."""
        if self._waiting:
            self._encode()
        if not self._samples:
            blank = _blank(self.images, self.codec, self.dtype, self.device)[:0]
            return {"latents": blank, "prompt": self.labels[:0], "frame": torch.zeros(0, 4, dtype=torch.int32)}
        found = {"latents": torch.cat(self._samples), "prompt": torch.cat(self._prompts)}
        return found | ({"frame": torch.cat(self._frames)} if self._frames else {})


def _blank(
    images: Captioned | TextLatents, codec: Codec | None, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """A sample of the images' form [1, ...], from no image."""
    if isinstance(images, TextLatents):
        return images.images[:1]
    return _encoded(torch.zeros(1, *images.images.shape[1:], dtype=torch.uint8), codec, dtype, device)


@torch.no_grad()
def _encoded(pixels: Tensor, codec: Codec | None, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return pixels if codec is None else codec.encode(to_unit(pixels).to(device)).to("cpu", dtype)
