"""One's own pipeline: one command from its folder and a list of prompts to a student; and its run file."""

from pathlib import Path

import pytest
import torch

from fewstep.cli.main import main
from tests.support.pipelines import tiny_sdxl

LEAST = [
    "--train.images", "4", "--train.batch-size", "2", "--train.micro-batch", "null", "--train.precision", "fp32",
    "--train.evaluate-every", "null", "--train.device", "cpu", "--processes", "1", "--generator.lora.rank", "2",
    "--critic.lora.rank", "2", "--train.no-gradient-checkpointing",
]  # fmt: skip


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_sdxl(tmp_path / "my-sdxl")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na house\n")
    return tmp_path


@pytest.mark.slow
def test_one_command_prepares_plans_trains_and_says_what_is_next(world, capsys):
    from fewstep.run.settings import load_run

    line = ["distill", "my-sdxl", "--steps", "2", "--lora", "--prompts", "prompts.txt", *LEAST]
    assert main(line) == 0
    said = capsys.readouterr()
    assert "settings of sdxl/lora-24gb" in said.err and "3 prompts in runs/my-sdxl-prompts" in said.err
    assert "GiB" in said.out and "fewstep export runs/my-sdxl --out" in said.out
    run = load_run(world / "runs" / "my-sdxl")
    assert (
        run.generator.timesteps == (999, 499)
        and run.generator.lora.rank == 2
        and run.teacher.path == str(world / "my-sdxl")
    )
    assert main(line) == 0  # the same command: nothing is left to do
    assert "is finished" in capsys.readouterr().err
    assert main(["sample", "runs/my-sdxl", "--prompt", "a cat", "--seeds", "0", "--out", "cat.png"]) == 0


def test_pictures_show_the_prompts_that_were_asked_for(world, capsys):
    """Prepared ones are looked up, others encoded: the same conditions as the text encoders give."""
    from fewstep.run.scoring import EvaluationSpec
    from fewstep.run.settings import find_pipeline

    assert main(["prepare", "my-sdxl", "--prompts", "prompts.txt", "--out", "prepared"]) == 0
    spec = find_pipeline("my-sdxl").model_copy(update={"prompts": "prepared"})
    teacher = spec.load()
    asked = ("a house", "a cat")
    found = EvaluationSpec(prompts=asked).drawn(spec, teacher, "cpu")
    encoded = EvaluationSpec(prompts=(*asked, "a ship")).drawn(spec, teacher, "cpu")
    labels = torch.arange(2)
    known, same, made = (
        c.cond(rows, 2) for c, rows in ((found, labels), (teacher.conditioner, torch.tensor([2, 0])), (encoded, labels))
    )
    for name, value in same.items():
        assert torch.equal(known[name], value)
        torch.testing.assert_close(made[name], value, rtol=2e-3, atol=2e-3)  # prepared embeddings are float16
    assert encoded.names[2] == "a ship" and EvaluationSpec().drawn(spec, teacher, "cpu") is None

    assert main(["distill", "digits/sid", "--evaluation.prompts", "a cat", "--processes", "1", "--out", "runs/y"]) == 1
    assert "`evaluation.prompts` must be left out unless the teacher takes prompts" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_draws_its_own_prompts_and_its_report_names_them(world, monkeypatch, capsys):
    monkeypatch.setattr("fewstep.training.panels.TEACHER_CALLS", 1)
    from fewstep.run.settings import load_run

    asked = ("a house", "a cat")
    assert main(["prepare", "my-sdxl", "--prompts", "prompts.txt", "--out", "prepared"]) == 0
    assert main(["init", "my-sdxl"]) == 0
    run = [
        "distill",
        "my-sdxl-student.yaml",
        "--teacher.prompts",
        "prepared",
        "--evaluation.prompts",
        *asked,
        "--out",
        "runs/x",
        *LEAST,
    ]
    assert main(run) == 0, capsys.readouterr().err
    assert load_run("runs/x").evaluation.prompts == asked
    assert main(["report", "runs/x"]) == 0
    assert "Columns, from the left and again: a house; a cat." in (world / "runs/x/report.html").read_text()


def test_init_writes_a_run_file_that_plans(world, capsys):
    from fewstep.run.settings import load_run

    assert main(["init", "my-sdxl"]) == 0
    said = capsys.readouterr().out
    assert "16 x 16 pixels" in said and "fewstep prepare my-sdxl-student.yaml --prompts prompts.txt" in said
    place = (
        (world / "my-sdxl-student.yaml").read_text().splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    )
    assert Path(place).name == "run.schema.json" and Path(place).is_file()
    run = load_run("my-sdxl-student.yaml")
    assert (
        run.generator.timesteps == (999, 749, 499, 249) and run.critic.lora is not None and run.evaluation.samples == 0
    )
    assert main(["plan", "my-sdxl-student.yaml"]) == 0


def test_mistakes(world, capsys):
    for line, said in (
        (
            ["distill", "digits/sid", "--steps", "4"],
            "--steps and --lora must come with a pipeline's folder, got digits/sid",
        ),
        (
            ["distill", "digits/sid", "--prompts", "prompts.txt"],
            "`prompts` must be given for a text-to-image teacher only",
        ),
        (["distill", "my-sdxl", "--steps", "9", "--lora"], "`steps` must be 1 to 8, got 9"),
        (["distill", "my-sdxl", "--prompts", "none.txt"], "got none.txt, which does not exist"),
    ):
        assert main(line) == 1, line
        assert said in capsys.readouterr().err


def test_a_whole_student_takes_no_adapters(world):
    from fewstep.run.own import pipeline_run
    from fewstep.run.settings import find_pipeline

    run = pipeline_run(find_pipeline("my-sdxl"), 3, lora=False)
    assert run.adapters() == {"generator.lora": None, "critic.lora": None} and run.generator.timesteps == (
        999,
        665,
        332,
    )
