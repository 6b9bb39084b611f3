"""Gradient checkpointing changes memory, and nothing else."""

import copy

import pytest
import torch

from fewstep.cli import main
from fewstep.data import Digits
from fewstep.denoiser import feature_of, tap
from fewstep.model import DenoiserSpec
from fewstep.nets import DhariwalUNetSpec, DiTSpec, MLPSpec, SongUNetSpec, UNetSpec
from fewstep.nets.recompute import recompute_blocks
from fewstep.objectives import DMD2, SiD
from fewstep.run import load_run
from fewstep.trainer import Micro
from tests.test_model import randomised

EDM = dict(size=8, channels=1, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.3)
SPECS = {
    "adm": DhariwalUNetSpec(**EDM),
    "ddpmpp": SongUNetSpec(**EDM),
    "dit": DiTSpec(size=8, channels=1, patch=4, width=16, depth=2, heads=2),
    "mlp": MLPSpec(shape=(8,), width=32),
    "unet": UNetSpec(size=8, channels=1, widths=(8, 16)),
}


@pytest.mark.parametrize("name", SPECS)
def test_same_values_and_gradients_from_less(name):
    spec = SPECS[name]
    torch.manual_seed(0)
    plain = randomised(DenoiserSpec(net=spec)).train()
    saving = copy.deepcopy(plain)
    assert recompute_blocks(saving) > 0
    x, t = torch.randn(4, *spec.sample_shape), torch.full((4,), 0.5, dtype=torch.float64)
    results, kept = [], []
    for denoiser in (plain, saving):
        torch.manual_seed(1)  # dropout
        x_in, sizes = x.clone().requires_grad_(), []

        def count(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            out = denoiser(x_in, t)
        kept.append(sum(sizes))
        (out**2).sum().backward()
        results.append([out, x_in.grad, *(parameter.grad for parameter in denoiser.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) if a is not None else b is None
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


def test_heads_read_their_layer_once():
    spec = SPECS["adm"]
    denoiser = randomised(DenoiserSpec(net=spec)).eval()
    recompute_blocks(denoiser)
    x, t = torch.randn(2, 1, 8, 8, requires_grad=True), torch.full((2,), 0.5, dtype=torch.float64)
    with tap(denoiser, f"net.{spec.bottleneck}") as features:
        denoiser(x, t).sum().backward()
    assert len(features) == 1
    early = feature_of(denoiser, f"net.{spec.bottleneck}", x, t)
    assert torch.equal(early, features[0])
    early.sum().backward()


@pytest.mark.parametrize("objective", [SiD(), DMD2(critic_steps=1)], ids=["sid", "dmd2"])
def test_a_run_is_the_same_run(objective, tmp_path):
    weights = []
    for saving in (False, True):
        run = load_run("digits/sid")
        train = run.train.model_copy(update={"batch_size": 8, "precision": "fp32", "gradient_checkpointing": saving})
        evaluation = run.evaluation.model_copy(update={"samples": 0})
        changes = {"objective": objective, "train": train, "evaluation": evaluation, "data": Digits()}
        task = run.model_copy(update=changes).trainer(tmp_path).task
        for step in range(2):
            task.update(step * 8, [Micro(step * 8, 8, 0)])
        weights.append([*task.nets.generator.parameters(), *task.nets.critic.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_run_may_go_on_with_it(tmp_path):
    short = ["--out", str(tmp_path / "run"), "--processes", "1", "--evaluation.samples", "0"]
    assert main(["distill", "digits/sid", "--train.images", "64", *short]) == 0
    assert main(["distill", "digits/sid", "--train.images", "128", "--train.gradient-checkpointing", *short]) == 0
