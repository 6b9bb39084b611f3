"""All that an export says of a student, from its JSON and its pipeline's configurations: no weights are read."""

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
from fewstep.teachers.pipelines import pipeline_class

__all__ = ["Facts", "is_hub_name"]


def is_hub_name(text: str) -> bool:
    """Return whether a text is the name of a repository on the hub and of nothing on this machine."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text)) and not Path(text).exists()


@dataclass(frozen=True)
class Facts:
    """A text-to-image student without its weights.

    Attributes:
        file: its .safetensors file.
        header: its JSON.
        settings: of the teacher's pipeline.
    """

    file: Path
    header: Header
    settings: DiffusersTeacher

    @classmethod
    def read(cls, file: Path, shown: Path | str) -> Facts:
        """The facts of a student's file.

        Args:
            file: of `find_student`.
            shown: what the user gave, for messages.

        Raises:
            SettingsError: it is no text-to-image student.
            FileError: missing or damaged files.
        """
        header = read_header(file) if file.suffix == ".safetensors" else None
        settings = pipeline_of(header.provenance) if header is not None else None
        net = header.denoiser.net if header is not None and header.denoiser is not None else None
        if settings is None or not isinstance(net, DiffusersSpec) or not FAMILIES[net.model].encode:
            raise SettingsError(
                f"{shown} is no text-to-image student, and export is for those: {file} and its .json are its files already, "
                "`fewstep sample` and fewstep.formats.model.load_generator read them"
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
        """How the network is called."""
        return FAMILIES[self.net.model]

    @property
    def unet(self) -> bool:
        """Whether the network is a UNet with timesteps of a table."""
        return self.net.model == "UNet2DConditionModel"

    @property
    def sdxl(self) -> bool:
        """Whether the network is of SDXL's kind."""
        return self.unet and self.net.config.get("addition_embed_type") == "text_time"

    @property
    def schedule(self) -> ScheduleSpec:
        """Noise levels over time."""
        assert self.header.denoiser is not None
        return self.header.denoiser.schedule

    @property
    def prediction(self) -> str:
        """What the network predicts."""
        assert self.header.denoiser is not None
        return self.header.denoiser.prediction

    @property
    def times(self) -> tuple[float, ...]:
        """Normalised times of the calls."""
        return self.header.times

    @property
    def steps(self) -> int:
        """Network calls an image."""
        return len(self.times)

    @property
    def timesteps(self) -> list[int]:
        """Timesteps of the calls, of a table."""
        assert isinstance(self.schedule, Discrete)
        return [round(time * (len(self.schedule.alphas_cumprod) - 1)) for time in self.times]

    @property
    def sigmas(self) -> list[float]:
        """Noise levels of the calls: of a flow the shares of noise after the shift; of a table the noise-to-signal ratios."""
        alpha, sigma = self.schedule.alpha_sigma(torch.tensor(self.times, dtype=torch.float64))
        levels = sigma if isinstance(self.schedule, RectifiedFlow) else sigma / alpha
        return [float(f"{level:.6g}") for level in levels.tolist()]

    @property
    def metadata(self) -> dict[str, str]:
        """The calls for the header of a file of weights: whoever has it alone can read where the student is called."""
        table = {"fewstep.timesteps": str(self.timesteps)} if isinstance(self.schedule, Discrete) else {}
        return {"format": "pt", "fewstep.sigmas": str(self.sigmas), **table}

    @property
    def lora(self) -> Any:
        """The adapters' settings; None if the student was trained whole."""
        return self.header.lora

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the student comes from."""
        return self.header.provenance

    @cached_property
    def sha256(self) -> str:
        """Of the weights."""
        return weights_sha256(self.file, self.provenance)

    @cached_property
    def pipeline(self) -> Any:
        """The class of diffusers that the pipeline is."""
        return pipeline_class(self.settings.path, self.settings.config)

    @property
    def times_argument(self) -> str:
        """The pipeline's argument that names the times one by one."""
        if isinstance(self.schedule, RectifiedFlow):
            return f"sigmas={[round(time, 6) for time in self.times]}"  # the scheduler shifts them
        return f"timesteps={self.timesteps}"

    @cached_property
    def picture(self) -> tuple[int, int]:
        """Height and width of a picture in pixels."""
        factor = self.settings.pixels_a_latent()
        return factor * self.net.height, factor * self.net.width

    @property
    def usual_size(self) -> bool:
        """Whether the pipeline draws pictures of this size by itself."""
        height = inspect.signature(self.pipeline.__call__).parameters["height"].default
        if height is None:  # after the network's configuration
            return self.settings.resolution is None
        return self.picture == (height, height)

    @property
    def prompt(self) -> str:
        """A prompt that it was trained with."""
        lines = self.settings.prompts and self.settings.prompts / "prompts.jsonl"
        return str(written_lines(lines)[0]) if lines and lines.is_file() else "a photograph"

    def outline(self) -> nn.Module:
        """The library's network without storage."""
        with torch.device("meta"), quiet():
            made: nn.Module = self.net.build().model
        return made
