"""Pipelines of the diffusers library: their parts, and single files read as pipelines. Knows no settings of fewstep."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from fewstep.formats.lora import Factors, LoraFile, merge
from fewstep.networks import FAMILIES, Family
from fewstep.system.bounds import read_json, shown
from fewstep.system.console import quiet
from fewstep.system.errors import FileError, TeacherError, UserError
from fewstep.teachers.loading import (
    absent_parts,
    component_class,
    components_of,
    find_place,
    load_parts,
)
from fewstep.teachers.refusals import (
    refuse_other_conditions,
    refuse_other_noise,
    refuse_other_tasks,
    refuse_unknown,
)

Part = Literal["whole", "text", "networks", "vae", "scheduler"]


KNOWN = {  # stored configurations, so that `plan` needs no internet access
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0",),
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"),
    "sd35-medium": ("stabilityai/stable-diffusion-3.5-medium",),
    "flux": ("black-forest-labs/FLUX.1-dev",),
    "flux2-klein-4b": ("black-forest-labs/FLUX.2-klein-base-4B",),
    "flux2-klein-9b": ("black-forest-labs/FLUX.2-klein-base-9B",),
    "flux2-dev": ("black-forest-labs/FLUX.2-dev",),
    "longcat-image": ("meituan-longcat/LongCat-Image", "meituan-longcat/LongCat-Image-Dev"),
    "z-image": ("Tongyi-MAI/Z-Image",),
    "qwen-image": ("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512"),
}


TINY = ("madebyollin/taesd", "madebyollin/taesdxl")  # these have the library's default configuration


LATENT_STEP = 8  # pixels a latent of Stable Diffusion's VAE, if the pipeline has none to ask


def network_of(pipeline: Any) -> tuple[Any, Family]:
    """Find the denoising network of a pipeline, and its calling convention.

    Raises:
        TeacherError: no network, or an unknown one.
    """
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    name = type(network).__name__
    if name not in FAMILIES:
        what = "no network" if network is None else f"a {name}"
        raise TeacherError(f"{type(pipeline).__name__} has {what}: known here are {', '.join(FAMILIES)}")
    return network, FAMILIES[name]


def family_of(parts: Mapping[str, Any], whose: str) -> tuple[str, Family]:
    """Class of the network and its calling convention, from a pipeline's model_index.json.

    Raises:
        TeacherError: the pipeline is of a class that is not known here.
    """
    diffusers = library()
    name = next((component_class(parts, key) for key in ("unet", "transformer") if key in parts), None)
    forward = getattr(getattr(diffusers, str(name), None), "forward", None)
    refuse_unknown(whose, parts, name, getattr(diffusers, str(parts.get("_class_name")), None), forward)
    return str(name), FAMILIES[str(name)]


def is_single_file(path: str) -> bool:
    return Path(path).suffix == ".safetensors"


def known_configurations(kind: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Class and configuration of the network of a model family, and the configuration of its VAE."""
    file = resources.files("fewstep") / "assets" / "pipelines" / f"{kind}.json"
    parts = json.loads(file.read_text(encoding="utf-8"))
    network = parts.get("unet") or parts["transformer"]
    return network["_class_name"], network, parts["vae"]


def library() -> Any:
    try:
        import diffusers
        import transformers  # noqa: F401  (an undeclared requirement of diffusers)
    except ImportError:
        raise TeacherError("text-to-image teachers need diffusers: pip install 'fewstep[t2i]'") from None
    return diffusers


LOADING_FAILS: tuple[type[Exception], ...] = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, NotImplementedError, ArithmeticError, AssertionError,
    ImportError, MemoryError,
)  # fmt: skip


def single_file_fails() -> tuple[type[Exception], ...]:
    """Exceptions that the libraries raise for a damaged or unsupported file."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from safetensors import SafetensorError

    return SingleFileComponentError, SafetensorError


def read_single_file(diffusers: Any, path: Path, config: str | None, without: Sequence[str]) -> Any:
    if not path.is_file():
        raise TeacherError(
            f"`teacher.path` must be a file that exists, got {path} (looked in {path.absolute().parent})"
        )
    if config is None:
        return pipeline_class(str(path), None).from_single_file(str(path), **dict.fromkeys(without))
    index = diffusers.DiffusionPipeline.load_config(config)
    if "unet" not in index:
        single_file_kind(path)  # which says what to do
    kind = getattr(diffusers, index["_class_name"])
    local = Path(config).is_dir()
    return kind.from_single_file(str(path), config=config, local_files_only=local, **dict.fromkeys(without))


def single_file_kind(path: Path) -> str:
    """Return which of `KNOWN` a single file is, sdxl or sd15.

    Raises:
        TeacherError: it holds no UNet under the original names.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = sorted(file.keys())
    if not any(name.startswith("model.diffusion_model.input_blocks.") for name in names):
        raise TeacherError(
            f"one file of a teacher must hold network, VAE and text encoders of Stable Diffusion or SDXL, got {path} with "
            f"{len(names):,} tensors, the first {shown(names[0], quote=False) if names else '-'}: other models are read from a "
            "pipeline's folder. Try: load it by from_single_file of its network's class in diffusers, put that into the base model's "
            "pipeline, and save_pretrained the pipeline"
        )
    return "sdxl" if any(name.startswith("conditioner.embedders.") for name in names) else "sd15"


def is_wanted(component: str, part: Part) -> bool:
    """Return whether a component of a pipeline belongs to a part of it; the scheduler belongs to all."""
    text = component.startswith(("text_encoder", "tokenizer"))
    seen = component in ("safety_checker", "feature_extractor", "image_encoder")  # of finished pictures
    wanted = {
        "whole": True,
        "text": text,
        "networks": not (text or seen),
        "vae": component == "vae",
        "scheduler": False,
    }
    return component == "scheduler" or wanted[part]


def config_of(network: nn.Module) -> dict[str, Any]:
    """Configuration of a network, as JSON values, without the path that it was loaded from."""
    config = {key: value for key, value in cast(Any, network).config.items() if key != "_name_or_path"}
    return json.loads(json.dumps(config))


def latent_factor(pipeline: Any) -> int:
    """Pixels per sample of the network along a side: the VAE's downsampling, times the latents folded into channels."""
    if "vae" not in pipeline.components:  # made for pixels; else None is a VAE that was not read
        return 1
    kind = type(pipeline).__name__
    folded = next((family.folded for family in FAMILIES.values() if kind in family.pipelines), 1)
    return folded * (LATENT_STEP if pipeline.vae is None else int(pipeline.vae_scale_factor))


def channels_of(pipeline: Any, network: nn.Module) -> int:
    """Channels of a sample; the networks of FLUX.1 and Qwen-Image count those of 2 x 2 latents."""
    return int(cast(Any, network).config.in_channels) // FAMILIES[type(network).__name__].packed


def network_sha256(network: nn.Module) -> str:
    """Compute the sha256 of a network's weights."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def merge_lora(lora: LoraFile, pipeline: Any, part: Part, strength: float) -> None:
    """Merge a LoRA into those components of a pipeline that belong to a part of it, in float32."""
    changed: list[tuple[nn.Module, Mapping[str, Factors]]] = []
    try:
        if part in ("whole", "networks"):
            network, _ = network_of(pipeline)
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
        if factors:  # text encoders keep their file's dtype, which would lose a small change
            merge(module.float(), factors, strength)


def encoder_files_sha256(path: str) -> str:
    """Fingerprint of the encoders' files without reading gigabytes: sizes, beginnings and ends."""
    root = Path(path)
    weights = [file for ending in ("safetensors", "bin") for file in root.glob(f"text_encoder*/*.{ending}")]
    files = [root] if root.is_file() else sorted(weights)
    if not files:  # on the hub, whose cache is keyed by content already
        return path
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.parent.name if file != root else ''} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(2**20))
            stream.seek(max(0, size - 2**20))
            digest.update(stream.read())
    return digest.hexdigest()


def configurations(place: str, setting: str) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """Class and configuration of a pipeline's network, and the configuration of its VAE if there is one.

    Args:
        place: folder, hub name or single file.
        setting: the setting that names it, for messages.

    Raises:
        TeacherError: there is no configuration, or it is not of a text-to-image model.
    """
    kind = next((kind for kind, names in KNOWN.items() if place in names), None)
    if kind is None and is_single_file(place):
        if not Path(place).is_file():
            raise TeacherError(f"teacher {place} does not exist (looked in {Path(place).absolute().parent})")
        kind = single_file_kind(Path(place))
    if kind is not None:
        return known_configurations(kind)
    find_place(place, setting)
    diffusers = library()
    try:
        with quiet():
            parts = index_of(place)
            model, family = family_of(parts, place)
            if not hasattr(diffusers, str(parts.get("_class_name"))):
                raise TeacherError(
                    f"{place} must be a pipeline that diffusers has, got {parts.get('_class_name')}: it is not known here"
                )
            network = getattr(diffusers, model).load_config(place, subfolder=family.component)
            vae = parts.get("vae", [None, None])
            settings = None if vae[0] is None else getattr(diffusers, vae[1]).load_config(place, subfolder="vae")
            refuse_other_conditions(place, str(parts.get("_class_name")), network)
            if isinstance(kind := parts.get("scheduler"), list) and kind[0] == "diffusers":
                scheduler = getattr(diffusers, str(kind[1]), None)
                if scheduler is not None:  # check its noise law before reading gigabytes
                    refuse_other_noise(scheduler.from_pretrained(place, subfolder="scheduler"), place)
            refuse_other_tasks(place, network, settings, family.packed * family.folded**2)
            if parts.get("requires_aesthetics_score"):
                raise TeacherError(
                    f"{place} must be a text-to-image model, got SDXL's refiner, which begins with a picture"
                )
            return model, network, settings
    except UserError:
        raise
    except LOADING_FAILS as error:
        why = shown((str(error).splitlines() or [type(error).__name__])[0], quote=False)
        raise TeacherError(f"the configuration of {place} cannot be had: {why}") from None


def index_of(place: str) -> dict[str, Any]:
    """Read the model_index.json of a folder, or of the hub.

    Raises:
        TeacherError: it is no table of components with their classes.
        FileError: it is no JSON, or too large or deep.
    """
    file = Path(place) / "model_index.json"
    index = read_json(file) if file.exists() else library().DiffusionPipeline.load_config(place)
    if not isinstance(index, Mapping) or not isinstance(index.get("_class_name"), str):
        raise TeacherError(
            f"{file} must be a table of components with `_class_name`, got {shown(index)}. Try: fetch the folder again"
        )
    for name in ("unet", "transformer", "vae", "scheduler"):
        kind = index.get(name, [None, None])
        if not (isinstance(kind, list | tuple) and len(kind) == 2 and all(isinstance(k, str | None) for k in kind)):
            raise TeacherError(
                f"`{name}` of {file} must be a library and a class, got {shown(kind)}. Try: fetch the folder again"
            )
    return dict(index)


def scheduler_configuration(place: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read model_index.json of a pipeline, and its scheduler's configuration with `_class_name`; empty where there is no scheduler."""
    diffusers = library()
    with quiet():
        index = index_of(place)
        name = (index.get("scheduler") or [None, None])[1]
        kind = getattr(diffusers, str(name), None)
        if kind is None:
            return index, {}
        try:
            return index, {**kind.load_config(place, subfolder="scheduler"), "_class_name": name}
        except OSError:  # whoever loads the pipeline says so
            return index, {"_class_name": name}


def read_folder(
    place: str, part: Part, variant: str | None, without: Sequence[str], dtype: torch.dtype = torch.float32
) -> Any:
    """The pipeline of a folder, or of the hub, whose files are fetched to a folder first; `dtype` is of its denoising network."""
    diffusers = library()
    index, place, skipped = local_folder(place, part, variant, without)
    wanted = [name for name in components_of(index) if name not in skipped]
    loaded = load_parts(diffusers, place, index, wanted, variant, dtype)
    return diffusers.DiffusionPipeline.from_pretrained(place, variant=variant, **skipped, **loaded)


def local_folder(
    place: str, part: Part, variant: str | None, without: Sequence[str]
) -> tuple[dict[str, Any], str, dict[str, None]]:
    """Find a pipeline's model_index.json, its folder on this machine, and the components outside of a part.

    Raises:
        TeacherError: it does not exist, or lacks a component.
    """
    diffusers = library()
    find_place(place, "teacher.path")
    index = index_of(place)
    parts = components_of(index)
    skipped = dict.fromkeys(name for name in parts if not is_wanted(name, part))
    if not Path(place).is_dir():
        place = diffusers.DiffusionPipeline.download(place, variant=variant, **skipped)
    skipped |= dict.fromkeys(absent_parts(index, Path(place), without))
    if lost := [name for name in parts if name not in skipped and not (Path(place) / name).is_dir()]:
        raise TeacherError(
            f"{place} must hold the components of its model_index.json, got no folder {lost[0]}. Try: fetch the folder again"
        )
    return index, place, skipped


def pipeline_class(path: str, config: str | None) -> Any:
    """Find the pipeline's class in diffusers."""
    diffusers = library()
    if is_single_file(path) and config is None:
        sdxl = single_file_kind(Path(path)) == "sdxl"
        return diffusers.StableDiffusionXLPipeline if sdxl else diffusers.StableDiffusionPipeline
    with quiet():
        name = index_of(config or path)["_class_name"]
    kind = getattr(diffusers, str(name), None)
    if kind is None:
        raise TeacherError(f"{path} must be a pipeline that diffusers has, got {name}: it is not known here")
    return kind
