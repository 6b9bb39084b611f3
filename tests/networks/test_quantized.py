"""Frozen weights in 8 and 4 bits: their codes against the libraries', their gradients against the whole weights'."""

import copy
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fewstep.networks.lora import LoraSpec, merged
from fewstep.networks.placement import recompute_blocks
from fewstep.networks.quantized import is_quantized, parameter_count, quantize, rounded
from fewstep.system.errors import SettingsError

pytest.importorskip("diffusers")

from fewstep.teachers import DiffusersTeacher
from tests.support.pipelines import prepared, tiny_sdxl

LORA = LoraSpec(rank=4, targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"))


def kind_or_skip(kind):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    return kind


@pytest.fixture(scope="module", params=["sdxl", "sd3", "flux"])
def spec(request, tmp_path_factory):
    """A tiny UNet or transformer with two prompts."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param != "sdxl":
        return prepared(request.param, root)[0]
    teacher = DiffusersTeacher(path=str(tiny_sdxl(root / "sdxl")))
    teacher.prepare(["a cat", "a dog"], root / "prompts", teacher.encoder(), torch.float32)
    return teacher.model_copy(update={"prompts": root / "prompts"})


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x):
        return self.narrow(nn.functional.silu(self.wide(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_codes_are_torchaos(kind):
    torchao = pytest.importorskip("torchao.quantization")
    net = Net()
    weight = net.blocks[0].wide.weight.detach().clone()
    quantize(net, kind)
    if kind == "int8":
        theirs = torchao.Int8Tensor.from_hp(weight, torchao.PerRow())
    else:
        theirs = torchao.Float8Tensor.from_hp(weight, granularity=torchao.PerRow())
    layer = net.blocks[0].wide
    torch.testing.assert_close(layer.scale, theirs.scale)
    assert (layer.codes.float() == theirs.qdata.float()).float().mean() > 0.99  # ties are rounded apart
    torch.testing.assert_close(layer.weight, theirs.dequantize(), rtol=0.07, atol=layer.scale.max().item())


def test_nf4_is_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    net = Net()
    weight = net.blocks[1].narrow.weight.detach().clone()
    quantize(net, "nf4")
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    assert torch.equal(net.blocks[1].narrow.weight, theirs)


@pytest.mark.parametrize("kind, size, group", [("int8", 1, 0), ("float8", 1, 0), ("nf4", 0.5, 64)])
def test_layers_in_blocks_are_quantised_and_counted(kind, size, group):
    kind_or_skip(kind)
    net = Net()
    inside = sum(layer.weight.numel() for block in net.blocks for layer in (block.wide, block.narrow))
    rest = 4 * (sum(p.numel() for p in net.parameters()) - inside)
    total, first = parameter_count(net), net.first.weight.clone()
    found = quantize(net, kind)
    assert (found.layers, found.left, found.before) == (4, 1, 4 * inside + rest)
    assert found.after == sum(p.nbytes for p in net.parameters())
    scales = inside / group if group else 2 * (128 + 32)
    assert found.after == rest + size * inside + 4 * scales
    assert parameter_count(net) == total and is_quantized(net) and torch.equal(net.first.weight, first)
    assert "4 linear layers" in str(found) and "1 outside of blocks" in str(found)


@pytest.mark.parametrize("kind", ["int8", "float8", "nf4"])
def test_the_product_and_its_gradient_are_those_of_the_widened_weights(kind):
    """In both passes, while what is kept for the second is the codes."""
    net = Net()
    quantize(net, kind_or_skip(kind))
    wide = Net().requires_grad_(False)
    wide.load_state_dict(
        {f"{name}.{part}": value for name, layer in net.named_modules() if isinstance(layer, nn.Linear)
         for part, value in (("weight", layer.weight), ("bias", layer.bias))}
    )  # fmt: skip
    net.requires_grad_(False)
    x, kept = torch.randn(5, 32), []
    gradients = []
    for module in (net, wide):
        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            output = module(leaf)
        gradients.append((output, *torch.autograd.grad(output.square().sum(), leaf)))
        if module is net:
            assert {t.dtype for t in kept if t.shape[0] in (128, 2048)} == {net.blocks[0].wide.codes.dtype} | (
                {torch.float32} if kind != "nf4" else set()  # scales of 128 rows
            )
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)


# Relative error of the gradient of all adapters against a bfloat16 base, on tiny networks with random weights: found are
# 0.04, 0.02, 0.04 (UNet, SD3, FLUX) for int8, 0.12, 0.04, 0.16 for float8. bfloat16 itself is 0.03 and 0.01 (UNet, SD3)
# away from float32.
MOST = {"int8": 0.06, "float8": 0.25}


@pytest.mark.parametrize("kind", MOST)
def test_gradients_of_adapters_against_those_on_whole_weights(spec, kind, capsys):
    """With gradient checkpointing."""
    found = {}
    for name, changes in (("bfloat16", {}), (kind, {"quantize": kind})):
        teacher = spec.model_copy(update={"dtype": "bfloat16"} | changes).load()
        torch.manual_seed(1)
        player = teacher.player(LORA)
        with torch.no_grad():
            for parameter in player.parameters():
                parameter.normal_(std=0.1)
        assert recompute_blocks(teacher.denoiser) > 0
        x, cond = torch.randn(2, *teacher.shape), teacher.conditioner.cond(torch.arange(2), 2)
        output = player(x, torch.tensor([0.9, 0.3]), **cond)
        (output * torch.randn_like(output)).mean().backward()
        found[name] = torch.cat([p.grad.flatten() for p in player.parameters()])
    whole, quantised = found["bfloat16"], found[kind]
    error = (quantised - whole).norm() / whole.norm()
    assert 0 < error < MOST[kind], f"{error:.3f}"
    assert f"teacher.quantize {kind}: " in capsys.readouterr().err


def test_a_lora_of_the_teacher_is_merged_before(tmp_path):
    spec, _ = prepared("sd3", tmp_path)
    layer = "transformer_blocks.0.attn.to_q"
    weight = spec.load().denoiser.net.model.get_submodule(layer).weight
    down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    tensors = {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
    save_file(tensors, tmp_path / "style.safetensors")
    tuned = spec.model_copy(update={"quantize": "int8", "lora": tmp_path / "style.safetensors"}).load()
    found = tuned.denoiser.net.model.get_submodule(layer).weight
    torch.testing.assert_close(found, rounded(weight + up @ down, "int8"))


def test_what_cannot_be_quantised_is_refused(spec, monkeypatch):
    teacher = spec.model_copy(update={"quantize": "int8"}).load()
    with pytest.raises(SettingsError, match=r"teacher.quantize must be null where whole weights are trained, got int8"):
        teacher.start()
    with pytest.raises(SettingsError, match="must be merged into float32 weights, got quantised ones"):
        merged(teacher.player(LORA))
    with pytest.raises(SettingsError, match="must find linear layers in blocks, got Linear"):
        quantize(nn.Linear(2, 2), "int8")
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(SettingsError, match=r"bitsandbytes for nf4, .*Try: pip install 'fewstep\[nf4\]', or int8"):
        spec.model_copy(update={"quantize": "nf4"}).load()


def test_a_copy_is_its_own():
    net = Net()
    quantize(net, "int8")
    other = copy.deepcopy(net)
    other.blocks[0].wide.scale.zero_()
    assert net.blocks[0].wide.weight.any() and not other.blocks[0].wide.weight.any()
