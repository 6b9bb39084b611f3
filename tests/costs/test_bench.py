"""The counts of network passes, measured."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fewstep.cli.main import main
from fewstep.costs import bench
from fewstep.costs.bench import measure
from fewstep.data import Digits
from fewstep.diffusion.denoiser import feature_of
from fewstep.methods import DMD2, SiD
from fewstep.methods.base import ENCODER
from fewstep.networks import DhariwalUNetSpec
from fewstep.run.settings import load_run
from fewstep.run.specs import GeneratorSpec
from tests.support.console import unboxed


def cost_of(objective, **changes):
    run = load_run("digits/sid")
    train = run.train.model_copy(update={"batch_size": 8, "precision": "fp32"})
    return measure(run.model_copy(update={"objective": objective, "train": train, **changes}), cycles=1)


@pytest.mark.parametrize(("shared", "passes"), [(True, 10), (False, 11)])
def test_sid_costs_what_the_docs_say(shared, passes):
    cost = cost_of(SiD(share_rollout=shared))
    assert cost.counted == passes and cost.passes == pytest.approx(passes, rel=0.01)
    assert cost.calls == {"generator": (2 - shared, 0), "teacher": (1, 0), "fake score": (2, 0)}
    assert cost.images_per_second > 0 and cost.memory > 2**20 and cost.forward > 1e6


def test_dmd2_without_gan():
    cost = cost_of(DMD2(critic_steps=5, gan_weight=0))
    assert cost.counted == pytest.approx(4.8) and cost.passes == pytest.approx(4.8, rel=0.01)
    assert cost.calls["teacher"] == (0.2, 0) and cost.calls["fake score"] == (1.2, 0)


def test_dmd2_with_gan_ends_forwards_at_the_bottleneck():
    """Counted as half a forward; how much it is depends on the network."""
    plain = cost_of(DMD2(critic_steps=2), data=Digits())
    shared = cost_of(DMD2(critic_steps=2, share_forward=True), data=Digits())
    assert plain.calls["fake score"] == (1.5, 2.5) and shared.calls["fake score"] == (1.5, 1.5)
    assert plain.passes > shared.passes > shared.counted - 2 and plain.passes - shared.passes > 1


@pytest.mark.slow
def test_several_steps_are_averaged():
    cost = cost_of(SiD(share_rollout=True), generator=GeneratorSpec(sigmas=(5.0, 1.0)))
    assert 1 < cost.calls["generator"][0] < 2 and cost.passes == pytest.approx(cost.counted, rel=0.05)


def test_memory_is_read_before_operations_are_counted(monkeypatch):
    """The counter takes memory of its own, and a process's peak never falls: it said 2,903 MiB where training takes 1,871."""
    order = []

    class Counter(FlopCounterMode):
        def __enter__(self):
            order.append("count")
            return super().__enter__()

    monkeypatch.setattr(bench, "FlopCounterMode", Counter)
    monkeypatch.setattr(bench, "_peak", lambda device: order.append("peak") or 12345)
    assert cost_of(SiD()).memory == 12345
    assert order == ["peak", "count", "count"]


@pytest.mark.slow
def test_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["bench", "digits/sid", "--processes", "1", "--train.batch-size", "8", "--cycles", "1"]
    assert main(arguments) == 0
    assert "10.00 F measured" in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert main(["bench", "mixture/sid", "--processes", "1"]) == 1
    assert "a formula" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "digits/sid", "--processes", "1", "--cycles", "0"])
    assert "--cycles: must be a whole number of at least 1, got '0'" in unboxed(capsys.readouterr().err)
    with pytest.raises(ValueError, match="0 cycles"):
        measure(load_run("digits/sid"), cycles=0)


def test_passes_of_dmd2_on_the_imagenet_network():
    """docs/methods/dmd2.md: 6.5 F an iteration at five critic updates as the authors run it, 5.7 F with share_forward."""
    spec = DhariwalUNetSpec(
        size=64, num_classes=1000, model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3,
        attn_resolutions=(32, 16, 8),
    )  # fmt: skip
    with torch.device("meta"), torch.no_grad():
        net, inputs = spec.build(), (torch.zeros(1, 3, 64, 64), torch.zeros(1))
        labels = torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as whole:
            net(*inputs, labels=labels)
        with FlopCounterMode(display=False) as part:
            feature_of(net, spec.bottleneck, *inputs, labels=labels)
    encoder = part.get_total_flops() / whole.get_total_flops()
    assert encoder == pytest.approx(0.27, abs=0.005)
    for share, expected in ((False, 6.5), (True, 5.7)):
        objective = DMD2(critic_steps=5, gan_noise=DMD2().critic_noise, share_forward=share)
        passes = objective.passes()
        heads = sum(cost for name, cost in passes.items() if name.endswith("GAN"))  # each counted as half a forward
        assert sum(passes.values()) - heads + heads / ENCODER * encoder == pytest.approx(expected, abs=0.05)
