"""Find run files: a path, a run folder, or the name of a shipped recipe. Imports no torch."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from fewstep.system.errors import SettingsError

__all__ = ["find_recipe", "list_recipes", "schema_line", "summary"]


def _recipe_folders() -> Sequence[Path]:
    package = Path(str(resources.files("fewstep")))
    return [folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir()]


def list_recipes() -> dict[str, Path]:
    """Shipped recipes: name ("fashion-mnist/sid") -> file."""
    return {
        str(path.relative_to(folder).with_suffix("")): path
        for folder in _recipe_folders()
        for path in sorted(folder.rglob("*.yaml"))
    }


def find_recipe(path: Path | str) -> Path:
    """Find a run file: a path, a run folder's `run.yaml`, or a shipped recipe with or without `recipes/` and `.yaml`.

    Raises:
        SettingsError: nothing has that name.
    """
    file = Path(path)
    if file.is_dir() and (file / "run.yaml").exists():
        return file / "run.yaml"
    if file.is_file():
        return file
    name = str(path).removeprefix("recipes/").removesuffix(".yaml")
    recipes = list_recipes()
    if name in recipes:
        return recipes[name]
    near = difflib.get_close_matches(name, recipes, 1, 0.7)
    raise SettingsError(
        f"RUN must be a run file or a shipped recipe, got {path} (looked in {Path.cwd()}). "
        f"{f'Did you mean {near[0]}? ' if near else ''}Recipes: {', '.join(recipes) or 'none'}"
    )


def schema_line() -> str:
    """First line of a run file, by which editors complete and check it; empty if the schema is not installed."""
    found = (folder / "run.schema.json" for folder in _recipe_folders())
    return next((f"# yaml-language-server: $schema={path}\n" for path in found if path.is_file()), "")


def summary(file: Path) -> dict[str, str]:
    """Describe a recipe by the comment at its head and its length.

    Returns:
        `about`, the first sentence; `result`, what was measured with it: "not yet run" if the comment says so, empty if it says
        nothing; `images`, its length; `hardware`, the planned one or that of the measured run, empty if it says nothing.
    """
    text = file.read_text(encoding="utf-8")
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    words = [line.removeprefix("#").strip() for line in lines if not line.startswith("# yaml-language-server")]
    about = re.split(r"(?<=[.]) ", " ".join(words))[0]
    found = next((line for line in words if line.startswith("Result:")), "")
    result = re.split(r"[;.](?= |$)", found.removeprefix("Result:").strip())[0]
    unrun = "not yet run" if "not yet run" in " ".join(words).lower() else ""
    length = re.search(r"^train:.*?\bimages: *([\d_]+)", text, re.DOTALL | re.MULTILINE)
    planned = next((line for line in words if line.startswith("Hardware:")), "").removeprefix("Hardware:")
    ran = re.search(r"([\d.]+ (?:minutes|min|h) on [^.;,]*)", " ".join(words))
    hardware = re.split(r" \(fewstep plan\)|[;.](?= |$)", planned.strip())[0] or (ran[1] if ran else "")
    images = f"{int(length[1]):,} images" if length else ""
    return {"about": about, "result": result or unrun, "images": images, "hardware": hardware}


def run_name(recipe: str) -> str:
    """Name of a recipe's run folder: `fashion-mnist/sid` -> `fashion-mnist-sid`."""
    file = find_recipe(recipe)
    if file.name == "run.yaml":
        return file.parent.name
    return "-".join(part for part in (file.parent.name, file.stem) if part and part != "recipes")


def run_place(recipe: str) -> Path:
    """Run folder of a command without `--out`: `runs/NAME`, or the given run folder itself."""
    folder = Path(recipe)
    return folder if (folder / "checkpoints").is_dir() else Path("runs") / run_name(recipe)
