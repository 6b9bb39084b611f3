"""Options of the command line: numbers that mean nothing and options given twice are refused before anything is loaded."""

import pytest

from fewstep.cli.main import main

NUMBERS = [
    ("pairs", "digits/sid", "--out", "p", "--count"),
    ("pairs", "digits/sid", "--out", "p", "--evaluations"),
    ("prepare", "sdxl/dmd2-4step", "--out", "p", "--batch"),
    ("bench", "digits/sid", "--cycles"),
    ("demo", "--samples"),
    ("demo", "--images"),
    ("ui", "student", "--port"),
    ("import", "file.pkl", "--out", "o", "--timesteps"),
]


@pytest.mark.parametrize("value", ["0", "-1", "", "1.5", "many", "²"])
@pytest.mark.parametrize("command", NUMBERS, ids=lambda command: f"{command[0]}{command[-1]}")
def test_whole_numbers_of_at_least_one(command, value, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([*command[:-1], f"{command[-1]}={value}"])
    assert f"{command[-1]}: must be a whole number of at least 1, got" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("processes", ["0", "-2", "two", "²", ""])
@pytest.mark.parametrize("command", [("distill", "digits/sid"), ("plan", "digits/sid"), ("demo",)], ids=lambda c: c[0])
def test_processes(command, processes, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*command, f"--processes={processes}"]) == 1
    assert "--processes must be a number of at least 1, or auto" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ui", "student", "--port", "70000"], "must be 1 to 65535"),
        (["export", "student", "--out", "o", "--formats", ""], "must be names separated by commas, each once"),
        (
            ["export", "student", "--out", "o", "--formats", "lora,,unet"],
            "must be names separated by commas, each once",
        ),
        (["export", "student", "--out", "o", "--formats", "lora,lora"], "must be names separated by commas, each once"),
        (["import", "a.pkl", "--out", "o", "--sigma-init", "0"], "must be a number above 0"),
        (["import", "a.pkl", "--out", "o", "--sigma-init", "nan"], "must be a number above 0"),
        (["pairs", "digits/sid", "--out", "p", "--count", "5", "--count", "7"], "--count is given twice"),
        (["distill", "digits/sid", "--train.images", "8", "--train.images=9"], "--train.images is given twice"),
        (
            ["distill", "digits/sid", "--train.batch-size", "8", "--train.batch_size", "9"],
            "--train.batch_size is given twice",
        ),
        (["distill", "digits/sid", "--flip", "--no-flip"], "--no-flip is given twice"),
    ],
)
def test_options_that_make_no_sense(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(arguments)
    assert words in capsys.readouterr().err


def test_a_prompt_may_be_given_several_times(capsys):
    assert main(["sample", "digits", "--prompt", "a", "--prompt", "b"]) == 1
    assert "takes no prompts" in capsys.readouterr().err
