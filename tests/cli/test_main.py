"""The command as a whole: what it finds, what it prints as help, and that help needs no torch."""

import inspect
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from fewstep.cli.main import COMMANDS, main, parse
from fewstep.run.recipes import list_recipes
from fewstep.system.pictures import save_grid
from fewstep.system.tracking import Tracker
from tests.support.console import unboxed

LIGHT = """
import json, sys, time
from fewstep.cli.main import main
for arguments in json.loads(sys.argv[1]):
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 0, (arguments, code)
    assert "torch" not in sys.modules, arguments
print(time.process_time(), file=sys.stderr)
"""


def seconds(*lines: list[str]) -> float:
    """Processor time of commands in a fresh process, in which none may import torch."""
    done = subprocess.run([sys.executable, "-c", LIGHT, json.dumps(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stderr.split()[-1])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_torch_and_no_second(name):
    assert seconds([name, "--help"]) < 1


def test_recipes_need_no_torch():
    assert seconds(["--help"], ["recipes"], ["recipes", "digits/sid"]) < 1


@pytest.mark.parametrize("arguments", [["recipes"], ["--help"], ["distill", "--help"]], ids=" ".join)
def test_a_reader_may_close_the_pipe(arguments):
    """As `fewstep recipes | head` does: no message, and the exit code that shells give such a program."""
    command = [
        sys.executable,
        "-c",
        "import sys; sys.stdin.read(); from fewstep.cli.main import main; sys.exit(main())",
    ]
    process = subprocess.Popen([*command, *arguments], stdin=-1, stdout=-1, stderr=-1)
    process.stdout.close()  # before it writes anything
    process.stdin.close()
    assert process.wait() == 141 and not process.stderr.read()


def test_a_report_needs_no_torch(tmp_path):
    (tmp_path / "run.yaml").write_text("kind: distill\ntrain: {images: 100}\n")
    with Tracker(tmp_path) as tracker:
        for images in (50, 100):
            tracker.log(images, {"x_mean": 0.1, "x_spread": 0.5})
            tracker.log(images, {"fid": 12.5, "protocol": "pixels"}, "evaluation")
    save_grid(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), tmp_path / "pictures" / "student-000000000100.png", 2)
    assert seconds(["report", str(tmp_path)]) > 0
    page = (tmp_path / "report.html").read_text()
    assert "12.5" in page and "<svg " in page and "data:image/png" in page


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_option(name, capsys):
    try:
        assert main([name, "--help"]) == 0
    except SystemExit as stop:
        assert stop.code == 0
    text = unboxed(capsys.readouterr().out)
    assert inspect.getdoc(COMMANDS[name]).partition("\n")[0] in text
    hidden = {"settings", "line"}
    for option, parameter in inspect.signature(COMMANDS[name]).parameters.items():
        word = option.replace("_", "-")
        shown = f"--{word} " in text or "Positional" in str(parameter.annotation) or option in ("recipe", "student")
        assert shown != (option in hidden), option
    assert "None" not in text and "(default: )" not in text


def test_the_commands_are_listed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    text = unboxed(capsys.readouterr().out)
    assert stopped.value.code == 0
    for name, command in COMMANDS.items():
        assert f"{name} {inspect.getdoc(command).partition(chr(10))[0]}" in text


def test_help_of_a_recipe_lists_options_and_settings(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "digits/sid", "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "--cycles N" in text and "--objective.alpha FLOAT" in text
    assert main(["plan", "-h"]) == 0
    text = capsys.readouterr().out
    assert all(recipe in text for recipe in list_recipes())


def test_words_become_typed_values():
    call = parse(
        [
            "eval",
            "runs/a",
            "runs/b",
            "--evaluations",
            "35,18",
            "--metrics",
            "fid,isc",
            "--churn",
            "40,0.05,50,1.003",
            "--out",
            "x.json",
        ]
    )
    assert isinstance(call, partial) and call.func is COMMANDS["eval"]
    given = call.keywords
    assert (
        given["models"] == ("runs/a", "runs/b") and given["evaluations"] == [35, 18] and given["out"] == Path("x.json")
    )
    assert given["metrics"] == ["fid", "isc"] and (given["churn"].amount, given["churn"].inflate) == (40, 1.003)
    assert given["samples"] is None and given["line"][:3] == ("eval", "runs/a", "runs/b")
    assert parse(["eval", "a", "--evaluations", "0", "--metrics", ""]).keywords["evaluations"] == []
    given = parse(["sample", "m", "--prompt", "a cat", "--classes=a,b", "--prompt", "-1"]).keywords
    assert given["prompt"] == ["a cat", "-1"] and given["classes"] == "a,b" and given["seeds"] == "0-63"
    assert parse(["import", "f.pkl", "--out", "o", "--timesteps", "999, 749"]).keywords["timesteps"] == [999, 749]
    assert parse(["prepare", "r", "--caption_column", "None"]).keywords["caption_column"] == "None"


def test_further_arguments_are_settings_of_the_run():
    words = "digits/sid --generator.sigmas 10 1.0 --out o --objective.alpha -3 --flip --dry-run"
    given = parse(["distill", *words.split()]).keywords
    assert given["recipe"] == "digits/sid" and given["out"] == Path("o") and given["dry_run"]
    assert given["settings"] == ("--generator.sigmas", "10", "1.0", "--objective.alpha", "-3", "--flip")


def test_the_recipe_comes_first(capsys):
    assert main(["distill", "--train.images", "64", "digits/sid"]) == 1
    assert "RECIPE must be given" in capsys.readouterr().err
