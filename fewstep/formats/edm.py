"""Conversion of EDM's and EDM2's published networks to fewstep's denoisers: constructor arguments to a record, and weights.

Knows the published programs' arguments and defaults; `fewstep.formats.edm_pickle` reads their files.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from fewstep.diffusion.noise import Karras
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.formats.bounded import check_real, described_shapes
from fewstep.formats.edm_pickle import PickledModule, read_edm_pickle
from fewstep.networks import DhariwalUNetSpec, EDM2Spec, SongUNetSpec
from fewstep.system.bounds import reading, shown
from fewstep.system.errors import FileError
from fewstep.system.files import file_sha256
from fewstep.system.weights import first_not_finite

__all__ = ["filled_denoiser", "load_edm_pickle", "published_network"]

Published = SongUNetSpec | DhariwalUNetSpec | EDM2Spec

# Argument of the published constructor -> field of our record. Karras et al. 2022, appendix F.
COMMON = {
    "img_resolution": "size", "img_channels": "channels", "label_dim": "num_classes", "augment_dim": "augment_dim",
    "model_channels": "model_channels", "channel_mult": "channel_mult", "num_blocks": "num_blocks",
    "attn_resolutions": "attn_resolutions", "dropout": "dropout",
}  # fmt: skip
SONG = COMMON | {
    "embedding_type": "embedding", "encoder_type": "encoder", "channel_mult_noise": "channel_mult_noise",
    "resample_filter": "resample_filter",
}  # fmt: skip
# default of a missing argument, and the only supported value of arguments without a field
SONG_DEFAULTS = {"model_channels": 128, "channel_mult": (1, 2, 2, 2), "num_blocks": 4, "attn_resolutions": (16,)}
ADM_DEFAULTS = {"model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3, "attn_resolutions": (32, 16, 8)}
FIXED: dict[str, Any] = {"channel_mult_emb": 4, "decoder_type": "standard"}
# EDM2 (Karras et al. 2024, arXiv 2312.02696, table 4 and figure 21): names of the published constructor, looked up in copies of the program
EDM2 = {name: field for name, field in COMMON.items() if name != "augment_dim"} | {
    "channels_per_head": "channels_per_head", "logvar_channels": "logvar_channels",
}  # fmt: skip
EDM2_DEFAULTS = ADM_DEFAULTS | {"attn_resolutions": (16, 8), "dropout": 0.0, "num_classes": 0}
EDM2_FIXED: dict[str, Any] = {
    "channel_mult_noise": None, "channel_mult_emb": None, "label_balance": 0.5, "concat_balance": 0.5, "res_balance": 0.3,
    "attn_balance": 0.3, "clip_act": 256, "resample_filter": [1, 1], "resample_mode": "keep",
}  # fmt: skip
EDM2_WIDTHS = {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}
IGNORED = {"use_fp16", "sigma_min", "sigma_max", "sigma_data", "model_type", "label_dropout"}  # not of the network


def load_edm_pickle(path: Path) -> tuple[Preconditioned, Any, dict[str, Any]]:
    """Read a published EDM or EDM2 teacher, or a SiD or SiDA generator, without executing anything in it.

    Returns:
        The denoiser with the averaged weights (float32), its network's spec, and its provenance.

    Raises:
        FileError: not such a file, damaged, or an unsupported network.
        OSError: it cannot be opened.
    """
    with reading(path):
        found = read_edm_pickle(path)
    try:
        spec = _spec(found)
        sigma_data = found.arguments.get("sigma_data", 0.5)
        if type(sigma_data) not in (int, float) or not 0 < sigma_data < 1e3:
            raise FileError("sigma_data is not a valid number")
        check_real(found.tensors)
        inside = "unet." if isinstance(spec, EDM2Spec) else "model."
        weights = {name.removeprefix(inside): tensor.float() for name, tensor in found.tensors.items()}
        denoiser = filled_denoiser(spec, float(sigma_data), weights, _grid(found.arguments))
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    provenance = {
        "source": Path(path).name,
        "source_sha256": file_sha256(path),
        "source_class": found.class_name,
        "source_arguments": _as_json(found.arguments),
    }
    return denoiser, spec, provenance


def published_network(name: str) -> Published | None:
    """Network of a published EDM file by its name (Karras et al. 2022, table 1, appendix F); None for other names.

    Args:
        name: such as `edm-cifar10-32x32-cond-vp.pkl`, `edm-imagenet-64x64-cond-adm.pkl` or EDM2's
            `edm2-img512-s-2147483-0.130.pkl` (size of picture, size of network, thousands of images, width of the average).
    """
    if edm2 := re.fullmatch(r"edm2-img(64|512)-(xs|s|m|l|xl|xxl)(-uncond)?-\d+-[\d.]+\.pkl", name):
        size, width, unconditional = edm2.groups()
        dropout = 0.0 if width in ("xs", "s") else 0.1
        return EDM2Spec(
            channels=3 if size == "64" else 4, num_classes=0 if unconditional else 1000, model_channels=EDM2_WIDTHS[width],
            dropout=dropout,
        )  # fmt: skip
    if name == "edm-imagenet-64x64-cond-adm.pkl":
        return DhariwalUNetSpec(size=64, channels=3, num_classes=1000, dropout=0.1, **ADM_DEFAULTS)
    data = {
        "cifar10-32x32-uncond": (32, 0, 0.13), "cifar10-32x32-cond": (32, 10, 0.13),
        "ffhq-64x64-uncond": (64, 0, 0.05), "afhqv2-64x64-uncond": (64, 0, 0.25),
    }  # fmt: skip
    kinds = {
        "vp": {},
        "ve": {"embedding": "fourier", "encoder": "residual", "channel_mult_noise": 2, "resample_filter": (1, 3, 3, 1)},
    }
    for known, (size, classes, dropout) in data.items():
        for kind, more in kinds.items():
            if name == f"edm-{known}-{kind}.pkl":
                mult = (2, 2, 2) if size == 32 else (1, 2, 2, 2)
                shared = SONG_DEFAULTS | {"channel_mult": mult} | more
                return SongUNetSpec(
                    size=size, channels=3, num_classes=classes, augment_dim=9, dropout=dropout, **shared
                )
    return None


def _grid(arguments: dict[str, Any]) -> Karras:
    """EDM's noise levels, limited to those that the network supports, as in the authors' sampler.

    Raises:
        FileError: the file's sigma_min and sigma_max leave no range.
    """
    usual = Karras()
    low, high = arguments.get("sigma_min", 0), arguments.get("sigma_max", math.inf)
    if any(type(value) not in (int, float) for value in (low, high)) or not (
        low < usual.sigma_max and high > usual.sigma_min
    ):
        raise FileError(f"its sigma_min {shown(low)} and sigma_max {shown(high)} are no range of noise levels")
    try:
        return Karras(sigma_min=max(low, usual.sigma_min), sigma_max=min(high, usual.sigma_max))
    except ValidationError:
        raise FileError(f"its sigma_min {shown(low)} is not below its sigma_max {shown(high)}") from None


def _as_json(value: Any) -> Any:
    """Convert plain values for JSON: infinite numbers, such as EDM's usual sigma_max, become text."""
    if isinstance(value, dict):
        return {name: _as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _spec(found: PickledModule) -> Published:
    """Network described by the constructor's arguments."""
    if found.class_name not in ("EDMPrecond", "Precond"):
        raise FileError(
            f"it holds a {shown(found.class_name, quote=False)}: fewstep builds the preconditioning of EDM (EDMPrecond) and of "
            "EDM2 (Precond)"
        )
    given = found.arguments
    # the published default
    kind = "EDM2" if found.class_name == "Precond" else given.get("model_type", "DhariwalUNet")
    families: dict[str, tuple[type[Published], dict[str, str], dict[str, Any], dict[str, Any]]] = {
        "SongUNet": (SongUNetSpec, SONG, SONG_DEFAULTS | {"dropout": 0.1}, FIXED),
        "DhariwalUNet": (DhariwalUNetSpec, COMMON, ADM_DEFAULTS | {"dropout": 0.1}, FIXED),
        "EDM2": (EDM2Spec, EDM2, EDM2_DEFAULTS, EDM2_FIXED),
    }
    if not isinstance(kind, str) or kind not in families:
        raise FileError(f"its network is a {shown(kind, quote=False)}: fewstep builds SongUNet and DhariwalUNet")
    record, fields, defaults, fixed = families[kind]
    if odd := sorted(found.left_out - IGNORED):
        raise FileError(
            f"its network's {shown(', '.join(odd), quote=False)} are no plain values, which fewstep cannot read"
        )
    unknown = sorted(given.keys() - fields.keys() - fixed.keys() - IGNORED)
    if unknown:
        raise FileError(f"its network takes {shown(', '.join(unknown), quote=False)}, which fewstep does not build")
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise FileError(f"its network has {name} {shown(given[name])}; fewstep builds {value!r} only")
    values = defaults | {fields[name]: value for name, value in given.items() if name in fields}
    try:
        return record.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise FileError(f"its network's {'.'.join(map(str, first['loc'])) or 'size'}: {first['msg']}") from None


def filled_denoiser(
    spec: Published, sigma_data: float, weights: dict[str, Tensor], schedule: Karras | None = None
) -> Preconditioned:
    """Build a denoiser with the weights of a published file, which must be finite and exactly those of its network.

    Raises:
        FileError: the weights do not match, or are not finite.
    """
    held = sum(tensor.numel() for tensor in weights.values())
    wanted = described_shapes(spec.build, weights)
    claimed = sum(shape.numel() for shape in wanted.values())
    if claimed != held or any(weights[name].shape != shape for name, shape in wanted.items() if name in weights):
        raise FileError(f"it describes a network of {claimed:,} numbers, its weights are {held:,} or have other shapes")
    if weights.keys() != wanted.keys():
        odd = sorted(weights.keys() ^ wanted.keys())[0]
        raise FileError(f"its weights are not those of the network that it describes: {shown(odd, quote=False)}")
    if (bad := first_not_finite(weights)) is not None:
        raise FileError(f"its weights must be finite, got NaN or infinite numbers in {bad}. Try: fetch it again")
    denoiser = Preconditioned(spec.build(), schedule or Karras(), "edm", sigma_data)
    denoiser.net.load_state_dict(weights)
    return denoiser
