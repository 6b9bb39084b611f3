"""Weights of a student's pipeline, one tensor at a time: from the teacher's files, its LoRA, and the student's own.

Other sources (a single file with another program's names, and old files whose names the library changes) are loaded like
the teacher.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.formats.dmd2 import read_tensors
from fewstep.formats.lora import Factors, LoraFile
from fewstep.formats.lora_reading import read_lora
from fewstep.networks.quantized import quantizable
from fewstep.students.export.facts import Facts
from fewstep.system.console import quiet
from fewstep.system.errors import FileError
from fewstep.system.tensors import Entry, entries_of, read_entries
from fewstep.teachers.loading import component_class, components_of, variant_of
from fewstep.teachers.pipelines import is_single_file, local_folder

__all__ = ["NETWORK", "Weights"]

NETWORK = "net.model."  # prefix of diffusers' network in a text-to-image denoiser
_SHARD = re.compile(r".*-\d{5}-of-\d{5}$")


class Weights:
    """Weights of a student's pipeline.

    Attributes:
        facts: the student's facts.
        folder: the teacher's folder on this machine; None for a single file.
        index: content of its model_index.json.
        absent: missing components.
    """

    def __init__(self, facts: Facts) -> None:
        settings = facts.settings
        self.facts, self.folder = facts, None
        self.index: dict[str, Any] = {}
        self.absent: set[str] = set()
        if not is_single_file(settings.path):
            with quiet():
                index, place, skipped = local_folder(settings.path, "whole", settings.variant, settings.without)
            self.index, self.folder, self.absent = index, Path(place), set(skipped)

    @cached_property
    def whole(self) -> Any:
        """Load the library's pipeline, with the teacher's LoRA merged."""
        return self.facts.settings.pipeline()

    @cached_property
    def _lora(self) -> LoraFile | None:
        lora = self.facts.settings.lora
        return None if lora is None else replace(read_lora(lora), whole={})  # frozen weights were compared in training

    @property
    def variant(self) -> str | None:
        """Variant that diffusers must be told to find the folder's files; None: the plain ones."""
        if self.folder is None:
            return None
        parts = [name for name in components_of(self.index) if name not in self.absent]
        found = (variant_of(self.folder / name, self.facts.settings.variant) for name in parts)
        return next((variant for variant in found if variant is not None), None)

    def component(self, name: str) -> dict[str, Entry]:
        """Read the weights of a component, by the library's names or its files' own.

        Raises:
            FileError: the files are missing or damaged.
        """
        if self.folder is None:
            return entries_of(getattr(self.whole, name).state_dict())
        found = self._of_files(self.folder / name)
        if self._lora is not None and name.startswith("text_encoder") and self._lora.text_keys:
            kind = component_class(self.index, name)
            changes = self._lora.for_encoders(self._encoders).get(name, {})
            missing = [path for path in changes if _place(path, found) is None]
            assert not missing, f"{missing[0]} of the {kind} is not in its files"
            for path, change in changes.items():
                key = str(_place(path, found))
                found[key] = _changed(found[key], change, self.facts.settings.lora_scale)
        return found

    @cached_property
    def _encoders(self) -> dict[str, nn.Module]:
        """Build the text encoders without storage."""
        import transformers

        found: dict[str, nn.Module] = {}
        for name in components_of(self.index):
            if name.startswith("text_encoder") and name not in self.absent:
                assert self.folder is not None
                config = transformers.AutoConfig.from_pretrained(self.folder / name)
                with torch.device("meta"), quiet():
                    found[name] = getattr(transformers, component_class(self.index, name))(config)
        return found

    def network(self) -> dict[str, Entry]:
        """Read the student's network with diffusers' names and the adapters merged in float32.

        Raises:
            FileError: files are missing or damaged.
        """
        own = read_entries(self.facts.file)
        if self.facts.lora is None:
            return {name.removeprefix(NETWORK): entry for name, entry in own.items()}
        outline = self.facts.outline()
        names = outline.state_dict().keys()
        found = self.component(self.facts.family.component)
        if self.folder is not None and not names <= found.keys():  # old names, which the library changes
            pipeline = self.facts.settings.pipeline("networks")
            found = entries_of(getattr(pipeline, self.facts.family.component).state_dict())
        elif self.folder is not None and self._lora is not None:
            for path, change in self._lora.for_network(outline).items():
                found[f"{path}.weight"] = _changed(found[f"{path}.weight"], change, self.facts.settings.lora_scale)
        found = {name: found[name] for name in names}
        scale = self.facts.lora.alpha / self.facts.lora.rank
        for path, (down, up) in self.adapters().items():
            key = f"{path}.weight"
            found[key] = replace(found[key], dtype=torch.float32, make=_adapted(found[key], down, up, scale))
        return found

    def in_float8(self, dtype: torch.dtype) -> dict[str, Entry]:
        """The network with the weights of its blocks' linear layers and convolutions cast to float8 (e4m3fn), without scales.

        Args:
            dtype: of the other tensors.
        """
        layers = set(quantizable(outline := self.facts.outline()))
        cast = {f"{path}.weight" for path, layer in outline.named_modules() if layer in layers}
        found = {}
        for name, entry in self.network().items():
            kind = torch.float8_e4m3fn if name in cast else dtype if entry.dtype.is_floating_point else entry.dtype
            found[name] = replace(entry, dtype=kind)
        return found

    def adapters(self) -> dict[str, tuple[Entry, Entry]]:
        """Read A and B of each adapter, by the path of its layer."""
        own = read_entries(self.facts.file)
        found = {}
        for name in own:
            if name.endswith(".down"):
                path = name.removesuffix(".down").removeprefix("layers.").replace("|", ".").removeprefix(NETWORK)
                found[path] = own[name], own[f"{name.removesuffix('.down')}.up"]
        return found

    def _of_files(self, folder: Path) -> dict[str, Entry]:
        """Read the tensors of a component's weight files."""
        chosen = variant_of(folder, self.facts.settings.variant)
        for ending in (".safetensors", ".bin"):
            files = [file for file in sorted(folder.glob(f"*{ending}")) if _variant(file) == chosen]
            single = [file for file in files if not _SHARD.match(file.name.removesuffix(ending))]
            found: dict[str, Entry] = {}
            for file in single[:1] or files:
                found |= read_entries(file) if ending == ".safetensors" else entries_of(read_tensors(file))
            if found:
                return found
        raise FileError(f"{folder} must hold weights, got none. Try: fetch the folder again")


def _variant(file: Path) -> str | None:
    return None if file.name.count(".") == 1 else file.name.split(".")[1].split("-")[0]


def _place(path: str, names: Mapping[str, Any]) -> str | None:
    """Key of a text encoder's layer; CLIP's are below `text_model` in some versions of transformers."""
    bare = path.removeprefix("text_model.")
    return next(
        (key for key in (f"{path}.weight", f"text_model.{bare}.weight", f"{bare}.weight") if key in names), None
    )


def _changed(entry: Entry, change: Factors, strength: float) -> Entry:
    return replace(entry, dtype=torch.float32, make=lambda: change.applied(entry.make(), strength))


def _adapted(entry: Entry, down: Entry, up: Entry, scale: float) -> Any:
    def make() -> Tensor:
        a, b = down.make().float(), up.make().float()
        return entry.make().float() + scale * (b.flatten(1) @ a.flatten(1)).reshape(entry.shape)

    return make
