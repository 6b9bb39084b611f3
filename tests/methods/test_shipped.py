"""The size of the methods: lines of each method's file, and lines of fewstep that importing it loads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fewstep.methods
from fewstep.methods import Objective, shipped

METHODS = {
    method.__module__: Path(sys.modules[method.__module__].__file__)
    for method in (getattr(shipped, name) for name in shipped.__all__)
    if issubclass(method, Objective)
}

LOADED = """
import importlib, json, sys
importlib.import_module(sys.argv[1])
print(json.dumps({name: m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "fewstep"}))
"""


def lines(path) -> int:
    """Lines of a file, blank ones and comments counted."""
    return len(Path(path).read_text().splitlines())


@pytest.mark.parametrize("module", METHODS)
def test_a_method_is_at_most_eighty_lines(module):
    assert lines(METHODS[module]) <= 80


@pytest.mark.parametrize("module", METHODS)
def test_a_method_imports_at_most_1200_lines_of_fewstep(module):
    """In a fresh interpreter; all modules of fewstep that are loaded count, packages and the method's own too."""
    run = subprocess.run([sys.executable, "-c", LOADED, module], capture_output=True, text=True, check=True)
    loaded = {name: lines(path) for name, path in json.loads(run.stdout).items()}
    assert module in loaded and "fewstep.diffusion.denoiser" in loaded
    assert sum(loaded.values()) <= 1200, loaded


def test_the_package_names_each_method():
    for name in fewstep.methods.__all__:
        assert getattr(fewstep.methods, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Unknown'"):
        _ = fewstep.methods.Unknown
