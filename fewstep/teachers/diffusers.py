"""Text-to-image teachers: pipelines of the diffusers library, from a folder, the hub, or one .safetensors file.

Prediction type, noise table or flow shift, scaling factors and the empty condition come from the pipeline's own files;
how each kind of network is called is `fewstep.networks.diffusers_net`'s business. The text encoders are needed once, by
`fewstep prepare`; a distillation reads their embeddings from disk (`fewstep.teachers.prompts`).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Preconditioned
from fewstep.diffusion.noise import Discrete, scaled_linear_alphas_cumprod
from fewstep.formats.lora import Factors, LoraFile, merge
from fewstep.formats.lora_reading import read_lora
from fewstep.formats.model import DenoiserSpec
from fewstep.networks import FAMILIES, DiffusersSpec, Family
from fewstep.system.console import note, quiet
from fewstep.system.errors import FileError, TeacherError
from fewstep.system.out_folder import marker
from fewstep.system.weights import first_not_finite
from fewstep.teachers.base import Codec, NoPrompts, Teacher
from fewstep.teachers.encoding import Encoder, TextOptions, encode_arguments
from fewstep.teachers.facts import (
    Betas,
    Latents,
    LatentScaling,
    change_scheduler,
    file_marks,
    prediction_of,
    refuse_other_tasks,
    schedule_of,
)
from fewstep.teachers.loading import (
    LACKING,
    absent_parts,
    component_class,
    find_place,
    load_parts,
    refuse_missing_weights,
)
from fewstep.teachers.prompts import Prompts, prepare_prompts

__all__ = ["DiffusersTeacher"]

Part = Literal["whole", "text", "networks", "vae"]
KNOWN = {  # configurations at hand, so that `plan` needs no network
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0",),
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"),
    "sd35-medium": ("stabilityai/stable-diffusion-3.5-medium",),
    "flux": ("black-forest-labs/FLUX.1-dev",),
}
TINY = ("madebyollin/taesd", "madebyollin/taesdxl")  # these have the library's default configuration
FLUX, FLUX_SIDE = "FluxTransformer2DModel", 128  # its configuration does not say the side of a sample
LATENT_STEP = 8  # pixels a latent of Stable Diffusion's VAE, if the pipeline has none to ask


class DiffusersTeacher(BaseModel):
    """A text-to-image pipeline: Stable Diffusion 1.5, 2.1, 3 or 3.5, SDXL, FLUX, SANA, PixArt, or a fine-tune of one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["diffusers"] = "diffusers"
    path: str
    """A pipeline's folder, its name on the hub, or a single .safetensors file."""
    prompts: Path | None = None
    """Folder of prepared prompts (`fewstep prepare`)."""
    lora: Path | None = None
    """A LoRA file or folder (kohya's, PEFT's, diffusers', ComfyUI's) that is merged into the network and the text encoders
    first: the teacher is your fine-tune."""
    lora_scale: float = 1.0
    """Its strength."""
    resolution: int | None = Field(None, gt=0)
    """Side of the pictures in pixels; null: the model's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen weights. bfloat16 halves them; student and fake score are float32 all the same."""
    tiny_vae: str | None = None
    """A small decoder (`AutoencoderTiny`: TAESD, TAESDXL; a folder or hub name) for pictures and perceptual distances
    during training; null: the pipeline's VAE."""
    variant: str | None = None
    """Which files of a folder to read, such as fp16."""
    config: str | None = None
    """For a single .safetensors file: a pipeline folder of the same kind, whose configuration, scheduler and tokenizers
    are used; null: diffusers fetches that from the hub."""
    prediction: Literal["eps", "v", "x0"] | None = None
    """What the network predicts; null: what the file's marks or the scheduler's configuration say."""
    zero_snr: bool | None = None
    """Whether the noise table is rescaled to end without signal (zero terminal SNR); null: likewise."""
    betas: Betas = Betas()
    """The noise table."""
    shift: float | None = Field(None, gt=0)
    """Shift of a flow's noise levels; null: the scheduler's, which may depend on the resolution (FLUX)."""
    latents: Latents = Latents()
    """What the VAE's latents are scaled by."""
    guidance_input: float | None = None
    """Guidance that a network is told as an input (FLUX.1-dev); null: the default of its pipeline, 3.5."""
    text: TextOptions = TextOptions()
    """How prompts are encoded; what is null is the default of the pipeline's own call."""
    without: tuple[str, ...] = ()
    """Components that are left out, such as text_encoder_3 and tokenizer_3 (SD3's T5, whose tokens are then zeros)."""

    @field_validator("path", "config")
    @classmethod
    def _home(cls, value: str | None) -> str | None:
        return str(Path(value).expanduser()) if value is not None and value.startswith("~") else value

    @model_validator(mode="after")
    def _used(self) -> DiffusersTeacher:
        if self.lora is None and self.lora_scale != 1.0:
            raise ValueError(
                f"lora_scale {self.lora_scale:g} is the strength of a lora: name that too, or leave lora_scale out"
            )
        if self.config is not None and not _is_file(self.path):
            raise ValueError(f"config is for a single .safetensors file, {self.path} has its own: leave config out")
        if self.variant is not None and _is_file(self.path):
            raise ValueError("variant chooses among the files of a folder, path is a single file: leave variant out")
        return self

    def load(self) -> Teacher:
        """The denoiser, with prepared prompts if there are any.

        Raises:
            TeacherError: it cannot be read, or is of a kind that is not known here.
            DataError: the prepared prompts are another model's.
        """
        pipeline = self.pipeline("networks")
        network, family = _network(pipeline)
        side = self._side(pipeline, network.config)
        schedule = schedule_of(pipeline.scheduler, self.path, side)
        spec = DenoiserSpec(
            net=DiffusersSpec(
                model=type(network).__name__,
                config=_config(network),
                height=side,
                width=side,
                channels=_channels(pipeline, network),
            ),
            schedule=schedule,
            prediction=prediction_of(pipeline.scheduler, schedule, self.path),
        )

        def around(network: nn.Module, dtype: str) -> Preconditioned:
            with torch.device("meta"):
                made = spec.build()
            with quiet():
                made.net.model = network.to(getattr(torch, dtype))  # loaded once: no second copy is filled
            return made

        denoiser = around(network, self.dtype).requires_grad_(False).eval()
        if (bad := first_not_finite(network.state_dict())) is not None:
            raise TeacherError(
                f"{self.path} must hold finite weights, got NaN or infinite numbers in {bad}: get it again"
            )

        def start() -> Preconditioned:
            if self.dtype == "float32":
                made = copy.deepcopy(denoiser)
            else:  # the frozen weights are rounded; those that are trained start from the file's, which are read again
                made = around(_network(self.pipeline("networks"))[0], "float32")
            return made.requires_grad_(True).train()

        codec = self._codec(pipeline, side)
        if codec is not None and self.tiny_vae is not None:
            decode, sha256 = self._tiny_decoder()
            codec = replace(codec, decode=decode, decoder=sha256)
        constants = self._constants(family, network.config, codec.shape[1] if codec else side)
        prompts = (
            None
            if self.prompts is None
            else Prompts(self.prompts, {"encoders": self.encoders_fingerprint()}, constants)
        )
        return Teacher(
            name=self.path,
            denoiser=denoiser,
            shape=spec.net.sample_shape,
            conditioner=prompts or NoPrompts(self.path),
            student_spec=spec,
            start=start,
            bottleneck=spec.net.bottleneck,
            sha256=_weights_sha256(network),
            card={},
            codec=codec,
            save=self._save,
            guided_inside=family.guided_inside(network.config),
        )

    def _save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """The whole pipeline with a denoiser's weights in its network."""
        pipeline = self.pipeline()
        network, _ = _network(pipeline)
        start = "net.model."
        network.load_state_dict({name.removeprefix(start): value for name, value in weights.items() if start in name})
        with quiet():
            pipeline.save_pretrained(folder, safe_serialization=True)

    def outline(self) -> tuple[DenoiserSpec, dict[str, Tensor]]:
        """What the network is and the condition of one sample (without storage), from configurations alone: no weights are read.

        Raises:
            TeacherError: there is no configuration, and the model is none of those known by name.
        """
        _library()  # says what to install
        model, unet, vae = self._configurations()
        levels = (vae or {}).get("block_out_channels") or (vae or {}).get("encoder_block_out_channels")
        factor = 2 ** (len(levels) - 1) if levels else LATENT_STEP
        side = self._side_of({"sample_size": FLUX_SIDE, **unet} if model == FLUX else unet, factor)
        family = FAMILIES[model]
        asked = self.text.max_sequence_length
        place = self.config or self.path
        if asked is None and place not in sum(KNOWN.values(), ()) and not _is_file(place):
            asked = encode_arguments(self._pipeline_class(), self.text).get("max_sequence_length")
        shapes = family.shapes(unet, asked)
        shapes |= {name: tuple(value.shape) for name, value in self._constants(family, unet, factor * side).items()}
        encoder = Path(self.config or self.path) / "text_encoder" / "config.json"
        if family.component == "unet" and encoder.is_file():
            tokens = json.loads(encoder.read_text())["max_position_embeddings"]
            shapes["text"] = (tokens, *shapes["text"][1:])
        channels = unet["in_channels"] // (4 if model == FLUX else 1)
        schedule = Discrete(alphas_cumprod=scaled_linear_alphas_cumprod())
        net = DiffusersSpec(model=model, config=unet, height=side, width=side, channels=channels)
        cond = {name: torch.zeros(1, *shape, device="meta") for name, shape in shapes.items()}
        return DenoiserSpec(net=net, schedule=schedule, prediction="eps"), cond  # neither costs more than another

    def outline_decoder(self) -> nn.Module | None:
        """The autoencoder whose `decode` makes pictures for perceptual distances, without storage; None if samples are pixels.

        Raises:
            TeacherError: as `outline`.
        """
        diffusers = _library()
        if self.tiny_vae is not None:
            cls: Any = diffusers.AutoencoderTiny
            if self.tiny_vae not in TINY:
                find_place(self.tiny_vae, "teacher.tiny_vae")
            try:
                with quiet():
                    config = {} if self.tiny_vae in TINY else cls.load_config(self.tiny_vae)
            except (OSError, ValueError) as error:
                raise TeacherError(
                    f"the configuration of teacher.tiny_vae {self.tiny_vae} cannot be had: {str(error).splitlines()[0]}"
                ) from None
        else:
            found = self._configurations()[2]
            if found is None:
                return None
            cls, config = getattr(diffusers, found["_class_name"]), found
        with torch.device("meta"), quiet():
            autoencoder: nn.Module = cls.from_config(config)
        return autoencoder.requires_grad_(False).eval()

    def _configurations(self) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
        """Class and configuration of the network, and the configuration of the VAE if there is one."""
        self._refuse_student()
        place = self.config or self.path
        kind = next((kind for kind, names in KNOWN.items() if place in names), None)
        if kind is None and _is_file(place):
            if not Path(place).is_file():
                raise TeacherError(f"teacher {place} does not exist (looked in {Path(place).absolute().parent})")
            kind = "sdxl" if _is_sdxl(Path(place)) else "sd15"
        if kind is not None:
            return _known(kind)
        find_place(place, "teacher.path" if self.config is None else "teacher.config")
        diffusers = _library()
        try:
            with quiet():
                parts = diffusers.DiffusionPipeline.load_config(place)
                model, family = _family(parts)
                network = getattr(diffusers, model).load_config(place, subfolder=family.component)
                vae = parts.get("vae", [None, None])
                settings = None if vae[0] is None else getattr(diffusers, vae[1]).load_config(place, subfolder="vae")
                refuse_other_tasks(place, network, settings, 4 if model == FLUX else 1)
                if parts.get("requires_aesthetics_score"):
                    raise TeacherError(
                        f"{place} must be a text-to-image model, got SDXL's refiner, which begins with a picture"
                    )
                return model, network, settings
        except TeacherError:
            raise
        except (OSError, ValueError) as error:
            raise TeacherError(f"the configuration of {place} cannot be had: {str(error).splitlines()[0]}") from None

    def _refuse_student(self) -> None:
        path = Path(self.path)
        if marker(path).get("kind") == "export" or (path / "student.safetensors").exists():
            raise TeacherError(
                f"teacher.path {path} must be a teacher, got a few-step student. Try: the model that it was distilled from; to begin "
                "with the student's weights set start_from"
            )

    def _tiny_decoder(self) -> tuple[Callable[[Tensor], Tensor], str]:
        """The small decoder, and the sha256 of its weights."""
        find_place(str(self.tiny_vae), "teacher.tiny_vae")
        try:
            with quiet():
                tiny = _library().AutoencoderTiny.from_pretrained(self.tiny_vae).float().requires_grad_(False).eval()
        except (OSError, ValueError) as error:
            raise TeacherError(
                f"teacher.tiny_vae {self.tiny_vae} cannot be loaded: {str(error).splitlines()[0]}"
            ) from None

        def decode(samples: Tensor) -> Tensor:
            tiny.to(samples.device)
            with torch.autocast(samples.device.type, enabled=False):
                return tiny.decode(samples.float() / tiny.config.scaling_factor, return_dict=False)[0]

        return decode, _weights_sha256(tiny)

    def codec(self) -> Codec | None:
        """The VAE alone; None if the pipeline works on pixels.

        Raises:
            TeacherError: the pipeline cannot be read.
        """
        pipeline = self.pipeline("vae")
        network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)  # a single file has it
        return self._codec(pipeline, self._side(pipeline, network.config if network else self._configurations()[1]))

    def encoder(self, device: torch.device | str = "cpu") -> Encoder:
        """The pipeline's text encoders, called as the pipeline's own `__call__` does.

        Raises:
            TeacherError: the pipeline cannot be read, lacks a text encoder, or does not know an option of `text`.
        """
        pipeline = self.pipeline("text").to(device)
        parts = {
            name: part for name, part in pipeline.components.items() if name.startswith(("text_encoder", "tokenizer"))
        }
        if lacking := [name for name, part in parts.items() if part is None and not name.endswith("_3")]:
            raise TeacherError(
                f"{self.path} must have the text encoders of {type(pipeline).__name__} to encode prompts, got no {lacking[0]}. "
                "Try: a folder that has it"
            )
        arguments = encode_arguments(type(pipeline), self.text)
        if getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None):
            return Encoder(pipeline, _network(pipeline)[1], arguments, device)
        model, config, _ = self._configurations()
        return Encoder(pipeline, FAMILIES[model], arguments, device, config)

    def prepare(
        self,
        prompts: Sequence[str],
        folder: Path,
        encoder: Encoder,
        dtype: torch.dtype = torch.float16,
        batch: int = 16,
        progress: Callable[[int], None] = lambda done: None,
    ) -> int:
        """Write the embeddings of `prompts` to `folder`; returns how many were there. See `prepare_prompts`.

        Raises:
            DataError: as `prepare_prompts`.
        """
        null = {name: value[0] for name, value in encoder(prompts[:1])[1].items()}
        about = {"teacher": self.path, "encoders": self.encoders_fingerprint()}
        found = prepare_prompts(
            folder, prompts, lambda texts: encoder(texts)[0], null, about, dtype, batch=batch, progress=progress
        )
        for sentence in encoder.cut_prompts(len(prompts) - found):
            note(sentence)
        return found

    def _pipeline_class(self) -> Any:
        """The class of diffusers that the pipeline is."""
        diffusers = _library()
        if _is_file(self.path) and self.config is None:
            return (
                diffusers.StableDiffusionXLPipeline if _is_sdxl(Path(self.path)) else diffusers.StableDiffusionPipeline
            )
        with quiet():
            name = diffusers.DiffusionPipeline.load_config(self.config or self.path)["_class_name"]
        kind = getattr(diffusers, str(name), None)
        if kind is None:
            raise TeacherError(f"{self.path} must be a pipeline that diffusers has, got {name}: it is not known here")
        return kind

    def _constants(self, family: Family, config: Mapping[str, Any], side: int) -> dict[str, Tensor]:
        """Conditions equal for all samples."""
        constants = family.constants(config, side)
        if self.guidance_input is not None:
            if "guidance" not in constants:
                raise TeacherError(
                    f"teacher.guidance_input must be left out, got {self.guidance_input}: the network of {self.path} is not told "
                    "its guidance. Try: objective.guidance"
                )
            constants["guidance"] = torch.tensor(self.guidance_input)
        return constants

    def encoders_fingerprint(self) -> str:
        """What identifies the text encoders: their files, what a LoRA changes in them, and how they are called where that is not as
        `encode_prompt` does by itself.

        Raises:
            TeacherError: the LoRA cannot be read.
        """
        own, lora = self._encoder_files(), self._lora()
        changes = lora.text_sha256() if lora is not None else None
        if changes is not None:
            own = hashlib.sha256(f"{own} {changes} {self.lora_scale}".encode()).hexdigest()
        called: dict[str, Any] = encode_arguments(self._pipeline_class(), self.text, only_changed=True)
        if self.without:
            called["without"] = sorted(self.without)
        if not called:
            return own
        handling = hashlib.sha256(json.dumps(called, sort_keys=True).encode()).hexdigest()[:16]
        return f"{own} ({', '.join(sorted(called))}: {handling})"

    def _lora(self) -> LoraFile | None:
        if self.lora is None:
            return None
        try:
            lora = read_lora(self.lora)
            if not lora.layers:
                such = f", such as {min(lora.whole)}" if lora.whole else ""
                raise FileError(f"{self.lora}: none of its {lora.count} keys is part of a LoRA{such}")
        except FileError as error:
            raise TeacherError(f"teacher.lora cannot be loaded: {error}") from None
        for sentence in lora.notes:
            note(sentence)
        return lora

    def _merge(self, lora: LoraFile, pipeline: Any, part: Part) -> None:
        """Merge a LoRA into those components of a pipeline that belong to a part of it, in float32."""
        changed: list[tuple[nn.Module, Mapping[str, Factors]]] = []
        try:
            if part in ("whole", "networks"):
                network, _ = _network(pipeline)
                changed.append((network, lora.for_network(network)))
            if part in ("whole", "text"):
                encoders = {
                    name: module
                    for name, module in pipeline.components.items()
                    if name.startswith("text_encoder") and module is not None
                }
                changed += [(encoders[name], factors) for name, factors in lora.for_encoders(encoders).items()]
        except FileError as error:
            raise TeacherError(f"teacher.lora cannot be merged: {error}") from None
        for module, factors in changed:
            if factors:  # text encoders are kept in what their file has, where a small change would be lost
                merge(module.float(), factors, self.lora_scale)

    def _encoder_files(self) -> str:
        """What identifies the encoders' files without reading gigabytes: sizes, beginnings and ends."""
        root = Path(self.path)
        weights = [file for ending in ("safetensors", "bin") for file in root.glob(f"text_encoder*/*.{ending}")]
        files = [root] if root.is_file() else sorted(weights)
        if not files:  # on the hub, whose cache is keyed by content already
            return self.path
        digest = hashlib.sha256()
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.parent.name if file != root else ''} {size}\n".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(2**20))
                stream.seek(max(0, size - 2**20))
                digest.update(stream.read())
        return digest.hexdigest()

    def pipeline(self, part: Part = "whole") -> Any:
        """The library's pipeline, or a part of it: the other components are None.

        Args:
            part: text: encoders and tokenizers. networks: all but those. vae: that alone. (A single file is read whole.)

        Raises:
            TeacherError: it cannot be read, or is of a kind that is not known here.
        """
        diffusers = _library()
        path = Path(self.path)
        self._refuse_student()
        lora = self._lora() if part != "vae" else None  # a file that cannot be read is known before gigabytes are
        marks: dict[str, tuple[Any, str]] = {}
        try:
            with quiet():
                if _is_file(self.path):
                    if path.is_file():
                        marks = file_marks(path)
                    if self.config is not None:
                        self._configurations()  # says so if it is not there, or of another task
                    pipeline = _single_file(diffusers, path, self.config, self.without)
                    refuse_missing_weights(pipeline, self.path)
                else:
                    self._configurations()
                    pipeline = self._from_folder(diffusers, part)
        except TeacherError:
            raise
        except (*_LOADING_FAILS, *_single_file_fails()) as error:
            if "meta tensor" in str(error):  # the library moves a network of which a part was never read
                raise TeacherError(LACKING.format(whose=self.path)) from None
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise TeacherError(f"the pipeline {self.path} cannot be loaded: {lines[0]}") from None
        if part in ("whole", "networks"):
            _network(pipeline)  # says so if it is none that is known
        if lora is not None:
            self._merge(lora, pipeline, part)
        with quiet():
            change_scheduler(pipeline, self.path, marks, self._scheduler_settings(), self.shift)
            if pipeline.vae is not None:
                LatentScaling.of(pipeline, self.path, self.latents)
        return pipeline

    def _from_folder(self, diffusers: Any, part: Part) -> Any:
        """The pipeline of a folder, or of the hub, whose files are fetched to a folder first."""
        place = self.path
        find_place(place, "teacher.path")
        index = diffusers.DiffusionPipeline.load_config(place)
        parts = [name for name, kind in index.items() if isinstance(kind, list)]
        skipped = dict.fromkeys(name for name in parts if not _wanted(name, part))
        if not Path(place).is_dir():
            place = diffusers.DiffusionPipeline.download(place, variant=self.variant, **skipped)
        skipped |= dict.fromkeys(absent_parts(index, Path(place), self.without))
        wanted = [name for name in parts if name not in skipped]
        loaded = load_parts(diffusers, place, index, wanted, self.variant)
        return diffusers.DiffusionPipeline.from_pretrained(place, variant=self.variant, **skipped, **loaded)

    def _scheduler_settings(self) -> dict[str, Any]:
        """Settings of the noise table under the names of diffusers' configuration."""
        found: dict[str, Any] = {}
        if self.prediction is not None:
            found["prediction_type"] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[self.prediction]
        if self.zero_snr is not None:
            found["rescale_betas_zero_snr"] = self.zero_snr
        return found | self.betas.config()

    def _codec(self, pipeline: Any, side: int) -> Codec | None:
        """The VAE in float32 (SDXL's overflows in float16); None if the pipeline works on pixels."""
        if pipeline.vae is None:
            return None
        vae = pipeline.vae.float().requires_grad_(False).eval()
        if (bad := first_not_finite(vae.state_dict())) is not None:
            raise TeacherError(
                f"the VAE of {self.path} must hold finite weights, got NaN or infinite numbers in {bad}: get it again"
            )
        scaling, factor = LatentScaling.of(pipeline, self.path, self.latents), _factor(pipeline)

        def decode(samples: Tensor) -> Tensor:
            vae.to(samples.device)
            with torch.autocast(samples.device.type, enabled=False):
                return vae.decode(scaling.raw(samples.float()), return_dict=False)[0]

        def encode(pictures: Tensor) -> Tensor:
            """The mean of the posterior where there is one: the same latent each time."""
            vae.to(pictures.device)
            with torch.autocast(pictures.device.type, enabled=False):
                found = vae.encode(pictures.float(), return_dict=False)[0]
                return scaling.scaled(found if isinstance(found, Tensor) else found.mode())

        channels = vae.config.get("out_channels") or vae.config.in_channels
        digest = hashlib.sha256(f"{_weights_sha256(vae)} {scaling}".encode()).hexdigest()
        return Codec(decode, encode, (channels, factor * side, factor * side), digest)

    def _side(self, pipeline: Any, config: Mapping[str, Any]) -> int:
        default = getattr(pipeline, "default_sample_size", None)  # FLUX's network does not say
        return self._side_of({"sample_size": default, **config}, _factor(pipeline))

    def _side_of(self, config: Mapping[str, Any], factor: int) -> int:
        """Side of a sample, from the network's configuration and the pixels that a latent stands for."""
        if self.resolution is None:
            return int(config["sample_size"])
        # what the network halves or makes patches of
        inner = 2 ** (len(config["block_out_channels"]) - 1) if "block_out_channels" in config else 2
        if self.resolution % (factor * inner):
            raise TeacherError(
                f"teacher.resolution {self.resolution} is not a multiple of {factor * inner}, as {self.path} needs"
            )
        return self.resolution // factor


def _network(pipeline: Any) -> tuple[nn.Module, Family]:
    """The denoising network of a pipeline, and how it is called.

    Raises:
        TeacherError: there is none, or none that is known.
    """
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    name = type(network).__name__
    if name not in FAMILIES:
        what = "no network" if network is None else f"a {name}"
        raise TeacherError(f"{type(pipeline).__name__} has {what}: known here are {', '.join(FAMILIES)}")
    return network, FAMILIES[name]


def _family(parts: Mapping[str, Any]) -> tuple[str, Family]:
    """Class of the network and how it is called, from a pipeline's model_index.json."""
    name = next((component_class(parts, key) for key in ("unet", "transformer") if key in parts), None)
    if name is None or name not in FAMILIES:
        raise TeacherError(
            f"{parts.get('_class_name')} has {name or 'no network'}: known here are {', '.join(FAMILIES)}"
        )
    return name, FAMILIES[name]


def _is_file(path: str) -> bool:
    return Path(path).suffix == ".safetensors"


def _known(kind: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Class and configuration of the network of a model family, and the configuration of its VAE."""
    file = resources.files("fewstep") / "assets" / "pipelines" / f"{kind}.json"
    parts = json.loads(file.read_text(encoding="utf-8"))
    network = parts.get("unet") or parts["transformer"]
    return network["_class_name"], network, parts["vae"]


def _library() -> Any:
    try:
        import diffusers
        import transformers  # noqa: F401  (diffusers needs it without saying so)
    except ImportError:
        raise TeacherError("text-to-image teachers need diffusers: pip install 'fewstep[t2i]'") from None
    return diffusers


_LOADING_FAILS = (OSError, ValueError, KeyError, RuntimeError, NotImplementedError)


def _single_file_fails() -> tuple[type[Exception], ...]:
    """What the libraries raise for a file that is damaged or of something else."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from safetensors import SafetensorError

    return SingleFileComponentError, SafetensorError


def _single_file(diffusers: Any, path: Path, config: str | None, without: Sequence[str]) -> Any:
    if not path.is_file():
        raise TeacherError(f"teacher {path} does not exist (looked in {path.absolute().parent})")
    if config is None:
        kind = diffusers.StableDiffusionXLPipeline if _is_sdxl(path) else diffusers.StableDiffusionPipeline
        return kind.from_single_file(str(path), **dict.fromkeys(without))
    kind = getattr(diffusers, diffusers.DiffusionPipeline.load_config(config)["_class_name"])
    local = Path(config).is_dir()
    return kind.from_single_file(str(path), config=config, local_files_only=local, **dict.fromkeys(without))


def _is_sdxl(path: Path) -> bool:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return any(name.startswith("conditioner.embedders.") for name in file.keys())  # noqa: SIM118  (no mapping)


def _wanted(component: str, part: Part) -> bool:
    """Whether a component of a pipeline belongs to a part of it; the scheduler belongs to all."""
    text = component.startswith(("text_encoder", "tokenizer"))
    seen = component in ("safety_checker", "feature_extractor", "image_encoder")  # of finished pictures
    wanted = {"whole": True, "text": text, "networks": not (text or seen), "vae": component == "vae"}
    return component == "scheduler" or wanted[part]


def _config(network: nn.Module) -> dict[str, Any]:
    """A network's configuration as JSON has it, without where it was loaded from."""
    config = {key: value for key, value in network.config.items() if key != "_name_or_path"}
    return json.loads(json.dumps(config))


def _factor(pipeline: Any) -> int:
    """Pixels that a latent stands for, along a side."""
    return LATENT_STEP if pipeline.vae is None else int(pipeline.vae_scale_factor)


def _channels(pipeline: Any, network: nn.Module) -> int:
    """Channels of a sample; FLUX's network counts those of 2 x 2 latents."""
    return network.config.in_channels // (4 if type(network).__name__ == FLUX else 1)


def _weights_sha256(network: nn.Module) -> str:
    """sha256 over a network's weights, as they are used."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
