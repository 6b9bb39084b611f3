"""Small things that people expect of a command: version, help, JSON for other programs, suggestions, a look at the machine."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
import torch

from fewstep import __version__
from fewstep.cli.main import main
from fewstep.cli.tools import EXTRAS
from fewstep.run.recipes import list_recipes, summary


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"fewstep {__version__}\n"


def test_a_bare_command_shows_the_help():
    done = subprocess.run([sys.executable, "-m", "fewstep"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: fewstep COMMAND") and not done.stderr


def test_a_recipe_that_is_misspelt(capsys):
    assert main(["recipes", "digits/sidd"]) == 1
    assert "Did you mean digits/sid?" in capsys.readouterr().err


def test_recipes_are_grouped_with_what_was_measured(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "digits" in lines and "fashion-mnist" in lines
    at = next(number for number, line in enumerate(lines) if line.strip().startswith("fashion-mnist/dmd2-4step "))
    assert lines[at + 1].strip().startswith("FID 8.84 (50,000 samples)")
    assert lines[at + 2].strip() == "120,000 images; 18 minutes on 2 cores of an AMD EPYC with other work running"
    assert main(["recipes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == list_recipes().keys()
    assert found["imagenet-64/dmd2"]["result"] == "not yet run" and found["digits/sid"]["about"].startswith(
        "SiD on the"
    )


def test_every_recipe_says_its_length_and_a_large_one_its_hardware():
    found = {name: summary(path) for name, path in list_recipes().items()}
    assert all(known["images"].endswith(" images") for known in found.values())
    large = [
        name
        for name in found
        if name.split("/")[0] not in ("digits", "mixture", "own", "fashion-mnist", "fashion-mnist-16")
    ]
    assert len(large) > 40 and all(found[name]["hardware"] for name in large)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_knows_commands_and_options(shell, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["completion", shell])
    script = capsys.readouterr().out
    assert not stopped.value.code and all(
        word in script for word in ("distill", "tune-sampler", "dry-run", "evaluations")
    )


def test_bash_completes(tmp_path):
    script = subprocess.run(
        [sys.executable, "-m", "fewstep", "completion", "bash"], capture_output=True, text=True
    ).stdout
    (tmp_path / "script").write_text(script)
    typed = """
        source "$0"; call=$(complete -p fewstep | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        for line in 'fewstep dist' 'fewstep sample --se'; do
            COMP_WORDS=($line); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=(); $call; echo "${COMPREPLY[@]}"
        done
    """
    done = subprocess.run(["bash", "-c", typed, tmp_path / "script"], capture_output=True, text=True)
    assert done.stdout.split() == ["distill", "--seeds"], done.stderr


@pytest.mark.slow
def test_json_is_pure_and_libraries_are_silent():
    """In a process of its own: libraries speak as they are imported."""
    done = subprocess.run(
        [sys.executable, "-m", "fewstep", "plan", "sd15/dmd2-no-gan", "--json"], capture_output=True, text=True
    )
    assert json.loads(done.stdout)["memory"] > 0 and not done.stderr


def test_json_of_plan_bench_and_eval(capsys):
    assert main(["plan", "digits/sid", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["memory"] == sum(part["size"] for part in plan["parts"]) and plan["gpus"]["A100"]["fits"] is True
    assert main(["bench", "mixture/sid", "--processes", "1", "--cycles", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images_per_second"] > 0
    assert main(["eval", "digits", "--evaluations", "1", "--samples", "100", "--processes", "1", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["calls"] == 1 and row["fid"] > 0


def test_the_doctor_knows_every_extra():
    extras = importlib.metadata.metadata("fewstep").get_all("Provides-Extra")
    assert set(extras) - {"dev", "docs"} == EXTRAS.keys()


def test_the_doctor_names_versions_devices_and_what_is_missing(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and "disk here" in text and all(f"extra {extra}" in text for extra in EXTRAS)
    monkeypatch.setattr("fewstep.cli.tools._installed", lambda name: name != "lmdb")
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["extra lmdb"] == "missing lmdb for DMD2's image databases: pip install 'fewstep[lmdb]'"
    assert found["extra digits"] == "installed"
