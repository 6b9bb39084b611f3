"""The library with text-to-image students: prompts, the pipeline of diffusers, and exported folders."""

import numpy as np
import pytest
import torch

import fewstep
from fewstep.cli.main import main
from fewstep.system.errors import UserError
from fewstep.teachers import DiffusersTeacher
from tests.support.pipelines import tiny_sdxl
from tests.support.students import made_student

LORA = {"rank": 2, "alpha": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny SDXL, and a LoRA student of it in four calls."""
    root = tmp_path_factory.mktemp("library")
    teacher = DiffusersTeacher(path=str(tiny_sdxl(root / "sdxl")))
    made_student(teacher, root / "run", [999, 749, 499, 249], LORA)
    return root


@pytest.mark.slow
def test_prompts_as_the_command_line_draws_them(world, tmp_path):
    student = fewstep.load(world / "run")
    assert student.takes_prompts and student.classes == () and student.shape == (4, 8, 8)
    assert student.picture_shape == (3, 16, 16)
    with pytest.raises(UserError, match="must have prompts"):
        student.sample(0)
    with pytest.raises(UserError, match="`classes` must be left out"):
        student.sample(0, classes=1)
    with pytest.raises(UserError, match="`seeds` must be at least one for each prompt"):
        student.sample(0, prompts=["a", "b"])
    both = student.sample(prompts=["a cat", "a dog"])
    assert both.names == ("a cat", "a dog") and both.seeds == (0, 1)
    line = ["sample", str(world / "run"), "--prompt", "a cat", "--seeds", "0-1", "--out", str(tmp_path / "cli.npz")]
    assert main(line) == 0
    cat = student.sample(range(2), prompts="a cat")
    assert np.array_equal(cat.tensor.permute(0, 2, 3, 1), np.load(tmp_path / "cli.npz")["images"])
    assert cat.tensor[0].equal(both.tensor[0]) and not cat.tensor[1].equal(both.tensor[1])


@pytest.mark.slow
def test_an_export_draws_what_its_run_draws(world, tmp_path):
    student = fewstep.load(world / "run")
    files = student.export(tmp_path / "out", formats=["diffusers"], dtype=torch.float32)
    assert tmp_path / "out" / "model_index.json" in files
    exported = fewstep.load(tmp_path / "out")
    assert exported.is_student and exported.calls == 4
    expected, found = (model.sample(range(3), prompts="a cat").tensor.int() for model in (student, exported))
    assert (expected - found).abs().max() <= 1 and expected.float().std() > 1  # merged adapters round in another order
    with pytest.raises(UserError, match="from_pretrained"):
        exported.pipeline  # noqa: B018
    with pytest.raises(UserError, match="must be a teacher, got a few-step student"):
        DiffusersTeacher(path=str(tmp_path / "out")).load()
    marker = tmp_path / "out" / "fewstep.json"
    marker.write_text('{"kind": "export"}')
    with pytest.raises(UserError, match="export it again"):
        fewstep.load(tmp_path / "out")
    marker.write_text('{"kind": "export", "student": {"format": "fewstep/1"}}')
    with pytest.raises(UserError, match=r"fewstep.json: student: .*Try: export the student again"):
        fewstep.load(tmp_path / "out")


@pytest.mark.slow
def test_the_pipeline_draws_what_the_exported_one_draws(world, tmp_path):
    import diffusers

    student = fewstep.load(world / "run")
    student.export(tmp_path / "out", formats=["diffusers"], dtype=torch.float32)
    pipelines = student.pipeline, diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    options = {"num_inference_steps": 4, "guidance_scale": 0, "height": 16, "width": 16, "output_type": "np"}
    one, other = (
        pipeline("a cat", generator=torch.Generator().manual_seed(0), **options).images for pipeline in pipelines
    )
    assert one.shape == (1, 16, 16, 3) and one.std() > 0.01 and np.abs(one - other).max() < 1e-4


@pytest.mark.slow
def test_one_call_from_a_pipeline_and_prompts_to_a_student(world, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na house\na tree\n")
    student = fewstep.distill(
        "sdxl/lora-24gb", teacher=str(world / "sdxl"), prompts=tmp_path / "prompts.txt", out=tmp_path / "x",
        generator={"lora": LORA}, critic={"lora": LORA},
        train={"images": 4, "batch_size": 2, "precision": "fp32", "device": "cpu", "micro_batch": None, "checkpoint_every": 8, "evaluate_every": None},
    )  # fmt: skip
    assert (tmp_path / "x-prompts" / "prompts.json").is_file()
    assert student.calls == 4 and student.sample(seeds=[1], prompts="a horse").tensor.shape == (1, 3, 16, 16)
    assert len(student.sample(range(4)).names) == 4  # its own prompts
