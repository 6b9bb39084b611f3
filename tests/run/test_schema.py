"""The JSON schema of run files: it is current, every recipe names it and fits it, and it finds what an editor should mark."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from fewstep.cli.main import main
from fewstep.run.recipes import list_recipes
from fewstep.run.schema import LINE, run_schema
from fewstep.system import outside
from tests.support.places import ROOT


@pytest.fixture(autouse=True)
def ours():
    """No class that another test brought from outside."""
    outside.forget()


@pytest.fixture(scope="module")
def validator():
    return jsonschema.Draft202012Validator(run_schema())


def test_the_shipped_schema_is_current():
    """If not: fewstep schema --out recipes/run.schema.json"""
    assert json.loads((ROOT / "recipes" / "run.schema.json").read_text(encoding="utf-8")) == run_schema()


@pytest.mark.parametrize("name", list_recipes())
def test_recipes_name_it_and_fit(validator, name):
    file = list_recipes()[name]
    text = file.read_text(encoding="utf-8")
    line = text.partition("\n")[0]
    assert line.startswith(LINE)
    assert (file.parent / line.removeprefix(LINE)).resolve() == (ROOT / "recipes" / "run.schema.json").resolve()
    assert not list(validator.iter_errors(yaml.safe_load(text)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"train": {"images": -1}},
        {"train": {"imagse": 100}},
        {"objective": {"method": "sdi"}},
        {"objective": {"method": "sid", "alpha": "one"}},
        {"teacher": {"kind": "nativ"}},
        {"no_such_part": 1},
    ],
    ids=str,
)
def test_it_finds_what_an_editor_should_mark(validator, wrong):
    run = yaml.safe_load(list_recipes()["digits/sid"].read_text(encoding="utf-8"))
    assert list(validator.iter_errors({**run, **{key: value if not isinstance(value, dict) or "method" in value or "kind" in value
                                                 else {**run[key], **value} for key, value in wrong.items()}}))  # fmt: skip


def test_the_command_writes_it(tmp_path, capsys):
    assert main(["schema", "--out", str(tmp_path / "run.schema.json")]) == 0
    assert json.loads((tmp_path / "run.schema.json").read_text(encoding="utf-8")) == run_schema()
    capsys.readouterr()
    assert main(["recipes", "digits/sid"]) == 0
    named = capsys.readouterr().out.partition("\n")[0].removeprefix(LINE)
    assert json.loads(Path(named).read_text(encoding="utf-8")) == run_schema()  # a copy of a recipe finds it too
