"""Runs that start from another run's weights, dropout of what is trained, mirrored images."""

import pytest
import torch

from fewstep.cli.main import main
from fewstep.data import Digits, ImageDataset
from fewstep.formats.model import DenoiserSpec, save_denoiser
from fewstep.methods import DMD2
from fewstep.networks import SongUNetSpec
from fewstep.run.settings import load_run
from fewstep.system.checkpoint import Checkpoints
from fewstep.system.errors import FileError, TeacherError
from fewstep.teachers import NativeTeacher
from fewstep.training.start import read_start
from fewstep.training.task import Micro

SHORT = ["--train.images", "128", "--train.evaluate-every", "None", "--evaluation.samples", "0", "--processes", "1"]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A short run without a GAN head."""
    folder = tmp_path_factory.mktemp("first") / "run"
    assert main(["distill", "digits/sid", "--out", str(folder), *SHORT]) == 0
    return folder


def weights(task):
    nets = task.nets
    return {
        "generator": nets.generator.state_dict(),
        "critic": nets.critic.state_dict(),
        "ema": task.generator.average.state_dict(),
    }


def same(ours, theirs):
    return all(torch.equal(ours[name], value) for name, value in theirs.items())


def stored(run):
    """What the newest checkpoint of a run holds."""
    checkpoints = Checkpoints(run / "checkpoints")
    return checkpoints.load(checkpoints.latest())["task"]


def begun(folder, start, **changes):
    run = load_run("digits/sid").model_copy(update={"start_from": start, **changes})
    return run.trainer(folder).task


def test_all_three_networks_begin_where_the_run_stands(first, tmp_path):
    saved = stored(first)
    ours = weights(begun(tmp_path, first))
    assert same(ours["critic"], saved["critic"]) and same(ours["ema"], saved["ema"])
    # the averaged weights, not the ones that were trained last
    assert same(ours["generator"], saved["ema"]) and not same(saved["generator"], saved["ema"])
    checkpoint = Checkpoints(first / "checkpoints").latest()
    assert same(weights(begun(tmp_path, checkpoint))["critic"], saved["critic"])


def test_a_student_gives_the_generator_alone(first, tmp_path):
    saved, plain = stored(first), weights(begun(tmp_path, None))
    ours = weights(begun(tmp_path, first / "student.safetensors"))
    assert same(ours["generator"], saved["ema"]) and same(ours["ema"], saved["ema"])
    assert same(ours["critic"], plain["critic"])


def test_a_head_is_added_afresh(first, tmp_path):
    saved = read_start(first)
    ours = weights(begun(tmp_path, first, objective=DMD2(), data=Digits()))
    assert any(name.startswith("head.") for name in ours["critic"])
    assert same(ours["critic"], {k: v for k, v in saved["critic"].items() if not k.startswith("head.")})


def test_a_resumed_run_goes_on_from_its_own_checkpoint(first, tmp_path):
    """Not from the start again, which may be gone by then."""
    out = ["distill", "digits/sid", "--out", str(tmp_path / "second"), "--start-from", str(tmp_path / "moved"), *SHORT]
    first.rename(tmp_path / "moved")
    try:
        assert main(out) == 0
    finally:
        (tmp_path / "moved").rename(first)
    out[out.index("--train.images") + 1] = "256"
    assert main(out) == 0
    assert Checkpoints.images_of(Checkpoints(tmp_path / "second" / "checkpoints").latest()) == 256


def test_what_cannot_be_a_start_is_said(first, tmp_path, capsys):
    with pytest.raises(FileError, match="nothing to start from"):
        read_start(tmp_path / "no")
    spec = DenoiserSpec(net=SongUNetSpec(size=8, channels=1, model_channels=8, channel_mult=(1,), num_blocks=1))
    save_denoiser(tmp_path / "t.safetensors", spec.build(), spec, {})
    with pytest.raises(FileError, match="not a few-step generator"):
        read_start(tmp_path / "t.safetensors")
    out = ["--out", str(tmp_path / "run"), "--start-from", str(first), *SHORT]
    assert main(["distill", "fashion-mnist/sid", *out]) == 1
    assert "does not fit teacher fashion-mnist" in capsys.readouterr().err


def test_dropout_acts_in_the_copies_only(tmp_path):
    spec = DenoiserSpec(
        net=SongUNetSpec(size=8, channels=1, model_channels=8, channel_mult=(1,), num_blocks=1, dropout=0.1)
    )
    save_denoiser(tmp_path / "t.safetensors", spec.build(), spec, {})
    x, t = torch.randn(2, 1, 8, 8), torch.full((2,), 0.5, dtype=torch.float64)
    torch.manual_seed(0)
    for dropout, differs in ((0.0, False), (0.5, True)):
        teacher = NativeTeacher(path=str(tmp_path / "t.safetensors"), dropout=dropout).load()
        copied = teacher.start()
        for parameter in copied.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # the last layers begin at zero
        assert torch.equal(teacher.denoiser(x, t), teacher.denoiser(x, t))
        assert torch.equal(copied(x, t), copied(x, t)) is not differs
        assert torch.equal(copied.eval()(x, t), copied(x, t))
    with pytest.raises(TeacherError, match="has no dropout"):
        NativeTeacher(path="digits", dropout=0.1).load()


def test_flip_mirrors_half_of_the_real_images(tmp_path):
    task = begun(tmp_path, None, objective=DMD2(), data=Digits(), flip=True)
    ramp = torch.arange(8, dtype=torch.uint8).expand(64, 1, 8, 8)
    task.real.dataset = ImageDataset("ramp", ramp.contiguous())
    micro = Micro(0, 64, 0)
    real = task._batch(micro, *task._rollout(micro, "critic rollout", 1, gradient=False), images=0).real
    mirrored = (real[:, 0, 0, 0] > real[:, 0, 0, 7]).sum()
    assert 16 < mirrored < 48
