"""Prompt encoding with a pipeline's text encoders, exactly as in the pipeline's own `__call__`.

`encode_prompt` and `__call__` have different defaults: SANA's instruction before every prompt, PixArt's caption cleaning,
maximal lengths. They are read from the signatures. Knows no network and no file.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from fewstep.networks import Family
from fewstep.system.console import note, quiet
from fewstep.system.errors import TeacherError
from fewstep.system.record import Record
from fewstep.teachers.loading import tokenizer_of

__all__ = ["Encoder", "TextOptions", "encode_arguments"]


class TextOptions(Record):
    """Arguments of a pipeline's call that change how a prompt is encoded, under their names in diffusers."""

    clip_skip: int | None = Field(None, ge=0)
    """Layers of CLIP to skip in addition to the pipeline's own choice: 1 is "clip skip 2" in other programs."""
    max_sequence_length: int | None = Field(None, gt=0)
    """Largest number of tokens for T5 or Gemma."""
    clean_caption: bool | None = None
    """Remove web addresses, markup and the like from prompts (PixArt's and SANA's pipelines)."""
    complex_human_instruction: tuple[str, ...] | None = None
    """Lines before every prompt in SANA's pipeline; [] for none."""


def encode_arguments(kind: type, options: TextOptions, only_changed: bool = False) -> dict[str, Any]:
    """Arguments that a pipeline's `__call__` passes to its `encode_prompt`, other than prompts and tensors.

    Args:
        kind: the pipeline's class.
        options: override the defaults of `__call__`.
        only_changed: omit arguments that equal the defaults of `encode_prompt`.

    Raises:
        TeacherError: an option that the pipeline does not know.
    """
    called = inspect.signature(kind.__call__).parameters
    encoded = inspect.signature(kind.encode_prompt).parameters  # type: ignore[attr-defined]
    known = [name for name in TextOptions.model_fields if name in called and name in encoded]
    given = options.model_dump(exclude_none=True)
    if unknown := given.keys() - set(known):
        raise TeacherError(
            f"teacher.text must hold what {kind.__name__} takes, got {min(unknown)}. Try: leave it out; known are "
            f"{', '.join(known) or 'none'}"
        )
    arguments = {name: called[name].default for name in known} | given
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    if only_changed:
        arguments = {name: value for name, value in arguments.items() if value != encoded[name].default}
    return arguments


class Encoder:
    """A pipeline's text encoders: prompts -> their conditions, and the empty one's, each tensor [count, ...].

    Args:
        pipeline: with its text encoders.
        family: how its network is conditioned.
        arguments: of `encode_arguments`.
        device: where the encoders are.
        config: of its network, if that is not loaded: encode_prompt asks it for widths.
        negative: the prompt that stands for the empty one; None: the pipeline's own choice.
    """

    def __init__(
        self,
        pipeline: Any,
        family: Family,
        arguments: Mapping[str, Any],
        device: torch.device | str,
        config: Mapping[str, Any] | None = None,
        negative: str | None = None,
    ) -> None:
        self.pipeline, self.family, self.arguments, self.device = pipeline, family, dict(arguments), device
        self.negative = negative
        if config is not None:
            stand_in = SimpleNamespace(config=SimpleNamespace(**config), dtype=torch.float32)
            pipeline.__dict__[family.component] = stand_in
        clip = pipeline.components.get("text_encoder")
        if "clip_skip" in self.arguments and clip is not None and "text_model" not in dict(clip.named_children()):
            # transformers 5 moved CLIP's layers up; StableDiffusionPipeline still looks for the last norm in text_model
            clip.__dict__["text_model"] = clip
        self._counters = {
            name: _count_cuts(tokenizer_of(part))
            for name, part in pipeline.components.items()
            if name.startswith("tokenizer") and part
        }
        if self.arguments.get("clean_caption"):
            lacking = [name for name in ("bs4", "ftfy") if importlib.util.find_spec(name) is None]
            if lacking:
                note(
                    f"{type(pipeline).__name__} cleans prompts with bs4 and ftfy, but {' and '.join(lacking)} is not "
                    "installed: prompts are not cleaned, as diffusers itself would do here. Try: pip install beautifulsoup4 ftfy, or "
                    "teacher.text.clean_caption false"
                )

    @torch.no_grad()
    def __call__(
        self, texts: Sequence[str], negative: Sequence[str] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        for counter in self._counters.values():
            counter.prompts = list(texts)
        assert self.family.encode is not None, "an unconditional network has no prompts"
        more = {} if negative is None else {"negative_prompt": list(negative)}
        with quiet():
            return self.family.encode(self.pipeline, list(texts), self.device, self.arguments | more)

    def rows(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts as conditions."""
        return self(texts)[0]

    def empty(self, text: str) -> dict[str, Tensor]:
        """Encode the empty condition [...], or the negative prompt's, together with a prompt."""
        found = self([text])[1] if self.negative is None else self([self.negative], [self.negative])[1]
        return {name: value[0] for name, value in found.items()}

    def cut_prompts(self, count: int) -> Iterator[str]:
        """Yield a sentence for each exceeded limit since the last call: the number of prompts, and an example.

        Args:
            count: prompts encoded.
        """
        same: dict[tuple[int, tuple[str, ...]], list[str]] = {}
        for name, counter in self._counters.items():
            if counter.cut:
                same.setdefault((counter.limit, tuple(counter.cut)), []).append(name)
                counter.cut = {}
        for (limit, prompts), names in same.items():
            example = prompts[0] if len(prompts[0]) <= 120 else f"{prompts[0][:117]}..."
            yield (
                f"{len(prompts):,} of {count:,} prompts are longer than the {limit} tokens of {' and '.join(names)}: the rest "
                f"is not encoded. The first: {example!r}"
            )


class _Counter:
    """Prompts that a tokenizer truncated."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.cut: dict[str, None] = {}
        self.limit = 0


def _count_cuts(tokenizer: Any) -> _Counter:
    """Make a tokenizer count the prompts that it truncates: SANA's pipeline reports none, the others warn once per batch."""
    counter = _Counter()
    kind: Any = type(tokenizer)

    class Counting(kind):
        def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            prompts, texts = counter.prompts, text
            if isinstance(text, str):  # one by one, within a template
                prompts, texts = sorted((prompt for prompt in prompts if prompt in text), key=len)[-1:], [text]
            if kwargs.get("truncation") and isinstance(texts, list) and len(texts) == len(prompts):
                whole = super().__call__(texts, add_special_tokens=kwargs.get("add_special_tokens", True))["input_ids"]
                limit = kwargs["max_length"]
                cut = [prompt for prompt, ids in zip(prompts, whole, strict=True) if len(ids) > limit]
                counter.cut |= dict.fromkeys(cut)
                counter.limit = limit
            return super().__call__(text, *args, **kwargs)

    tokenizer.__class__ = Counting
    return counter
