"""Everything a text-to-image run reads, encoded once: prompts by the text encoders, captioned images by the VAE.

Writes one folder, which is both `teacher.prompts` and `data: {kind: prepared}`. Shards are written one by one, so that a
killed preparation goes on. The encoders leave memory when each is done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data import Captioned, CaptionRule, TextLatents, captioned_images, text_latents, to_unit
from fewstep.data.prepared import shard_name
from fewstep.system.errors import DataError
from fewstep.system.files import atomic_write
from fewstep.system.weights import save_weights
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
    """

    teacher: DiffusersTeacher
    prompts: list[str]
    images: Captioned | TextLatents | None = None
    codec: Codec | None = None

    @classmethod
    def gather(
        cls,
        teacher: DiffusersTeacher,
        prompts: Path | None,
        images: Path | None,
        rule: CaptionRule = CaptionRule(),  # noqa: B008  (it is frozen)
    ) -> Material:
        """Read a prompt file, and look through a place with images; one of the two may be None.

        `rule` says which column holds the caption, and what to make of missing captions and of lists.

        Raises:
            DataError, DataError, TeacherError: there is neither, or one of them cannot be read.
        """
        if prompts is None and images is None:
            raise DataError("nothing to prepare: give --prompts FILE, --images PLACE, or both")
        given = read_prompt_file(prompts, rule) if prompts else []
        if images is None:
            return cls(teacher, given)
        if (images / "data.mdb").exists():
            latents = text_latents(images)
            return cls(teacher, list(dict.fromkeys([*given, *latents.captions])), latents)
        codec = teacher.codec()
        _, height, width = codec.shape if codec else teacher.load().shape
        pictures = captioned_images(images, (height, width), rule)
        return cls(teacher, list(dict.fromkeys([*given, *pictures.captions])), pictures, codec)

    def sizes(self, encoder: Encoder, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[int, int]:
        """Bytes that prompts and images will take on disk, from encoding one of each."""
        prompt = sum(value.numel() for value in encoder(self.prompts[:1])[0].values()) * dtype.itemsize
        if self.images is None:
            return prompt * len(self.prompts), 0
        image = _encoded(self.images, slice(0, 1), self.codec, dtype, device).nbytes
        return prompt * len(self.prompts), image * len(self.images.captions)


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
) -> int:
    """Encode what is missing of `images`; returns how many were already there.

    Args:
        folder: where the prompts were prepared.
        images: pictures, or latents that are encoded already.
        prompts: of that folder; every caption is one of them.
        codec: the teacher's; None: pixels are kept as they are.
        dtype: how latents are kept.
        shard: images a file.
        batch: images at a time.
        device: where the VAE runs.
        progress: called with the images done.

    Raises:
        DataError: the folder holds other images, or latents of another VAE.
        DataError: an image that cannot be read.
    """
    number = {prompt: index for index, prompt in enumerate(prompts)}
    labels = torch.tensor([number[caption] for caption in images.captions])
    count = len(labels)
    first = _encoded(images, slice(0, 1), codec, dtype, device)
    about: dict[str, Any] = {
        "encoder": "unknown" if isinstance(images, TextLatents) else codec.sha256 if codec else "pixels",
        "dtype": str(first.dtype).removeprefix("torch."),
        "images": images.name,
        "content": images.fingerprint,
        "shape": [count, *first.shape[1:]],
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
        else:
            parts = []
            for begin in range(start, stop, batch):
                parts.append(_encoded(images, slice(begin, min(begin + batch, stop)), codec, dtype, device))
                progress(min(begin + batch, stop))
            save_weights(path, {"latents": torch.cat(parts), "prompt": labels[start:stop]}, {})
        progress(stop)
    return found


@torch.no_grad()
def _encoded(
    images: Captioned | TextLatents, rows: slice, codec: Codec | None, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    stored = images.images[rows]
    if isinstance(images, TextLatents) or codec is None:
        return stored
    return codec.encode(to_unit(stored).to(device)).to("cpu", dtype)
