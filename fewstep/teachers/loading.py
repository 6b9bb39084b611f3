"""Load components of a diffusers pipeline from a folder or the hub, accounting for every weight.

The libraries only warn if a file lacks weights (which stay random), has additional ones, or exists only in half precision.
fewstep refuses the first and reports the others. Knows no diffusion.
"""

from __future__ import annotations

import importlib
import re
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn

from fewstep.formats.original_names import original_unet_paths
from fewstep.system.console import note
from fewstep.system.errors import TeacherError

__all__ = [
    "LACKING",
    "absent_parts",
    "component_class",
    "components_of",
    "find_place",
    "load_parts",
    "note_unused_weights",
    "refuse_empty_tokenizers",
    "refuse_missing_weights",
    "tokenizer_of",
    "variant_of",
]

OPTIONAL = ("text_encoder_3", "tokenizer_3", "safety_checker", "feature_extractor", "image_encoder")
"""Components that a pipeline works without: SD3's T5 is zeros then, the others see pictures."""
LACKING = (
    "{whose} must hold all weights of its networks, got a file that lacks some. Try: a whole checkpoint (network, VAE and text "
    "encoders in one), fetched again"
)
MOST_TOKENS = 10**6  # the library's number for "not known" is 10**30
_WEIGHTS = (".safetensors", ".bin")
_DENOISING = ("unet", "transformer")
_NETWORKS = ("unet", "transformer", "vae", "text_encoder")


def find_place(name: str, setting: str) -> None:
    """Refuse at once a name that is neither on this machine nor on the hub; a library would search for half a minute.

    Args:
        name: a folder, a file, or a hub name `owner/name`.
        setting: name of the setting, for messages.

    Raises:
        TeacherError: it does not exist.
    """
    if Path(name).is_file() and Path(name).suffix != ".safetensors":
        raise TeacherError(
            f"{setting} must be a folder or a .safetensors file, got {name}: other files may run code when they are read. Try: "
            "convert it to .safetensors"
        )
    if Path(name).exists():
        return
    owner = name.partition("/")[0]
    hub_like = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not name.endswith((".safetensors", ".ckpt"))
    if not hub_like or (Path(owner).is_dir() and not _cached(name)):
        raise TeacherError(
            f"{setting} must be a pipeline's folder, a .safetensors file or a hub name (owner/name), got {name!r}, which does "
            f"not exist (looked in {Path(name).absolute().parent}). Try: check the spelling, or start in another folder"
        )
    if _cached(name):
        return
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise TeacherError(
            f"{setting} {name!r} is no folder here and not in the hub's cache, and HF_HUB_OFFLINE is set"
        )
    try:
        address = f"{constants.ENDPOINT}/{name}/resolve/main/model_index.json"
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return  # the hub is reachable: the library explains the problem
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, OSError) and "certificate" not in str(reason).lower():
            raise TeacherError(
                f"{setting} {name!r} is no folder here (looked in {Path(name).absolute().parent}), and the hub cannot be "
                f"reached ({reason}). Try: check the spelling, or the network"
            ) from None


def _cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "model_index.json"), str)


def absent_parts(index: Mapping[str, Any], folder: Path, without: Collection[str]) -> set[str]:
    """Omitted components: null in the index, named in `without`, or optional and not in the folder.

    Args:
        index: content of model_index.json.
        folder: the pipeline's folder; anything else for the hub.
        without: the user's setting.

    Raises:
        TeacherError: `without` names an unknown component.
    """
    parts = components_of(index)
    if unknown := set(without) - parts.keys():
        raise TeacherError(f"teacher.without must name components, got {min(unknown)}: there are {', '.join(parts)}")
    gone = {name for name in OPTIONAL if name in parts and folder.is_dir() and not (folder / name).is_dir()}
    if lost := {name for name in gone - set(without) if parts[name][0] is not None}:
        note(
            f"{folder}: {', '.join(sorted(lost))} is listed and not there: it is left out, as diffusers does where it is null"
        )
    return {name for name, kind in parts.items() if kind[0] is None} | set(without) | gone


def components_of(index: Mapping[str, Any]) -> dict[str, Any]:
    """Components of a model_index.json: library and class by name. Its settings may be lists too (Krea 2's layers)."""
    found = {name: kind for name, kind in index.items() if isinstance(kind, list | tuple) and len(kind) == 2}
    return {name: kind for name, kind in found.items() if kind[0] is None or isinstance(kind[0], str)}


def component_class(index: Mapping[str, Any], name: str) -> str:
    """Class of a component; PixArt's folders use an older name for their network."""
    kind = str(index[name][1])
    old = kind == "Transformer2DModel" and str(index.get("_class_name")).startswith("PixArt")
    return "PixArtTransformer2DModel" if old else kind


def load_parts(
    diffusers: Any,
    path: str,
    index: Mapping[str, Any],
    wanted: Collection[str],
    variant: str | None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Load the networks among a pipeline's components by name; the library loads tokenizers and schedulers.

    Args:
        diffusers: the library.
        path: the pipeline's folder.
        index: content of its model_index.json.
        wanted: names of components.
        variant: which files to read; None: the plain ones, or the only variant there is.
        dtype: of the denoising network, whose weights are rounded as they are read.

    Raises:
        TeacherError: weights are missing, or there are several variants and no plain files.
        OSError, ValueError: a file that cannot be read.
    """
    libraries = {"diffusers": diffusers, "transformers": importlib.import_module("transformers")}
    found: dict[str, Any] = {}
    for name in wanted:
        library = libraries.get(index[name][0])
        if library is None or not name.startswith(_NETWORKS):
            continue
        chosen = variant_of(Path(path) / name, variant)
        more: dict[str, Any] = {} if chosen is None else {"variant": chosen}
        if name in _DENOISING and dtype != torch.float32:
            more["torch_dtype"] = dtype
        kind = getattr(library, component_class(index, name))
        found[name], about = kind.from_pretrained(path, subfolder=name, output_loading_info=True, **more)
        found[name].eval()
        _account(f"{path}/{name}", {key: sorted(map(str, value)) for key, value in about.items()})
    return found


def tokenizer_of(part: Any) -> Any:
    """Return the tokenizer of a pipeline's component of that name, which in FLUX.2-dev is a processor of text and pictures."""
    from transformers import ProcessorMixin

    return part.tokenizer if isinstance(part, ProcessorMixin) else part


def refuse_empty_tokenizers(parts: Mapping[str, Any], whose: str) -> None:
    """Refuse tokenizers that the library made up because their files are missing: every prompt would be the same to them.

    Args:
        parts: a pipeline's tokenizers and text encoders by name.
        whose: the pipeline's name.

    Raises:
        TeacherError: a tokenizer knows less than half of the tokens of its encoder, or not how many the encoder reads.
    """
    for name, encoder in parts.items():
        tokenizer = tokenizer_of(parts.get(name.replace("text_encoder", "tokenizer")))
        if not isinstance(encoder, nn.Module) or tokenizer is None:
            continue
        known, there = len(tokenizer), cast(Any, encoder).get_input_embeddings().num_embeddings
        lacks = f"{known:,} of {there:,} tokens" if 2 * known < there else ""
        if tokenizer.model_max_length > MOST_TOKENS and hasattr(cast(Any, encoder).config, "max_position_embeddings"):
            lacks = lacks or "no tokenizer_config.json that says how long a prompt may be"
        if lacks:
            raise TeacherError(
                f"the tokenizer of {name} of {whose} must know the tokens of its encoder, got {lacks}: its files are not whole. "
                "Try: fetch the folder again"
            )


def refuse_missing_weights(pipeline: Any, whose: str) -> None:
    """Refuse a single-file pipeline with incomplete networks: the library leaves missing weights without storage.

    Raises:
        TeacherError: a component lacks weights.
    """
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            absent = [key for key, value in part.named_parameters() if value.is_meta]
            if absent:
                raise TeacherError(f"{LACKING.format(whose=whose)}: {len(absent):,} of {name}, the first {absent[0]}")


def note_unused_weights(network: nn.Module, file: Path) -> None:
    """Say which weights of a single file's UNet the library did not read: it takes those that it knows and is silent on others."""
    start = "model.diffusion_model."
    known = set(original_unet_paths(network).values())
    with safe_open(file, "pt") as opened:
        names = [name for name in opened.keys() if name.startswith(start)]  # noqa: SIM118  (no mapping)
    unused = [name for name in names if name.removeprefix(start).rpartition(".")[0] not in known]
    if unused:
        note(
            f"{file}: {len(unused):,} of the {len(names):,} weights of its UNet belong to no layer and were not used, the first "
            f"{min(unused)}: this model may have parts that the teacher will lack"
        )


def _account(whose: str, about: Mapping[str, list[str]]) -> None:
    """Refuse weights that stayed random, and report a file's unused ones."""
    lacking = [*about.get("missing_keys", ()), *about.get("mismatched_keys", ())]
    if lacking:
        raise TeacherError(
            f"{whose} must hold all weights of its network, got none of the right shape for {len(lacking)}, the first "
            f"{lacking[0]}: the library would fill them with random numbers. Try: fetch the folder again"
        )
    # buffers that older versions saved
    unused = [key for key in about.get("unexpected_keys", ()) if not key.endswith("position_ids")]
    if unused:
        note(
            f"{whose}: {len(unused):,} weights in its files belong to no layer and were not used, the first {unused[0]}"
        )


def variant_of(folder: Path, asked: str | None) -> str | None:
    """Choose a component's files: the requested variant if it exists, the plain ones, or the only variant."""
    names = [file.name for file in folder.glob("*") if file.suffix in _WEIGHTS] if folder.is_dir() else []
    # model.safetensors, model-00001-of-00002.safetensors; model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
    kinds = {None if name.count(".") == 1 else name.split(".")[1].split("-")[0] for name in names}
    if not kinds or asked in kinds:
        return asked
    if None in kinds:
        if asked is not None:
            note(f"{folder} has no files of the variant {asked}: the plain ones are read")
        return None
    if asked is not None or len(kinds) > 1:
        raise TeacherError(
            f"teacher.variant must be one of {', '.join(sorted(map(str, kinds)))} for {folder}, got {asked or 'none'}"
        )
    (only,) = kinds
    note(f"{folder.parent}: only files of the variant {only} are there, which are read (teacher.variant)")
    return only
