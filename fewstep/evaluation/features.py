"""Feature extractors that images are compared in: Inception, CLIP, a small net for 28x28 grey images, raw pixels.

Knows images (uint8) and weights files; knows nothing about metrics, data sets or diffusion.
"""

import hashlib
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from fewstep.system.tracking import quiet

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
ASSETS = resources.files("fewstep") / "assets" / "features"

ExtractorName = Literal["auto", "inception", "clip", "small", "pixels"]


class FeatureError(ValueError):
    """A feature extractor that cannot be had, or images that it cannot take."""


class MissingWeights(FeatureError):
    """A weights file that is not on this machine and is never downloaded silently."""


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Float32 arithmetic as written: no autocast, no TF32, no bf16 inside float32 matmuls and convolutions.

    A trainer that asks for fast matmuls (`torch.set_float32_matmul_precision("medium")`) would otherwise
    change the features, and with them every FID, without a word.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class Extractor(ABC):
    """A fixed map from images to feature vectors; the same image gives the same vector in any batch.

    Attributes:
        name: short name, part of the protocol id of every number.
        sha256: hash of the weights, so that statistics made with other weights are refused.
        dim: length of one feature vector.
        classifier: float32 [classes, dim], which takes features to the logits of an Inception score; None if there is
            no such thing.
    """

    name: str
    sha256: str
    dim: int
    device: torch.device
    classifier: Tensor | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of a batch.

        Args:
            images: uint8 [B, C, H, W], values 0..255, on any device.

        Returns:
            float32 [B, dim] on the CPU.

        Raises:
            FeatureError: not uint8, not four-dimensional, or of a shape that this extractor does not take.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise FeatureError(
                f"{self.name} takes uint8 images [B, C, H, W], got {images.dtype} {list(images.shape)}: "
                "convert images in [-1, 1] with fewstep.data.to_uint8"
            )
        self._check_shape(tuple(images.shape[1:]))
        with exact_float32(self.device):
            return self._features(images.to(self.device)).float().cpu()

    @abstractmethod
    def _check_shape(self, shape: tuple[int, ...]) -> None: ...

    @abstractmethod
    def _features(self, images: Tensor) -> Tensor: ...

    def _of_fractions(self, images: Tensor) -> Tensor:
        """Features of pictures that were resized before: float32 [B, 3, H, W] in 0..255."""
        return self._features(images.round().to(torch.uint8))


class Inception(Extractor):
    """Inception-v3 of 2015-12-05 with TensorFlow's weights and resizing, 2048 features, as in published FIDs.

    The network is torch-fidelity's `inception-v3-compat`; grey images are repeated to three channels, any
    size is resized to 299x299 inside. Heusel et al. 2017, https://arxiv.org/abs/1706.08500; Obukhov et al.
    2020, https://github.com/toshas/torch-fidelity.

    Args:
        path: the weights file. Default: `$FEWSTEP_INCEPTION`, else `INCEPTION_FILE` in the torch hub cache.
        device: where the network runs.

    Raises:
        MissingWeights: no such file; the message says where to get it. Nothing is ever downloaded here.
        FeatureError: the file is not the known one (its sha256 differs).
    """

    dim = 2048

    def __init__(self, path: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        file = Path(path) if path is not None else inception_path()
        if not file.is_file():
            raise MissingWeights(_how_to_get_inception(file))
        content = file.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        if self.sha256 != INCEPTION_SHA256:
            raise FeatureError(
                f"{file} is not the Inception network that FID is defined with: sha256 {self.sha256}, "
                f"expected {INCEPTION_SHA256}. {_how_to_get_inception(file)}"
            )
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # torch-fidelity unpickles what it is given: it gets the very bytes whose hash was checked above.
        net = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=io.BytesIO(content)
        )
        self._use("inception-v3-compat", net, device)

    @classmethod
    def random(cls, seed: int = 0, device: str | torch.device = "cpu") -> "Inception":
        """The same network with random weights (He initialisation), for tests: its numbers mean nothing."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # The constructor insists on loading a file: here it loads an empty one, into nothing.
        unloaded = type("Random", (FeatureExtractorInceptionV3,), {"load_state_dict": lambda self, _: None})
        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = unloaded("inception-random", ["2048"], feature_extractor_weights_path=nothing)
            for module in net.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)
        digest = hashlib.sha256()
        for tensor in net.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        self = cls.__new__(cls)
        self.sha256 = digest.hexdigest()
        self._use("inception-random", net, device)
        return self

    def _use(self, name: str, net: nn.Module, device: str | torch.device) -> None:
        self.name = name
        self.device = torch.device(device)
        self.net = net.to(self.device)
        # without its bias: Salimans et al.'s own program leaves it out, and so do all published scores
        self.classifier = net.fc.weight.detach().float().cpu()

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if shape[0] not in (1, 3):
            raise FeatureError(
                f"{self.name} takes images of 1 or 3 channels, got shape {list(shape)}: drop alpha, or use "
                "the 'pixels' extractor"
            )

    def _features(self, images: Tensor) -> Tensor:
        features: Tensor = self.net(images.expand(-1, 3, -1, -1))[0]
        return features

    def _of_fractions(self, images: Tensor) -> Tensor:
        # torch-fidelity's network takes 8-bit pictures only: its first layer is handed the unrounded ones, scaled as
        # the network scales
        first = self.net.Conv2d_1a_3x3
        handle = first.register_forward_pre_hook(lambda layer, given: ((images - 128) / 128).expand(-1, 3, -1, -1))
        try:
            return self._features(images.to(torch.uint8))
        finally:
            handle.remove()


def inception_path() -> Path:
    """Where Inception's weights are looked for: `$FEWSTEP_INCEPTION`, else the torch hub cache."""
    named = os.environ.get("FEWSTEP_INCEPTION")
    return Path(named) if named else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def _how_to_get_inception(looked_at: Path) -> str:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    default = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    return (
        f"Inception weights wanted at {looked_at}: download {URL_INCEPTION_V3} (96 MB, sha256 "
        f"{INCEPTION_SHA256}) to {default}, or name the file in $FEWSTEP_INCEPTION. fewstep never downloads "
        "it by itself. For 28x28 grey images choose the extractor 'small' instead, which ships with fewstep."
    )


class Clip(Extractor):
    """A CLIP model: images and texts in one space (Radford et al. 2021, https://arxiv.org/abs/2103.00020).

    Features are the projected image embeddings, not normalised, as CLIP-FID takes them; `texts` are a caption's. Resizing
    and normalisation are those of the folder's own preprocessor_config.json.

    Args:
        folder: of a `CLIPModel` of the transformers library, with tokenizer and image processor.
        device: where it runs.
        side: pictures are cropped to their central square and resized to so many pixels first (PIL, Lanczos), and all
            resizing is PIL's; None: they are given to the image processor as they are.
        prefix: stands before every caption.

    Attributes:
        id: name, eight digits of the hash, and what `side` and `prefix` change.

    Raises:
        FeatureError: the folder cannot be read as one, or transformers is not installed.
    """

    def __init__(
        self, folder: str | Path, device: str | torch.device = "cpu", side: int | None = None, prefix: str = ""
    ) -> None:
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FeatureError(
                f"no CLIP model at {folder.absolute()}: give a folder with config.json, model.safetensors, tokenizer and "
                "preprocessor_config.json, such as a copy of laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
            )
        try:
            import diffusers  # noqa: F401  (its log is silenced too)
            from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
        except ImportError:
            raise FeatureError("a CLIP score needs transformers: pip install 'fewstep[t2i]'") from None
        if not (folder / "preprocessor_config.json").is_file():
            raise FeatureError(
                f"{folder} has no preprocessor_config.json, which says how pictures are resized and normalised: "
                "CLIPImageProcessor(...).save_pretrained(folder) writes it"
            )
        try:
            with quiet():
                net = CLIPModel.from_pretrained(folder, local_files_only=True).float()
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise FeatureError(f"{folder} cannot be read as a CLIP model: {str(error).splitlines()[0]}") from None
        self.device, self.side, self.prefix = torch.device(device), side, prefix
        self.net = net.eval().requires_grad_(False).to(self.device)
        self.dim = int(net.config.projection_dim)
        self.name = f"clip-{folder.resolve().name}"
        digest = hashlib.sha256()
        for name, value in self.net.state_dict().items():
            digest.update(f"{name} {list(value.shape)}\n".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        for file in sorted(file for ending in ("json", "txt", "model") for file in folder.glob(f"*.{ending}")):
            digest.update(file.name.encode() + file.read_bytes())  # configuration, tokenizer, image processor
        self.sha256 = digest.hexdigest()
        frame = [f"lanczos{side}"] if side else []
        self.id = "/".join(
            [f"{self.name}-{self.sha256[:8]}", *frame, *([f"prefix {prefix.strip()!r}"] if prefix else [])]
        )

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """Embeddings float32 [N, dim] of captions, cut at the model's length, on the CPU."""
        length = self.net.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            [self.prefix + caption for caption in captions],
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        with exact_float32(self.device):
            embedded = self.net.get_text_features(**tokens)
        return _projected(embedded).float().cpu()

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if shape[0] not in (1, 3):
            raise FeatureError(f"{self.name} takes images of 1 or 3 channels, got shape {list(shape)}: drop alpha")

    def _features(self, images: Tensor) -> Tensor:
        if self.side is not None:
            # the processor's own resizing differs from PIL's by up to a grey level: what has its size is left alone
            images = resized(resized(square(images), self.side), self._side(), Image.Resampling.BICUBIC)
        pixels = self.processor(images=list(images.expand(-1, 3, -1, -1)), return_tensors="pt").pixel_values
        return _projected(self.net.get_image_features(pixel_values=pixels.to(self.device)))

    def _side(self) -> int:
        """Pixels of the shorter side that the image processor resizes to."""
        return int(self.processor.size["shortest_edge"])


def _projected(output: Any) -> Tensor:
    """What transformers' `get_..._features` returned: a tensor, since version 5 in a record."""
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found


class Framed(Extractor):
    """Another extractor behind a fixed frame: what is done to pictures before they reach it, said in its name.

    `clean`: resized to 299 x 299 by PIL's antialiased bicubic filter in floating point, as clean-fid does (Parmar et al.
    2022, https://arxiv.org/abs/2104.11222), instead of TensorFlow's bilinear one without antialiasing. `patch`: the central
    299 x 299 pixels as they are (patch FID, Chai et al. 2022, https://arxiv.org/abs/2204.07156, as DMD2 and
    SDXL-Lightning use it).

    Args:
        inner: what measures.
        frame: how pictures reach it.
    """

    SIDE = 299  # Inception's

    def __init__(self, inner: Extractor, frame: Literal["clean", "patch"]) -> None:
        self.inner, self.frame = inner, frame
        self.name, self.dim, self.device = f"{inner.name}-{frame}{self.SIDE}", inner.dim, inner.device
        self.classifier = inner.classifier
        self.sha256 = hashlib.sha256(f"{inner.sha256} {frame} {self.SIDE} float".encode()).hexdigest()

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if self.frame == "patch" and min(shape[1:]) < self.SIDE:
            raise FeatureError(f"patches are {self.SIDE} pixels wide, the images {list(shape)}: leave patch FID out")
        self.inner._check_shape((shape[0], self.SIDE, self.SIDE))

    def _features(self, images: Tensor) -> Tensor:
        if self.frame == "patch":
            top, left = (centre(side, self.SIDE) for side in images.shape[2:])
            return self.inner._features(images[:, :, top : top + self.SIDE, left : left + self.SIDE])
        return self.inner._of_fractions(_clean(images.cpu(), self.SIDE).to(images.device))


def file_sha256(file: Path) -> str:
    """The sha256 (hex) of a file of any size."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()


def centre(whole: int, part: int) -> int:
    """Where a central crop begins, rounded as torchvision's `center_crop` rounds: half pixels to the even side."""
    return round((whole - part) / 2)


def square(images: Tensor) -> Tensor:
    """The central square of images [B, C, H, W]."""
    side = min(images.shape[2:])
    top, left = (centre(whole, side) for whole in images.shape[2:])
    return images[:, :, top : top + side, left : left + side]


def resized(images: Tensor, side: int, filter: Image.Resampling = Image.Resampling.LANCZOS) -> Tensor:
    """Square images uint8 [B, C, H, H] at `side` pixels, by PIL's antialiased filters, channel by channel."""
    if images.shape[2:] == (side, side):
        return images
    planes = [
        np.asarray(Image.fromarray(plane.numpy()).resize((side, side), filter)) for plane in images.cpu().flatten(0, 1)
    ]
    return torch.from_numpy(np.stack(planes)).unflatten(0, images.shape[:2])


def _clean(images: Tensor, side: int) -> Tensor:
    """uint8 [B, C, H, W] as float32 [B, C, side, side] in 0..255: bicubic in floating point, nothing rounded."""
    planes = [
        np.asarray(Image.fromarray(plane.numpy()).resize((side, side), Image.Resampling.BICUBIC))
        for plane in images.float().flatten(0, 1)
    ]
    return torch.from_numpy(np.stack(planes)).clamp(0, 255).unflatten(0, images.shape[:2])


class SmallNet(nn.Sequential):
    """The classifier behind `SmallFeatures`: four convolutions with batch norm, 64 ReLU features, 10 classes.

    Takes float [B, 1, 28, 28] in [-1, 1]. The 7x7 map is flattened, not pooled, so that the features keep
    where things are.
    """

    def __init__(self) -> None:
        def block(c_in: int, c_out: int, stride: int) -> list[nn.Module]:
            return [
                nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(),
            ]

        layers = [*block(1, 24, 1), *block(24, 48, 2), *block(48, 64, 2), *block(64, 32, 1)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10))


class SmallFeatures(Extractor):
    """64 penultimate ReLU features of a small Fashion-MNIST classifier that ships with fewstep, for grey images.

    Made for 28x28; other sizes are resized to that inside (bilinear, antialiased), as Inception resizes to 299x299.
    Trained by `tools/train_features.py features`; its model card says how and how well. Distances in it
    compare only with distances in it, never with an Inception FID.

    Args:
        device: where the network runs.

    Raises:
        FeatureError: the shipped weights do not match their card.
    """

    dim = 64

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.name = "small64"
        self.device = torch.device(device)
        weights, self.card = load_asset("small64")
        self.sha256 = self.card["sha256"]
        net = SmallNet()
        net.load_state_dict(weights)
        without_head = nn.Sequential(*list(net)[:-1])
        self.net = without_head.eval().requires_grad_(False).to(self.device)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if shape[0] != 1:
            raise FeatureError(
                f"{self.name} takes grey images [1, H, W], got {list(shape)}: use the extractor "
                "'inception', or 'pixels' for tiny images"
            )

    def _features(self, images: Tensor) -> Tensor:
        images = images.float() / 127.5 - 1
        if images.shape[2:] != (28, 28):
            images = nn.functional.interpolate(images, size=(28, 28), mode="bilinear", antialias=True)
        features: Tensor = self.net(images)
        return features


class Pixels(Extractor):
    """The pixels themselves, in [0, 1], flattened over C, H, W: for images as tiny as 8x8 digits.

    Args:
        shape: (C, H, W) of the images.
        device: where the (trivial) work is done.
    """

    sha256 = hashlib.sha256(b"fewstep.evaluation.features.Pixels: uint8 / 255, flattened C, H, W").hexdigest()

    def __init__(self, shape: tuple[int, int, int], device: str | torch.device = "cpu") -> None:
        self.shape = tuple(shape)
        self.dim = shape[0] * shape[1] * shape[2]
        self.name = f"pixels{self.dim}"
        self.device = torch.device(device)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if shape != self.shape:
            raise FeatureError(f"{self.name} was made for images {list(self.shape)}, got {list(shape)}")

    def _features(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() / 255


def extractor_for(
    shape: tuple[int, int, int],
    name: ExtractorName = "auto",
    device: str | torch.device = "cpu",
    clip: str | Path | None = None,
) -> Extractor:
    """The extractor for images of a shape.

    `auto` is: grey 28x28 -> `SmallFeatures`; at most 256 numbers per image -> `Pixels`; all else ->
    `Inception`.

    Args:
        shape: (C, H, W).
        name: "auto", or one of "inception", "clip", "small", "pixels" to choose.
        device: where it runs.
        clip: folder of the CLIP model, if that is chosen.

    Raises:
        FeatureError: an unknown name, or an extractor that does not take this shape.
        MissingWeights: Inception is needed and its weights are not on this machine.
    """
    if name == "auto":
        if tuple(shape) == (1, 28, 28):
            name = "small"
        elif shape[0] * shape[1] * shape[2] <= 256:
            name = "pixels"
        else:
            name = "inception"
    extractor: Extractor
    if name == "small":
        extractor = SmallFeatures(device)
    elif name == "pixels":
        extractor = Pixels(shape, device)
    elif name == "inception":
        extractor = Inception(device=device)
    elif name == "clip":
        if clip is None:
            raise FeatureError("the extractor 'clip' is a model of your choice: say where it is (--clip FOLDER)")
        extractor = Clip(clip, device)
    else:
        raise FeatureError(f"unknown feature extractor {name!r}: use {', '.join(get_args(ExtractorName))}")
    extractor._check_shape(tuple(shape))
    return extractor


def load_asset(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A network that ships with fewstep: its weights and its model card (JSON), checked against each other.

    Raises:
        FeatureError: the weights are not the ones that the card describes.
    """
    content = (ASSETS / f"{name}.safetensors").read_bytes()
    card = json.loads((ASSETS / f"{name}.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(content).hexdigest()
    if digest != card["sha256"]:
        raise FeatureError(
            f"{ASSETS}/{name}.safetensors has sha256 {digest}, its card says {card['sha256']}: reinstall "
            "fewstep, or train it again with tools/train_features.py"
        )
    return load(content), card
