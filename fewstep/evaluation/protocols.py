"""Published evaluation protocols of text-to-image models: number and size of samples, preprocessing, extractor, CLIP model.

Knows extractors and references; knows nothing about models. A new protocol is an entry of `PROTOCOLS`. Settings that
contradict a protocol are refused, because their scores would not be comparable with published ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fewstep.data import ImageDataset, ImageFolder
from fewstep.evaluation.extractor import Extractor, file_sha256
from fewstep.evaluation.features import Clip, Framed
from fewstep.evaluation.reference import Reference, reference_for
from fewstep.evaluation.resize import centre
from fewstep.system.errors import EvaluationError

__all__ = ["PROTOCOLS", "ClipScore", "Protocol", "find_protocol"]


@dataclass(frozen=True)
class ClipScore:
    """Model and preprocessing of a published CLIP score.

    Attributes:
        name: display name.
        where: the folder to copy, by its name on the hub.
        sha256: hash of its model.safetensors; None: not checked.
        config: entries of its config.json, by dotted name.
        processor: entries of its preprocessor_config.json.
        side: first resize of the central square, in pixels (PIL, Lanczos).
        prefix: text before every caption.
    """

    name: str
    where: str
    sha256: str | None
    config: Mapping[str, Any]
    processor: Mapping[str, Any]
    side: int
    prefix: str

    def load(self, folder: str | Path, device: torch.device | str = "cpu") -> Clip:
        """Load the model from a folder; refuse any other model.

        Raises:
            EvaluationError: another architecture, weights or preprocessing, or not a readable CLIP model.
        """
        clip = Clip(folder, device, self.side, self.prefix)
        wrong = [
            f"{name} {found!r} instead of {wanted!r}"
            for entries, of in ((self.config, clip.net.config.to_dict()), (self.processor, clip.processor.to_dict()))
            for name, wanted in entries.items()
            if not _alike(found := _dig(of, name), wanted)
        ]
        weights = Path(folder) / "model.safetensors"
        if not wrong and self.sha256 is not None:
            if not weights.is_file():
                wrong = ["no model.safetensors, by which it is known"]
            elif (found := file_sha256(weights)) != self.sha256:
                wrong = [f"model.safetensors has sha256 {found} instead of {self.sha256}"]
        if wrong:
            raise EvaluationError(
                f"`clip` must be {self.name}, got {folder}: {wrong[0]}. Try: a copy of {self.where}, or leave --protocol out"
            )
        return clip


def _dig(values: Any, name: str) -> Any:
    for key in name.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _alike(found: Any, wanted: Any) -> bool:
    """Return whether two values are equal, allowing floats with fewer digits and mappings with more entries."""
    if isinstance(wanted, Mapping):
        return isinstance(found, Mapping) and all(_alike(found.get(key), value) for key, value in wanted.items())
    if isinstance(wanted, tuple):
        return isinstance(found, list | tuple) and len(found) == len(wanted) and all(map(_alike, found, wanted))
    if isinstance(wanted, float):
        return isinstance(found, int | float) and abs(found - wanted) < 1e-6
    return bool(found == wanted)


OPEN_CLIP_G = ClipScore(
    name="OpenCLIP ViT-g-14 (laion2b_s12b_b42k)",
    where="laion/CLIP-ViT-g-14-laion2B-s12B-b42K, with its model.safetensors",
    sha256="384d67c1233d709ed1901bfca2ca1ed014f7cb5740e84a7bc4b964b42c131b08",
    config={
        "projection_dim": 1024,
        "vision_config.hidden_size": 1408, "vision_config.num_hidden_layers": 40, "vision_config.num_attention_heads": 16,
        "vision_config.intermediate_size": 6144, "vision_config.patch_size": 14, "vision_config.image_size": 224,
        "vision_config.hidden_act": "gelu",
        "text_config.hidden_size": 1024, "text_config.num_hidden_layers": 24, "text_config.num_attention_heads": 16,
        "text_config.vocab_size": 49408, "text_config.max_position_embeddings": 77, "text_config.hidden_act": "gelu",
    },
    processor={
        "size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "resample": Image.Resampling.BICUBIC,
        "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True,
        "image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711),
    },
    side=256,
    prefix="A photo depicts ",
)  # fmt: skip
"""The CLIP score of DMD2's program: `compute_clip_score(clip_model="ViT-G/14")` in main/coco_eval/coco_evaluator.py of
https://github.com/tianweiy/DMD2. Its "ViT-G/14" is OpenCLIP's smaller ViT-g-14, not ViT-bigG-14."""


@dataclass(frozen=True)
class Protocol:
    """Settings of a published table.

    Attributes:
        name: value of `--protocol`.
        samples: number of images, one per caption, in the captions' order.
        native: side of the models' pictures in pixels.
        side: size of the central square of real and generated images for FID, in pixels (PIL, Lanczos).
        patch: whether to measure patch FID: central patches of the images at their own size, never resized.
        real: largest number of real images; None: any.
        about: source and requirements.
        clip: the CLIP score.
    """

    name: str
    samples: int
    native: int
    side: int
    patch: bool
    real: int | None
    about: str
    clip: ClipScore = field(default=OPEN_CLIP_G, repr=False)

    def check(self, samples: int, shape: Sequence[int], captions: int, extractor: str) -> None:
        """Refuse settings that contradict the protocol, before anything is loaded or drawn.

        Args:
            samples: images per model.
            shape: (C, H, W) of the models' pictures.
            captions: number of captions.
            extractor: the chosen extractor's name.

        Raises:
            EvaluationError: the first contradiction.
        """
        leave = "or leave --protocol out"
        if samples != self.samples:
            raise EvaluationError(
                f"`samples` must be {self.samples} for {self.name}, got {samples}. Try: leave --samples out, {leave}"
            )
        if extractor not in ("auto", "inception"):
            raise EvaluationError(f"`extractor` must be inception for {self.name}, got {extractor}. Try: auto, {leave}")
        channels, height, width = shape if len(shape) == 3 else (0, 0, 0)
        if channels != 3 or height != width or height < self.native or (self.patch and height != self.native):
            size = f"{self.native} x {self.native} pixels" + ("" if self.patch else " or more")
            raise EvaluationError(
                f"the model must draw colour images of {size} for {self.name}, got {list(shape)}. "
                f"Try: a model of that size, {leave}"
            )
        if captions != self.samples:
            raise EvaluationError(
                f"the model must have {self.samples:,} captions for {self.name}, got {captions:,}. "
                f"Try: --prompts with a folder of `fewstep prepare` for the protocol's captions, {leave}"
            )

    def measures(
        self, reference: str, extractor: Extractor
    ) -> tuple[Reference, Extractor, tuple[Reference, Extractor] | None]:
        """Make the reference and extractor of FID, and those of patch FID if the protocol has it.

        Args:
            reference: a folder of the real images at their original size.
            extractor: Inception.

        Raises:
            EvaluationError: the reference is not a folder of images, or holds more images than the protocol.
            DataError: an image cannot be read.
        """
        folder = Path(reference)
        if not folder.is_dir():
            raise EvaluationError(
                f"`reference` must be a folder of the real images for {self.name}, which crops and resizes them itself, got "
                f"{reference}. Try: unpack them, or leave --protocol out"
            )
        spec, whole = ImageFolder(path=folder), Framed(extractor, "clean")
        resized = spec.framed(self._square, f"torchvision-square-lanczos{self.side}")
        self._count(folder, resized)
        patches = None
        if self.patch:
            measure = Framed(extractor, "patch")
            patches = reference_for(spec.framed(_patch, f"torchvision-patch{Framed.SIDE}"), measure), measure
        return reference_for(resized, whole), whole, patches

    def _count(self, folder: Path, images: ImageDataset) -> None:
        if self.real is not None and len(images) > self.real:
            raise EvaluationError(
                f"`reference` must hold at most {self.real:,} images for {self.name}, those of its captions, got {folder} with "
                f"{len(images):,}. Try: the authors' subset, or leave --protocol out"
            )

    def _square(self, picture: Image.Image) -> Image.Image:
        side = min(picture.size)
        left, top = (centre(whole, side) for whole in picture.size)
        square = picture.crop((left, top, left + side, top + side))
        return square.resize((self.side, self.side), Image.Resampling.LANCZOS)


def _patch(picture: Image.Image) -> Image.Image:
    """Crop the central patch; a smaller picture is stretched to it, as in DMD2's program."""
    side = Framed.SIDE
    if min(picture.size) < side:
        return picture.resize((side, side), Image.Resampling.BICUBIC)
    left, top = (centre(whole, side) for whole in picture.size)
    return picture.crop((left, top, left + side, top + side))


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "coco-30k", 30_000, 512, 256, False, None,
            "Zero-shot FID of SD1.5 as DMD (arXiv 2311.18828, section 4.4) and DMD2 (arXiv 2405.14867, section 5.3) report it: captions "
            "and images of COCO's val2014, 30,000 captions.",
        ),
        Protocol(
            "sdxl-10k", 10_000, 1024, 512, True, 10_000,
            "FID, patch FID and CLIP score of SDXL as DMD2 reports them (arXiv 2405.14867, table 3): the authors' 10,000 captions and "
            "images of COCO 2014 (coco10k.zip: all_prompts.pkl and subset/).",
        ),
    )
}  # fmt: skip


def find_protocol(name: str) -> Protocol:
    """Find a protocol by name.

    Raises:
        EvaluationError: no such protocol.
    """
    if name not in PROTOCOLS:
        raise EvaluationError(f"`protocol` must be one of {', '.join(PROTOCOLS)}, got {name!r}")
    return PROTOCOLS[name]
