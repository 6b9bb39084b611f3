"""Files of the published EDM layout, as NVIDIA's persistence layer pickles them: a module's source, and its tensors."""

import copy
import io
import pickle
import sys
import types
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.formats.edm import COMMON, SONG
from fewstep.networks import DhariwalUNetSpec, SongUNetSpec


class Call:
    """Pickles as a call of a global by name, which need not exist."""

    def __init__(self, module, name, *arguments):
        self.module, self.name, self.arguments = module, name, arguments

    def __reduce__(self):
        return _global(self.module, self.name), self.arguments


def _global(module, name):
    """A function that pickles as `module.name`."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):  # pickle imports parents first
        sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(parts[end - 1]))
    made = sys.modules[module]
    if not hasattr(made, name):
        function = types.FunctionType((lambda *arguments: None).__code__, {}, name)
        function.__module__, function.__qualname__ = module, name
        setattr(made, name, function)
    return getattr(made, name)


def tensor_of(value):
    """A tensor as EDM's torch pickled it: a legacy stream inside."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TypedStorage is deprecated, and what these files hold
        torch.save(value.contiguous().storage(), stream, _use_new_zipfile_serialization=False)
    storage = Call("torch.storage", "_load_from_bytes", stream.getvalue())
    strided = Call(
        "torch._utils", "_rebuild_tensor_v2", storage, 0, tuple(value.shape), value.stride(), False, OrderedDict()
    )
    return strided


def persistent(name, source, **state):
    """A module as NVIDIA's persistence layer pickles it."""
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": name, "state": state}
    return Call("torch_utils.persistence", "_reconstruct_persistent_obj", meta)


def module_of(net, source, name="Module"):
    """A tree of modules in that layout, with parameters and buffers of `net`."""
    parameters = {
        n: None if p is None else Call("torch._utils", "_rebuild_parameter", tensor_of(p.data), True, OrderedDict())
        for n, p in net._parameters.items()
    }
    return persistent(
        name, source, _parameters=OrderedDict(parameters), training=False,
        _buffers=OrderedDict((n, None if b is None else tensor_of(b)) for n, b in net._buffers.items()),
        _modules=OrderedDict((n, None if m is None else module_of(m, source)) for n, m in net._modules.items()),
        _non_persistent_buffers_set=set(), odd=Call("numpy._core.multiarray", "scalar", np.float64(2).tobytes()),
    )  # fmt: skip


def arguments_of(spec: SongUNetSpec | DhariwalUNetSpec) -> dict:
    """Return the arguments of the published constructor for such a network."""
    song = isinstance(spec, SongUNetSpec)
    given = {name: getattr(spec, field) for name, field in (SONG if song else COMMON).items()}
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    return {"model_type": "SongUNet" if song else "DhariwalUNet", "use_fp16": False, "sigma_data": 0.5, **given}


def write_published(path, denoiser: Preconditioned, arguments=None, source="", class_name="EDMPrecond") -> None:
    """A teacher file of the published layout with a network's weights."""
    arguments = arguments_of(denoiser.net.spec) if arguments is None else arguments
    top = persistent(
        class_name, source, _init_args=(), _init_kwargs=arguments, _parameters=OrderedDict(), _buffers=OrderedDict(),
        _modules=OrderedDict(model=module_of(denoiser.net, source)),
    )  # fmt: skip
    Path(path).write_bytes(pickle.dumps({"ema": top, "loss_fn": None, "augment_pipe": None}, protocol=4))


def write_published_edm2(path, net: torch.nn.Module, arguments: dict, source="") -> None:
    """A teacher file of EDM2's layout: half precision, the estimator of the loss beside the network, and an encoder."""
    net = copy.deepcopy(net).half()
    head = ("logvar_fourier", "logvar_linear")
    inside = persistent(
        "UNet", source, _parameters=OrderedDict(out_gain=tensor_of(net.out_gain.data)), _buffers=OrderedDict(),
        _modules=OrderedDict((n, module_of(m, source)) for n, m in net._modules.items() if m is not None and n not in head),
    )  # fmt: skip
    top = persistent(
        "Precond", source, _init_args=(), _init_kwargs=arguments, _parameters=OrderedDict(), _buffers=OrderedDict(),
        _modules=OrderedDict(unet=inside, **{n: module_of(net._modules[n], source) for n in head}),
    )  # fmt: skip
    encoder = persistent("StabilityVAEEncoder", source, vae_name="stabilityai/sd-vae-ft-mse", _vae=None)
    table = Call("dnnlib.util", "EasyDict")
    Path(path).write_bytes(pickle.dumps({"ema": top, "encoder": encoder, "dataset_kwargs": table}, protocol=4))
