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
from fewstep.networks.lora import LoraSpec
from fewstep.networks.placement import compile_blocks, recompute_blocks
from fewstep.system.errors import SettingsError
from tests.support.networks import SPECS, randomised


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
    with pytest.raises(SettingsError, match=r"train.compile does not go with adapters"):
        task = make()
        compile_blocks(task.teacher.player(LoraSpec(rank=2, targets=("qkv",))))


def test_a_network_without_known_blocks_is_refused():
    with pytest.raises(SettingsError, match=r"train\.compile must find blocks in the network, got Linear"):
        compile_blocks(Preconditioned(torch.nn.Linear(2, 2), Karras()), backend="eager")
