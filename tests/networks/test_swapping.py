"""Blocks of a frozen network at the host: the same numbers, and few of them on the device at a time."""

import weakref

import pytest
import torch
from torch import nn

from fewstep.formats.model import DenoiserSpec
from fewstep.networks import DiTSpec
from fewstep.networks.blocks import blocks_of
from fewstep.networks.lora import LoraSpec
from fewstep.networks.placement import recompute_blocks
from fewstep.networks.quantized import quantize
from fewstep.networks.swapping import Swap, swap_blocks
from fewstep.system.errors import SettingsError
from fewstep.teachers.base import Teacher
from tests.support.networks import randomised

CPU = torch.device("cpu")
SPEC = DenoiserSpec(net=DiTSpec(size=8, patch=2, width=16, depth=4, heads=2))
LORA = LoraSpec(rank=2, targets=("qkv", "out", "fc1", "fc2"))


def network(kind=None):
    torch.manual_seed(0)
    denoiser = randomised(SPEC).requires_grad_(False).eval()
    if kind is not None:
        quantize(denoiser, kind)
    return denoiser


def gradients(denoiser, swap=None):
    """Of adapters in a loss that runs them and the shared network, which has gradients with respect to its input too."""
    torch.manual_seed(1)
    shape = SPEC.net.sample_shape
    player = Teacher("tiny", denoiser, shape, None, None, "").player(LORA)
    with torch.no_grad():
        for parameter in player.parameters():
            parameter.normal_(std=0.2)
    x, t = torch.randn(2, *shape, requires_grad=True), torch.tensor([0.9, 0.3])
    first = player(x, t)
    loss = (first - denoiser(first, t)).square().mean()
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in player.parameters())]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("kind", [None, "int8"])
def test_the_same_numbers(kind, count):
    plain, swapped = network(kind), network(kind)
    swap = swap_blocks(swapped, count, CPU)
    for denoiser in (plain, swapped):
        recompute_blocks(denoiser)
    for found, wanted in zip(gradients(swapped), gradients(plain), strict=True):
        assert torch.equal(found, wanted)
    # two forwards, and each once more in the backward pass; a block that came ahead and was not used counts too
    assert 4 * swap.size <= swap.moved <= 4 * swap.size + 2 * swap.size


def test_few_blocks_are_on_the_device_at_a_time(monkeypatch):
    """With gradient checkpointing two: the one that runs and the next. Without it the backward pass would keep them all."""
    alive, most = [], []

    def fetch(self, number, original=Swap._fetch):
        values, event = original(self, number)
        alive.extend(weakref.ref(value) for value in values)
        most.append(sum(value.nbytes for ref in alive if (value := ref()) is not None))
        return values, event

    monkeypatch.setattr(Swap, "_fetch", fetch)
    denoiser = network()
    blocks = blocks_of(denoiser)
    each = sum(value.nbytes for value in blocks[0].parameters())
    swap_blocks(denoiser, len(blocks), CPU)
    recompute_blocks(denoiser)
    gradients(denoiser)
    assert len(blocks) == 4 and max(most) <= 2 * each
    most.clear()
    denoiser = network()
    swap_blocks(denoiser, len(blocks), CPU)
    gradients(denoiser)
    assert max(most) > 2 * each


def test_the_blocks_stay_where_they_are():
    denoiser = network()
    swap = swap_blocks(denoiser, 1, torch.device("meta"))
    block, *others = blocks_of(denoiser)
    denoiser.to("meta")
    assert all(not value.is_meta for value in block.parameters()) and swap.size == sum(
        p.nbytes for p in block.parameters()
    )
    assert all(value.is_meta for other in others for value in other.parameters())
    x, t = torch.zeros(2, *SPEC.net.sample_shape, device="meta"), torch.zeros(2, device="meta")
    assert denoiser(x, t).is_meta, "it came"
    assert all(isinstance(value, nn.Parameter) and not value.is_meta for value in block.parameters()), "and went"


def test_more_blocks_than_there_are_is_refused():
    with pytest.raises(
        SettingsError, match=r"`train.swap_blocks` must be at most the \d+ blocks of the frozen network, got 99"
    ):
        swap_blocks(network(), 99, CPU)
