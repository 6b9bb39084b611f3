"""Small networks of every kind, with weights that make every part matter."""

import torch

from fewstep.diffusion.noise import RectifiedFlow
from fewstep.formats.model import DenoiserSpec
from fewstep.networks import DhariwalUNetSpec, DiTSpec, MLPSpec, SongUNetSpec, UNetSpec

TINY = {
    "dit": DenoiserSpec(net=DiTSpec(size=8, patch=2, width=16, depth=2, heads=2)),
    "unet": DenoiserSpec(net=UNetSpec(size=8, widths=(8, 16))),
    "mlp": DenoiserSpec(net=MLPSpec(shape=(3,), width=16), schedule=RectifiedFlow(shift=2), prediction="flow"),
}


def randomised(spec):
    """A denoiser whose zero-initialised layers are not zero, so that every weight matters."""
    denoiser = spec.build()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return denoiser.eval()


EDM = dict(size=8, channels=1, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.3)


SPECS = {
    "adm": DhariwalUNetSpec(**EDM),
    "ddpmpp": SongUNetSpec(**EDM),
    "dit": DiTSpec(size=8, channels=1, patch=4, width=16, depth=2, heads=2),
    "mlp": MLPSpec(shape=(8,), width=32),
    "unet": UNetSpec(size=8, channels=1, widths=(8, 16)),
}
