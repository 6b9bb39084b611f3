"""Compiled blocks compute what they did, and a run with them trains."""

import copy

import pytest
import torch

from fewstep.data import Digits
from fewstep.diffusion.denoiser import feature_of
from fewstep.diffusion.noise import Karras
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.formats.model import DenoiserSpec
from fewstep.methods import DMD2
from fewstep.networks.lora import Adapted, LoraSpec
from fewstep.networks.placement import compile_blocks, recompute_blocks
from fewstep.networks.quantized import quantize
from fewstep.system.errors import SettingsError
from tests.support.networks import SPECS, TINY, randomised


@pytest.fixture(autouse=True)
def _forget():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def counting(runs):
    """A backend that compiles nothing, and counts."""

    def backend(graph, _inputs):
        def run(*args):
            runs.append(graph)
            return graph.forward(*args)

        return run

    return backend


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_same_values_and_gradients(name):
    """With gradient checkpointing around; what runs are graphs, one a block."""
    spec, runs = SPECS[name], []
    torch.manual_seed(0)
    plain = randomised(DenoiserSpec(net=spec)).eval()
    compiled = copy.deepcopy(plain)
    count = compile_blocks(compiled, backend=counting(runs))
    names = list(plain.state_dict())
    recompute_blocks(compiled)
    x, t = torch.randn(2, *spec.sample_shape), torch.full((2,), 0.5, dtype=torch.float64)
    results = []
    for denoiser in (plain, compiled):
        x_in = x.clone().requires_grad_()
        out = denoiser(x_in, t)
        if denoiser is compiled:
            assert len(runs) == count > 0, "a block ran in pieces, or not compiled"
        (out**2).sum().backward()
        results.append([out, x_in.grad, *(parameter.grad for parameter in denoiser.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert list(compiled.state_dict()) == names


def test_a_head_still_reads_its_layer():
    denoiser = randomised(DenoiserSpec(net=SPECS["ddpmpp"])).eval()
    layer = f"net.{SPECS['ddpmpp'].bottleneck}"
    x, t = torch.randn(2, 1, 8, 8), torch.full((2,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        before = feature_of(denoiser, layer, x, t)
        compile_blocks(denoiser, read=layer, backend="eager")
        torch.testing.assert_close(feature_of(denoiser, layer, x, t), before)
        within = f"{layer}.conv1"  # of a block that therefore is left alone
        whole = randomised(DenoiserSpec(net=SPECS["ddpmpp"])).eval()
        assert compile_blocks(whole, read=within, backend="eager") == compile_blocks(
            randomised(DenoiserSpec(net=SPECS["ddpmpp"])), backend="eager"
        ) - 1  # fmt: skip


def test_a_run_trains_with_it(monkeypatch, tmp_path):
    """DMD2 with a GAN, real compilation left out: it takes a minute."""
    import fewstep.training.player
    from fewstep.teachers import NativeTeacher
    from tests.support.runs import fit, optim, train_spec

    counts = []
    monkeypatch.setattr(
        fewstep.training.player, "compile_blocks", lambda *args: counts.append(compile_blocks(*args, backend="eager"))
    )
    from fewstep.training.distill import Distillation, Setup

    def make(**train):
        settings = train_spec(images=16, evaluate_every=None, **train)
        return Distillation(
            Setup(
                NativeTeacher(path="digits").load(),
                (0.5,),
                DMD2(critic_steps=1),
                settings,
                optim(),
                optim(),
                Digits().load(),
            )
        )

    fit(make(compile=True), tmp_path / "a")
    fit(make(), tmp_path / "b")
    assert len(counts) == 3 and min(counts) > 0
    from fewstep.system.weights import load_weights

    a, b = (load_weights(tmp_path / name / "student.safetensors")[0] for name in "ab")
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=0, atol=1e-5)


LORA = LoraSpec(rank=2, targets=("qkv", "out", "fc1", "fc2"))


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_are_part_of_the_graphs(recompute, kind):
    """Two adapters and none on one network, in turn and in one backward pass, under autocast: each in graphs of its own."""
    found, runs = {}, []
    for compiled in (False, True):
        torch.manual_seed(0)
        base = randomised(DenoiserSpec(net=SPECS["dit"])).requires_grad_(False).eval()
        if kind is not None:
            quantize(base, kind)
        one, other = Adapted(base, LORA), Adapted(base, LORA)
        parameters = [*one.parameters(), *other.parameters()]
        with torch.no_grad():
            for parameter in parameters:
                parameter.normal_(std=0.2)
        count = compile_blocks(base, backend=counting(runs)) if compiled else 0
        if recompute:
            recompute_blocks(base)
        x = torch.randn(2, *SPECS["dit"].sample_shape, requires_grad=True)
        t = torch.full((2,), 0.5, dtype=torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [denoiser(x, t) for denoiser in (one, base, other, one)]
        if compiled:
            assert len(runs) == 4 * count and len({id(graph) for graph in runs}) >= 3, "ran in pieces, or not compiled"
        (outputs[0] * outputs[1] + outputs[2] * outputs[3].detach()).sum().backward()
        found[compiled] = [*outputs, x.grad, *(parameter.grad for parameter in parameters)]
    assert not torch.equal(found[True][0], found[True][1]) and not torch.equal(found[True][0], found[True][2])
    for mine, wanted in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)


def test_a_run_of_adapters_trains_with_it(monkeypatch, tmp_path):
    """One network in memory, compiled once; real compilation left out."""
    import fewstep.training.player
    from fewstep.formats.model import save_denoiser
    from fewstep.methods import SiD
    from fewstep.teachers import NativeTeacher
    from fewstep.training.distill import Distillation, Setup
    from fewstep.training.task import Micro
    from tests.support.runs import optim, train_spec

    counts, stats = [], []
    monkeypatch.setattr(
        fewstep.training.player, "compile_blocks", lambda *args: counts.append(compile_blocks(*args, backend="eager"))
    )
    torch.manual_seed(0)
    save_denoiser(tmp_path / "t.safetensors", randomised(TINY["dit"]), TINY["dit"], {})
    for changes in ({"compile": True}, {}):
        teacher = NativeTeacher(path=str(tmp_path / "t.safetensors")).load()
        setup = Setup(
            teacher, (0.5,), SiD(), train_spec(**changes), optim(), optim(), generator_lora=LORA, critic_lora=LORA
        )
        task = Distillation(setup)
        stats.append([task.update(8 * number, [Micro(8 * number, 4, 0)]) for number in range(2)])
    assert len(counts) == 1 and counts[0] > 0
    for mine, wanted in zip(*stats, strict=True):
        assert mine.keys() == wanted.keys()
        for name, value in mine.items():
            torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(wanted[name]), rtol=1e-4, atol=1e-6)


def test_a_network_without_known_blocks_is_refused():
    with pytest.raises(SettingsError, match=r"train\.compile must find blocks in the network, got Linear"):
        compile_blocks(Preconditioned(torch.nn.Linear(2, 2), Karras()), backend="eager")
