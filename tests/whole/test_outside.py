"""A method, a teacher family, a network and a data set from outside the package, through the whole command line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from fewstep.cli.main import main
from fewstep.run.settings import load_run
from fewstep.system import outside
from fewstep.system.checkpoint import Checkpoints
from tests.support.console import unboxed
from tests.support.outside import DATA, DISTILL, METHOD, NETWORK, PRETRAIN, write
from tests.support.places import ROOT


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A folder with the code of a stranger, whose machine has run none of it so far; another one to work in."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    write(tmp_path / "mine")
    (tmp_path / "mine" / "distill.yaml").write_text(yaml.safe_dump(DISTILL))
    (tmp_path / "mine" / "pretrain.yaml").write_text(yaml.safe_dump(PRETRAIN))
    outside.forget()
    yield
    outside.forget()


@pytest.fixture
def ddpm(tmp_path):
    """The teacher's weights."""
    (module,) = [space for space in _spaces(tmp_path / "mine" / "my_teacher.py")]
    torch.save(module["EpsNet"](8).state_dict(), tmp_path / "work" / "ddpm.pt")
    outside.forget()


def _spaces(file):
    outside.use([str(file)], file.parent, "a test")
    return outside._namespaces.values()


def run(*arguments):
    several = ("--processes", "1") if arguments[0] in ("distill", "pretrain", "eval") else ()
    return main([*map(str, arguments), *several])


def images(folder):
    return Checkpoints.images_of(Checkpoints(folder / "checkpoints").latest())


def test_train_kill_resume_sample_eval_report_export_and_plan(tmp_path, ddpm, capsys):
    """One run, killed by SIGKILL in the midst and resumed, then everything that is done with a run folder."""
    recipe, folder = tmp_path / "mine" / "distill.yaml", tmp_path / "work" / "run"
    command = [sys.executable, "-m", "fewstep", "distill", str(recipe), "--out", "run", "--processes", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    longer = ["--train.images", "80000"]
    child = subprocess.Popen([*command, *longer], env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while Checkpoints(folder / "checkpoints").latest() is None and time.monotonic() < deadline:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    said = child.communicate()[1]
    assert child.returncode == -signal.SIGKILL
    for name in ("method", "teacher", "data"):
        file = tmp_path / "mine" / f"my_{name}.py"
        assert f"importing {file}, named by {recipe}" in said
        assert (folder / "imports" / file.name).read_bytes() == file.read_bytes(), "the run folder says what was run"
    killed = images(folder)
    assert 0 < killed < 80000

    end = killed + 64
    assert run("distill", recipe, "--out", "run", "--train.images", end) == 0
    assert images(folder) == end
    stored = yaml.safe_load((folder / "run.yaml").read_text())
    place, _, sha256 = stored["imports"][0].partition("#sha256=")
    assert place == str(tmp_path / "mine" / "my_method.py") and len(sha256) == 64
    assert stored["objective"]["power"] == 1.5 and stored["teacher"]["kind"] == "plain-ddpm"
    header = json.loads((folder / "student.json").read_text())["metadata"]
    assert header["denoiser"] is None and header["card"]["run"]["teacher"]["kind"] == "plain-ddpm"

    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    assert run("sample", folder, "--seeds", "0-7", "--out", "samples.npz") == 0
    assert (
        f"importing {tmp_path / 'mine' / 'my_teacher.py'}, named by {folder / 'student.json'}"
        in capsys.readouterr().err
    )
    assert run("eval", folder, "--samples", 16, "--extractor", "pixels", "--metrics", "fid", "--evaluations", 4) == 0
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["calls"] for row in rows] == [4, 1], "the teacher from outside is in the table"
    assert all(row["fid"] > 0 for row in rows)
    assert run("report", folder) == 0
    assert "diff-instruct" in (folder / "report.html").read_text()
    capsys.readouterr()
    assert run("export", folder, "--out", "exported") == 1
    assert "must be a text-to-image student to be exported" in capsys.readouterr().err
    os.chdir(tmp_path / "work")
    assert run("plan", recipe, "--processes", 1) == 0
    assert run("distill", folder, "--dry-run") == 0
    capsys.readouterr()


def test_a_resumed_run_equals_an_unbroken_one(tmp_path, ddpm):
    recipe = tmp_path / "mine" / "distill.yaml"
    assert run("distill", recipe, "--out", "whole", "--train.images", 32) == 0
    assert run("distill", recipe, "--out", "parts", "--train.images", 16) == 0
    assert run("distill", "parts", "--train.images", 32) == 0
    whole, parts = (json.loads((tmp_path / "work" / name / "student.json").read_text()) for name in ("whole", "parts"))
    assert whole["sha256"] == parts["sha256"]


def test_a_network_of_ones_own_is_trained_sampled_and_distilled(tmp_path, capsys):
    assert run("pretrain", tmp_path / "mine" / "pretrain.yaml", "--out", "teacher") == 0
    header = json.loads((tmp_path / "work" / "teacher" / "teacher.json").read_text())["metadata"]
    assert header["denoiser"]["net"] == {"kind": "tiny-conv", "num_classes": 0, "width": 6}
    assert run("sample", "teacher", "--seeds", "0-3", "--evaluations", 3) == 0
    native = DISTILL | {
        "imports": ["my_network.py"], "teacher": {"kind": "native", "path": "teacher"}, "generator": {"sigmas": [2.5]},
        "objective": {"method": "dmd2", "gan_weight": 0}, "data": None, "evaluation": {"samples": 0},
    }  # fmt: skip
    (tmp_path / "mine" / "native.yaml").write_text(yaml.safe_dump(native))
    assert run("distill", tmp_path / "mine" / "native.yaml", "--out", "run") == 0
    assert run("sample", "run", "--seeds", "0-3") == 0, "its file says what network it is"
    few = ("--samples", 16, "--extractor", "pixels", "--metrics", "fid", "--evaluations", 2)
    assert run("eval", "run", *few) == 0, "its teacher's file names the images"
    assert [row["calls"] for row in json.loads((tmp_path / "work" / "run" / "results.json").read_text())["rows"]] == [
        2,
        1,
    ]
    capsys.readouterr()
    assert run("plan", tmp_path / "mine" / "native.yaml", "--processes", 1) == 0


def test_help_and_overrides_and_errors_know_the_settings_from_outside(tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "mine" / "distill.yaml"
    with pytest.raises(SystemExit):
        run("distill", recipe, "--help")
    said = unboxed(capsys.readouterr().out)
    for line in (
        "--objective.power FLOAT How strongly noisy times count.",
        "--teacher.width INT Channels inside.",
        "--data.count INT Number of pictures.",
    ):
        assert line in said
    assert run("distill", recipe, "--dry-run", "--objective.power", "-1") == 1
    assert "objective.power: must be at least 0" in capsys.readouterr().err

    for block, key in (("objective", "powr"), ("teacher", "widht"), ("data", "cuont")):
        values = DISTILL | {block: DISTILL[block] | {key: 3}}
        recipe.write_text(yaml.safe_dump(values))
        assert run("distill", recipe) == 1
        said = capsys.readouterr().err
        assert f"{block}.{key}: unknown key (its value is 3); known keys: " in said
        assert {"objective": "power", "teacher": "width", "data": "count"}[block] in said.partition("known keys")[2]
        assert "student" not in said.partition("known keys")[2]

    recipe.write_text(yaml.safe_dump(DISTILL | {"objective": {"method": "diff-instrukt"}}))
    assert run("distill", recipe) == 1
    said = capsys.readouterr().err
    assert "objective: `method` must be one of " in said and " diff-instruct, dmd, dmd2," in said


def test_an_override_reaches_the_run(tmp_path, ddpm):
    recipe = tmp_path / "mine" / "distill.yaml"
    assert (
        run("distill", recipe, "--out", "run", "--train.images", 8, "--objective.power", "0.5", "--data.count", 40) == 0
    )
    stored = load_run(tmp_path / "work" / "run")
    assert stored.objective.power == 0.5 and stored.data.count == 40


def test_a_run_is_not_resumed_with_other_code(tmp_path, ddpm, capsys):
    recipe, method = tmp_path / "mine" / "distill.yaml", tmp_path / "mine" / "my_method.py"
    assert run("distill", recipe, "--out", "run", "--train.images", 16) == 0
    method.write_text(METHOD.replace("(2 - self.power)", "(3 - self.power)"))
    assert run("distill", recipe, "--out", "run", "--train.images", 24) == 1
    said = capsys.readouterr().err
    assert (
        "run holds a run with other settings (imports was [" in said
        and "the original code is kept in run/imports" in said
    )
    assert run("distill", "run", "--train.images", 24) == 1
    said = capsys.readouterr().err
    assert f"`imports` {method} has changed" in said and "--imports FILE" in said
    copies = ",".join(f"run/imports/my_{name}.py" for name in ("method", "teacher", "data"))
    assert run("distill", "run", "--train.images", 24, "--imports", copies) == 0, "the code of before, in another place"
    assert images(tmp_path / "work" / "run") == 24
    assert "work/run/imports/my_method.py" in load_run(tmp_path / "work" / "run").imports[0], "the next start finds it"
    assert run("distill", recipe, "--out", "other", "--train.images", 8) == 0, "changed code is another run"


def test_a_model_file_imports_only_code_that_was_run_here(tmp_path, ddpm, capsys, monkeypatch):
    assert run("distill", tmp_path / "mine" / "distill.yaml", "--out", "run", "--train.images", 8) == 0
    marker = tmp_path / "executed"
    student, teacher = tmp_path / "work" / "run", tmp_path / "mine" / "my_teacher.py"
    os.chdir(tmp_path)

    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "another-machine"))
    shutil.copy(teacher, tmp_path / "kept.py")
    teacher.write_text(teacher.read_text() + f"\nopen({str(marker)!r}, 'w').close()\n")
    capsys.readouterr()
    assert run("sample", student) == 1
    said = capsys.readouterr().err
    assert "student.json was made with" in said and f"{teacher} (has changed" in said and "--imports FILE" in said

    shutil.copy(tmp_path / "kept.py", teacher)
    assert run("sample", student) == 1
    assert "was never imported on this machine, so its code is not trusted" in capsys.readouterr().err
    shutil.move(teacher, tmp_path / "gone.py")
    assert run("sample", student) == 1
    assert f"{teacher} (does not exist)" in capsys.readouterr().err
    assert not marker.exists()

    assert run("sample", student, "--seeds", "0-3", "--imports", tmp_path / "gone.py") == 0
    assert f"importing {tmp_path / 'gone.py'}, named by --imports" in capsys.readouterr().err
    shutil.move(tmp_path / "gone.py", teacher)
    assert run("sample", student, "--seeds", "0-3") == 0, "now it was run here"


def test_data_that_only_an_evaluation_needs_are_named(tmp_path, capsys, monkeypatch):
    """A model of fewstep's own network, whose images are read by somebody's code."""
    values = PRETRAIN | {"imports": ["my_data.py"], "denoiser": {"net": {"kind": "unet", "size": 8, "num_classes": 0}}}
    (tmp_path / "mine" / "pretrain.yaml").write_text(yaml.safe_dump(values))
    assert run("pretrain", tmp_path / "mine" / "pretrain.yaml", "--out", "teacher", "--train.images", 8) == 0
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "another-machine"))
    assert run("sample", "teacher", "--seeds", "0-3", "--evaluations", 2) == 0, "no code is needed"
    capsys.readouterr()
    score = ("eval", "teacher", "--samples", 16, "--extractor", "pixels", "--metrics", "fid", "--evaluations", 2)
    assert run(*score) == 1
    said = capsys.readouterr().err
    assert "run.data: `kind` must be one of cifar10," in said
    assert f"{tmp_path / 'mine' / 'my_data.py'} (was never imported on this machine" in said
    assert run(*score, "--imports", tmp_path / "mine" / "my_data.py") == 0


def test_what_cannot_be_imported_is_named(tmp_path, capsys):
    recipe, extra = tmp_path / "mine" / "distill.yaml", tmp_path / "mine" / "extra.py"

    def refused(text, imports=("extra.py",)):
        extra.write_text(text)
        recipe.write_text(yaml.safe_dump(DISTILL | {"imports": [*DISTILL["imports"], *imports]}))
        assert run("distill", recipe) == 1
        return capsys.readouterr().err

    assert f"`imports` {extra} cannot be imported: No module named 'not_there'" in refused("import not_there")
    assert f"`imports` {extra} cannot be imported: invalid syntax" in refused("a b")
    assert f"`imports` {extra} cannot be imported: ZeroDivisionError: division by zero (line 2)" in refused("\n1 / 0")
    assert f"`imports` {tmp_path / 'mine' / 'none.py'} does not exist" in refused("", ["none.py"])
    assert "`imports` must name Python files or modules, got 'my method'" in refused("", ["my method"])
    assert "`imports` no_package.methods cannot be imported" in refused("", ["no_package.methods"])
    clash = METHOD.replace("diff-instruct", "sid")
    said = refused(clash)
    assert "`method: sid` must mean one class, got SiD in " in said and f"and DiffInstruct in {extra}" in said
    said = refused(METHOD.replace('"""Diff-Instruct', '"""Mine; Diff-Instruct'))
    assert "`method: diff-instruct` must mean one class" in said and str(extra) in said and "my_method.py" in said
    said = refused(DATA.replace("squares", "half").replace("def load", "def lode"))
    assert f"Squares in {extra} must define load, as DataSpec requires" in said
    (tmp_path / "mine" / "sub").mkdir()
    (tmp_path / "mine" / "sub" / "extra.py").write_text("")
    assert "`imports` must have different file names, got two extra.py" in refused("", ["extra.py", "sub/extra.py"])


def test_files_may_import_those_before_them(tmp_path, capsys):
    (tmp_path / "mine" / "more.py").write_text(
        "from my_network import TinyConvSpec\nclass Wider(TinyConvSpec):\n    kind: str = 'wider'\n"
    )
    recipe = tmp_path / "mine" / "pretrain.yaml"
    net = {"kind": "wider", "width": 9}
    recipe.write_text(
        yaml.safe_dump(PRETRAIN | {"imports": ["my_network.py", "more.py", "my_data.py"], "denoiser": {"net": net}})
    )
    assert load_run(recipe).denoiser.net.width == 9
    assert "my_network" not in sys.modules, "names of somebody's files shadow no module"


def test_installed_plugins_need_no_import(tmp_path, capfd):
    """An entry point of a package on Python's path, in a process of its own."""
    site = tmp_path / "site"
    (site / "tiny_plugin").mkdir(parents=True)
    (site / "tiny_plugin" / "__init__.py").write_text(NETWORK)
    (site / "tiny_plugin" / "data.py").write_text(DATA)
    about = site / "tiny_plugin-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-plugin\nVersion: 1.0\n")
    points = "[fewstep.plugins]\nnetworks = tiny_plugin\ndata = tiny_plugin.data:Squares\n"
    (about / "entry_points.txt").write_text(points)
    recipe = tmp_path / "mine" / "pretrain.yaml"
    recipe.write_text(yaml.safe_dump({name: value for name, value in PRETRAIN.items() if name != "imports"}))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{site}"}

    def fewstep(*arguments):
        call = subprocess.run(
            [sys.executable, "-m", "fewstep", *map(str, arguments)], env=environment, capture_output=True, text=True
        )
        return call.returncode, call.stdout + call.stderr

    code, said = fewstep("pretrain", recipe, "--out", "teacher", "--train.images", 8, "--processes", 1)
    assert code == 0, said
    code, said = fewstep("sample", "teacher", "--seeds", "0-3", "--evaluations", 2)
    assert code == 0, said

    (about / "entry_points.txt").write_text(points + "broken = tiny_plugin.nothing\n")
    code, said = fewstep("sample", "teacher")
    assert code == 1
    assert "the plugin broken (tiny_plugin.nothing) of tiny-plugin cannot be imported" in said
