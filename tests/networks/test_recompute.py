"""Gradient checkpointing changes memory, and nothing else."""

import copy
import gc
import weakref

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fewstep.cli.main import main
from fewstep.data import Digits
from fewstep.diffusion.denoiser import feature_of, tap
from fewstep.diffusion.noise import Karras
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.formats.model import DenoiserSpec
from fewstep.methods import DMD2, SiD
from fewstep.networks.lora import Adapted, LoraSpec
from fewstep.networks.placement import recompute_blocks
from fewstep.run.settings import load_run
from fewstep.system.errors import SettingsError
from fewstep.teachers import MixtureTeacher
from fewstep.training.spec import TrainSpec
from fewstep.training.task import Micro
from tests.support.networks import SPECS, randomised


def held_after_forward(denoiser, x, t):
    """Bytes of tensors that a forward made and that are alive before its backward, kept results of operations included."""
    gc.collect()
    with Made() as made:
        out = denoiser(x, t)
    held = sum(storage.nbytes() for storage in map(lambda reference: reference(), made.storages.values()) if storage)
    assert out.requires_grad
    return held


class Made(TorchDispatchMode):
    """Storages that operations make."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, torch.Tensor):
                self.storages[value.untyped_storage()._cdata] = weakref.ref(value.untyped_storage())
        return found


@pytest.mark.parametrize("between", [False, True], ids=["blocks", "activations"])
@pytest.mark.parametrize("name", SPECS)
def test_same_values_and_gradients(name, between):
    """To the last digit, dropout's draws included, in float32 and in bfloat16."""
    spec = SPECS[name]
    torch.manual_seed(0)
    plain = randomised(DenoiserSpec(net=spec)).train()
    saving = copy.deepcopy(plain)
    assert recompute_blocks(saving, between) > 0
    x, t = torch.randn(4, *spec.sample_shape), torch.full((4,), 0.5, dtype=torch.float64)
    for bf16 in (False, True):
        results = []
        for denoiser in (plain, saving):
            denoiser.zero_grad()
            torch.manual_seed(1)  # dropout
            x_in = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out = denoiser(x_in, t)
            (out**2).sum().backward()
            results.append([out, x_in.grad, *(parameter.grad for parameter in denoiser.parameters())])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b) if a is not None else b is None


@pytest.mark.parametrize("name", ["adm", "ddpmpp", "unet"])
def test_what_is_kept_lies_between_all_and_the_inputs_of_blocks(name):
    spec = SPECS[name]
    plain = randomised(DenoiserSpec(net=spec)).train()
    x, t = torch.randn(16, *spec.sample_shape), torch.full((16,), 0.5, dtype=torch.float64)
    held = []
    for between in (None, True, False):
        denoiser = copy.deepcopy(plain)
        if between is not None:
            recompute_blocks(denoiser, between)
        held.append(held_after_forward(denoiser, x, t))
    everything, results, inputs = held
    assert inputs < 0.9 * results and results < 0.85 * everything, held


def test_dear_operations_run_once():
    """Convolutions and products of a forward and backward are those without recomputing: no more floating-point operations."""
    plain = randomised(DenoiserSpec(net=SPECS["adm"])).train()
    x, t = torch.randn(4, *SPECS["adm"].sample_shape), torch.full((4,), 0.5, dtype=torch.float64)
    counts = []
    for between in (None, True, False):
        denoiser = copy.deepcopy(plain)
        if between is not None:
            recompute_blocks(denoiser, between)
        with FlopCounterMode(display=False) as counter:
            denoiser(x, t).square().sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] < counts[2]


@pytest.mark.parametrize("name", SPECS)
def test_autograd_saves_less(name):
    spec = SPECS[name]
    torch.manual_seed(0)
    plain = randomised(DenoiserSpec(net=spec)).train()
    saving = copy.deepcopy(plain)
    assert recompute_blocks(saving) > 0
    x, t = torch.randn(4, *spec.sample_shape), torch.full((4,), 0.5, dtype=torch.float64)
    kept = []
    for denoiser in (plain, saving):
        x_in, sizes = x.clone().requires_grad_(), []

        def count(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            denoiser(x_in, t)
        kept.append(sum(sizes))
    assert kept[1] < 0.7 * kept[0]


def test_a_copy_computes_with_its_own_weights():
    denoiser = randomised(DenoiserSpec(net=SPECS["ddpmpp"]))
    recompute_blocks(denoiser)
    copied = copy.deepcopy(denoiser)
    x, t = torch.randn(2, 1, 8, 8), torch.full((2,), 0.5, dtype=torch.float64)
    before = copied.eval()(x, t)
    for parameter in denoiser.parameters():
        parameter.data.zero_()
    assert torch.equal(copied(x, t), before)


@pytest.mark.parametrize("between", [False, True], ids=["blocks", "activations"])
def test_heads_read_their_layer_once(between):
    spec = SPECS["adm"]
    denoiser = randomised(DenoiserSpec(net=spec)).eval()
    recompute_blocks(denoiser, between)
    x, t = torch.randn(2, 1, 8, 8, requires_grad=True), torch.full((2,), 0.5, dtype=torch.float64)
    with tap(denoiser, f"net.{spec.bottleneck}") as features:
        denoiser(x, t).sum().backward()
    assert len(features) == 1
    early = feature_of(denoiser, f"net.{spec.bottleneck}", x, t)
    assert torch.equal(early, features[0])
    early.sum().backward()
    inner = feature_of(denoiser, f"net.{spec.bottleneck}.conv0", x, t)  # the forward ends within a block
    inner.sum().backward()


@pytest.mark.parametrize("objective", [SiD(), DMD2(critic_steps=1)], ids=["sid", "dmd2"])
def test_a_run_is_the_same_run(objective, tmp_path):
    weights = []
    for saving in ({}, {"gradient_checkpointing": True}, {"recompute_activations": True}):
        run = load_run("digits/sid")
        train = run.train.model_copy(update={"batch_size": 8, "precision": "fp32", **saving})
        evaluation = run.evaluation.model_copy(update={"samples": 0})
        changes = {"objective": objective, "train": train, "evaluation": evaluation, "data": Digits()}
        task = run.model_copy(update=changes).trainer(tmp_path).task
        for step in range(2):
            task.update(step * 8, [Micro(step * 8, 8, 0)])
        weights.append([*task.nets.generator.parameters(), *task.nets.critic.parameters()])
    for other in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], other, strict=True))


def test_a_run_may_go_on_with_it(tmp_path):
    short = ["--out", str(tmp_path / "run"), "--processes", "1", "--evaluation.samples", "0"]
    assert main(["distill", "digits/sid", "--train.images", "64", *short]) == 0
    assert main(["distill", "digits/sid", "--train.images", "128", "--train.gradient-checkpointing", *short]) == 0
    assert main(["distill", "digits/sid", "--train.images", "192", "--train.recompute-activations", *short]) == 0


@pytest.mark.parametrize("other", ["gradient_checkpointing", "compile"])
def test_two_ways_at_once_are_refused(other):
    with pytest.raises(ValidationError, match=f"recompute_activations must be false with {other}.*Try: leave one"):
        TrainSpec(images=8, recompute_activations=True, **{other: True})


def test_adapters_come_back_in_the_recomputation():
    """Two adapters on one network: each one's gradients are those without recomputing."""
    torch.manual_seed(0)
    base = randomised(DenoiserSpec(net=SPECS["unet"])).requires_grad_(False).eval()
    x, t = torch.randn(2, 1, 8, 8), torch.full((2,), 0.5, dtype=torch.float64)
    gradients = []
    for between in (None, True):
        shared = copy.deepcopy(base)
        if between is not None:
            recompute_blocks(shared, between)
        torch.manual_seed(2)
        both = [Adapted(shared, LoraSpec(rank=2, targets=("conv_in", "conv_mid", "modulation"))) for _ in range(2)]
        for adapted in both:
            for adapter in adapted.adapters().values():
                torch.nn.init.normal_(adapter.up)
        sum(adapted(x, t).square().sum() for adapted in both).backward()
        gradients.append([p.grad for adapted in both for p in adapted.parameters()])
    assert len(gradients[0]) > 4 and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_network_without_known_blocks_is_refused_and_one_without_weights_is_not():
    """Asked for and not done would be found out by a full card."""
    plain = Preconditioned(nn.Linear(2, 2), Karras())
    for between in (False, True):
        with pytest.raises(SettingsError, match=r"`?train\.\w+`? must find blocks in the network, got Linear"):
            recompute_blocks(plain, between)
    assert recompute_blocks(MixtureTeacher().denoiser()) == 0
