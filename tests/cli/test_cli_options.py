"""Options of the command line: numbers that mean nothing and options given twice are refused before anything is loaded."""

import pytest

from fewstep.cli.main import main
from tests.support.console import unboxed

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
    assert f"{command[-1]}: must be a whole number of at least 1, got {value!r}" in unboxed(capsys.readouterr().err)
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
        (["sample", "digits", "--guidance", "inf"], "must be a number of at least 0"),
        (["sample", "digits", "--sedes", "3"], "Perhaps you meant: --seeds"),
        (["sample", "digits", "--no-columns"], "Unrecognized options: --no-columns"),
        (["export", "student", "--out", "o", "--dtype", "int8"], "'float16', 'bfloat16', 'float32'"),
        (["export", "student"], "--out FOLDER folder to write (required)"),
        (["eval"], "give one or more"),
        (["report", "--out", "page.html"], "give one or more"),
        (["distil", "digits/sid"], "Did you mean distill?"),
    ],
)
def test_options_that_make_no_sense(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and words in unboxed(capsys.readouterr().err)


def test_a_prompt_may_be_given_several_times(capsys):
    assert main(["sample", "digits", "--prompt", "a", "--prompt", "b"]) == 1
    assert "prompts must be left out" in capsys.readouterr().err
