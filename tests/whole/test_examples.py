"""The examples do what they say, and so do the code and the commands of the documentation."""

import functools
import importlib.metadata
import importlib.util
import json
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from PIL import Image

import fewstep
from fewstep.cli import main as cli
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.noise import RectifiedFlow
from fewstep.formats.model import load_generator
from fewstep.methods import Batch, Nets
from fewstep.methods.losses import dm_gradient, mean_abs
from fewstep.run.overriding import override
from fewstep.run.recipes import find_recipe
from fewstep.run.settings import find_pipeline, load_run, text_to_image_teacher
from fewstep.students.student import load_student
from fewstep.system import outside
from fewstep.system.errors import FileError
from fewstep.system.strict_yaml import read_yaml
from fewstep.system.tracking import read_stats
from fewstep.teachers import MixtureTeacher
from tests.support.places import ROOT

DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def run_example(name, monkeypatch, *arguments):
    """Run an example's main in this process."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "examples" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    module.main()


def numbers(text, pattern):
    return [float(number) for number in re.findall(pattern, text)]


@pytest.mark.slow
def test_mixture(monkeypatch, capsys, tmp_path):
    run_example("01_mixture.py", monkeypatch, "--images", 15_360, "--plot", tmp_path / "mixture.png")
    output = capsys.readouterr().out
    (before,), (after,) = numbers(output, r"([\d.]+) before"), numbers(output, r"(-?[\d.]+) after")
    assert after < before / 10
    assert (tmp_path / "mixture.png").stat().st_size > 5_000


@pytest.mark.slow
def test_your_own_method(monkeypatch, capsys, tmp_path):
    arguments = ("--images", 10_240, "--out", tmp_path / "run")
    run_example("02_your_own_method.py", monkeypatch, *arguments)
    before, after = numbers(capsys.readouterr().out, r"samples: (-?[\d.]+)")
    assert after < before / 10
    lines = read_stats(tmp_path / "run" / "stats.jsonl")
    assert [line["images"] for line in lines if line["kind"] == "evaluation"] == [0, 10_240]
    assert any("gap_scores" in line for line in lines), "the probe did not reach the log"
    assert load_generator(tmp_path / "run" / "student.safetensors")[0].steps == 1

    run_example("02_your_own_method.py", monkeypatch, *arguments)  # goes on where it stopped: at the end
    assert numbers(capsys.readouterr().out, r"samples: (-?[\d.]+)") == [before, after]


@pytest.mark.slow
def test_your_own_teacher(monkeypatch, capsys, tmp_path):
    run_example("03_your_own_teacher.py", monkeypatch, "--images", 20_480, "--updates", 800, "--out", tmp_path / "run")
    many, one, student = numbers(capsys.readouterr().out, r"energy distance (-?[\d.]+)")
    assert many < one / 4, "the wrapped network is no denoiser of its data"
    assert student < one / 4

    # the student's file names the teacher that rebuilds it, of a family in the same file
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    outside.forget()
    with pytest.raises(FileError, match="must be one of diffusers, edm2-latents, mixture, native, got 'two-moons'"):
        load_student(tmp_path / "run" / "student.safetensors")
    outside.use(["03_your_own_teacher.py"], ROOT / "examples", "a test")
    points = load_student(tmp_path / "run" / "student.safetensors").generator([torch.randn(64, 2)])
    outside.forget()
    assert points.shape == (64, 2) and points.isfinite().all()


def blocks(page, language):
    """The code blocks of a page, also those within lists."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^( *)```{language}(?: [^\n]*)?\n(.*?)^\1```", text, flags=re.M | re.S)
    return [textwrap.dedent(block[2]) for block in found]


def test_code_of_extending(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks(ROOT / "docs" / "extending.md", "python"):
        exec(compile(block, "extending.md", "exec", dont_inherit=True), names)

    # the method: its gradient is DMD's, scaled down by a number between 0 and 1 a sample
    objective, teacher = names["JSDistill"](), MixtureTeacher(fit_steps=0).load()
    nets = Nets(Generator(teacher.start(), [0.7]), teacher.denoiser, objective.make_critic(teacher, teacher.start()))
    x = torch.randn(32, 2, requires_grad=True)
    terms = objective.generator_loss(nets, x, Batch({}))
    terms.losses["js"].backward()
    plain = dm_gradient(x, terms.probe["d_real"], terms.probe["d_fake"]) / x.numel()
    ratio = mean_abs(x.grad) / mean_abs(plain)
    assert ((ratio > 0) & (ratio < 1)).all()
    torch.testing.assert_close(x.grad, ratio[:, None] * plain, rtol=1e-4, atol=1e-7)
    critic = objective.critic_loss(nets, x.detach(), Batch({}, real=torch.randn(32, 2)))
    sum(critic.losses.values()).backward()
    assert all(p.grad is not None for p in nets.critic.head.parameters())

    # the denoiser: the analytic one of the same Gaussian
    exact = MixtureTeacher(means=((0.0, 0.0),), stds=(1.0,), schedule=RectifiedFlow()).denoiser()
    x_t, t = torch.randn(9, 2), torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    torch.testing.assert_close(names["UnitGaussian"]()(x_t, t), exact(x_t, t), rtol=1e-4, atol=1e-5)

    # the teacher, the network and the data: settings make them, as in a run file
    torch.save(names["TinyConvSpec"]().build().state_dict(), "net.pt")
    plain = names["PlainFile"].model_validate({"kind": "plain-file", "path": "net.pt"}).load()
    assert plain.start()(torch.randn(2, 1, 8, 8), torch.full((2,), 0.5), labels=torch.arange(2)).shape == (2, 1, 8, 8)
    assert names["Stripes"](count=5).load().batch(torch.arange(5))[0].shape == (5, 1, 8, 8)

    # the metric: of samples that are known
    def white(seeds, shape, **cond):
        return torch.ones(len(seeds), *shape)

    assert names["brightness"](white, (1, 8, 8), names["ClassLabels"](10)) == 1
    assert (tmp_path / "my-images.npz").exists()


@pytest.mark.slow
def test_code_of_quickstart(monkeypatch, tmp_path):
    """As it stands, with shorter trainings, fewer samples, and without the line for SDXL."""
    monkeypatch.chdir(tmp_path)
    short = {"images": 64, "batch_size": 32, "precision": "fp32"}
    fewstep.distill("fashion-mnist/sid", out="runs/sid", train=short, evaluation={"samples": 0})
    Path("my-images").mkdir()
    for number, picture in enumerate(torch.randint(256, (64, 28, 28), dtype=torch.uint8)):
        Image.fromarray(picture.numpy()).save(f"my-images/{number}.png")
    drawing, training = blocks(ROOT / "docs" / "quickstart.md", "python")
    exec(drawing, {})
    assert Image.open("sneakers.png").size[0] > 100
    lines = [line for line in training.splitlines() if "sdxl" not in line]
    assert len(lines) == training.count("\n") - 1
    code = "\n".join(lines).replace('"images": 20000', '"images": 512').replace("5000", "64")
    names = {"fewstep": fewstep}
    exec(code, names)
    assert Path("runs/mixture/student.safetensors").exists() and names["scores"].n == 64


@pytest.mark.slow
def test_code_of_the_readme_the_tutorial_and_publishing(monkeypatch, tmp_path):
    """As it stands, with shorter trainings and fewer samples; a folder to publish stands for an export."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fewstep.training.panels.TEACHER_CALLS", 1)
    for page, images in (("README.md", '{"images": 24000}'), ("docs/tutorial.md", None), ("docs/publish.md", None)):
        (code,) = blocks(ROOT / page, "python")
        short = (
            '{"images": 64, "batch_size": 32, "precision": "fp32"}, evaluation={"samples": 0}, health={"samples": 0}'
        )
        assert images is None or images in code
        code = (
            code.replace(images or "", short)
            if images
            else code.replace('out="runs/sid")', f'out="runs/digits", train={short})')
        )
        exec(compile(re.sub(r"samples=\d+", "samples=64", code), page, "exec"), names := {})
        if page == "docs/tutorial.md":
            names["student"].export("my-student")
    assert Image.open("sneakers.png").size[0] > 100 and Path("threes.png").exists() and Path("samples.png").exists()


@pytest.mark.slow
def test_the_how_to_of_a_method(monkeypatch, tmp_path, capsys):
    """Files and commands of docs/add-a-method.md as they stand, with a shorter training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    page = ROOT / "docs" / "add-a-method.md"
    (method,), (run,), (lines,) = (blocks(page, language) for language in ("python", "yaml", "sh"))
    Path("my_method.py").write_text(method)
    Path("my_run.yaml").write_text(run.replace("60000", "256").replace("10000", "256").replace("1797", "64"))
    for line in lines.splitlines():
        assert cli.main([*shlex.split(line)[1:], *(["--processes", "1"] if "distill" in line else [])]) == 0, line
    assert (
        "objective.power" in Path("compare.html").read_text() and Path("runs/weighted-1/student.safetensors").exists()
    )
    outside.forget()


PYTHON = {  # the tests that run the Python of a page
    "README.md": test_code_of_the_readme_the_tutorial_and_publishing,
    "tutorial.md": test_code_of_the_readme_the_tutorial_and_publishing,
    "publish.md": test_code_of_the_readme_the_tutorial_and_publishing,
    "quickstart.md": test_code_of_quickstart,
    "extending.md": test_code_of_extending,
    "add-a-method.md": test_the_how_to_of_a_method,
}
OTHERS = ("git clone ", "cd ", "source .venv/bin/activate", "hf auth login")  # lines of a shell that are not ours


def documented_commands():
    found = []
    for page in DOCS:
        for block in blocks(page, "sh"):
            lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
            # a line for torchrun ends with one of fewstep
            lines = [line.partition(" -m ")[2] if line.startswith("torchrun ") else line for line in lines]
            found += [(page.name, line) for line in lines if line and not line.startswith("#")]
    return found


def test_every_block_of_the_documentation_is_run_or_read():
    """Python by the tests of `PYTHON`; YAML and TOML are read here; lines of a shell name what exists."""
    tomllib = pytest.importorskip("tomllib")
    for page in DOCS:
        assert bool(blocks(page, "python")) <= (page.name in PYTHON), page
        languages = set(re.findall(r"^ *```(\w+)", page.read_text(encoding="utf-8"), flags=re.M))
        assert languages <= {"python", "sh", "yaml", "toml", "text"}, page
        for block in blocks(page, "yaml"):
            assert isinstance(read_yaml(block), dict)
        for block in blocks(page, "toml"):
            assert tomllib.loads(block)
    made = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    extras = set(importlib.metadata.metadata("fewstep").get_all("Provides-Extra"))
    for page, line in documented_commands():
        words = shlex.split(line, comments=True)
        match words[0]:
            case "fewstep":
                pass  # the next test
            case "make":
                assert words[1] in made, (page, line)
            case "pip":
                assert words[1] == "install", (page, line)
                named = re.fullmatch(r"\.(?:\[(.*)\])?", words[2])
                assert named and set(filter(None, (named[1] or "").split(","))) <= extras, (page, line)
            case "python":
                assert (ROOT / words[1]).is_file(), (page, line)
            case _:
                assert line.startswith(OTHERS), (page, line)


def test_commands_of_the_documentation(monkeypatch, tmp_path):
    """Every `fewstep` line parses; runs exist and take the settings given."""
    monkeypatch.chdir(tmp_path)
    for name in ("my-teacher", "my-images-teacher"):
        Path(f"{name}.yaml").write_text(find_recipe("own/teacher").read_text())
    for language, name in (("python", "my_method.py"), ("yaml", "my_run.yaml")):
        Path(name).write_text(blocks(ROOT / "docs" / "add-a-method.md", language)[0])
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    for pipeline in ("my-finetune", "world/pipeline"):
        Path(pipeline).mkdir(parents=True)
        Path(pipeline, "model_index.json").write_text("{}")
    checked = []
    commands = [(page, line) for page, line in documented_commands() if line.startswith("fewstep ")]
    for page, line in commands:
        words = shlex.split(line, comments=True)[1:]
        call = cli.parse([word for word in words if word != "--help"])
        assert isinstance(call, functools.partial)
        name, options = words[0], call.keywords
        if name == "prepare":
            text_to_image_teacher(options["recipe"])
        elif options.get("recipe") and find_pipeline(options["recipe"]) is None:
            run = load_run(options["recipe"])
            assert run.kind == ("pretrain" if name == "pretrain" else "distill"), f"{page}: {line}"
            if options.get("settings"):
                override(run, options["settings"])
        checked.append(name)
    outside.forget()
    assert len(checked) == len(commands) > 15
    assert set(checked) >= {"distill", "pretrain", "pairs", "sample", "eval", "report", "recipes"}


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    """Every cell as it stands, but for the length of the training; the last value of a cell can be shown."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples" / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")
    names = {}
    for number, code in enumerate(codes):
        if "images = 60_000" in code:
            code = code.replace("60_000", "1_920")
        if code.startswith(("teacher.", "student.")) and ".save(" not in code:  # a cell that shows what it returns
            assert eval(compile(code, f"cell {number}", "eval"), names)._repr_png_().startswith(b"\x89PNG")
        else:
            exec(compile(code, f"cell {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.count("FID") == 3 and "digits-sid: FID" in printed
    assert (tmp_path / "threes.png").stat().st_size > 1000
