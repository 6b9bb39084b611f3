"""Checkpointing, compilation and sharding of networks never seen: the same numbers, or a refusal by name."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fewstep.diffusion.noise import Karras
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.networks.placement import compile_blocks, narrow, recompute_blocks, shard
from fewstep.system import distributed
from fewstep.system.distributed import MeshSpec
from fewstep.system.errors import SettingsError
from tests.support.processes import ranks
from tests.support.unseen import Convs, Levels, OpaqueNet, ResNet, ViT, group_norm, images, tied_vit

NETS = {"vit": ViT, "resnet": lambda: ResNet(group_norm), "levels": Levels}


def built(name, train=True):
    torch.manual_seed(0)
    return NETS[name]().train(train)


def results(net, count=4):
    """Output, and gradients of the mean square to the input and to the weights."""
    x, label = images(count)
    x.requires_grad_()
    torch.manual_seed(1)  # dropout
    out = net(x, label)
    out.square().mean().backward()
    return [out, x.grad, *(parameter.grad for parameter in net.parameters())]


@pytest.mark.parametrize("between", [False, True], ids=["blocks", "activations"])
@pytest.mark.parametrize("name", NETS)
def test_checkpointing_gives_the_same_bits(name, between):
    plain, saving = built(name), built(name)
    assert recompute_blocks(saving, between) > 0
    assert all(torch.equal(a, b) for a, b in zip(results(plain), results(saving), strict=True))


def test_checkpointing_takes_blocks_that_return_objects():
    plain = OpaqueNet()
    saving = copy.deepcopy(plain)
    assert recompute_blocks(saving) == 2
    assert all(torch.equal(a, b) for a, b in zip(results(plain), results(saving), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_compiled_blocks_compute_the_same(name):
    """Graphs of PyTorch's own compiler, run by its eager backend; with gradient checkpointing around."""
    torch.compiler.reset()
    plain, fast = built(name, train=False), built(name, train=False)
    assert compile_blocks(fast, backend="aot_eager") == recompute_blocks(fast) > 0
    for a, b in zip(results(plain), results(fast), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


def test_what_cannot_be_compiled_is_refused_by_name():
    def broken(graph, _inputs):
        raise NotImplementedError("no compiler here")

    net = built("vit")
    compile_blocks(net, backend=broken)
    with pytest.raises(
        SettingsError, match=r"train\.compile must .*, got Layer in ViT: .*no compiler here.* Try: leave"
    ):
        net(*images())
    torch.compiler.reset()


SETTINGS = {
    "train.gradient_checkpointing": recompute_blocks,
    "train.recompute_activations": lambda net: recompute_blocks(net, between=True),
    "train.compile": compile_blocks,
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_networks_without_blocks_are_refused_by_name(setting):
    with pytest.raises(
        SettingsError, match=f"{setting} must find blocks in the network, got Convs, .* Try: leave it out"
    ):
        SETTINGS[setting](Preconditioned(Convs(), Karras()))


class SpectralNet(ResNet):
    """Spectral norms update the vectors of their power iteration in each forward."""

    def __init__(self):
        super().__init__(group_norm)
        for block in (*self.stage1, self.stage2[1]):
            nn.utils.parametrizations.spectral_norm(block.layers[0])


@pytest.mark.parametrize(
    ("net", "layer"),
    [
        (ResNet, "BatchNorm2d"),
        (lambda: ResNet(lambda width: nn.InstanceNorm2d(width, track_running_stats=True)), "InstanceNorm2d"),
        (SpectralNet, "_SpectralNorm"),
    ],
    ids=["batch", "instance", "spectral"],
)
def test_buffers_are_not_updated_twice(net, layer):
    """They are refused in training, and run where they are read alone."""
    module = net()
    recompute_blocks(module)
    x, label = images()
    with pytest.raises(
        SettingsError, match=rf"train\.gradient_checkpointing must .*, got (ResNet|SpectralNet), whose {layer} updates"
    ):
        module.train()(x, label)
    with torch.no_grad():
        module(x, label)  # without gradients nothing runs twice
    plain = net().eval()
    saving = copy.deepcopy(plain)
    recompute_blocks(saving)
    assert all(torch.equal(a, b) for a, b in zip(results(plain), results(saving), strict=True))


def test_rounding_leaves_alone_what_autocast_does_not_round():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x) * self.weight

    net = Scaled()
    x = torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        before = net(x)
        narrow(net)
        assert torch.equal(net(x), before)
    assert net.linear.weight.dtype == torch.bfloat16 and net.weight.dtype == torch.float32


def split() -> None:
    """In each of two processes: half of the batch through split networks, against the whole batch through whole ones."""
    with distributed.process_group():
        mesh = MeshSpec(shard=2).build(torch.device("cpu"))
        mine = slice(2 * distributed.rank(), 2 * distributed.rank() + 2)
        x, label = images()
        for name in NETS:
            whole, parted = built(name, train=False), built(name, train=False)
            expected = results(whole)
            recompute_blocks(parted)
            assert shard(parted, mesh) == recompute_blocks(whole) + 1
            out = parted(x[mine], label[mine])
            out.square().mean().backward()
            torch.testing.assert_close(out, expected[0][mine])
            for parameter, gradient in zip(parted.parameters(), expected[2:], strict=True):
                assert isinstance(parameter, DTensor)
                torch.testing.assert_close(parameter.grad.full_tensor(), gradient, rtol=1e-5, atol=1e-6)
        with pytest.raises(SettingsError, match=r"train\.mesh\.shard must .*, got ViT, in which blocks share weights"):
            shard(tied_vit(), mesh)
        for net, said in (
            (OpaqueNet(), "Opaque in OpaqueNet, which returns a Output"),
            (ResNet(), "ResNet, whose BatchNorm2d"),
        ):
            shard(net, mesh)
            with pytest.raises(SettingsError, match=rf"train\.mesh\.shard must .*, got {said}"):
                net(x, label)
        convs = Preconditioned(Convs(), Karras())
        assert shard(convs, mesh) == 1
        convs(x, torch.full((4,), 0.5)).sum().backward()


@pytest.mark.slow
def test_split_networks_compute_what_one_process_does():
    said = ranks(split)
    assert "train.mesh.shard: Convs has no blocks" in said[0] and "has no blocks" not in said[1]
