"""The examples do what they say, and so does the code in the documentation."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from fewstep import cli
from fewstep import run as runs
from fewstep.generator import Generator
from fewstep.model import DenoiserSpec, load_generator, save_generator
from fewstep.nets import DiTSpec
from fewstep.noise import Karras, RectifiedFlow
from fewstep.objectives import Batch, Nets
from fewstep.objectives.losses import dm_gradient
from fewstep.teachers import MixtureTeacher
from fewstep.tracking import read_stats

ROOT = Path(__file__).parent.parent
DOCS = [
    "docs/quickstart.md",
    "docs/concepts.md",
    "docs/extending.md",
    *(f"docs/methods/{m}.md" for m in ("dmd", "dmd2", "sid")),
]


def run_example(name, monkeypatch, *arguments):
    """Run an example's main in this process; returns its namespace."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "examples" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    module.main()
    return module


def numbers(text, pattern):
    return [float(number) for number in re.findall(pattern, text)]


@pytest.mark.slow
def test_mixture(monkeypatch, capsys, tmp_path):
    run_example("01_mixture.py", monkeypatch, "--images", 20_480, "--plot", tmp_path / "mixture.png")
    (before,), (after,) = (numbers(capsys.readouterr().out, rf"([\d.]+) {w}")[:1] for w in ("before",)) or [], [0.0]


@pytest.mark.slow
def test_your_own_method(monkeypatch, capsys, tmp_path):
    arguments = ("--images", 10_240, "--out", tmp_path / "run")
    run_example("02_your_own_method.py", monkeypatch, *arguments)
    before, after = numbers(capsys.readouterr().out, r"samples: ([\d.]+)")
    assert after < before / 5
    scores = [line for line in read_stats(tmp_path / "run" / "stats.jsonl") if line["kind"] == "evaluation"]
    assert [line["images"] for line in scores] == [0, 10_240]
    generator, _, _ = load_generator(tmp_path / "run" / "student.safetensors")
    assert generator.steps == 1

    run_example("02_your_own_method.py", monkeypatch, *arguments)  # goes on where it stopped: at the end
    assert numbers(capsys.readouterr().out, r"samples: ([\d.]+)") == [before, after]


@pytest.mark.slow
def test_your_own_teacher(monkeypatch, capsys, tmp_path):
    run_example("03_your_own_teacher.py", monkeypatch, "--images", 20_480, "--updates", 800, "--out", tmp_path / "run")
    many, one, student = numbers(capsys.readouterr().out, r"energy distance (-?[\d.]+)")
    assert many < one / 4, "the wrapped network is no denoiser of its data"
    assert student < one / 4
