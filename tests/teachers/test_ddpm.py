"""Unconditional `DDPMPipeline`s of diffusers as teachers: the same prediction as the pipeline's own, and a whole run."""

import json

import pytest
import torch

from fewstep.cli.main import main
from fewstep.system.errors import TeacherError
from fewstep.teachers import DiffusersTeacher

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

SIDE = 8


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory):
    """google/ddpm-cifar10-32 in small: the same kinds of blocks, a linear table of 1000 steps, predicting the noise."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=SIDE, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    folder = tmp_path_factory.mktemp("ddpm")
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler"])
def test_the_teacher_predicts_what_the_pipeline_predicts(ddpm, kind):
    pipeline = diffusers.DDPMPipeline.from_pretrained(ddpm)
    own = getattr(diffusers, kind).from_config(pipeline.scheduler.config, clip_sample=False)
    own.set_timesteps(1000)
    teacher = DiffusersTeacher(path=str(ddpm)).load()
    assert teacher.shape == (3, SIDE, SIDE) and teacher.conditioner.num_classes == 0 and teacher.codec is None
    for step in (1, 250, 700, 999):
        x_t = torch.randn(4, 3, SIDE, SIDE)
        with torch.no_grad():
            found = teacher.denoiser(x_t, torch.full((4,), step / 999, dtype=torch.float64))
            eps = pipeline.unet(x_t, step).sample
        torch.testing.assert_close(found, own.step(eps, step, x_t).pred_original_sample, rtol=1e-4, atol=1e-4)


def test_a_one_step_student_is_trained_sampled_and_scored(ddpm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = {
        "kind": "distill", "teacher": {"kind": "diffusers", "path": str(ddpm)}, "generator": {"timesteps": [700]},
        "objective": {"method": "sid"}, "evaluation": {"samples": 0},
        "train": {"images": 16, "batch_size": 4, "precision": "fp32", "device": "cpu", "evaluate_every": None, "threads": 1},
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(run))  # which is YAML
    assert main(["distill", "run.json", "--out", "run", "--processes", "1"]) == 0
    for place, more in (("run", []), (str(ddpm), ["--evaluations", "3"])):
        assert main(["sample", place, "--seeds", "0-3", "--out", "s.npz", *more]) == 0
    capsys.readouterr()
    assert main(["plan", "run.json", "--processes", "1"]) == 0
    assert "student" in capsys.readouterr().out
    assert main(["export", "run", "--out", "exported"]) == 1
    assert "must be a text-to-image student to be exported" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("a cat\n")
    assert main(["prepare", str(ddpm), "--prompts", "prompts.txt", "--out", "prepared"]) == 1
    assert "must be a text-to-image model to encode prompts, got an unconditional one" in capsys.readouterr().err
    assert main(["sample", "run", "--prompt", "a cat"]) == 1
    assert "unconditional" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(ddpm, tmp_path):
    with pytest.raises(TeacherError, match=r"teacher\.prompts must be left out"):
        DiffusersTeacher(path=str(ddpm), prompts=tmp_path).load()
    labelled = json.loads((ddpm / "unet" / "config.json").read_text()) | {"num_class_embeds": 10}
    diffusers.DDPMPipeline(diffusers.UNet2DModel.from_config(labelled), diffusers.DDPMScheduler()).save_pretrained(
        tmp_path
    )
    with pytest.raises(TeacherError, match="must take no class labels, got num_class_embeds 10"):
        DiffusersTeacher(path=str(tmp_path)).load()
