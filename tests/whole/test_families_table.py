"""The table of families in docs/text_to_image.md against the tests: no cell claims what no test does."""

import importlib
import inspect
import re

import pytest

pytest.importorskip("diffusers")

from fewstep.networks import FAMILIES
from tests.support import families
from tests.support.places import ROOT

SECTION = (ROOT / "docs" / "text_to_image.md").read_text(encoding="utf-8").split("\n## Families\n")[1].split("\n## ")[0]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in SECTION.splitlines() if line.startswith("| ")]
HEAD, *TABLE = ROWS
TESTS = dict(re.findall(r"^- (\w):\s+`tests/(\S+)`$", SECTION, re.MULTILINE))
FIRST = {  # of tests/support/pipelines.py: the network's class
    "sd15": "UNet2DConditionModel", "sdxl": "UNet2DConditionModel", "sd3": "SD3Transformer2DModel",
    "sd35": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel", "sana": "SanaTransformer2DModel",
    "pixart": "PixArtTransformer2DModel",
}  # fmt: skip


def parameters(test):
    """Every text among the values of a test's parameters; of a recipe, its folder."""
    values = [value for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize" for value in mark.args[1]]
    found = set()
    while values:
        value = values.pop()
        if isinstance(value, str):
            found.add(value.split("/")[0])
        else:
            values += value if isinstance(value, tuple) else ()
    return found


def text_of(module, test):
    """The source of a test and of its module's fixtures that it takes, with theirs."""
    taken = [getattr(module, name, None) for name in inspect.signature(test).parameters]
    taken = [inspect.unwrap(fixture) for fixture in taken if fixture is not None]
    return inspect.getsource(test) + "".join(text_of(module, fixture) for fixture in taken)


def covers(place, key):
    """Whether a test has a family among its parameters, or makes its pipeline in its text or fixtures."""
    file, _, name = place.partition("::")
    module = importlib.import_module("tests." + file.removesuffix(".py").replace("/", "."))
    test = getattr(module, name)
    found = parameters(test)
    if found & {*FIRST, *families.NAMES}:
        return key in found
    text = text_of(module, test)
    listed = [getattr(module, constant) for constant in re.findall(r"params=([A-Z]+)", text)]
    return any(key in values for values in listed) or re.search(rf"\b(tiny_)?{key}\b", text) is not None


def test_every_family_with_prompts_has_a_row():
    keys = [row[1].strip("`") for row in TABLE]
    assert keys == [*FIRST, *families.NAMES]
    made = {FIRST.get(key) or type(families.parts(key)[1]["transformer"]).__name__ for key in keys}
    assert made == {model for model, family in FAMILIES.items() if family.encode is not None}


@pytest.mark.parametrize("row", TABLE, ids=[row[1].strip("`") for row in TABLE])
def test_each_cell_is_what_a_test_does(row):
    key, cells = row[1].strip("`"), row[2:]
    assert len(row) == len(HEAD)
    for column, cell in zip(HEAD[2:], cells, strict=True):
        letters = re.fullmatch(r"(?:no: )?(\w(?: \w)*)", cell)
        assert letters, (column, cell)
        for letter in letters[1].split():
            assert covers(TESTS[letter], key), (column, TESTS[letter])


def test_every_test_of_the_list_is_in_a_cell():
    used = set(re.findall(r"\b\w\b", " ".join(cell.removeprefix("no:") for row in TABLE for cell in row[2:])))
    assert used == TESTS.keys()
