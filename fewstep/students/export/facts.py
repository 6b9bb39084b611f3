"""Facts about a student for its export, from its JSON and its pipeline's configurations. Reads no weights."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.data.text import written_lines
from fewstep.diffusion.noise import Discrete, RectifiedFlow, ScheduleSpec
from fewstep.formats.model import Header, read_header, weights_sha256
from fewstep.networks import FAMILIES, DiffusersSpec, Family
from fewstep.students.student import pipeline_of
from fewstep.system.console import quiet
from fewstep.system.errors import SettingsError
from fewstep.teachers import DiffusersTeacher
from fewstep.teachers.pipelines import is_single_file, pipeline_class

__all__ = ["Facts", "is_hub_name"]


def is_hub_name(text: str) -> bool:
    """Return whether a text names a repository on the hub and no path on this machine."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text)) and not Path(text).exists()


@dataclass(frozen=True)
class Facts:
    """A text-to-image student without its weights.

    Attributes:
        file: its .safetensors file.
        header: its JSON.
        settings: settings of the teacher's pipeline.
    """

    file: Path
    header: Header
    settings: DiffusersTeacher

    @classmethod
    def read(cls, file: Path, shown: Path | str) -> Facts:
        """Read the facts of a student's file.

        Args:
            file: file from `find_student`.
            shown: the user's path, for messages.

        Raises:
            SettingsError: not a text-to-image student.
            FileError: missing or damaged files.
        """
        header = read_header(file) if file.suffix == ".safetensors" else None
        settings = pipeline_of(header.provenance) if header is not None else None
        net = header.denoiser.net if header is not None and header.denoiser is not None else None
        if settings is None or not isinstance(net, DiffusersSpec) or not FAMILIES[net.model].encode:
            raise SettingsError(
                f"STUDENT must be a text-to-image student to be exported, got {shown}. Try: use {file} and its .json, which "
                "`fewstep sample` and fewstep.formats.model.load_generator read"
            )
        assert header is not None
        return cls(file, header, settings)

    @property
    def net(self) -> DiffusersSpec:
        """The network."""
        assert self.header.denoiser is not None and isinstance(self.header.denoiser.net, DiffusersSpec)
        return self.header.denoiser.net

    @property
    def family(self) -> Family:
        """Calling convention of the network."""
        return FAMILIES[self.net.model]

    @property
    def unet(self) -> bool:
        """True if the network is a UNet with a table of timesteps."""
        return self.net.model == "UNet2DConditionModel"

    @property
    def sdxl(self) -> bool:
        """True if the network is SDXL's."""
        return self.unet and self.net.config.get("addition_embed_type") == "text_time"

    @property
    def schedule(self) -> ScheduleSpec:
        """Noise levels over time."""
        assert self.header.denoiser is not None
        return self.header.denoiser.schedule

    @property
    def prediction(self) -> str:
        """Prediction type of the network."""
        assert self.header.denoiser is not None
        return self.header.denoiser.prediction

    @property
    def times(self) -> tuple[float, ...]:
        """Normalised times of the calls."""
        return self.header.times

    @property
    def steps(self) -> int:
        """Network calls per image."""
        return len(self.times)

    @property
    def timesteps(self) -> list[int]:
        """Timesteps of the calls, for a table."""
        assert isinstance(self.schedule, Discrete)
        return [round(time * (len(self.schedule.alphas_cumprod) - 1)) for time in self.times]

    @property
    def sigmas(self) -> list[float]:
        """Noise levels of the calls: for a flow after the shift, for a table as noise-to-signal ratios."""
        alpha, sigma = self.schedule.alpha_sigma(torch.tensor(self.times, dtype=torch.float64))
        levels = sigma if isinstance(self.schedule, RectifiedFlow) else sigma / alpha
        return [float(f"{level:.6g}") for level in levels.tolist()]

    @property
    def metadata(self) -> dict[str, str]:
        """Times of the calls, for the header of a weights file."""
        table = {"fewstep.timesteps": str(self.timesteps)} if isinstance(self.schedule, Discrete) else {}
        return {"format": "pt", "fewstep.sigmas": str(self.sigmas), **table}

    @property
    def lora(self) -> Any:
        """The adapters' settings; None if the student was trained whole."""
        return self.header.lora

    @property
    def provenance(self) -> dict[str, Any]:
        """Provenance of the student."""
        return self.header.provenance

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights."""
        return weights_sha256(self.file, self.provenance)

    @cached_property
    def pipeline(self) -> Any:
        """Class of the pipeline in diffusers."""
        return pipeline_class(self.settings.path, self.settings.config)

    @property
    def times_argument(self) -> str:
        """Argument of the pipeline that lists the times."""
        if isinstance(self.schedule, RectifiedFlow):
            return f"sigmas={[round(time, 6) for time in self.times]}"  # the scheduler shifts them
        return f"timesteps={self.timesteps}"

    @cached_property
    def picture(self) -> tuple[int, int]:
        """Height and width of a picture in pixels."""
        factor = self.settings.pixels_a_latent()
        return factor * self.net.height, factor * self.net.width

    @property
    def base_name(self) -> str:
        """Name of the base model's folder, repository or file, without the file's ending."""
        path = Path(self.settings.path)
        return path.stem if is_single_file(self.settings.path) else path.name  # FLUX.1-dev has no ending

    @property
    def usual_size(self) -> bool:
        """True if this is the pipeline's default picture size."""
        height = inspect.signature(self.pipeline.__call__).parameters["height"].default
        if height is None:  # after the network's configuration
            return self.settings.resolution is None
        return self.picture == (height, height)

    @property
    def prompt(self) -> str:
        """Return a training prompt."""
        lines = self.settings.prompts and self.settings.prompts / "prompts.jsonl"
        return str(written_lines(lines)[0]) if lines and lines.is_file() else "a photograph"

    def portable(self) -> dict[str, Any]:
        """What `fewstep.load` needs beside the exported pipeline: network, noise levels and times, without paths."""
        header = self.header.model_copy(update={"provenance": {}, "lora": None})
        options = self.settings.model_dump(
            mode="json", include={"text", "guidance_input", "without", "latents"}, exclude_defaults=True
        )
        height, width = self.picture
        return header.model_dump(mode="json", by_alias=True) | {"teacher": options | {"resolution": [width, height]}}

    def outline(self) -> nn.Module:
        """Build the library's network without storage."""
        with torch.device("meta"), quiet():
            made: nn.Module = self.net.build().model
        return made
