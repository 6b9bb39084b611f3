"""Text-to-image teachers: pipelines of the diffusers library, from a folder, the hub, or one .safetensors file.

Prediction type, noise table or flow shift, scaling factors and the empty condition come from the pipeline's own files;
`fewstep.networks.diffusers_net` knows how to call each kind of network. Only `fewstep prepare` needs the text encoders;
a distillation reads their embeddings from disk (`fewstep.teachers.prompts`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import Tensor, nn

from fewstep.diffusion.noise import Discrete, Schedule, scaled_linear_alphas_cumprod
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.formats.lora import LoraFile
from fewstep.formats.lora_reading import read_lora
from fewstep.formats.model import DenoiserSpec
from fewstep.networks import FAMILIES, DiffusersSpec, Family
from fewstep.networks.diffusers_net import DiffusersNet
from fewstep.networks.families import framed_time_ids
from fewstep.networks.quantized import WHOLE, Quantization, check_library
from fewstep.system.bounds import read_json, shown
from fewstep.system.console import note, quiet, say
from fewstep.system.errors import FileError, SettingsError, TeacherError, UserError
from fewstep.system.out_folder import marker
from fewstep.system.weights import first_not_finite
from fewstep.teachers.base import ClassLabels, Codec, Conditioner, NoPrompts, Teacher, TeacherSpec
from fewstep.teachers.encoding import Encoder, TextOptions, encode_arguments
from fewstep.teachers.facts import (
    Betas,
    Latents,
    LatentScaling,
    change_scheduler,
    file_marks,
    prediction_of,
    schedule_of,
)
from fewstep.teachers.few_step import About, check_few_step
from fewstep.teachers.loading import (
    LACKING,
    note_unused_weights,
    refuse_empty_tokenizers,
    refuse_missing_weights,
)
from fewstep.teachers.pipelines import (
    KNOWN,
    LATENT_STEP,
    LOADING_FAILS,
    Part,
    channels_of,
    config_of,
    configurations,
    encoder_files_sha256,
    is_single_file,
    latent_factor,
    library,
    merge_lora,
    network_of,
    network_sha256,
    pipeline_class,
    read_folder,
    read_single_file,
    scheduler_configuration,
    single_file_fails,
)
from fewstep.teachers.prompts import Prompts, prepare_prompts
from fewstep.teachers.sizes import Buckets, Resolution, bucket_sizes, sample_size
from fewstep.teachers.vae import refuse_other_layout, tiny_decoder, vae_codec, vae_outline

__all__ = [
    "DiffusersTeacher",
]


class DiffusersTeacher(TeacherSpec):
    """A pipeline of diffusers: Stable Diffusion 1.5 to 3.5, SDXL, FLUX, FLUX.2, Z-Image, Qwen-Image, SANA, PixArt and others, a
    fine-tune of one, or an unconditional DDPMPipeline on pixels."""

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
    resolution: Resolution | None = None
    """Pixels of a picture: 1024 for both sides, or [width, height] such as [1344, 768]; null: the model's own."""
    buckets: Buckets = ()
    """Sizes of pictures to train at, [width, height] each, every batch at one of them; auto: shapes from 1:2 to 2:1 with about as
    many pixels as `resolution`, which is scored and drawn."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the frozen weights. bfloat16 halves their memory; student and fake score stay float32."""
    quantize: Quantization | None = None
    """Quantisation of the frozen weights of blocks, with adapters: int8 or float8 (half of bfloat16), or nf4 (some 4.5 bits; needs the
    extra `nf4`). They are widened to `dtype` where they are used. What is exported is merged into the file's own weights."""
    allow_few_step: bool = False
    """Allow a teacher that is itself recognised as a few-step model, such as SDXL-Turbo or FLUX.1-schnell."""
    tiny_vae: str | None = None
    """A small decoder (`AutoencoderTiny`: TAESD, TAESDXL; a folder or hub name) for pictures and perceptual distances
    during training; null: the pipeline's VAE."""
    variant: str | None = None
    """Variant of a folder's files, such as fp16."""
    config: str | None = None
    """For a single .safetensors file: a pipeline folder of the same kind, whose configuration, scheduler and tokenizers
    are used; null: diffusers fetches that from the hub."""
    prediction: Literal["eps", "v", "x0"] | None = None
    """Prediction type of the network; null: from the file's markers or the scheduler's configuration."""
    zero_snr: bool | None = None
    """Rescale the noise table to end without signal (zero terminal SNR); null: likewise."""
    betas: Betas = Betas()
    """The noise table."""
    shift: float | None = Field(None, gt=0)
    """Shift of a flow's noise levels; null: the scheduler's, which may depend on the resolution (FLUX)."""
    latents: Latents = Latents()
    """Scaling of the VAE's latents."""
    guidance_input: float | None = Field(None, ge=0)
    """Guidance as an input of the network; null: the default of its pipeline (FLUX.1-dev 3.5, FLUX.2-dev 4)."""
    negative_prompt: str | None = None
    """Prompt that guidance contrasts with (`objective.guidance`); null: the model's own empty one. The student learns the
    difference and takes no negative prompt itself."""
    text: TextOptions = TextOptions()
    """Encoding of prompts; null entries use the defaults of the pipeline's own call."""
    without: tuple[str, ...] = ()
    """Components to omit, such as text_encoder_3 and tokenizer_3 (SD3's T5, whose tokens are then zeros)."""

    _exported: bool = PrivateAttr(False)

    @field_validator("path", "config")
    @classmethod
    def _home(cls, value: str | None) -> str | None:
        return str(Path(value).expanduser()) if value is not None and value.startswith("~") else value

    @model_validator(mode="after")
    def _used(self) -> DiffusersTeacher:
        if self.lora is None and self.lora_scale != 1.0:
            raise ValueError(
                f"lora_scale must come with a lora, got {self.lora_scale:g} alone. Try: lora: FILE, or leave lora_scale out"
            )
        if self.config is not None and not is_single_file(self.path):
            raise ValueError(
                f"config must come with a single .safetensors file, got {self.path}, which has its own. Try: leave config out"
            )
        if self.variant is not None and is_single_file(self.path):
            raise ValueError(
                f"variant must come with a folder, got the single file {self.path}. Try: leave variant out"
            )
        return self

    def load(self, prompts: Prompts | None = None, pipeline: Any = None) -> Teacher:
        """Load the denoiser, with prepared prompts if there are any.

        Args:
            prompts: encoded prompts (`encode`) instead of the prepared ones.
            pipeline: a loaded pipeline (`pipeline`), whose network and VAE become the teacher's; None: load them.

        Raises:
            TeacherError: it cannot be read, or is of an unknown kind.
            DataError: the prepared prompts are another model's.
        """
        if self.quantize is not None:
            check_library(self.quantize)  # before gigabytes are read
        pipeline = pipeline or self.pipeline("networks", getattr(torch, self.dtype))
        network, family = network_of(pipeline)
        height, width = self._size(pipeline, network.config)
        schedule = schedule_of(pipeline.scheduler, self.path, (height, width), family.shift)
        sizes = self._buckets(pipeline, network.config)
        self._note_shifts(pipeline.scheduler, sizes, schedule, family)
        spec = DenoiserSpec(
            net=DiffusersSpec(
                model=type(network).__name__,
                config=config_of(network),
                height=height,
                width=width,
                channels=channels_of(pipeline, network),
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
                f"{self.path} must hold finite weights, got NaN or infinite numbers in {bad}. Try: fetch it again"
            )

        sha256 = network_sha256(network)
        if self.quantize is not None:
            say(str(cast(DiffusersNet, denoiser.net).quantize(self.quantize)))

        def start() -> Preconditioned:
            if self.quantize is not None:
                raise SettingsError(WHOLE.format(kind=self.quantize, whose="of a network that is trained whole"))
            if self.dtype == "float32":
                made = copy.deepcopy(denoiser)
            else:  # the frozen weights are rounded; those that are trained start from the file's, which are read again
                made = around(network_of(self.pipeline("networks"))[0], "float32")
            return made.requires_grad_(True).train()

        codec = vae_codec(pipeline, self.path, self.latents, (height, width))
        if codec is not None and self.tiny_vae is not None:
            refuse_other_layout(pipeline.vae.config, self.path)
            decode, sha256 = tiny_decoder(self.tiny_vae)
            codec = replace(codec, decode=decode, decoder=sha256)
        factor = codec.shape[1] // height if codec else 1

        def constants_at(height: int, width: int) -> dict[str, Tensor]:
            return self._constants(family, network.config, (factor * height, factor * width))

        def at(teacher: Teacher, height: int, width: int) -> Teacher:
            channels, shape = teacher.shape[0], (factor * height, factor * width)
            conditioner, constants = teacher.conditioner, constants_at(height, width)
            return replace(
                teacher,
                shape=(channels, height, width),
                codec=replace(codec, shape=(codec.shape[0], *shape)) if codec else None,
                conditioner=conditioner.with_constants(constants)
                if isinstance(conditioner, Prompts | NoPrompts)
                else conditioner,
                framed=(lambda frames: framed_time_ids(frames, shape)) if "time_ids" in constants else None,
            )

        constants = constants_at(height, width)
        guided_inside = family.guided_inside(network.config)
        if self.negative_prompt is not None and (guided_inside or family.encode is None):
            why = "its network takes its guidance as an input" if guided_inside else "it takes no prompts"
            raise TeacherError(
                f"teacher.negative_prompt must be left out, got {self.negative_prompt!r}: {self.path} is not guided from "
                f"outside, {why}"
            )
        conditioner: Conditioner = NoPrompts(self.path)
        if family.encode is None:
            if self.prompts is not None:
                raise TeacherError(
                    f"teacher.prompts must be left out, got {self.prompts}: {self.path} is unconditional"
                )
            conditioner = ClassLabels(0)
        elif prompts is not None:
            conditioner = prompts.with_constants(constants)
        elif self.prompts is not None:
            conditioner = Prompts.read(
                self.prompts, {"encoders": self.encoders_fingerprint()}, constants, self.negative_prompt
            )
        teacher = Teacher(
            name=self.path,
            denoiser=denoiser,
            shape=spec.net.sample_shape,
            conditioner=conditioner,
            student_spec=spec,
            start=start,
            bottleneck=spec.net.bottleneck,
            sha256=sha256,
            provenance={},
            codec=codec,
            save=self._save,
            guided_inside=guided_inside,
        )
        teacher = at(teacher, height, width)
        return replace(teacher, sizes=tuple(at(teacher, *size) for size in sizes))

    def _save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the whole pipeline with a denoiser's weights in its network."""
        pipeline = self.pipeline()
        network, _ = network_of(pipeline)
        start = "net.model."
        network.load_state_dict({name.removeprefix(start): value for name, value in weights.items() if start in name})
        with quiet():
            pipeline.save_pretrained(folder, safe_serialization=True)

    def outline(self) -> tuple[DenoiserSpec, dict[str, Tensor]]:
        """Describe the network and the condition of one sample (without storage) from configurations alone; no weights are read.

        Raises:
            TeacherError: there is no configuration, and the model is none of those known by name.
        """
        library()  # says what to install
        model, unet, _ = self._configurations()
        family, factor = FAMILIES[model], self.pixels_a_latent()
        sizes = _sizes(family, unet)
        height, width = sample_size(sizes, factor, self.resolution, self.path)
        if self.buckets:  # the costliest
            all_sizes = bucket_sizes(sizes, factor, (height, width), self.buckets, self.path)
            height, width = max(all_sizes, key=math.prod)
            note(f"{self.path}: counted at its largest bucket, {width * factor} x {height * factor} pixels")
        asked = self.text.max_sequence_length
        place = self.config or self.path
        if (
            family.encode is not None
            and asked is None
            and place not in sum(KNOWN.values(), ())
            and not is_single_file(place)
        ):
            asked = encode_arguments(pipeline_class(self.path, self.config), self.text).get("max_sequence_length")
        shapes = family.shapes(unet, asked)
        shapes |= {
            name: tuple(value.shape)
            for name, value in self._constants(family, unet, (factor * height, factor * width)).items()
        }
        encoder = Path(self.config or self.path) / "text_encoder" / "config.json"
        if family.component == "unet" and encoder.is_file():
            tokens = read_json(encoder)["max_position_embeddings"]
            shapes["text"] = (tokens, *shapes["text"][1:])
        channels = unet["in_channels"] // family.packed
        schedule = Discrete(alphas_cumprod=scaled_linear_alphas_cumprod())
        net = DiffusersSpec(model=model, config=unet, height=height, width=width, channels=channels)
        cond = {name: torch.zeros(1, *shape, device="meta") for name, shape in shapes.items()}
        return DenoiserSpec(net=net, schedule=schedule, prediction="eps"), cond  # neither costs more than another

    def pixels_a_latent(self) -> int:
        """Pixels of a picture that a latent stands for, along a side, from the VAE's configuration."""
        model, _, vae = self._configurations()
        vae, family = vae or {}, FAMILIES[model]
        levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
        halvings = vae.get("temperal_downsample") or (levels and levels[1:])
        return family.folded * (
            2 ** len(halvings) if halvings is not None else 1 if family.encode is None else LATENT_STEP
        )

    def check_few_step(self) -> None:
        """Refuse a few-step model, and report a guidance-distilled one. See `fewstep.teachers.few_step`.

        Raises:
            TeacherError: it is a few-step model, or there is no configuration.
        """
        library()  # says what to install
        model, network, _ = self._configurations()
        place = self.config or self.path
        at_hand = is_single_file(place) or place in sum(KNOWN.values(), ())
        index, scheduler = ({}, {}) if at_hand else scheduler_configuration(place)
        lora = None if self.lora is None else self.lora.name
        check_few_step(About(self.path, lora, index, scheduler, model, network), self.allow_few_step)

    def outline_decoder(self) -> nn.Module | None:
        """The autoencoder whose `decode` makes pictures, without storage. See `vae_outline`."""
        return vae_outline(self.tiny_vae, self._configurations()[2], self.path)

    def _configurations(self) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
        self._refuse_student()
        return configurations(self.config or self.path, "teacher.path" if self.config is None else "teacher.config")

    def of_an_export(self) -> DiffusersTeacher:
        """Copy the settings for a folder of `fewstep export`, whose student is sampled, not distilled."""
        made = self.model_copy(update={"allow_few_step": True})
        made._exported = True
        return made

    def _refuse_student(self) -> None:
        path = Path(self.path)
        if self._exported:
            return
        if marker(path).get("kind") == "export" or (path / "student.safetensors").exists():
            raise TeacherError(
                f"teacher.path {path} must be a teacher, got a few-step student. Try: the model that it was distilled from; to begin "
                "with the student's weights set start_from"
            )

    def codec(self) -> Codec | None:
        """Load only the VAE; None if the pipeline works on pixels.

        Raises:
            TeacherError: the pipeline cannot be read.
        """
        return self.codec_and_sizes()[0]

    def codec_and_sizes(self) -> tuple[Codec | None, tuple[tuple[int, int], ...]]:
        """The same, and height and width of each bucket in pixels, if there are any."""
        pipeline = self.pipeline("vae")
        network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)  # a single file has it
        config = network.config if network else self._configurations()[1]
        factor = latent_factor(pipeline)
        sizes = tuple((factor * height, factor * width) for height, width in self._buckets(pipeline, config))
        return vae_codec(pipeline, self.path, self.latents, self._size(pipeline, config)), sizes

    def encoder(self, device: torch.device | str = "cpu") -> Encoder:
        """The pipeline's text encoders, called as the pipeline's own `__call__` does.

        Raises:
            TeacherError: the pipeline cannot be read, lacks a text encoder, or does not know an option of `text`.
        """
        if FAMILIES[self._configurations()[0]].encode is None:
            raise TeacherError(f"{self.path} must be a text-to-image model to encode prompts, got an unconditional one")
        pipeline = self.pipeline("text").to(device)
        parts = {
            name: part for name, part in pipeline.components.items() if name.startswith(("text_encoder", "tokenizer"))
        }
        if lacking := [name for name, part in parts.items() if part is None and not name.endswith("_3")]:
            raise TeacherError(
                f"{self.path} must have the text encoders of {type(pipeline).__name__} to encode prompts, got no {lacking[0]}. "
                "Try: a folder that has it"
            )
        refuse_empty_tokenizers(parts, self.path)
        arguments = encode_arguments(type(pipeline), self.text)
        if getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None):
            return Encoder(pipeline, network_of(pipeline)[1], arguments, device, negative=self.negative_prompt)
        model, config, _ = self._configurations()
        return Encoder(pipeline, FAMILIES[model], arguments, device, config, self.negative_prompt)

    def prepare(
        self,
        prompts: Sequence[str],
        folder: Path,
        encoder: Encoder,
        dtype: torch.dtype = torch.float16,
        batch: int = 16,
        progress: Callable[[int], None] = lambda done: None,
    ) -> int:
        """Write the embeddings of `prompts` to `folder`; returns the number of existing ones. See `prepare_prompts`.

        Raises:
            DataError: as `prepare_prompts`.
        """
        null = encoder.empty(prompts[0])
        about = {"teacher": self.path, "encoders": self.encoders_fingerprint()}
        found = prepare_prompts(folder, prompts, encoder.rows, null, about, dtype, batch=batch, progress=progress)
        for sentence in encoder.cut_prompts(len(prompts) - found):
            note(sentence)
        return found

    def encode(self, prompts: Sequence[str], encoder: Encoder) -> Prompts:
        """Encode prompts with their embeddings in memory, for `load`.

        Raises:
            DataError: an embedding that is not finite.
        """
        made = Prompts.encode(prompts, encoder.rows, encoder.empty(prompts[0]), self.negative_prompt)
        for sentence in encoder.cut_prompts(len(prompts)):
            note(sentence)
        return made

    def _constants(self, family: Family, config: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Tensor]:
        """Conditions equal for all samples of so many pixels, height and width."""
        constants = family.constants(config, size)
        if family.guided_inside(config):
            constants["guidance"] = torch.tensor(family.guidance)
        if self.guidance_input is not None:
            if "guidance" not in constants:
                raise TeacherError(
                    f"teacher.guidance_input must be left out, got {self.guidance_input}: the network of {self.path} does not take "
                    "guidance as an input. Try: objective.guidance"
                )
            constants["guidance"] = torch.tensor(self.guidance_input)
        return constants

    def encoders_fingerprint(self) -> str:
        """Return what identifies the text encoders: their files, what a LoRA changes in them, and how they are called where that is not as
        `encode_prompt` does by itself.

        Raises:
            TeacherError: the LoRA cannot be read.
        """
        own, lora = encoder_files_sha256(self.path), self._lora()
        changes = lora.text_sha256() if lora is not None else None
        if changes is not None:
            own = hashlib.sha256(f"{own} {changes} {self.lora_scale}".encode()).hexdigest()
        called: dict[str, Any] = encode_arguments(pipeline_class(self.path, self.config), self.text, only_changed=True)
        if self.without:
            called["without"] = sorted(self.without)
        if self.negative_prompt is not None:
            called["negative_prompt"] = self.negative_prompt
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

    def pipeline(self, part: Part = "whole", dtype: torch.dtype = torch.float32) -> Any:
        """The library's pipeline, or a part of it: the other components are None.

        Args:
            part: text: encoders and tokenizers. networks: all but those. vae, scheduler: that alone. (A single file is read
                whole.)
            dtype: of the denoising network's weights, which a folder's are rounded to as they are read, unless a LoRA is merged
                into them first.

        Raises:
            TeacherError: it cannot be read, or is of a kind that is not known here.
        """
        diffusers = library()
        path = Path(self.path)
        self._refuse_student()
        lora = (
            self._lora() if part not in ("vae", "scheduler") else None
        )  # a file that cannot be read is known before gigabytes are
        marks: dict[str, tuple[Any, str]] = {}
        try:
            with quiet():
                if is_single_file(self.path):
                    if path.is_file():
                        marks = file_marks(path)
                    if self.config is not None:
                        self._configurations()  # says so if it is not there, or of another task
                    pipeline = read_single_file(diffusers, path, self.config, self.without)
                    refuse_missing_weights(pipeline, self.path)
                    if getattr(pipeline, "unet", None) is not None:
                        note_unused_weights(pipeline.unet, path)
                else:
                    self._configurations()
                    pipeline = read_folder(
                        self.path, part, self.variant, self.without, dtype if lora is None else torch.float32
                    )
        except UserError:
            raise
        except (*LOADING_FAILS, *single_file_fails()) as error:
            if "meta tensor" in str(error):  # the library moves a network of which a part was never read
                raise TeacherError(LACKING.format(whose=self.path)) from None
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise TeacherError(f"the pipeline {self.path} cannot be loaded: {shown(lines[0], quote=False)}") from None
        if part in ("whole", "networks"):
            network_of(pipeline)  # says so if it is none that is known
        if lora is not None:
            merge_lora(lora, pipeline, part, self.lora_scale)
        with quiet():
            change_scheduler(pipeline, self.path, marks, self._scheduler_settings(), self.shift)
            if pipeline.components.get("vae") is not None:
                LatentScaling.of(pipeline, self.path, self.latents)
        return pipeline

    def _scheduler_settings(self) -> dict[str, Any]:
        """Settings of the noise table under the names of diffusers' configuration."""
        found: dict[str, Any] = {}
        if self.prediction is not None:
            found["prediction_type"] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[self.prediction]
        if self.zero_snr is not None:
            found["rescale_betas_zero_snr"] = self.zero_snr
        return found | self.betas.config()

    def _buckets(self, pipeline: Any, config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
        """Height and width of each bucket in latents; empty without buckets."""
        if not self.buckets:
            return ()
        sizes, factor = _sizes(FAMILIES[self._configurations()[0]], config), latent_factor(pipeline)
        return bucket_sizes(sizes, factor, self._size(pipeline, config), self.buckets, self.path)

    def _note_shifts(self, scheduler: Any, sizes: Sequence[tuple[int, int]], used: Schedule, family: Family) -> None:
        """Say where a shift by resolution would be another for some buckets: a student is called at one."""
        shifts = [getattr(schedule_of(scheduler, self.path, size, family.shift), "shift", 1.0) for size in sizes]
        if shifts and max(shifts) - min(shifts) > 1e-6:
            note(
                f"{self.path}: its scheduler shifts by resolution, from {min(shifts):.3f} to {max(shifts):.3f} over the buckets; all "
                f"are trained and sampled at {getattr(used, 'shift', 1.0):.3f} (teacher.shift)"
            )

    def _size(self, pipeline: Any, config: Mapping[str, Any]) -> tuple[int, int]:
        sizes = _sizes(FAMILIES[self._configurations()[0]], config)
        return sample_size(sizes, latent_factor(pipeline), self.resolution, self.path)


def _sizes(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """A network's configuration with what `sample_size` needs, where it does not say."""
    return {"sample_size": family.side, "patch": 1 if family.folded > 1 else 2, **config}
