"""Settings from the command line: applied to a run, checked as a whole in the words of a run file's errors."""

import functools
from pathlib import Path

import pytest

from fewstep.run.overriding import override
from fewstep.run.recipes import list_recipes
from fewstep.run.settings import load_run, validated
from fewstep.system.errors import SettingsError


@pytest.mark.parametrize("recipe", list_recipes())
def test_a_setting_changes_nothing_else(recipe):
    run = load_run(recipe)
    changed = override(run, ["--train.seed", "17"])
    assert changed == run.model_copy(update={"train": run.train.model_copy(update={"seed": 17})})
    assert changed.model_dump(mode="json")["train"]["seed"] == 17


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--train.images 0", "command line:\n  train.images: must be above 0, got 0"),
        ("--train.micro-batch 7", "command line:\n  train: `batch_size` must be a multiple of micro_batch 7, got 64"),
        ("--objective.alpha inf", "command line:\n  objective.alpha: must be a finite number, got inf"),
        (f"--train.seed {2**70}", "command line:\n  train.seed: must be below 9223372036854775808"),
        (
            f"--train.batch-size {2**70}",
            "command line:\n  train.batch_size: must be at most 1048576",
        ),
        ("--optim.critic.betas 0 2", "command line:\n  optim.critic.betas.1: must be below 1, got 2.0"),
        ("--generator.sigmas 1 10", "command line:\n  generator: sigmas must hold a level for each call and fall"),
        ("--generator.sigmas None", "command line:\n  generator: one of sigmas"),
        (
            "--train.images -1 --evaluation.samples -1 --objective.augment 2",
            "command line:\n  objective.augment: must be at most 1, got 2.0. Try: 0.0, the default\n"
            "  train.images: must be above 0, got -1\n  evaluation.samples: must be at least 0, got -1. Try: 5000, the default",
        ),
    ],
)
def test_what_does_not_fit_is_said_as_for_a_file(arguments, message):
    with pytest.raises(SettingsError) as error:
        override(load_run("digits/sid"), arguments.split())
    assert str(error.value).startswith(message)


def test_a_mixture_has_positive_widths():
    with pytest.raises(SettingsError, match=r"teacher.stds.0: must be above 0, got -0.1"):
        validated(
            {"kind": "distill", "teacher": {"kind": "mixture", "stds": [-0.1] * 8}, "train": {"images": 1}},
            Path("a.yaml"),
        )


def test_settings_that_exclude_each_other():
    arguments = "--objective.share-forward --objective.gan-weight 0.1 --objective.gan-noise.high 0.5"
    with pytest.raises(SettingsError, match=r"^command line:\n  objective: `share_forward` must have equal gan_noise"):
        override(load_run("fashion-mnist/dmd2"), arguments.split())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--objective.alhpa 1", "objective.alhpa: unknown key. Did you mean objective.alpha?"),
        ("--optim.generator.learning-rate=1", "optim.generator.learning_rate: unknown key."),
        ("--train.images many", "train.images: must be a whole number, got 'many'"),
        ("--train.images 1.5", "train.images: must be a whole number, got '1.5'"),
        ("--optim.critic.betas 0 x", "optim.critic.betas.1: must be a number, got 'x'"),
        (
            "--train.precision fp8",
            "train.precision: must be one of 'auto', 'bf16', 'fp32' or 'tf32', got 'fp8'. Try: auto, the default",
        ),
        ("stray", "stray: must belong to a setting. Try: --SETTING stray"),
        ("--flip yes", "yes: must belong to a setting. Try: --flip takes no value: leave it out"),
    ],
)
def test_a_setting_that_cannot_be_read_is_named(arguments, line):
    with pytest.raises(SettingsError) as error:
        override(load_run("digits/sid"), arguments.split())
    assert str(error.value).splitlines()[1].startswith(f"  {line}") and str(error.value).count("\n") == 1


@pytest.mark.parametrize(
    ("where", "value"),
    [("train.images", "many"), ("train.images", 0), ("objective.augment", 2.5), ("train.precision", "fp8"),
     ("optim.critic.betas.1", "x"), ("evaluation.metrics.0", "kkid"), ("objective.alpha", float("nan"))],
)  # fmt: skip
def test_a_file_and_the_command_line_say_the_same(where, value):
    run, words = load_run("digits/sid"), [str(value)]
    record = run.model_dump(mode="json")
    *path, last = where.split(".")
    place = functools.reduce(lambda found, part: found[part], path, record)
    place[int(last) if last.isdigit() else last] = value
    if last.isdigit():
        words, where = list(map(str, place)), ".".join(path)
    with pytest.raises(SettingsError) as of_file:
        validated(record, Path("a.yaml"))
    with pytest.raises(SettingsError) as of_line:
        override(run, [f"--{where.replace('_', '-')}", *words])
    assert str(of_file.value).splitlines()[1:] == str(of_line.value).splitlines()[1:]


def test_an_unknown_key_of_a_file_has_a_neighbour():
    record = load_run("digits/sid").model_dump(mode="json")
    record["train"]["imags"] = 5
    with pytest.raises(SettingsError, match=r"train.imags: unknown key \(its value is 5\); .*\. Did you mean images\?"):
        validated(record, Path("a.yaml"))


@pytest.mark.parametrize("word", ["null", "None"])
def test_null_is_typed_as_the_help_calls_it(word, capsys):
    given = ["--train.evaluate-every", word, "--teacher.lora", word, "--teacher.resolution", word]
    run = override(load_run("sdxl/lora-24gb"), given)
    assert (run.train.evaluate_every, run.teacher.lora, run.teacher.resolution) == (None, None, None)
    with pytest.raises(SystemExit):
        override(run, ["--help"])
    said = capsys.readouterr().out
    assert "--train.evaluate-every null|INT" in said and "(default: null)" in said and "None" not in said
