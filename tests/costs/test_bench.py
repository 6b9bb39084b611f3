"""The counts of network passes, measured."""

import pytest

from fewstep.cli.main import main
from fewstep.costs import bench
from fewstep.costs.bench import measure
from fewstep.costs.measure import measure as update_of
from fewstep.costs.outline import outline
from fewstep.data import Digits
from fewstep.methods import DMD2, SiD
from fewstep.run.generator import GeneratorSpec
from fewstep.run.settings import load_run
from tests.support.console import unboxed


def cost_of(objective, **changes):
    run = load_run("digits/sid")
    train = run.train.model_copy(update={"batch_size": 8, "precision": "fp32"})
    return measure(run.model_copy(update={"objective": objective, "train": train, **changes}), cycles=1)


@pytest.mark.parametrize(("shared", "passes"), [(True, 10), (False, 11)])
def test_sid_costs_what_the_docs_say(shared, passes):
    cost = cost_of(SiD(share_rollout=shared))
    assert cost.work.passes == pytest.approx(passes, rel=0.001)
    assert cost.calls == {"generator": (2 - shared, 0), "teacher": (1, 0), "fake score": (2, 0)}
    assert cost.images_per_second > 0 and cost.memory > 2**20 and cost.work.forward > 1e6


def test_dmd2_without_gan():
    cost = cost_of(DMD2(critic_steps=5, gan_weight=0))
    assert cost.work.passes == pytest.approx(4.8, rel=0.001)
    assert cost.calls["teacher"] == pytest.approx((0.2, 0)) and cost.calls["fake score"] == pytest.approx((1.2, 0))


def test_dmd2_with_gan_ends_forwards_at_the_bottleneck():
    plain = cost_of(DMD2(critic_steps=2), data=Digits())
    shared = cost_of(DMD2(critic_steps=2, share_forward=True), data=Digits())
    assert plain.calls["fake score"] == (1.5, 2.5) and shared.calls["fake score"] == (1.5, 1.5)
    assert (
        1 < plain.work.passes - shared.work.passes < 3
    )  # the head's forward on fakes and its backward, of a part of the network


@pytest.mark.slow
def test_several_steps_are_averaged():
    cost = cost_of(SiD(share_rollout=True), generator=GeneratorSpec(sigmas=(5.0, 1.0)))
    assert cost.calls["generator"] == (1.5, 0) and cost.work.passes == pytest.approx(10.5, rel=0.001)


def test_memory_is_read_before_operations_are_counted(monkeypatch):
    """The counter takes memory of its own, and a process's peak never falls: it said 2,903 MiB where training takes 1,871."""
    order = []
    count = bench.count_operations
    monkeypatch.setattr(
        bench, "count_operations", lambda *args, **options: order.append("count") or count(*args, **options)
    )
    monkeypatch.setattr(bench, "_peak", lambda device: order.append("peak") or 12345)
    assert cost_of(SiD()).memory == 12345
    assert order == ["peak", "count"]


@pytest.mark.slow
def test_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["bench", "digits/sid", "--processes", "1", "--train.batch-size", "8", "--cycles", "1"]
    assert main(arguments) == 0
    assert "10.00 F measured" in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert main(["bench", "mixture/sid", "--processes", "1", "--cycles", "1"]) == 0
    assert "8.59 F measured" in capsys.readouterr().out  # a teacher that is a formula has no products
    with pytest.raises(SystemExit):
        main(["bench", "digits/sid", "--processes", "1", "--cycles", "0"])
    assert "--cycles: must be a whole number of at least 1, got '0'" in unboxed(capsys.readouterr().err)
    with pytest.raises(ValueError, match="`cycles` must be at least 1, got 0"):
        measure(load_run("digits/sid"), cycles=0)


@pytest.mark.parametrize(("share", "passes"), [(False, 6.5), (True, 5.7)])
def test_passes_of_dmd2_on_the_imagenet_network(share, passes):
    """docs/methods/dmd2.md: 6.5 F an iteration at five critic updates as the authors run it, 5.7 F with share_forward."""
    run = load_run("imagenet-64/dmd2")
    objective = DMD2(critic_steps=5, gan_noise=DMD2().critic_noise, share_forward=share)
    found = update_of(outline(run.model_copy(update={"objective": objective})), 1).work
    assert found.passes == pytest.approx(passes, abs=0.06)
