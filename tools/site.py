"""Hooks of the documentation site (mkdocs.yml): reference pages, pages of linked sources, formulas as MathML.

    make docs       builds the site into site/, strictly: a broken link or a missing page is an error

* A page of the reference for each room of the package, made from its docstrings by mkdocstrings.
* Pages link to files beyond docs/ as they do on a forge. Here each such file becomes a page of its own.
* Formulas are drawn by the browser itself, without a script from elsewhere.
"""

from __future__ import annotations

import ast
import html
import json
import posixpath
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latex2mathml.converter import convert

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # mkdocs imports a hook by its path alone
from tools.check_markdown import CODE, LINK  # noqa: E402

LANGUAGES = {
    ".py": "python",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".toml": "toml",
    ".sh": "sh",
    ".json": "json",
}
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
BAR = re.compile(r"<mo[^>]*>(?:\||&#x0007C;|&#x7C;|∣|&#x02223;)</mo>")
BLOCK = re.compile(rf"^(?P<fence>```+|~~~+).*?^(?P=fence)|{CODE}", re.DOTALL | re.MULTILINE)
# rooms of the package in reading order, with what stands in them
ROOMS = {
    "library": "The library: load, sample, distill, evaluate",
    "diffusion": "Noise, denoisers, generators, solvers",
    "methods": "Methods: one paper a file",
    "training": "The training loop",
    "run": "Runs, recipes, run folders",
    "teachers": "Teachers",
    "networks": "Networks",
    "data": "Images, captions, pairs",
    "students": "Students and exports",
    "evaluation": "Features and metrics",
    "report": "Reports and the web page",
    "costs": "Plans and benchmarks",
    "formats": "Files of fewstep and of others",
    "system": "Files, devices, processes",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the reference and of every linked source."""
    from mkdocs.structure.files import File, InclusionLevel

    reference: list[Any] = []
    for room, title in ROOMS.items():
        place = f"reference/{room}.md"
        files.append(File.generated(config, place, content=_reference(room, title)))
        reference.append({title: place})
    for entry in config.nav or []:
        if isinstance(entry, dict) and "Reference" in entry:
            entry["Reference"] = [*entry["Reference"], *reference]
    wanted = {
        target
        for file in list(files.documentation_pages())
        if file.generated_by is None
        for target in _outside(file.src_uri, Path(str(file.abs_src_path)).read_text(encoding="utf-8"))
    }
    done: set[Path] = set()
    while wanted - done:  # a linked page of Markdown links to others
        for target in wanted - done:
            done.add(target)
            if target.parts[0] == "docs" and (ROOT / target).is_file():
                continue
            text = _source(target)
            files.append(File.generated(config, _place(target), content=text, inclusion=InclusionLevel.NOT_IN_NAV))
            if target.suffix == ".md":
                wanted |= set(_outside(_place(target), text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files beyond docs/ to their pages."""
    here = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        found = _target(here, match[1])
        if found is None:
            return match[0]
        return f"]({posixpath.relpath(_place(found), posixpath.dirname(here))})"

    return _beside_code(markdown, lambda text: LINK.sub(moved, text))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write formulas as MathML."""

    def drawn(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        formula = convert(html.unescape(match[2]).strip(), display=display)
        formula = BAR.sub('<mo lspace="0" rspace="0">|</mo>', formula)  # |x| is a norm; browsers space a relation
        return f'<{match[1]} class="arithmatex">{formula}</{match[1]}>'

    return FORMULA.sub(drawn, content)


def _reference(room: str, title: str) -> str:
    """The page of a room: its own docstring, then each module that has public names."""
    lines = [f"# {title}", "", f"`fewstep.{room}`: {_said(ROOT / 'fewstep' / room / '__init__.py')}", ""]
    for file in sorted((ROOT / "fewstep" / room).glob("*.py")):
        if file.stem != "__init__" and "__all__" in file.read_text(encoding="utf-8"):
            lines += [f"## {file.stem}", "", f"::: fewstep.{room}.{file.stem}", ""]
    return "\n".join(lines)


def _said(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def _beside_code(markdown: str, change: Any) -> str:
    """Change what is no code."""
    parts, last = [], 0
    for block in BLOCK.finditer(markdown):
        parts += [change(markdown[last : block.start()]), block[0]]
        last = block.end()
    return "".join([*parts, change(markdown[last:])])


def _outside(here: str, markdown: str) -> list[Path]:
    found = []
    _beside_code(markdown, lambda text: found.extend(LINK.findall(text)) or text)
    return [target for link in found if (target := _target(here, link)) is not None]


def _target(here: str, link: str) -> Path | None:
    """The file or folder of the repository beyond docs/ that a link names, relative to its root."""
    path = link.split("#")[0]
    if not path or "://" in link or link.startswith("mailto:"):
        return None
    # a page of a source stands at source/<path>.md and links as that file does
    base = here.removeprefix("source/") if here.startswith("source/") else f"docs/{here}"
    target = Path(posixpath.normpath(posixpath.join(posixpath.dirname(base), path)))
    if target.parts[:1] == ("..",) or not (ROOT / target).exists():
        return None
    inside = target.parts[0] == "docs"
    if inside and (ROOT / target).is_file():  # a page or a picture of the site, which mkdocs itself resolves
        return target if here.startswith("source/") else None
    return target


def _place(target: Path) -> str:
    """Where a file or folder stands in the site."""
    if (ROOT / target).is_dir():
        return (target.relative_to("docs") if target.parts[0] == "docs" else "source" / target).as_posix() + "/index.md"
    if target.parts[0] == "docs":
        return target.relative_to("docs").as_posix()
    return f"source/{target.as_posix()}" + ("" if target.suffix == ".md" else ".md")


def _source(target: Path) -> str:
    """A page with a file's text, a notebook's cells or a folder's names."""
    path = ROOT / target
    if path.is_dir():
        entries = sorted(entry for entry in path.iterdir() if entry.name not in ("__pycache__", "README.md"))
        # the site holds the files in docs/ themselves, and can link to them
        lines = [
            f"* [{e.name}]({e.name})" if target.parts[0] == "docs" and e.is_file() else f"* `{e.name}`" for e in entries
        ]
        about = path / "README.md"
        return (
            (about.read_text(encoding="utf-8") if about.exists() else f"# {target.as_posix()}\n")
            + "\n"
            + "\n".join(lines)
            + "\n"
        )
    text = path.read_text(encoding="utf-8")
    if target.suffix == ".md":
        return text
    if target.suffix == ".ipynb":
        cells = [("".join(cell["source"]), cell["cell_type"]) for cell in json.loads(text)["cells"]]
        return "\n\n".join(said if kind == "markdown" else f"```python\n{said}\n```" for said, kind in cells) + "\n"
    fence = "`" * (max(map(len, re.findall("`+", text)), default=2) + 1)
    fence = max(fence, "```", key=len)
    return f'# {target.as_posix()}\n\n{fence} {LANGUAGES.get(target.suffix, "text")} linenums="1"\n{text.rstrip()}\n{fence}\n'
