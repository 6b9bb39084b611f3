"""Feature extractors for comparing images: Inception, CLIP, a small net for 28x28 grey images, raw pixels.

Knows images (uint8) and weights files; knows nothing about metrics, data sets or diffusion.
"""

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from fewstep.evaluation.extractor import Extractor, exact_float32
from fewstep.evaluation.resize import centre, clean_resized, resized, square
from fewstep.evaluation.small_features import Pixels, SmallFeatures
from fewstep.system.console import quiet
from fewstep.system.errors import EvaluationError

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

ExtractorName = Literal["auto", "inception", "clip", "small", "pixels"]


class Inception(Extractor):
    """Inception-v3 of 2015-12-05 with TensorFlow's weights and resizing, 2048 features, as in published FIDs.

    The network is torch-fidelity's `inception-v3-compat`; grey images are repeated to three channels, any
    size is resized to 299x299 inside. Heusel et al. 2017, https://arxiv.org/abs/1706.08500; Obukhov et al.
    2020, https://github.com/toshas/torch-fidelity.

    Args:
        path: the weights file. Default: `$FEWSTEP_INCEPTION`, else `INCEPTION_FILE` in the torch hub cache.
        device: where the network runs.

    Raises:
        EvaluationError: no such file (the message names the source; nothing is downloaded), or another sha256.
    """

    dim = 2048

    def __init__(self, path: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        file = Path(path) if path is not None else inception_path()
        if not file.is_file():
            raise EvaluationError(_how_to_get_inception(file))
        content = file.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        if self.sha256 != INCEPTION_SHA256:
            raise EvaluationError(
                f"{file} is not the Inception network that FID is defined with: sha256 {self.sha256}, "
                f"expected {INCEPTION_SHA256}. {_how_to_get_inception(file)}"
            )
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # torch-fidelity unpickles its input: pass it the bytes whose hash was checked above
        net = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=io.BytesIO(content)
        )
        self._use("inception-v3-compat", net, device)

    @classmethod
    def random(cls, seed: int = 0, device: str | torch.device = "cpu") -> "Inception":
        """Make the same network with random weights (He initialisation), for tests; its scores mean nothing."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # the constructor always loads a file: give it an empty one
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
        # without the bias, as in Salimans et al.'s program and all published scores
        self.classifier = net.get_parameter("fc.weight").detach().float().cpu()

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if shape[0] not in (1, 3):
            raise EvaluationError(
                f"{self.name} takes images of 1 or 3 channels, got shape {list(shape)}: drop alpha, or use "
                "the 'pixels' extractor"
            )

    def _features(self, images: Tensor) -> Tensor:
        features: Tensor = self.net(images.expand(-1, 3, -1, -1))[0]
        return features

    def _of_fractions(self, images: Tensor) -> Tensor:
        # torch-fidelity's network takes only 8-bit pictures: pass the unrounded ones to its first layer, scaled as the
        # network scales
        first = self.net.get_submodule("Conv2d_1a_3x3")
        handle = first.register_forward_pre_hook(lambda layer, given: ((images - 128) / 128).expand(-1, 3, -1, -1))
        try:
            return self._features(images.to(torch.uint8))
        finally:
            handle.remove()


def inception_path() -> Path:
    """Path of Inception's weights: `$FEWSTEP_INCEPTION`, else the torch hub cache."""
    named = os.environ.get("FEWSTEP_INCEPTION")
    return Path(named) if named else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def _how_to_get_inception(looked_at: Path) -> str:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    default = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    return (
        f"Inception weights must be at {looked_at}. Try: `fewstep fetch inception` (96 MB), or download {URL_INCEPTION_V3} (sha256 "
        f"{INCEPTION_SHA256}) to {default}, or name the file in $FEWSTEP_INCEPTION. fewstep never downloads "
        "it by itself. Without them: --extractor pixels, which compares with nothing published, or 'small' for 28x28 grey images."
    )


class Clip(Extractor):
    """A CLIP model: images and texts in one space (Radford et al. 2021, https://arxiv.org/abs/2103.00020).

    Features are the projected image embeddings, not normalised, as CLIP-FID takes them; `texts` are a caption's. Resizing
    and normalisation are those of the folder's own preprocessor_config.json.

    Args:
        folder: folder of a `CLIPModel` of the transformers library, with tokenizer and image processor.
        device: the model's device.
        side: first crop pictures to their central square and resize them to this size (PIL, Lanczos), and use PIL for all
            resizing; None: pass them to the image processor unchanged.
        prefix: text before every caption.

    Attributes:
        id: name, eight digits of the hash, and the effect of `side` and `prefix`.

    Raises:
        EvaluationError: the folder cannot be read as a CLIP model, or transformers is not installed.
    """

    def __init__(
        self, folder: str | Path, device: str | torch.device = "cpu", side: int | None = None, prefix: str = ""
    ) -> None:
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise EvaluationError(
                f"`clip` must be the folder of a CLIP model (config.json, model.safetensors, tokenizer, preprocessor_config.json), got "
                f"{folder.absolute()}. Try: a copy of laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
            )
        try:
            import diffusers  # noqa: F401  (its log is silenced too)
            from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
        except ImportError:
            raise EvaluationError("a CLIP score needs transformers: pip install 'fewstep[t2i]'") from None
        if not (folder / "preprocessor_config.json").is_file():
            raise EvaluationError(
                f"{folder} must hold preprocessor_config.json, which sets resizing and normalisation, got none. Try: "
                "CLIPImageProcessor(...).save_pretrained(folder)"
            )
        try:
            with quiet():
                net = CLIPModel.from_pretrained(folder, local_files_only=True).float()
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise EvaluationError(f"{folder} cannot be read as a CLIP model: {str(error).splitlines()[0]}") from None
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
        """Embeddings float32 [N, dim] of captions, truncated to the model's length, on the CPU."""
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
            raise EvaluationError(f"{self.name} takes images of 1 or 3 channels, got shape {list(shape)}: drop alpha")

    def _features(self, images: Tensor) -> Tensor:
        if self.side is not None:
            # the processor's resizing differs from PIL's by up to a grey level: skip it for pictures of its size
            images = resized(resized(square(images), self.side), self._side(), Image.Resampling.BICUBIC)
        pixels = self.processor(images=list(images.expand(-1, 3, -1, -1)), return_tensors="pt").pixel_values
        return _projected(self.net.get_image_features(pixel_values=pixels.to(self.device)))

    def _side(self) -> int:
        """Pixels of the shorter side that the image processor resizes to."""
        return int(self.processor.size["shortest_edge"])


def _projected(output: Any) -> Tensor:
    """Unpack the output of transformers' `get_..._features`: a tensor, since version 5 inside a record."""
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found


class Framed(Extractor):
    """An extractor with fixed preprocessing, which its name states.

    `clean`: resized to 299 x 299 with PIL's antialiased bicubic filter in floating point, as in clean-fid (Parmar et al.
    2022, https://arxiv.org/abs/2104.11222), instead of TensorFlow's bilinear one without antialiasing. `patch`: the central
    299 x 299 pixels without resizing (patch FID, Chai et al. 2022, https://arxiv.org/abs/2204.07156, as in DMD2 and
    SDXL-Lightning).

    Args:
        inner: the extractor.
        frame: the preprocessing.
    """

    SIDE = 299  # Inception's

    def __init__(self, inner: Extractor, frame: Literal["clean", "patch"]) -> None:
        self.inner, self.frame = inner, frame
        self.name, self.dim, self.device = f"{inner.name}-{frame}{self.SIDE}", inner.dim, inner.device
        self.classifier = inner.classifier
        self.sha256 = hashlib.sha256(f"{inner.sha256} {frame} {self.SIDE} float".encode()).hexdigest()

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if self.frame == "patch" and min(shape[1:]) < self.SIDE:
            raise EvaluationError(f"images must be at least {self.SIDE} pixels wide for patch FID, got {list(shape)}")
        self.inner._check_shape((shape[0], self.SIDE, self.SIDE))

    def _features(self, images: Tensor) -> Tensor:
        if self.frame == "patch":
            top, left = (centre(side, self.SIDE) for side in images.shape[2:])
            return self.inner._features(images[:, :, top : top + self.SIDE, left : left + self.SIDE])
        return self.inner._of_fractions(clean_resized(images.cpu(), self.SIDE).to(images.device))


def extractor_for(
    shape: tuple[int, ...],
    name: ExtractorName = "auto",
    device: str | torch.device = "cpu",
    clip: str | Path | None = None,
) -> Extractor:
    """Make the extractor for images of a shape.

    `auto` means `SmallFeatures` for grey 28x28 images, `Pixels` for at most 256 values per image, else `Inception`.

    Args:
        shape: (C, H, W).
        name: "auto", "inception", "clip", "small" or "pixels".
        device: the extractor's device.
        clip: folder of the CLIP model, for "clip".

    Raises:
        EvaluationError: an unknown name, samples that are not pictures, an extractor that does not take this shape, or
            Inception's weights are not on this machine.
    """
    if len(shape) != 3:
        raise EvaluationError(f"samples must be pictures to be scored, got shape {list(shape)}")
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
            raise EvaluationError("`clip` must be given for the extractor 'clip', got none. Try: --clip FOLDER")
        extractor = Clip(clip, device)
    else:
        raise EvaluationError(f"`extractor` must be one of {', '.join(get_args(ExtractorName))}, got {name!r}")
    extractor._check_shape(tuple(shape))
    return extractor
