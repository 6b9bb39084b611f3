"""The rule that finds blocks, on every network of the package, on those of diffusers, and on classes never seen."""

from collections import Counter

import pytest
import torch
from torch import nn

from fewstep.diffusion.noise import Karras
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.methods.heads import ConvHead, TokenHead
from fewstep.networks.blocks import Blocked, blocks_of
from tests.support.networks import SPECS
from tests.support.pipelines import load, sdxl_unet, tiny_transformer
from tests.support.unseen import Convs, Levels, ResNet, ViT


def kinds(module):
    return dict(Counter(type(block).__name__ for block in blocks_of(module)))


OWN = {
    "adm": {"Block": 10},
    "ddpmpp": {"Block": 10},
    "dit": {"Block": 2},
    "mlp": {"MLPBlock": 3},
    "unet": {"ResBlock": 4, "Attention": 1},
}


@pytest.mark.parametrize("name", SPECS)
def test_own_networks(name):
    net = SPECS[name].build()
    assert kinds(net) == OWN[name] == kinds(Preconditioned(net, Karras()))


def test_a_unet_of_diffusers_has_the_blocks_that_the_library_recomputes():
    assert kinds(sdxl_unet()) == {"ResnetBlock2D": 8, "BasicTransformerBlock": 8}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sd3", {"JointTransformerBlock": 2}),
        ("flux", {"FluxTransformerBlock": 2, "FluxSingleTransformerBlock": 2}),
        ("sana", {"SanaTransformerBlock": 2}),
        ("pixart", {"BasicTransformerBlock": 2}),
    ],
)
def test_transformers_of_diffusers(name, expected, tmp_path):
    assert kinds(load(tiny_transformer(name, tmp_path)[0]).transformer) == expected


def test_networks_never_seen():
    assert kinds(ViT()) == {"Layer": 3}
    assert kinds(ResNet()) == {"Residual": 3}
    assert kinds(Levels()) == {"Residual": 5}
    assert blocks_of(Convs()) == blocks_of(ConvHead(8, 8)) == blocks_of(TokenHead(8)) == []


def test_a_module_in_two_lists_is_one_block():
    net = ViT()
    net.again = nn.ModuleList([net.parts["layers"][0]])
    assert kinds(net) == {"Layer": 3}


def test_a_network_may_name_its_own():
    class Named(nn.Module, Blocked):
        def __init__(self):
            super().__init__()
            self.inside, self.only = ViT(), nn.Linear(2, 2)

        def block_modules(self):
            return [self.only]

    net = Named()
    assert blocks_of(nn.ModuleDict({"net": net})) == [net.only]


@pytest.mark.parametrize("net", [ViT, ResNet, Levels])
def test_blocks_do_not_overlap_and_hold_most_weights(net):
    with torch.device("meta"):
        module = net()
    blocks = blocks_of(module)
    parts = [part for block in blocks for part in block.modules()]
    assert len(parts) == len(set(parts))
    inside = sum(p.numel() for block in blocks for p in block.parameters())
    assert inside > 0.6 * sum(p.numel() for p in module.parameters())
