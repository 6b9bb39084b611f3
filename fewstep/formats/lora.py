"""LoRA files in all the forms that programs write: one reader for fine-tunes of a teacher and for published students.

Layers are found by the real paths of a network, so that a key either has a layer or is named in an error; diffusers' own
loader skips names that it does not map (its issue 9950), knows other shapes than its own not, and needs the weights twice.

Names: kohya (`lora_unet_*`, `lora_te*_*`), PEFT (`base_model.model.*`), diffusers (`unet.*`, `transformer.*`,
`text_encoder*.*`, also of its attention processors), ComfyUI and ai-toolkit (`diffusion_model.*`), OneTrainer
(`lora_transformer_*`), bare ones; each with diffusers' names of layers or the original program's.
Forms: LoRA (Hu et al. 2021, arXiv 2106.09685), also of convolutions with and without a Tucker core (LoCon; Yeh et al.
2023, arXiv 2309.14859), rsLoRA (Kalajdzievski 2023, arXiv 2312.03732), DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.formats.dmd2 import read_tensors
from fewstep.formats.edm import EdmFileError
from fewstep.formats.original_names import Place, original_layers

__all__ = ["Factors", "LoraFile", "LoraFileError", "merge", "read_lora"]

NETWORK = "network"
ENCODERS = {"1": ("text_encoder",), "2": ("text_encoder_2",), "3": ("text_encoder_3", "text_encoder_2")}  # FLUX's T5

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
BEFORE = (
    "lora_unet_", "lora_transformer_", "lycoris_", "base_model.model.", "model.diffusion_model.", "diffusion_model.",
    "unet.", "transformer.",
)  # fmt: skip

# What others write, of which nothing is guessed: ends of keys, and the names of the methods.
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
    "textual inversion": r"bundle_emb\..+",
}
# settings of PEFT under which the result is not W + B A alpha / r, or DoRA's
OTHER_MATHS = (
    "fan_in_fan_out", "layer_replication", "use_qalora", "alora_invocation_tokens", "use_bdlora", "velora_config",
    "monteclora_config", "arrow_config", "kasa_config", "target_parameters",
)  # fmt: skip
OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")  # initialisations that move the frozen weights


class LoraFileError(ValueError):
    """A LoRA file that is missing, damaged, of another form or for another network; the message names keys and counts."""


@dataclass(frozen=True)
class Factors:
    """What a file does to one layer: W + B A alpha / r; with a magnitude m that sum, its rows (or columns) as long as m.

    Attributes:
        down: A [r, in, ...], in the shape of the layer's weight but for the first dimension; float32.
        up: B [out, r]; float32.
        alpha: so that alpha / r scales the product, whatever rule the file follows.
        magnitude: DoRA's, broadcastable to the weight; None for plain LoRA.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Width of the bottleneck."""
        return len(self.down)

    def product(self) -> Tensor:
        """B A alpha / r in the shape of the layer's weight, float32."""
        product = self.up @ self.down.flatten(1)
        return (self.alpha / self.rank * product).reshape(len(self.up), *self.down.shape[1:])

    def applied(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """The layer's weight with the change, in float32; `strength` scales the whole change, also DoRA's (as ComfyUI)."""
        weight = weight.float()
        product = self.product().to(weight.device)
        if self.magnitude is None:
            return weight + strength * product
        moved, magnitude = weight + product, self.magnitude.to(weight.device)
        across = [dim for dim in range(moved.ndim) if magnitude.shape[dim] == 1]
        length = torch.linalg.vector_norm(moved, dim=across, keepdim=True)
        moved = moved * (magnitude / length.clamp(min=torch.finfo(torch.float32).eps))
        return weight + strength * (moved - weight)


class _Misfit(Exception):
    """A layer of a file whose matrices are not of the size of its place."""


@dataclass
class _Layer:
    """One layer of a file: its tensors by part, and what it is called with and without what stands before it."""

    component: str
    names: list[str]  # from the whole name to the shortest
    keys: list[str] = field(default_factory=list)
    parts: dict[str, Tensor] = field(default_factory=dict)
    kohya: bool = False
    lycoris: bool = False
    alpha: float = 0.0


@dataclass(frozen=True)
class LoraFile:
    """A file that was read, its layers by their names in it.

    Attributes:
        path: what was read.
        whole: tensors that are no part of an adapter: frozen weights beside them, or a whole network.
        notes: what the file leaves open and how it was taken, for people to read.
    """

    path: Path
    layers: Mapping[str, _Layer]
    whole: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Keys in the file."""
        return sum(len(layer.keys) for layer in self.layers.values()) + len(self.whole)

    @property
    def text_keys(self) -> list[str]:
        """Keys that belong to text encoders."""
        return [key for layer in self.layers.values() if layer.component != NETWORK for key in layer.keys]

    def text_sha256(self) -> str | None:
        """Digest of what changes the text encoders; None if nothing does."""
        layers = {name: layer for name, layer in self.layers.items() if layer.component != NETWORK}
        if not layers:
            return None
        digest = hashlib.sha256()
        for name in sorted(layers):
            digest.update(f"{name} {layers[name].alpha}\n".encode())
            for part, value in sorted(layers[name].parts.items()):
                digest.update(f"{part} {list(value.shape)}\n".encode())
                digest.update(value.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def for_network(self, network: nn.Module) -> dict[str, Factors]:
        """The changes of a denoising network, by the paths of its layers.

        Raises:
            LoraFileError: keys without a layer, of other shapes, or that say the file is for other weights.
        """
        places = {path: Place((path,)) for path in _paths(network)}
        places |= {name: place for name, place in original_layers(network).items() if name not in places}
        found = self._fitted([(NETWORK, network, places)], type(network).__name__)[NETWORK]
        self._check_whole(network)
        return found

    def for_encoders(self, encoders: Mapping[str, nn.Module]) -> dict[str, dict[str, Factors]]:
        """The changes of a pipeline's text encoders, by component and path of the layer.

        Args:
            encoders: `text_encoder` and so on, as many as the pipeline has.

        Raises:
            LoraFileError: as `for_network`.
        """
        components = []
        for number, names in ENCODERS.items():
            if component := next((name for name in names if name in encoders), None):
                paths = _paths(encoders[component])
                # transformers has had CLIP's layers below `text_model` and not
                places = {f"text_model.{path}": Place((path,)) for path in paths}
                places |= {path.removeprefix("text_model."): Place((path,)) for path in paths}
                places |= {path: Place((path,)) for path in paths}
                components.append((number, encoders[component], places))
        what = "text encoders" if encoders else "pipeline, which has no text encoders"
        found = self._fitted(components, what, text=True)
        named: dict[str, dict[str, Factors]] = {}
        for number, _, _ in components:
            component = next(name for name in ENCODERS[number] if name in encoders)
            if twice := named.get(component, {}).keys() & found[number].keys():
                raise LoraFileError(_about(self.path, f"{component}.{min(twice)} is given twice, under two names"))
            named.setdefault(component, {}).update(found[number])
        return {component: factors for component, factors in named.items() if factors}

    def _fitted(
        self, components: list[tuple[str, nn.Module, dict[str, Place]]], whose: str, text: bool = False
    ) -> dict[str, dict[str, Factors]]:
        """The factors of each component; every layer of the file that concerns one of them must have its place."""
        layers = {name: layer for name, layer in self.layers.items() if (layer.component != NETWORK) == text}
        modules = {component: module for component, module, _ in components}
        tables = {
            component: {name.replace(".", "_"): place for name, place in places.items()}
            for component, _, places in components
        }
        found: dict[str, dict[str, Factors]] = {component: {} for component in modules}
        lost: list[str] = []
        misfits: dict[str, str] = {}  # by key, why
        for layer in layers.values():
            table = tables.get(layer.component, {})
            place = next((table[plain] for name in layer.names if (plain := name.replace(".", "_")) in table), None)
            if place is None:
                lost += layer.keys
                continue
            try:
                placed = _placed(layer, place, modules[layer.component])
            except _Misfit as why:
                misfits |= dict.fromkeys(layer.keys, str(why))
                continue
            for path, factors in placed.items():
                if path in found[layer.component]:
                    raise LoraFileError(_about(self.path, f"{path} is given twice, under two names"))
                found[layer.component][path] = factors
        if lost or misfits:
            of = f"{sum(len(layer.keys) for layer in layers.values())} {'text-encoder ' if text else ''}keys"
            problems = []
            if lost:
                problems.append(f"{len(lost)} of its {of} fit no layer of the {whose}, such as {_some(lost)}")
            if misfits:
                key, why = next(iter(misfits.items()))
                problems.append(f"{len(misfits)} of its {of} are of another size, such as {key}: {why}")
            raise LoraFileError(
                _about(
                    self.path, f"{'; '.join(problems)}. It is for another model, or in names that are not known here"
                )
            )
        return found

    def _check_whole(self, network: nn.Module) -> None:
        """Tensors that are no adapter must be the network's own frozen weights, as PEFT's training folders keep them."""
        own = network.state_dict()
        unknown, other = [], []
        for key, value in self.whole.items():
            names = [name.replace(".base_layer", "") for name in _stripped(key)]
            weight = next((own[name] for name in names if name in own), None)
            if weight is None:
                unknown.append(key)
            elif weight.shape != value.shape or (weight - value.float()).norm() > 5e-3 * weight.norm():
                other.append(key)
        if unknown:
            raise LoraFileError(
                _about(
                    self.path,
                    f"{len(unknown)} of its {self.count} keys are no part of a LoRA, such as {_some(unknown)}",
                )
            )
        if other:
            raise LoraFileError(
                _about(
                    self.path,
                    f"{len(other)} of its {self.count} keys are whole weights that differ from the pipeline's, such as "
                    f"{_some(other)}: it was trained on another model",
                )
            )


def _placed(layer: _Layer, place: Place, network: nn.Module) -> dict[str, Factors]:
    """The factors of one layer of the file at the layers that share its rows."""
    weights = [network.get_submodule(path).weight for path in place.paths]
    rows, within = [len(weight) for weight in weights], weights[0].shape[1:]
    down, up = layer.parts["down"], layer.parts["up"].flatten(1)
    if "mid" in layer.parts:  # a Tucker core: A is a 1 x 1 kernel, the core has the layer's
        down = torch.einsum("pqkl,qi->pikl", layer.parts["mid"], down.flatten(1))
    down = _shaped(down, within)
    if down is None or up.shape != (sum(rows), len(down)):
        given = " and ".join(f"{part} {list(layer.parts[part].shape)}" for part in ("down", "up"))
        raise _Misfit(f"{given} at {' + '.join(place.paths)}, which is {[sum(rows), *within]}")
    magnitude = _magnitude(layer, place, up, down)
    ups = _swapped(up).split(rows) if place.swapped else up.split(rows)
    magnitudes: Iterable[Tensor | None] = [magnitude] * len(rows)
    if magnitude is not None and len(magnitude) == len(up):
        magnitudes = (_swapped(magnitude) if place.swapped else magnitude).split(rows)
    return {
        path: Factors(down, part.contiguous(), layer.alpha, lengths)
        for path, part, lengths in zip(place.paths, ups, magnitudes, strict=True)
    }


def _magnitude(layer: _Layer, place: Place, up: Tensor, down: Tensor) -> Tensor | None:
    """DoRA's magnitude: of rows [out, 1, ...], or of columns [1, in, 1, ...], which LyCORIS knows too."""
    given = layer.parts.get("magnitude")
    if given is None:
        return None
    ones = [1] * (down.ndim - 2)
    columns = layer.lycoris and given.ndim > 1 and given.shape[0] == 1
    if given.numel() == len(up) and not columns:
        return given.reshape(len(up), 1, *ones)
    if given.numel() == down.shape[1] and columns and len(place.paths) == 1:
        return given.reshape(1, down.shape[1], *ones)
    size = [len(up), *down.shape[1:]]
    raise _Misfit(f"DoRA magnitude {list(given.shape)} at {' + '.join(place.paths)}, which is {size}")


@torch.no_grad()
def merge(network: nn.Module, factors: Mapping[str, Factors], strength: float = 1.0) -> None:
    """Change a network's weights in place: each in float32, rounded once to what the network holds.

    Args:
        network: with the original weights.
        factors: of `LoraFile`, by path.
        strength: of the change.
    """
    for path, change in factors.items():
        weight = network.get_submodule(path).weight
        weight.copy_(change.applied(weight, strength))


def read_lora(path: Path) -> LoraFile:
    """Read a file, or a folder of PEFT, of diffusers or of DMD2's program. Nothing in it is executed.

    Args:
        path: .safetensors, or a `torch.save` file of tensors; a folder with `adapter_model.*` and `adapter_config.json`,
            with `pytorch_lora_weights.*`, with such folders for each component (`unet`, `text_encoder`, ...), with
            `pytorch_model.bin`, or with one .safetensors file.

    Raises:
        LoraFileError: it is missing, damaged, of a method that is not LoRA, or incomplete.
    """
    path = Path(path)
    layers: dict[str, _Layer] = {}
    whole: dict[str, Tensor] = {}
    notes: list[str] = []
    for before, file in _files(path):
        tensors, metadata = _tensors(file)
        _refuse_foreign(file, tensors)
        found: dict[str, _Layer] = {}
        adapters = set()
        for key, value in tensors.items():
            part = PART.fullmatch(key)
            if part is None:
                whole[before + key] = value
                continue
            adapters |= {part["adapter"] or part["named"]} - {None}
            _take(found, before, part, key, value)
        if len(adapters) > 1:
            raise LoraFileError(_about(file, f"it holds several adapters: {', '.join(sorted(adapters))}"))
        _check_parts(file, found)
        notes += _give_alphas(file, found, metadata)
        layers |= found
    moving = [
        layer
        for layer in layers.values()
        if "magnitude" in layer.parts or (layer.alpha and layer.parts["up"].any() and layer.parts["down"].any())
    ]
    if layers and not moving:
        raise LoraFileError(
            _about(path, f"the products of all its {len(layers)} layers are zero: it was never trained")
        )
    return LoraFile(path, layers, whole, tuple(notes))


def _take(found: dict[str, _Layer], before: str, part: re.Match[str], key: str, value: Tensor) -> None:
    """Put a tensor to its layer."""
    name = _renamed(before + part["layer"])
    layer = found.get(name)
    if layer is None:
        layer = found[name] = _Layer(*_belongs(name))
    layer.keys.append(key)
    side = part["kohya"] or part["diffusers"] or {"A": "down", "B": "up"}.get(part["peft"] or "")
    if part["alpha"]:
        side = "alpha"
    elif part["lycoris"] or part["magnitude"]:
        side = "magnitude"
    layer.kohya |= part["kohya"] is not None
    layer.lycoris |= part["lycoris"] is not None
    assert side is not None
    layer.parts[side] = value.float()  # from whatever a file is kept in, 8 bits included


def _renamed(name: str) -> str:
    """The layer that diffusers' attention processors of old stand for."""
    if ".processor." not in name and ".self_attn.to_" not in name:
        return name
    name = name.replace(".processor.", ".")
    name = re.sub(r"\.to_out$", ".to_out.0", name)
    return re.sub(r"\.self_attn\.to_(q|k|v|out)(\.0)?$", r".self_attn.\1_proj", name)


def _belongs(name: str) -> tuple[str, list[str]]:
    """The component that a layer is of, and its names without what stands before them."""
    text = TEXT.match(name)
    if text is None:
        names = _stripped(name)
        bare = names[-1]
        if bare.startswith(("text_model.", "text_model_")):
            return "1", names
        return ("3", names) if bare.startswith("encoder.block.") else (NETWORK, names)
    number = text["kohya"] or text["diffusers"] or {"clip_g": "2", "t5xxl": "3"}.get(text["comfyui"] or "", "1")
    return number, _stripped(name[text.end() :])


def _stripped(name: str) -> list[str]:
    """A name, and without each of the things that programs put before it."""
    names = [name]
    while before := next((start for start in BEFORE if names[-1].startswith(start)), None):
        names.append(names[-1].removeprefix(before))
    return names


# -- files ---------------------------------------------------------------------------------------------------------------

KNOWN_FILES = (
    "adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin",
)  # fmt: skip
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def _files(path: Path) -> list[tuple[str, Path]]:
    """What to read: what stands before its names, and the file."""
    if path.is_file():
        return [("", path)]
    if not path.is_dir():
        raise LoraFileError(f"{path} does not exist (looked in {path.absolute().parent}): download it first")
    if file := _known_file(path):
        return [("", file)]
    if parts := [(f"{name}.", file) for name in COMPONENTS if (file := _known_file(path / name))]:
        return parts
    single = [path / "pytorch_model.bin"] if (path / "pytorch_model.bin").is_file() else []
    single = single or sorted(path.glob("*.safetensors"))
    if len(single) != 1:
        which = (
            f"{len(single)} .safetensors files ({_some([file.name for file in single])})" if single else "no weights"
        )
        raise LoraFileError(f"{path} holds {which}: give one file")
    return [("", single[0])]


def _known_file(folder: Path) -> Path | None:
    return next((folder / name for name in KNOWN_FILES if (folder / name).is_file()), None)


def _tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file."""
    if file.suffix != ".safetensors":
        try:
            return read_tensors(file), {}
        except EdmFileError as error:
            raise LoraFileError(str(error)) from None
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise LoraFileError(f"{file} is damaged ({error}): fetch it again and compare its checksum") from None


def _refuse_foreign(file: Path, keys: Iterable[str]) -> None:
    keys = list(keys)
    for method, pattern in FOREIGN.items():
        if odd := [key for key in keys if re.search(f"(?:{pattern})$", key)]:
            raise LoraFileError(
                _about(
                    file,
                    f"{len(odd)} of its {len(keys)} keys are {method}, which is not read here, such as {_some(odd)}. Try: "
                    "merge it into the model with the program it is from, and give the merged model as teacher.path",
                )
            )


def _check_parts(file: Path, layers: Mapping[str, _Layer]) -> None:
    """Refuse layers without both matrices, of odd shapes, or not finite."""
    lone = [key for layer in layers.values() if not {"down", "up"} <= layer.parts.keys() for key in layer.keys]
    total = sum(len(layer.keys) for layer in layers.values())
    if lone:
        raise LoraFileError(
            _about(file, f"{len(lone)} of its {total} keys lack the other matrix of their layer, such as {_some(lone)}")
        )
    shapeless = [key for layer in layers.values() if not _shapely(layer.parts) for key in layer.keys]
    if shapeless:
        raise LoraFileError(
            _about(
                file,
                f"layers of {len(shapeless)} of its {total} keys have matrices that cannot be multiplied, such as {_some(shapeless)}",
            )
        )
    odd = [
        key
        for layer in layers.values()
        for key in layer.keys
        if not all(torch.isfinite(value).all() for value in layer.parts.values())
    ]
    if odd:
        raise LoraFileError(
            _about(
                file,
                f"layers of {len(odd)} of its {total} keys hold NaN or infinity, such as {_some(odd)}: it is broken",
            )
        )


def _shapely(parts: Mapping[str, Tensor]) -> bool:
    """Whether B [out, r, ...] times A [r, in, ...] can be taken, with a core [r, r, k, k] between them if there is one."""
    down, up, mid, alpha = (parts.get(part) for part in ("down", "up", "mid", "alpha"))
    assert down is not None and up is not None
    if down.ndim < 2 or up.ndim < 2 or up.shape[1] != len(down) or 0 in down.shape:
        return False
    if mid is not None and not (mid.ndim == 4 and mid.shape[:2] == (len(down), len(down)) and down[0, 0].numel() == 1):
        return False
    return alpha is None or alpha.numel() == 1


# -- alpha ---------------------------------------------------------------------------------------------------------------


def _give_alphas(file: Path, layers: Mapping[str, _Layer], metadata: Mapping[str, str]) -> list[str]:
    """Give each layer its alpha: of its own key, of PEFT's configuration, of kohya's metadata, else its rank."""
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
            layer.alpha = _number(file, "lora_alpha", _patterned(config, "alpha_pattern", layer, config["lora_alpha"]))
        elif layer.kohya and "ss_network_alpha" in metadata:
            layer.alpha = _kohya_alpha(file, layer, metadata)
        else:
            layer.alpha = float(rank)
            without += any(key.startswith("base_model.") for key in layer.keys)
        if config is not None and config.get("use_rslora") and "alpha" not in layer.parts:
            layer.alpha *= math.sqrt(rank)
    if without:
        notes.append(
            f"{file} is PEFT's and its adapter_config.json is not beside it: alpha of {without} layers is taken as their rank"
        )
    return notes


def _configs(file: Path, layers: Mapping[str, _Layer], metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's configurations by component ("": of all), from beside the file or from within it."""
    beside = file.with_name("adapter_config.json")
    keys = [key for layer in layers.values() for key in layer.keys]
    if beside.is_file() and (file.stem == "adapter_model" or any(key.startswith("base_model.") for key in keys)):
        return {"": _json(beside, beside.read_text(encoding="utf-8"))}
    given = _json(file, metadata.get("lora_adapter_metadata", "{}"))
    configs: dict[str, dict[str, Any]] = {}
    for key, value in given.items():
        component, _, name = key.rpartition(".")
        configs.setdefault(component, {})[name] = value
    return configs


def _config_of(layer: _Layer, configs: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    names = ("unet", "transformer") if layer.component == NETWORK else ENCODERS[layer.component]
    return next((configs[name] for name in (*names, "") if name in configs), None)


def _check_config(file: Path, name: str, layer: _Layer, config: Mapping[str, Any], rank: int) -> None:
    """Refuse what is not W + B A alpha / r or DoRA, and ranks that the file's tensors do not have."""
    kind, start = config.get("peft_type", "LORA"), str(config.get("init_lora_weights", True)).lower()
    if str(kind).rpartition(".")[2] != "LORA":
        raise LoraFileError(_about(file, f"its configuration says {kind}: LORA alone is read here"))
    if odd := [setting for setting in OTHER_MATHS if config.get(setting)]:
        raise LoraFileError(_about(file, f"its configuration has {odd[0]} {config[odd[0]]!r}, which is not read here"))
    if start.startswith(OTHER_BASES):
        raise LoraFileError(
            _about(
                file,
                f"its configuration has init_lora_weights {start!r}, which changes the model's own weights too. Try: save it "
                "with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA",
            )
        )
    said = _patterned(config, "rank_pattern", layer, config.get("r", rank))
    if said != rank:
        raise LoraFileError(_about(file, f"its configuration says rank {said} for {name}, whose matrices have {rank}"))
    if config.get("use_dora") and "magnitude" not in layer.parts:
        raise LoraFileError(_about(file, f"its configuration says DoRA, but {name} has no magnitude"))


def _patterned(config: Mapping[str, Any], which: str, layer: _Layer, otherwise: Any) -> Any:
    """A setting of a layer under PEFT's rule: the first pattern that matches the end of its path."""
    name = layer.names[-1]
    for pattern, value in (config.get(which) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            raise LoraFileError(f"{which} of the LoRA's configuration has {pattern!r}, no pattern ({error})") from None
    return otherwise


def _kohya_alpha(file: Path, layer: _Layer, metadata: Mapping[str, str]) -> float:
    """What kohya's trainer says it was given; convolutions may have one of their own."""
    said = metadata["ss_network_alpha"]
    down = layer.parts["down"]
    if down.ndim == 4 and (down.shape[2:] != (1, 1) or "mid" in layer.parts):
        said = _json(file, metadata.get("ss_network_args", "{}")).get("conv_alpha", said)
    return _number(file, "ss_network_alpha (or conv_alpha)", said)


def _number(file: Path, what: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise LoraFileError(_about(file, f"its {what} must be a number, got {value!r}")) from None


def _json(file: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise LoraFileError(_about(file, f"its configuration is not JSON ({error.msg})")) from None
    return found if isinstance(found, dict) else {}


# -- small things --------------------------------------------------------------------------------------------------------


def _paths(network: nn.Module) -> list[str]:
    return [path for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def _shaped(down: Tensor, within: torch.Size) -> Tensor | None:
    """A in the shape of the layer's weight; a linear layer and a 1 x 1 kernel are the same thing."""
    if down.shape[1:] == within:
        return down
    same = down.shape[1:2] == within[:1] and all(size == 1 for size in (*down.shape[2:], *within[1:]))
    return down.reshape(len(down), *within) if same else None


def _swapped(rows: Tensor) -> Tensor:
    first, second = rows.chunk(2)
    return torch.cat([second, first])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3])


def _about(file: Path, problem: str) -> str:
    return f"{file}: {problem}"
