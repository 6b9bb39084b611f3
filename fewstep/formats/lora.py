"""LoRA files of all common programs: one reader for fine-tunes of a teacher and for published students.

Layers are found by the real paths of a network, so every key either has a layer or is named in an error. diffusers' own
loader skips names that it does not map (its issue 9950), supports only its own shapes, and needs the weights twice.

Names: kohya (`lora_unet_*`, `lora_te*_*`), PEFT (`base_model.model.*`), diffusers (`unet.*`, `transformer.*`,
`text_encoder*.*`, also of its attention processors), ComfyUI and ai-toolkit (`diffusion_model.*`), OneTrainer
(`lora_transformer_*`), bare ones; each with diffusers' names of layers or the original program's.
Forms: LoRA (Hu et al. 2021, arXiv 2106.09685), also of convolutions with and without a Tucker core (LoCon; Yeh et al.
2023, arXiv 2309.14859), rsLoRA (Kalajdzievski 2023, arXiv 2312.03732), DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.formats.original_names import Place, original_layers
from fewstep.system.bounds import shown
from fewstep.system.errors import FileError

__all__ = ["Factors", "LoraFile", "merge"]

NETWORK = "network"
ENCODERS = {"1": ("text_encoder",), "2": ("text_encoder_2",), "3": ("text_encoder_3", "text_encoder_2")}  # FLUX's T5


@dataclass(frozen=True)
class Factors:
    """Change of one layer by a LoRA file:

        LoRA:  W' = W + (alpha / r) B A                     (Hu et al. 2021, section 4.1)
        DoRA:  W' = m V / |V|, V = W + (alpha / r) B A      (Liu et al. 2024, eq. 5; norms of rows, or of columns)

    Attributes:
        down: A [r, in, ...], with the shape of the layer's weight except for the first dimension; float32.
        up: B [out, r]; float32.
        alpha: converted so that alpha / r scales the product, whatever rule the file follows.
        magnitude: DoRA's m, broadcastable to the weight; None for plain LoRA.
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
        """Product (alpha / r) B A in the shape of the layer's weight, float32."""
        product = self.up @ self.down.flatten(1)
        return (self.alpha / self.rank * product).reshape(len(self.up), *self.down.shape[1:])

    def applied(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """Changed weight in float32; `strength` scales the whole change, also DoRA's (as in ComfyUI)."""
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
    """A layer of a file whose matrices do not fit the network's layer."""


@dataclass
class Layer:
    """One layer of a file: its tensors by part, and its name with and without prefixes."""

    component: str
    names: list[str]  # from the whole name to the shortest
    keys: list[str] = field(default_factory=list)
    parts: dict[str, Tensor] = field(default_factory=dict)
    kohya: bool = False
    lycoris: bool = False
    alpha: float = 0.0
    integers: list[str] = field(default_factory=list)  # keys of matrices that are whole numbers


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file, with its layers by name.

    Attributes:
        path: the file or folder.
        whole: tensors that are not part of an adapter: frozen weights, or a whole network.
        notes: assumptions about what the file leaves open, for the user.
        made_for: base model that the file's metadata names; empty: none.
    """

    path: Path
    layers: Mapping[str, Layer]
    whole: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()
    made_for: str = ""

    @property
    def count(self) -> int:
        """Number of keys in the file."""
        return sum(len(layer.keys) for layer in self.layers.values()) + len(self.whole)

    @property
    def text_keys(self) -> list[str]:
        """Keys of text encoders."""
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
        """Changes of a denoising network, by the paths of its layers.

        Raises:
            FileError: keys without a layer or with other shapes, or whole weights that differ from the network's.
        """
        places = {path: Place((path,)) for path in _paths(network)}
        places |= {name: place for name, place in original_layers(network).items() if name not in places}
        found = self._fitted([(NETWORK, network, places)], type(network).__name__)[NETWORK]
        self._check_whole(network)
        return found

    def for_encoders(self, encoders: Mapping[str, nn.Module]) -> dict[str, dict[str, Factors]]:
        """Changes of a pipeline's text encoders, by component and path of the layer.

        Args:
            encoders: the pipeline's text encoders: `text_encoder` and so on.

        Raises:
            FileError: as `for_network`.
        """
        components = []
        for number, names in ENCODERS.items():
            if component := next((name for name in names if name in encoders), None):
                paths = _paths(encoders[component])
                # CLIP's layers are below `text_model` in some versions of transformers
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
                raise FileError(about(self.path, f"{component}.{min(twice)} is given twice, under two names"))
            named.setdefault(component, {}).update(found[number])
        return {component: factors for component, factors in named.items() if factors}

    def _fitted(
        self, components: list[tuple[str, nn.Module, dict[str, Place]]], whose: str, text: bool = False
    ) -> dict[str, dict[str, Factors]]:
        """Factors of each component; every layer of the file for one of them must have a counterpart."""
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
                    raise FileError(about(self.path, f"{path} is given twice, under two names"))
                found[layer.component][path] = factors
        if lost or misfits:
            of = f"{sum(len(layer.keys) for layer in layers.values())} {'text-encoder ' if text else ''}keys"
            problems = []
            if lost:
                problems.append(f"{len(lost)} of its {of} fit no layer of the {whose}, such as {some(lost)}")
            if misfits:
                key, size = next(iter(misfits.items()))
                problems.append(f"{len(misfits)} of its {of} are of another size, such as {key}: {size}")
            raise FileError(
                about(
                    self.path,
                    f"{'; '.join(problems)}. It is for another model"
                    + (f" (its metadata says {shown(self.made_for)})" if self.made_for else "")
                    + ", or in names that are not known here",
                )
            )
        return found

    def _check_whole(self, network: nn.Module) -> None:
        """Check that whole weights equal the network's, as in PEFT's training folders."""
        own = network.state_dict()
        unknown, other = [], []
        for key, value in self.whole.items():
            names = [name.replace(".base_layer", "") for name in stripped(key)]
            weight = next((own[name] for name in names if name in own), None)
            if weight is None:
                unknown.append(key)
            elif weight.shape != value.shape or (weight - value.float()).norm() > 5e-3 * weight.norm():
                other.append(key)
        if unknown:
            raise FileError(
                about(
                    self.path,
                    f"{len(unknown)} of its {self.count} keys are no part of a LoRA, such as {some(unknown)}",
                )
            )
        if other:
            raise FileError(
                about(
                    self.path,
                    f"{len(other)} of its {self.count} keys are whole weights that differ from the pipeline's, such as "
                    f"{some(other)}: it was trained on another model",
                )
            )


def _placed(layer: Layer, place: Place, network: nn.Module) -> dict[str, Factors]:
    """Distribute the factors of one layer of the file over the network's layers that share its rows."""
    weights: list[Tensor] = [network.get_submodule(path).get_parameter("weight") for path in place.paths]
    rows, within = [len(weight) for weight in weights], weights[0].shape[1:]
    down, up = layer.parts["down"], layer.parts["up"].flatten(1)
    if "mid" in layer.parts:  # a Tucker core: A is a 1 x 1 kernel, the core has the layer's
        down = torch.einsum("pqkl,qi->pikl", layer.parts["mid"], down.flatten(1))
    fitted = _shaped(down, within)
    if fitted is None or up.shape != (sum(rows), len(fitted)):
        given = " and ".join(f"{part} {list(layer.parts[part].shape)}" for part in ("down", "up"))
        raise _Misfit(f"{given} at {' + '.join(place.paths)}, which is {[sum(rows), *within]}")
    magnitude = _magnitude(layer, place, up, fitted)
    ups = _swapped(up).split(rows) if place.swapped else up.split(rows)
    magnitudes: Iterable[Tensor | None] = [magnitude] * len(rows)
    if magnitude is not None and len(magnitude) == len(up):
        magnitudes = (_swapped(magnitude) if place.swapped else magnitude).split(rows)
    return {
        path: Factors(fitted, part.contiguous(), layer.alpha, lengths)
        for path, part, lengths in zip(place.paths, ups, magnitudes, strict=True)
    }


def _magnitude(layer: Layer, place: Place, up: Tensor, down: Tensor) -> Tensor | None:
    """DoRA's magnitude: of rows [out, 1, ...], or of columns [1, in, 1, ...] (LyCORIS)."""
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
    """Change a network's weights in place, in float32, rounded once to the network's dtype.

    Args:
        network: the network, with the original weights.
        factors: factors from `LoraFile`, by path.
        strength: strength of the change.
    """
    for path, change in factors.items():
        weight = network.get_submodule(path).get_parameter("weight")
        weight.copy_(change.applied(weight, strength))


# -- files ---------------------------------------------------------------------------------------------------------------


# -- alpha ---------------------------------------------------------------------------------------------------------------


# -- helpers --------------------------------------------------------------------------------------------------------


def _paths(network: nn.Module) -> list[str]:
    return [path for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def _shaped(down: Tensor, within: torch.Size) -> Tensor | None:
    """Reshape A to the layer's weight; a linear layer and a 1 x 1 kernel are equivalent."""
    if down.shape[1:] == within:
        return down
    same = down.shape[1:2] == within[:1] and all(size == 1 for size in (*down.shape[2:], *within[1:]))
    return down.reshape(len(down), *within) if same else None


def _swapped(rows: Tensor) -> Tensor:
    first, second = rows.chunk(2)
    return torch.cat([second, first])


def stripped(name: str) -> list[str]:
    """List a name with and without each known prefix."""
    names = [name]
    while before := next((start for start in BEFORE if names[-1].startswith(start)), None):
        names.append(names[-1].removeprefix(before))
    return names


def some(names: list[str]) -> str:
    return ", ".join(names[:3])


def about(file: Path, problem: str) -> str:
    return f"{file}: {problem}"


BEFORE = (
    "lora_unet_", "lora_transformer_", "lycoris_", "base_model.model.", "model.diffusion_model.", "diffusion_model.",
    "unet.", "transformer.",
)  # fmt: skip
