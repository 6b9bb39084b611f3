"""Settings of the generator: times, transition and adapters."""

from __future__ import annotations

import itertools
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from fewstep.diffusion.generator import Transition, calls_at
from fewstep.diffusion.noise import Discrete, Schedule
from fewstep.networks.lora import LoraSpec
from fewstep.system.errors import SettingsError
from fewstep.system.record import Record

__all__ = ["GeneratorSpec"]


class GeneratorSpec(Record):
    """The generator: its times or noise levels, its transition, and adapters."""

    sigmas: tuple[PositiveFloat, ...] | None = None
    """Noise-to-signal ratio of each call, noisiest first: for EDM models [80] in DMD, [2.5] in SiD."""
    timesteps: tuple[PositiveInt, ...] | None = None
    """Or the timestep of each call, for models with a table of noise levels: [999, 749, 499, 249] in DMD2's SDXL."""
    times: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = None
    """Or the normalised time of each call."""
    transition: Transition = "renoise"
    """Step from the sample of one call to the input of the next: `renoise` adds fresh noise (DMD2); `ode` is a deterministic
    DDIM step, for trajectory methods. Students with `ode` cannot be exported."""
    lora: LoraSpec | None = None
    """Train low-rank adapters on the teacher's own network instead of a copy of it; null for a copy."""

    @model_validator(mode="after")
    def _one(self) -> GeneratorSpec:
        ways = {"sigmas": self.sigmas, "timesteps": self.timesteps, "times": self.times}
        given = {name: levels for name, levels in ways.items() if levels is not None}
        if len(given) != 1:
            raise ValueError(
                "one of sigmas, timesteps and times must be given. Try: sigmas [2.5], timesteps [999, 749] or times [1.0]"
            )
        ((name, levels),) = given.items()
        if not levels or any(later >= earlier for earlier, later in itertools.pairwise(levels)):
            raise ValueError(
                f"{name} must hold a level for each call and fall strictly, got {list(levels)}. Try: [80, 10]"
            )
        return self

    @property
    def steps(self) -> int:
        """Network calls of the generator."""
        return len(self.sigmas or self.timesteps or self.times or ())

    def resolve(self, schedule: Schedule) -> tuple[float, ...]:
        """Normalised times under the teacher's schedule.

        Raises:
            SettingsError: timesteps of a schedule that has none, or levels that lie outside the grid or do not fall.
        """
        if self.times is not None:
            return self.times
        if self.timesteps is not None:
            if not isinstance(schedule, Discrete):
                raise SettingsError(
                    "`generator.timesteps` must be left out for a model without a table of noise levels. Try: sigmas or times"
                )
            last = len(schedule.alphas_cumprod) - 1
            if not all(0 < step <= last for step in self.timesteps):
                raise SettingsError(f"`generator.timesteps` must lie in 1 .. {last}, got {list(self.timesteps)}")
            return tuple(step / last for step in self.timesteps)
        assert self.sigmas is not None  # by _one
        try:
            return calls_at(schedule, self.sigmas, "generator.sigmas")
        except ValueError as error:
            raise SettingsError(str(error)) from None
