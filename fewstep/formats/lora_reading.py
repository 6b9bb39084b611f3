"""Read LoRA files of every common form (kohya, PEFT, diffusers, LoCon, DoRA) into layers and factors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.formats.dmd2 import read_tensors
from fewstep.formats.lora import ENCODERS, NETWORK, Layer, LoraFile, about, some, stripped
from fewstep.system.bounds import parse_json, read_json, reading, regular_file, shown
from fewstep.system.errors import FileError

__all__ = ["read_lora"]


PART = re.compile(
    r"(?P<layer>.+?)(?:"
    r"\.lora_(?P<kohya>down|up|mid)\.weight"
    r"|\.lora_(?P<peft>A|B)(?:\.(?P<adapter>[^.]+))??(?:\.weight)?"
    r"|(?:\.lora|\.lora_linear_layer|_lora)\.(?P<diffusers>down|up)\.weight"
    r"|(?:\.lora|\.lora_linear_layer|_lora)?(?:\.down|\.up)?(?:\.weight)?\.(?P<alpha>alpha)"
    r"|\.(?P<lycoris>dora_scale)"
    r"|(?:\.lora)?\.(?P<magnitude>lora_magnitude_vector)(?:\.(?P<named>[^.]+))??(?:\.weight)?"
    r")"
)


TEXT = re.compile(
    r"lora_te(?P<kohya>[123]?)_|text_encoder(?:_(?P<diffusers>[23]))?\."
    r"|text_encoders\.(?P<comfyui>clip_l|clip_g|t5xxl)\.(?:transformer\.)?"
)


# unsupported methods: name -> pattern of key endings
FOREIGN = {
    "LoHa": r"\.hada_(w|t)\w+(\.\w+)?",
    "LoKr": r"\.lokr_(w|t)\w+(\.\w+)?",
    "GLoRA": r"\.(a1|a2|b1|b2|bm)\.weight",
    "OFT or BOFT": r"\.(oft|boft)_\w+(\.\w+)*",
    "IA3": r"\.(ia3_l\w*|on_input)(\.\w+)?",
    "VeRA": r"vera_\w+(\.\w+)*",
    "a difference of whole weights": r"\.diff(_b)?",
    "LyCORIS norms": r"\.[wb]_norm",
    "LyCORIS scalars": r"\.scalar",
    "LoRA biases": r"\.lora_B(\.\w+)?\.bias",
    "LoRA of embeddings": r"\.lora_embedding_[AB](\.\w+)?",
    "textual inversion": r"bundle_emb\..+|^emb_params|^clip_[lg]",
    "XLabs' LoRA of FLUX": r"\.processor\.(qkv|proj)_lora\d\.(down|up)\.weight",
}


# PEFT settings whose result is neither W + (alpha / r) B A nor DoRA
OTHER_MATHS = (
    "fan_in_fan_out", "layer_replication", "use_qalora", "alora_invocation_tokens", "use_bdlora", "velora_config",
    "monteclora_config", "arrow_config", "kasa_config", "target_parameters",
)  # fmt: skip


REPEATS, NESTED = re.compile(r"[*+{]"), re.compile(r"\)[*+{]")


OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")  # initialisations that move the frozen weights


def read_lora(path: Path) -> LoraFile:
    """Read a file, or a folder of PEFT, diffusers or DMD2's program. Nothing in it is executed.

    Args:
        path: .safetensors, or a `torch.save` file of tensors; a folder with `adapter_model.*` and `adapter_config.json`,
            with `pytorch_lora_weights.*`, with such folders for each component (`unet`, `text_encoder`, ...), with
            `pytorch_model.bin` or `model.safetensors`, or with one .safetensors file.

    Raises:
        FileError: it is missing, damaged, incomplete, or not LoRA.
    """
    path = Path(path)
    layers: dict[str, Layer] = {}
    whole: dict[str, Tensor] = {}
    notes: list[str] = []
    made_for = ""
    for before, file in _files(path):
        tensors, metadata = _tensors(file)
        if not tensors:
            raise FileError(f"{file} holds no tensors. Try: fetch it again")
        _refuse_foreign(file, tensors)
        found: dict[str, Layer] = {}
        adapters, twice = set(), []
        for key, value in tensors.items():
            part = PART.fullmatch(key)
            if part is None:
                whole[before + key] = value
                continue
            adapters |= {part["adapter"] or part["named"]} - {None}
            if _take(found, before, part, key, value):
                twice.append(key)
        if len(adapters) > 1:
            raise FileError(about(file, f"it holds several adapters: {', '.join(sorted(adapters))}"))
        if twice:
            raise FileError(about(file, f"matrices of {len(twice)} layers are given twice, such as {some(twice)}"))
        _check_parts(file, found)
        notes += _give_alphas(file, found, metadata)
        made_for = made_for or metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture", "")
        layers |= found
    moving = [
        layer
        for layer in layers.values()
        if "magnitude" in layer.parts or (layer.alpha and layer.parts["up"].any() and layer.parts["down"].any())
    ]
    if layers and not moving:
        raise FileError(about(path, f"the products of all its {len(layers)} layers are zero: it was never trained"))
    return LoraFile(path, layers, whole, tuple(notes), made_for)


def _take(found: dict[str, Layer], before: str, part: re.Match[str], key: str, value: Tensor) -> bool:
    """Put a tensor to its layer; returns whether that had one like it already."""
    name = _renamed(before + part["layer"])
    layer = found.get(name)
    if layer is None:
        layer = found[name] = Layer(*_belongs(name))
    layer.keys.append(key)
    side = part["kohya"] or part["diffusers"] or {"A": "down", "B": "up"}.get(part["peft"] or "")
    if part["alpha"]:
        side = "alpha"
    elif part["lycoris"] or part["magnitude"]:
        side = "magnitude"
    layer.kohya |= part["kohya"] is not None
    layer.lycoris |= part["lycoris"] is not None
    assert side is not None
    if side != "alpha" and not value.is_floating_point():
        layer.integers.append(key)
    twice = side in layer.parts
    layer.parts[side] = value.float()  # from any stored dtype, including 8 bits
    return twice


def _renamed(name: str) -> str:
    """Current layer name for diffusers' old attention processors."""
    if ".processor." not in name and ".self_attn.to_" not in name:
        return name
    name = name.replace(".processor.", ".")
    name = re.sub(r"\.to_out$", ".to_out.0", name)
    return re.sub(r"\.self_attn\.to_(q|k|v|out)(\.0)?$", r".self_attn.\1_proj", name)


def _belongs(name: str) -> tuple[str, list[str]]:
    """Component of a layer, and its names without prefixes."""
    text = TEXT.match(name)
    if text is None:
        names = stripped(name)
        bare = names[-1]
        if bare.startswith(("text_model.", "text_model_")):
            return "1", names
        return ("3", names) if bare.startswith("encoder.block.") else (NETWORK, names)
    number = text["kohya"] or text["diffusers"] or {"clip_g": "2", "t5xxl": "3"}.get(text["comfyui"] or "", "1")
    return number, stripped(name[text.end() :])


KNOWN_FILES = (
    "adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin",
)  # fmt: skip


TRAINED = ("pytorch_model.bin", "model.safetensors")  # the generator in a folder of DMD2's program, older and newer


COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def _files(path: Path) -> list[tuple[str, Path]]:
    """Files to read, each with the prefix of its names."""
    if path.is_file():
        return [("", path)]
    if not path.is_dir():
        raise FileError(f"{path} does not exist (looked in {path.absolute().parent}). Try: download it first")
    if file := _known_file(path):
        return [("", file)]
    if parts := [(f"{name}.", file) for name in COMPONENTS if (file := _known_file(path / name))]:
        return parts
    single = [file for name in TRAINED if (file := path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if len(single) != 1:
        which = f"{len(single)} .safetensors files ({some([file.name for file in single])})" if single else "no weights"
        raise FileError(f"{path} holds {which}. Try: give one file")
    return [("", single[0])]


def _known_file(folder: Path) -> Path | None:
    return next((folder / name for name in KNOWN_FILES if (folder / name).is_file()), None)


def _tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a file."""
    if file.suffix != ".safetensors":
        try:
            return read_tensors(file), {}
        except FileError as error:
            raise FileError(str(error)) from None
    regular_file(file)
    try:
        with reading(file), safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        why = shown(str(error), quote=False)
        raise FileError(f"{file} is damaged ({why}). Try: fetch it again and compare its checksum") from None


def _refuse_foreign(file: Path, keys: Iterable[str]) -> None:
    keys = list(keys)
    for method, pattern in FOREIGN.items():
        if odd := [key for key in keys if re.search(f"(?:{pattern})$", key)]:
            raise FileError(
                about(
                    file,
                    f"{len(odd)} of its {len(keys)} keys are {method}, which is not read here, such as {some(odd)}. Try: "
                    "merge it into the model with the program it is from, and give the merged model as teacher.path",
                )
            )


def _check_parts(file: Path, layers: Mapping[str, Layer]) -> None:
    """Refuse layers without both matrices, with wrong shapes, or not finite."""
    lone = [key for layer in layers.values() if not {"down", "up"} <= layer.parts.keys() for key in layer.keys]
    total = sum(len(layer.keys) for layer in layers.values())
    if lone:
        raise FileError(
            about(file, f"{len(lone)} of its {total} keys lack the other matrix of their layer, such as {some(lone)}")
        )
    if whole := [key for layer in layers.values() for key in layer.integers]:
        said = (
            f"{len(whole)} of its {total} keys are whole numbers, whose scale is not known here, such as {some(whole)}"
        )
        raise FileError(about(file, f"{said}. Try: the file in float16"))
    shapeless = [key for layer in layers.values() if not _shapely(layer.parts) for key in layer.keys]
    if shapeless:
        raise FileError(
            about(
                file,
                f"layers of {len(shapeless)} of its {total} keys have matrices that cannot be multiplied, such as {some(shapeless)}",
            )
        )
    odd = [
        key
        for layer in layers.values()
        for key in layer.keys
        if not all(torch.isfinite(value).all() for value in layer.parts.values())
    ]
    if odd:
        raise FileError(
            about(
                file,
                f"layers of {len(odd)} of its {total} keys hold NaN or infinity, such as {some(odd)}: it is broken",
            )
        )


def _shapely(parts: Mapping[str, Tensor]) -> bool:
    """Return whether B [out, r, ...] and A [r, in, ...] can be multiplied, with a core [r, r, k, k] between them if any."""
    down, up, mid, alpha = (parts.get(part) for part in ("down", "up", "mid", "alpha"))
    assert down is not None and up is not None
    if down.ndim < 2 or up.ndim < 2 or up.shape[1] != len(down) or 0 in down.shape:
        return False
    if mid is not None and not (mid.ndim == 4 and mid.shape[:2] == (len(down), len(down)) and down[0, 0].numel() == 1):
        return False
    return alpha is None or alpha.numel() == 1


def _give_alphas(file: Path, layers: Mapping[str, Layer], metadata: Mapping[str, str]) -> list[str]:
    """Set each layer's alpha: from its key, PEFT's configuration, or kohya's metadata, else its rank."""
    notes = []
    configs = _configs(file, layers, metadata)
    without = 0
    for name, layer in layers.items():
        rank, config = len(layer.parts["down"]), _config_of(layer, configs)
        if config is not None:
            _check_config(file, name, layer, config, rank)
        if "alpha" in layer.parts:
            layer.alpha = float(layer.parts["alpha"])
        elif config is not None and config.get("lora_alpha") is not None:
            layer.alpha = _number(
                file, "lora_alpha", _patterned(file, config, "alpha_pattern", layer, config["lora_alpha"])
            )
        elif layer.kohya and "ss_network_alpha" in metadata:
            layer.alpha = _kohya_alpha(file, layer, metadata)
        else:
            layer.alpha = float(rank)
            without += any(key.startswith("base_model.") for key in layer.keys)
        if config is not None and config.get("use_rslora") and "alpha" not in layer.parts:
            layer.alpha *= math.sqrt(rank)
    if without:
        notes.append(
            f"{file} is a PEFT file without its adapter_config.json: alpha of {without} layers is assumed to be their rank"
        )
    return notes


def _configs(file: Path, layers: Mapping[str, Layer], metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's configurations by component ("": of all), from the file's folder or its metadata."""
    adapter_config = file.with_name("adapter_config.json")
    keys = [key for layer in layers.values() for key in layer.keys]
    if adapter_config.is_file() and (
        file.stem == "adapter_model" or any(key.startswith("base_model.") for key in keys)
    ):
        found = read_json(adapter_config)
        return {"": found if isinstance(found, dict) else {}}
    given = _json(file, metadata.get("lora_adapter_metadata", "{}"))
    configs: dict[str, dict[str, Any]] = {}
    for key, value in given.items():
        component, _, name = key.rpartition(".")
        configs.setdefault(component, {})[name] = value
    return configs


def _config_of(layer: Layer, configs: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    names = ("unet", "transformer") if layer.component == NETWORK else ENCODERS[layer.component]
    return next((configs[name] for name in (*names, "") if name in configs), None)


def _check_config(file: Path, name: str, layer: Layer, config: Mapping[str, Any], rank: int) -> None:
    """Refuse anything but W + (alpha / r) B A and DoRA, and ranks that differ from the tensors'."""
    kind, start = (
        shown(config.get("peft_type", "LORA"), quote=False),
        str(config.get("init_lora_weights", True)).lower(),
    )
    if str(kind).rpartition(".")[2] != "LORA":
        raise FileError(about(file, f"its configuration says {kind}: LORA alone is read here"))
    if odd := [setting for setting in OTHER_MATHS if config.get(setting)]:
        raise FileError(about(file, f"its configuration has {odd[0]} {shown(config[odd[0]])}, which is not read here"))
    if start.startswith(OTHER_BASES):
        raise FileError(
            about(
                file,
                f"its configuration has init_lora_weights {shown(start)}, which changes the model's own weights too. Try: save it "
                "with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA",
            )
        )
    said = _patterned(file, config, "rank_pattern", layer, config.get("r", rank))
    if said != rank:
        raise FileError(
            about(
                file,
                f"its configuration says rank {shown(said)} for {shown(name, quote=False)}, whose matrices have {rank}",
            )
        )
    if config.get("use_dora") and "magnitude" not in layer.parts:
        raise FileError(about(file, f"its configuration says DoRA, but {shown(name, quote=False)} has no magnitude"))


def _patterned(file: Path, config: Mapping[str, Any], which: str, layer: Layer, otherwise: Any) -> Any:
    """Setting of a layer by PEFT's rule: the first pattern that matches the end of its path."""
    name, patterns = layer.names[-1], config.get(which) or {}
    if not isinstance(patterns, dict):
        raise FileError(about(file, f"its configuration has {which} {shown(patterns)}, no table of patterns"))
    for pattern, value in patterns.items():
        # more repetitions than these could take for ever
        if len(REPEATS.findall(pattern)) > 2 or NESTED.search(pattern) or len(pattern) + len(name) > 500:
            raise FileError(
                about(file, f"{which} of its configuration has {shown(pattern)}, with too many repetitions")
            )
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except (re.error, OverflowError, RecursionError) as error:
            raise FileError(
                about(file, f"{which} of its configuration has {shown(pattern)}, no pattern ({error})")
            ) from None
    return otherwise


def _kohya_alpha(file: Path, layer: Layer, metadata: Mapping[str, str]) -> float:
    """Read the alpha recorded by kohya's trainer; convolutions may have their own."""
    said = metadata["ss_network_alpha"]
    down = layer.parts["down"]
    if down.ndim == 4 and (down.shape[2:] != (1, 1) or "mid" in layer.parts):
        said = _json(file, metadata.get("ss_network_args", "{}")).get("conv_alpha", said)
    return _number(file, "ss_network_alpha (or conv_alpha)", said)


def _number(file: Path, what: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise FileError(about(file, f"its {what} must be a finite number, got {shown(value)}"))
    return number


def _json(file: Path, text: str) -> dict[str, Any]:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise FileError(about(file, f"its configuration is not JSON ({error})")) from None
    return found if isinstance(found, dict) else {}
