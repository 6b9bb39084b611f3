"""Settings from the command line: applied to a run, checked as a whole in the words of a run file's errors."""

import re
from pathlib import Path

import pytest

from fewstep.run.recipes import list_recipes
from fewstep.run.settings import load_run, override, validated
from fewstep.system.errors import SettingsError
from tests.support.console import unboxed


@pytest.mark.parametrize("recipe", list_recipes())
def test_a_setting_changes_nothing_else(recipe):
    run = load_run(recipe)
    changed = override(run, ["--train.seed", "17"])
    assert changed == run.model_copy(update={"train": run.train.model_copy(update={"seed": 17})})
    assert changed.model_dump(mode="json")["train"]["seed"] == 17


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--train.images 0", "command line:\n  train.images: Input should be greater than 0 (it is 0)"),
        ("--train.micro-batch 7", "command line:\n  train: `batch_size` must be a multiple of micro_batch 7, got 64"),
        ("--objective.alpha inf", "command line:\n  objective.alpha: must be a finite number, got inf"),
        (f"--train.seed {2**70}", "command line:\n  train.seed: Input should be less than 9223372036854775808"),
        (
            f"--train.batch-size {2**70}",
            "command line:\n  train.batch_size: Input should be less than or equal to 1048576",
        ),
        ("--optim.critic.betas 0 2", "command line:\n  optim.critic.betas.1: Input should be less than 1 (it is 2.0)"),
        ("--generator.sigmas 1 10", "command line:\n  generator: sigmas must hold a level for each call and fall"),
        ("--generator.sigmas None", "command line:\n  generator: one of sigmas"),
        (
            "--train.images -1 --evaluation.samples -1 --objective.augment 2",
            "command line:\n  objective.augment: Input should be less than or equal to 1 (it is 2.0)\n"
            "  train.images: Input should be greater than 0 (it is -1)\n  evaluation.samples: Input should be greater",
        ),
    ],
)
def test_what_does_not_fit_is_said_as_for_a_file(arguments, message):
    with pytest.raises(SettingsError) as error:
        override(load_run("digits/sid"), arguments.split())
    assert str(error.value).startswith(message)


def test_a_mixture_has_positive_widths():
    with pytest.raises(SettingsError, match=r"teacher.stds.0: Input should be greater than 0 \(it is -0.1\)"):
        validated(
            {"kind": "distill", "teacher": {"kind": "mixture", "stds": [-0.1] * 8}, "train": {"images": 1}},
            Path("a.yaml"),
        )


def test_settings_that_exclude_each_other():
    arguments = "--objective.share-forward --objective.gan-weight 0.1 --objective.gan-noise.high 0.5"
    with pytest.raises(SettingsError, match=r"^command line:\n  objective: `share_forward` must have equal gan_noise"):
        override(load_run("fashion-mnist/dmd2"), arguments.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "--objective.alhpa 1",
            "Unrecognized options: --objective.alhpa, 1 .*Perhaps you meant: --objective.alpha FLOAT",
        ),
        (
            "--train.images many",
            "Error parsing --train.images: .*'many' Argument helptext: --train.images INT",
        ),
        ("--train.precision fp8", "invalid choice 'fp8' for argument '--train.precision'. Expected one of .*'bf16'"),
        ("stray", "Unrecognized options: stray"),
    ],
)
def test_a_setting_that_cannot_be_read_is_named(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        override(load_run("digits/sid"), arguments.split())
    text = unboxed(capsys.readouterr().err)
    assert stopped.value.code == 2 and re.search(words, text), text


@pytest.mark.parametrize("word", ["null", "None"])
def test_null_is_typed_as_the_help_calls_it(word, capsys):
    given = ["--train.evaluate-every", word, "--teacher.lora", word, "--teacher.resolution", word]
    run = override(load_run("sdxl/lora-24gb"), given)
    assert (run.train.evaluate_every, run.teacher.lora, run.teacher.resolution) == (None, None, None)
    with pytest.raises(SystemExit):
        override(run, ["--help"])
    said = capsys.readouterr().out
    assert "--train.evaluate-every null|INT" in said and "(default: null)" in said and "None" not in said
