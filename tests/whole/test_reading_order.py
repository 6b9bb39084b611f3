"""The README's tree is the package's, and its reading order from a recipe to a trained student stays short."""

import re

from tests.support.places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST = 4_500  # lines, comments and docstrings included


def test_the_tree_is_the_packages():
    named = re.findall(r"^  (\w+)/ ", README[README.index("```text\nfewstep/") :].split("```")[1], re.M)
    assert set(named) == {path.parent.name for path in (ROOT / "fewstep").glob("*/__init__.py")}


def test_the_reading_order_is_short():
    steps = README[README.index("read in this order") :].split("\n\n## ")[0]
    files = re.findall(r"\((fewstep/[\w/]+\.py)\)", steps)
    assert len(files) > 15 and len(set(files)) == len(files)
    lines = {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in files}
    assert sum(lines.values()) <= MOST, lines


LONG = {  # a module of more than 400 lines needs a reason
    "fewstep/system/checkpoint.py": "one format: what is written, read back, verified and pruned must agree",
    "fewstep/teachers/diffusers.py": "one record of settings with the methods that need most of them",
}


def test_modules_are_short():
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / "fewstep").rglob("*.py")
    }
    assert {file for file, count in lines.items() if count > 400} <= LONG.keys()
