"""EDM2's network: its formulas once more in plain functions, magnitudes at the start, and weights that stay normalised."""

import math

import pytest
import torch

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.noise import Karras
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.formats.edm import published_network
from fewstep.networks import EDM2Spec, Normalised
from fewstep.networks.edm2 import mp_cat, mp_silu, mp_sum
from fewstep.system.errors import SettingsError
from fewstep.training.optim import OptimSpec
from fewstep.training.player import Player, place
from fewstep.training.spec import TrainSpec

TINY = EDM2Spec(
    size=8, channels=4, num_classes=5, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=8
)  # fmt: skip


def awake(spec, seed=0):
    """A network whose gains, zero at the start, are not."""
    torch.manual_seed(seed)
    net = spec.build().eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("gain"):
                parameter.fill_(0.7)
    return net


def by_formulas(weights: dict, spec: EDM2Spec, x, label, labels):
    """The forward from the paper's equations, in float64, on the weights by name; nothing of the package is used."""
    w = {name: value.double() for name, value in weights.items()}

    def normal(v, dims):
        return v / (1e-4 + (v**2).mean(dims, keepdim=True) ** 0.5)

    def layer(name, v, gain=1.0):
        kernel = w[f"{name}.weight"]
        fan = kernel[0].numel()
        kernel = gain * normal(kernel, tuple(range(1, kernel.ndim))) / fan**0.5
        if kernel.ndim == 2:
            return torch.einsum("bi,oi->bo", v, kernel)
        wide = kernel.shape[-1] // 2
        patches = torch.nn.functional.unfold(v, kernel.shape[-1], padding=wide)
        return torch.einsum("bkp,ok->bop", patches, kernel.flatten(1)).unflatten(2, v.shape[2:])

    def silu(v):
        return v / (1 + (-v).exp()) / 0.596

    def add(a, b, t):
        return ((1 - t) * a + t * b) / (t**2 + (1 - t) ** 2) ** 0.5

    def block(name, v, emb, encoder, resample=""):
        if resample == "down":
            v = v.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))
        if resample == "up":
            v = v.repeat_interleave(2, 2).repeat_interleave(2, 3)
        skip = f"{name}.conv_skip.weight" in w
        if encoder:
            v = normal(layer(f"{name}.conv_skip", v) if skip else v, 1)
        y = layer(f"{name}.conv_res0", silu(v))
        y = silu(y * (1 + layer(f"{name}.emb_linear", emb, w[f"{name}.emb_gain"]))[:, :, None, None])
        y = layer(f"{name}.conv_res1", y)
        if skip and not encoder:
            v = layer(f"{name}.conv_skip", v)
        v = add(v, y, 0.3)
        if f"{name}.attn_qkv.weight" in w:
            b, c, side, _ = v.shape
            heads = c // spec.channels_per_head
            qkv = layer(f"{name}.attn_qkv", v).reshape(b, heads, c // heads, 3, side * side)
            q, k, values = normal(qkv, 2).unbind(3)
            share = torch.einsum("bhcq,bhck->bhqk", q, k / (c // heads) ** 0.5).softmax(-1)
            seen = torch.einsum("bhqk,bhck->bhcq", share, values).reshape(b, c, side, side)
            v = add(v, layer(f"{name}.attn_proj", seen), 0.3)
        return v

    x, label = x.double(), label.double()
    features = 2**0.5 * torch.cos(label[:, None] * w["emb_fourier.freqs"] + w["emb_fourier.phases"])
    classes = torch.zeros(len(x), spec.num_classes + 1, dtype=torch.float64)
    classes[torch.arange(len(x)), labels] = spec.num_classes**0.5
    emb = silu(add(layer("emb_noise", features), layer("emb_label", classes[:, :-1]), 0.5))
    v = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    skips = []
    for name in ("8x8_conv", "8x8_block0", "4x4_down", "4x4_block0"):
        down = "down" if "down" in name else ""
        v = layer(f"enc.{name}", v) if "conv" in name else block(f"enc.{name}", v, emb, True, down)
        skips.append(v)
    for name in ("4x4_in0", "4x4_in1", "4x4_block0", "4x4_block1", "8x8_up", "8x8_block0", "8x8_block1"):
        if "block" in name:
            other = skips.pop()
            a, b = v.shape[1], other.shape[1]
            v = torch.cat([v / a**0.5, other / b**0.5], 1) * ((a + b) / 2) ** 0.5
        v = block(f"dec.{name}", v, emb, False, "up" if "up" in name else "")
    assert not skips
    return layer("out_conv", v, w["out_gain"])


def test_the_forward_is_that_of_the_formulas():
    net = awake(TINY)
    x, label, labels = torch.randn(3, 4, 8, 8), torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0, 4, 5])
    with torch.no_grad():
        found = net(x, label, labels)
    torch.testing.assert_close(
        found.double(), by_formulas(net.state_dict(), TINY, x, label, labels), rtol=1e-4, atol=1e-4
    )
    assert found.std() > 0.3
    with torch.no_grad():
        torch.testing.assert_close(net(x[2:], label[2:]), found[2:])  # no class for all: the index above the classes


def test_operations_preserve_magnitudes():
    """Independent unit Gaussian inputs; the paper's constants have three digits."""
    torch.manual_seed(0)
    a, b = torch.randn(4, 100, 50), torch.randn(4, 300, 50)
    for made in (
        mp_silu(a),
        mp_sum(a, b[:, :100], 0.3),
        mp_sum(a, b[:, :100], 0.5),
        mp_cat(a, b, 0.5),
        mp_cat(a, b, 0.3),
    ):
        assert made.square().mean().sqrt().item() == pytest.approx(1, abs=0.02)
    cat = mp_cat(a, b, 0.5)  # each half contributes the same, though it has other channels
    assert cat[:, :100].square().sum().item() == pytest.approx(cat[:, 100:].square().sum().item(), rel=0.05)


def test_every_block_has_about_unit_magnitude_at_the_start():
    """Root mean squares between 0.75 and 1.05; they are below 1 where attention averages values that agree."""
    spec = EDM2Spec(
        size=16, num_classes=10, model_channels=64, channel_mult=(1, 2), num_blocks=2, attn_resolutions=(8,)
    )
    torch.manual_seed(0)
    net, found = spec.build().eval(), {}
    for name, layer in [*net.enc.named_children(), *net.dec.named_children()]:
        layer.register_forward_hook(lambda layer, inputs, output, name=name: found.setdefault(name, []).append(output))
    with torch.no_grad():
        net(torch.randn(16, 4, 16, 16), torch.randn(16), torch.arange(16) % 10)
    sizes = {name: [part.square().mean().sqrt().item() for part in parts] for name, parts in found.items()}
    assert sum(map(len, sizes.values())) == 15 and all(
        0.75 < size < 1.05 for parts in sizes.values() for size in parts
    ), sizes


def rms_of(net):
    layers = [layer for layer in net.modules() if isinstance(layer, Normalised)]
    return torch.cat([layer.weight.detach().flatten(1).square().mean(1).sqrt() for layer in layers])


def test_weights_are_normalised_before_and_after_each_step_of_an_optimizer():
    denoiser = Preconditioned(awake(TINY), Karras(), "edm", 0.5)
    with torch.no_grad():
        denoiser.net.out_conv.weight.mul_(3)  # weights of a published file are averages, not normalised
    x_t, t = torch.randn(4, 4, 8, 8), torch.full((4,), 0.5)
    before = denoiser(x_t, t)
    player = Player(
        "generator", Generator(denoiser, [1.0]), OptimSpec(kind="adam", lr=0.1), TrainSpec(images=8, device="cpu"), averaged=False,
        optimizer_name="o",
    )  # fmt: skip
    torch.testing.assert_close(denoiser(x_t, t), before, rtol=1e-3, atol=1e-3)
    assert (rms_of(denoiser.net) - 1).abs().max() < 1e-3
    place([player], None, player.train)
    for _ in range(3):
        denoiser(x_t, t).square().mean().backward()
        old = denoiser.net.out_conv.weight.detach().clone()
        player.step(4, 4)
        assert not torch.equal(denoiser.net.out_conv.weight, old)
        assert (rms_of(denoiser.net) - 1).abs().max() < 1e-3
    assert (rms_of(awake(TINY)) - 1).abs().max() > 0.01  # the bound can fail


def test_offload_is_refused():
    train = TrainSpec(images=8, device="cpu", offload=True, precision="bf16")
    denoiser = Preconditioned(awake(TINY), Karras(), "edm", 0.5)
    optim = OptimSpec(kind="adam", lr=0.1)
    player = Player("generator", Generator(denoiser, [1.0]), optim, train, averaged=False, optimizer_name="o")
    with pytest.raises(SettingsError, match="must be false for EDM2"):
        place([player], None, train)


@pytest.mark.parametrize(
    ("name", "millions", "shape"),
    [
        ("edm2-img512-xs-2147483-0.135.pkl", 125, (4, 64, 64)),
        ("edm2-img512-s-2147483-0.130.pkl", 280, (4, 64, 64)),
        ("edm2-img512-m-2147483-0.100.pkl", 498, (4, 64, 64)),
        ("edm2-img512-l-1879048-0.085.pkl", 777, (4, 64, 64)),
        ("edm2-img512-xl-1342177-0.085.pkl", 1119, (4, 64, 64)),
        ("edm2-img512-xxl-0939524-0.070.pkl", 1523, (4, 64, 64)),
        ("edm2-img64-s-1073741-0.075.pkl", 280, (3, 64, 64)),
    ],
)
def test_published_sizes_have_the_papers_parameters(name, millions, shape):
    spec = published_network(name)
    assert spec.sample_shape == shape and spec.num_classes == 1000
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in spec.build().parameters())
    assert round(count / 1e6) == millions


def test_an_unconditional_network_is_known_and_other_names_are_not():
    assert published_network("edm2-img512-xs-uncond-2147483-0.045.pkl").num_classes == 0
    assert published_network("edm2-img256-xs-2147483-0.045.pkl") is None
    assert math.isclose(published_network("edm2-img512-m-2147483-0.100.pkl").dropout, 0.1)
